"""Check the rows of a manifest part by column: a second for a few hundred thousand units.

Every field has the form that `receipts.UnitRecord` declares, because a part repeats records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.parse import (
    BUCKET,
    DATA_PATH,
    MAX_COUNT,
    MAX_OBJECT_BYTES,
    REJECTS_PATH,
    SHA256,
    UNIT_ID,
)

_COUNTS = ("num_samples", "num_rows", "num_rejects", "num_images", "num_extra_images")
_ID_LENGTH = 32


def check_part(table: pa.Table, schema: pa.Schema, columns: Sequence[str] | None) -> None:
    """Raise `ValueError` if a manifest part does not have the form in which a run writes it.

    Args:
        table: the rows that were read.
        schema: the schema of a whole part.
        columns: names of the columns that were requested; None for all.
    """
    for name in schema.names if columns is None else columns:
        if (
            name not in table.column_names
            or table.schema.field(name).type != schema.field(name).type
        ):
            raise ValueError(f"it has no column {name} of type {schema.field(name).type}")
    table.validate(full=True)  # this also checks that text is UTF-8
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    _check_units(arrays["unit"])
    for name in set(table.column_names) & set(_COUNTS):
        _check_range(arrays[name], name, MAX_COUNT)
    if "generation" in arrays:
        _check_range(arrays["generation"], "generation", 10**9 - 1)
    if "attempt" in arrays:
        _check_text(arrays["attempt"], "attempt", UNIT_ID)
    for name in set(schema.names) & arrays.keys():
        if pa.types.is_string(arrays[name].type) and arrays[name].null_count:
            raise ValueError(f"{name} is missing")
    ids = pc.struct_field(arrays["unit"], "id")
    if "files" in arrays:
        _check_files(arrays["files"], ids)
    if "rejects" in arrays:
        has_rejects = arrays["rejects"].is_valid()
        rejects = arrays["rejects"].filter(has_rejects)
        _check_file_fields(rejects, "rejects", REJECTS_PATH, "")
        _check_owner(pc.struct_field(rejects, "path"), "rejects", ids.filter(has_rejects))


def _check_units(units: pa.StructArray) -> None:
    _check_text(pc.struct_field(units, "id"), "unit.id", UNIT_ID)
    _check_range(pc.struct_field(units, "size_bytes"), "unit.size_bytes", MAX_COUNT)
    for name in ("source", "version"):
        if pc.struct_field(units, name).null_count:
            raise ValueError(f"unit.{name} is missing")
    part = pc.struct_field(units, "range").drop_null()
    _check_text(part, "unit.range", r"[0-9]{1,9}/[1-9][0-9]{0,8}")


def _check_files(lists: pa.ListArray, ids: pa.Array) -> None:
    if lists.null_count:
        raise ValueError("files is missing")
    files = pc.list_flatten(lists)
    _check_file_fields(files, "files", DATA_PATH, BUCKET)
    paths = pc.struct_field(files, "path")
    _check_owner(paths, "data", ids.take(pc.list_parent_indices(lists)))
    if pc.count_distinct(paths).as_py() < len(paths):
        raise ValueError("files lists a file twice")


def _check_file_fields(files: pa.StructArray, name: str, path: str, bucket: str) -> None:
    _check_text(pc.struct_field(files, "path"), f"{name}.path", path)
    _check_text(pc.struct_field(files, "sha256"), f"{name}.sha256", SHA256)
    _check_text(pc.struct_field(files, "bucket"), f"{name}.bucket", bucket)
    _check_range(pc.struct_field(files, "size_bytes"), f"{name}.size_bytes", MAX_OBJECT_BYTES)
    _check_range(pc.struct_field(files, "num_rows"), f"{name}.num_rows", MAX_COUNT)


def _check_owner(paths: pa.Array, folder: str, ids: pa.Array) -> None:
    start = len(folder) + 1
    owners = pc.utf8_slice_codeunits(paths, start, start + _ID_LENGTH)
    if not _all(pc.equal(owners, ids)):
        raise ValueError(f"a unit lists a file of another unit in {folder}/")


def _check_text(array: pa.Array, name: str, pattern: str) -> None:
    matches = pc.match_substring_regex(array, f"^(?:{pattern})$")
    if array.null_count or not _all(matches):
        wrong = None if array.null_count else array.filter(pc.invert(matches))[0].as_py()
        raise ValueError(f"{name} is {wrong!a:.60}")


def _check_range(array: pa.Array, name: str, high: int) -> None:
    bounds: dict[str, Any] = pc.min_max(array).as_py()
    if array.null_count or (len(array) and not 0 <= bounds["min"] <= bounds["max"] <= high):
        raise ValueError(f"{name} is missing, or not a number from 0 to {high}")


def _all(values: pa.Array) -> bool:
    return bool(pc.all(values, min_count=0).as_py())
