"""Segments: immutable Parquet files with one row per committed unit, which manifests name.

They are read column by column: of hundreds of thousands of units, a reader keeps what it asks for
in Arrow's memory, and makes Python objects of those that it looks at.
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
from latentcache.dataset.segment_checks import check_segment
from latentcache.dataset.statistics import Statistics, merge_all
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.storage import Store

Ints = npt.NDArray[np.int64]

SEGMENTS = "segments"

_READ_THREADS = 8

_MOST_SHARED = 1024

# Records made at a time, of very many.
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
SEGMENT_SCHEMA = pa.schema(
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
class Segment:
    """One segment file of a manifest."""

    path: str
    sha256: Sha256
    num_units: Count


def segment_path(sha256: str) -> str:
    """Return where the segment of a hash lies."""
    return f"{SEGMENTS}/{sha256}.parquet"


@dataclass(frozen=True, slots=True)
class Totals:
    """What units come to; `buckets` counts rows by bucket."""

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
        """Add up units; `num_channels` is of a stored latent."""
        units = list(units)
        records = [record for record, _ in units]
        buckets: Counter[str] = Counter()
        for record in records:
            for file in record.files:
                if file.path.endswith(".parquet"):  # each bucket has one: safetensors has .rows
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
        """Add up two."""
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


def put_segment(store: Store, receipts: Iterable[Receipt]) -> Segment:
    """Write a segment of the units of some receipts, in the order of their sources."""
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
    # No two writers share a segment, so that one which a killed run left can be deleted.
    schema = SEGMENT_SCHEMA.with_metadata({"latentcache.segment": secrets.token_hex(16)})
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="ZSTD")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = segment_path(digest)
    store.put(path, buffer.getvalue())
    return Segment(path, digest, len(rows))


def read_segments(
    store: Store,
    segments: Iterable[Segment],
    named_by: str,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """Read segments, a few ahead; all columns, or some.

    Args:
        store: the output.
        segments: which.
        named_by: who says that they are there, for the error.
        columns: None takes all.

    Raises:
        DatasetError: one is gone or damaged.
    """

    def read(segment: Segment) -> pa.Table:
        try:
            data = store.read_bytes(segment.path)
        except ObjectNotFound as error:
            raise DatasetError(
                f"{named_by} names {store.url_of(segment.path)}, which is gone"
            ) from error
        if hashlib.sha256(data).hexdigest() != segment.sha256:
            raise DatasetError(f"{store.url_of(segment.path)} is damaged: its SHA-256 differs")
        try:
            table = read_table(pa.BufferReader(data), columns)
            check_segment(table, SEGMENT_SCHEMA, columns)
            for name in _SHARED.keys() & set(table.column_names):
                for text in pc.unique(table[name]).to_pylist():
                    _SHARED[name](text)
            if len(table) != segment.num_units:
                raise ValueError(f"it has {len(table)} units, not {segment.num_units}")
        except (DatasetError, pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{store.url_of(segment.path)} is damaged: {error}") from error
        return table

    left = iter(segments)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        ahead: deque[Future[pa.Table]] = deque()
        while True:
            ahead.extend(pool.submit(read, s) for s in islice(left, _READ_THREADS - len(ahead)))
            if not ahead:
                return
            yield ahead.popleft().result()


def summaries_of(table: pa.Table, number: int) -> Iterator[UnitSummary]:
    """Give what planning needs of a segment's units; `number` is the segment's position."""
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
            segment=number,
            num_images=images,
            num_extra_images=extra,
        )


# Very many units have the same of these, and share the objects.


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
        found: dict[str, int] = check(dict[str, Count], load_json(text), "reject_reasons")
        return found


@contextmanager
def _parsing(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DatasetError(f"{name} of a unit in a segment is damaged: {error}") from error


def _qa_summary(text: str) -> QaSummary | None:
    qa = _qa_file(text)
    return QaSummary(qa.num_rows, qa.mean_psnr_db, qa.min_drift_db) if qa else None


def names_of(table: pa.Table) -> pa.Array:
    """Give the names of a segment's units, `<unit>-<generation>`: strings [num_units]."""
    ids = pc.struct_field(table["unit"].combine_chunks(), "id")
    generations = table["generation"].combine_chunks().cast(pa.string())
    return pc.binary_join_element_wise(ids, generations, "-")


def without(table: pa.Table, removed: Collection[str]) -> pa.Table:
    """Leave out the units of these names."""
    gone = pc.is_in(names_of(table), value_set=pa.array(removed, pa.string()))
    return table.filter(pc.invert(gone))


def totals_of(table: pa.Table, num_channels: int) -> Totals:
    """Add up the units of a segment that was read whole."""
    parts = (_statistics(text) for text in table["statistics"].to_pylist())
    return Totals.of(zip(records_of(table), parts, strict=True), num_channels)


def records_of(table: pa.Table) -> list[UnitRecord]:
    """Make records of a segment's rows."""
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
    """The records of very many units: columns of text and numbers, of which records are made as
    they are asked for.

    Args:
        table: rows of segments, in any order; they are given by source.
    """

    def __init__(self, table: pa.Table) -> None:
        unit = table["unit"].combine_chunks()
        keys = {name: pc.struct_field(unit, name) for name in ("source", "id")}
        order = pc.sort_indices(
            pa.table(keys), sort_keys=[("source", "ascending"), ("id", "ascending")]
        )
        self._table = table.combine_chunks().take(order)

    def shards(self) -> tuple[Ints, Ints]:
        """Of each file of rows, of which a bucket of a unit has one, in the order of the units:
        the unit's index, and the number of rows; int64 [num_shards] both.
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
