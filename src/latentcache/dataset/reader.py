"""Reading a latent dataset back: `open_dataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentcache.dataset.contract import Contract, require_contract
from latentcache.dataset.manifest import Manifest, ManifestName, read_records
from latentcache.dataset.parquet import read_table
from latentcache.dataset.publish import find_manifest
from latentcache.dataset.quantization import to_values
from latentcache.dataset.receipts import DataFile, UnitRecord
from latentcache.dataset.shards import SafetensorsRows, tensor_from_bytes
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError
from latentcache.storage import StorageOptions, Store

# Row groups are at most 32 MiB: a sequential read keeps the one it is in, a random one a few.
_CACHED_ROW_GROUPS = 4
_CACHED_FILES = 16

_READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One sample that became a latent.

    `latent` is [C, H, W] in the stored dtype, unscaled: a diffusion model wants
    `(latent - shift_factor) * scaling_factor`. Stored as int8, it is given as the float32 values
    that the bytes stand for. Sizes and crop offsets are in pixels, the offsets within the resized
    image. (`unit`, `key`) names the row.
    """

    unit: str
    key: str
    latent: torch.Tensor
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int
    columns: dict[str, Any]

    @property
    def caption(self) -> str | None:
        """Give the sample's `txt` field, if it was kept and there was one."""
        return self.columns.get("caption")


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A sample that was left out, where it came from, and why.

    `key` is None where the shard as a whole is meant, such as one that ends early. `stage` and
    `reason` are stable words, `message` is for people. `thumbnail` is a small JPEG of the first few
    samples of a reason in a unit, if they could be decoded.
    """

    unit: str
    source: str
    key: str | None
    stage: str
    reason: str
    message: str
    thumbnail: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Shard:
    """The files that hold the same rows: one Parquet file, or safetensors and its rows."""

    unit: str
    rows: DataFile
    tensors: DataFile | None


class Dataset(Sequence[Row]):
    """A latent dataset as one manifest names it; see `open_dataset`.

    `columns` names the kept columns; a row of a unit that was not rewritten with them yet, as in a
    manifest that is not complete, has None in those that it lacks.

    Rows are in the order of their source shards, within one by bucket. Reading one row reads its
    row group; neighbours are then at hand.
    """

    def __init__(self, store: Store, contract: Contract, manifest: Manifest) -> None:
        self.store = store
        self.url = store.url
        self.contract = contract
        self.manifest = manifest
        self.columns = [column.name for column in manifest.columns]
        units = read_records(store, manifest)
        self.units: Sequence[UnitRecord] = units
        # [S], by shard: its unit's index, and the number of rows up to its end.
        self._unit_of, num_rows = units.shards()
        self._ends = np.cumsum(num_rows)
        self._shard: Callable[[int], _Shard] = lru_cache(_CACHED_FILES)(self._find_shard)
        self._file: Callable[[int], Any] = lru_cache(_CACHED_FILES)(self._open_file)
        self._group: Callable[[int, int], pa.Table] = lru_cache(_CACHED_ROW_GROUPS)(
            self._read_group
        )

    @property
    def stats(self) -> Statistics:
        """Per-channel statistics of the stored latents, unscaled, merged over all units.

        What whitening needs: `(latent - mean) / std` of all rows has mean 0 and deviation 1.
        """
        return self.manifest.statistics

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        shard = self._shard(number)
        offset = position - (int(self._ends[number]) - shard.rows.num_rows)
        return self._row(number, shard, offset)

    def _find_shard(self, number: int) -> _Shard:
        unit = int(self._unit_of[number])
        first = int(np.searchsorted(self._unit_of, unit))
        return list(_pair(self.units[unit]))[number - first]

    def _row(self, number: int, shard: _Shard, offset: int) -> Row:
        file, tensors = self._file(number)
        within = offset
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if within < num_rows:
                break
            within -= num_rows
        with self._reading(shard.rows):
            columns = self._group(number, group).slice(within, 1).to_pylist()[0]
        dtype, shape = columns.pop("latent_dtype"), columns.pop("latent_shape")
        if tensors is None or shard.tensors is None:
            latent = tensor_from_bytes(columns.pop("latent"), dtype, shape)
        else:
            with self._reading(shard.tensors):
                latent = tensors[offset]
        if self.contract.latents.quantization:
            latent = to_values(latent, self.contract.latents)
        fixed = ("key", "original_width", "original_height", "crop_top", "crop_left")
        return Row(
            unit=shard.unit,
            latent=latent,
            **{name: columns.pop(name) for name in fixed},
            columns={name: columns.get(name) for name in self.columns},
        )

    def _open_file(self, number: int) -> tuple[pq.ParquetFile, SafetensorsRows | None]:
        shard = self._shard(number)
        with self._reading(shard.rows):
            file = pq.ParquetFile(self.store.open(shard.rows.path))
            if file.metadata.num_rows != shard.rows.num_rows:
                raise DatasetError(f"{file.metadata.num_rows} rows, not {shard.rows.num_rows}")
        if shard.tensors is None:
            return file, None
        with self._reading(shard.tensors):
            return file, SafetensorsRows(self.store.open(shard.tensors.path))

    @contextmanager
    def _reading(self, file: DataFile) -> Iterator[None]:
        """Name the file in whatever is wrong with it."""
        try:
            with self.store.named(file.path):
                yield
        except (pa.ArrowException, DatasetError) as error:
            url = self.store.url_of(file.path)
            raise DatasetError(f"{url} is damaged: {error}; run `latentcache verify`") from error

    def _read_group(self, number: int, group: int) -> pa.Table:
        file, _ = self._file(number)
        return file.read_row_group(group)

    def rejects(self) -> Iterator[RejectedRow]:
        """Give every sample that was left out."""
        records = (record for record in self.units if record.rejects)
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            # So many at a time: of a million units, few are in memory.
            while some := list(islice(records, _READ_THREADS)):
                for rows in pool.map(self._read_rejects, some):
                    yield from rows

    def _read_rejects(self, record: UnitRecord) -> list[RejectedRow]:
        assert record.rejects
        with self._reading(record.rejects), self.store.open(record.rejects.path) as file:
            table = read_table(file)
        return [
            RejectedRow(unit=record.unit.id, source=record.unit.source, **row)
            for row in table.to_pylist()
        ]


def _pair(record: UnitRecord) -> Iterator[_Shard]:
    tensors = {f.bucket: f for f in record.files if f.path.endswith(".safetensors")}
    for file in record.files:
        if file.path.endswith(".parquet"):
            yield _Shard(record.unit.id, file, tensors.get(file.bucket))


def open_dataset(
    url: str, manifest: ManifestName | None = None, *, storage: StorageOptions | None = None
) -> Dataset:
    """Open a latent dataset.

    Args:
        url: the `output.url` of the run that made it.
        manifest: the number of a manifest, or "published"; None takes the newest complete one.
        storage: how to reach the store.

    Raises:
        DatasetError: there is no dataset, or no such manifest, or no complete one.
        StorageError: the store cannot be reached.
    """
    return Dataset(*open_manifest(url, manifest, storage=storage))


def open_manifest(
    url: str, manifest: ManifestName | None = None, *, storage: StorageOptions | None = None
) -> tuple[Store, Contract, Manifest]:
    """Find a dataset's contract and a manifest of it; see `open_dataset`."""
    store = Store(url, storage or StorageOptions())
    contract = require_contract(store)
    return store, contract, find_manifest(store, manifest)
