"""The rows of a unit that QA evaluates during a run."""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from latentcache.dataset.shards import BucketWriter, read_latents
from latentcache.image_files import write_png
from latentcache.qa.evaluator import QaEvaluator
from latentcache.qa.qa_files import QaRow

# Rows evaluated in one job. Between two jobs, other work may use the encoder's thread.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """The fraction of all rows to draw, and the seed of the draw."""

    fraction: float
    seed: int


@dataclass(slots=True)
class QaSample:
    """The QA sample of one unit, with its crops as PNG files in `folder`.

    Every row draws a number in [0, 1) from (seed, unit, key). Rows below the fraction are kept. If
    a bucket then has fewer rows than `min_rows`, the rows with the next lowest numbers are kept.
    """

    spec: SampleSpec
    min_rows: Mapping[str, int]  # by bucket
    unit_id: str
    folder: Path
    _num_offered: int = 0
    # By bucket, a heap of (minus the draw, index, key).
    _kept: dict[str, list[tuple[float, int, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def offer(self, bucket: str, key: str, pixels: torch.Tensor) -> None:
        """Draw a number for a row that will be encoded, and keep its crop if the row is kept.

        Args:
            bucket, key: the bucket's name and the row's key.
            pixels: the crop, uint8 [3, H, W].
        """
        index, kept = self._num_offered, self._kept[bucket]
        self._num_offered += 1
        text = f"{self.spec.seed}\0{self.unit_id}\0{key}".encode()
        draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64
        heapq.heappush(kept, (-draw, index, key))
        highest = -kept[0][0]
        if highest >= self.spec.fraction and len(kept) > self.min_rows.get(bucket, 0):
            _, dropped, _ = heapq.heappop(kept)
            if dropped == index:
                return
            self._crop(dropped).unlink()
        self._crop(index).write_bytes(write_png(pixels))

    def _crop(self, index: int) -> Path:
        return self.folder / f"qa-{index}.png"

    def evaluate(
        self,
        writers: Iterable[BucketWriter],
        evaluator: QaEvaluator,
        signal: float,
        submit: Callable[[Callable[[], list[QaRow]]], list[QaRow]],
    ) -> Iterator[QaRow]:
        """Evaluate the kept rows as stored in the closed files, in the order they were offered.

        Args:
            writers: the writer of each bucket.
            evaluator, signal: the evaluator, and its signal; see `QaEvaluator.evaluate`.
            submit: runs a job on the evaluator's thread and returns its result.
        """
        for writer in writers:
            bucket = writer.bucket.name
            crops = {
                key: self._crop(index)
                for _, index, key in sorted(self._kept[bucket], key=lambda row: row[1])
            }
            with ExitStack() as stack:
                files = [stack.enter_context(path.open("rb")) for path in writer.paths]
                stored = read_latents(files, crops)
            keys = [key for key in crops if key in stored]  # the others became rejects
            for first in range(0, len(keys), _ROWS_AT_ONCE):
                some = {key: crops[key].read_bytes() for key in keys[first : first + _ROWS_AT_ONCE]}
                yield from submit(
                    partial(evaluator.evaluate, self.unit_id, bucket, some, stored, signal)
                )
