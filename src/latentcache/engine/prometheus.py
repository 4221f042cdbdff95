"""What Prometheus sees of a run, by way of Ray, whose agent on each node exports it.

Actors tell what they do, the driver how far the run is, both at each poll of the driver and never
for single images. Counts include what attempts did that failed later, and lack an actor's last
seconds: receipts say what is so, metrics are to look at. Ray puts `ray_` before each name, and adds
its own labels, `WorkerId` and `NodeAddress` among them. Where no agent runs, nothing comes of it.
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
    """Metrics of this process, all with the same labels and some with one or two more."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._metrics: dict[str, Any] = {}
        self._totals: dict[tuple[str, ...], float] = {}

    def count(self, name: str, description: str, total: float, **labels: str) -> None:
        """Say how far something has been counted; less than was said before changes nothing."""
        from ray.util.metrics import Counter

        key = (name, *labels.values())
        increase = total - self._totals.get(key, 0.0)
        if increase > 0:
            self._totals[key] = total
            self._get(Counter, name, description, labels).inc(increase, self._labels | labels)

    def set(self, name: str, description: str, value: float, **labels: str) -> None:
        """Say how much of something there is; it is forgotten unless it is said again and again."""
        from ray.util.metrics import Gauge

        self._get(Gauge, name, description, labels).set(value, self._labels | labels)

    def _get(self, kind: Any, name: str, description: str, labels: Mapping[str, str]) -> Any:
        if name not in self._metrics:
            self._metrics[name] = kind(name, description, (*self._labels, *labels))
        return self._metrics[name]


class ActorMetrics:
    """What one actor does.

    Args:
        dataset: the config's name.
    """

    def __init__(self, dataset: str) -> None:
        import ray

        device = "".join(f"gpu{number}" for number in ray.get_gpu_ids()) or "cpu"
        self._metrics = _Metrics(dataset=dataset, actor=f"{socket.gethostname()}/{device}")

    def update(self, stats: Mapping[str, float], rejects: Mapping[tuple[str, str], int]) -> None:
        """Tell of `UnitRunner.stats`, and of rejects by stage and reason."""
        for key, (name, description) in _ACTOR_COUNTERS.items():
            self._metrics.count(name, description, stats[key])
        for (stage, reason), number in rejects.items():
            self._metrics.count(
                "latentcache_images_rejected_total",
                "Samples that were left out.",
                number,
                stage=stage,
                reason=reason,
            )
        for stage in STAGES:
            self._metrics.count(
                "latentcache_stage_busy_seconds_total",
                "Work of a stage's threads; its rate over their number is the occupancy.",
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
    """How far a run is, as its driver sees it.

    Args:
        dataset: the config's name.
    """

    def __init__(self, dataset: str) -> None:
        self._metrics = _Metrics(dataset=dataset)

    def update_units(self, num_committed: int, num_pending: int, num_failed: int) -> None:
        """Tell of units: committed by this run, still to be, and given up."""
        self._metrics.count(
            "latentcache_units_committed_total", "Units whose receipt was put.", num_committed
        )
        self._metrics.set("latentcache_units_pending", "Units still to be encoded.", num_pending)
        self._metrics.set("latentcache_units_failed", "Units that were given up.", num_failed)

    def update_actors(self, num_actors: int, num_lost: int) -> None:
        """Tell of actors: at work, and lost so far."""
        self._metrics.set("latentcache_actors", "Actors at work.", num_actors)
        self._metrics.count("latentcache_actors_lost_total", "Actors that were lost.", num_lost)
