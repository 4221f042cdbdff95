"""`read_columns` gives a text and an int64, or a `Reject`."""

from __future__ import annotations

from pathlib import Path

from fuzz import Target
from latentcache.dataset.columns import columns_of
from latentcache.errors import Reject
from latentcache.images.text_fields import read_columns

COLUMNS = columns_of(["txt", "cls"])


def _seeds(_: Path) -> list[bytes]:
    text = "A cat, 日本 and ü 😀.\r\nTwo lines"
    return [
        *(b"", b"0", b" -9223372036854775808\n", b"9223372036854775807", b"+" + b"0" * 40 + b"1"),
        *(text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), b"caf\xe9 \x80"),
        b"\xfe\xff" + text.encode("utf-16-be"),
    ]


def _check(data: bytes, _: Path) -> str:
    outcomes = []
    for column, name in (("caption", "txt"), ("cls", "cls")):
        value = reject = None
        try:
            value = read_columns({name: data}, COLUMNS)[column]
        except Reject as caught:
            reject = caught
        if reject:
            assert (reject.stage, reject.reason) == ("read", "bad_field")
            assert "\n" not in reject.message
            assert len(reject.message) < 200
            outcomes.append(f"{column} rejected")
            continue
        outcomes.append(column)
        if column == "cls":
            assert isinstance(value, int)
            assert -(2**63) <= value < 2**63
        else:
            assert isinstance(value, str)
            assert "\0" not in value
            assert "\r\n" not in value
            value.encode()
    return ", ".join(outcomes)


TARGET = Target(_seeds, _check, max_growth_mib=8)
