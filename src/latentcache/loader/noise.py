"""Standard normal numbers that depend only on a row and an epoch, not on the rank or device."""

from __future__ import annotations

import math

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Draw standard normal numbers for each key, on the keys' device.

    Splitmix64 (Steele, Lea and Flood, 2014) hashes a counter, and the method of Box and Muller
    turns each hash into two numbers. The hashes are exact integers. Only the last bits of
    logarithm, square root, sine and cosine differ between devices.

    Args:
        keys: int64 [b].
        count: how many numbers to draw for each key.

    Returns:
        float32 [b, count].
    """
    counters = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * _GOLDEN
    bits = mix(keys[:, None] + counters)
    # Adding 0.5 keeps the logarithm finite.
    first = (((bits >> 32) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    second = (bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    radius = first.log_().mul_(-2.0).sqrt_()
    return torch.cat([radius * second.cos(), radius * second.sin()], dim=1)[:, :count]


def mix(state: torch.Tensor) -> torch.Tensor:
    """Return a one-to-one hash of int64 numbers of any shape: the finalizer of splitmix64.

    The masks are needed because torch's right shift extends the sign.
    """
    state = (state ^ ((state >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return state ^ ((state >> 31) & (2**33 - 1))
