"""Which rows of a unit QA looks at, and what it sees."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from latentcache.dataset.shards import BucketWriter, read_latents
from latentcache.image_files import write_png
from latentcache.qa.evaluator import QaEvaluator
from latentcache.qa.qa_files import QaRow

Submit = Callable[[Callable[[], list[QaRow]]], list[QaRow]]

# Rows examined between two looks at what else waits for the encoder.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """A share of all rows, drawn by a seed."""

    fraction: float
    seed: int


@dataclass(frozen=True, slots=True, order=True)
class _Chosen:
    """A row that is kept; the highest draw comes first in a heap."""

    minus_draw: float
    index: int
    key: str
    crop: Path


class QaSample:
    """Chooses rows of one unit, and keeps their crops as PNG files until the unit is written.

    Every row draws a number in [0, 1) from (seed, unit, key). Those below the fraction are chosen;
    where that gives a bucket fewer rows than wanted, its next lowest make up the number.

    Args:
        spec: the share and the seed.
        wanted: rows wanted at least, by bucket.
        unit_id: of the unit.
        folder: where crops are kept; it exists.
    """

    def __init__(
        self, spec: SampleSpec, wanted: Mapping[str, int], unit_id: str, folder: Path
    ) -> None:
        self._spec = spec
        self._wanted = wanted
        self._unit_id = unit_id
        self._folder = folder
        self._indices = itertools.count()
        self._chosen: defaultdict[str, list[_Chosen]] = defaultdict(list)
        self._spare: defaultdict[str, list[_Chosen]] = defaultdict(list)

    def offer(self, bucket: str, key: str, pixels: torch.Tensor) -> None:
        """Show a row that is about to be encoded: uint8 [3, H, W]."""
        chosen, spare = self._chosen[bucket], self._spare[bucket]
        index = next(self._indices)
        text = f"{self._spec.seed}\0{self._unit_id}\0{key}".encode()
        draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64
        row = _Chosen(-draw, index, key, self._folder / f"qa-{index}.png")
        if draw < self._spec.fraction:
            chosen.append(row)
        else:
            heapq.heappush(spare, row)
        if len(spare) > max(0, self._wanted.get(bucket, 0) - len(chosen)):
            dropped = heapq.heappop(spare)
            if dropped is row:
                return
            dropped.crop.unlink()
        row.crop.write_bytes(write_png(pixels))

    def evaluate(
        self, writers: Iterable[BucketWriter], evaluator: QaEvaluator, signal: float, submit: Submit
    ) -> Iterator[QaRow]:
        """Look at the rows that were kept, as they lie in the closed files, in their order.

        Args:
            writers: one for each bucket.
            evaluator: measures them.
            signal: see `QaEvaluator.evaluate`.
            submit: runs a job on the thread that the evaluator belongs to.
        """
        for writer in writers:
            bucket = writer.bucket.name
            rows = [*self._chosen[bucket], *self._spare[bucket]]
            crops = {row.key: row.crop for row in sorted(rows, key=lambda row: row.index)}
            with ExitStack() as stack:
                files = [stack.enter_context(path.open("rb")) for path in writer.paths]
                stored = read_latents(files, crops)
            keys = [key for key in crops if key in stored]  # the others became rejects
            for first in range(0, len(keys), _ROWS_AT_ONCE):
                some = {key: crops[key].read_bytes() for key in keys[first : first + _ROWS_AT_ONCE]}
                job = partial(evaluator.evaluate, self._unit_id, bucket, some, stored, signal)
                yield from submit(job)
