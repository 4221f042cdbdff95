"""Batches: the rows of one step, read and prepared for the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.shards import column_type
from latentcache.loader.files import Files
from latentcache.loader.join import Joined
from latentcache.loader.latents import LatentFinish, mix, normal
from latentcache.loader.order import BatchRows
from latentcache.loader.permutation import Ints, make_key
from latentcache.loader.prefetch import Memory
from latentcache.loader.regions import Selection
from latentcache.loader.rows import RowReader

_NOISE = 4  # the purpose of a key; order.py has the other ones


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's slice of a global batch: b rows, all of one bucket.

    `latents` is [b, C, h, w]. `original_size`, `crop_top_left` and `target_size` are [b, 2] int64
    in pixels, height or top first, as in SDXL's micro-conditioning: the size of the image, the
    offset of the crop in the resized image, and the size of the crop, which is the bucket's.
    `columns` holds the requested columns. A column is a list of b values, with None for a missing
    value; class indices are [b] int64, with -1 for a missing value; numbers and vectors of a join
    are tensors. `bucket` is (width, height) in pixels.

    The memory of a batch is reused only after all of its tensors are freed.
    """

    epoch: int
    step: int
    bucket: Bucket
    latents: torch.Tensor
    original_size: torch.Tensor
    crop_top_left: torch.Tensor
    target_size: torch.Tensor
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def time_ids(self) -> torch.Tensor:
        """The `add_time_ids` of SDXL, [b, 6] int64: original size, crop top left, target size."""
        return torch.cat([self.original_size, self.crop_top_left, self.target_size], dim=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch of which everything but the latents has been read; they are `part` of `latents`.

    By row, int64: `sizes` [b, 6] as in `Batch.time_ids`, the index `sources` [b] of the dataset,
    and the index `numbers` [b] among the rows of all files.
    """

    epoch: int
    chosen: BatchRows
    latents: Selection
    part: slice
    sizes: torch.Tensor
    sources: Ints
    numbers: Ints
    columns: dict[str, Any]


class BatchReader:
    """A reader that plans batches, and reads them to a device; `seed` is for posterior draws."""

    def __init__(
        self,
        files: Files,
        joined: Joined,
        rows: RowReader,
        finish: LatentFinish,
        device: torch.device,
        seed: int,
    ) -> None:
        self._files = files
        self._joined = joined
        self.rows = rows
        self._finish = finish
        self._device = device
        self._noise_key = make_key(seed, _NOISE) - 2**63  # torch lacks unsigned arithmetic
        self._memory = Memory()
        # On a GPU, copies and arithmetic run on a separate stream, so that they overlap training.
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def plan(self, epoch: int, group: Sequence[BatchRows]) -> list[Plan]:
        """Find the rows of batches of one bucket, and read everything but the latents.

        Planning several costs hardly more than one. One thread at a time may call this.

        Args:
            epoch, group: number of the epoch, and the rows of each batch.
        """
        files = np.concatenate([chosen.files for chosen in group])
        rows, partners = self._joined.find(files, np.concatenate([chosen.rows for chosen in group]))
        sources, numbers = self._files.source_of[files], self._files.first_row[files] + rows
        bucket = group[0].bucket
        latents, stored_sizes, stored = self.rows.select(bucket, files, rows)
        target_size = torch.tensor([[bucket.height_px, bucket.width_px]]).expand(len(files), 2)
        sizes = torch.cat([stored_sizes, target_size], dim=1)
        plans, end = [], 0
        for chosen in group:
            part = slice(end, end := end + len(chosen.files))
            columns: dict[str, Any] = {name: values[part] for name, values in stored.items()}
            for name in columns:
                if column_type(name) == pa.int64():
                    columns[name] = torch.tensor(columns[name], dtype=torch.int64)
            columns |= self._joined.read(partners[part])
            of_rows = (sizes[part], sources[part], numbers[part])
            plans.append(Plan(epoch, chosen, latents, part, *of_rows, columns))
        return plans

    def read(self, plan: Plan) -> tuple[Batch, torch.cuda.Event | None]:
        """Read a planned batch; on a GPU, return an event that is recorded once it is complete."""
        bucket = plan.chosen.bucket
        shape = (len(plan.sizes), *self._files.contract.latent_shape(bucket))
        stored = self._memory.take(shape, self._finish.stored)
        plan.latents.gather(stored.view(torch.uint8).flatten(1), plan.part)

        def noise(count: int) -> torch.Tensor:
            passes = mix(torch.from_numpy(plan.chosen.passes) + self._noise_key)
            keys = mix(passes + torch.from_numpy(plan.numbers))
            return normal(keys.to(self._device), count)

        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._stream:
                stored = stored.to(self._device, non_blocking=True)
            sizes = self._moved(plan.sizes)
            batch = Batch(
                epoch=plan.epoch,
                step=plan.chosen.step,
                bucket=bucket,
                latents=self._finish(stored, plan.sources, noise, self._empty),
                original_size=sizes[:, :2],
                crop_top_left=sizes[:, 2:4],
                target_size=sizes[:, 4:],
                columns={name: self._moved(values) for name, values in plan.columns.items()},
            )
            return batch, self._stream.record_event() if self._stream else None

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._stream:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return self._memory.take(shape, dtype)

    def _moved(self, values: Any) -> Any:
        return values.to(self._device) if isinstance(values, torch.Tensor) else values


def hand_over(batch: Batch, event: torch.cuda.Event) -> None:
    """Make a batch that another CUDA stream computed safe to use on the current stream.

    Args:
        batch, event: from `BatchReader.read`.
    """
    stream = torch.cuda.current_stream(batch.latents.device)
    stream.wait_event(event)
    # torch must not reuse this memory on the other stream before the current stream is done.
    sizes = (batch.original_size, batch.crop_top_left, batch.target_size)
    for tensor in (batch.latents, *sizes, *batch.columns.values()):
        if isinstance(tensor, torch.Tensor):
            tensor.record_stream(stream)
