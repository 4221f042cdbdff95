"""How far a dataset is: read from its manifest, receipts, failures and leases alone."""

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
    Receipt,
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

# Receipts that tell the bottleneck: the latest.
_NUM_RECEIPTS = 64


@dataclass(frozen=True, slots=True)
class Status:
    """Totals over all committed units, named by a manifest or not.

    `num_units` are the units that have left a trace, or as many as a run at work will leave, if
    those are more; `failed` maps the ids of units that were given up, and not committed or replaced
    since, to why. `reject_reasons` are the most frequent ones. `bottleneck` is the stage that held
    the latest units up, and what would help; None without rows. `published` is the number of the
    published manifest, and `gc_at_work` whether `gc` deletes at the moment.
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
    """Read the status of an output.

    Raises:
        DatasetError: nothing has been written there yet.
    """
    return StatusReader(url, options).read()


class StatusReader:
    """Reads the status of an output, again and again; after the first time, only what is new.

    Every time it lists receipts, failures, manifests and leases. Only a manifest that removes units
    has everything read anew.

    Raises:
        DatasetError: nothing has been written there yet.
    """

    def __init__(self, url: str, options: StorageOptions) -> None:
        self._store = Store(url, options)
        require_contract(self._store)
        self._manifest: Manifest | None = None
        self._names: set[str] = set()  # of the receipts that have been taken in
        self._units: dict[str, UnitSummary] = {}  # that count, or will
        self._committed_at: dict[str, float] = {}  # by unit, the time of its latest receipt
        self._stages: deque[dict[str, dict[str, float]] | None] = deque(maxlen=_NUM_RECEIPTS)
        self._failures: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}  # by the paths of the hints that have been read
        self._settled = (0, 0.0)  # the manifest before which failures count no more, and when
        self._has_read = False

    def read(self) -> Status:
        """Read what is new, and say how far things are."""
        manifests = list_manifests(self._store)
        if not self._has_read or self._drops_units(manifests):
            self._read_all()
        else:
            names = self._list_receipts() - self._names
            self._add(read_receipts(self._store, names))
        self._read_failures()
        return self._status(manifests)

    def _list_receipts(self) -> set[str]:
        """List the names of the receipts, and remember when each unit got its latest one."""
        listed = list_receipts(self._store)
        for name, info in listed.items():
            unit = name.rpartition("-")[0]
            at = max(info.modified_at or 0.0, self._committed_at.get(unit, 0.0))
            self._committed_at[unit] = at
        return set(listed)

    def _drops_units(self, manifests: list[int]) -> bool:
        """Take in the newest manifest; say whether units that counted may do so no more."""
        known = self._manifest
        if manifests and (known is None or known.number < manifests[-1]):
            self._manifest = read_manifest(self._store, manifests[-1])
        return (known.removed if known else ()) != (
            self._manifest.removed if self._manifest else ()
        )

    def _read_all(self) -> None:
        self._names = self._list_receipts()
        state = State(self._store, self._names)
        self._manifest, self._has_read = state.manifest, True
        self._units = {unit.unit_id: unit for units in state.live.values() for unit in units}
        outside = [UnitSummary.of(receipt.record) for receipt in state.outside.values()]
        self._units.update({unit.unit_id: unit for unit in outside})
        # Segments are in the order of their writing; what is in none yet came last.
        rows = sorted(
            self._units.values(),
            key=lambda unit: math.inf if unit.segment is None else unit.segment,
        )
        names = [unit.name for unit in rows[-_NUM_RECEIPTS:]]
        latest = read_receipts(self._store, names, missing_ok=True)
        self._stages.extend(receipt.stages for receipt in latest)

    def _add(self, receipts: list[Receipt]) -> None:
        for receipt in receipts:
            unit = UnitSummary.of(receipt.record)
            self._names.add(unit.name)
            before = self._units.get(unit.unit_id)
            if before is None or unit.generation > before.generation:
                self._units[unit.unit_id] = unit
            self._stages.append(receipt.stages)

    def _read_failures(self) -> None:
        hints = [hint for hint in list_failures(self._store) if hint.path not in self._failed_at]
        self._failures.update(read_failures(self._store, (hint.path for hint in hints)))
        self._failed_at.update((hint.path, hint.modified_at or 0.0) for hint in hints)

    def _failed_lately(self) -> set[str]:
        """Return the units that failed, and neither count nor were committed after they did.

        Failures before the newest manifest are left out if that is complete: such a unit is in it
        by now, or is no longer in the source.
        """
        newest, since = self._manifest, 0.0
        if newest and newest.complete:
            since = self._complete_since(newest)
        failed_at = ((failed_unit(path), at) for path, at in self._failed_at.items())
        return {
            unit
            for unit, at in failed_at
            if unit not in self._units and at > max(since, self._committed_at.get(unit, 0.0))
        }

    def _complete_since(self, newest: Manifest) -> float:
        """Return when the newest manifest, a complete one, was written."""
        if newest.number != self._settled[0]:
            with suppress(ObjectNotFound):  # `gc` was faster
                written_at = self._store.info(newest.path).modified_at or 0.0
                self._settled = (newest.number, written_at)
        return self._settled[1]

    def _status(self, manifests: list[int]) -> Status:
        committed = list(self._units.values())
        failed_units = self._failed_lately()
        failed = {unit: why for unit, why in self._failures.items() if unit in failed_units}
        leases = active_leases(self._store)
        runs = [lease for lease in leases if not lease.is_gc]
        published = read_published(self._store)
        loads = PipelineLoad()
        for stages in self._stages:
            loads.add_receipt(stages)
        known = len(self._units.keys() | failed.keys())
        num_rows = sum(unit.num_rows for unit in committed)
        return Status(
            num_units=max([known, *(run.num_total for run in runs)]),
            num_committed=len(committed),
            num_rows=num_rows,
            num_rejects=sum(unit.num_rejects for unit in committed),
            reject_reasons=most_frequent(self._store, committed),
            manifests=manifests,
            complete=bool(self._manifest and self._manifest.complete),
            failed=failed,
            active_runs=runs,
            bottleneck=loads.bottleneck_text if num_rows else None,
            published=published.manifest if published else None,
            gc_at_work=len(runs) < len(leases),
        )
