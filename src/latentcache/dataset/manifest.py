"""Manifests: numbered snapshots of which committed units make up the dataset.

Manifest N+1 is a function of manifest N, one listing of the source, and the receipts. Receipts hold
what was done; a manifest says which of it counts. It names its units through segments, immutable
Parquet files with one row per unit, less the names in `removed`; a new manifest adds one segment.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.contract import FORMAT_VERSION
from latentcache.dataset.receipts import (
    Receipt,
    Unit,
    UnitSummary,
    list_receipt_names,
    read_receipts,
)
from latentcache.dataset.segments import (
    SEGMENT_SCHEMA,
    SUMMARY_COLUMNS,
    Segment,
    Totals,
    UnitRecords,
    put_segment,
    read_segments,
    summaries_of,
    totals_of,
    without,
)
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError, ObjectNotFound, SourceError
from latentcache.storage import Store

MANIFESTS = "manifests"

# `on_missing: drop` refuses to believe a listing in which more of the sources than this are gone.
MAX_MISSING_SHARE = 0.1

Listing = Mapping[str, Sequence[Unit]]
"""Each source URL that is listed now, with its units at the listed version; once given, it does not
change."""


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

    @property
    def totals(self) -> Totals:
        """What the units of the manifest come to."""
        return Totals(
            self.num_units,
            self.num_samples,
            self.num_rows,
            self.num_rejects,
            Counter(self.buckets),
            self.statistics,
        )

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


def read_records(store: Store, manifest: Manifest) -> UnitRecords:
    """Read the units that count in a manifest, in the order of their sources.

    Raises:
        DatasetError: a segment is missing or damaged.
    """
    columns = [name for name in SEGMENT_SCHEMA.names if name != "statistics"]
    empty = SEGMENT_SCHEMA.empty_table().select(columns)
    return UnitRecords(pa.concat_tables([*_live_rows(store, manifest, columns), empty]))


def read_files(store: Store, manifest: Manifest) -> pa.Table:
    """Read the data files of a manifest's units, in the order of `read_records`.

    Columns are `unit` (its id) and those of `DataFile`. Millions of files take no Python object
    each, as records would.

    Raises:
        DatasetError: a segment is missing or damaged.
    """
    columns = ["unit", "generation", "files"]
    empty = SEGMENT_SCHEMA.empty_table().select(columns)
    live = pa.concat_tables([*_live_rows(store, manifest, columns), empty])
    unit = live["unit"].combine_chunks()
    keys = {name: pc.struct_field(unit, name) for name in ("source", "id")}
    units = pa.table({**keys, "files": live["files"]})
    units = units.sort_by([("source", "ascending"), ("id", "ascending")])
    lists = units["files"].combine_chunks()
    files = pa.Table.from_struct_array(pc.list_flatten(lists))
    ids = units["id"].take(pc.list_parent_indices(lists))
    return files.add_column(0, "unit", ids)


def _live_rows(store: Store, manifest: Manifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    tables = read_segments(store, manifest.segments, f"manifest {manifest.number}", columns)
    return (without(table, manifest.removed) for table in tables)


class State:
    """All that is known of an output: its newest manifest, and receipts that it does not name.

    Of each unit it keeps a summary, and of a receipt everything until a manifest names it: then its
    segment has it. `live` holds, by source, the units that count in the newest manifest; `outside`,
    by unit, the receipts of the highest generation that are in no segment.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest = newest_manifest(store)
        self.live: dict[str, tuple[UnitSummary, ...]] = {}
        self.outside: dict[str, Receipt] = {}
        self._latest: dict[str, UnitSummary] = {}
        self._removed: set[str] = set()
        self._totals: dict[int, Totals] = {}  # by position of the segment, as far as they were read
        self._weighed: _Weighed | None = None
        self._touched: set[str] = set()  # sources of the receipts that came since
        named = self._read_segments(self.manifest) if self.manifest else set()
        names = (name for name in list_receipt_names(store) if name not in named)
        for receipt in read_receipts(store, names):
            self.add(receipt)

    def _read_segments(self, manifest: Manifest) -> set[str]:
        """Take in what the manifest's segments hold, and give the names of all their units."""
        named: set[str] = set()
        self._removed.update(manifest.removed)
        tables = read_segments(
            self.store, manifest.segments, f"manifest {manifest.number}", SUMMARY_COLUMNS
        )
        for number, table in enumerate(tables):
            for unit in summaries_of(table, number):
                named.add(unit.name)
                if unit.name not in self._removed:
                    self.live[unit.source] = _in_order((*self.live.get(unit.source, ()), unit))
                if unit.generation > self.generation(unit.unit_id):
                    self._latest[unit.unit_id] = unit
        return named

    def add(self, receipt: Receipt) -> None:
        """Take in one more receipt."""
        record = receipt.record
        if record.generation > self.generation(record.unit.id):
            unit = UnitSummary.of(record, is_void=receipt.state == "void")
            self._latest[unit.unit_id] = unit
            self.outside[unit.unit_id] = receipt
            self._touched.add(unit.source)

    def generation(self, unit_id: str) -> int:
        """Give a unit's highest generation; -1 where it has no receipt."""
        unit = self._latest.get(unit_id)
        return unit.generation if unit else -1

    def current(self, unit_id: str) -> UnitSummary | None:
        """Give a unit's summary; None where it has no receipt, or is to be encoded again."""
        unit = self._latest.get(unit_id)
        return None if unit is None or unit.is_void else unit

    @property
    def sources(self) -> set[str]:
        """Every source that has been encoded in some version."""
        return {unit.source for unit in self._latest.values() if not unit.is_void}

    def weigh(self, listing: Listing, on_missing: str) -> _Weighed:
        """Decide which units the next manifest names.

        A source whose units at its listed version are all committed contributes exactly those. One
        that changed and is unfinished keeps the units that the manifest has of it and is named in
        `stale`. A source that is no longer listed keeps its units, or loses them with
        `on_missing="drop"`.

        After a first time with a listing, only sources of new receipts can have moved, and only
        those are looked at.

        Raises:
            SourceError: `drop`, but more than a tenth of the sources are gone.
        """
        last = self._weighed
        if last and last.listing is listing and last.on_missing == on_missing:
            weighed = replace(last, changes={})
            sources: Iterable[str] = self._touched & listing.keys()
        else:
            weighed = _Weighed(listing, on_missing)
            sources = listing
            missing = self.live.keys() - listing.keys()
            if on_missing == "drop" and missing:
                _require_few(missing, len(self.live))
                weighed.changes.update(dict.fromkeys(missing, ()))
        for source in sources:
            units = [self.current(unit.id) for unit in listing[source]]
            committed = _in_order(unit for unit in units if unit)
            if len(committed) < len(units):
                weighed.unfinished.add(source)
                if source in self.live:
                    weighed.stale.add(source)
                continue
            weighed.unfinished.discard(source)
            weighed.stale.discard(source)
            if committed != self.live.get(source, ()):
                weighed.changes[source] = committed
        return weighed

    def put_next(
        self, weighed: _Weighed, complete: bool, contract: str, num_channels: int
    ) -> Manifest | None:
        """Put the manifest that was decided on; None if its number is taken by now."""
        newest = self.manifest
        after = {unit.name: unit for units in weighed.changes.values() for unit in units}
        before = {
            unit.name: unit for source in weighed.changes for unit in self.live.get(source, ())
        }
        fresh = [self.outside[u.unit_id] for u in after.values() if u.segment is None]
        segments = newest.segments if newest else ()
        totals = Totals.of(((r.record, r.statistics) for r in fresh), num_channels)
        parts = {**self._totals, len(segments): totals} if fresh else dict(self._totals)
        if fresh:
            segments += (put_segment(self.store, fresh),)
        # Units that lie in segments already and count no more, or count again.
        moved = [(before | after)[name] for name in before.keys() ^ after.keys()]
        moved = [unit for unit in moved if unit.segment is not None]
        removed = self._removed.symmetric_difference(unit.name for unit in moved)
        if newest and moved:
            # Minima and histograms cannot be taken back: add up anew what still counts.
            moved_in = {unit.segment for unit in moved}
            parts = {number: part for number, part in parts.items() if number not in moved_in}
            self._add_up(parts, removed, num_channels)
            totals = reduce(Totals.merge, parts.values())
        elif newest:
            totals = newest.totals.merge(totals)
        manifest = Manifest(
            number=newest.number + 1 if newest else 1,
            complete=complete,
            created_at=datetime.now(UTC).isoformat(),
            contract=contract,
            segments=segments,
            removed=tuple(sorted(removed)) if moved or not newest else newest.removed,
            stale=tuple(sorted(weighed.stale)),
            num_units=totals.num_units,
            num_samples=totals.num_samples,
            num_rows=totals.num_rows,
            num_rejects=totals.num_rejects,
            buckets=dict(sorted(totals.buckets.items())),
            statistics=totals.statistics,
        )
        if not self.store.put_if_absent(manifest.path, manifest.to_bytes()):
            return None
        self.manifest, self._removed, self._totals = manifest, removed, parts
        for source, units in weighed.changes.items():
            self._show(source, units, len(segments) - 1)
        self.settle(weighed)
        return manifest

    def _add_up(self, parts: dict[int, Totals], removed: set[str], num_channels: int) -> None:
        """Add up the units that count in those segments of the manifest that `parts` lacks."""
        assert self.manifest
        missing = [n for n in range(len(self.manifest.segments)) if n not in parts]
        segments = [self.manifest.segments[number] for number in missing]
        tables = read_segments(self.store, segments, f"manifest {self.manifest.number}")
        for number, table in zip(missing, tables, strict=True):
            parts[number] = totals_of(without(table, removed), num_channels)

    def _show(self, source: str, units: tuple[UnitSummary, ...], newest_segment: int) -> None:
        """Take down which units of a source the manifest just written shows."""
        self.live.pop(source, None)
        for unit in units:
            if unit.segment is None:
                unit = replace(unit, segment=newest_segment)
                self._latest[unit.unit_id] = unit
                del self.outside[unit.unit_id]
            self.live[source] = (*self.live.get(source, ()), unit)

    def settle(self, weighed: _Weighed) -> None:
        """Take the newest manifest to be what a listing comes to."""
        self._weighed = weighed
        self._touched.clear()


