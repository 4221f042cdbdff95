"""The kept columns of rows: which fields of a sample they are read from.

They belong to a unit's rows, not to the contract: other columns need no other latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """One kept column: its `name` in the rows, and the `field` of a sample that it is read from."""

    name: str
    field: str


Columns = tuple[Column, ...]
"""The kept columns of rows, sorted by name: their order means nothing."""


def columns_of(keep: Iterable[str]) -> Columns:
    """Return the columns of a config's `source.keep`: `txt` becomes `caption`, others keep names.

    Args:
        keep: names of fields, each once.
    """
    columns = (Column("caption" if name == "txt" else name, name) for name in keep)
    return tuple(sorted(columns, key=lambda column: column.name))


def describe_columns(columns: Columns) -> str:
    """Return the columns as `source.keep` names them: `[txt, json]`; `[]` for none."""
    return f"[{', '.join(column.field for column in columns)}]"


def require_columns(columns: Columns) -> None:
    """Raise `ValueError` unless columns are sorted by name, each once."""
    names = [column.name for column in columns]
    if names != sorted(set(names)):
        raise ValueError("columns are not sorted by name, or name one twice")
