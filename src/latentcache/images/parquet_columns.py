"""The columns of a Parquet file from which samples are made, and their values as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from latentcache.errors import FieldMissing, SourceError
from latentcache.images.samples import (
    Wanted,
)


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


def find_columns(schema: pa.Schema, wanted: Wanted, url: str) -> SampleColumns:
    """Return the columns from which samples are made.

    Args:
        schema: the schema of the file.
        wanted: the fields that the config names.
        url: the URL of the file, for errors.

    Raises:
        FieldMissing: the file lacks a kept column.
        SourceError: the file lacks the key's column, no column holds an image, or a column has a
            type that cannot be read.
    """
    names = [name for name in wanted.image if name in schema.names]
    if not names:
        raise SourceError(
            f"{url}: no column holds the image: source.image names {', '.join(wanted.image)}, the "
            f"file has {', '.join(schema.names)}: correct source.image"
        )
    for name in names:
        kind = _type_of(schema, name, url, "image")
        if pt.is_struct(kind):
            has_bytes = kind.get_field_index("bytes") >= 0
            kind = kind.field("bytes").type if has_bytes else pa.int8()
        if not (_is_binary(kind) or pt.is_null(kind)):
            raise SourceError(
                f"{url}: column {name!r} is {schema.field(name).type} and not an image: images are "
                "binary, or struct<bytes: binary, path: string>"
            )
    for setting, texts in (("keep", wanted.keep), ("key", [wanted.key] if wanted.key else [])):
        for name in texts:
            kind = _type_of(schema, name, url, setting)
            if not _is_readable(kind, is_key=setting == "key"):
                raise SourceError(
                    f"{url}: column {name!r}, which source.{setting} names, is {kind}: only text, "
                    "numbers, dates and lists of them can be read"
                )
    return SampleColumns(names, wanted.keep, wanted.key)


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


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def _is_readable(kind: pa.DataType, *, is_key: bool) -> bool:
    """Return whether values of a type can be converted to text."""
    if _is_text(kind) or pt.is_integer(kind):
        return True
    if is_key:
        return False
    if _is_list(kind):
        return _is_readable(kind.value_type, is_key=False) and not _is_list(kind.value_type)
    return bool(
        _is_binary(kind)
        or pt.is_null(kind)
        or pt.is_boolean(kind)
        or pt.is_floating(kind)
        or pt.is_decimal(kind)
        or pt.is_temporal(kind)
    )


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
    return _is_text(kind.field("path").type)


def texts_of(column: pa.Array, list_index: int) -> list[bytes | None]:
    """Return the values of a column as text.

    Strings and binary are returned as stored. Integers, floats, decimals and booleans have the form
    of JSON, dates and times that of ISO 8601.

    Args:
        column: the column.
        list_index: the index of the element to use if values are lists. The value is None if a list
            is shorter.
    """
    array = plain(column)
    if _is_list(array.type):
        elements = (None if scalar.values is None else scalar.values for scalar in array)
        return [
            None
            if values is None or len(values) <= list_index
            else texts_of(values.slice(list_index, 1), 0)[0]
            for values in elements
        ]
    if _is_text(array.type):
        array = array.cast(pa.large_string()).cast(pa.large_binary())
    values: list[Any] = array.to_pylist()
    return [None if value is None else _as_text(value) for value in values]


def _as_text(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if hasattr(value, "isoformat"):
        return str(value.isoformat()).encode()
    return str(value).encode()
