"""Read rows in random order: latents from memory maps, columns by row group.

Files are mapped, not read. So a row's latent has an address, which is computed from the file's, and
one call gathers a whole batch from any number of files. This works for Parquet, too, because its
latents are stored plain and at a constant stride (docs/format.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.layout import latent_offsets, row_bytes, row_group_rows
from latentcache.dataset.parquet import checked_footer, naming_damage
from latentcache.dataset.receipts import DataFile
from latentcache.dataset.shards import check_schema, column_type
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.loader.cache import FileCache, default_cache_dir, parse_bytes
from latentcache.loader.files import Files
from latentcache.loader.permutation import Ints
from latentcache.loader.ranks import num_ranks_here
from latentcache.storage import Store

SIZES = ("original_height", "original_width", "crop_top", "crop_left")

MAX_AHEAD = 64
"""How many batches may be found but not gathered yet."""

# Maps cost only address space, but Linux limits a process to about 65,000.
_MAX_OPEN_FILES = 8192
_MAX_COLUMNS_BYTES = 512 * 2**20
_OPENING_THREADS = 8


@dataclass(frozen=True, slots=True)
class FoundRows:
    """The addresses of latents and other fields of m rows; `sizes` is int64 [m, 4] of `SIZES`."""

    span: torch.Tensor
    index: torch.Tensor
    sizes: torch.Tensor
    columns: dict[str, list[Any]]

    def part(self, rows: slice) -> FoundRows:
        """Return a slice of the rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return FoundRows(self.span, self.index[rows], self.sizes[rows], columns)

    def gather(self, out: torch.Tensor) -> None:
        """Copy the stored bytes of the latents into `out`, uint8 [m, row bytes]."""
        torch.index_select(self.span, 0, self.index, out=out)


@dataclass(frozen=True, slots=True)
class _Open:
    """A mapped file: its bytes, its Parquet file's bytes, and the offset of each row group."""

    latents: torch.Tensor
    rows: torch.Tensor
    metadata: pq.FileMetaData
    offsets: list[int]


@dataclass(frozen=True, slots=True)
class _Group:
    """The columns of a row group; `sizes` is int64 [n, 4], as in `SIZES`."""

    sizes: torch.Tensor
    columns: dict[str, list[Any]]
    num_bytes: int


