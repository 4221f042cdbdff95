"""The columns of a Parquet file from which samples are made, and their values as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from latentcache.errors import FieldMissing, SourceError
from latentcache.images.samples import FieldSelection

_BINARY = (pt.is_binary, pt.is_large_binary, pt.is_binary_view)
_TEXT = (pt.is_string, pt.is_large_string, pt.is_string_view)
_LISTS = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list)
_KEYS = (*_TEXT, pt.is_integer)
_SCALARS = (*_KEYS, *_BINARY, pt.is_null, pt.is_boolean, pt.is_floating, pt.is_decimal)


@dataclass(frozen=True, slots=True)
class SampleColumns:
    """The columns to read: the file's image columns, the kept text columns, and the key's column.

    If `key` is None, `path` is the image column whose `path` is the key. If both are None, the
    number of the row is the key.
    """

    images: Sequence[str]
    texts: Sequence[str]
    key: str | None
    path: str | None = None

    @property
    def names(self) -> list[str]:
        """The names of all columns, each once."""
        return list(dict.fromkeys([*self.images, *self.texts, *([self.key] if self.key else [])]))


def find_columns(schema: pa.Schema, selection: FieldSelection, url: str) -> SampleColumns:
    """Return the columns from which samples are made; `url` names the file in errors.

    Raises:
        FieldMissing: the file lacks a kept column.
        SourceError: the file lacks the key's column, no column holds an image, or a column has a
            type that cannot be read.
    """
    names = [name for name in selection.image if name in schema.names]
    if not names:
        raise SourceError(
            f"{url}: no column holds the image: source.image names {', '.join(selection.image)}, "
            f"the file has {', '.join(schema.names)}: correct source.image"
        )
    for name in names:
        kind = _type_of(schema, name, url, "image")
        if pt.is_struct(kind):
            has_bytes = kind.get_field_index("bytes") >= 0
            kind = kind.field("bytes").type if has_bytes else pa.int8()
        if not _is_any(kind, *_BINARY, pt.is_null):
            raise SourceError(
                f"{url}: column {name!r} is {schema.field(name).type} and not an image: images are "
                "binary, or struct<bytes: binary, path: string>"
            )
    for name in selection.keep:
        kind = _type_of(schema, name, url, "keep")
        element = kind.value_type if _is_any(kind, *_LISTS) else kind
        _require(_is_any(element, *_SCALARS, pt.is_temporal), url, name, "keep", kind)
    if selection.key:
        kind = _type_of(schema, selection.key, url, "key")
        _require(_is_any(kind, *_KEYS), url, selection.key, "key", kind)
    return SampleColumns(names, selection.keep, selection.key)


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


def _require(is_readable: bool, url: str, name: str, setting: str, kind: pa.DataType) -> None:
    if not is_readable:
        raise SourceError(
            f"{url}: column {name!r}, which source.{setting} names, is {kind}: only text, numbers, "
            "dates and lists of them can be read"
        )


def _is_any(kind: pa.DataType, *checks: Any) -> bool:
    return any(check(kind) for check in checks)


def plain(array: pa.Array) -> pa.Array:
    """Return a column without extension types and dictionaries around it."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def has_path(kind: pa.DataType) -> bool:
    """Return whether a column has structs with the path of an image, as in Hugging Face's files."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if not pt.is_struct(kind) or kind.get_field_index("path") < 0:
        return False
    return _is_any(kind.field("path").type, *_TEXT)


def texts_of(column: pa.Array, list_index: int = 0) -> list[bytes | None]:
    """Return the values of a column as text; of a list, its element at `list_index` if it has one.

    Strings and binary are returned as stored. Integers, floats, decimals and booleans have the form
    of JSON, dates and times that of ISO 8601.
    """
    array = plain(column)
    if _is_any(array.type, *_LISTS):
        lists = (scalar.values for scalar in array)
        return [
            None
            if values is None or len(values) <= list_index
            else texts_of(values.slice(list_index, 1))[0]
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
