"""Manifest parts: immutable Parquet files with one row per committed unit, which manifests list.

A reader of hundreds of thousands of units holds columns in Arrow's memory, and creates Python
objects only for the units that it accesses. The annotations of `UnitRecord` decide the types of
columns and the checks of their values.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from io import BytesIO
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentcache.dataset.parquet import read_table
from latentcache.dataset.parse import (
    BucketName,
    Count,
    Pattern,
    Sha256,
    check,
    hints_of,
    load_json,
)
from latentcache.dataset.receipts import (
    NO_SAMPLES,
    Receipt,
    RowCounts,
    UnitFacts,
    UnitRecord,
    UnitSummary,
    fields_of,
)
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.storage import Store

Ints = npt.NDArray[np.int64]

PARTS = "parts"

_READ_THREADS = 8

# How many records are created at a time, to bound memory for very many units.
_RECORDS_AT_ONCE = 1000

# Fields that are stored as JSON text. Very many units have equal values in the shared ones.
_SHARED = ("columns", "absent_fields", "reject_reasons")
_JSON = ("qa", *_SHARED)


def _arrow_type(hint: Any) -> pa.DataType:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Annotated, Union, UnionType):
        return _arrow_type(args[0])
    if origin is tuple:
        return pa.list_(_arrow_type(args[0]))
    if is_dataclass(hint):
        return pa.struct([(name, _arrow_type(h)) for name, h in hints_of(hint).items()])  # type: ignore[arg-type]
    return pa.int64() if hint is int else pa.string()


_HINTS: dict[str, Any] = hints_of(UnitRecord) | {"statistics": str}
PART_SCHEMA = pa.schema(
    [(name, _arrow_type(str if name in _JSON else hint)) for name, hint in _HINTS.items()]
)
SUMMARY_COLUMNS = ("unit", "qa", *(field.name for field in fields(UnitFacts)))


@dataclass(frozen=True, slots=True)
class ManifestPart:
    """One part of a manifest; its path is `parts/<sha256>.parquet`."""

    path: str
    sha256: Sha256
    num_units: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals(RowCounts):
    """The sums over units; `buckets` counts rows by bucket."""

    num_units: Count
    buckets: dict[BucketName, Count]
    statistics: Statistics

    @classmethod
    def of(cls, units: Iterable[tuple[UnitRecord, Statistics]], num_channels: int) -> Totals:
        """Return the sums over units.

        Args:
            units, num_channels: record and statistics of each, and channels of a stored latent.
        """
        none = Statistics.empty(num_channels)
        total = Totals(num_units=0, **NO_SAMPLES, buckets={}, statistics=none)
        for record, statistics in units:
            # Each bucket has one Parquet file, also beside a safetensors file.
            files = (file for file in record.files if file.path.endswith(".parquet"))
            buckets = {file.bucket: file.num_rows for file in files}
            counts = fields_of(RowCounts, record)
            unit = Totals(num_units=1, **counts, buckets=buckets, statistics=statistics)
            total = total.merge(unit)
        return total

    def merge(self, other: Totals) -> Totals:
        """Return the sums of both totals."""
        names = ["num_units", *fields_of(RowCounts, self)]
        return Totals(
            **{name: getattr(self, name) + getattr(other, name) for name in names},
            buckets=dict(sorted((Counter(self.buckets) + Counter(other.buckets)).items())),
            statistics=self.statistics.merge(other.statistics),
        )


def put_part(store: Store, receipts: Iterable[Receipt]) -> ManifestPart:
    """Write a manifest part with the units of receipts, sorted by source.

    Args:
        store, receipts: the output, and the receipts of the units.
    """
    rows = []
    for receipt in sorted(receipts, key=lambda r: r.record.unit.source):
        row = asdict(receipt.record) | {"statistics": receipt.statistics.to_json()}
        rows.append(row | {name: json.dumps(row[name]) for name in (*_JSON, "statistics")})
    # The random value makes every part unique. So a manifest part that a killed run left behind
    # belongs to no other run, and can be deleted.
    schema = PART_SCHEMA.with_metadata({"latentcache.manifest_part": secrets.token_hex(16)})
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="ZSTD")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    part = ManifestPart(f"{PARTS}/{digest}.parquet", digest, len(rows))
    store.put(part.path, buffer.getvalue())
    return part


def read_parts(
    store: Store,
    parts: Iterable[ManifestPart],
    named_by: str,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """Yield the rows of parts in order; raise `DatasetError` if one is missing or damaged.

    Args:
        store, parts: the output, and the parts to read.
        named_by: name of the manifest that lists them, for error messages.
        columns: names of the columns to read; None reads all.
    """

    def read(part: ManifestPart) -> pa.Table:
        url = store.url_of(part.path)
        try:
            data = store.read_bytes(part.path)
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise ValueError("its SHA-256 differs")
            table = read_table(pa.BufferReader(data), columns)
            _check_part(table, PART_SCHEMA.names if columns is None else columns)
            if len(table) != part.num_units:
                raise ValueError(f"it has {len(table)} units, not {part.num_units}")
        except ObjectNotFound as error:
            raise DatasetError(f"{named_by} lists {url}, which does not exist") from error
        except (DatasetError, pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{url} is damaged: {error}") from error
        return table

    remaining = iter(parts)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        futures = deque(pool.submit(read, part) for part in islice(remaining, _READ_THREADS))
        while futures:
            yield futures.popleft().result()
            futures.extend(pool.submit(read, part) for part in islice(remaining, 1))


def _check_part(table: pa.Table, names: Sequence[str]) -> None:
    """Raise `ValueError` if columns of a part do not have the form in which a run writes them."""
    for name in names:
        kind = PART_SCHEMA.field(name).type
        if name not in table.column_names or table.schema.field(name).type != kind:
            raise ValueError(f"it has no column {name} of type {kind}")
    table.validate(full=True)  # this also checks that text is UTF-8
    arrays = {name: table[name].combine_chunks() for name in names}
    for name, array in arrays.items():
        _check_values(array, str if name in _JSON else _HINTS[name], name)
        if name in _SHARED:
            for text in pc.unique(array).to_pylist():
                _parse(name, text)
    if files := arrays.get("files"):
        ids = pc.struct_field(arrays["unit"], "id").take(pc.list_parent_indices(files))
        _check_owner(pc.list_flatten(files), "data", ids)
    if rejects := arrays.get("rejects"):
        is_valid = rejects.is_valid()
        ids = pc.struct_field(arrays["unit"], "id").filter(is_valid)
        _check_owner(rejects.filter(is_valid), "rejects", ids)


def _check_values(array: pa.Array, hint: Any, name: str) -> None:
    """Raise `ValueError` if values do not have the form that a type annotation declares."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # the only unions are `X | None`
        _check_values(array.filter(array.is_valid()), args[0], name)
        return
    if array.null_count:
        raise ValueError(f"{name} is missing")
    if origin is Annotated:
        _check_values(array, args[0], name)
        for rule in args[1:]:
            if isinstance(rule, Pattern):
                is_good = pc.match_substring_regex(array, f"^(?:{rule.regex})$")
            else:
                is_high = pc.greater_equal(array, rule.low)
                is_good = pc.and_(is_high, pc.less_equal(array, rule.high))
            if bad := array.filter(pc.invert(is_good)):
                raise ValueError(f"{name} is {bad[0].as_py()!a:.60}")
    elif origin is tuple:
        _check_values(pc.list_flatten(array), args[0], name)
    elif is_dataclass(hint):
        for field, field_hint in hints_of(hint).items():  # type: ignore[arg-type]
            _check_values(pc.struct_field(array, field), field_hint, f"{name}.{field}")


