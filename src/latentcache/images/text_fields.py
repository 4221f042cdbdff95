"""Convert the text fields of a sample to column values: `text_rules` 1 (docs/format.md)."""

from __future__ import annotations

import codecs
import re
import reprlib
from collections import Counter

from latentcache.dataset.columns import Columns
from latentcache.errors import Reject

# `int()` would also accept "1_000" and other scripts, and fails differently above 4,300 digits.
_INTEGER = re.compile(r"([+-]?)0*([0-9]{1,19})")
_INT64 = range(-(2**63), 2**63)


def read_columns(
    fields: dict[str, bytes], columns: Columns, notes: Counter[str] | None = None
) -> dict[str, str | int | None]:
    """Return the kept columns of a sample. A column is None if the sample lacks its field.

    Args:
        fields, columns: the bytes of each field by name, and the kept columns.
        notes: counts the fields that a fallback decoded: `text_as_utf16` and `text_as_cp1252`.

    Raises:
        Reject: `bad_field`: a field is not text, or `cls` is not an int64.
    """
    values: dict[str, str | int | None] = {}
    notes = Counter() if notes is None else notes
    for column in columns:
        data = fields.get(column.field)
        if data is None:
            values[column.name] = None
            continue
        try:
            text, fallback = _decode(data)
            values[column.name] = _to_int64(text) if column.name == "cls" else text
        except ValueError as error:  # UnicodeDecodeError is one
            raise Reject("read", "bad_field", f"field {column.field!r}: {error}") from error
        if fallback:
            notes[fallback] += 1
    return values


def _decode(data: bytes) -> tuple[str, str | None]:
    """Decode text; return it with the note of the fallback encoding, if one was used."""
    fallback = None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text, fallback = data.decode("utf-16"), "text_as_utf16"
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text, fallback = data.decode("cp1252"), "text_as_cp1252"
    if "\0" in text:
        raise ValueError("it holds a NUL character: binary data, or UTF-16 without a BOM")
    return text.replace("\r\n", "\n"), fallback


def _to_int64(text: str) -> int:
    match = _INTEGER.fullmatch(text.strip())
    number = int(match[1] + match[2]) if match else None
    if number is None or number not in _INT64:
        raise ValueError(f"{reprlib.repr(text)} is not an integer of 64 bits")
    return number
