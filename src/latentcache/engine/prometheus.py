"""Prometheus metrics of a run, exported by Ray's agent on each node, with the prefix `ray_`.

They are updated at each poll of the driver. Counts include attempts that failed later, and lack the
last seconds of an actor: metrics are for monitoring, and receipts are the record.
"""

from __future__ import annotations

import socket
from typing import Any

from latentcache.bottleneck import STAGES
from latentcache.engine.attempt import Totals

# By name without the prefix `latentcache_`; one that ends in `_total` is a counter, else a gauge.
_DESCRIPTIONS = {
    "images_encoded_total": "Images that became latents.",
    "source_read_bytes_total": "Bytes read from the source.",
    "output_written_bytes_total": "Bytes put into the output.",
    "images_rejected_total": "Samples that were rejected.",
    "stage_busy_seconds_total": "Busy time of a stage's threads; its rate over their number is the "
    "occupancy.",
    "stage_threads": "Threads of a stage.",
    "units_committed_total": "Units whose receipt was put.",
    "units_pending": "Units still to be encoded.",
    "units_failed": "Units that were given up.",
    "actors": "Active actors.",
    "actors_lost_total": "Actors that were lost.",
}


class RunMetrics:
    """The metrics of a process of a run of the config `dataset`; `labels` are common to all."""

    def __init__(self, dataset: str, **labels: str) -> None:
        self._labels = {"dataset": dataset, **labels}
        self._metrics: dict[str, Any] = {}
        self._totals: dict[tuple[str, ...], float] = {}

    def update(self, **values: float) -> None:
        """Update some metrics, by their names without the prefix."""
        for name, value in values.items():
            self._set(name, value)

    def _set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, or a counter's total; a total below an earlier one changes nothing."""
        from ray.util.metrics import Counter, Gauge

        is_counter = name.endswith("_total")
        key = (name, *labels.values())
        increase = value - self._totals.get(key, 0.0)
        if is_counter and increase <= 0:
            return
        if name not in self._metrics:
            kind = Counter if is_counter else Gauge
            names = (*self._labels, *labels)
            self._metrics[name] = kind(f"latentcache_{name}", _DESCRIPTIONS[name], names)
        if is_counter:
            self._totals[key] = value
            self._metrics[name].inc(increase, self._labels | labels)
        else:  # Ray drops a gauge that is not set repeatedly
            self._metrics[name].set(value, self._labels | labels)


class ActorMetrics(RunMetrics):
    """The metrics of one actor."""

    def __init__(self, dataset: str) -> None:
        import ray

        device = "".join(f"gpu{number}" for number in ray.get_gpu_ids()) or "cpu"
        super().__init__(dataset, actor=f"{socket.gethostname()}/{device}")

    def update_totals(self, totals: Totals) -> None:
        """Update the metrics of units."""
        stats = totals.stats()
        self.update(
            images_encoded_total=stats["num_rows"],
            source_read_bytes_total=stats["num_source_bytes"],
            output_written_bytes_total=stats["num_output_bytes"],
        )
        for (stage, reason), number in dict(totals.rejects).items():
            self._set("images_rejected_total", number, stage=stage, reason=reason)
        for stage in STAGES:
            self._set("stage_busy_seconds_total", stats[f"{stage}_busy_s"], stage=stage)
            self._set("stage_threads", stats[f"{stage}_num_threads"], stage=stage)
