"""The progress of a run: a live bar in a terminal, plain lines elsewhere, or a JSON log."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from latentcache.bottleneck import STAGES, PipelineLoad
from latentcache.dataset.receipts import UnitRecord
from latentcache.engine.dispatcher import Polled
from latentcache.errors import one_line
from latentcache.log import Level, write_json

_PLAIN_EVERY_S = 10.0

# The interval over which the bottleneck is computed. A stage adds its time when a job ends, and a
# batch on a CPU may take seconds.
_BOTTLENECK_EVERY_S = 8.0

# A stage that is less busy than this is no bottleneck: the run waits for something else.
_MIN_OCCUPANCY = 0.2


class RunProgress:
    """The display of units, images per second, rejects, time left and the bottleneck on stderr."""

    def __init__(self, num_units: int, *, quiet: bool = False, log_json: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, emoji=False)
        self._log_json = log_json and not quiet
        self._num_units = num_units
        self._began = self._shown_at = time.monotonic()
        self._num_done = self._num_rows = self._num_rejects = self._num_lost = 0
        self._stats: list[dict[str, float]] = []
        self._previous: tuple[float, list[dict[str, float]]] = (self._began, [])
        self._bottleneck = ""
        self._live: Progress | None = None
        if self._console.is_terminal and not quiet and not log_json:
            whole = Column(no_wrap=True)
            self._live = Progress(
                TextColumn("encoding"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(table_column=whole),
                TextColumn("units"),
                TimeRemainingColumn(table_column=whole),
                # This column wraps in a narrow terminal.
                TextColumn("{task.fields[note]}", table_column=Column(), markup=False),
                console=self._console,
            )

    def __enter__(self) -> RunProgress:
        if self._live:
            self._task = self._live.add_task("encoding", total=self._num_units, note="starting")
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, event: str, message: str, level: Level = "info", **fields: Any) -> None:
        """Print a line, above the bar if there is one, or write it to the JSON log.

        Args:
            event, message, level, fields: see `write_json`; users see the message.
        """
        if self._log_json:
            write_json(event, message, level, **fields)
        else:
            self._console.print(one_line(message), highlight=False, markup=False, soft_wrap=True)

    def log(self, event: str, message: str, level: Level = "info", **fields: Any) -> None:
        """Write to the JSON log only, for events that users see from the bar or at the end.

        Args:
            event, message, level, fields: see `write_json`.
        """
        if self._log_json:
            write_json(event, message, level, **fields)

    def add_unit(self, record: UnitRecord) -> None:
        """Count a committed unit."""
        self._num_done += 1
        self._num_rows += record.num_rows
        self._num_rejects += record.num_rejects
        self._show()

    def polled(self, event: Polled) -> None:
        """Update the display with the statistics of the actors; called about every two seconds."""
        stats, num_lost = event.stats, event.num_lost
        if num_lost > self._num_lost:
            message = f"{num_lost} actors lost so far"
            self.log("actors_lost", message, "warning", num_lost=num_lost, num_actors=len(stats))
        self._num_lost = num_lost
        now, (then, before) = time.monotonic(), self._previous
        self._stats = stats
        if len(before) != len(stats):  # an actor came or went
            self._previous = (now, stats)
        elif stats and now - then >= _BOTTLENECK_EVERY_S:
            self._bottleneck = _bottleneck(before, stats, now - then)
            self._previous = (now, stats)
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if not self._live and now - self._shown_at < _PLAIN_EVERY_S:
            return
        elapsed_s, left_s = max(now - self._began, 1e-9), None
        # Actors count rows before their unit is committed. Their counts are lost with an actor.
        num_encoded = sum(stats.get("num_rows", 0) for stats in self._stats)
        images_per_s = max(self._num_rows, num_encoded) / elapsed_s
        if self._num_done:
            left_s = elapsed_s / self._num_done * (self._num_units - self._num_done)
        parts = [
            f"{images_per_s:.1f} images/s",
            f"{self._num_rejects} rejects",
            "" if self._live or left_s is None else f"{left_s:.0f} s left",
            "" if self._stats else "waiting for Ray to start actors",
            self._bottleneck,
            f"{self._num_lost} actors lost" if self._num_lost else "",
        ]
        note = ", ".join(filter(None, parts))
        if self._live:
            self._live.update(self._task, completed=self._num_done, note=note)
            return
        self._shown_at = now
        self.say(
            "progress",
            f"{self._num_done}/{self._num_units} units, {note}",
            num_done=self._num_done,
            num_units=self._num_units,
            num_rows=self._num_rows,
            num_rejects=self._num_rejects,
            images_per_s=round(images_per_s, 1),
            left_s=None if left_s is None else round(left_s),
            num_actors=len(self._stats),
            num_lost=self._num_lost,
            bottleneck=self._bottleneck or None,
        )


def _bottleneck(
    before: list[dict[str, float]], after: list[dict[str, float]], seconds: float
) -> str:
    """Return the slowest stage between two polls of the same actors; "" if there is none."""
    loads = PipelineLoad()
    for old, new in zip(before, after, strict=True):
        for stage in STAGES:
            busy_s = new[f"{stage}_busy_s"] - old[f"{stage}_busy_s"]
            loads.add(stage, busy_s, 0.0, new[f"{stage}_num_threads"])
    slowest = loads.bottleneck
    if slowest is None or slowest.alone_s < _MIN_OCCUPANCY * seconds * len(after):
        return ""
    return str(slowest)
