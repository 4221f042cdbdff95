"""Parquet files of images, as Hugging Face lays them out: `struct<bytes: binary, path: string>`.

A row is a sample, and the columns in which it is not null are its fields. A large file is cut into
several units by its size alone, so that listing opens nothing: part k of n holds the row groups
whose first byte lies in [k·size/n, (k+1)·size/n), which whoever reads it finds in the footer.
"""

from __future__ import annotations

import posixpath
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from latentcache.errors import Reject, SourceError, StorageError, first_line
from latentcache.images.samples import (
    Group,
    OnRead,
    RejectedSample,
    Sample,
    SourceShard,
    Wanted,
    sample_of,
)
from latentcache.storage import StorageOptions, Store, split_url

# A part of a file, about. Units are named by it: docs/format.md says so.
PART_BYTES = 256 * 2**20

# Asked of the store at a time; Arrow would else fetch all images of a row group at once.
_BUFFER_BYTES = 8 * 2**20

# Rows made of Arrow's columns at a time: as many as have so many bytes together, or one.
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 64

_Damage = (pa.ArrowException, OSError, UnicodeDecodeError)


def is_parquet(url: str) -> bool:
    """Whether a URL names a Parquet file."""
    return url.lower().endswith(".parquet")


def split_file(shard: SourceShard) -> list[SourceShard]:
    """Cut a Parquet file into the parts that are units; a small one stays whole, with no range."""
    num_parts = max(1, round(shard.size_bytes / PART_BYTES))
    if num_parts == 1:
        return [shard]
    return [replace(shard, range=f"{part}/{num_parts}") for part in range(num_parts)]


def read_parquet(
    shard: SourceShard, wanted: Wanted, options: StorageOptions, on_read: OnRead
) -> Iterator[Sample | RejectedSample]:
    """Stream the rows of a part of a Parquet file, in order; see `images.source.read_shard`.

    The key is the column `wanted.key`, where that is given; else the image's `path` less its
    extension; else the row's number in the file, of 9 digits.

    Rejects beside those of all sources: `no_key` (nothing in the column `wanted.key`; the row's
    number stands for it), and without a key `empty_shard`, `not_parquet` (no footer that can be
    read) and `corrupt_shard` (damage in row groups: it says which, and how many rows are lost).

    Raises:
        SourceError: a column that is named is not there, or of no type that can be used.
    """
    folder, name = split_url(shard.url)
    store = Store(folder, options)
    trouble: RejectedSample | None = None
    try:
        if shard.size_bytes == 0:
            trouble = _trouble("empty_shard", "the file holds no bytes")
        else:
            with store.open(name, readahead=False) as opened:
                file = _WholeReads(store, name, opened, shard.size_bytes)
                trouble = yield from _read_rows(file, shard, wanted, on_read)
    except (StorageError, SourceError):
        # What was replaced or deleted may show as anything.
        shard.require_unchanged(store, name)
        raise
    shard.require_unchanged(store, name)
    if trouble is not None:
        yield trouble


def _trouble(reason: str, message: str) -> RejectedSample:
    return RejectedSample(None, Reject("read", reason, message))


class _WholeReads:
    """A file as Arrow reads it: what a read gives is all that was asked for, or else it raises.

    Arrow may dress up what is raised; `failure` keeps it as it was.
    """

    closed = False

    def __init__(self, store: Store, name: str, file: BinaryIO, size_bytes: int) -> None:
        self._store, self._name, self._file = store, name, file
        self._size_bytes = size_bytes
        self._position = 0
        self.failure: StorageError | None = None

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size_bytes - self._position)
        size = left if size < 0 else min(size, left)
        try:
            with self._store.named(self._name):
                self._file.seek(self._position)
                data = self._file.read(size)
            if len(data) < size:
                raise StorageError(
                    f"{self._store.url_of(self._name)}: the connection gave {len(data)} of {size} "
                    f"bytes at byte {self._position}"
                )
        except StorageError as error:
            self.failure = error
            raise
        self._position += size
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self._size_bytes)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns to read: `images` that the file has, `texts` that are kept, and the key's."""

    images: Sequence[str]
    texts: Sequence[str]
    key: str | None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.images, *self.texts, *([self.key] if self.key else [])]))


def _read_rows(
    file: _WholeReads, shard: SourceShard, wanted: Wanted, on_read: OnRead
) -> Generator[Sample | RejectedSample, None, RejectedSample | None]:
    """Yield the samples; return what is wrong with the file as a whole."""
    try:
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
        schema = parquet.schema_arrow
    except pa.ArrowMemoryError:
        raise
    except _Damage as error:
        if file.failure:
            raise file.failure from error
        return _trouble("not_parquet", f"its footer cannot be read: {first_line(error)}")
    columns = _find_columns(schema, wanted, shard.url)
    seen: set[str] = set()
    losses: list[str] = []
    for number, first in _row_groups(parquet.metadata, shard):
        num_rows = parquet.metadata.row_group(number).num_rows
        done, why = 0, "it ends early"
        try:
            for batch in _batches(parquet, number, columns):
                for group in _groups(batch, columns, first + done):
                    done += 1
                    on_read(sum(map(len, group.fields.values())))
                    yield _sample_of(group, wanted, seen, f"{first + done - 1:09d}")
        except pa.ArrowMemoryError:
            raise
        except _Damage as error:
            if file.failure:
                raise file.failure from error
            why = first_line(error)
        if done < num_rows:
            losses.append(f"{num_rows - done} rows of row group {number} are lost: {why}")
    return _trouble("corrupt_shard", "; ".join(losses)) if losses else None