@dataclass(frozen=True, slots=True)
class _Weighed:
    """What a listing comes to, beside the newest manifest.

    `changes` holds, by source, the units of the next manifest where they are others; `unfinished`
    are the sources that are not all encoded at their listed version, and `stale` those of them that
    older units stand in for.
    """

    listing: Listing
    on_missing: str
    changes: dict[str, tuple[UnitSummary, ...]] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)


def _in_order(units: Iterable[UnitSummary]) -> tuple[UnitSummary, ...]:
    return tuple(sorted(units, key=lambda unit: unit.unit_id))


def _require_few(missing: AbstractSet[str], num_sources: int) -> None:
    if len(missing) > MAX_MISSING_SHARE * num_sources:
        raise SourceError(
            f"{len(missing)} of {num_sources} sources are no longer listed, such as "
            f"{min(missing)}: too many to drop their rows; check `source.shards`, or set "
            "`source.on_missing: keep`"
        )


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

    A listing that was given before, the very same object, costs time by the receipts that are new.

    Args:
        state: what is known of the output; given back, read anew if another driver was faster.
        contract: fingerprint of the dataset's contract.
        num_channels: channels of a stored latent.
        listing: gives the source's listing; called again after a lost race.
        on_missing: see `State.weigh`.
        may_complete: False holds `complete` back, after a check failed.

    Returns:
        The state, and the newest manifest (None where there is nothing to name yet).
    """
    while True:
        weighed = state.weigh(listing(), on_missing)
        complete = may_complete and not weighed.unfinished
        newest = state.manifest
        is_same = newest and (newest.stale, newest.complete) == (
            tuple(sorted(weighed.stale)),
            complete,
        )
        if not weighed.changes and (is_same or (newest is None and not complete)):
            state.settle(weighed)
            return state, newest
        if manifest := state.put_next(weighed, complete, contract, num_channels):
            return state, manifest
        state = State(state.store)
