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

# The number of latest receipts from which the bottleneck is computed.
_NUM_RECEIPTS = 64


@dataclass(frozen=True, slots=True)
class Status:
    """Totals over all committed units, whether a manifest names them or not.

    Attributes:
        num_units: committed and failed units, or the number of units that an active run will leave
            if that is larger.
        reject_reasons: the most frequent reasons.
        manifests: the numbers of the manifests, ascending.
        complete: whether the newest manifest is complete.
        failed: the failure of each unit that was given up and was not committed or replaced since,
            by unit id.
        active_runs: the runs that hold a valid lease.
        bottleneck: the slowest stage of the latest units and what would help; None without rows.
        published: the number of the published manifest; None if there is none.
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
    """Return the status of an output.

    Args:
        url: the URL of the dataset.
        options: the options of the store.

    Raises:
        DatasetError: there is no dataset at the URL.
    """
    return StatusReader(url, options).read()


class StatusReader:
    """A repeated reader of the status of an output; later calls read only what is new.

    Each call lists receipts, failures, manifests and leases. Everything is read again only after a
    manifest that removes units.

    Args:
        url: the URL of the dataset.
        options: the options of the store.

    Raises:
        DatasetError: there is no dataset at the URL.
    """

    def __init__(self, url: str, options: StorageOptions) -> None:
        self._store = Store(url, options)
        require_contract(self._store)
        self._manifest: Manifest | None = None
        self._names: set[str] = set()  # of the receipts that have been read
        self._units: dict[str, UnitSummary] = {}  # that count now or in the next manifest
        self._committed_at: dict[str, float] = {}  # time of the latest receipt, by unit id
        self._stages: deque[dict[str, dict[str, float]] | None] = deque(maxlen=_NUM_RECEIPTS)
        self._failures: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}  # by the path of each failure
        self._newest_complete = (0, 0.0)  # its number and time; earlier failures do not count
        self._has_read = False

    def read(self) -> Status:
        """Read the new objects and return the status."""
        manifests = list_manifests(self._store)
        if not self._has_read or self._drops_units(manifests):
            self._read_all()
        else:
            names = self._list_receipts() - self._names
            self._add(read_receipts(self._store, names))
        self._read_failures()
        return self._status(manifests)

    def _list_receipts(self) -> set[str]:
        """List the names of the receipts, and record the time of each unit's latest receipt."""
        listed = list_receipts(self._store)
        for name, info in listed.items():
            unit = name.rpartition("-")[0]
            at = max(info.modified_at or 0.0, self._committed_at.get(unit, 0.0))
            self._committed_at[unit] = at
        return set(listed)

    def _drops_units(self, manifests: list[int]) -> bool:
        """Read the newest manifest; return whether units that counted may no longer count."""
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
        # Manifest parts are numbered in the order of writing. Units in no part are the latest ones.
        rows = sorted(
            self._units.values(),
            key=lambda unit: math.inf if unit.part is None else unit.part,
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
        """Return the ids of units that failed, do not count, and were not committed afterwards.

        Failures before a complete newest manifest are left out: such a unit is in that manifest, or
        is no longer in the source.
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
        """Return when the newest manifest, which is complete, was written."""
        if newest.number != self._newest_complete[0]:
            with suppress(ObjectNotFound):  # `gc` deleted it meanwhile
                written_at = self._store.info(newest.path).modified_at or 0.0
                self._newest_complete = (newest.number, written_at)
        return self._newest_complete[1]

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
