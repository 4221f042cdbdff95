"""The status of a dataset, read from its manifests, receipts, failures and leases; its rates."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from rich.table import Table
from rich.text import Text

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
from latentcache.errors import ObjectNotFound, one_line
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

# The number of latest receipts from which the bottleneck is computed.
_NUM_RECEIPTS = 64

# Rates are computed over the readings of at most this many seconds.
_WINDOW_S = 600.0

# The pause after a reading, in multiples of its duration: listing the receipts of very many units
# takes long, so reading gets at most a tenth of the time.
_PAUSE_RATIO = 9.0

_MAX_FAILURES = 5


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


@dataclass(frozen=True, slots=True)
class Watched:
    """A status with the change over the last `window_s` seconds; rates are None while unknown."""

    status: Status
    window_s: float
    rows_per_s: float | None
    left_s: float | None

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object, with the fields of the status at the top level."""
        rates = {"rows_per_s": self.rows_per_s, "left_s": self.left_s}
        return {**asdict(self.status), "window_s": round(self.window_s, 3), **rates}

    def to_line(self) -> str:
        """Return the status as one line of text."""
        status = self.status
        parts = [
            f"{status.num_committed}/{status.num_units} units",
            f"{status.num_rows} rows",
            None if self.rows_per_s is None else f"{self.rows_per_s:.1f} rows/s",
            None if self.left_s is None else f"{self.left_s:.0f} s left",
            f"{status.num_rejects} rejects",
            f"{len(status.failed)} failed",
            f"{len(status.active_runs)} active runs",
            status.bottleneck,
        ]
        return one_line(", ".join(part for part in parts if part))

    def to_table(self, url: str) -> Table:
        """Return the status as a table for a terminal."""
        status = self.status
        share = status.num_committed / max(1, status.num_units)
        rate = ""
        if self.rows_per_s is not None:
            rate = f", {self.rows_per_s:,.1f}/s over the last {_duration(self.window_s)}"
        num_samples = max(1, status.num_rows + status.num_rejects)
        newest = str(status.manifests[-1]) if status.manifests else "none yet"
        lines = [
            ("dataset", url),
            ("units", f"{status.num_committed} of {status.num_units} ({share:.1%})"),
            ("rows", f"{status.num_rows:,}{rate}"),
            ("time left", "not known" if self.left_s is None else _duration(self.left_s)),
            ("rejects", f"{status.num_rejects:,} ({status.num_rejects / num_samples:.2%})"),
            ("manifest", newest + ("" if status.complete else ", not complete")),
            ("bottleneck", (status.bottleneck or "not known").removeprefix("bottleneck: ")),
        ]
        for run in status.active_runs:
            lines.append(("run", f"{run.host}, pid {run.pid}, seen {run.age_s:.0f} s ago"))
        if not status.active_runs:
            lines.append(("run", "none active"))
        if status.gc_at_work:
            lines.append(("gc", "active"))
        failures = list(status.failed.values())
        lines += [("failed", message) for message in failures[:_MAX_FAILURES]]
        if failures[_MAX_FAILURES:]:
            lines.append(("", f"and {len(failures) - _MAX_FAILURES} more"))
        table = Table.grid(padding=(0, 2))
        for name, text in lines:
            table.add_row(Text(name, "bold"), Text(one_line(text)))
        return table


def watch(
    url: str,
    options: StorageOptions,
    every_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Watched]:
    """Yield the status repeatedly, until the dataset is complete and no run is active.

    Args:
        url, options, clock, wait: see `read_status` for the first two and for errors.
        every_s: the least pause between two readings, which also depends on `_PAUSE_RATIO`.
    """
    reader = StatusReader(url, options)
    readings: deque[tuple[float, Status]] = deque()
    while True:
        began = clock()
        status = reader.read()
        now = clock()
        while len(readings) > 1 and now - readings[0][0] > _WINDOW_S:
            readings.popleft()
        readings.append((now, status))
        then, before = readings[0]
        window_s, rows_per_s, left_s = now - then, None, None
        if window_s > 0:
            rows_per_s = (status.num_rows - before.num_rows) / window_s
            num_committed = status.num_committed - before.num_committed
            if num_committed > 0 and (status.active_runs or status.complete):
                left_s = (status.num_units - status.num_committed) * window_s / num_committed
        yield Watched(status, window_s, rows_per_s, left_s)
        if status.complete and not status.active_runs:
            return
        wait(max(every_s, _PAUSE_RATIO * (now - began)))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
