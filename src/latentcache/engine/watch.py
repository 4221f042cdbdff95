"""Repeated status of a growing dataset, with rates and the time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from rich.table import Table
from rich.text import Text

from latentcache.engine.status import Status, StatusReader
from latentcache.errors import one_line
from latentcache.storage_options import StorageOptions

# Rates are computed over the readings of at most this many seconds.
_WINDOW_S = 600.0

# The pause after a reading, in multiples of its duration: listing the receipts of very many units
# takes long, so reading gets at most a tenth of the time.
_PAUSE_RATIO = 9.0

_MAX_FAILURES = 5


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
