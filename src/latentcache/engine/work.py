"""The units of a run: those of the listing, what the output has of them, and what is left to do."""

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
    """The units of the source as it was listed, and the state of the output.

    Args:
        config: of the run.
        plan: of the run.
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
        """Take a contract that is resolved; the units get their names from it."""
        self.contract = contract
        units = units_of(self.shards, contract)
        self.listing = by_source(units)
        self.pending = [
            PlannedUnit(unit, 0, "new", shard.files, shard.url)
            for shard, unit in zip(self.shards, units, strict=True)
        ]
        self.left = {unit.id for unit in units}

    def add(self, receipt: Receipt) -> UnitSummary | None:
        """Take in a receipt that was put; return what the output had of its unit before."""
        record, before = receipt.record, self.state.current(receipt.record.unit.id)
        self.state.add(receipt)
        # Another run's may have other kept columns: then the unit is to be done.
        if record.columns == self.columns:
            self.left.discard(record.unit.id)
        return before

    def replan(self, failed: Unit, shards: Sequence[SourceShard]) -> list[PlannedUnit]:
        """Take a source's new units for its old ones; what is there or under way stays so.

        Args:
            failed: the unit that met the change.
            shards: the source as it is now.

        Returns:
            The units to hand out.
        """
        units = units_of(shards, self.contract)
        before = {unit.id for unit in self.listing[failed.source]}
        under_way = (self.left & before) - {failed.id}
        self.listing = {**self.listing, failed.source: units}
        self.left -= before
        added = []
        for shard, unit in zip(shards, units, strict=True):
            planned = rewrite_of(shard, unit, self.state, self.columns)
            if planned is None and self.state.current(unit.id):
                continue
            self.left.add(unit.id)
            if unit.id not in under_way:
                generation = self.state.generation(unit.id) + 1
                new = PlannedUnit(unit, generation, "changed", shard.files, shard.url)
                added.append(planned or new)
        return added

    def units(self) -> list[Unit]:
        """Return the units of the listing."""
        return [unit for units in self.listing.values() for unit in units]

    def done(self) -> list[UnitSummary]:
        """Return what the output has of the units of the listing."""
        return [done for unit in self.units() if (done := self.state.current(unit.id))]

    def counted(self) -> Iterator[UnitSummary]:
        """Return the units that the dataset has: those of the listing, and what stands in for them
        or is no longer listed.
        """
        for source, units in self.listing.items():
            found = [unit for u in units if (unit := self.state.current(u.id))]
            yield from found or self.state.live.get(source, ())
        if self._source.on_missing == "keep":
            for source in self.state.live.keys() - self.listing.keys():
                yield from self.state.live[source]

    @property
    def num_total(self) -> int:
        """Units that the output will have, if all goes well."""
        gone = self.state.live.keys() - self.listing.keys()
        kept = gone if self._source.on_missing == "keep" else ()
        num_kept = sum(len(self.state.live[source]) for source in kept)
        return num_kept + sum(map(len, self.listing.values()))

    @property
    def has_no_rows(self) -> bool:
        """Whether all is done and there is not one row."""
        return not self.left and not any(unit.num_rows for unit in self.counted())

    def write_manifest(self, *, may_complete: bool) -> Manifest | None:
        """Write the next manifest, if it would differ from the newest; return the newest."""
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
        """Return the listing that the run works on, and after a lost race a new one each time."""
        yield self.listing
        while True:
            shards = list_source(self._source, self._source.num_units, self.listing.keys())
            yield by_source(units_of(shards, self.contract))
