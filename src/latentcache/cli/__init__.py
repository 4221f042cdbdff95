"""The command line: parse, call, print.

Only typer is imported here at once, so that help and tab completion answer at once; each command
imports what it needs. Results go to stdout, everything else to stderr; with `--json`, stdout gets
exactly one JSON object, or with `status --watch` one each time.
"""

from __future__ import annotations

from latentcache.cli.base import app

# Each import adds its commands, in the order in which help tells of them.
from latentcache.cli import runs, datasets, quality, tools  # noqa: F401  # isort: skip


def main() -> None:
    """Run the command line."""
    app(prog_name="latentcache")
