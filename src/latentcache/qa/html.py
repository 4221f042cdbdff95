"""Render a report as one HTML file from `templates/report.html` and its CSS, with Jinja.

Keys, messages and URLs are untrusted, so Jinja escapes every value. The page's content security
policy allows neither scripts nor requests. Its pictures are embedded.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Iterator
from typing import Any

import jinja2

from latentcache.log import size_text
from latentcache.qa.row_pictures import (
    ERROR_COLOURS,
    LATENT_COLOURS,
    MAX_ERROR_LEVELS,
    MAX_SIGMAS,
    RowPictures,
    data_uri,
)


def render(
    tree: dict[str, Any], pictures: dict[str, RowPictures], thumbnails: dict[str, bytes]
) -> str:
    """Return a report as HTML.

    Args:
        tree: the text and figures; see `Report.tree`.
        pictures: the pictures of QA rows by the row's `id`.
        thumbnails: the JPEG thumbnails of rejects by the reject's `id`.
    """
    rows = tree["rows"]
    page = _template().render(
        report=tree,
        has_gates=any(gate is not None for gate in tree["gates"].values()),
        worst=[row for row in rows if row["shown_as"] != ["draw"]],
        drifting=[row for row in rows if "drift" in row["shown_as"]],
        drawn=[row for row in rows if row["shown_as"] == ["draw"]],
        drawn_above=[r for r in rows if "draw" in r["shown_as"] and r["shown_as"] != ["draw"]],
        pictures=pictures,
        thumbnails={name: data_uri(data, "jpeg") for name, data in thumbnails.items()},
        contract=list(_leaves(tree["contract"])),
        provenance=list(_leaves(tree["provenance"])),
        text=json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False),
    )
    return page.lstrip()  # the template begins with its macros


@functools.cache
def _template() -> jinja2.Template:
    folder = importlib.resources.files("latentcache.qa") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "fixed": _fixed,
        "percent": lambda value: f"{value:.2%}",
        "bytes": size_text,
    }
    environment.globals |= {
        "css": (folder / "report.css").read_text("utf-8"),
        "error_colours": ", ".join(ERROR_COLOURS),
        "latent_colours": ", ".join(LATENT_COLOURS),
        "max_error_levels": MAX_ERROR_LEVELS,
        "max_sigmas": MAX_SIGMAS,
        "columns_of": lambda num: math.ceil(math.sqrt(num)),
    }
    return environment.from_string((folder / "report.html").read_text("utf-8"))


def _fixed(value: float | None, digits: int = 2) -> str:
    """Return a number with `digits` decimal places; a dash for None."""
    return "—" if value is None else f"{value:,.{digits}f}"


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of each field of a contract."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif name == "buckets":
            yield prefix + name, ", ".join(f"{width}x{height}" for width, height in value)
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)
