"""The command line: parse arguments, call the package, print results.

This package imports only typer at its top, so that help and tab completion are fast. Each command
imports what it needs. Results go to stdout and everything else to stderr. With `--json`, stdout
gets exactly one JSON object, or one per interval with `status --watch`.
"""

from __future__ import annotations

from latentcache.cli.base import app

# Each import registers its commands, in the order in which help lists them.
from latentcache.cli import runs, datasets, quality, tools  # noqa: F401  # isort: skip


def main() -> None:
    """Run the command line."""
    app(prog_name="latentcache")
