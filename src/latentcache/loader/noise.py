"""Standard normal numbers that depend on a row and an epoch, not on who draws them."""

from __future__ import annotations

import math

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Draw `count` standard normal numbers for each key, on the keys' device.

    A counter is hashed by splitmix64 (Steele, Lea and Flood, 2014); each hash gives two numbers by
    Box and Muller's method. Only integer arithmetic decides them, but for the last bits of
    logarithm, root and sine, which devices round differently.

    Args:
        keys: [b] int64.
        count: numbers for each.

    Returns:
        [b, count] float32.
    """
    counters = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * _GOLDEN
    bits = mix(keys[:, None] + counters)
    # The half keeps the logarithm finite.
    first = (((bits >> 32) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    second = (bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    radius = first.log_().mul_(-2.0).sqrt_()
    return torch.cat([radius * second.cos(), radius * second.sin()], dim=1)[:, :count]


def mix(state: torch.Tensor) -> torch.Tensor:
    """Hash int64 one to one: the finaliser of splitmix64; torch's right shift keeps the sign."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return state ^ ((state >> 31) & (2**33 - 1))
