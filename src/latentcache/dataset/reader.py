"""Read a latent dataset: `open_dataset`."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract, require_contract
from latentcache.dataset.layout import SafetensorsRows, tensor_from_bytes
from latentcache.dataset.manifest import Manifest, ManifestName, read_records
from latentcache.dataset.parquet import naming_damage, open_parquet
from latentcache.dataset.publish import find_manifest
from latentcache.dataset.quantization import to_values
from latentcache.dataset.receipts import DataFile, UnitRecord
from latentcache.dataset.shards import SIZES, check_schema, read_rejects
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

# Row groups are at most 32 MiB. A sequential read needs one, random reads reuse a few.
_CACHED_ROW_GROUPS = 4
_CACHED_SHARDS = 16

_READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One sample and its latent.

    `latent` is [C, H, W] in the stored dtype, unscaled: a diffusion model expects
    `(latent - shift_factor) * scaling_factor`. A latent stored as int8 is dequantized to float32.
    Sizes and crop offsets are in pixels; the offsets are positions in the resized image. The pair
    (`unit`, `key`) identifies the row.
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
        """The sample's `txt` field; None if it was not kept or the sample has none."""
        return self.columns.get("caption")


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A reject: a sample that has no latent, with its source and the reason.

    `key` is None where the reject stands for the whole shard, such as a truncated one. `stage` and
    `reason` are stable identifiers, `message` is text for users. `thumbnail` is a small JPEG; only
    the first few samples of a unit with the same reason have one, if they could be decoded.
    """

    unit: str
    source: str
    key: str | None
    stage: str
    reason: str
    message: str
    thumbnail: bytes | None = None


class _Shard(NamedTuple):
    """The open files of the same rows: a Parquet file, alone or beside a safetensors file."""

    unit: str
    file: DataFile
    rows: pq.ParquetFile
    tensors_path: str = ""
    tensors: SafetensorsRows | None = None


class Dataset(Sequence[Row]):
    """The rows of a latent dataset that count in one manifest; see `open_dataset`.

    `columns` lists the names of the kept columns. If the manifest is not complete, units may not
    be rewritten with these columns yet. Their rows have None in the columns that they lack.

    Rows are sorted by source shard, then by bucket. Reading one row reads and caches its row group,
    so that reading its neighbours is fast.
    """

    def __init__(self, store: Store, contract: Contract, manifest: Manifest) -> None:
        self.store = store
        self.url = store.url
        self.contract = contract
        self.manifest = manifest
        self.columns = [column.name for column in manifest.columns]
        self.units: Sequence[UnitRecord] = (units := read_records(store, manifest))
        # By shard, int64 [num_shards]: the index of its unit, and the number of rows up to its end.
        self._unit_of, num_rows = units.shards()
        self._ends = np.cumsum(num_rows)
        self._caches: _Caches | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be pickled: a spawned process opens them itself.
        return {**self.__dict__, "_caches": None}

    @property
    def _cached(self) -> _Caches:
        """The caches of this process: a forked process shares no open file with its parent."""
        if self._caches is None or self._caches.pid != os.getpid():
            shard = lru_cache(_CACHED_SHARDS)(self._open_shard)
            self._caches = _Caches(os.getpid(), shard, lru_cache(_CACHED_ROW_GROUPS)(_read_group))
        return self._caches

    @property
    def stats(self) -> Statistics:
        """The per-channel statistics of the stored latents, unscaled, over all units.

        Use them for whitening: over all rows, `(latent - mean) / std` has mean 0 and deviation 1.
        """
        return self.manifest.statistics

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Row | list[Row]:
        """Return one row, or the rows of a slice as a list, which holds all of them in memory."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = row_position(index, len(self))
        number = int(np.searchsorted(self._ends, position, side="right"))
        shard = self._cached.shard(number)
        return self._row(shard, position - (int(self._ends[number]) - shard.file.num_rows))

    def _row(self, shard: _Shard, offset: int) -> Row:
        group, within = 0, offset
        while within >= (num_rows := shard.rows.metadata.row_group(group).num_rows):
            group, within = group + 1, within - num_rows
        with naming_damage(self.store, shard.file.path):
            columns = self._cached.group(shard.rows, group).slice(within, 1).to_pylist()[0]
            dtype, shape = columns.pop("latent_dtype"), columns.pop("latent_shape")
            if (dtype, shape) != self._latent_kind(shard.file):
                raise DatasetError(f"row {columns['key']!r} has a latent of another dtype or shape")
            if shard.tensors is None:
                latent = tensor_from_bytes(columns.pop("latent"), dtype, shape)
        if shard.tensors is not None:
            with naming_damage(self.store, shard.tensors_path):
                latent = shard.tensors[offset]
        return Row(
            unit=shard.unit,
            latent=to_values(latent, self.contract.latents) if dtype == "int8" else latent,
            **{name: columns.pop(name) for name in ("key", *SIZES)},
            columns={name: columns.get(name) for name in self.columns},
        )

    def _latent_kind(self, file: DataFile) -> tuple[str, list[int]]:
        shape = self.contract.latent_shape(Bucket.parse(file.bucket))
        return self.contract.latents.dtype, list(shape)

    def _open_shard(self, number: int) -> _Shard:
        index = int(self._unit_of[number])
        record = self.units[index]
        files = [file for file in record.files if file.path.endswith(".parquet")]
        file = files[number - int(np.searchsorted(self._unit_of, index))]
        with naming_damage(self.store, file.path):
            rows = open_parquet(self.store.open(file.path))
            if rows.metadata.num_rows != file.num_rows:
                raise DatasetError(f"{rows.metadata.num_rows} rows, not {file.num_rows}")
            check_schema(rows.schema_arrow, self.contract)
            others = [f for f in record.files if f.bucket == file.bucket and f not in files]
            if (self.contract.latents.format == "safetensors") != bool(others):
                raise DatasetError("its latents are not where the contract says")
        if not others:
            return _Shard(record.unit.id, file, rows)
        path = others[-1].path
        with naming_damage(self.store, path):
            tensors = SafetensorsRows(self.store.open(path))
            if (tensors.dtype, tensors.shape) != self._latent_kind(file):
                raise DatasetError(f"its latents are {tensors.dtype} {tensors.shape}")
            if tensors.num_rows != file.num_rows:
                raise DatasetError(f"{tensors.num_rows} latents, not {file.num_rows}")
        return _Shard(record.unit.id, file, rows, path, tensors)

    def rejects(self) -> Iterator[RejectedRow]:
        """Yield every reject."""
        records = (record for record in self.units if record.rejects)
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            # Batches bound the memory: there may be a million units.
            while some := list(islice(records, _READ_THREADS)):
                for rows in pool.map(self._read_rejects, some):
                    yield from rows

    def _read_rejects(self, record: UnitRecord) -> list[RejectedRow]:
        assert record.rejects
        path, unit = record.rejects.path, record.unit
        with naming_damage(self.store, path), self.store.open(path) as file:
            rows = read_rejects(file).to_pylist()
        return [RejectedRow(unit=unit.id, source=unit.source, **row) for row in rows]


