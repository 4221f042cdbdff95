"""Parse and check the metadata of a dataset: JSON, paths, hashes and counts.

A dataset may be damaged or malicious, and its hashes may match nevertheless. So every object is
checked against the annotations of its dataclass before any code uses it, and every path and hash
must have the form that a writer gives it. All functions raise `ValueError`; the caller raises a
`DatasetError` that names the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

# The largest object that S3 stores: 5 TiB.
MAX_OBJECT_BYTES = 5 * 2**40
MAX_COUNT = 2**53

# These patterns mean the same in RE2 and in Python's `re`. The caller matches whole strings, with
# `fullmatch` or `^(?:…)$`.
UNIT_ID = "[0-9a-f]{32}"
SHA256 = "[0-9a-f]{64}"
UNIT_NAME = rf"{UNIT_ID}-[0-9]{{1,9}}"
BUCKET = "[1-9][0-9]{0,6}x[1-9][0-9]{0,6}"
_ATTEMPT = rf"{UNIT_ID}/[0-9]{{1,9}}-{UNIT_ID}"
DATA_PATH = rf"data/{_ATTEMPT}-{BUCKET}(?:\.parquet|\.rows\.parquet|\.safetensors)"
REJECTS_PATH = rf"rejects/{_ATTEMPT}\.parquet"
QA_PATH = rf"qa/{_ATTEMPT}\.parquet"


class Pattern:
    """An annotation of text that a regular expression has to match as a whole."""

    def __init__(self, pattern: str) -> None:
        self._compiled = re.compile(pattern, re.ASCII)

    def __call__(self, value: str) -> bool:
        """Return whether the expression matches a text."""
        return self._compiled.fullmatch(value) is not None


class Range:
    """An annotation of a number with a lower and an upper bound, both inclusive."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def __call__(self, value: float) -> bool:
        """Return whether a number lies within the bounds."""
        return self._low <= value <= self._high


Count = Annotated[int, Range(0, MAX_COUNT)]
NumBytes = Annotated[int, Range(0, MAX_OBJECT_BYTES)]
Generation = Annotated[int, Range(0, 10**9 - 1)]
UnitId = Annotated[str, Pattern(UNIT_ID)]
UnitName = Annotated[str, Pattern(UNIT_NAME)]
Sha256 = Annotated[str, Pattern(SHA256)]
BucketName = Annotated[str, Pattern(BUCKET)]
FilePath = Annotated[str, Pattern(f"{DATA_PATH}|{REJECTS_PATH}|{QA_PATH}")]


def load_json(data: bytes | str) -> Any:
    """Return parsed JSON of the kind that this package writes.

    It is UTF-8 without NaN, lone surrogates or deep nesting.

    Raises:
        ValueError: `data` is not such JSON.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        tree = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()  # raises for a lone surrogate
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return tree


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def build(cls: type[T], tree: Any, *, ignore_unknown: bool = False) -> T:
    """Build an instance of a dataclass from parsed JSON, and check it against the annotations.

    Values keep their types: a field annotated as `float` may hold an integer. Lists become tuples
    where the annotation is a tuple. A class with a method `from_json` parses itself.

    Args:
        cls: a dataclass.
        tree: the result of `load_json`.
        ignore_unknown: ignore fields that the class does not have, instead of raising an error.

    Raises:
        ValueError: a field is missing, unknown, or has another type or range; the message names it.
    """
    instance = _build(cls, tree, "", ignore_unknown)
    assert isinstance(instance, cls)
    return instance


@lru_cache
def _hints(cls: type) -> dict[str, tuple[Any, bool]]:
    """Return, by field of a dataclass, its annotation and whether it has no default."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)
    }


def _build(cls: type, tree: Any, at: str, ignore_unknown: bool = False) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{at or 'it'} is not an object")
    hints = _hints(cls)
    if not ignore_unknown and (unknown := tree.keys() - hints.keys()):
        raise ValueError(f"{_below(at, min(unknown))} is an unknown field")
    if missing := [name for name, (_, needed) in hints.items() if needed and name not in tree]:
        raise ValueError(f"{_below(at, missing[0])} is missing")
    values = {
        name: check(hint, tree[name], _below(at, name))
        for name, (hint, _) in hints.items()
        if name in tree
    }
    return cls(**values)


def _below(at: str, name: Any) -> str:
    return f"{at}.{name!s:.60}" if at else f"{name!s:.60}"


def check(hint: Any, value: Any, at: str) -> Any:
    """Check one value against an annotation, and return it with its lists as the annotated types.

    Args:
        hint: the annotation.
        value: the value, as `load_json` returns it.
        at: name of the value in error messages.

    Raises:
        ValueError: the value does not match the annotation.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = check(args[0], value, at)
        if not all(test(value) for test in args[1:]):
            raise ValueError(f"{at} is {_short(value)}")
        return value
    if origin in (Union, UnionType):
        return _check_union(args, value, at)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise ValueError(f"{at} is {_short(value)}, not one of {', '.join(map(str, args))}")
        return value
    if origin in (tuple, list):
        return _check_items(origin, args, value, at)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{at} is {_short(value)}, not an object")
        return {check(args[0], k, at): check(args[1], v, _below(at, k)) for k, v in value.items()}
    if hint is Any:
        return value
    if hasattr(hint, "from_json"):
        return hint.from_json(value)
    if is_dataclass(hint):
        return _build(hint, value, at)  # type: ignore[arg-type]
    return _check_plain(hint, value, at)


def _check_union(args: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and NoneType in args:
        return None
    (hint,) = (arg for arg in args if arg is not NoneType)
    return check(hint, value, at)


def _check_items(origin: type, args: tuple[Any, ...], value: Any, at: str) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"{at} is {_short(value)}, not a list")
    if origin is list or args[1:] == (...,):
        return origin(check(args[0], item, at) for item in value)
    if len(value) != len(args):
        raise ValueError(f"{at} has {len(value)} values, not {len(args)}")
    return tuple(check(arg, item, at) for arg, item in zip(args, value, strict=True))


def _check_plain(hint: type, value: Any, at: str) -> Any:
    """Check a string, a number, a boolean or None."""
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
