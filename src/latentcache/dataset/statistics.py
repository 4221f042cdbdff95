"""Per-channel statistics of latents that merge exactly: unit by unit into a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentcache.dataset.parse import Count, check
from latentcache.errors import DatasetError

# Fixed edges, so that histograms of different units add up. Unscaled KL-f8 latents have a standard
# deviation of 1 to 6 and log-variances lie in [-30, 20]; what falls outside is counted at the ends.
HISTOGRAM_EDGES = np.linspace(-32.0, 32.0, 129)
_STEP = 0.5  # between two edges: a power of two, by which dividing is exact
_NUM_BINS = len(HISTOGRAM_EDGES) + 1

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is known of `count` values in each of C channels.

    `mean`, `m2` (the sum of squared deviations from the mean), `minimum` and `maximum` are float64
    [C]; `histogram` is int64 [C, 130]: below the first of `HISTOGRAM_EDGES`, between each two, and
    above the last. All are of the stored values, after the cast to the stored dtype; of int8, of
    the values that it stands for.
    """

    count: int
    mean: Float64
    m2: Float64
    minimum: Float64
    maximum: Float64
    histogram: Int64

    @classmethod
    def empty(cls, num_channels: int) -> Statistics:
        """Statistics of no values."""
        return cls(
            count=0,
            mean=np.zeros(num_channels),
            m2=np.zeros(num_channels),
            minimum=np.full(num_channels, np.inf),
            maximum=np.full(num_channels, -np.inf),
            histogram=np.zeros((num_channels, _NUM_BINS), np.int64),
        )

    @classmethod
    def of(cls, latents: npt.NDArray[np.float32]) -> Statistics:
        """Statistics of a batch: float32 [N, C, H, W], N ≥ 1."""
        num_channels = latents.shape[1]
        channels = latents.transpose(1, 0, 2, 3).reshape(num_channels, -1)
        mean = channels.mean(axis=1, dtype=np.float64)
        deviation = channels - mean[:, None]
        # Bins of equal width need no search; each channel counts in a stretch of its own.
        bins = np.floor(channels / _STEP) - HISTOGRAM_EDGES[0] / _STEP + 1
        bins = bins.clip(0, _NUM_BINS - 1).astype(np.intp)
        bins += _NUM_BINS * np.arange(num_channels)[:, None]
        counts = np.bincount(bins.ravel(), minlength=_NUM_BINS * num_channels)
        return cls(
            count=channels.shape[1],
            mean=mean,
            m2=np.einsum("cn,cn->c", deviation, deviation),
            minimum=channels.min(axis=1).astype(np.float64),
            maximum=channels.max(axis=1).astype(np.float64),
            histogram=counts.reshape(num_channels, _NUM_BINS),
        )

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of values (Chan, Golub and LeVeque 1979, pairwise update).

        Raises:
            DatasetError: they are of other numbers of channels.
        """
        if self.mean.shape != other.mean.shape:
            raise DatasetError(
                f"statistics are of {len(self.mean)} channels here and {len(other.mean)} there: "
                "run `latentcache verify`"
            )
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Statistics(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + np.square(delta) * (self.count * other.count / count),
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            histogram=self.histogram + other.histogram,
        )

    @property
    def std(self) -> Float64:
        """Population standard deviation, float64 [C]; zero where there are no values."""
        return np.sqrt(self.m2 / max(self.count, 1))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `minimum` and `maximum` are null where there are no values."""
        empty = self.count == 0
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "m2": self.m2.tolist(),
            "min": None if empty else self.minimum.tolist(),
            "max": None if empty else self.maximum.tolist(),
            "histogram": self.histogram.tolist(),
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Statistics:
        """Read what `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        names = {"count", "mean", "m2", "min", "max", "histogram"}
        if not isinstance(tree, dict) or tree.keys() != names:
            raise ValueError(f"statistics are not an object of {', '.join(sorted(names))}")
        count = check(Count, tree["count"], "statistics.count")
        mean = _array(tree, "mean", "if", (-1,))
        num_channels = len(mean)
        if count == 0:
            return cls.empty(num_channels)
        found = cls(
            count=count,
            mean=mean.astype(np.float64),
            m2=_array(tree, "m2", "if", (num_channels,)).astype(np.float64),
            minimum=_array(tree, "min", "if", (num_channels,)).astype(np.float64),
            maximum=_array(tree, "max", "if", (num_channels,)).astype(np.float64),
            histogram=_array(tree, "histogram", "i", (num_channels, _NUM_BINS)),
        )
        if found.m2.min() < 0 or found.histogram.min() < 0:
            raise ValueError("statistics have a negative square or count")
        return found


def _array(tree: dict[str, Any], name: str, kinds: str, shape: tuple[int, ...]) -> Any:
    """Return a list of finite numbers as an array; `shape` begins with -1 for any size."""
    value = tree[name]
    array = np.array(value) if isinstance(value, list) else np.empty(0)
    is_fit = len(array.shape) == len(shape) and shape in (array.shape, (-1,)) and array.size
    if not is_fit or array.dtype.kind not in kinds or not np.isfinite(array).all():
        raise ValueError(f"statistics.{name} is not a list of numbers, one for each channel")
    return array


def merge_all(parts: Iterable[Statistics], num_channels: int) -> Statistics:
    """Merge any number of statistics."""
    total = Statistics.empty(num_channels)
    for part in parts:
        total = total.merge(part)
    return total
