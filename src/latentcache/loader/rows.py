"""Read rows in random order: latents from memory maps, columns by row group.

The offset of a latent in its mapped file is computed, and one call gathers a batch from any number
of files: Parquet, too, stores latents plain and at a constant stride (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

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
from latentcache.loader.ranks import num_local_ranks
from latentcache.loader.regions import Regions, Selection
from latentcache.storage import Store

SIZES = ("original_height", "original_width", "crop_top", "crop_left")

# Maps cost only address space, but Linux limits a process to about 65,000.
_MAX_OPEN_FILES = 8192
_MAX_COLUMNS_BYTES = 512 * 2**20
_OPENING_THREADS = 8


class _Open(NamedTuple):
    """A mapped file: its bytes, its Parquet file's bytes, and the offset of each row group."""

    latents: torch.Tensor
    rows: torch.Tensor
    metadata: pq.FileMetaData
    offsets: list[int]


class RowReader:
    """A reader of rows of numbered files, for one thread in the process that created it.

    `columns` are names of columns that all datasets have, or `unit` or `key`. A forked process
    needs its own reader: threads and locks of the parent do not work in it.
    """

    def __init__(self, files: Files, columns: Sequence[str], cache: FileCache | None) -> None:
        self._files = files
        self._names = [name for name in columns if name != "unit"]
        self._wants_unit = "unit" in columns
        self._cache = cache
        self._pool = ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix="latentcache-open")

        contracts = files.contracts
        group_rows = [[row_group_rows(c, b) for b in files.buckets] for c in contracts]
        sizes = [row_bytes(contracts[0], bucket) for bucket in files.buckets]
        between = [4 if c.latents.format == "parquet" else 0 for c in contracts]
        self._group_rows: Ints = np.array(group_rows)[files.source_of, files.bucket_of]
        self._strides: Ints = np.array(sizes)[files.bucket_of] + np.array(between)[files.source_of]
        num_groups = -(-files.num_rows // self._group_rows)
        self._first_group: Ints = np.cumsum(num_groups) - num_groups
        self._latent_offsets = np.zeros(total := int(num_groups.sum()), np.int64)

        max_bytes = 2**63
        if cache and files.size_bytes.sum() > cache.max_bytes:
            # This rank's share of the cache: a mapped file takes disk space even if it is evicted.
            max_bytes = cache.max_bytes // 2 // num_local_ranks()
        self._open = Regions[_Open](len(files), max_bytes, _MAX_OPEN_FILES)
        self._opening: dict[int, Future[_Open]] = {}
        self._cancelled = Event()
        self._is_requested = np.zeros(len(files), bool)  # open, or being opened
        # By row group: its sizes, int64 [n, 4], and its columns.
        self._groups = Regions[dict[str, list[Any]]](total, _MAX_COLUMNS_BYTES, total)

    @property
    def num_opening_bytes(self) -> int:
        """The size in bytes of files that `prepare` has begun to open and `select` has not used."""
        return int(self._files.size_bytes[list(self._opening)].sum())

    def prepare(self, files: Ints) -> None:
        """Start to open files that will be needed, in order."""
        for file in files[~self._is_requested[files]].tolist():
            if file not in self._opening:
                self._opening[file] = self._pool.submit(self._open_file, file)
        self._is_requested[files] = True

    def cancel(self) -> None:
        """Make threads that wait for a failing store end; this lasts until `clear`."""
        self._cancelled.set()

    def clear(self) -> None:
        """Stop opening files in advance, and allow files that failed to be opened again."""
        self.cancel()
        self._cancelled = Event()
        for file, opening in self._opening.items():
            opening.cancel()
            self._is_requested[file] = False
        self._opening.clear()

    def select(
        self, bucket: Bucket, files: Ints, rows: Ints
    ) -> tuple[Selection, torch.Tensor, dict[str, list[Any]]]:
        """Return the latents, sizes and columns of row `rows[i]` of file `files[i]`, for all i.

        Latents are yet to be copied, which any thread may do. Sizes are int64 [m, 4], as in
        `SIZES`. A file that cannot be opened is not tried again before `clear`.

        Args:
            bucket: the bucket of all rows.
            files, rows: int64 [m].

        Raises:
            DatasetError: a file is missing, damaged, or differs from the manifest.
            StorageError: a store cannot be reached.
        """
        self._open_all(files)
        group_rows = self._group_rows[files]
        groups, within = self._first_group[files] + rows // group_rows, rows % group_rows
        offsets = self._latent_offsets[groups] + within * self._strides[files]
        latents = self._open.select(files, offsets, row_bytes(self._files.contract, bucket))
        self._load_groups(groups)
        size = 8 * len(SIZES)
        sizes = torch.empty((len(rows), len(SIZES)), dtype=torch.int64)
        self._groups.select(groups, size * within, size).gather(sizes.view(torch.uint8))
        columns: dict[str, list[Any]] = {}
        if self._names:
            groups_columns = [self._groups[group] for group in groups.tolist()]
            pairs = list(zip(groups_columns, within.tolist(), strict=True))
            columns = {name: [values[name][row] for values, row in pairs] for name in self._names}
        if self._wants_unit:
            columns["unit"] = [self._files.unit(file) for file in files.tolist()]
        return latents, sizes, columns

    def _open_all(self, files: Ints) -> None:
        if missing := self._open.use(files):
            self.prepare(files)
            for file in missing:
                opened = self._opening[file].result()
                self._open.add(file, opened.latents, opened, int(self._files.size_bytes[file]))
                del self._opening[file]
                first = self._first_group[file]
                self._latent_offsets[first : first + len(opened.offsets)] = opened.offsets
            self._is_requested[self._open.drop(len(np.unique(files)))] = False

    def _load_groups(self, groups: Ints) -> None:
        if missing := self._groups.use(groups):
            for group in missing:
                self._load_group(group)
            self._groups.drop(len(np.unique(groups)))

    def _open_file(self, file: int) -> _Open:
        source, described = self._files.source(file), self._files.latents_file(file)
        bucket = self._files.buckets[int(self._files.bucket_of[file])]
        rows_path = self._files.rows_file(file).path
        rows = latents = self._map(source.store, described)
        mapped = [latents]
        if source.contract.latents.format == "safetensors":
            rows = self._map(source.store, self._files.rows_file(file))
            mapped.append(rows)
            with naming_damage(source.store, rows_path):
                checked_footer(_reader(rows))  # first, so that an error names the right file
        with naming_damage(source.store, described.path):
            readers = [_reader(region) for region in mapped]
            offsets = latent_offsets(readers, source.contract, bucket, described.num_rows)
        with naming_damage(source.store, rows_path):
            metadata = pq.read_metadata(_reader(rows))
            check_schema(metadata.schema.to_arrow_schema(), source.contract)
        return _Open(latents, rows, metadata, offsets)

    def _load_group(self, group: int) -> None:
        file = int(np.searchsorted(self._first_group, group, "right")) - 1
        number = group - int(self._first_group[file])
        group_rows = int(self._group_rows[file])
        num_rows = min(group_rows, int(self._files.num_rows[file]) - number * group_rows)
        with naming_damage(self._files.source(file).store, self._files.rows_file(file).path):
            loaded = _read_group(self._open[file], number, self._names, num_rows)
        self._groups.add(group, *loaded)

    def _map(self, store: Store, file: DataFile) -> torch.Tensor:
        """Return the mapped bytes of a file, uint8; no file descriptor stays open."""
        local = store.local_path(file.path)
        with ExitStack() as stack:
            if local:
                _check_local(store, file)
            else:
                assert self._cache
                local = stack.enter_context(self._cache.open(store, file, self._cancelled))
            try:
                size = file.size_bytes
                return torch.from_file(str(local), shared=False, size=size, dtype=torch.uint8)
            except RuntimeError as error:
                raise DatasetError(f"cannot map {local}: {error}") from error


def _read_group(
    opened: _Open, number: int, names: Sequence[str], num_rows: int
) -> tuple[torch.Tensor, dict[str, list[Any]], int]:
    """Return the sizes and columns of a row group, and about how much memory they take."""
    parquet = pq.ParquetFile(_reader(opened.rows), metadata=opened.metadata, pre_buffer=False)
    # A unit that is not rewritten yet may lack a column of the dataset.
    stored = set(opened.metadata.schema.to_arrow_schema().names)
    read = [*SIZES, *(name for name in names if name in stored)]
    table = parquet.read_row_group(number, columns=read, use_threads=False)
    table.validate(full=True)
    if table.num_rows != num_rows:
        raise DatasetError(f"row group {number} has {table.num_rows} rows, not {num_rows}")
    sizes = np.stack([table[name].to_numpy() for name in SIZES], axis=1, dtype=np.int64)
    for name in names:
        if name not in stored:
            table = table.append_column(name, pa.nulls(num_rows, column_type(name)))
    columns = {name: _to_list(table[name]) for name in names}
    # A Python string takes about 50 bytes in addition to its text.
    num_bytes = sizes.nbytes + table.nbytes + 50 * len(names) * num_rows
    return torch.from_numpy(sizes), columns, num_bytes


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


def _reader(region: torch.Tensor) -> pa.BufferReader:
    return pa.BufferReader(pa.py_buffer(region.numpy()))


def _to_list(column: pa.ChunkedArray) -> list[Any]:
    """Return Python values, much faster than `to_pylist`; a missing class index is -1."""
    values = column.fill_null(-1) if pa.types.is_integer(column.type) else column
    return values.to_numpy().tolist()  # type: ignore[no-any-return]


def open_cache(files: Files, folder: str | Path | None, max_bytes: int | str) -> FileCache | None:
    """Return the cache for files of remote stores; None if all stores are local.

    Args:
        files, folder, max_bytes: as `cache_dir` and `cache_bytes` of `LatentLoader`.
    """
    limit = parse_bytes(max_bytes)
    if all(source.store.is_local for source in files.sources):
        return None
    return FileCache(Path(folder) if folder else default_cache_dir(), limit)
