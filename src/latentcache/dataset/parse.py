"""Parse and check the metadata of a dataset: JSON, paths, hashes and counts.

A malicious dataset has hashes that match. So every object is checked against the annotations of
its dataclass before use. Functions raise `ValueError`; the caller raises a `DatasetError` that
names the file. Readers of a dataset import this module, and Pydantic is slow to import.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

T = TypeVar("T")

MAX_COUNT = 2**53
_MAX_OBJECT_BYTES = 5 * 2**40  # the largest object that S3 stores

# These patterns mean the same in RE2 and in Python's `re`; they have to match whole strings.
SHA256 = "[0-9a-f]{64}"
BUCKET = "[1-9][0-9]{0,6}x[1-9][0-9]{0,6}"
_UNIT_ID = "[0-9a-f]{32}"
UNIT_NAME = rf"{_UNIT_ID}-[0-9]{{1,9}}"
_ATTEMPT = rf"{_UNIT_ID}/[0-9]{{1,9}}-{_UNIT_ID}"
_DATA_PATH = rf"data/{_ATTEMPT}-{BUCKET}(?:\.parquet|\.rows\.parquet|\.safetensors)"
_OTHER_PATH = rf"(?:rejects|qa)/{_ATTEMPT}\.parquet"


class Pattern(NamedTuple):
    """An annotation of text that a regular expression has to match as a whole."""

    regex: str


class Range(NamedTuple):
    """An annotation of a number with a lower and an upper bound, both inclusive."""

    low: float
    high: float


Count = Annotated[int, Range(0, MAX_COUNT)]
NumBytes = Annotated[int, Range(0, _MAX_OBJECT_BYTES)]
Generation = Annotated[int, Range(0, 10**9 - 1)]
UnitId = Annotated[str, Pattern(_UNIT_ID)]
UnitName = Annotated[str, Pattern(UNIT_NAME)]
Sha256 = Annotated[str, Pattern(SHA256)]
BucketName = Annotated[str, Pattern(BUCKET)]
FilePath = Annotated[str, Pattern(f"{_DATA_PATH}|{_OTHER_PATH}")]


def load_json(data: bytes | str) -> Any:
    """Return parsed JSON: UTF-8 without NaN, lone surrogates or deep nesting."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not valid JSON")

    try:
        text = data.decode() if isinstance(data, bytes) else data
        tree = json.loads(text, parse_constant=refuse)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()  # raises for a lone surrogate
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return tree


def build(cls: type[T], tree: Any, *, ignore_unknown: bool = False) -> T:
    """Build an instance of a dataclass from parsed JSON, and check it against the annotations.

    A field annotated as `float` may hold an integer. A class with a method `from_json` parses
    itself.

    Args:
        cls, tree: a dataclass, and the result of `load_json`.
        ignore_unknown: ignore fields that the class does not have, instead of raising an error.
    """
    instance: T = _build(cls, tree, "", ignore_unknown)
    return instance


@lru_cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass by field."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def _build(cls: type, tree: Any, at: str, ignore_unknown: bool = False) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{at or 'it'} is not an object")
    hints = hints_of(cls)
    if not ignore_unknown and (unknown := tree.keys() - hints.keys()):
        raise ValueError(f"{_below(at, min(unknown))} is an unknown field")
    values = {}
    for field in fields(cls):
        if (name := field.name) in tree:
            values[name] = check(hints[name], tree[name], _below(at, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_below(at, name)} is missing")
    return cls(**values)


def _below(at: str, name: Any) -> str:
    return f"{at}.{name!s:.60}" if at else f"{name!s:.60}"


def check(hint: Any, value: Any, at: str) -> Any:
    """Check one value against an annotation; return it with lists as the annotated types.

    Args:
        hint, value, at: the annotation, the parsed JSON, and its name in error messages.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        value = check(args[0], value, at)
        for rule in args[1:]:
            if isinstance(rule, Pattern):
                is_good = re.fullmatch(rule.regex, value, re.ASCII) is not None
            else:
                is_good = rule.low <= value <= rule.high if isinstance(rule, Range) else rule(value)
            if not is_good:
                raise ValueError(f"{at} is {_short(value)}")
        return value
    if origin in (Union, UnionType):  # the only unions are `X | None`
        return None if value is None else check(args[0], value, at)
    if origin in (tuple, list):
        return _check_items(origin, args, value, at)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{at} is {_short(value)}, not an object")
        return {check(args[0], k, at): check(args[1], v, _below(at, k)) for k, v in value.items()}
    if hasattr(hint, "from_json"):
        return hint.from_json(value)
    parse = _build if is_dataclass(hint) else _check_plain
    return parse(hint, value, at)


def _check_items(origin: type, args: tuple[Any, ...], value: Any, at: str) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"{at} is {_short(value)}, not a list")
    if origin is list or args[1:] == (...,):
        args = args[:1] * len(value)
    if len(value) != len(args):
        raise ValueError(f"{at} has {len(value)} values, not {len(args)}")
    return origin(check(arg, item, at) for arg, item in zip(args, value, strict=True))


def _check_plain(hint: type, value: Any, at: str) -> Any:
    """Check a string, a number or a boolean."""
    kinds: tuple[type, ...] = (int, float) if hint is float else (hint,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{at} is {_short(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{at} is a number of more than 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} is {value}")
    return value


def _short(value: Any) -> str:
    text = ascii(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"
