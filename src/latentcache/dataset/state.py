"""Which units count: from a manifest, a listing of the source and receipts to the next manifest.

During a run that is asked every thousand units, of hundreds of thousands. So a `State` keeps little
of each unit, and looks again only at what may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from latentcache import clock
from latentcache.dataset.columns import Columns
from latentcache.dataset.manifest import Manifest, newest_manifest, put_manifest, read_files
from latentcache.dataset.receipts import (
    PUT_WITHIN_S,
    Receipt,
    Unit,
    UnitSummary,
    list_receipt_names,
    read_receipts,
)
from latentcache.dataset.segments import (
    SUMMARY_COLUMNS,
    Totals,
    put_segment,
    read_segments,
    summaries_of,
    totals_of,
    without,
)
from latentcache.errors import DatasetError, IncompleteRun, SourceError
from latentcache.storage import Store

# `on_missing: drop` refuses to believe a listing in which more of the sources than this are gone.
MAX_MISSING_SHARE = 0.1

# How often `remove_units` tries again after another writer put a manifest first.
_MAX_TRIES = 5

SourceSnapshot = Mapping[str, Sequence[Unit]]
"""Each source URL that is listed now, with its units at the listed version; once given, it does not
change."""


class State:
    """All that is known of an output: its newest manifest, and receipts that it does not name.

    Of each unit it keeps a summary, and of a receipt everything until a manifest names it: then its
    segment has it. `live` holds, by source, the units that count in the newest manifest; `outside`,
    by unit, the receipts of the highest generation that are in no segment. A unit that the manifest
    has in `removed` never counts again: if its source is listed again, it gets a new generation.

    Args:
        store: the output.
        receipts: names of the receipts to take in, where they have been listed already.
    """

    def __init__(self, store: Store, receipts: Iterable[str] | None = None) -> None:
        self.store = store
        self.manifest = newest_manifest(store)
        self.live: dict[str, tuple[UnitSummary, ...]] = {}
        self.outside: dict[str, Receipt] = {}
        self._latest: dict[str, UnitSummary] = {}
        self._removed: set[str] = set()
        self._totals: dict[int, Totals] = {}  # by position of the segment, as far as they were read
        self._weighed: SnapshotDiff | None = None
        self._touched: set[str] = set()  # sources of the receipts that came since
        named = self._read_segments(self.manifest) if self.manifest else set()
        listed = list_receipt_names(store) if receipts is None else receipts
        unknown = (name for name in listed if name not in named)
        # One that was listed and is gone now was superseded: `gc` deletes no other.
        for receipt in read_receipts(store, unknown, missing_ok=True):
            self.add(receipt)

    def _read_segments(self, manifest: Manifest) -> set[str]:
        """Take in what a manifest says, and give the names of all receipts that it knows."""
        named: set[str] = set()
        self._removed.update(manifest.removed)
        tables = read_segments(
            self.store, manifest.segments, f"manifest {manifest.number}", SUMMARY_COLUMNS
        )
        for number, table in enumerate(tables):
            for unit in summaries_of(table, number):
                if unit.name in named:
                    raise DatasetError(
                        f"{self.store.url_of(manifest.path)} names unit {unit.name} twice"
                    )
                named.add(unit.name)
                if unit.name not in self._removed:
                    self.live[unit.source] = _in_order((*self.live.get(unit.source, ()), unit))
                if unit.generation > self.generation(unit.unit_id):
                    self._latest[unit.unit_id] = unit
        for name in self._removed - named:  # no segment has them, but the generation is taken
            unit_id, _, generation = name.rpartition("-")
            if int(generation) > self.generation(unit_id):
                self._latest[unit_id] = UnitSummary(unit_id, "", int(generation), 0, 0, 0)
        return named | self._removed

    def add(self, receipt: Receipt) -> None:
        """Take in one more receipt."""
        record = receipt.record
        if record.generation > self.generation(record.unit.id):
            unit = UnitSummary.of(record)
            self._latest[unit.unit_id] = unit
            self.outside[unit.unit_id] = receipt
            self._touched.add(unit.source)

    def generation(self, unit_id: str) -> int:
        """Return a unit's highest generation, removed or not; -1 where it never had a receipt."""
        unit = self._latest.get(unit_id)
        return unit.generation if unit else -1

    def current(self, unit_id: str) -> UnitSummary | None:
        """Return the summary of a unit that counts; None where it is to be encoded."""
        unit = self._latest.get(unit_id)
        return None if unit is None or unit.name in self._removed else unit

    def num_stored_bytes(self, unit_ids: AbstractSet[str]) -> int:
        """Sum up the sizes in bytes of the row files that some units have now; reads segments."""
        outside = [r.record for unit, r in self.outside.items() if unit in unit_ids]
        num_bytes = sum(file.size_bytes for record in outside for file in record.files)
        left = unit_ids - self.outside.keys()
        if self.manifest and left:
            files = read_files(self.store, self.manifest)
            is_of = pc.is_in(files["unit"], value_set=pa.array(left, pa.string()))
            num_bytes += pc.sum(files.filter(is_of)["size_bytes"]).as_py() or 0
        return num_bytes

    @property
    def sources(self) -> set[str]:
        """Every source that has been encoded in some version."""
        return {unit.source for unit in self._latest.values() if unit.source}

    def diff_snapshot(
        self, listing: SourceSnapshot, on_missing: str, columns: Columns
    ) -> SnapshotDiff:
        """Decide which units the next manifest names.

        A source whose units at its listed version are all committed contributes exactly those. One
        that changed and is unfinished keeps the units that the manifest has of it and is named in
        `stale`. A unit whose rows have other columns than `columns` counts, but leaves its source
        unfinished. A source that is no longer listed keeps its units, or loses them with
        `on_missing="drop"`.

        After a first time with a listing, only sources of new receipts can have moved, and only
        those are looked at.

        Raises:
            SourceError: `drop`, but more than a tenth of the sources are gone.
        """
        last = self._weighed
        terms = (on_missing, columns)
        if last and last.listing is listing and (last.on_missing, last.columns) == terms:
            diff = replace(last, changes={})
            sources: Iterable[str] = self._touched & listing.keys()
        else:
            diff = SnapshotDiff(listing, on_missing, columns)
            sources = listing
            missing = self.live.keys() - listing.keys()
            if on_missing == "drop" and missing:
                require_few(missing, len(self.live))
                diff.changes.update(dict.fromkeys(missing, ()))
        for source in sources:
            units = [self.current(unit.id) for unit in listing[source]]
            committed = _in_order(unit for unit in units if unit)
            if len(committed) < len(units):
                diff.unfinished.add(source)
                if source in self.live:
                    diff.stale.add(source)
                continue
            if all(unit.columns == columns for unit in committed):
                diff.unfinished.discard(source)
            else:
                diff.unfinished.add(source)
            diff.stale.discard(source)
            if committed != self.live.get(source, ()):
                diff.changes[source] = committed
        return diff

    def put_next(
        self, diff: SnapshotDiff, complete: bool, contract: str, num_channels: int
    ) -> Manifest | None:
        """Put the manifest that was decided on; None if its number is taken by now, or if a day has
        passed since, in which `gc` may have deleted the new segment.
        """
        newest, valid_until = self.manifest, clock.boot_time_s() + PUT_WITHIN_S
        after = {unit.name: unit for units in diff.changes.values() for unit in units}
        before = {unit.name: unit for source in diff.changes for unit in self.live.get(source, ())}
        fresh = [self.outside[u.unit_id] for u in after.values() if u.segment is None]
        gone = [before[name] for name in before.keys() - after.keys()]
        # Receipts of older versions of these sources, which no manifest named in time.
        outdated = [
            receipt.record
            for receipt in self.outside.values()
            if receipt.record.unit.source in diff.changes and receipt.record.name not in after
        ]
        removed = self._removed.union((u.name for u in gone), (r.name for r in outdated))
        added = Totals.of(((r.record, r.statistics) for r in fresh), num_channels)
        parts, totals = self._add(added, {unit.segment for unit in gone}, removed, num_channels)
        segments = newest.segments if newest else ()
        if fresh:
            segments += (put_segment(self.store, fresh),)
        manifest = Manifest(
            number=newest.number + 1 if newest else 1,
            complete=complete,
            created_at=datetime.now(UTC).isoformat(),
            contract=contract,
            columns=diff.columns,
            segments=segments,
            removed=tuple(sorted(removed)) if gone or outdated or not newest else newest.removed,
            stale=tuple(sorted(diff.stale)),
            num_units=totals.num_units,
            num_samples=totals.num_samples,
            num_rows=totals.num_rows,
            num_rejects=totals.num_rejects,
            num_images=totals.num_images,
            num_extra_images=totals.num_extra_images,
            buckets=dict(sorted(totals.buckets.items())),
            statistics=totals.statistics,
        )
        if not put_manifest(self.store, manifest, valid_until):
            return None
        for record in outdated:
            del self.outside[record.unit.id]
        self.manifest, self._removed, self._totals = manifest, removed, parts
        for source, units in diff.changes.items():
            self._set_live(source, units, len(segments) - 1)
        self.accept(diff)
        return manifest

    def _add(
        self, added: Totals, changed: AbstractSet[int | None], removed: set[str], num_channels: int
    ) -> tuple[dict[int, Totals], Totals]:
        """Add up the next manifest: a new segment, and those of the newest, less `removed`.

        `changed` are the segments that lose units. Returns the totals of segments, as far as they
        are known, and of all together.
        """
        newest = self.manifest
        parts = {number: part for number, part in self._totals.items() if number not in changed}
        earlier = [newest.totals] if newest else []
        if changed:  # minima and histograms cannot be taken back: add up anew what still counts
            self._read_totals(parts, removed, num_channels)
            earlier = list(parts.values())
        if added.num_units:
            parts[len(newest.segments) if newest else 0] = added
        return parts, reduce(Totals.merge, earlier, added)

    def _read_totals(self, parts: dict[int, Totals], removed: set[str], num_channels: int) -> None:
        """Add up the units that count in those segments of the manifest that `parts` lacks."""
        assert self.manifest
        missing = [n for n in range(len(self.manifest.segments)) if n not in parts]
        segments = [self.manifest.segments[number] for number in missing]
        tables = read_segments(self.store, segments, f"manifest {self.manifest.number}")
        for number, table in zip(missing, tables, strict=True):
            parts[number] = totals_of(without(table, removed), num_channels)

    def _set_live(self, source: str, units: tuple[UnitSummary, ...], newest_segment: int) -> None:
        """Take down which units of a source the manifest just written shows."""
        self.live.pop(source, None)
        for unit in units:
            if unit.segment is None:
                unit = replace(unit, segment=newest_segment)
                self._latest[unit.unit_id] = unit
                del self.outside[unit.unit_id]
            self.live[source] = (*self.live.get(source, ()), unit)

    def accept(self, diff: SnapshotDiff) -> None:
        """Take the newest manifest to be what a listing comes to."""
        self._weighed = diff
        self._touched.clear()


