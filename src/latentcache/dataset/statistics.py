"""Per-channel statistics of latents, which merge from units to a whole dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentcache.dataset.parse import Count, check
from latentcache.errors import DatasetError

# The edges are fixed, so that histograms of different units can be added. Unscaled KL-f8 latents
# have a standard deviation of 1 to 6, and log-variances lie in [-30, 20]. The first and last bin
# count the values outside.
HISTOGRAM_EDGES = np.linspace(-32.0, 32.0, 129)
_STEP = 0.5  # between two edges; dividing by a power of two is exact
_NUM_BINS = len(HISTOGRAM_EDGES) + 1

_ARRAYS = ("mean", "m2", "min", "max", "histogram")  # as JSON names them

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of `count` values in each of C channels.

    `mean`, `m2` (the sum of squared deviations from the mean), `minimum` and `maximum` are float64
    [C]. `histogram` is int64 [C, 130]: the number of values below the first of `HISTOGRAM_EDGES`,
    between each two, and above the last. The values are those of stored latents, after the cast to
    the stored dtype; int8 is dequantized.
    """

    count: int
    mean: Float64
    m2: Float64
    minimum: Float64
    maximum: Float64
    histogram: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, num_channels: int) -> Statistics:
        """Return the statistics of no values."""
        zeros = np.zeros(num_channels)
        histogram = np.zeros((num_channels, _NUM_BINS), np.int64)
        return cls(0, zeros, zeros, zeros + np.inf, zeros - np.inf, histogram)

    @classmethod
    def of(cls, latents: npt.NDArray[np.float32]) -> Statistics:
        """Return the statistics of a batch: float32 [N, C, H, W], N ≥ 1."""
        num_channels = latents.shape[1]
        channels = latents.transpose(1, 0, 2, 3).reshape(num_channels, -1)
        mean = channels.mean(axis=1, dtype=np.float64)
        deviation = channels - mean[:, None]
        # Bins have equal width, so their index is computed without a search. Each channel has its
        # own range of bins, so that one `bincount` counts all channels.
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
        """Return the statistics of both sets of values, after Chan, Golub and LeVeque (1979)."""
        if self.mean.shape != other.mean.shape:
            both = f"{len(self.mean)} and {len(other.mean)} channels"
            raise DatasetError(f"cannot merge statistics of {both}: run `latentcache verify`")
        if not (count := self.count + other.count):
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
        """The population standard deviation, float64 [C]; zero if there are no values."""
        return np.sqrt(self.m2 / max(self.count, 1))

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as plain JSON; `min` and `max` are null if there are no values."""
        arrays = (self.mean, self.m2, self.minimum, self.maximum, self.histogram)
        tree = {name: array.tolist() for name, array in zip(_ARRAYS, arrays, strict=True)}
        return {"count": self.count, **tree, **({} if self.count else {"min": None, "max": None})}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Statistics:
        """Build statistics from the result of `to_json`; raise `ValueError` for anything else."""
        if not isinstance(tree, dict) or tree.keys() != {"count", *_ARRAYS}:
            raise ValueError(f"statistics are not an object with count, {', '.join(_ARRAYS)}")
        count = check(Count, tree["count"], "statistics.count")
        mean = _array(tree, "mean", "if", (-1,))
        if count == 0:
            return cls.empty(len(mean))
        m2, low, high = (_array(tree, name, "if", mean.shape) for name in ("m2", "min", "max"))
        histogram = _array(tree, "histogram", "i", (len(mean), _NUM_BINS))
        if m2.min() < 0 or histogram.min() < 0:
            raise ValueError("statistics have a negative sum of squares or a negative count")
        mean, m2, low, high = (array.astype(np.float64) for array in (mean, m2, low, high))
        return cls(count, mean, m2, low, high, histogram)


def _array(tree: dict[str, Any], name: str, kinds: str, shape: tuple[int, ...]) -> Any:
    """Return a list of finite numbers as an array; the shape (-1,) allows any length."""
    value = tree[name]
    array = np.array(value) if isinstance(value, list) else np.empty(0)
    is_fit = len(array.shape) == len(shape) and shape in (array.shape, (-1,)) and array.size
    if not is_fit or array.dtype.kind not in kinds or not np.isfinite(array).all():
        raise ValueError(f"statistics.{name} is not a list of numbers, one for each channel")
    return array
