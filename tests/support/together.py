"""All ranks of a training job in one process, step by step: the global batches that they make."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentcache import Batch, LatentLoader

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12)

Identity = tuple[str, str]  # (unit, key)


@dataclass(frozen=True)
class Step:
    """A global batch: the slices of all ranks, one after the other; latents are their bits."""

    epoch: int
    step: int
    bucket: tuple[int, int]
    rows: list[Identity]
    latents: list[bytes]


def open_ranks(url: Any, world_size: int = 1, **options: Any) -> list[LatentLoader]:
    options = {"columns": ["unit", "key"], **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "these buckets have fewer rows")
        return [
            LatentLoader(url, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]


def steps_of(ranks: Sequence[LatentLoader]) -> Iterator[Step]:
    """Go through an epoch, or what is left of it; ranks that end at different steps are an error.

    Leaving it early leaves all ranks after the same step.
    """
    for slices in zip(*ranks, strict=True):
        yield _join(slices)


def _join(slices: Sequence[Batch]) -> Step:
    ((epoch, step, bucket),) = {(batch.epoch, batch.step, batch.bucket) for batch in slices}
    num_rows = [len(batch) for batch in slices]
    assert max(num_rows) - min(num_rows) <= 1
    rows = [
        identity
        for batch in slices
        for identity in zip(batch.columns["unit"], batch.columns["key"], strict=True)
    ]
    latents = [
        latent.contiguous().view(torch.uint8).numpy().tobytes()
        for batch in slices
        for latent in batch.latents
    ]
    return Step(epoch, step, bucket, rows, latents)
