"""Manifest parts: immutable Parquet files with one row per committed unit, which manifests list.

They are read column by column. A reader of hundreds of thousands of units holds the columns that it
needs in Arrow's memory, and creates Python objects only for the units that it accesses.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentcache.dataset.columns import Column, Columns, require_columns
from latentcache.dataset.manifest_part_checks import check_part
from latentcache.dataset.parquet import read_table
from latentcache.dataset.parse import Count, Sha256, build, check, load_json
from latentcache.dataset.receipts import (
    DataFile,
    QaFile,
    QaSummary,
    Receipt,
    Unit,
    UnitRecord,
    UnitSummary,
)
from latentcache.dataset.statistics import Statistics, merge_all
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.storage import Store

Ints = npt.NDArray[np.int64]

PARTS = "parts"

_READ_THREADS = 8

_MOST_SHARED = 1024

# How many records are created at a time, to bound memory for very many units.
_RECORDS_AT_ONCE = 1000

_FILE_TYPE = pa.struct(
    [
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("num_rows", pa.int64()),
        ("bucket", pa.string()),
    ]
)
PART_SCHEMA = pa.schema(
    [
        (
            "unit",
            pa.struct(
                [
                    ("id", pa.string()),
                    ("source", pa.string()),
                    ("size_bytes", pa.int64()),
                    ("version", pa.string()),
                    ("range", pa.string()),
                ]
            ),
        ),
        ("generation", pa.int32()),
        ("attempt", pa.string()),
        ("num_samples", pa.int64()),
        ("num_rows", pa.int64()),
        ("num_rejects", pa.int64()),
        ("num_images", pa.int64()),
        ("num_extra_images", pa.int64()),
        ("files", pa.list_(_FILE_TYPE)),
        ("rejects", _FILE_TYPE),
        ("qa", pa.string()),
        ("columns", pa.string()),
        ("absent_fields", pa.string()),
        ("reject_reasons", pa.string()),
        ("statistics", pa.string()),
    ]
)
SUMMARY_COLUMNS = (
    "unit",
    "generation",
    "num_samples",
    "num_rows",
    "num_rejects",
    "qa",
    "num_images",
    "num_extra_images",
    "columns",
    "absent_fields",
    "reject_reasons",
)


@dataclass(frozen=True, slots=True)
class ManifestPart:
    """One part of a manifest."""

    path: str
    sha256: Sha256
    num_units: Count


def part_path(sha256: str) -> str:
    """Return the path of the part with a hash."""
    return f"{PARTS}/{sha256}.parquet"


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums over units; `buckets` counts rows by bucket."""

    num_units: int
    num_samples: int
    num_rows: int
    num_rejects: int
    buckets: Counter[str]
    statistics: Statistics
    num_images: int = 0
    num_extra_images: int = 0

    @classmethod
    def of(cls, units: Iterable[tuple[UnitRecord, Statistics]], num_channels: int) -> Totals:
        """Return the sums over units.

        Args:
            units: the record and the statistics of each unit.
            num_channels: number of channels of a stored latent.
        """
        units = list(units)
        records = [record for record, _ in units]
        buckets: Counter[str] = Counter()
        for record in records:
            for file in record.files:
                # Each bucket has one Parquet file, also beside a safetensors file.
                if file.path.endswith(".parquet"):
                    buckets[file.bucket] += file.num_rows
        return cls(
            num_units=len(records),
            num_samples=sum(record.num_samples for record in records),
            num_rows=sum(record.num_rows for record in records),
            num_rejects=sum(record.num_rejects for record in records),
            buckets=buckets,
            statistics=merge_all((statistics for _, statistics in units), num_channels),
            num_images=sum(record.num_images for record in records),
            num_extra_images=sum(record.num_extra_images for record in records),
        )

    def merge(self, other: Totals) -> Totals:
        """Return the sums of both totals."""
        return Totals(
            self.num_units + other.num_units,
            self.num_samples + other.num_samples,
            self.num_rows + other.num_rows,
            self.num_rejects + other.num_rejects,
            self.buckets + other.buckets,
            self.statistics.merge(other.statistics),
            self.num_images + other.num_images,
            self.num_extra_images + other.num_extra_images,
        )


