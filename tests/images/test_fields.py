"""Text fields of samples as column values, in every encoding that is read."""

from __future__ import annotations

from collections import Counter

import pytest

from latentcache.dataset.columns import Columns, columns_of
from latentcache.errors import Reject
from latentcache.images.text_fields import read_columns


@pytest.fixture
def columns() -> Columns:
    """A caption, a class and a JSON field."""
    return columns_of(["txt", "cls", "json"])


@pytest.mark.parametrize(
    ("data", "text", "note"),
    [
        (b"plain", "plain", None),
        (b"", "", None),
        ("日本 ü".encode(), "日本 ü", None),
        (b"\xef\xbb\xbfmarked", "marked", None),
        (b"\xef\xbb\xbf", "", None),
        (b"one\r\ntwo\nthree\r", "one\ntwo\nthree\r", None),
        (b" kept spaces \n", " kept spaces \n", None),
        ("日本\r\nü".encode("utf-16"), "日本\nü", "text_as_utf16"),
        (b"\xfe\xff" + "ü😀".encode("utf-16-be"), "ü😀", "text_as_utf16"),
        (b"caf\xe9 \x80\x93", "café €“", "text_as_cp1252"),
    ],
)
def test_text_is_decoded_and_fallbacks_are_counted(
    columns: Columns, data: bytes, text: str, note: str | None
):
    notes: Counter[str] = Counter()
    assert read_columns({"txt": data}, columns, notes)["caption"] == text
    assert notes == ({note: 1} if note else {})


@pytest.mark.parametrize(
    "data",
    [
        b"caf\xe9\x81",  # in cp1252 undefined as well
        b"\xff\xfea",  # half a code unit
        b"\xff\xfe\x00\xd8",  # half a surrogate pair
        b"nul\0inside",
        "no mark".encode("utf-16-le"),
        "utf-32".encode("utf-32"),
    ],
)
def test_undecodable_text_is_a_reject(columns: Columns, data: bytes):
    with pytest.raises(Reject, match="field 'json'") as caught:
        read_columns({"json": data}, columns)
    assert (caught.value.stage, caught.value.reason) == ("read", "bad_field")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"7", 7),
        (b" -7\r\n", -7),
        (b"+0012", 12),
        (b"\xef\xbb\xbf3", 3),
        (b"9223372036854775807", 2**63 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b"0" * 5000 + b"1", 1),
    ],
)
def test_cls_is_parsed_as_int64(columns: Columns, data: bytes, number: int):
    assert read_columns({"cls": data}, columns)["cls"] == number


@pytest.mark.parametrize(
    "data",
    [
        *(b"9223372036854775808", b"-9223372036854775809", b"9" * 5000, b"-" + b"9" * 5000),
        *(b"", b" ", b"seven", b"3.0", b"1e3", b"0x10", b"1_000", b"1 2", b"--1", b"nan", b"true"),
        "٣".encode(),
    ],
)
def test_cls_that_is_no_int64_is_a_reject(columns: Columns, data: bytes):
    with pytest.raises(Reject, match=r"field 'cls': .* is not an integer of 64 bits") as caught:
        read_columns({"cls": data}, columns)
    assert (caught.value.stage, caught.value.reason) == ("read", "bad_field")
    assert len(caught.value.message) < 120


def test_a_missing_field_is_none(columns: Columns):
    assert read_columns({}, columns) == {"caption": None, "cls": None, "json": None}
