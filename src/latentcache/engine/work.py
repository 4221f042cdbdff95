"""The units of a run: the listed units, their state at the output, and the units that are left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from latentcache.config import Config
from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import Contract
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.receipts import Receipt, Unit, UnitSummary
from latentcache.dataset.state import SourceSnapshot, State, write_next
from latentcache.engine.plan import Plan, PlannedUnit, by_source, rewrite_of, units_of
from latentcache.images.source import SourceShard, list_source


class Work:
    """The listed units of the source, and the state of the output.

    Args:
        config: the config of the run.
        plan: the plan of the run.
    """

    def __init__(self, config: Config, plan: Plan) -> None:
        self._source = config.source
        self.columns = columns_of(config.source.keep)
        self.contract: Contract = plan.contract
        self.shards = plan.shards
        self.listing: SourceSnapshot = plan.listing
        self.state: State = plan.state
        self.pending: list[PlannedUnit] = plan.pending
        self.left = {planned.unit.id for planned in plan.pending}

    def adopt(self, contract: Contract) -> None:
        """Use a resolved contract; the ids of the units follow from it."""
        self.contract = contract
        units = units_of(self.shards, contract)
        self.listing = by_source(units)
        self.pending = [
            PlannedUnit(unit, 0, "new", shard.files, shard.url)
            for shard, unit in zip(self.shards, units, strict=True)
        ]
        self.left = {unit.id for unit in units}

    def add(self, receipt: Receipt) -> UnitSummary | None:
        """Add a receipt that was put; return the earlier generation of its unit, or None."""
        record, before = receipt.record, self.state.current(receipt.record.unit.id)
        self.state.add(receipt)
        # The receipt of another run may have other kept columns; then the unit is still left.
        if record.columns == self.columns:
            self.left.discard(record.unit.id)
        return before

    def replan(self, failed: Unit, shards: Sequence[SourceShard]) -> list[PlannedUnit]:
        """Replace the units of a changed source; units that are done or in progress stay so.

        Args:
            failed: the unit that reported the change.
            shards: the present shards of the source.

        Returns:
            The units to dispatch.
        """
        units = units_of(shards, self.contract)
        before = {unit.id for unit in self.listing[failed.source]}
        in_progress = (self.left & before) - {failed.id}
        self.listing = {**self.listing, failed.source: units}
        self.left -= before
        added = []
        for shard, unit in zip(shards, units, strict=True):
            planned = rewrite_of(shard, unit, self.state, self.columns)
            if planned is None and self.state.current(unit.id):
                continue
            self.left.add(unit.id)
            if unit.id not in in_progress:
                generation = self.state.generation(unit.id) + 1
                new = PlannedUnit(unit, generation, "changed", shard.files, shard.url)
                added.append(planned or new)
        return added

    def units(self) -> list[Unit]:
        """Return the listed units."""
        return [unit for units in self.listing.values() for unit in units]

    def done(self) -> list[UnitSummary]:
        """Return the listed units that are committed."""
        return [done for unit in self.units() if (done := self.state.current(unit.id))]

    def counted(self) -> Iterator[UnitSummary]:
        """Yield the units that the dataset has.

        These are the committed units of each listed source, or its older ones if it has none yet.
        With `on_missing: keep` the units of vanished sources are included.
        """
        for source, units in self.listing.items():
            committed = [unit for u in units if (unit := self.state.current(u.id))]
            yield from committed or self.state.live.get(source, ())
        if self._source.on_missing == "keep":
            for source in self.state.live.keys() - self.listing.keys():
                yield from self.state.live[source]

    @property
    def num_total(self) -> int:
        """The number of units that the output has after a complete run."""
        vanished = self.state.live.keys() - self.listing.keys()
        kept = vanished if self._source.on_missing == "keep" else ()
        num_kept = sum(len(self.state.live[source]) for source in kept)
        return num_kept + sum(map(len, self.listing.values()))

    @property
    def has_no_rows(self) -> bool:
        """Whether no unit is left and the dataset has no row."""
        return not self.left and not any(unit.num_rows for unit in self.counted())

    def write_manifest(self, *, may_complete: bool) -> Manifest | None:
        """Write the next manifest if it differs from the newest one; return the newest one."""
        listings = self._listings()
        self.state, manifest = write_next(
            self.state,
            self.contract.fingerprint,
            self.contract.stored_channels,
            lambda: next(listings),
            on_missing=self._source.on_missing,
            columns=self.columns,
            may_complete=may_complete,
        )
        return manifest

    def _listings(self) -> Iterator[SourceSnapshot]:
        """Yield the listing of the run, and a new listing after each lost race for a manifest."""
        yield self.listing
        while True:
            shards = list_source(self._source, self._source.num_units, self.listing.keys())
            yield by_source(units_of(shards, self.contract))