@dataclass(frozen=True, slots=True)
class SnapshotDiff:
    """What a listing comes to, beside the newest manifest.

    `changes` holds, by source, the units of the next manifest where they are others; `unfinished`
    are the sources that are not all encoded at their listed version with `columns`, and `stale`
    those of them that older units stand in for.
    """

    listing: SourceSnapshot
    on_missing: str
    columns: Columns
    changes: dict[str, tuple[UnitSummary, ...]] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)


def _in_order(units: Iterable[UnitSummary]) -> tuple[UnitSummary, ...]:
    return tuple(sorted(units, key=lambda unit: unit.unit_id))


def require_few(missing: AbstractSet[str], num_sources: int) -> None:
    """Refuse to drop more than a tenth of the sources; see `State.diff_snapshot`."""
    if len(missing) > MAX_MISSING_SHARE * num_sources:
        raise SourceError(
            f"{len(missing)} of {num_sources} sources are no longer listed, such as "
            f"{min(missing)}: too many to drop their rows; check what the config's `source` names, "
            "or set `source.on_missing: keep`"
        )


def write_next(
    state: State,
    contract: str,
    num_channels: int,
    listing: Callable[[], SourceSnapshot],
    *,
    on_missing: str,
    columns: Columns = (),
    may_complete: bool = True,
) -> tuple[State, Manifest | None]:
    """Write the next manifest if it would differ from the newest one.

    A listing that was given before, the very same object, costs time by the receipts that are new.

    Args:
        state: what is known of the output; given back, read anew if another driver was faster.
        contract: fingerprint of the dataset's contract.
        num_channels: channels of a stored latent.
        listing: gives the source's listing; called again after a lost race.
        on_missing: see `State.diff_snapshot`.
        columns: the kept columns that the rows are to have.
        may_complete: False holds `complete` back, after a check failed.

    Returns:
        The state, and the newest manifest (None where there is nothing to name yet).
    """
    while True:
        diff = state.diff_snapshot(listing(), on_missing, columns)
        complete = may_complete and not diff.unfinished
        newest = state.manifest
        is_same = newest and (newest.stale, newest.complete, newest.columns) == (
            tuple(sorted(diff.stale)),
            complete,
            columns,
        )
        if not diff.changes and (is_same or (newest is None and not complete)):
            state.accept(diff)
            return state, newest
        if manifest := state.put_next(diff, complete, contract, num_channels):
            return state, manifest
        state = State(state.store)


def remove_units(store: Store, names: AbstractSet[str]) -> set[str]:
    """Put a manifest without some units, so that the next run encodes them again.

    It is not complete, and may be put beside a run: whichever of the two finds the number taken
    reads everything again.

    Args:
        store: the output.
        names: `<unit>-<generation>`; those that the newest manifest does not name are ignored.

    Returns:
        The names that were removed; with none, no manifest was put.

    Raises:
        IncompleteRun: other manifests came first, again and again.
    """
    for _ in range(_MAX_TRIES):
        state = State(store, receipts=())
        gone = {u.name for units in state.live.values() for u in units if u.name in names}
        if not gone or state.manifest is None:
            return set()
        changes = {
            source: tuple(unit for unit in units if unit.name not in gone)
            for source, units in state.live.items()
            if any(unit.name in gone for unit in units)
        }
        newest = state.manifest
        stale = {source for source in newest.stale if changes.get(source) != ()}
        diff = SnapshotDiff({}, "keep", newest.columns, changes, stale=stale)
        if state.put_next(diff, False, newest.contract, len(newest.statistics.mean)):
            return gone
    raise IncompleteRun(f"others put manifests to {store.url} all the time: try again later")
