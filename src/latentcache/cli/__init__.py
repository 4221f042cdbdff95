"""The command line: parse arguments, call the package, print results.

Only typer is imported at the top, so that help and tab completion are fast. Results go to stdout,
all else to stderr. With `--json`, stdout gets one JSON object; with `status --watch`, several.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress

from latentcache.cli.base import app

# Each import registers its commands, in the order in which help lists them.
from latentcache.cli import runs, datasets, quality, tools  # noqa: F401  # isort: skip


def main() -> None:
    """Run the command line without the interpreter's cleanup, which threads of Ray may abort."""
    try:
        app(prog_name="latentcache")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):  # stdout is closed, or its reader has ended
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
