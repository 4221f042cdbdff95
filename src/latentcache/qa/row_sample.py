"""The rows of a unit that QA evaluates during a run."""

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

# Rows evaluated in one job. Between two jobs, other work may use the encoder's thread.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """The fraction of all rows to draw, and the seed of the draw."""

    fraction: float
    seed: int


@dataclass(frozen=True, slots=True, order=True)
class _Chosen:
    """A kept row. In a heap, the row with the highest draw comes first."""

    minus_draw: float
    index: int
    key: str
    crop: Path


class QaSample:
    """The QA sample of one unit, with its crops as PNG files until the unit is written.

    Every row draws a number in [0, 1) from (seed, unit, key). Rows below the fraction are chosen.
    If a bucket then has fewer rows than its minimum, the rows with the next lowest numbers are
    added.

    Args:
        spec: the fraction and the seed.
        wanted: the minimum number of rows, by bucket.
        unit_id: the unit's id.
        folder: an existing folder for the crops.
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
        """Draw a number for a row that will be encoded, and keep its crop if the row is chosen.

        Args:
            bucket: the bucket's name.
            key: the row's key.
            pixels: the crop, uint8 [3, H, W].
        """
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
        """Evaluate the kept rows as stored in the closed files, in the order they were offered.

        Args:
            writers: the writer of each bucket.
            evaluator: the evaluator.
            signal: see `QaEvaluator.evaluate`.
            submit: runs a job on the evaluator's thread and returns its result.
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
