"""Compute the next manifest from the newest one, a source snapshot and receipts.

A run does so after every thousand of its hundreds of thousands of units. So a `State` keeps little
of each unit, and checks only the sources that may have changed.
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
from latentcache.dataset.manifest_parts import (
    SUMMARY_COLUMNS,
    Totals,
    put_part,
    read_parts,
    summaries_of,
    totals_of,
    without,
)
from latentcache.dataset.receipts import (
    PUT_WITHIN_S,
    Receipt,
    Unit,
    UnitSummary,
    list_receipt_names,
    read_receipts,
)
from latentcache.errors import DatasetError, IncompleteRun, SourceError
from latentcache.storage import Store

# `on_missing: drop` rejects a source snapshot that lacks more than this share of the sources.
MAX_MISSING_SHARE = 0.1

# How often `remove_units` tries again after another writer put a manifest first.
_MAX_TRIES = 5

SourceSnapshot = Mapping[str, Sequence[Unit]]
"""The units of each listed source URL, at the listed version. A snapshot is never modified."""


class State:
    """The state of an output: its newest manifest, and the receipts that no part contains yet.

    It keeps a summary of each unit, and a whole receipt until a part contains it. `live` holds,
    by source, the units that count in the newest manifest. `outside` holds, by unit id, the
    receipt of the highest generation if no part contains it. A unit in the manifest's `removed`
    never counts again: if its source is listed again, the unit gets a new generation.

    Args:
        store: the output.
        receipts: names of the receipts, if the caller has listed them; None lists them.
    """

    def __init__(self, store: Store, receipts: Iterable[str] | None = None) -> None:
        self.store = store
        self.manifest = newest_manifest(store)
        self.live: dict[str, tuple[UnitSummary, ...]] = {}
        self.outside: dict[str, Receipt] = {}
        self._latest: dict[str, UnitSummary] = {}
        self._removed: set[str] = set()
        self._totals: dict[int, Totals] = {}  # by index of the part, for parts that were read
        self._last_diff: SnapshotDiff | None = None
        self._touched: set[str] = set()  # sources of the receipts added since that diff
        named = self._read_parts(self.manifest) if self.manifest else set()
        listed = list_receipt_names(store) if receipts is None else receipts
        unknown = (name for name in listed if name not in named)
        # A receipt that was listed but no longer exists was superseded: `gc` deletes no others.
        for receipt in read_receipts(store, unknown, missing_ok=True):
            self.add(receipt)

    def _read_parts(self, manifest: Manifest) -> set[str]:
        """Add the units of a manifest; return the names of all receipts that it lists."""
        named: set[str] = set()
        self._removed.update(manifest.removed)
        tables = read_parts(
            self.store, manifest.parts, f"manifest {manifest.number}", SUMMARY_COLUMNS
        )
        for number, table in enumerate(tables):
            for unit in summaries_of(table, number):
                if unit.name in named:
                    raise DatasetError(
                        f"{self.store.url_of(manifest.path)} lists unit {unit.name} twice"
                    )
                named.add(unit.name)
                if unit.name not in self._removed:
                    self.live[unit.source] = _in_order((*self.live.get(unit.source, ()), unit))
                if unit.generation > self.generation(unit.unit_id):
                    self._latest[unit.unit_id] = unit
        for name in self._removed - named:  # in no part, but their generations are used
            unit_id, _, generation = name.rpartition("-")
            if int(generation) > self.generation(unit_id):
                self._latest[unit_id] = UnitSummary(unit_id, "", int(generation), 0, 0, 0)
        return named | self._removed

    def add(self, receipt: Receipt) -> None:
        """Add a receipt, unless its unit has one of the same or a higher generation."""
        record = receipt.record
        if record.generation > self.generation(record.unit.id):
            unit = UnitSummary.of(record)
            self._latest[unit.unit_id] = unit
            self.outside[unit.unit_id] = receipt
            self._touched.add(unit.source)

    def generation(self, unit_id: str) -> int:
        """Return the highest generation of a unit, removed or not; -1 if it has no receipt."""
        unit = self._latest.get(unit_id)
        return unit.generation if unit else -1

    def current(self, unit_id: str) -> UnitSummary | None:
        """Return the summary of a unit that counts; None if the unit has to be encoded."""
        unit = self._latest.get(unit_id)
        return None if unit is None or unit.name in self._removed else unit

    def num_stored_bytes(self, unit_ids: AbstractSet[str]) -> int:
        """Return the total size of the current row files of units in bytes; reads parts."""
        outside = [r.record for unit, r in self.outside.items() if unit in unit_ids]
        num_bytes = sum(file.size_bytes for record in outside for file in record.files)
        remaining = unit_ids - self.outside.keys()
        if self.manifest and remaining:
            files = read_files(self.store, self.manifest)
            is_of = pc.is_in(files["unit"], value_set=pa.array(remaining, pa.string()))
            num_bytes += pc.sum(files.filter(is_of)["size_bytes"]).as_py() or 0
        return num_bytes

    @property
    def sources(self) -> set[str]:
        """The sources that have been encoded in any version."""
        return {unit.source for unit in self._latest.values() if unit.source}

    def diff_snapshot(
        self, listing: SourceSnapshot, on_missing: str, columns: Columns
    ) -> SnapshotDiff:
        """Decide which units count in the next manifest.

        If all units of a source at its listed version are committed, exactly those count. If the
        source changed and some are not committed, its units in the newest manifest still count, and
        it is `stale`. A unit with other columns counts, but its source is unfinished.

        Args:
            listing: the source snapshot; the same object again costs only checks of new receipts.
            on_missing: `keep` or `drop` the units of sources that are not listed any more.
            columns: the kept columns that the rows should have.

        Raises:
            SourceError: `on_missing` is `drop`, but more than a tenth of the sources are missing.
        """
        last = self._last_diff
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
        """Put the next manifest.

        Args:
            diff: the units that change, from `diff_snapshot`.
            complete: whether the manifest is complete.
            contract: fingerprint of the contract.
            num_channels: number of channels of a stored latent.

        Returns:
            The manifest; None if another driver used its number, or if putting it took more than a
            day, so that `gc` may have deleted the new part.
        """
        newest, valid_until = self.manifest, clock.boot_time_s() + PUT_WITHIN_S
        after = {unit.name: unit for units in diff.changes.values() for unit in units}
        before = {unit.name: unit for source in diff.changes for unit in self.live.get(source, ())}
        fresh = [self.outside[u.unit_id] for u in after.values() if u.part is None]
        gone = [before[name] for name in before.keys() - after.keys()]
        # Receipts of older versions of these sources that no manifest listed.
        outdated = [
            receipt.record
            for receipt in self.outside.values()
            if receipt.record.unit.source in diff.changes and receipt.record.name not in after
        ]
        removed = self._removed.union((u.name for u in gone), (r.name for r in outdated))
        added = Totals.of(((r.record, r.statistics) for r in fresh), num_channels)
        totals_by_part, totals = self._add(
            added, {unit.part for unit in gone}, removed, num_channels
        )
        parts = newest.parts if newest else ()
        if fresh:
            parts += (put_part(self.store, fresh),)
        manifest = Manifest(
            number=newest.number + 1 if newest else 1,
            complete=complete,
            created_at=datetime.now(UTC).isoformat(),
            contract=contract,
            columns=diff.columns,
            parts=parts,
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
        self.manifest, self._removed, self._totals = manifest, removed, totals_by_part
        for source, units in diff.changes.items():
            self._set_live(source, units, len(parts) - 1)
        self.accept(diff)
        return manifest

    def _add(
        self, added: Totals, changed: AbstractSet[int | None], removed: set[str], num_channels: int
    ) -> tuple[dict[int, Totals], Totals]:
        """Sum up the next manifest: the newest one's parts without `removed`, and a new one.

        `changed` are the indices of the parts that lose units. Returns the totals of parts,
        as far as known, and of the manifest.
        """
        newest = self.manifest
        totals_by_part = {
            number: total for number, total in self._totals.items() if number not in changed
        }
        earlier = [newest.totals] if newest else []
        if changed:  # minima cannot be subtracted: sum up all units that still count
            self._read_totals(totals_by_part, removed, num_channels)
            earlier = list(totals_by_part.values())
        if added.num_units:
            totals_by_part[len(newest.parts) if newest else 0] = added
        return totals_by_part, reduce(Totals.merge, earlier, added)

    def _read_totals(
        self, totals_by_part: dict[int, Totals], removed: set[str], num_channels: int
    ) -> None:
        """Sum up the units that count, for each part that `totals_by_part` lacks."""
        assert self.manifest
        missing = [n for n in range(len(self.manifest.parts)) if n not in totals_by_part]
        parts = [self.manifest.parts[number] for number in missing]
        tables = read_parts(self.store, parts, f"manifest {self.manifest.number}")
        for number, table in zip(missing, tables, strict=True):
            totals_by_part[number] = totals_of(without(table, removed), num_channels)

    def _set_live(self, source: str, units: tuple[UnitSummary, ...], newest_part: int) -> None:
        """Record which units of a source count in the manifest that was just put."""
        self.live.pop(source, None)
        for unit in units:
            if unit.part is None:
                unit = replace(unit, part=newest_part)
                self._latest[unit.unit_id] = unit
                del self.outside[unit.unit_id]
            self.live[source] = (*self.live.get(source, ()), unit)

    def accept(self, diff: SnapshotDiff) -> None:
        """Record that the newest manifest includes the changes of a diff."""
        self._last_diff = diff
        self._touched.clear()


@dataclass(frozen=True, slots=True)
class SnapshotDiff:
    """The difference between a source snapshot and the newest manifest.

    `changes` holds, for each source that changes, its units in the next manifest. `unfinished` are
    the sources that are not completely encoded at their listed version with `columns`. `stale` are
    those of them whose older units still count.
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
    """Raise an error if too many sources are missing to drop their rows.

    Args:
        missing: the sources that are not listed any more.
        num_sources: number of sources in the newest manifest.

    Raises:
        SourceError: more than a tenth of the sources are missing.
    """
    if len(missing) > MAX_MISSING_SHARE * num_sources:
        raise SourceError(
            f"{len(missing)} of {num_sources} sources are no longer listed, such as "
            f"{min(missing)}: too many to drop their rows; check the URLs of the config's "
            "`source`, or set `source.on_missing: keep`"
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

    Args:
        state: the state of the output.
        contract: fingerprint of the dataset's contract.
        num_channels: number of channels of a stored latent.
        listing: returns the source snapshot; called again if another driver put a manifest first.
        on_missing: see `State.diff_snapshot`.
        columns: the kept columns that the rows should have.
        may_complete: False keeps the manifest from being complete, after a check failed.

    Returns:
        The state, read again if another driver put a manifest first, and the newest manifest (None
        if nothing is committed yet).
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
    """Put an incomplete manifest without some units, so that the next run encodes them again.

    This is safe during a run: if one of the two puts a manifest first, the other reads again.

    Args:
        store: the output.
        names: `<unit>-<generation>`; names that are not in the newest manifest are ignored.

    Returns:
        The names that were removed. If there are none, no manifest was put.

    Raises:
        IncompleteRun: another process put a manifest first, several times in a row.
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
    raise IncompleteRun(f"other processes keep putting manifests to {store.url}: try again later")
