"""Random permutations of any size that are computed, not stored, and exact shares."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_FEISTEL_ROUNDS = 4  # of two halves each; with three, small sizes are seen not to be uniform


_MASK = 2**64 - 1


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide a number by shares, exactly: by largest remainder (Hamilton's method)."""
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    floors = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (floors[i] - exact[i], i))
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


def make_key(*parts: int) -> int:
    """Hash integers to 64 bits: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permute(index: Ints, size: int, key: int) -> Ints:
    """Permute range(size): give where each index goes, one to one, for a 64-bit key.

    A Feistel network over pairs (left, right) of about √size values each, with addition in place of
    XOR so that any size will do; what lands beyond the size goes round again (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """
    rights = isqrt(max(size, 1) - 1) + 1
    lefts = -(-size // rights)
    left, right = np.divmod(index, rights)
    for number in range(_FEISTEL_ROUNDS):
        left = left + _hash_below(right, lefts, make_key(key, 2 * number))
        left -= lefts * (left >= lefts)
        right = right + _hash_below(left, rights, make_key(key, 2 * number + 1))
        right -= rights * (right >= rights)
    found = left * rights + right
    outside = found >= size
    if outside.any():
        found[outside] = permute(found[outside], size, key)
    return found


def _hash_below(values: Ints, bound: int, key: int) -> Ints:
    """Hash to range(bound), bound below 2³², as `make_key` does."""
    state = values.astype(np.uint64) + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    upper = (state ^ (state >> np.uint64(31))) >> np.uint64(32)
    return ((upper * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)