class _Caches(NamedTuple):
    pid: int
    shard: Callable[[int], _Shard]
    group: Callable[[pq.ParquetFile, int], pa.Table]


def _read_group(file: pq.ParquetFile, group: int) -> pa.Table:
    table = file.read_row_group(group, use_threads=False)
    table.validate(full=True)
    if len(table) != file.metadata.row_group(group).num_rows:
        raise DatasetError(f"row group {group} has {len(table)} rows")
    return table


def row_position(index: SupportsIndex, num_rows: int) -> int:
    """Return the position of a row, from 0; raise `IndexError` or `TypeError` if there is none.

    Args:
        index, num_rows: index of the row, negative to count from the end, and the number of rows.
    """
    try:
        number = operator.index(index)
    except TypeError:
        message = f"rows are numbered from 0: give an integer or a slice, not {index!r:.60}"
        raise TypeError(message) from None
    if not -num_rows <= number < num_rows:
        raise IndexError(f"row {number} of {num_rows}")
    return number % num_rows


def open_dataset(
    url: str | os.PathLike[str],
    manifest: ManifestName | None = None,
    *,
    storage: StorageOptions | None = None,
) -> Dataset:
    """Open a latent dataset.

    Args:
        url: the `output.url` of the run that made the dataset.
        manifest: number of a manifest, or "published"; None takes the newest complete one.
        storage: options of the store.

    Raises:
        DatasetError: there is no dataset, no such manifest, or no complete manifest.
    """
    return Dataset(*open_manifest(url, manifest, storage=storage))


def open_manifest(
    url: str | os.PathLike[str],
    manifest: ManifestName | None = None,
    *,
    storage: StorageOptions | None = None,
) -> tuple[Store, Contract, Manifest]:
    """Return a dataset's store, its contract and a manifest that matches it.

    Args:
        url, manifest, storage: see `open_dataset`.
    """
    store = Store(url, storage or StorageOptions())
    contract = require_contract(store)
    opened = find_manifest(store, manifest)
    file, num_channels = store.url_of(opened.path), len(opened.statistics.mean)
    if opened.contract != contract.fingerprint:
        raise DatasetError(f"{file} belongs to another contract.json")
    if num_channels != contract.stored_channels:
        raise DatasetError(
            f"{file} describes {num_channels}, not {contract.stored_channels} channels"
        )
    return store, contract, opened
