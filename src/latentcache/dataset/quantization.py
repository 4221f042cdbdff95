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
from latentcache.dataset.shards import TORCH_DTYPES
from latentcache.dataset.statistics import Statistics

_MAX_Q = 127
_NOT_FINITE = -128

# A step is no finer than a channel's mean over this, so that float32 tells neighbours apart; it
# decides only where a channel hardly varies.
_MAX_ZERO_POINT = 2**22


def fit(spec: QuantizationContract, statistics: Statistics) -> QuantizationContract:
    """Choose scale and zero point, so that -127 to 127 is `sigmas` deviations about the mean.

    Args:
        spec: names `sigmas`.
        statistics: of the stored channels, before they are quantised.
    """
    half_range = spec.sigmas * statistics.std
    step = np.maximum(half_range / _MAX_Q, np.abs(statistics.mean) / _MAX_ZERO_POINT)
    scale = step.astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0  # a channel of nothing but zeros
    zero_point = np.rint(-statistics.mean / scale).astype(np.int64)
    return replace(spec, scale=tuple(scale.tolist()), zero_point=tuple(zero_point.tolist()))


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