def _check_owner(files: pa.StructArray, folder: str, ids: pa.Array) -> None:
    """Raise `ValueError` if files are not those of units in a folder, or if one occurs twice."""
    paths = pc.struct_field(files, "path")
    starts = pc.utf8_slice_codeunits(paths, 0, len(f"{folder}/{'0' * 32}"))
    is_own = pc.equal(starts, pc.binary_join_element_wise(folder, ids, "/"))
    has_bucket = pc.not_equal(pc.struct_field(files, "bucket"), "")
    is_good = pc.and_(is_own, pc.equal(has_bucket, folder == "data"))
    if bad := paths.filter(pc.invert(is_good)):
        raise ValueError(f"{bad[0]} is of another unit, or not in {folder}/")
    if pc.count_distinct(paths).as_py() < len(paths):
        raise ValueError(f"a file occurs twice in {folder}/")


@lru_cache(1024)
def _parse(name: str, text: str) -> Any:
    """Return the value of a field that is stored as JSON; units with equal values share it."""
    try:
        return check(_HINTS[name], load_json(text), name)
    except ValueError as error:
        raise DatasetError(f"{name} of a unit in a manifest part is damaged: {error}") from error


def _read_column(table: pa.Table, name: str) -> list[Any]:
    array = table[name].combine_chunks()
    if name in _JSON:
        return [_parse(name, text) for text in array.to_pylist()]
    return _read_values(array, _HINTS[name])


