"""What `kernels.py` does, by torch's own operations: for CPUs, whose convolutions add their bias.

Maps are [B, H, W, C] here too. torch's GroupNorm keeps that order on a CPU, and SiLU works in
place: fresh memory is what costs most there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS_BIAS = False
NUM_INPUT_CHANNELS = 3


def to_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn uint8 [B, 3, H, W] into [B, H, W, 3] in [-1, 1]."""
    return images.permute(0, 2, 3, 1).float().div_(127.5).sub_(1.0).to(dtype).contiguous()


def group_norm(
    x: Tensor,
    bias: Tensor | None,
    statistics: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Normalise x + bias by group, with SiLU or without; torch gathers the statistics itself."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    weight, shift = weight.to(x.dtype), shift.to(x.dtype)
    out = F.group_norm(x.permute(0, 3, 1, 2), num_groups, weight, shift, eps)
    out = out.permute(0, 2, 3, 1)
    return F.silu(out, inplace=True) if silu else out


def add(
    x: Tensor,
    h: Tensor,
    bias: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor | None]:
    """Sum two maps and a bias into the first; the statistics are left to `group_norm`."""
    x += h
    if bias is not None:
        x += bias.to(x.dtype)
    return x, None


def add_padded(x: Tensor, h: Tensor | None, bias: Tensor | None) -> Tensor:
    """Sum like `add`, with a row of zeros below and a column of zeros at the right."""
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, height + 1, width + 1, channels))
    out[:, height].zero_()
    out[:, :, width].zero_()
    inner = out[:, :height, :width]
    if h is None:
        inner.copy_(x)
    else:
        torch.add(x, h, out=inner)
    if bias is not None:
        inner += bias.to(out.dtype)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Give softmax(q kᵀ) v of [B, n, C] each; the scale is in q."""
    q, k, v = (tensor.unsqueeze(1) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)
