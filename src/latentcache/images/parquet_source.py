"""Parquet files of images in Hugging Face's layout: `struct<bytes: binary, path: string>`.

A row is a sample, and its columns that are not null are the fields. A large file is split into
several units by its size alone, so that listing opens no file. Part k of n has the row groups whose
first byte is in [k·size/n, (k+1)·size/n). The reader finds them in the footer.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from latentcache.errors import FieldMissing, Reject, SourceError
from latentcache.images.parquet_file import ParquetFile
from latentcache.images.samples import (
    FieldSelection,
    Group,
    ReadRequest,
    RejectedSample,
    Sample,
    SampleStream,
    SourceShard,
    key_fault,
    sample_of,
)
from latentcache.parquet_footer import DamagedFooter

# The approximate size of a part of a file. Units are identified by parts; see docs/format.md.
PART_BYTES = 256 * 2**20

# The number of image paths that are read at a time to check whether they can be keys.
_PATHS_AT_ONCE = 1024

_BINARY = (pt.is_binary, pt.is_large_binary, pt.is_binary_view)
_TEXT = (pt.is_string, pt.is_large_string, pt.is_string_view)
_LISTS = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list)
_KEYS = (*_TEXT, pt.is_integer)
_SCALARS = (*_KEYS, *_BINARY, pt.is_null, pt.is_boolean, pt.is_floating, pt.is_decimal)


def is_parquet(url: str) -> bool:
    """Return whether a URL names a Parquet file."""
    return url.lower().endswith(".parquet")


def split_file(shard: SourceShard) -> list[SourceShard]:
    """Return the parts of a large Parquet file; any other file is one unit."""
    num_parts = round(shard.size_bytes / PART_BYTES) if is_parquet(shard.url) else 1
    if num_parts <= 1:
        return [shard]
    return [replace(shard, range=f"{part}/{num_parts}") for part in range(num_parts)]


def read_parquet(request: ReadRequest) -> SampleStream:
    """Stream the rows of a part of a Parquet file, in order; see `images.source.read_shard`.

    The key is the value of the column `selection.key`, if given. Otherwise it is the image's `path`
    without its extension, if the paths of all rows of the file exist, are unique and are safe as
    keys. If they are not, the key is the row's number in the file, with 9 digits.

    Further reject reasons with a key: `no_key` (the column `selection.key` is null or empty; the
    key is the row's number). Without a key: `not_parquet` (no readable footer) and `corrupt_shard`
    (damage in row groups, or a page above `max_sample_bytes`).

    `on_read` is called with the bytes of each row's fields, and `reserve` with those of each page.

    Raises:
        FieldMissing: the file lacks a kept column.
        SourceError: another named column does not exist, or a column has an unsupported type.
    """
    with request.store.open(request.name, readahead=False) as opened:
        try:
            file = ParquetFile(request, opened)
        except DamagedFooter as error:
            reject = Reject("read", "not_parquet", f"its footer cannot be read: {error}")
            return RejectedSample(None, reject)
        selection = request.selection
        images = _check_columns(file.schema, selection, request.shard.url)
        has_path = selection.key is None and _are_paths_keys(file, images)
        names = frozenset(file.schema.names)
        seen: set[str] = set()
        losses: list[str] = []
        for number, row, num_rows in _row_groups(file, request.shard):
            end, why = row + num_rows, "it ends early"
            try:
                with file.reading():
                    for group in _groups(file, number, images, selection, has_path, row):
                        row += 1
                        request.on_read(sum(map(len, group.fields.values())))
                        sample = _sample_of(group, selection, seen, f"{row - 1:09d}")
                        seen.add(group.key)
                        yield replace(sample, names=names)
            except DamagedFooter as error:
                why = str(error)
            if row < end:
                losses.append(f"{end - row} rows of row group {number} are lost: {why}")
    if not losses:
        return None
    return RejectedSample(None, Reject("read", "corrupt_shard", "; ".join(losses)))


def _row_groups(file: ParquetFile, shard: SourceShard) -> Iterator[tuple[int, int, int]]:
    """Yield index, first row in the file and number of rows of each row group of the shard."""
    part, _, num_parts = (shard.range or "0/1").partition("/")
    first_row = 0
    for number, group in enumerate(file.row_groups):
        start = min((column.start for column in group.columns), default=0)
        if start * int(num_parts) // shard.size_bytes == int(part):
            yield number, first_row, group.num_rows
        first_row += group.num_rows


def _sample_of(
    group: Group, selection: FieldSelection, seen: set[str], row: str
) -> Sample | RejectedSample:
    if group.key:
        return sample_of(group, selection, seen)
    num_images = int(any(name in selection.image for name in group.names))
    reject = Reject("read", "no_key", f"its {selection.key!r} is null or empty")
    return RejectedSample(row, reject, num_images)


def _groups(
    file: ParquetFile,
    number: int,
    image_columns: dict[str, bool],
    selection: FieldSelection,
    has_path: bool,
    row: int,
) -> Iterator[Group]:
    """Yield the fields of each row of a row group that begins at `row`; a null key is empty."""
    key_names = [selection.key] if selection.key else []
    columns = list(dict.fromkeys([*image_columns, *selection.keep, *key_names]))
    for batch in file.batches(number, columns):
        images = {name: _plain(batch.column(name)) for name in image_columns}
        paths = [_paths(images[name]) for name, has_paths in image_columns.items() if has_paths]
        texts = {
            name: _texts(batch.column(name), selection.caption_index) for name in selection.keep
        }
        keys = [_texts(batch.column(name)) for name in key_names]
        for name, array in images.items():
            images[name] = pc.struct_field(array, "bytes") if pt.is_struct(array.type) else array
        for index in range(batch.num_rows):
            path = next((column[index] for column in paths if column[index]), None)
            if keys:
                key = (keys[0][index] or b"").decode("utf-8", "surrogateescape")
            else:
                key = _key_of(path) if path and has_path else f"{row + index:09d}"
            group = Group(key)
            fields: list[tuple[str, Any]] = [(name, images[name][index].as_py()) for name in images]
            fields += [(name, values[index]) for name, values in texts.items()]
            for name, value in fields:
                if value is not None and group.add(name, len(value), selection):
                    group.fields[name] = value
            if path:
                group.names.add("the path of an image elsewhere")
            yield group
        row += batch.num_rows


def _are_paths_keys(file: ParquetFile, image_columns: dict[str, bool]) -> bool:
    """Return whether the paths of images can be keys, those of the first column that has paths."""
    name = next((name for name, has_paths in image_columns.items() if has_paths), None)
    if name is None:
        return False
    seen: set[int] = set()
    for number in range(len(file.row_groups)):
        try:
            with file.reading():
                for batch in file.batches(number, [f"{name}.path"], _PATHS_AT_ONCE):
                    for path in _paths(_plain(batch.column(name))):
                        key = _key_of(path or b"")
                        if not key or hash(key) in seen or key_fault(key):
                            return False
                        seen.add(hash(key))
        except DamagedFooter:
            continue  # the rows of this row group cannot be read either
    return True


def _key_of(path: bytes) -> str:
    return posixpath.splitext(path)[0].decode("utf-8", "surrogateescape")


def _check_columns(schema: pa.Schema, selection: FieldSelection, url: str) -> dict[str, bool]:
    """Check that a file has the selected columns, in types that can be read.

    Returns:
        The image columns, and whether they have the paths of images, as in Hugging Face's files.
    """
    names = [name for name in selection.image if name in schema.names]
    if not names:
        raise SourceError(
            f"{url}: no column holds the image: source.image names {', '.join(selection.image)}, "
            f"the file has {', '.join(schema.names)}: correct source.image"
        )
    image_columns = {}
    for name in names:
        kind = _type_of(schema, name, url, "image")
        path = pa.null()
        if pt.is_struct(kind):
            path = kind.field("path").type if kind.get_field_index("path") >= 0 else path
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.int8()
        image_columns[name] = _is_any(path, *_TEXT)
        if not _is_any(kind, *_BINARY, pt.is_null):
            raise SourceError(
                f"{url}: column {name!r} is {schema.field(name).type} and not an image: images are "
                "binary, or struct<bytes: binary, path: string>"
            )
    settings = [("keep", name) for name in selection.keep]
    for setting, name in [*settings, *([("key", selection.key)] if selection.key else [])]:
        kind = _type_of(schema, name, url, setting)
        element = kind.value_type if setting == "keep" and _is_any(kind, *_LISTS) else kind
        if not _is_any(element, *(_KEYS if setting == "key" else (*_SCALARS, pt.is_temporal))):
            raise SourceError(
                f"{url}: column {name!r}, which source.{setting} names, is {kind}: only text, "
                "numbers, dates and lists of them can be read"
            )
    return image_columns


def _type_of(schema: pa.Schema, name: str, url: str, setting: str) -> pa.DataType:
    """Return a column's type, without extension types and dictionaries around it."""
    indices = schema.get_all_field_indices(name)
    if len(indices) != 1:
        has = f"two columns {name!r}" if indices else f"no column {name!r}"
        error = SourceError if indices or setting != "keep" else FieldMissing
        raise error(
            f"{url} has {has}, which source.{setting} names; it has {', '.join(schema.names)}"
        )
    kind = schema.field(indices[0]).type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pt.is_dictionary(kind) else kind


def _is_any(kind: pa.DataType, *checks: Any) -> bool:
    return any(check(kind) for check in checks)


def _plain(array: pa.Array) -> pa.Array:
    """Return a column without extension types and dictionaries around it."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def _paths(images: pa.Array) -> list[bytes | None]:
    return _texts(pc.struct_field(images, "path"))


def _texts(column: pa.Array, list_index: int = 0) -> list[bytes | None]:
    """Return the values of a column as text; of a list, its element at `list_index` if it has one.

    Strings and binary stay as stored. Other scalars have the form of JSON, or ISO 8601 for times.
    """
    array = _plain(column)
    if _is_any(array.type, *_LISTS):
        lists = (scalar.values for scalar in array)
        return [
            None
            if values is None or len(values) <= list_index
            else _texts(values.slice(list_index, 1))[0]
            for values in lists
        ]
    if _is_any(array.type, *_TEXT):
        array = array.cast(pa.large_string()).cast(pa.large_binary())
    return [None if value is None else _as_text(value) for value in array.to_pylist()]


def _as_text(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    return str(value.isoformat() if hasattr(value, "isoformat") else value).encode()
