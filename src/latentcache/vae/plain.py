"""The functions of `kernels.py` with torch's own operations, for CPUs.

Convolutions on CPUs add their bias themselves. torch's GroupNorm keeps the order [B, H, W, C] on a
CPU. SiLU and `add` work in place, because new memory is the largest cost there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS_BIAS = False
NUM_INPUT_CHANNELS = 3


def to_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 [B, 3, H, W] to [B, H, W, 3] in [-1, 1]. Args: see `kernels.to_input`."""
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
    """Normalise x + bias by group, optionally with SiLU. Args: see `kernels.group_norm`."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    weight, shift = weight.to(x.dtype), shift.to(x.dtype)
    out = F.group_norm(x.permute(0, 3, 1, 2), num_groups, weight, shift, eps)
    out = out.permute(0, 2, 3, 1)
    return F.silu(out, inplace=True) if silu else out


def add(x: Tensor, h: Tensor, bias: Tensor | None, num_groups: int) -> tuple[Tensor, None]:
    """Add a map and a bias to x in place; there are no statistics. Args: see `kernels.add`."""
    x += h
    if bias is not None:
        x += bias.to(x.dtype)
    return x, None


def add_padded(x: Tensor, h: Tensor | None, bias: Tensor | None) -> Tensor:
    """Sum, and pad at the bottom and at the right. Args: see `kernels.add_padded`."""
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
    """Return softmax(q kᵀ) v. Args: see `kernels.attend`."""
    q, k, v = (tensor.unsqueeze(1) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)