class _Gather:
    """A way to copy rows from any regions of this process's memory in one call.

    `torch.index_select` copies slices of a tensor. Here the tensor spans the address range of all
    regions at a stride of one byte, so that the index of a row is its address.
    """

    def __init__(self) -> None:
        self._low, self._high = 2**63, 0
        self._views: dict[int, torch.Tensor] = {}

    def add(self, region: torch.Tensor) -> int:
        """Add a region, which must stay alive while its rows are gathered; return its address."""
        address = region.data_ptr()
        low, high = min(self._low, address), max(self._high, address + region.nbytes)
        if (low, high) != (self._low, self._high):
            self._low, self._high = low, high
            self._views.clear()
        return address

    def find(self, addresses: Ints, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tensor to select from, and the index, to copy bytes at addresses.

        Args:
            addresses: int64 [m].
            size: number of bytes at each address.
        """
        if not len(addresses):
            return torch.empty((0, size), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        if size not in self._views:
            origin = np.ctypeslib.as_array((ctypes.c_uint8 * 1).from_address(self._low))
            shape = (self._high - self._low - size + 1, size)
            span = np.lib.stride_tricks.as_strided(origin, shape, (1, 1))
            self._views[size] = torch.from_numpy(span)
        return self._views[size], torch.from_numpy(addresses - self._low)


class RowReader:
    """A reader of rows of numbered files, for one thread in the process that created it.

    A forked process needs its own reader: threads and locks of the parent do not work in it.

    Args:
        files: the files.
        columns: names of the columns to read, which all datasets have, or `unit` or `key`.
        cache: the cache for files of remote stores; None if all stores are local.
    """

    def __init__(self, files: Files, columns: Sequence[str], cache: FileCache | None) -> None:
        self._files = files
        self._names = [name for name in columns if name != "unit"]
        self._wants_unit = "unit" in columns
        self._cache = cache
        self._pool = ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix="latentcache-open")
        self._clock = 0

        contracts = files.contracts
        group_rows = [[row_group_rows(c, b) for b in files.buckets] for c in contracts]
        sizes = [row_bytes(contracts[0], bucket) for bucket in files.buckets]
        between = [4 if c.latents.format == "parquet" else 0 for c in contracts]
        self._group_rows: Ints = np.array(group_rows)[files.source_of, files.bucket_of]
        self._strides: Ints = np.array(sizes)[files.bucket_of] + np.array(between)[files.source_of]
        num_groups = -(-files.num_rows // self._group_rows)
        self._first_group: Ints = np.cumsum(num_groups) - num_groups

        self._max_open_bytes = _share_of_cache(files, cache)
        self._open: dict[int, _Open] = {}
        self._opening: dict[int, Future[_Open]] = {}
        self._given_up = Event()
        self._is_requested = np.zeros(len(files), bool)  # open, or being opened
        self._is_open = np.zeros(len(files), bool)
        self._file_used = np.zeros(len(files), np.int64)
        self._latents = _Gather()
        self._latent_address = np.zeros(int(num_groups.sum()), np.int64)

        self._groups: dict[int, _Group] = {}
        self._groups_bytes = 0
        self._group_used = np.zeros(len(self._latent_address), np.int64)
        self._sizes = _Gather()
        self._sizes_address = np.zeros(len(self._latent_address), np.int64)  # 0: not loaded

    @property
    def num_bytes_ahead(self) -> int:
        """The size in bytes of the files that are being opened, or are open but not needed yet."""
        return int(self._files.size_bytes[list(self._opening)].sum())

    def prepare(self, files: Ints) -> None:
        """Start to open files that will be needed, in order."""
        for file in files[~self._is_requested[files]].tolist():
            if file not in self._opening:
                self._opening[file] = self._pool.submit(self._open_file, file)
        self._is_requested[files] = True

    def cancel(self) -> None:
        """Make threads that wait for a failing store end; this lasts until `clear`."""
        self._given_up.set()

    def clear(self) -> None:
        """Stop opening files in advance, and allow files that failed to be opened again."""
        self.cancel()
        self._given_up = Event()
        for file, opening in self._opening.items():
            opening.cancel()
            self._is_requested[file] = False
        self._opening.clear()

    def find(self, bucket: Bucket, files: Ints, rows: Ints) -> FoundRows:
        """Find row `rows[i]` of file `files[i]`, for all i.

        Other threads may gather the results of the last `MAX_AHEAD` calls, but no older ones. A
        file that cannot be opened is not tried again before `clear`.

        Args:
            bucket: the bucket of all rows.
            files, rows: int64 [m].

        Raises:
            DatasetError: a file is missing, damaged, or differs from the manifest.
            StorageError: a store cannot be reached.
        """
        assert (rows < self._files.num_rows[files]).all()  # else it would copy other memory
        self._clock += 1
        self._open_all(files)
        group_rows = self._group_rows[files]
        groups, within = self._first_group[files] + rows // group_rows, rows % group_rows
        addresses = self._latent_address[groups] + within * self._strides[files]
        span, index = self._latents.find(addresses, row_bytes(self._files.contract, bucket))
        return FoundRows(span, index, *self._read_columns(files, groups, within))

    def _read_columns(
        self, files: Ints, groups: Ints, within: Ints
    ) -> tuple[torch.Tensor, dict[str, list[Any]]]:
        self._group_used[groups] = self._clock
        is_missing = self._sizes_address[groups] == 0
        if is_missing.any():
            for group in np.unique(groups[is_missing]).tolist():
                self._load_group(group)
            self._forget_groups()
        size = 8 * len(SIZES)
        span, index = self._sizes.find(self._sizes_address[groups] + size * within, size)
        sizes = torch.index_select(span, 0, index).view(torch.int64)
        columns: dict[str, list[Any]] = {}
        if self._names:
            groups_columns = [self._groups[group].columns for group in groups.tolist()]
            pairs = list(zip(groups_columns, within.tolist(), strict=True))
            columns = {name: [values[name][row] for values, row in pairs] for name in self._names}
        if self._wants_unit:
            columns["unit"] = [self._files.unit(file) for file in files.tolist()]
        return sizes, columns

    def _open_all(self, files: Ints) -> None:
        self._file_used[files] = self._clock
        is_missing = ~self._is_open[files]
        if is_missing.any():
            missing = np.unique(files[is_missing])
            self.prepare(missing)
            for file in missing.tolist():
                self._take(file, self._opening[file].result())
                del self._opening[file]
            self._close_files()

    def _take(self, file: int, opened: _Open) -> None:
        self._open[file] = opened
        self._is_open[file] = True
        address = self._latents.add(opened.latents)
        first = self._first_group[file]
        self._latent_address[first : first + len(opened.offsets)] = (
            np.array(opened.offsets) + address
        )

    def _close_files(self) -> None:
        """Close the least recently used files if too many files or bytes are open."""
        num_bytes = int(self._files.size_bytes[self._is_open].sum())
        if len(self._open) <= _MAX_OPEN_FILES and num_bytes <= self._max_open_bytes:
            return
        for file in sorted(self._open, key=lambda file: int(self._file_used[file])):
            if len(self._open) <= _MAX_OPEN_FILES * 7 // 8 and num_bytes <= self._max_open_bytes:
                break
            if self._file_used[file] < self._clock - MAX_AHEAD:
                del self._open[file]
                self._is_open[file] = self._is_requested[file] = False
                num_bytes -= int(self._files.size_bytes[file])

    def _open_file(self, file: int) -> _Open:
        contract, bucket = self._files.contract_of(file), self._files.bucket(file)
        store = self._files.store_of(file)
        described = self._files.latents_file(file)
        rows = latents = self._map(store, described)
        mapped = [latents]
        if contract.latents.format == "safetensors":
            rows = self._map(store, self._files.rows_file(file))
            mapped.append(rows)
            with naming_damage(store, self._files.rows_file(file).path):
                checked_footer(_reader(rows))  # first, so that an error names the right file
        with naming_damage(store, described.path):
            readers = [_reader(region) for region in mapped]
            offsets = latent_offsets(readers, contract, bucket, described.num_rows)
        with naming_damage(store, self._files.rows_file(file).path):
            metadata = pq.read_metadata(_reader(rows))
            check_schema(metadata.schema.to_arrow_schema(), contract)
        return _Open(latents, rows, metadata, offsets)

    def _load_group(self, group: int) -> None:
        file = int(np.searchsorted(self._first_group, group, "right")) - 1
        number = group - int(self._first_group[file])
        with naming_damage(self._files.store_of(file), self._files.rows_file(file).path):
            num_rows = self._rows_of_group(file, number)
            loaded = _read_group(self._open[file], number, self._names, num_rows)
        self._groups[group] = loaded
        self._groups_bytes += loaded.num_bytes
        self._sizes_address[group] = self._sizes.add(loaded.sizes)

    def _rows_of_group(self, file: int, number: int) -> int:
        group_rows = int(self._group_rows[file])
        return min(group_rows, int(self._files.num_rows[file]) - number * group_rows)

    def _forget_groups(self) -> None:
        """Drop the least recently used columns if they take too much memory."""
        if self._groups_bytes <= _MAX_COLUMNS_BYTES:
            return
        for group in sorted(self._groups, key=lambda group: int(self._group_used[group])):
            if self._groups_bytes <= _MAX_COLUMNS_BYTES * 7 // 8:
                break
            if self._group_used[group] < self._clock:  # columns are copied immediately
                self._sizes_address[group] = 0
                self._groups_bytes -= self._groups.pop(group).num_bytes

    def _map(self, store: Store, file: DataFile) -> torch.Tensor:
        """Return the mapped bytes of a file, uint8; no file descriptor stays open."""
        if local := store.local_path(file.path):
            _check_local(store, file)
            return _map_path(local, file)
        assert self._cache
        with self._cache.open(store, file, self._given_up) as path:
            return _map_path(path, file)


def _read_group(opened: _Open, number: int, names: Sequence[str], num_rows: int) -> _Group:
    """Return the sizes and columns of a row group.

    Raises:
        DatasetError: it has another number of rows. Arrow's errors for damaged data pass through.
    """
    parquet = pq.ParquetFile(_reader(opened.rows), metadata=opened.metadata, pre_buffer=False)
    # A unit that is not rewritten yet may lack a column of the dataset.
    stored = set(opened.metadata.schema.to_arrow_schema().names)
    read = [*SIZES, *(name for name in names if name in stored)]
    table = parquet.read_row_group(number, columns=read, use_threads=False)
    table.validate(full=True)
    if table.num_rows != num_rows:
        raise DatasetError(f"row group {number} has {table.num_rows} rows, not {num_rows}")
    sizes = np.stack([table[name].to_numpy() for name in SIZES], axis=1, dtype=np.int64)
    columns = {
        name: _to_list(table[name]) if name in stored else _no_values(name, num_rows)
        for name in names
    }
    # A Python string takes about 50 bytes in addition to its text.
    num_bytes = sizes.nbytes + table.nbytes + 50 * len(names) * num_rows
    return _Group(torch.from_numpy(sizes), columns, num_bytes)


def _share_of_cache(files: Files, cache: FileCache | None) -> int:
    """Return how many bytes of files this rank may map; a mapped file takes space if evicted."""
    if cache is None or files.size_bytes.sum() <= cache.max_bytes:
        return 2**63
    return cache.max_bytes // 2 // num_ranks_here()


def _check_local(store: Store, file: DataFile) -> None:
    """Compare the size of a local file with its receipt; `latentcache verify` compares hashes."""
    try:
        size_bytes = store.info(file.path).size_bytes
        if size_bytes == file.size_bytes:
            return
        problem = f"has {size_bytes} bytes, not {file.size_bytes}"
    except ObjectNotFound:
        problem = "is gone"
    raise DatasetError(
        f"{store.url_of(file.path)}, which the manifest lists, {problem}: run `latentcache verify "
        "--repair`, then the config again"
    )


def _map_path(path: Path, file: DataFile) -> torch.Tensor:
    try:
        return torch.from_file(str(path), shared=False, size=file.size_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise DatasetError(f"cannot map {path}: {error}") from error


def _reader(region: torch.Tensor) -> pa.BufferReader:
    return pa.BufferReader(pa.py_buffer(region.numpy()))


def _to_list(column: pa.ChunkedArray) -> list[Any]:
    """Return Python values, much faster than `to_pylist`; a missing class index is -1."""
    if pa.types.is_integer(column.type):
        return column.fill_null(-1).to_numpy().tolist()  # type: ignore[no-any-return]
    return column.to_numpy().tolist()  # type: ignore[no-any-return]


def _no_values(name: str, num_rows: int) -> list[Any]:
    """Return the values of a column that a file lacks, as `_to_list` would."""
    return _to_list(pa.chunked_array([pa.nulls(num_rows, column_type(name))]))


def open_cache(files: Files, folder: str | Path | None, max_bytes: int | str) -> FileCache | None:
    """Return the cache for files of remote stores; None if all stores are local.

    Args:
        files: the files.
        folder, max_bytes: its folder (None takes `default_cache_dir`), and its size limit.
    """
    limit = parse_bytes(max_bytes)
    if all(source.store.is_local for source in files.sources):
        return None
    return FileCache(Path(folder) if folder else default_cache_dir(), limit)
