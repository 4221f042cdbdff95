"""Convert latents to the dtype in which they are stored, and back.

Each stored channel of an int8 dataset has a scale (the step between two values, a float32 number)
and a zero point (an integer). A stored `q` from -127 to 127 means `(q - zero_point) * scale` in
float32. The subtraction is exact and the product rounds once, so that every reader computes the
same bits. -128 is never stored: it marks values that are not finite until a writer drops them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from latentcache.dataset.contract import LatentContract, QuantizationContract
from latentcache.dataset.layout import TORCH_DTYPES
from latentcache.dataset.statistics import Float64

_MAX_Q = 127
_NOT_FINITE = -128

# A step is at least a channel's largest absolute value divided by this, so that neighbouring values
# differ in float32. This bound matters only for a channel that hardly varies.
_MAX_STEPS = 2**22


def fit(spec: QuantizationContract, values: torch.Tensor) -> QuantizationContract:
    """Return a quantization whose scales and zero points minimize the squared error over values.

    The mean squared error of rounding is the squared step divided by 12 (Bennett 1948); the error
    of clamping is computed. Each end of a channel's range is searched on a grid of 101 points, from
    the median to the smallest or largest value.

    Args:
        spec, values: the calibration settings, and [C, n] values of the stored channels, n ≥ 1.
    """
    ranges = np.array([_best_range(channel.double().numpy()) for channel in values])
    low, high = ranges.T
    step = np.maximum((high - low) / (2 * _MAX_Q), np.abs(ranges).max(axis=1) / _MAX_STEPS)
    scale = step.astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0  # the channel holds only zeros
    zero_point = np.rint(-(low + high) / 2 / scale).astype(np.int64)
    return replace(spec, scale=tuple(scale.tolist()), zero_point=tuple(zero_point.tolist()))


def _best_range(values: Float64) -> tuple[float, float]:
    median = np.median(values)
    ordered = np.sort(values - median)
    parts = np.linspace(0, 1, 101)
    low, high = parts * min(ordered[0], 0.0), parts * max(ordered[-1], 0.0)
    rounding = np.square((high[None] - low[:, None]) / (2 * _MAX_Q)) / 12
    clamping = _cost_below(ordered, low)[:, None] + _cost_below(-ordered[::-1], -high)[None]
    at_low, at_high = np.unravel_index(np.argmin(rounding + clamping), rounding.shape)
    return float(median + low[at_low]), float(median + high[at_high])


def _cost_below(ordered: Float64, ends: Float64) -> Float64:
    """Return, for each end, the mean squared error of clamping values below that end to it."""
    sums, squares = (np.concatenate([[0.0], np.cumsum(v)]) for v in (ordered, np.square(ordered)))
    num = np.searchsorted(ordered, ends)
    cost: Float64 = (num * np.square(ends) - 2 * ends * sums[num] + squares[num]) / len(ordered)
    return cost


def zero_and_scale(quantization: QuantizationContract) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zero points and scales as float64 [C, 1, 1], which broadcast to [..., C, H, W]."""
    pair = quantization.zero_point, quantization.scale
    zero, scale = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in pair)
    return zero, scale


def to_stored(values: torch.Tensor, terms: LatentContract) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stored latents [N, C, H, W], and how many values of each int8 clamped, int64 [N].

    int8 rounds ties to even. `is_finite` finds values that the stored dtype cannot hold.

    Args:
        values, terms: float32 [N, C, H, W], and the `latents` of the contract.
    """
    dtype = TORCH_DTYPES[terms.dtype]
    if terms.quantization is None:
        return values.to(dtype), torch.zeros(len(values), dtype=torch.int64)
    zero, scale = zero_and_scale(terms.quantization)
    steps = (values.double() / scale).round_().add_(zero)
    finite = values.isfinite()
    num_clamped = (finite & (steps.abs() > _MAX_Q)).sum(dim=(1, 2, 3))
    steps.clamp_(-_MAX_Q, _MAX_Q)[~finite] = _NOT_FINITE
    return steps.to(dtype), num_clamped


def to_values(stored: torch.Tensor, terms: LatentContract) -> torch.Tensor:
    """Return the float32 values of stored latents.

    Args:
        stored, terms: [..., C, H, W] in the stored dtype, and the `latents` of the contract.
    """
    if terms.quantization is None:
        return stored.float()
    zero, scale = zero_and_scale(terms.quantization)
    return stored.float().sub_(zero.float()).mul_(scale.float())


def is_finite(stored: torch.Tensor) -> torch.Tensor:
    """Return where stored latents are finite: bool of the same shape."""
    return stored != _NOT_FINITE if stored.dtype == torch.int8 else stored.isfinite()
