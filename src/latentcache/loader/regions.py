"""Copy rows from many regions of memory, such as mapped files, with one call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from latentcache.errors import DatasetError
from latentcache.loader.permutation import Ints

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows to copy; it keeps their regions alive."""

    span: torch.Tensor
    index: torch.Tensor
    regions: tuple[torch.Tensor, ...]

    def gather(self, out: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Copy the bytes of rows, and return them.

        Args:
            out, rows: uint8 [m, row bytes], and which rows to copy to it.
        """
        return torch.index_select(self.span, 0, self.index[rows], out=out)


class Regions(Generic[V]):
    """Numbered regions, each with a value; the least recently used ones are dropped.

    `torch.index_select` copies slices of a tensor. Here the tensor spans the addresses of all
    regions at a stride of one byte, so that the index of a row is its address. As any memory could
    be read through it, `select` checks every row against the bounds of the row's region.

    Args:
        count: regions are numbered from 0 to below this.
        max_bytes, max_regions: limits, which the regions in use may exceed.
    """

    def __init__(self, count: int, max_bytes: int, max_regions: int) -> None:
        self._entries: dict[int, tuple[torch.Tensor, V, int]] = {}
        self._num_bytes, self._max_bytes, self._max_regions = 0, max_bytes, max_regions
        # By number: the address, 0 if the region is missing; its length; and when it was last used.
        self._starts, self._lengths, self._used = np.zeros((3, count), np.int64)
        self._clock = 0
        self._low, self._high = 2**63, 0
        self._spans: dict[int, torch.Tensor] = {}
        # All present regions; None after a change. To hold only those of the rows would cost more.
        self._held: tuple[torch.Tensor, ...] | None = None

    def __getitem__(self, number: int) -> V:
        return self._entries[number][1]

    def use(self, numbers: Ints) -> list[int]:
        """Mark regions as used most recently; return the numbers of those that are missing."""
        self._clock += 1
        self._used[numbers] = self._clock
        is_missing = self._starts[numbers] == 0
        return np.unique(numbers[is_missing]).tolist() if is_missing.any() else []

    def add(self, number: int, region: torch.Tensor, value: V, num_bytes: int) -> None:
        """Add a region.

        Args:
            number, region, value, num_bytes: its memory and value, and the size that counts.
        """
        start = region.data_ptr()
        self._entries[number] = region, value, num_bytes
        self._num_bytes += num_bytes
        self._held = None
        self._starts[number], self._lengths[number] = start, region.nbytes
        low, high = min(self._low, start), max(self._high, start + region.nbytes)
        if (low, high) != (self._low, self._high):
            self._low, self._high = low, high
            self._spans.clear()

    def drop(self, num_in_use: int) -> list[int]:
        """Drop regions beyond the limits, but not the last used; return their numbers."""
        dropped: list[int] = []
        if not self._exceeds_limits():
            return dropped
        numbers = np.fromiter(self._entries, np.int64)
        by_age = numbers[np.argsort(self._used[numbers], kind="stable")]
        for number in by_age[: max(0, len(numbers) - num_in_use)].tolist():
            if not self._exceeds_limits():
                break
            self._num_bytes -= self._entries.pop(number)[2]
            self._held = None
            self._starts[number] = self._lengths[number] = 0
            dropped.append(number)
        return dropped

    def _exceeds_limits(self) -> bool:
        return len(self._entries) > self._max_regions or self._num_bytes > self._max_bytes

    def select(self, numbers: Ints, offsets: Ints, size: int) -> Selection:
        """Select `size` bytes at offset `offsets[i]` of region `numbers[i]`, for all i.

        Args:
            numbers, offsets, size: int64 [m] each, and the number of bytes of a row.

        Raises:
            DatasetError: a region is not present, or a row does not lie within its region.
        """
        is_inside = (offsets >= 0) & (offsets <= self._lengths[numbers] - size)
        if not is_inside.all():
            row = int(np.argmin(is_inside))
            raise DatasetError(
                f"{size} bytes at offset {offsets[row]} are outside of mapped file {numbers[row]}: "
                "run `latentcache verify`"
            )
        if size not in self._spans:
            self._spans[size] = self._make_span(size)
        # Without rows, the lowest address may be too large for int64.
        low = self._low if len(numbers) else 0
        index = torch.from_numpy(self._starts[numbers] + offsets - low)
        if self._held is None:
            self._held = tuple(region for region, _, _ in self._entries.values())
        return Selection(self._spans[size], index, self._held)

    def _make_span(self, size: int) -> torch.Tensor:
        if self._high - self._low < size:  # so that no row was selected
            return torch.empty((0, size), dtype=torch.uint8)
        origin = np.ctypeslib.as_array((ctypes.c_uint8 * 1).from_address(self._low))
        shape = (self._high - self._low - size + 1, size)
        return torch.from_numpy(np.lib.stride_tricks.as_strided(origin, shape, (1, 1)))
