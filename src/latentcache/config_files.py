"""Read config files, apply `--set` overrides, and explain mistakes in terms of the settings."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from latentcache.errors import ConfigError, redact
from latentcache.urls import shown
from latentcache.yaml_files import parse_yaml, read_yaml

# Largest number of names in the path of an override. No section is nested as deeply.
_MAX_SECTIONS = 8
_UNION_MEMBERS = ("int", "str", "constrained-int", "RatioBuckets")

FileT = TypeVar("FileT", bound=BaseModel)


def read_config(kind: type[FileT], path: str | Path, overrides: Sequence[str]) -> FileT:
    """Read a YAML file as a config.

    Args:
        kind, path, overrides: `Config` or `EvalConfig`, its file, and settings `a.b=c` (c is YAML).
    """
    tree = read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    return parse_tree(kind, tree, str(path))


def parse_tree(kind: type[FileT], tree: Any, origin: str) -> FileT:
    """Check a tree of dicts and lists as a config.

    Args:
        kind, tree, origin: `Config` or `EvalConfig`, the content of its file, and the file's name.

    Raises:
        ConfigError: values are wrong. The message has one line per mistake with its dotted path
            and, for an unknown name, the nearest valid one.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = _explain(error, kind)
        raise ConfigError(*(f"{origin}: {line}" for line in lines)) from None


def _apply(tree: Any, override: str) -> None:
    path, equals, text = override.partition("=")
    names = path.split(".")
    if not equals or not all(names) or len(names) > _MAX_SECTIONS:
        raise ConfigError(f"--set {shown(override)}: write it as a.b=value")
    value = parse_yaml(text, f"--set {path}: the value")
    for name in names[:-1]:
        if not isinstance(tree, dict):
            break
        # Copy the dict, because with a YAML alias two sections share it, and only one is meant.
        tree[name] = {} if tree.get(name) is None else copy.copy(tree[name])
        tree = tree[name]
    if not isinstance(tree, dict):
        raise ConfigError(f"--set {shown(path)} is not a path through sections of the config")
    tree[names[-1]] = value


def _explain(error: ValidationError, kind: type[BaseModel]) -> Iterator[str]:
    mistakes: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for mistake in error.errors():
        # Pydantic adds the attempted member of a union to the path. A config has no such level.
        names = (name for name in map(str, mistake["loc"]) if name not in _UNION_MEMBERS)
        path = tuple(name for name in names if "[" not in name and "(" not in name)
        mistakes.setdefault(path, []).append(mistake)
    for path, here in mistakes.items():
        # A union reports an error per member. The member with the deepest path was meant.
        if not any(other[: len(path)] == path != other for other in mistakes):
            own = [mistake for mistake in here if mistake["type"] == "value_error"]
            reasons = dict.fromkeys(_reason(mistake, path, kind) for mistake in own or here)
            yield f"{'.'.join(path) or '(whole file)'}: {' or '.join(reasons)}"


def _reason(mistake: ErrorDetails, path: tuple[str, ...], kind: type[BaseModel]) -> str:
    message = mistake["msg"]
    if mistake["type"] == "value_error":  # raised by a check of this package
        return message.removeprefix("Value error, ")
    if mistake["type"] == "missing":
        return "required, but missing"
    if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _names_at(kind, path[:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        if nearest:
            return f"unknown setting; did you mean {nearest[0]!r}?"
        return f"unknown setting; this section has: {', '.join(known)}"
    if mistake["type"] in ("model_type", "dict_type", "dataclass_type"):
        is_file = f"a config is a mapping with the settings {', '.join(_names_at(kind, ()))}"
        message = "must be a section with settings" if path else is_file
    return f"{message[:1].lower()}{message[1:]}{_got(mistake['input'], path)}"


def _got(value: Any, path: Sequence[str]) -> str:
    """Return the wrong value for a message, if it is short and not a credential."""
    if "storage" in path:  # users may have put credentials here
        return ""
    if isinstance(value, str):
        return f" (got {redact(value)!r:.60})"
    if isinstance(value, float | None) or (isinstance(value, int) and value.bit_length() < 64):
        return f" (got {value!r:.60})"
    return f" (got a {'mapping' if isinstance(value, dict) else type(value).__name__})"


def _names_at(kind: Any, path: Sequence[str]) -> list[str]:
    """Return the names of the settings at a path, in all members of a union."""
    fields = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", None)
    if fields is None:
        return [name for member in get_args(kind) for name in _names_at(member, path)]
    if not path:
        return list(fields)
    # An index follows the name of a list.
    rest = path[2:] if path[1:2] and path[1].isdecimal() else path[1:]
    return _names_at(getattr(fields.get(path[0]), "annotation", None), rest)
