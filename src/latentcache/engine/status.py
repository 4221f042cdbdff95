"""The status of a dataset, read from its manifests, receipts, failures and leases alone."""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from latentcache.bottleneck import PipelineLoad
from latentcache.dataset.contract import require_contract
from latentcache.dataset.manifest import Manifest, list_manifests, read_manifest
from latentcache.dataset.publish import read_published
from latentcache.dataset.receipts import (
    UnitSummary,
    failed_unit,
    list_failures,
    list_receipts,
    read_failures,
    read_receipts,
)
from latentcache.dataset.rejects import RejectReason, most_frequent
from latentcache.dataset.state import State
from latentcache.engine.lease import RunInfo, active_leases
from latentcache.errors import ObjectNotFound
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

# The number of latest receipts from which the bottleneck is computed.
_NUM_RECEIPTS = 64


@dataclass(frozen=True, slots=True)
class Status:
    """Totals over all committed units, whether a manifest names them or not.

    Attributes:
        num_units: committed and failed units, or the units that an active run will leave, if more.
        manifests, complete: the numbers of the manifests, and whether the newest is complete.
        failed: by unit id, the failure of each unit that was not committed or replaced since.
        bottleneck: the slowest stage of the latest units and what would help; None without rows.
        gc_at_work: whether a `gc` holds a valid lease.
    """

    num_units: int
    num_committed: int
    num_rows: int
    num_rejects: int
    reject_reasons: list[RejectReason]
    manifests: list[int]
    complete: bool
    failed: dict[str, str]
    active_runs: list[RunInfo]
    bottleneck: str | None
    published: int | None
    gc_at_work: bool = False


def read_status(url: str, options: StorageOptions) -> Status:
    """Return the status of an output; raise `DatasetError` if there is none.

    Args:
        url, options: the URL of the dataset, and the options of the store.
    """
    return StatusReader(url, options).read()


class StatusReader:
    """A repeated reader of the status of an output; later calls read only what is new.

    Everything is read again only after a manifest that removes units.
    """

    def __init__(self, url: str, options: StorageOptions) -> None:
        self._store = Store(url, options)
        require_contract(self._store)
        self._newest: Manifest | None = None
        self._units: dict[str, UnitSummary] | None = None  # that count now or in the next manifest
        self._names: set[str] = set()  # of the receipts that have been read
        self._committed_at: dict[str, float] = {}  # time of the latest receipt, by unit id
        self._stages: deque[dict[str, dict[str, float]] | None] = deque(maxlen=_NUM_RECEIPTS)
        self._failures: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}  # by the path of each failure

    def read(self) -> Status:
        """Read the new objects and return the status."""
        store, manifests = self._store, list_manifests(self._store)
        units = self._read_units(manifests)
        failed = self._read_failures(units)
        leases = active_leases(store)
        runs = [lease for lease in leases if not lease.is_gc]
        published = read_published(store)
        loads = PipelineLoad()
        for stages in self._stages:
            loads.add_receipt(stages)
        num_rows = sum(unit.num_rows for unit in units.values())
        return Status(
            num_units=max([len(units.keys() | failed.keys()), *(run.num_total for run in runs)]),
            num_committed=len(units),
            num_rows=num_rows,
            num_rejects=sum(unit.num_rejects for unit in units.values()),
            reject_reasons=most_frequent(store, units.values()),
            manifests=manifests,
            complete=bool(self._newest and self._newest.complete),
            failed=failed,
            active_runs=runs,
            bottleneck=loads.bottleneck_text if num_rows else None,
            published=published.manifest if published else None,
            gc_at_work=len(runs) < len(leases),
        )

    def _read_units(self, manifests: list[int]) -> dict[str, UnitSummary]:
        """Return, by id, the units that count now or in the next manifest."""
        removed = self._newest.removed if self._newest else ()
        if manifests and (self._newest is None or self._newest.number < manifests[-1]):
            self._newest = read_manifest(self._store, manifests[-1])
        infos = list_receipts(self._store)
        for name, info in infos.items():
            unit_id = name.rpartition("-")[0]
            at = max(info.modified_at or 0.0, self._committed_at.get(unit_id, 0.0))
            self._committed_at[unit_id] = at
        if self._units is None or removed != (self._newest.removed if self._newest else ()):
            state = State(self._store, infos)  # units that counted may no longer count
            self._newest = state.manifest
            units = [unit for units in state.live.values() for unit in units]
            units += [UnitSummary.of(receipt.record) for receipt in state.outside.values()]
            self._units = {unit.unit_id: unit for unit in units}
            # Parts are numbered in the order of writing. Units in no part are the latest ones.
            latest = sorted(
                self._units.values(), key=lambda u: math.inf if u.part is None else u.part
            )
            names = [unit.name for unit in latest[-_NUM_RECEIPTS:]]
            receipts = read_receipts(self._store, names, missing_ok=True)
        else:
            receipts = read_receipts(self._store, infos.keys() - self._names)
            for unit in (UnitSummary.of(receipt.record) for receipt in receipts):
                before = self._units.get(unit.unit_id)
                if before is None or unit.generation > before.generation:
                    self._units[unit.unit_id] = unit
        self._names |= infos.keys()
        self._stages.extend(receipt.stages for receipt in receipts)
        return self._units

    def _read_failures(self, units: dict[str, UnitSummary]) -> dict[str, str]:
        """Return the message of units that failed, do not count, and were not committed afterwards.

        Failures before a complete newest manifest are left out: such a unit is in that manifest, or
        is no longer in the source.
        """
        hints = [hint for hint in list_failures(self._store) if hint.path not in self._failed_at]
        self._failures.update(read_failures(self._store, (hint.path for hint in hints)))
        self._failed_at.update((hint.path, hint.modified_at or 0.0) for hint in hints)
        since = 0.0
        if self._newest and self._newest.complete:
            with suppress(ObjectNotFound):  # `gc` deleted it meanwhile
                since = self._store.info(self._newest.path).modified_at or 0.0
        recent = {
            unit
            for unit, at in ((failed_unit(path), at) for path, at in self._failed_at.items())
            if unit not in units and at > max(since, self._committed_at.get(unit, 0.0))
        }
        return {unit: message for unit, message in self._failures.items() if unit in recent}
