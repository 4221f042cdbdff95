"""`LatentDataset`: rows by index, for a custom sampler and PyTorch's `DataLoader`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.manifest import ManifestName
from latentcache.dataset.reader import row_position
from latentcache.loader.files import Files, open_sources
from latentcache.loader.join import Join, Joined
from latentcache.loader.latents import LatentFinish
from latentcache.loader.permutation import Ints
from latentcache.loader.rows import RowReader, open_cache
from latentcache.storage_options import StorageOptions


class LatentDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of a latent dataset by index, in the order of `open_dataset`.

    A row is a dict with `latents` [C, h, w], with `original_size`, `crop_top_left` and
    `target_size` (int64 [2] in pixels, height or top first), and with the columns. Missing text is
    "" and a missing class index is -1, because PyTorch's default collate function rejects None.
    PyTorch's `DataLoader` fetches whole batches, and may fork or spawn workers. To stack latents, a
    batch must have one bucket: a sampler groups rows by `bucket_of`. Draws from stored moments use
    torch's global generator, which a `DataLoader` seeds in each worker.

    Args:
        url, manifest, dtype, normalize, columns, join, cache_dir, cache_bytes, storage: as for
            `LatentLoader`, for one dataset.

    Raises:
        ConfigError: an argument is wrong.
        DatasetError: there is no such dataset or manifest, or a file is damaged; also on reading.
        StorageError: a store cannot be reached, after retries; also on reading.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        manifest: ManifestName | None = None,
        dtype: torch.dtype = torch.float32,
        normalize: bool = True,
        columns: Sequence[str] | None = None,
        join: Join | str | Path | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int | str = "100gb",
        storage: StorageOptions | None = None,
    ) -> None:
        self._files = Files(open_sources([os.fspath(url)], manifest, storage))
        self.contract = self._files.contract
        self._joined = Joined(self._files, join, columns)
        self._finish = LatentFinish(self._files.contracts, dtype, normalize)
        self._cache = open_cache(self._files, cache_dir, cache_bytes)
        self._ends: Ints = np.cumsum(self._joined.num_rows)
        self._rows: tuple[int, RowReader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker maps files itself.
        return {**self.__dict__, "_rows": None}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets, (width, height) in pixels, to which `bucket_of` refers."""
        return self._files.buckets

    @property
    def bucket_of(self) -> torch.Tensor:
        """The index of each row's bucket in `buckets`, int64 [num_rows], for samplers."""
        return torch.from_numpy(np.repeat(self._files.bucket_of, self._joined.num_rows))

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return one row, or the rows of a slice as a list."""
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[dict[str, Any]]:
        """Return many rows, read at once; PyTorch's `DataLoader` calls this."""
        num_rows = len(self)
        positions = np.array([row_position(index, num_rows) for index in indices], np.int64)
        files = np.searchsorted(self._ends, positions, "right")
        rows, partners = self._joined.find(
            files, positions - (self._ends - self._joined.num_rows)[files]
        )
        joined = self._joined.read(partners)
        result: list[dict[str, Any]] = [{}] * len(indices)
        for bucket in np.unique(self._files.bucket_of[files]).tolist():
            chosen = np.flatnonzero(self._files.bucket_of[files] == bucket)
            read = self._read(self._files.buckets[bucket], files[chosen], rows[chosen])
            for number, index in enumerate(chosen.tolist()):
                row = {name: values[number] for name, values in read.items()}
                row |= {name: values[index] for name, values in joined.items()}
                result[index] = {n: "" if value is None else value for n, value in row.items()}
        return result

    def _read(self, bucket: Bucket, files: Ints, rows: Ints) -> dict[str, Any]:
        """Return the fields of rows of one bucket, as tensors and lists of one value per row."""
        # A forked process needs its own reader, as threads do not survive a fork.
        if self._rows is None or self._rows[0] != os.getpid():
            self._rows = os.getpid(), RowReader(self._files, self._joined.columns, self._cache)
        reader = self._rows[1]
        try:
            latents, sizes, columns = reader.select(bucket, files, rows)
        finally:
            reader.clear()
        shape = (len(rows), *self.contract.latent_shape(bucket))
        stored = torch.empty(shape, dtype=self._finish.stored)
        latents.gather(stored.view(torch.uint8).flatten(1))
        finished = self._finish(
            stored,
            self._files.source_of[files],
            lambda count: torch.randn(len(rows), count),
            lambda shape, dtype: torch.empty(shape, dtype=dtype),
        )
        return {
            "latents": finished,
            "original_size": sizes[:, :2],
            "crop_top_left": sizes[:, 2:],
            "target_size": torch.tensor([[bucket[1], bucket[0]]]).expand(len(rows), 2),
            **columns,
        }
