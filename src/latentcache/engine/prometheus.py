"""Prometheus metrics of a run, exported by Ray's agent on each node.

Actors and the driver update them at each poll of the driver, never for single images. Counts
include attempts that failed later, and lack the last seconds of an actor: metrics are for
monitoring, and receipts are the record. Ray adds the prefix `ray_` to each name and its own labels,
such as `WorkerId` and `NodeAddress`. Without an agent nothing is exported.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from latentcache.bottleneck import STAGES

_ACTOR_COUNTERS = {
    "num_rows": ("latentcache_images_encoded_total", "Images that became latents."),
    "num_source_bytes": ("latentcache_source_read_bytes_total", "Bytes read from the source."),
    "num_output_bytes": ("latentcache_output_written_bytes_total", "Bytes put into the output."),
}


class _Metrics:
    """The metrics of this process, with common labels and further labels of single metrics."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._metrics: dict[str, Any] = {}
        self._totals: dict[tuple[str, ...], float] = {}

    def count(self, name: str, description: str, total: float, **labels: str) -> None:
        """Set the total of a counter; a total below an earlier one changes nothing.

        Args:
            name: the name of the metric.
            description: its description.
            total: the new total.
            labels: further labels.
        """
        from ray.util.metrics import Counter

        key = (name, *labels.values())
        increase = total - self._totals.get(key, 0.0)
        if increase > 0:
            self._totals[key] = total
            self._get(Counter, name, description, labels).inc(increase, self._labels | labels)

    def set(self, name: str, description: str, value: float, **labels: str) -> None:
        """Set a gauge. Ray drops a gauge that is not set repeatedly.

        Args:
            name: the name of the metric.
            description: its description.
            value: the new value.
            labels: further labels.
        """
        from ray.util.metrics import Gauge

        self._get(Gauge, name, description, labels).set(value, self._labels | labels)

    def _get(self, kind: Any, name: str, description: str, labels: Mapping[str, str]) -> Any:
        if name not in self._metrics:
            self._metrics[name] = kind(name, description, (*self._labels, *labels))
        return self._metrics[name]


class ActorMetrics:
    """The metrics of one actor.

    Args:
        dataset: the name of the config.
    """

    def __init__(self, dataset: str) -> None:
        import ray

        device = "".join(f"gpu{number}" for number in ray.get_gpu_ids()) or "cpu"
        self._metrics = _Metrics(dataset=dataset, actor=f"{socket.gethostname()}/{device}")

    def update(self, stats: Mapping[str, float], rejects: Mapping[tuple[str, str], int]) -> None:
        """Update the metrics.

        Args:
            stats: `UnitRunner.stats`.
            rejects: the number of rejects by stage and reason.
        """
        for key, (name, description) in _ACTOR_COUNTERS.items():
            self._metrics.count(name, description, stats[key])
        for (stage, reason), number in rejects.items():
            self._metrics.count(
                "latentcache_images_rejected_total",
                "Samples that were rejected.",
                number,
                stage=stage,
                reason=reason,
            )
        for stage in STAGES:
            self._metrics.count(
                "latentcache_stage_busy_seconds_total",
                "Busy time of a stage's threads; its rate over their number is the occupancy.",
                stats[f"{stage}_busy_s"],
                stage=stage,
            )
            self._metrics.set(
                "latentcache_stage_threads",
                "Threads of a stage.",
                stats[f"{stage}_num_threads"],
                stage=stage,
            )


class RunMetrics:
    """The metrics of the driver of a run.

    Args:
        dataset: the name of the config.
    """

    def __init__(self, dataset: str) -> None:
        self._metrics = _Metrics(dataset=dataset)

    def update_units(self, num_committed: int, num_pending: int, num_failed: int) -> None:
        """Update the counts of units.

        Args:
            num_committed: units that this run committed.
            num_pending: units that are still to be encoded.
            num_failed: units that were given up.
        """
        self._metrics.count(
            "latentcache_units_committed_total", "Units whose receipt was put.", num_committed
        )
        self._metrics.set("latentcache_units_pending", "Units still to be encoded.", num_pending)
        self._metrics.set("latentcache_units_failed", "Units that were given up.", num_failed)

    def update_actors(self, num_actors: int, num_lost: int) -> None:
        """Update the counts of actors.

        Args:
            num_actors: active actors.
            num_lost: actors lost so far.
        """
        self._metrics.set("latentcache_actors", "Active actors.", num_actors)
        self._metrics.count("latentcache_actors_lost_total", "Actors that were lost.", num_lost)
