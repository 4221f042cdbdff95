"""The kept columns of rows, and the sample fields that they are read from.

Columns belong to the rows of a unit, not to the contract, because they do not affect latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, TypeAlias


@dataclass(frozen=True, slots=True)
class Column:
    """A kept column: its `name` in the rows, and the sample `field` that it is read from."""

    name: str
    field: str


def _require_sorted(columns: tuple[Column, ...]) -> bool:
    names = [column.name for column in columns]
    if names != sorted(set(names)):
        raise ValueError("columns are not sorted by name, or contain a duplicate")
    return True


Columns: TypeAlias = Annotated[tuple[Column, ...], _require_sorted]
"""The kept columns of rows, sorted by name because their order has no meaning."""


def columns_of(keep: Iterable[str]) -> Columns:
    """Return the columns of distinct fields; `txt` becomes `caption`, others keep their names."""
    columns = (Column("caption" if name == "txt" else name, name) for name in keep)
    return tuple(sorted(columns, key=lambda column: column.name))


def describe_columns(columns: Columns) -> str:
    """Return the columns as `source.keep` names them: `[txt, json]`; `[]` for none."""
    return f"[{', '.join(column.field for column in columns)}]"