def put_part(store: Store, receipts: Iterable[Receipt]) -> ManifestPart:
    """Write a manifest part with the units of receipts, sorted by source.

    Args:
        store: the output.
        receipts: the receipts of the units.
    """
    rows: list[dict[str, Any]] = [
        {
            **asdict(r.record),
            "qa": json.dumps(r.record.qa and asdict(r.record.qa)),
            "columns": json.dumps([[c.name, c.field] for c in r.record.columns]),
            "absent_fields": json.dumps(r.record.absent_fields),
            "reject_reasons": json.dumps(r.record.reject_reasons, sort_keys=True),
            "statistics": json.dumps(r.statistics.to_json()),
        }
        for r in sorted(receipts, key=lambda r: r.record.unit.source)
    ]
    # The random value makes every part unique. So a manifest part that a killed run left behind
    # belongs to no other run, and can be deleted.
    schema = PART_SCHEMA.with_metadata({"latentcache.manifest_part": secrets.token_hex(16)})
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="ZSTD")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = part_path(digest)
    store.put(path, buffer.getvalue())
    return ManifestPart(path, digest, len(rows))


def read_parts(
    store: Store,
    parts: Iterable[ManifestPart],
    named_by: str,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """Read parts in order, and prefetch a few.

    Args:
        store: the output.
        parts: the parts to read.
        named_by: name of the manifest that lists them, for error messages.
        columns: names of the columns to read; None reads all.

    Yields:
        The rows of each part.

    Raises:
        DatasetError: a manifest part is missing or damaged.
    """

    def read(part: ManifestPart) -> pa.Table:
        try:
            data = store.read_bytes(part.path)
        except ObjectNotFound as error:
            raise DatasetError(
                f"{named_by} lists {store.url_of(part.path)}, which does not exist"
            ) from error
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise DatasetError(f"{store.url_of(part.path)} is damaged: its SHA-256 differs")
        try:
            table = read_table(pa.BufferReader(data), columns)
            check_part(table, PART_SCHEMA, columns)
            for name in _SHARED.keys() & set(table.column_names):
                for text in pc.unique(table[name]).to_pylist():
                    _SHARED[name](text)
            if len(table) != part.num_units:
                raise ValueError(f"it has {len(table)} units, not {part.num_units}")
        except (DatasetError, pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{store.url_of(part.path)} is damaged: {error}") from error
        return table

    remaining = iter(parts)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        futures: deque[Future[pa.Table]] = deque()
        while True:
            next_parts = islice(remaining, _READ_THREADS - len(futures))
            futures.extend(pool.submit(read, s) for s in next_parts)
            if not futures:
                return
            yield futures.popleft().result()


def summaries_of(table: pa.Table, number: int) -> Iterator[UnitSummary]:
    """Yield the summaries of a manifest part's units.

    Args:
        table: the rows of the part, with `SUMMARY_COLUMNS`.
        number: index of the part in its manifest.
    """
    unit = table["unit"].combine_chunks()
    columns = [pc.struct_field(unit, "id"), pc.struct_field(unit, "source")]
    columns += [table[name] for name in SUMMARY_COLUMNS[1:]]
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    for *counts, qa, images, extra, kept, absent, reasons in rows:
        unit_id, source, generation, samples, num_rows, rejects = counts
        yield UnitSummary(
            unit_id,
            source,
            generation,
            samples,
            num_rows,
            rejects,
            qa=_qa_summary(qa),
            columns=_columns(kept),
            absent_fields=_names(absent),
            reject_reasons=_counts(reasons),
            part=number,
            num_images=images,
            num_extra_images=extra,
        )


# Very many units have equal values in these columns, so they share the parsed objects.


@lru_cache(_MOST_SHARED)
def _columns(text: str) -> Columns:
    with _parsing("columns"):
        pairs = check(tuple[tuple[str, str], ...], load_json(text), "columns")
        columns = tuple(Column(name, field) for name, field in pairs)
        require_columns(columns)
        return columns


@lru_cache(_MOST_SHARED)
def _names(text: str) -> tuple[str, ...]:
    with _parsing("absent_fields"):
        names: tuple[str, ...] = check(tuple[str, ...], load_json(text), "absent_fields")
        return names


@lru_cache(_MOST_SHARED)
def _counts(text: str) -> dict[str, int]:
    with _parsing("reject_reasons"):
        counts: dict[str, int] = check(dict[str, Count], load_json(text), "reject_reasons")
        return counts


@contextmanager
def _parsing(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DatasetError(f"{name} of a unit in a manifest part is damaged: {error}") from error


def _qa_summary(text: str) -> QaSummary | None:
    qa = _qa_file(text)
    return QaSummary(qa.num_rows, qa.mean_psnr_db, qa.min_drift_db) if qa else None


def names_of(table: pa.Table) -> pa.Array:
    """Return the names of a manifest part's units, `<unit>-<generation>`: strings [num_units]."""
    ids = pc.struct_field(table["unit"].combine_chunks(), "id")
    generations = table["generation"].combine_chunks().cast(pa.string())
    return pc.binary_join_element_wise(ids, generations, "-")


def without(table: pa.Table, removed: Collection[str]) -> pa.Table:
    """Return the rows of a manifest part without those of removed units.

    Args:
        table: the rows of the part.
        removed: names of the removed units, `<unit>-<generation>`.
    """
    gone = pc.is_in(names_of(table), value_set=pa.array(removed, pa.string()))
    return table.filter(pc.invert(gone))


def totals_of(table: pa.Table, num_channels: int) -> Totals:
    """Return the sums over the units of a manifest part.

    Args:
        table: the rows of the part, with all columns.
        num_channels: number of channels of a stored latent.
    """
    statistics = (_statistics(text) for text in table["statistics"].to_pylist())
    return Totals.of(zip(records_of(table), statistics, strict=True), num_channels)


def records_of(table: pa.Table) -> list[UnitRecord]:
    """Return the records of a manifest part's rows."""
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    units = map(Unit, *_fields(columns["unit"]))
    files = map(DataFile, *_fields(columns["files"].flatten()))
    rejects = zip(*_fields(columns["rejects"]), strict=True)
    counts = pc.list_value_length(columns["files"]).to_pylist()
    counts_of = ("num_samples", "num_rows", "num_rejects", "num_images", "num_extra_images")
    names = ("generation", "attempt", *counts_of)
    values = [columns[name].to_pylist() for name in names]
    plain = (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))
    texts = {"qa": _qa_file, **_SHARED}
    parsed = [map(read, columns[name].to_pylist()) for name, read in texts.items()]
    more = (dict(zip(texts, row, strict=True)) for row in zip(*parsed, strict=True))
    return [
        UnitRecord(
            unit=unit,
            files=tuple(islice(files, num_files)),
            rejects=DataFile(*reject) if reject[0] is not None else None,
            **row,
            **other,
        )
        for unit, num_files, reject, row, other in zip(
            units, counts, rejects, plain, more, strict=True
        )
    ]


def _fields(structs: pa.StructArray) -> list[list[Any]]:
    return [field.to_pylist() for field in structs.flatten()]


def _qa_file(text: str) -> QaFile | None:
    if text == "null":
        return None
    with _parsing("qa"):
        return build(QaFile, load_json(text))


def _statistics(text: str) -> Statistics:
    with _parsing("statistics"):
        return Statistics.from_json(load_json(text))


_SHARED: dict[str, Callable[[str], Any]] = {
    "columns": _columns,
    "absent_fields": _names,
    "reject_reasons": _counts,
}


class UnitRecords(Sequence[UnitRecord]):
    """The records of very many units, stored as columns; each record is created when accessed.

    Records are sorted by source.

    Args:
        table: rows of parts, in any order.
    """

    def __init__(self, table: pa.Table) -> None:
        unit = table["unit"].combine_chunks()
        keys = {name: pc.struct_field(unit, name) for name in ("source", "id")}
        order = pc.sort_indices(
            pa.table(keys), sort_keys=[("source", "ascending"), ("id", "ascending")]
        )
        self._table = table.combine_chunks().take(order)

    def shards(self) -> tuple[Ints, Ints]:
        """Return the unit and the number of rows of each Parquet file of rows.

        Each bucket of a unit has one such file. Files are in the order of the units.

        Returns:
            The indices of the units, and the numbers of rows: both int64 [num_shards].
        """
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
            yield from records_of(self._table.slice(first, _RECORDS_AT_ONCE))

    def __getitem__(self, index: int) -> UnitRecord:  # type: ignore[override]  # no slices
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"unit {index} of {len(self)}")
        (record,) = records_of(self._table.slice(position, 1))
        return record
