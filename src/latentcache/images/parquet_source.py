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
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
import pyarrow.types as pt

from latentcache.errors import Reject
from latentcache.images.parquet_columns import (
    SampleColumns,
    find_columns,
    has_path,
    plain,
    texts_of,
)
from latentcache.images.parquet_file import DamagedParquet, ParquetFile
from latentcache.images.samples import (
    FieldSelection,
    Group,
    ReadRequest,
    RejectedSample,
    Sample,
    SampleStream,
    SourceShard,
    is_safe_key,
    sample_of,
)

# The approximate size of a part of a file. Units are identified by parts; see docs/format.md.
PART_BYTES = 256 * 2**20

# The number of image paths that are read at a time to check whether they can be keys.
_PATHS_AT_ONCE = 1024


def is_parquet(url: str) -> bool:
    """Return whether a URL names a Parquet file."""
    return url.lower().endswith(".parquet")


def split_file(shard: SourceShard) -> list[SourceShard]:
    """Return the parts of a large Parquet file that are units; any other file is one unit."""
    num_parts = round(shard.size_bytes / PART_BYTES) if is_parquet(shard.url) else 1
    if num_parts <= 1:
        return [shard]
    return [replace(shard, range=f"{part}/{num_parts}") for part in range(num_parts)]


def read_parquet(request: ReadRequest) -> SampleStream:
    """Stream the rows of a part of a Parquet file, in order; see `images.source.read_shard`.

    If `selection.key` is given, the key is the value of that column. Otherwise the key is the
    image's `path` without its extension, if the paths of all rows of the file exist, are unique and
    are safe as keys. If they are not, the key is the row's number in the file, with 9 digits.

    Parquet files have these reject reasons in addition to those of all sources. With a key:
    `no_key` (the column `selection.key` is null or empty; the row's number is used in its place).
    Without a key: `not_parquet` (no readable footer) and `corrupt_shard` (damage in row groups, or
    a page above `max_sample_bytes`; the message has the row groups and the numbers of lost rows).

    `on_read` is called with the bytes of each row's fields, and `reserve` with those of each page.

    Raises:
        SourceError: a named column does not exist, or has an unsupported type.
    """
    with request.store.open(request.name, readahead=False) as opened:
        try:
            file = ParquetFile(request, opened)
        except DamagedParquet as error:
            reject = Reject("read", "not_parquet", f"its footer cannot be read: {error}")
            return RejectedSample(None, reject)
        selection = request.selection
        columns = find_columns(file.schema, selection, request.shard.url)
        if columns.key is None:
            columns = replace(columns, path=_path_column(file, columns))
        names = frozenset(file.schema.names)
        seen: set[str] = set()
        losses: list[str] = []
        for number, row, num_rows in _row_groups(file, request.shard):
            end, why = row + num_rows, "it ends early"
            try:
                with file.reading():
                    for group in _groups(file, number, columns, selection, row):
                        row += 1
                        request.on_read(sum(map(len, group.fields.values())))
                        sample = _sample_of(group, selection, seen, f"{row - 1:09d}")
                        seen.add(group.key)
                        yield replace(sample, names=names)
            except DamagedParquet as error:
                why = str(error)
            if row < end:
                losses.append(f"{end - row} rows of row group {number} are lost: {why}")
    if not losses:
        return None
    return RejectedSample(None, Reject("read", "corrupt_shard", "; ".join(losses)))


def _row_groups(file: ParquetFile, shard: SourceShard) -> Iterator[tuple[int, int, int]]:
    """Yield index, first row in the file and number of rows of each row group of the shard.

    Every row group belongs to exactly one part.
    """
    part, _, num_parts = (shard.range or "0/1").partition("/")
    first_row = 0
    for number, group in enumerate(file.row_groups):
        start = min((column.start for column in group.columns), default=0)
        if start * int(num_parts) // shard.size_bytes == int(part):
            yield number, first_row, group.num_rows
        first_row += group.num_rows


def _path_column(file: ParquetFile, columns: SampleColumns) -> str | None:
    """Return the image column whose paths are the keys; None if paths cannot be keys."""
    name = next((name for name in columns.images if has_path(file.schema.field(name).type)), None)
    if name is None:
        return None
    seen: set[int] = set()
    for number in range(len(file.row_groups)):
        try:
            with file.reading():
                for batch in file.batches(number, [f"{name}.path"], _PATHS_AT_ONCE):
                    for path in texts_of(pc.struct_field(plain(batch.column(name)), "path")):
                        key = _key_of(path) if path else ""
                        if not key or hash(key) in seen or not is_safe_key(key):
                            return None
                        seen.add(hash(key))
        except DamagedParquet:
            continue  # the rows of this row group cannot be read either
    return name


def _key_of(path: bytes) -> str:
    return posixpath.splitext(path)[0].decode("utf-8", "surrogateescape")


def _groups(
    file: ParquetFile, number: int, columns: SampleColumns, selection: FieldSelection, row: int
) -> Iterator[Group]:
    """Yield the fields of each row of a row group that begins at `row`; a null key is empty."""
    for batch in file.batches(number, columns.names):
        images = {name: plain(batch.column(name)) for name in columns.images}
        paths = [texts_of(pc.struct_field(a, "path")) for a in images.values() if has_path(a.type)]
        texts = {
            name: texts_of(batch.column(name), selection.caption_index) for name in columns.texts
        }
        keys = texts_of(batch.column(columns.key)) if columns.key else []
        for name, array in images.items():
            images[name] = pc.struct_field(array, "bytes") if pt.is_struct(array.type) else array
        for index in range(batch.num_rows):
            path = next((column[index] for column in paths if column[index]), None)
            if columns.key:
                key = (keys[index] or b"").decode("utf-8", "surrogateescape")
            else:
                key = _key_of(path) if path and columns.path else f"{row:09d}"
            row += 1
            group = Group(key)
            fields: list[tuple[str, Any]] = [(name, images[name][index].as_py()) for name in images]
            fields += [(name, values[index]) for name, values in texts.items()]
            for name, value in fields:
                if value is not None and group.add(name, len(value), selection):
                    group.fields[name] = value
            if path:
                group.names.add("the path of an image elsewhere")
            yield group


def _sample_of(
    group: Group, selection: FieldSelection, seen: set[str], row: str
) -> Sample | RejectedSample:
    if group.key:
        return sample_of(group, selection, seen)
    num_images = int(any(name in selection.image for name in group.names))
    reject = Reject("read", "no_key", f"its {selection.key!r} is null or empty")
    return RejectedSample(row, reject, num_images)
