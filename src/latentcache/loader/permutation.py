"""Random permutations of any size that are computed instead of stored, and exact shares."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_FEISTEL_ROUNDS = 4  # of two halves each; with three, small sizes are measurably not uniform
_MASK = 2**64 - 1


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide a number by shares with Hamilton's largest remainder method.

    Args:
        total, shares: the number, and the relative shares; the result's sum is exactly `total`.
    """
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    floors = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (floors[i] - exact[i], i))
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


def make_key(*parts: int) -> int:
    """Hash integers to 64 bits with the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permute(index: Ints, size: int, key: int) -> Ints:
    """Return the images of indices, int64 [n], under a random permutation of range(size).

    The permutation is a Feistel network over pairs (left, right) of about √size values each.
    Addition instead of XOR makes it work for any size. Values beyond the size are permuted again
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        index, size, key: int64 [n], the size of the range, and 64 bits that select the permutation.
    """
    rights = isqrt(max(size, 1) - 1) + 1
    lefts = -(-size // rights)
    left, right = np.divmod(index, rights)
    for number in range(_FEISTEL_ROUNDS):
        left = left + _hash_below(right, lefts, make_key(key, 2 * number))
        left -= lefts * (left >= lefts)
        right = right + _hash_below(left, rights, make_key(key, 2 * number + 1))
        right -= rights * (right >= rights)
    images = left * rights + right
    outside = images >= size
    if outside.any():
        images[outside] = permute(images[outside], size, key)
    return images


def _hash_below(values: Ints, bound: int, key: int) -> Ints:
    """Hash values to range(bound) as `make_key` does; `bound` is below 2³²."""
    state = values.astype(np.uint64) + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    upper = (state ^ (state >> np.uint64(31))) >> np.uint64(32)
    return ((upper * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)
