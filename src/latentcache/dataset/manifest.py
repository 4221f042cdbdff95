"""Manifests: numbered snapshots of which committed units make up the dataset.

Manifest N+1 is a function of manifest N, one listing of the source, and the receipts. Receipts hold
what was done; a manifest says which of it counts. It names its units through segments, immutable
Parquet files with one row per unit, less the names in `removed`; a new manifest adds one segment.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentcache.dataset.contract import FORMAT_VERSION
from latentcache.dataset.parquet import read_table
from latentcache.dataset.receipts import (
    Receipt,
    Unit,
    UnitRecord,
    list_receipt_names,
    read_receipts,
    record_from_json,
)
from latentcache.dataset.statistics import Statistics, merge_all
from latentcache.errors import DatasetError, ObjectNotFound, SourceError
from latentcache.storage import Store

MANIFESTS = "manifests"
SEGMENTS = "segments"

# `on_missing: drop` refuses to believe a listing in which more of the sources than this are gone.
MAX_MISSING_SHARE = 0.1

Listing = Mapping[str, Sequence[Unit]]
"""Each source URL that is listed now, with its units at the listed version."""

_FILE_TYPE = pa.struct(
    [
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("num_rows", pa.int64()),
        ("bucket", pa.string()),
    ]
)
_SEGMENT_SCHEMA = pa.schema(
    [
        (
            "unit",
            pa.struct(
                [
                    ("id", pa.string()),
                    ("source", pa.string()),
                    ("size_bytes", pa.int64()),
                    ("version", pa.string()),
                ]
            ),
        ),
        ("generation", pa.int32()),
        ("attempt", pa.string()),
        ("num_samples", pa.int64()),
        ("num_rows", pa.int64()),
        ("num_rejects", pa.int64()),
        ("files", pa.list_(_FILE_TYPE)),
        ("rejects", _FILE_TYPE),
        ("qa", pa.string()),
        ("statistics", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment file of a manifest."""

    path: str
    sha256: str
    num_units: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A numbered snapshot; `removed` names units of its segments (`<unit>-<generation>`) that no
    longer count, `stale` the sources whose listed version is not encoded yet and whose older rows
    stand in for it. `complete` says that every listed source is encoded at its listed version.
    """

    number: int
    complete: bool
    created_at: str
    contract: str
    segments: tuple[Segment, ...]
    removed: tuple[str, ...]
    stale: tuple[str, ...]
    num_units: int
    num_samples: int
    num_rows: int
    num_rejects: int
    buckets: dict[str, int]
    statistics: Statistics
    format_version: int = FORMAT_VERSION

    @property
    def path(self) -> str:
        """Where the manifest lies."""
        return f"{MANIFESTS}/{self.number:08d}.json"

    def to_bytes(self) -> bytes:
        """Give the manifest as JSON."""
        tree = asdict(replace(self, statistics=None))  # type: ignore[arg-type]
        tree["statistics"] = self.statistics.to_json()
        return json.dumps(tree, sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Manifest:
        """Read what `to_bytes` gave; `url` is for the error.

        Raises:
            DatasetError: it is damaged or of another format version.
        """
        try:
            tree = json.loads(data)
            if tree["format_version"] != FORMAT_VERSION:
                raise DatasetError(f"{url} has format version {tree['format_version']}")
            tree["segments"] = tuple(Segment(**segment) for segment in tree["segments"])
            tree["removed"], tree["stale"] = tuple(tree["removed"]), tuple(tree["stale"])
            tree["statistics"] = Statistics.from_json(tree["statistics"])
            return cls(**tree)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{url} is not a manifest: {error}") from error


def list_manifests(store: Store) -> list[int]:
    """List the numbers of all manifests, oldest first."""
    matches = (re.fullmatch(rf"{MANIFESTS}/(\d{{8}})\.json", i.path) for i in store.list(MANIFESTS))
    return [int(match[1]) for match in matches if match]


def read_manifest(store: Store, number: int) -> Manifest:
    """Read one manifest.

    Raises:
        DatasetError: there is none of that number, or it is damaged.
    """
    path = f"{MANIFESTS}/{number:08d}.json"
    try:
        return Manifest.from_bytes(store.read_bytes(path), store.url_of(path))
    except ObjectNotFound as error:
        known = list_manifests(store)
        have = f"it has {known[0]} to {known[-1]}" if known else "it has none"
        raise DatasetError(f"{store.url} has no manifest {number}; {have}") from error


def newest_manifest(store: Store) -> Manifest | None:
    """Read the newest manifest, complete or not; None where there is none."""
    numbers = list_manifests(store)
    return read_manifest(store, numbers[-1]) if numbers else None


def read_records(store: Store, manifest: Manifest) -> list[UnitRecord]:
    """Read the units that count in a manifest, in the order of their sources.

    Raises:
        DatasetError: a segment is missing or damaged.
    """
    removed = set(manifest.removed)
    records = (record for table in _segments(store, manifest) for record in _records(table))
    live = (record for record in records if record.name not in removed)
    return sorted(live, key=lambda record: (record.unit.source, record.unit.id))


def read_files(store: Store, manifest: Manifest) -> pa.Table:
    """Read the data files of a manifest's units, in the order of `read_records`.

    Columns are `unit` (its id) and those of `DataFile`. Millions of files take no Python object
    each, as records would.

    Raises:
        DatasetError: a segment is missing or damaged.
    """
    tables = []
    removed = pa.array(manifest.removed, pa.string())
    for segment in _segments(store, manifest, ["unit", "generation", "files"]):
        unit = segment["unit"].combine_chunks()
        table = pa.table(
            {
                "source": pc.struct_field(unit, "source"),
                "unit": pc.struct_field(unit, "id"),
                "files": segment["files"],
            }
        )
        generation = segment["generation"].cast(pa.string())
        names = pc.binary_join_element_wise(table["unit"], generation, "-")
        tables.append(table.filter(pc.invert(pc.is_in(names, value_set=removed))))
    empty = pa.schema(
        [("source", pa.string()), ("unit", pa.string()), _SEGMENT_SCHEMA.field("files")]
    )
    tables.append(empty.empty_table())
    units = pa.concat_tables(tables).sort_by([("source", "ascending"), ("unit", "ascending")])
    lists = units["files"].combine_chunks()
    files = pa.Table.from_struct_array(pc.list_flatten(lists))
    ids = units["unit"].take(pc.list_parent_indices(lists))
    return files.add_column(0, "unit", ids)


def _segments(
    store: Store, manifest: Manifest, columns: Sequence[str] | None = None
) -> Iterable[pa.Table]:
    for segment in manifest.segments:
        try:
            data = store.read_bytes(segment.path)
        except ObjectNotFound as error:
            raise DatasetError(
                f"manifest {manifest.number} names {store.url_of(segment.path)}, which is gone"
            ) from error
        if hashlib.sha256(data).hexdigest() != segment.sha256:
            raise DatasetError(f"{store.url_of(segment.path)} is damaged: its SHA-256 differs")
        yield read_table(pa.BufferReader(data), columns)


def _records(table: pa.Table) -> list[UnitRecord]:
    rows = table.drop_columns("statistics").to_pylist()
    return [record_from_json({**row, "qa": json.loads(row["qa"])}) for row in rows]


class State:
    """All that is known of an output: its newest manifest, and receipts that it does not name.

    `current` holds each unit's record of the highest generation, None where that is `void`.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest = newest_manifest(store)
        self.current: dict[str, UnitRecord | None] = {}
        self.generations: dict[str, int] = {}
        self.in_segments: dict[str, UnitRecord] = {}
        self.outside: dict[str, Receipt] = {}
        if self.manifest:
            for table in _segments(store, self.manifest):
                for record in _records(table):
                    self.in_segments[record.name] = record
                    self._advance(record, record)
        names = (n for n in list_receipt_names(store) if n not in self.in_segments)
        for receipt in read_receipts(store, names):
            self.add(receipt)

    def add(self, receipt: Receipt) -> None:
        """Take in one more receipt."""
        record = receipt.record
        self.outside[record.name] = receipt
        self._advance(record, record if receipt.state == "rows" else None)

    def _advance(self, record: UnitRecord, current: UnitRecord | None) -> None:
        unit_id = record.unit.id
        if record.generation >= self.generations.get(unit_id, -1):
            self.generations[unit_id] = record.generation
            self.current[unit_id] = current

    @property
    def live(self) -> dict[str, UnitRecord]:
        """Give the units that count in the newest manifest, by name."""
        removed = set(self.manifest.removed) if self.manifest else set()
        return {name: r for name, r in self.in_segments.items() if name not in removed}


