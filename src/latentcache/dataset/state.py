"""Compute the next manifest from the newest one, a source snapshot and receipts.

A run does so after every thousand of its hundreds of thousands of units. So a `State` keeps little
of each unit, and only sources that may have changed are checked.
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
    NO_SAMPLES,
    PUT_WITHIN_S,
    Receipt,
    Unit,
    UnitSummary,
    fields_of,
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


@dataclass(frozen=True, slots=True)
class Selection:
    """The units that count in the next manifest, as changes of the newest one.

    `changes` holds, for each source that changes, its units in the next manifest. `unfinished` are
    the sources that are not completely encoded at their listed version with `columns`. `stale` are
    those of them whose older units still count.
    """

    snapshot: SourceSnapshot
    on_missing: str
    columns: Columns
    changes: dict[str, tuple[UnitSummary, ...]] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)


class State:
    """The state of an output: its newest manifest, and the receipts that no part contains yet.

    `live` holds, by source, summaries of the units that count in the newest manifest. `outside`
    holds, by unit id, the receipt of the highest generation if no part contains it. A removed unit
    never counts again: if its source is listed again, the unit gets a new generation. `receipts`
    are names of receipts, if the caller has listed them.
    """

    def __init__(self, store: Store, receipts: Iterable[str] | None = None) -> None:
        self.store = store
        self.manifest = newest_manifest(store)
        self.live: dict[str, tuple[UnitSummary, ...]] = {}
        self.outside: dict[str, Receipt] = {}
        self.removed = set(self.manifest.removed if self.manifest else ())
        self.part_totals: dict[int, Totals] = {}  # by index of the part, for parts that were read
        self.last: Selection | None = None  # that the newest manifest includes
        self.touched: set[str] = set()  # sources of the receipts added since
        self._latest: dict[str, UnitSummary] = {}
        named = self._read_parts(self.manifest) if self.manifest else set()
        listed = list_receipt_names(store) if receipts is None else receipts
        unknown = (name for name in listed if name not in named)
        # A receipt that was listed but no longer exists was superseded: `gc` deletes no others.
        for receipt in read_receipts(store, unknown, missing_ok=True):
            self.add(receipt)

    def _read_parts(self, manifest: Manifest) -> set[str]:
        """Add the units of a manifest; return the names of all receipts that it lists."""
        named: set[str] = set()
        named_by = f"manifest {manifest.number}"
        tables = read_parts(self.store, manifest.parts, named_by, SUMMARY_COLUMNS)
        for part, table in enumerate(tables):
            for unit in summaries_of(table, part):
                if unit.name in named:
                    url = self.store.url_of(manifest.path)
                    raise DatasetError(f"{url} lists unit {unit.name} twice")
                named.add(unit.name)
                if unit.name not in self.removed:
                    self.live[unit.source] = _in_order((*self.live.get(unit.source, ()), unit))
                if unit.generation > self.generation(unit.unit_id):
                    self._latest[unit.unit_id] = unit
        for name in self.removed - named:  # in no part, but their generations are used
            unit_id, _, number = name.rpartition("-")
            unit = UnitSummary(unit_id=unit_id, source="", generation=int(number), **NO_SAMPLES)
            if unit.generation > self.generation(unit_id):
                self._latest[unit_id] = unit
        return named | self.removed

    def add(self, receipt: Receipt) -> None:
        """Add a receipt, unless its unit has one of the same or a higher generation."""
        unit = UnitSummary.of(receipt.record)
        if unit.generation > self.generation(unit.unit_id):
            self._latest[unit.unit_id] = unit
            self.outside[unit.unit_id] = receipt
            self.touched.add(unit.source)

    def generation(self, unit_id: str) -> int:
        """Return the highest generation of a unit, removed or not; -1 if it has no receipt."""
        unit = self._latest.get(unit_id)
        return unit.generation if unit else -1

    def current(self, unit_id: str) -> UnitSummary | None:
        """Return the summary of a unit that counts; None if the unit has to be encoded."""
        unit = self._latest.get(unit_id)
        return None if unit is None or unit.name in self.removed else unit

    def num_stored_bytes(self, unit_ids: AbstractSet[str]) -> int:
        """Return the total size in bytes of the data files of units; this reads parts."""
        outside = unit_ids & self.outside.keys()
        sizes = [file.size_bytes for unit in outside for file in self.outside[unit].record.files]
        if self.manifest and (remaining := unit_ids - outside):
            files = read_files(self.store, self.manifest)
            is_of = pc.is_in(files["unit"], value_set=pa.array(remaining, pa.string()))
            sizes += files.filter(is_of)["size_bytes"].to_pylist()
        return sum(sizes)

    @property
    def sources(self) -> set[str]:
        """The sources that have been encoded in any version."""
        return {unit.source for unit in self._latest.values() if unit.source}

    def _advance(self, manifest: Manifest, selection: Selection) -> None:
        """Record that a manifest with the units of a selection was put."""
        self.manifest, self.removed = manifest, set(manifest.removed)
        part = len(manifest.parts) - 1
        for source, units in selection.changes.items():
            fresh = {unit.unit_id: replace(unit, part=part) for unit in units if unit.part is None}
            self._latest |= fresh
            self.live.pop(source, None)
            if units:
                self.live[source] = tuple(fresh.get(unit.unit_id, unit) for unit in units)
        for unit_id, receipt in [*self.outside.items()]:
            if self._latest[unit_id].part is not None or receipt.record.name in self.removed:
                del self.outside[unit_id]
        self.last = selection
        self.touched.clear()


def _in_order(units: Iterable[UnitSummary]) -> tuple[UnitSummary, ...]:
    return tuple(sorted(units, key=lambda unit: unit.unit_id))


def _select_units(
    state: State, snapshot: SourceSnapshot, on_missing: str, columns: Columns
) -> Selection:
    """Decide which units count in the next manifest, without access to the store.

    Exactly the units of a source's listed version count once all are committed. Until then, its
    units in the newest manifest count, and it is `stale`. A unit with other columns counts, but its
    source is unfinished. For the same snapshot, only sources of new receipts are checked again.
    """
    selection, last = Selection(snapshot, on_missing, columns), state.last
    terms = (on_missing, columns)
    sources: AbstractSet[str] = snapshot.keys()
    if last and last.snapshot is snapshot and (last.on_missing, last.columns) == terms:
        selection.unfinished.update(last.unfinished)
        selection.stale.update(last.stale)
        sources = state.touched & sources
    elif on_missing == "drop" and (missing := state.live.keys() - sources):
        require_few(missing, len(state.live))
        selection.changes.update(dict.fromkeys(missing, ()))
    for source in sources:
        units = [state.current(unit.id) for unit in snapshot[source]]
        committed = _in_order(unit for unit in units if unit)
        is_whole = len(committed) == len(units)
        is_finished = is_whole and all(unit.columns == columns for unit in committed)
        (selection.unfinished.discard if is_finished else selection.unfinished.add)(source)
        if not is_whole and source in state.live:
            selection.stale.add(source)
        elif is_whole:
            selection.stale.discard(source)
            if committed != state.live.get(source, ()):
                selection.changes[source] = committed
    return selection


def require_few(missing: AbstractSet[str], num_sources: int) -> None:
    """Raise `SourceError` if too many sources are missing to drop their rows.

    Args:
        missing, num_sources: the missing ones, and the number of those in the newest manifest.
    """
    if len(missing) > MAX_MISSING_SHARE * num_sources:
        raise SourceError(
            f"{len(missing)} of {num_sources} sources are no longer listed, such as "
            f"{min(missing)}: too many to drop their rows; check the URLs of the config's "
            "`source`, or set `source.on_missing: keep`"
        )


def _put_next(
    state: State, selection: Selection, complete: bool, contract: str, num_channels: int
) -> Manifest | None:
    """Put the manifest of a selection, and advance the state to it.

    Return None, after which the state must be read again, if another driver used its number, or if
    this took more than a day, so that `gc` may have deleted the new part.
    """
    newest, valid_until = state.manifest, clock.boot_time_s() + PUT_WITHIN_S
    changes, parts = selection.changes, newest.parts if newest else ()
    after = {unit.name: unit for units in changes.values() for unit in units}
    before = {unit.name: unit for source in changes for unit in state.live.get(source, ())}
    fresh = [state.outside[unit.unit_id] for unit in after.values() if unit.part is None]
    gone = {name: unit for name, unit in before.items() if name not in after}
    # Receipts of older versions of these sources that no manifest listed.
    records = (receipt.record for receipt in state.outside.values())
    outdated = {r.name for r in records if r.unit.source in changes and r.name not in after}
    removed = state.removed.union(gone, outdated)
    lost = {unit.part for unit in gone.values()}
    part_totals = {part: total for part, total in state.part_totals.items() if part not in lost}
    earlier: Iterable[Totals] = [newest] if newest else []
    if newest and lost:  # minima cannot be subtracted: sum up all units that still count
        missing = [number for number in range(len(parts)) if number not in part_totals]
        chosen = [parts[number] for number in missing]
        tables = read_parts(state.store, chosen, f"manifest {newest.number}")
        for number, table in zip(missing, tables, strict=True):
            part_totals[number] = totals_of(without(table, removed), num_channels)
        earlier = list(part_totals.values())
    added = Totals.of(((r.record, r.statistics) for r in fresh), num_channels)
    if fresh:
        part_totals[len(parts)] = added
        parts += (put_part(state.store, fresh),)
    manifest = Manifest(
        number=newest.number + 1 if newest else 1,
        complete=complete,
        created_at=datetime.now(UTC).isoformat(),
        contract=contract,
        columns=selection.columns,
        parts=parts,
        removed=tuple(sorted(removed)),
        stale=tuple(sorted(selection.stale)),
        **fields_of(Totals, reduce(Totals.merge, earlier, added)),
    )
    if not put_manifest(state.store, manifest, valid_until):
        return None
    state.part_totals = part_totals
    state._advance(manifest, selection)
    return manifest


def write_next(
    state: State,
    contract: str,
    num_channels: int,
    list_snapshot: Callable[[], SourceSnapshot],
    *,
    on_missing: str,
    columns: Columns = (),
    may_complete: bool = True,
) -> tuple[State, Manifest | None]:
    """Write the next manifest if it would differ from the newest one.

    Return the newest manifest, if any, and the state, read again if another driver was faster.

    Args:
        state, list_snapshot: the state of the output, and a function that lists the source.
        contract, num_channels: the contract's fingerprint, and the channels of a stored latent.
        on_missing: `keep` or `drop` the units of sources that are not listed any more.
        columns, may_complete: the columns that rows should have; False forbids `complete`.
    """
    while True:
        selection = _select_units(state, list_snapshot(), on_missing, columns)
        complete = may_complete and not selection.unfinished
        newest, stale = state.manifest, tuple(sorted(selection.stale))
        terms = (newest.stale, newest.complete, newest.columns) if newest else ((), False, columns)
        if not selection.changes and terms == (stale, complete, columns):
            state.last = selection
            state.touched.clear()
            return state, newest
        if manifest := _put_next(state, selection, complete, contract, num_channels):
            return state, manifest
        state = State(state.store)


def remove_units(store: Store, names: AbstractSet[str]) -> set[str]:
    """Put an incomplete manifest without some units, so that the next run encodes them again.

    This is safe during a run. Return the names that were removed; without any, no manifest is put.

    Args:
        store, names: the output, and `<unit>-<generation>`; unknown names are ignored.
    """
    for _ in range(_MAX_TRIES):
        state = State(store, receipts=())
        newest = state.manifest
        gone = {u.name for units in state.live.values() for u in units} & names
        if newest is None or not gone:
            return set()
        left = {s: tuple(u for u in us if u.name not in gone) for s, us in state.live.items()}
        changes = {s: units for s, units in left.items() if units != state.live[s]}
        stale = {source for source in newest.stale if changes.get(source) != ()}
        selection = Selection({}, "keep", newest.columns, changes, stale=stale)
        if _put_next(state, selection, False, newest.contract, len(newest.statistics.mean)):
            return gone
    raise IncompleteRun(f"other processes keep putting manifests to {store.url}: try again later")