def _row_groups(metadata: pq.FileMetaData, shard: SourceShard) -> Iterator[tuple[int, int]]:
    """Give the shard's row groups, each with the number that its first row has in the file.

    Every row group belongs to exactly one part, whatever offsets a footer claims.
    """
    part, _, num_parts = (shard.range or "0/1").partition("/")
    first_row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        mine = _first_byte(group) * int(num_parts) // shard.size_bytes
        if min(max(mine, 0), int(num_parts) - 1) == int(part):
            yield number, first_row
        first_row += group.num_rows


def _first_byte(group: pq.RowGroupMetaData) -> int:
    columns = [group.column(index) for index in range(group.num_columns)]
    pages = [(column.dictionary_page_offset, column.data_page_offset) for column in columns]
    return min((offset for offsets in pages for offset in offsets if offset), default=0)


def _batches(parquet: pq.ParquetFile, number: int, columns: _Columns) -> Iterator[pa.RecordBatch]:
    group = parquet.metadata.row_group(number)
    fitting = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
    size = max(1, min(_BATCH_ROWS, fitting))
    # Without Arrow's threads, which may outlive the process: dataset/parquet.py.
    yield from parquet.iter_batches(size, [number], columns.names, use_threads=False)


def _find_columns(schema: pa.Schema, wanted: Wanted, url: str) -> _Columns:
    names = [name for name in wanted.image if name in schema.names]
    if not names:
        raise SourceError(
            f"{url}: no column holds the image: source.image names {', '.join(wanted.image)}, the "
            f"file has {', '.join(schema.names)}"
        )
    for name in names:
        kind = _type_of(schema, name, url, "image")
        if pt.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
        if not _is_binary(kind):
            raise SourceError(
                f"{url}: column {name!r} is {schema.field(name).type}, no image: that is binary, "
                "or struct<bytes: binary, path: string>"
            )
    for setting, texts in (("keep", wanted.keep), ("key", [wanted.key] if wanted.key else [])):
        for name in texts:
            kind = _type_of(schema, name, url, setting)
            if not (_is_text(kind) or pt.is_integer(kind)):
                raise SourceError(
                    f"{url}: column {name!r}, which source.{setting} names, is {kind}: only text "
                    "and integers can be read"
                )
    return _Columns(names, wanted.keep, wanted.key)


def _type_of(schema: pa.Schema, name: str, url: str, setting: str) -> pa.DataType:
    """Give a column's type, below what wraps it."""
    indices = schema.get_all_field_indices(name)
    if len(indices) != 1:
        has = f"two columns {name!r}" if indices else f"no column {name!r}"
        raise SourceError(
            f"{url} has {has}, which source.{setting} names; it has {', '.join(schema.names)}"
        )
    kind = schema.field(indices[0]).type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pt.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _groups(batch: pa.RecordBatch, columns: _Columns, first: int) -> Iterator[Group]:
    """Give the fields of each row; of a key that is null, an empty one."""
    images = {name: _plain(batch.column(name)) for name in columns.images}
    blobs = {
        name: pc.struct_field(array, "bytes") if pt.is_struct(array.type) else array
        for name, array in images.items()
    }
    paths = next((_texts(pc.struct_field(a, "path")) for a in images.values() if _has_path(a)), [])
    texts = {name: _texts(batch.column(name)) for name in columns.texts}
    keys = _texts(batch.column(columns.key)) if columns.key else []
    for index in range(batch.num_rows):
        path = paths[index] if paths else None
        if columns.key:
            key = keys[index] or b""
        else:
            key = posixpath.splitext(path)[0] if path else b"%09d" % (first + index)
        group = Group(key.decode("utf-8", "surrogateescape"))
        found: list[tuple[str, Any]] = [(name, blobs[name][index].as_py()) for name in blobs]
        found += [(name, values[index]) for name, values in texts.items()]
        group.fields = {name: value for name, value in found if value is not None}
        group.names = {*group.fields, *(["the path of an image elsewhere"] if path else [])}
        yield group


def _plain(array: pa.Array) -> pa.Array:
    """Take a column out of what wraps it: an extension type, a dictionary."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def _has_path(array: pa.Array) -> bool:
    if not pt.is_struct(array.type) or array.type.get_field_index("path") < 0:
        return False
    return _is_text(array.type.field("path").type)


def _texts(column: pa.Array) -> list[bytes | None]:
    """Give text as the bytes that it is stored as, and integers as their digits."""
    array = _plain(column)
    if pt.is_integer(array.type):
        return [None if value is None else b"%d" % value for value in array.to_pylist()]
    found: list[bytes | None] = array.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    return found


def _sample_of(
    group: Group, wanted: Wanted, seen: set[str], number: str
) -> Sample | RejectedSample:
    if group.key:
        sample = sample_of(group, wanted, seen)
        seen.add(group.key)
        return sample
    return RejectedSample(number, Reject("read", "no_key", f"its {wanted.key!r} is null or empty"))
