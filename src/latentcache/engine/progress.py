"""Telling how far a run is: a live bar in a terminal, plain lines elsewhere, or a JSON log."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from latentcache.bottleneck import STAGES, PipelineLoad
from latentcache.errors import one_line
from latentcache.log import Level, write_json

_PLAIN_EVERY_S = 10.0

# Stages count when a job ends; a batch on a CPU may take seconds.
_JUDGE_EVERY_S = 8.0

# A stage less busy than this holds nothing up: the run waits for something else.
_MIN_OCCUPANCY = 0.2


class RunProgress:
    """Shows units, images per second, rejects, time left and the bottleneck, on stderr.

    Args:
        num_units: how many the run will encode.
        quiet: show nothing.
        log_json: each line is a JSON object, for log collectors; see `latentcache.log`.
    """

    def __init__(self, num_units: int, *, quiet: bool = False, log_json: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, emoji=False)
        self._log_json = log_json and not quiet
        self._num_units = num_units
        self._began = self._said = time.monotonic()
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
                # In a narrow terminal it wraps.
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
        """Print one line, above the bar where there is one; in a JSON log with event and fields."""
        if self._log_json:
            write_json(event, message, level, **fields)
        else:
            self._console.print(one_line(message), highlight=False, markup=False, soft_wrap=True)

    def log(self, event: str, message: str, level: Level = "info", **fields: Any) -> None:
        """Tell a JSON log alone what people see from the bar, or at the end."""
        if self._log_json:
            write_json(event, message, level, **fields)

    def unit_done(self, num_rows: int, num_rejects: int) -> None:
        """Count a committed unit."""
        self._num_done += 1
        self._num_rows += num_rows
        self._num_rejects += num_rejects
        self._show()

    def polled(self, stats: list[dict[str, float]], num_lost: int) -> None:
        """Take in what the actors say, every two seconds."""
        if num_lost > self._num_lost:
            message = f"{num_lost} actors lost so far"
            self.log("actors_lost", message, "warning", num_lost=num_lost, num_actors=len(stats))
        self._num_lost = num_lost
        now = time.monotonic()
        then, before = self._previous
        self._stats = stats
        if len(before) != len(stats):  # an actor came or went
            self._previous = (now, stats)
        elif stats and now - then >= _JUDGE_EVERY_S:
            self._bottleneck = bottleneck(before, stats, now - then)
            self._previous = (now, stats)
        self._show()

    def _show(self) -> None:
        if self._live:
            self._live.update(self._task, completed=self._num_done, note=self._note())
        elif time.monotonic() - self._said >= _PLAIN_EVERY_S:
            self._said = time.monotonic()
            self.say(
                "progress",
                f"{self._num_done}/{self._num_units} units, {self._note()}",
                num_done=self._num_done,
                num_units=self._num_units,
                num_rows=self._num_rows,
                num_rejects=self._num_rejects,
                images_per_s=round(self._images_per_s, 1),
                left_s=None if self._left_s is None else round(self._left_s),
                num_actors=len(self._stats),
                num_lost=self._num_lost,
                bottleneck=self._bottleneck or None,
            )

    @property
    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)

    @property
    def _images_per_s(self) -> float:
        # The actors' own counts run ahead of the units; after a loss they start anew.
        seen = sum(stats.get("num_rows", 0) for stats in self._stats)
        return max(self._num_rows, seen) / self._elapsed_s

    @property
    def _left_s(self) -> float | None:
        if not self._num_done:
            return None
        return self._elapsed_s / self._num_done * (self._num_units - self._num_done)

    def _note(self) -> str:
        parts = [f"{self._images_per_s:.1f} images/s", f"{self._num_rejects} rejects"]
        if not self._live and self._left_s is not None:
            parts.append(f"{self._left_s:.0f} s left")
        if not self._stats:
            parts.append("waiting for Ray to start actors")
        if self._bottleneck:
            parts.append(self._bottleneck)
        if self._num_lost:
            parts.append(f"{self._num_lost} actors lost")
        return ", ".join(parts)


def bottleneck(
    before: list[dict[str, float]], after: list[dict[str, float]], seconds: float
) -> str:
    """Say which stage held things up between two polls of the same actors; "" if none did.

    Args:
        before: `UnitRunner.stats` of each actor.
        after: the same, `seconds` later.
        seconds: between the two.
    """
    loads = PipelineLoad()
    for old, new in zip(before, after, strict=True):
        for stage in STAGES:
            busy_s = new[f"{stage}_busy_s"] - old[f"{stage}_busy_s"]
            loads.add(stage, busy_s, 0.0, new[f"{stage}_num_threads"])
    found = loads.bottleneck
    if found is None or found.alone_s < _MIN_OCCUPANCY * seconds * len(after):
        return ""
    return str(found)
