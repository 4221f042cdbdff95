"""Compute which rows make up which batch, with arithmetic that is the same on every machine.

An epoch is a list of global batches, each of one bucket. The rows of any batch are a function of
the row counts of the files, the options and the epoch; rank r of W takes the r-th slice. A bucket's
blocks (row groups) are permuted, then rows within windows of `window_rows`. So a batch mixes rows
of hundreds of blocks, while reads stay within one window.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import Any, Literal

import numpy as np

from latentcache.dataset.bucket import Bucket
from latentcache.errors import ConfigError
from latentcache.loader.permutation import Ints, apportion, make_key, permute

Tail = Literal["drop", "pad", "short"]

DEFAULT_WINDOW_ROWS = 262_144

# Buckets and mixed datasets are interleaved with exact shares in sections of about this length.
_SECTION = 4096

# The number of bits of a position in a window, as a fraction of the window.
_POSITION_BITS = 24

# The purposes of keys, so that no two permutations share a key.
_BUCKETS, _MIXING, _BLOCKS, _ROWS = range(4)


@dataclass(frozen=True, slots=True)
class OrderOptions:
    """The options that the order depends on, besides the rows; see `LatentLoader`.

    Raises:
        ConfigError: an option is out of range.
    """

    batch_size: int
    seed: int = 0
    shuffle: bool = True
    window_rows: int = DEFAULT_WINDOW_ROWS
    block_rows: int | None = None
    tail: Tail = "drop"

    def __post_init__(self) -> None:
        for name in ("batch_size", "seed", "window_rows", "block_rows"):
            value = getattr(self, name)
            if value is not None:  # NumPy integers cannot be written as JSON
                object.__setattr__(self, name, int(value))
            if name != "seed" and value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if self.tail not in ("drop", "pad", "short"):
            raise ConfigError(f"tail is {self.tail!r}: it must be 'drop', 'pad' or 'short'")


@dataclass(frozen=True, slots=True)
class Stream:
    """The files that hold one dataset's rows of one bucket.

    By file, int64 [F]: `files`, their numbers, and `num_rows`. `group_rows` is the number of rows
    of a whole row group.
    """

    dataset: int
    bucket: Bucket
    files: Ints
    num_rows: Ints
    group_rows: int


@dataclass(frozen=True, slots=True)
class BatchRows:
    """One rank's slice of a global batch: row `rows[i]` of file `files[i]`.

    `passes[i]` is the number of previous complete passes over that row's dataset. It equals the
    epoch unless datasets are mixed.
    """

    step: int
    bucket: Bucket
    files: Ints
    rows: Ints
    passes: Ints


class Order:
    """The batches of every epoch.

    Args:
        streams: at most one stream for each dataset and bucket.
        options: the options.
        weights: each dataset's share of the rows of an epoch, which has as many rows as all
            datasets together. A single dataset is read once per epoch, whatever its weight. Each of
            several datasets continues in the next epoch where it stopped.

    Raises:
        ConfigError: a weight is not positive, or one of several datasets has no rows.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        options: OrderOptions,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.options = options
        quotas = _row_quotas(streams, weights)
        self._buckets = []
        for bucket in sorted({stream.bucket for stream in streams}):
            mine = [i for i, stream in enumerate(streams) if stream.bucket == bucket and quotas[i]]
            if mine:
                parts = [_Shuffled(streams[i], options) for i in mine]
                self._buckets.append(_BucketOrder(parts, [quotas[i] for i in mine], options))
        self._turns = _Turns([bucket.num_batches for bucket in self._buckets], options.shuffle)

    def __len__(self) -> int:
        """Return the number of steps of an epoch, which is the same on every rank."""
        return self._turns.total

    @property
    def left_out(self) -> dict[Bucket, int]:
        """The number of rows that an epoch leaves out, for each bucket with such rows."""
        return {each.bucket: each.num_left_out for each in self._buckets if each.num_left_out}

    @property
    def buckets(self) -> dict[Bucket, int]:
        """The number of steps of an epoch by bucket."""
        return {bucket.bucket: bucket.num_batches for bucket in self._buckets}

    def batches(
        self, epoch: int, start: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[BatchRows]:
        """Yield a rank's slices of an epoch's batches.

        Args:
            epoch, start: number of the epoch, and the first step.
            rank, world_size: the rank, and the number of ranks.
        """
        key = make_key(self.options.seed, epoch, _BUCKETS)
        # Many batches are computed at a time to share NumPy's cost per call.
        num_steps = max(1, 16_384 // self.options.batch_size)
        for first in range(start, len(self), num_steps):
            turns, numbers = self._turns._take(first, min(first + num_steps, len(self)), key)
            slices: dict[int, Iterator[tuple[Ints, Ints, Ints]]] = {}
            for turn in np.unique(turns).tolist():
                mine = numbers[turns == turn]  # consecutive numbers, in order
                bucket = self._buckets[turn]
                slices[turn] = bucket._slices(epoch, int(mine[0]), len(mine), rank, world_size)
            for step, turn in enumerate(turns.tolist(), start=first):
                yield BatchRows(step, self._buckets[turn].bucket, *next(slices[turn]))


class _BucketOrder:
    """The batches of one bucket: the interleaved rows of its streams, split into batches."""

    def __init__(
        self, parts: Sequence[_Shuffled], quotas: Sequence[int], options: OrderOptions
    ) -> None:
        self.bucket = parts[0].stream.bucket
        self._parts = parts
        self._quotas = quotas
        self._options = options
        self._turns = _Turns(quotas, options.shuffle)
        whole, rest = divmod(self._turns.total, options.batch_size)
        drops = options.tail == "drop"
        self.num_batches = whole if drops or not rest else whole + 1
        self.num_left_out = rest if drops else 0

    def _slices(
        self, epoch: int, first: int, count: int, rank: int, world_size: int
    ) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Yield a rank's slices of `count` batches: files, rows and passes, int64 [b] each."""
        size, total = self._options.batch_size, self._turns.total
        start, stop = first * size, (first + count) * size
        if self._options.tail != "pad":
            stop = min(stop, total)
        pieces: list[tuple[Ints, ...]] = []
        while start < stop:  # once, unless padding continues at the bucket's first row
            low = start % total
            high = min(low + stop - start, total)
            pieces.append(self._find(epoch, low, high))
            start += high - low
        files, rows, passes, positions = (np.concatenate(p) for p in zip(*pieces, strict=True))
        # Sort each batch by position in the window, so that a rank reads only its own part of the
        # blocks, which are in random order. The index makes keys unique, so that any sorting
        # algorithm has the same result.
        index = np.arange(num := len(files))
        keys = (((index // size) << _POSITION_BITS) + positions) * num + index
        by_position = np.sort(keys) % num
        files, rows, passes = files[by_position], rows[by_position], passes[by_position]
        for low in range(0, num, size):
            high = min(low + size, num)
            first, last = (low + part * (high - low) // world_size for part in (rank, rank + 1))
            yield files[first:last], rows[first:last], passes[first:last]

    def _find(self, epoch: int, start: int, stop: int) -> tuple[Ints, ...]:
        """Return files, rows, passes and window positions of rows start to stop of an epoch."""
        key = make_key(self._options.seed, epoch, _MIXING, *self.bucket)
        turns, numbers = self._turns._take(start, stop, key)
        if len(self._parts) == 1:
            return self._parts[0].find(epoch * self._quotas[0] + numbers)
        outputs = tuple(np.empty(len(turns), np.int64) for _ in range(4))
        for turn, (part, quota) in enumerate(zip(self._parts, self._quotas, strict=True)):
            where = turns == turn
            if where.any():
                values = part.find(epoch * quota + numbers[where])
                for output, value in zip(outputs, values, strict=True):
                    output[where] = value
        return outputs


class _Shuffled:
    """The rows of one stream in the order of each pass."""

    def __init__(self, stream: Stream, options: OrderOptions) -> None:
        self.stream = stream
        self._options = options
        self._block_rows = options.block_rows or stream.group_rows
        self._num_rows = int(stream.num_rows.sum())
        ends = np.cumsum(-(-stream.num_rows // self._block_rows))
        self._first_block = np.concatenate([[0], ends])  # of each file
        self._first_row = np.concatenate([[0], np.cumsum(stream.num_rows)])
        self._file_of_block = np.repeat(np.arange(len(ends)), np.diff(self._first_block))
        self._cached: dict[int, tuple[Ints, Ints]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": {}}

    def find(self, numbers: Ints) -> tuple[Ints, ...]:
        """Return files, rows, passes and window positions by ascending row number in all passes."""
        passes, positions = np.divmod(numbers, self._num_rows)
        if not self._options.shuffle:
            files = np.searchsorted(self._first_row, positions, "right") - 1
            rows = positions - self._first_row[files]
            return self.stream.files[files], rows, passes, np.zeros_like(positions)
        files, rows, fractions = (np.empty_like(positions) for _ in range(3))
        window_rows = self._options.window_rows
        windows = passes * (-(-self._num_rows // window_rows)) + positions // window_rows
        for window in range(int(windows[0]), int(windows[-1]) + 1):  # numbers are ascending
            where = windows == window
            one_pass = int(passes[where][0])
            start = int(positions[where][0]) // window_rows * window_rows
            size = min(window_rows, self._num_rows - start)
            key = self._key(one_pass, _ROWS, start)
            within = permute(positions[where] - start, size, key)
            files[where], rows[where] = self._locate(one_pass, start + within)
            fractions[where] = (within / size * 2**_POSITION_BITS).astype(np.int64)
        return self.stream.files[files], rows, passes, fractions

    def _key(self, one_pass: int, *parts: int) -> int:
        stream = self.stream
        return make_key(self._options.seed, one_pass, *parts, stream.dataset, *stream.bucket)

    def _blocks(self, one_pass: int) -> tuple[Ints, Ints]:
        """Return the blocks in the order of a pass, and the number of rows before each."""
        if (cached := self._cached.get(one_pass)) is not None:
            return cached
        count = int(self._first_block[-1])
        blocks = permute(np.arange(count), count, self._key(one_pass, _BLOCKS))
        sizes = np.full(count, self._block_rows)
        sizes[self._first_block[1:] - 1] = (self.stream.num_rows - 1) % self._block_rows + 1
        before = np.cumsum(sizes[blocks])
        before -= sizes[blocks]
        # Keep two passes, because a range of rows may extend from one pass into the next.
        self._cached = {**dict(list(self._cached.items())[-1:]), one_pass: (blocks, before)}
        return blocks, before

    def _locate(self, one_pass: int, positions: Ints) -> tuple[Ints, Ints]:
        """Return the index of the file, and the row in it, of positions in the permuted blocks."""
        blocks, before = self._blocks(one_pass)
        slots = np.searchsorted(before, positions, "right") - 1
        chosen = blocks[slots]
        files = self._file_of_block[chosen]
        within = (chosen - self._first_block[files]) * self._block_rows
        return files, within + positions - before[slots]


class _Turns:
    """The order in which several participants with fixed quotas take turns.

    The turns are split into equal sections, each with its exact share of every quota, and shuffled
    within a section. Without shuffling, the participants follow one after the other.
    """

    def __init__(self, quotas: Sequence[int], shuffle: bool) -> None:
        self.total = sum(quotas)
        self._quotas = quotas
        self._num_sections = max(1, self.total // _SECTION)
        self._shuffle = shuffle and len(quotas) > 1
        self._firsts = np.concatenate([[0], np.cumsum(np.array(quotas, np.int64))])

    def _before(self, section: int) -> list[int]:
        return [quota * section // self._num_sections for quota in self._quotas]

    def _take(self, start: int, stop: int, key: int) -> tuple[Ints, Ints]:
        """Return the participant of each turn, and the index of the turn among its own turns."""
        if not self._shuffle:
            positions = np.arange(start, stop)
            turns = np.searchsorted(self._firsts, positions, "right") - 1
            return turns, positions - self._firsts[turns]
        section = -1 + bisect_right(
            range(self._num_sections), start, key=lambda index: sum(self._before(index))
        )
        first = end = sum(self._before(section))
        sections: list[tuple[Ints, Ints]] = []
        while end < stop:
            sections.append(self._section(section, key))
            end += len(sections[-1][0])
            section += 1
        turns, numbers = (np.concatenate(pieces) for pieces in zip(*sections, strict=True))
        return turns[start - first : stop - first], numbers[start - first : stop - first]

    def _section(self, section: int, key: int) -> tuple[Ints, Ints]:
        before = np.array(self._before(section))
        counts = np.array(self._before(section + 1)) - before
        total = int(counts.sum())
        in_turn = np.repeat(np.arange(len(counts)), counts)
        own = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        # Turns are permuted. In the resulting order, each participant's own numbers ascend.
        images = permute(np.arange(total), total, make_key(key, section))
        positions = np.sort(images + in_turn * total) - in_turn * total
        turns, numbers = np.empty(total, np.int64), np.empty(total, np.int64)
        turns[positions] = in_turn
        numbers[positions] = before[in_turn] + own
        return turns, numbers


def _row_quotas(streams: Sequence[Stream], weights: Sequence[float]) -> list[int]:
    """Return the number of rows of each stream in an epoch."""
    sizes = [int(stream.num_rows.sum()) for stream in streams]
    if len(weights) == 1:
        return sizes
    quotas = [0] * len(streams)
    if not all(0 < weight < inf for weight in weights):
        raise ConfigError(f"weights are {list(weights)}: each must be above 0, and finite")
    shares = apportion(sum(sizes), [Fraction(weight) for weight in weights])
    for dataset, share in enumerate(shares):
        mine = [i for i, stream in enumerate(streams) if stream.dataset == dataset]
        if not sum(sizes[i] for i in mine):
            raise ConfigError(f"mixed dataset {dataset}, counted from 0, has no rows: leave it out")
        parts = apportion(share, [Fraction(sizes[i]) for i in mine])
        for i, part in zip(mine, parts, strict=True):
            quotas[i] = part
    return quotas
