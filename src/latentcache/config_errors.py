"""Explain the mistakes in a config in terms of its settings instead of Pydantic's."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from latentcache.errors import redact


def explain(error: ValidationError, kind: type[BaseModel]) -> Iterable[str]:
    """Yield one line per wrong setting. It begins with the setting's dotted path.

    Args:
        error: what Pydantic raised.
        kind: `Config` or `EvalConfig`.
    """
    reasons: dict[str, list[str]] = {}
    explained: dict[str, list[str]] = {}
    for mistake in error.errors():
        names = [str(part) for part in mistake["loc"]]
        # Pydantic adds the attempted member of a union to the path. A config has no such level.
        dotted = ".".join(n for n in names if not _is_union_member(n)) or "(whole file)"
        into = explained if mistake["type"] == "explained" else reasons
        into.setdefault(dotted, []).append(_reason(mistake, names, kind))
    # If one member of a union has an explanation, the messages of the others do not matter.
    reasons |= {dotted: list(dict.fromkeys(found)) for dotted, found in explained.items()}
    for dotted, found in reasons.items():
        # A union reports an error per member. The member with the deepest path was meant.
        if not any(other.startswith(f"{dotted}.") for other in reasons):
            yield f"{dotted}: {' or '.join(found)}"


def _reason(mistake: ErrorDetails, names: Sequence[str], kind: type[BaseModel]) -> str:
    if mistake["type"] == "missing":
        return "required, but missing"
    if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _field_names(names[:-1], kind)
        nearest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        if nearest:
            return f"unknown setting; did you mean {nearest[0]!r}?"
        return f"unknown setting; this section has: {', '.join(known)}"
    if mistake["type"] in ("model_type", "dict_type", "dataclass_type"):
        return f"must be a section with settings{_got(mistake['input'], names)}"
    if mistake["type"] == "explained":
        return mistake["msg"]
    message = mistake["msg"].removeprefix("Value error, ")
    if isinstance(mistake["input"], dict):  # a rule about several settings
        return message
    return f"{message[:1].lower()}{message[1:]}{_got(mistake['input'], names)}"


def _got(value: Any, names: Sequence[str]) -> str:
    """Return the wrong value for a message, if it is short and not a credential."""
    if "storage" in names:  # users may have put credentials here
        return ""
    if isinstance(value, str):
        return f" (got {redact(value)!r:.60})"
    if isinstance(value, bool | float | None) or _is_short(value):
        return f" (got {value!r:.60})"
    return f" (got a {'mapping' if isinstance(value, dict) else type(value).__name__})"


def _is_short(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() < 64


def _is_union_member(name: str) -> bool:
    return any(m in name for m in "[(") or name in ("int", "str", "constrained-int", "RatioBuckets")


def _field_names(path: Sequence[str], kind: type[BaseModel]) -> list[str]:
    """Return the names of the fields of the section at a path."""
    sections = [_settings(kind)]
    for name in path:
        if not name.isdigit() and not _is_union_member(name):
            found = [section[name] for section in sections if name in section]
            sections = [part for annotation in found for part in _sections(annotation)]
    return [name for section in sections for name in section]


def _settings(kind: Any) -> dict[str, Any]:
    """Return the annotations of a section's settings, by name."""
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return {field.name: field.type for field in dataclasses.fields(kind)}


def _sections(annotation: Any) -> list[dict[str, Any]]:
    """Return the sections that a field may hold: alone, in a list, or as one of a union."""
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    ):
        return [_settings(annotation)]
    return [section for part in get_args(annotation) for section in _sections(part)]