def _read_values(array: pa.Array, hint: Any) -> list[Any]:
    """Return checked values as the objects that a type annotation declares."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        pairs = zip(_read_values(array, args[0]), array.is_valid().to_pylist(), strict=True)
        return [value if is_valid else None for value, is_valid in pairs]
    if origin is tuple:
        items = iter(_read_values(pc.list_flatten(array), args[0]))
        return [tuple(islice(items, num)) for num in pc.list_value_length(array).to_pylist()]
    if is_dataclass(hint):
        cls: Any = hint
        columns = zip(array.flatten(), hints_of(cls).values(), strict=True)
        return list(map(cls, *(_read_values(column, h) for column, h in columns)))
    values_of: list[Any] = array.to_pylist()
    return values_of


def summaries_of(table: pa.Table, number: int) -> Iterator[UnitSummary]:
    """Yield the summaries of a manifest part's units.

    Args:
        table, number: the part's rows with `SUMMARY_COLUMNS`, and its index in the manifest.
    """
    columns = [_read_column(table, name) for name in SUMMARY_COLUMNS]
    for unit, qa, *values in zip(*columns, strict=True):
        facts = dict(zip(SUMMARY_COLUMNS[2:], values, strict=True))
        qa = qa and qa.summary
        yield UnitSummary(unit_id=unit.id, source=unit.source, qa=qa, part=number, **facts)


def names_of(table: pa.Table) -> pa.Array:
    """Return the names of a manifest part's units, `<unit>-<generation>`: strings [num_units]."""
    ids = pc.struct_field(table["unit"].combine_chunks(), "id")
    generations = table["generation"].combine_chunks().cast(pa.string())
    return pc.binary_join_element_wise(ids, generations, "-")


def without(table: pa.Table, removed: Collection[str]) -> pa.Table:
    """Return the rows of a manifest part without removed units.

    Args:
        table, removed: the rows, and the names of the removed units, `<unit>-<generation>`.
    """
    gone = pc.is_in(names_of(table), value_set=pa.array(removed, pa.string()))
    return table.filter(pc.invert(gone))


def totals_of(table: pa.Table, num_channels: int) -> Totals:
    """Return the sums over the units of a manifest part.

    Args:
        table, num_channels: the part's rows with all columns, and the channels of a stored latent.
    """
    try:
        statistics = [Statistics.from_json(load_json(t)) for t in table["statistics"].to_pylist()]
    except ValueError as error:
        raise DatasetError(f"a manifest part is damaged: {error}") from error
    return Totals.of(zip(_records_of(table), statistics, strict=True), num_channels)


def _records_of(table: pa.Table) -> list[UnitRecord]:
    names = [field.name for field in fields(UnitRecord)]
    rows = zip(*(_read_column(table, name) for name in names), strict=True)
    return [UnitRecord(**dict(zip(names, row, strict=True))) for row in rows]


class UnitRecords(Sequence[UnitRecord]):
    """The records of very many units, stored as columns; each record is created when accessed."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    def shards(self) -> tuple[Ints, Ints]:
        """Return the unit's index and the row count of each Parquet file, int64 [num_shards]."""
        lists = self._table["files"].combine_chunks()
        files = pc.list_flatten(lists)
        is_rows = pc.ends_with(pc.struct_field(files, "path"), ".parquet")
        columns = (pc.list_parent_indices(lists), pc.struct_field(files, "num_rows"))
        unit_of, num_rows = (column.filter(is_rows).to_numpy() for column in columns)
        return unit_of.astype(np.int64), num_rows

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[UnitRecord]:
        for first in range(0, len(self), _RECORDS_AT_ONCE):
            yield from _records_of(self._table.slice(first, _RECORDS_AT_ONCE))

    def __getitem__(self, index: int) -> UnitRecord:  # type: ignore[override]  # no slices
        (record,) = _records_of(self._table.slice(range(len(self))[index], 1))
        return record
