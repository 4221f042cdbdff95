"""From latents to the dtype in which they are stored, and back: the one home of int8's arithmetic.

Each stored channel of an int8 dataset has a scale (the step from one value to the next, a float32
number) and a zero point (a whole number), and `value = (q - zero_point) * scale` in float32, with q
from -127 to 127. The subtraction is exact and the product rounds once, so that any reader gets the
same bits. -128 is never stored: it stands for what is not finite until a writer has left that out.
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

# A step is no finer than a channel's largest value over this, so that float32 tells neighbours
# apart; it decides only where a channel hardly varies.
_MAX_STEPS = 2**22


def fit(spec: QuantizationContract, values: torch.Tensor) -> QuantizationContract:
    """Choose each channel's scale and zero point for the least squared error over a sample.

    A wide range has a large step, a narrow one cuts the tails. Rounding to a step costs its square
    over 12 (Bennett 1948); what cutting costs is counted. The ends are chosen from a hundred parts
    of the way from the median to the smallest and to the largest value.

    Args:
        spec: what the sample was drawn by.
        values: [C, n] of the stored channels, n ≥ 1.
    """
    ranges = np.array([_best_range(channel.double().numpy()) for channel in values])
    low, high = ranges.T
    step = np.maximum((high - low) / (2 * _MAX_Q), np.abs(ranges).max(axis=1) / _MAX_STEPS)
    scale = step.astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0  # a channel of nothing but zeros
    zero_point = np.rint(-(low + high) / 2 / scale).astype(np.int64)
    return replace(spec, scale=tuple(scale.tolist()), zero_point=tuple(zero_point.tolist()))


def _best_range(values: Float64) -> tuple[float, float]:
    median = np.median(values)
    ordered = np.sort(values - median)
    parts = np.linspace(0, 1, 101)
    low, high = parts * min(ordered[0], 0.0), parts * max(ordered[-1], 0.0)
    rounding = np.square((high[None] - low[:, None]) / (2 * _MAX_Q)) / 12
    cutting = _cost_below(ordered, low)[:, None] + _cost_below(-ordered[::-1], -high)[None]
    at_low, at_high = np.unravel_index(np.argmin(rounding + cutting), rounding.shape)
    return float(median + low[at_low]), float(median + high[at_high])


def _cost_below(ordered: Float64, ends: Float64) -> Float64:
    """Mean over all values of the squared distance of those below an end to it, for each end."""
    sums, squares = (np.concatenate([[0.0], np.cumsum(v)]) for v in (ordered, np.square(ordered)))
    num = np.searchsorted(ordered, ends)
    cost: Float64 = (num * np.square(ends) - 2 * ends * sums[num] + squares[num]) / len(ordered)
    return cost


def zero_and_scale(quantization: QuantizationContract) -> tuple[torch.Tensor, torch.Tensor]:
    """Give zero points and scales as float64 [C, 1, 1], which stand against [..., C, H, W]."""
    pair = quantization.zero_point, quantization.scale
    zero, scale = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in pair)
    return zero, scale


def to_stored(values: torch.Tensor, terms: LatentContract) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring latents to the stored dtype: for int8 the nearest value, ties to even.

    Args:
        values: float32 [N, C, H, W].
        terms: the contract's.

    Returns:
        [N, C, H, W] in the stored dtype (`is_finite` tells what it cannot hold), and int64 [N], how
        many values of each latent lay beyond int8's range, whose ends took their place.
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
    """Give the float32 values that stored latents [..., C, H, W] stand for."""
    if terms.quantization is None:
        return stored.float()
    zero, scale = zero_and_scale(terms.quantization)
    return stored.float().sub_(zero.float()).mul_(scale.float())


def is_finite(stored: torch.Tensor) -> torch.Tensor:
    """Tell where stored latents are numbers: bool of the same shape."""
    return stored != _NOT_FINITE if stored.dtype == torch.int8 else stored.isfinite()
