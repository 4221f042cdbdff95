"""Parquet files of images in Hugging Face's layout: `struct<bytes: binary, path: string>`.

A row is a sample, and its columns that are not null are the fields. A large file is split into
several units by its size alone, so that listing opens no file. Part k of n has the row groups whose
first byte is in [k·size/n, (k+1)·size/n). The reader finds them in the footer.

pyarrow aborts the process on some damaged footers, and allocates the size that a page header
claims. Therefore `latentcache.parquet_footer` checks the footer first, and `images.parquet_file`
checks each page header before Arrow reads it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from latentcache.errors import Reject, SourceError, StorageError, first_line
from latentcache.images.parquet_columns import (
    SampleColumns,
    find_columns,
    has_path,
    plain,
    texts_of,
)
from latentcache.images.parquet_file import OversizedPage, ParquetBytes
from latentcache.images.samples import (
    Group,
    OnRead,
    RejectedSample,
    ReserveSample,
    Sample,
    SourceShard,
    Wanted,
    is_safe_key,
    sample_of,
)
from latentcache.parquet_footer import DamagedFooter, Footer, RowGroup
from latentcache.storage import Store, split_url
from latentcache.storage_options import StorageOptions

# The approximate size of a part of a file. Units are identified by parts; see docs/format.md.
PART_BYTES = 256 * 2**20

# The size of a read from the store. Without it Arrow fetches all images of a row group at once.
_BUFFER_BYTES = 8 * 2**20

# The limits of a batch of rows. A batch has at least one row.
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 64

# The number of image paths that are read at a time to check whether they can be keys.
_PATHS_AT_ONCE = 1024

_Damage = (pa.ArrowException, OSError, UnicodeDecodeError, DamagedFooter)


def is_parquet(url: str) -> bool:
    """Return whether a URL names a Parquet file."""
    return url.lower().endswith(".parquet")


def split_file(shard: SourceShard) -> list[SourceShard]:
    """Split a Parquet file into the parts that are units; a small file is one unit, no range."""
    num_parts = max(1, round(shard.size_bytes / PART_BYTES))
    if num_parts == 1:
        return [shard]
    return [replace(shard, range=f"{part}/{num_parts}") for part in range(num_parts)]


def read_parquet(
    shard: SourceShard,
    wanted: Wanted,
    options: StorageOptions,
    on_read: OnRead,
    reserve: ReserveSample,
) -> Iterator[Sample | RejectedSample]:
    """Stream the rows of a part of a Parquet file, in order; see `images.source.read_shard`.

    If `wanted.key` is given, the key is the value of that column. Otherwise the key is the image's
    `path` without its extension, if the paths of all rows of the file exist, are unique and are
    safe as keys. If they are not, the key is the row's number in the file, with 9 digits.

    Parquet files have these reject reasons in addition to those of all sources. With a key:
    `no_key` (the column `wanted.key` is null or empty; the row's number is used in its place).
    Without a key: `empty_shard`, `not_parquet` (no readable footer) and `corrupt_shard` (damage in
    row groups, or a page above `wanted.max_sample_bytes`; the message has the row groups and the
    numbers of lost rows).

    Args:
        shard: the listed shard.
        wanted: the fields to read.
        options: how to reach the store.
        on_read: called with the number of bytes of each row's fields.
        reserve: called before a page is read, with its bytes.

    Raises:
        SourceError: a named column does not exist, or has an unsupported type.
    """
    folder, name = split_url(shard.url)
    store = Store(folder, options)
    trouble: RejectedSample | None = None
    try:
        if shard.size_bytes == 0:
            trouble = _trouble("empty_shard", "the file holds no bytes")
        else:
            with store.open(name, readahead=False) as opened:
                file = ParquetBytes(store, name, opened, shard.size_bytes)
                trouble = yield from _read_rows(file, shard, wanted, on_read, reserve)
    except (StorageError, SourceError):
        # A replaced or deleted file may cause any of these errors.
        shard.require_unchanged(store, name)
        raise
    shard.require_unchanged(store, name)
    if trouble is not None:
        yield trouble


def _trouble(reason: str, message: str) -> RejectedSample:
    return RejectedSample(None, Reject("read", reason, message))


def _read_rows(
    file: ParquetBytes,
    shard: SourceShard,
    wanted: Wanted,
    on_read: OnRead,
    reserve: ReserveSample,
) -> Generator[Sample | RejectedSample, None, RejectedSample | None]:
    """Yield the samples; return the problem of the file as a whole."""
    try:
        footer = file.read_footer()
        parquet = pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        schema = parquet.schema_arrow
    except pa.ArrowMemoryError:
        raise
    except _Damage as error:
        if file.failure:
            raise file.failure from error
        return _trouble("not_parquet", f"its footer cannot be read: {first_line(error)}")
    columns = find_columns(schema, wanted, shard.url)
    file.check_pages(footer, columns.names, wanted.max_sample_bytes, reserve)
    reader = _Reader(file, parquet, footer)
    if columns.key is None:
        columns = replace(columns, path=_path_column(reader, schema, columns))
    names = frozenset(schema.names)
    seen: set[str] = set()
    losses: list[str] = []
    for number, first in _row_groups(footer, shard):
        num_rows = footer.row_groups[number].num_rows
        done, why = 0, "it ends early"
        try:
            for batch in reader.batches(number, columns.names):
                for group in _groups(batch, columns, wanted, first + done):
                    done += 1
                    on_read(sum(map(len, group.fields.values())))
                    sample = _sample_of(group, wanted, seen, f"{first + done - 1:09d}")
                    seen.add(group.key)
                    yield replace(sample, names=names)
        except pa.ArrowMemoryError:
            raise
        except OversizedPage as error:
            why = str(error)
        except _Damage as error:
            if file.failure:
                raise file.failure from error
            why = first_line(error)
        if done < num_rows:
            losses.append(f"{num_rows - done} rows of row group {number} are lost: {why}")
    return _trouble("corrupt_shard", "; ".join(losses)) if losses else None


def _row_groups(footer: Footer, shard: SourceShard) -> Iterator[tuple[int, int]]:
    """Yield the index of each row group of the shard, and the number of its first row in the file.

    Every row group belongs to exactly one part.
    """
    part, _, num_parts = (shard.range or "0/1").partition("/")
    first_row = 0
    for number, group in enumerate(footer.row_groups):
        start = min((column.start for column in group.columns), default=0)
        if start * int(num_parts) // shard.size_bytes == int(part):
            yield number, first_row
        first_row += group.num_rows


class _Reader:
    """A reader of row groups in batches of bounded size, even if the file is malicious."""

    def __init__(self, file: ParquetBytes, parquet: pq.ParquetFile, footer: Footer) -> None:
        self._file, self._parquet, self.footer = file, parquet, footer

    @property
    def failure(self) -> StorageError | None:
        """The error of the store, if it failed."""
        return self._file.failure

    def batches(
        self, number: int, columns: Sequence[str], most: int = _BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a row group in batches.

        Args:
            number: the index of the row group.
            columns: the names of the columns to read.
            most: the maximum number of rows of a batch.

        Raises:
            OversizedPage: a page holds more bytes than a sample may.
            DamagedFooter: a page has no header.
        """
        group = self.footer.row_groups[number]
        size = max(1, min(most, self._num_fitting(group, columns)))
        # Arrow's threads may outlive the process, so they are not used; see dataset/parquet.py.
        batches = self._parquet.iter_batches(size, [number], list(columns), use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                if self._file.damage:  # Arrow may have replaced it with its own error
                    raise self._file.damage from error
                raise
            if batch is None:
                return
            yield batch

    def _num_fitting(self, group: RowGroup, columns: Sequence[str]) -> int:
        """Return a number of rows that fits into `_BATCH_BYTES` for any possible values."""
        fitting = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
        for chunk in group.columns:
            if not {chunk.path[0], ".".join(chunk.path)}.isdisjoint(columns):
                # Every row may repeat one value that is as large as the dictionary or the page.
                repeated = self._file.dictionary_size(chunk)
                if chunk.may_expand:
                    repeated = max(repeated, chunk.total_uncompressed_size)
                fitting = min(fitting, _BATCH_BYTES // max(1, repeated))
        return fitting


def _path_column(reader: _Reader, schema: pa.Schema, columns: SampleColumns) -> str | None:
    """Return the image column whose paths are the keys; None if paths cannot be keys."""
    name = next((name for name in columns.images if has_path(schema.field(name).type)), None)
    if name is None:
        return None
    seen: set[int] = set()
    for number in range(len(reader.footer.row_groups)):
        try:
            for batch in reader.batches(number, [f"{name}.path"], _PATHS_AT_ONCE):
                for path in texts_of(pc.struct_field(plain(batch.column(name)), "path"), 0):
                    key = _key_of(path) if path else ""
                    if not key or hash(key) in seen or not is_safe_key(key):
                        return None
                    seen.add(hash(key))
        except pa.ArrowMemoryError:
            raise
        except (OversizedPage, *_Damage) as error:
            if reader.failure:
                raise reader.failure from error
            continue  # the rows of this row group cannot be read either
    return name


def _key_of(path: bytes) -> str:
    return posixpath.splitext(path)[0].decode("utf-8", "surrogateescape")


def _groups(
    batch: pa.RecordBatch, columns: SampleColumns, wanted: Wanted, first: int
) -> Iterator[Group]:
    """Yield the fields of each row; the key is empty if it is null."""
    images = {name: plain(batch.column(name)) for name in columns.images}
    blobs = {
        name: pc.struct_field(array, "bytes") if pt.is_struct(array.type) else array
        for name, array in images.items()
    }
    paths = [texts_of(pc.struct_field(a, "path"), 0) for a in images.values() if has_path(a.type)]
    texts = {name: texts_of(batch.column(name), wanted.caption_index) for name in columns.texts}
    keys = texts_of(batch.column(columns.key), 0) if columns.key else []
    for index in range(batch.num_rows):
        path = next((column[index] for column in paths if column[index]), None)
        if columns.key:
            key = (keys[index] or b"").decode("utf-8", "surrogateescape")
        else:
            key = _key_of(path) if path and columns.path else f"{first + index:09d}"
        group = Group(key)
        fields: list[tuple[str, Any]] = [(name, blobs[name][index].as_py()) for name in blobs]
        fields += [(name, values[index]) for name, values in texts.items()]
        for name, value in fields:
            if value is not None and group.add(name, len(value), wanted):
                group.fields[name] = value
        if path:
            group.names.add("the path of an image elsewhere")
        yield group


def _sample_of(
    group: Group, wanted: Wanted, seen: set[str], number: str
) -> Sample | RejectedSample:
    if group.key:
        return sample_of(group, wanted, seen)
    num_images = int(any(name in wanted.image for name in group.names))
    reject = Reject("read", "no_key", f"its {wanted.key!r} is null or empty")
    return RejectedSample(number, reject, num_images)