@dataclass(frozen=True, slots=True)
class _Selection:
    records: dict[str, UnitRecord]
    stale: tuple[str, ...]
    complete: bool


def select(state: State, listing: Listing, on_missing: str) -> _Selection:
    """Decide which units the next manifest names.

    A source whose units at its listed version are all committed contributes exactly those. One that
    changed and is unfinished keeps the units that the manifest has of it and is named in `stale`. A
    source that is no longer listed keeps its units, or loses them with `on_missing="drop"`.

    Raises:
        SourceError: `drop`, but more than a tenth of the sources are gone.
    """
    before: dict[str, list[UnitRecord]] = {}
    for record in state.live.values():
        before.setdefault(record.unit.source, []).append(record)
    chosen: list[UnitRecord] = []
    stale: list[str] = []
    complete = True
    for source, units in listing.items():
        records = [state.current.get(unit.id) for unit in units]
        committed = [record for record in records if record is not None]
        if len(committed) == len(units):
            chosen += committed
        else:
            complete = False
            if source in before:
                chosen += before[source]
                stale.append(source)
    missing = before.keys() - listing.keys()
    if on_missing == "drop" and missing:
        if len(missing) > MAX_MISSING_SHARE * len(before):
            raise SourceError(
                f"{len(missing)} of {len(before)} sources are no longer listed, such as "
                f"{min(missing)}: too many to drop their rows; check `source.shards`, or set "
                "`source.on_missing: keep`"
            )
    else:
        chosen += [record for source in missing for record in before[source]]
    return _Selection({record.name: record for record in chosen}, tuple(sorted(stale)), complete)


