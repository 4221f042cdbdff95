"""The units of a run: the listed units, their state at the output, and the remaining ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from latentcache.config import Config
from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import Contract
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.receipts import Receipt, Unit, UnitSummary
from latentcache.dataset.state import SourceSnapshot, write_next
from latentcache.engine.plan import Plan, PlannedUnit, group_by_source, plan_unit, units_of
from latentcache.images.source import SourceShard, list_source


class Work:
    """The units of a plan, of which `remaining` holds the ids of those that are not committed."""

    def __init__(self, config: Config, plan: Plan) -> None:
        self._source = config.source
        self.columns = columns_of(config.source.keep)
        self.contract, self.state = plan.contract, plan.state
        self.shards, self.pending = plan.shards, plan.pending
        self.snapshot: SourceSnapshot = plan.snapshot
        self.remaining = {planned.unit.id for planned in plan.pending}

    def adopt(self, contract: Contract) -> None:
        """Use a resolved contract; the ids of the units follow from it."""
        self.contract = contract
        units = units_of(self.shards, contract)
        self.snapshot = group_by_source(units)
        self.pending = [
            PlannedUnit(unit, 0, "new", shard.files, shard.url)
            for shard, unit in zip(self.shards, units, strict=True)
        ]
        self.remaining = {unit.id for unit in units}

    def add(self, receipt: Receipt) -> UnitSummary | None:
        """Add a receipt that was put; return the earlier generation of its unit, or None."""
        record, before = receipt.record, self.state.current(receipt.record.unit.id)
        self.state.add(receipt)
        # The receipt of another run may have other kept columns; then the unit still remains.
        if record.columns == self.columns:
            self.remaining.discard(record.unit.id)
        return before

    def replan(self, failed: Unit, shards: Sequence[SourceShard]) -> list[PlannedUnit]:
        """Replace the units of a changed source, and return those to dispatch.

        Units that are committed or in progress stay so.

        Args:
            failed, shards: the unit that reported the change, and the shards of the source now.
        """
        units = units_of(shards, self.contract)
        before = {unit.id for unit in self.snapshot[failed.source]}
        in_progress = (self.remaining & before) - {failed.id}
        self.snapshot = {**self.snapshot, failed.source: units}
        self.remaining -= before
        added = []
        for shard, unit in zip(shards, units, strict=True):
            if planned := plan_unit(shard, unit, self.state, self.columns, "changed"):
                self.remaining.add(unit.id)
                if unit.id not in in_progress:
                    added.append(planned)
        return added

    def units(self) -> list[Unit]:
        """Return the listed units."""
        return list(chain.from_iterable(self.snapshot.values()))

    def committed(self) -> list[UnitSummary]:
        """Return the listed units that are committed."""
        return [unit for u in self.units() if (unit := self.state.current(u.id))]

    def counted(self) -> Iterator[UnitSummary]:
        """Yield the units of the dataset: the committed ones of a source, else its older ones."""
        for source, units in self.snapshot.items():
            committed = [unit for u in units if (unit := self.state.current(u.id))]
            yield from committed or self.state.live.get(source, ())
        yield from self._vanished()

    def _vanished(self) -> Iterator[UnitSummary]:
        if self._source.on_missing == "keep":
            for source in self.state.live.keys() - self.snapshot.keys():
                yield from self.state.live[source]

    @property
    def num_total(self) -> int:
        """The number of units that the output has after a complete run."""
        return len(self.units()) + len(list(self._vanished()))

    @property
    def has_no_rows(self) -> bool:
        """Whether no unit remains and the dataset has no row."""
        return not self.remaining and not any(unit.num_rows for unit in self.counted())

    def write_manifest(self, *, may_complete: bool) -> Manifest | None:
        """Write the next manifest if it differs from the newest one; return the newest one."""

        def list_again() -> Iterator[SourceSnapshot]:
            while True:
                shards = list_source(self._source, self._source.num_units, self.snapshot.keys())
                yield group_by_source(units_of(shards, self.contract))

        snapshots = chain([self.snapshot], list_again())  # again after each lost race
        self.state, manifest = write_next(
            self.state,
            self.contract.fingerprint,
            self.contract.stored_channels,
            lambda: next(snapshots),
            on_missing=self._source.on_missing,
            columns=self.columns,
            may_complete=may_complete,
        )
        return manifest