def write_next(
    state: State,
    contract: str,
    num_channels: int,
    listing: Callable[[], Listing],
    *,
    on_missing: str,
    may_complete: bool = True,
) -> tuple[State, Manifest | None]:
    """Write the next manifest if it would differ from the newest one.

    Args:
        state: what is known of the output; given back, read anew if another driver was faster.
        contract: fingerprint of the dataset's contract.
        num_channels: channels of a stored latent.
        listing: gives the source's listing; called again after a lost race.
        on_missing: see `select`.
        may_complete: False holds `complete` back, after a check failed.

    Returns:
        The state, and the newest manifest (None where there is nothing to name yet).
    """
    while True:
        selection = select(state, listing(), on_missing)
        selection = replace(selection, complete=selection.complete and may_complete)
        newest = state.manifest
        if newest is None and not selection.records and not selection.complete:
            return state, None
        if newest and (
            selection.records.keys() == state.live.keys()
            and selection.stale == newest.stale
            and selection.complete == newest.complete
        ):
            return state, newest
        manifest = _build(state, selection, contract, num_channels)
        if state.store.put_if_absent(manifest.path, manifest.to_bytes()):
            for name in selection.records.keys() - state.in_segments.keys():
                state.in_segments[name] = state.outside.pop(name).record
            state.manifest = manifest
            return state, manifest
        state = State(state.store)


def _build(state: State, selection: _Selection, contract: str, num_channels: int) -> Manifest:
    records = selection.records
    fresh = [state.outside[name] for name in records.keys() - state.in_segments.keys()]
    removed = state.in_segments.keys() - records.keys()
    newest = state.manifest
    parts = [receipt.statistics for receipt in fresh]
    only_added = state.live.keys() <= records.keys() <= state.live.keys() | state.outside.keys()
    if newest and only_added:
        parts.insert(0, newest.statistics)
    elif newest:  # minima and histograms cannot be taken back: merge anew what still counts
        for table in _segments(state.store, newest):
            names = [record.name for record in _records(table)]
            texts = table["statistics"].to_pylist()
            live = (text for name, text in zip(names, texts, strict=True) if name in records)
            parts += [Statistics.from_json(json.loads(text)) for text in live]
    buckets: Counter[str] = Counter()
    for record in records.values():
        for file in record.files:
            if file.path.endswith(".parquet"):  # each bucket has one: safetensors has .rows
                buckets[file.bucket] += file.num_rows
    segments = newest.segments if newest else ()
    return Manifest(
        number=newest.number + 1 if newest else 1,
        complete=selection.complete,
        created_at=datetime.now(UTC).isoformat(),
        contract=contract,
        segments=segments + ((_put_segment(state.store, fresh),) if fresh else ()),
        removed=tuple(sorted(removed)),
        stale=selection.stale,
        num_units=len(records),
        num_samples=sum(record.num_samples for record in records.values()),
        num_rows=sum(record.num_rows for record in records.values()),
        num_rejects=sum(record.num_rejects for record in records.values()),
        buckets=dict(sorted(buckets.items())),
        statistics=merge_all(parts, num_channels),
    )


def _put_segment(store: Store, receipts: Sequence[Receipt]) -> Segment:
    rows: list[dict[str, Any]] = [
        {
            **asdict(r.record),
            "qa": json.dumps(r.record.qa and asdict(r.record.qa)),
            "statistics": json.dumps(r.statistics.to_json()),
        }
        for r in sorted(receipts, key=lambda r: r.record.unit.source)
    ]
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _SEGMENT_SCHEMA), buffer, compression="ZSTD")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = f"{SEGMENTS}/{digest}.parquet"
    store.put(path, buffer.getvalue())
    return Segment(path, digest, len(rows))
