"""Lines on stderr: plain text for people, or one JSON object a line for a log collector."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from latentcache.errors import redact

Level = Literal["info", "warning", "error"]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def write_json(event: str, message: str, level: Level = "info", **fields: Any) -> None:
    """Write one JSON object in ASCII to stderr, with the time and the redacted arguments.

    Args:
        event, message, level, fields: a stable name, a line for people, and further members.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    tree = {"time": time, "level": level, "event": event, "message": message, **fields}
    # One call writes the whole line, so that the lines of several threads do not mix.
    sys.stderr.write(json.dumps(redacted(tree)) + "\n")
    sys.stderr.flush()


def redacted(tree: Any) -> Any:
    """Return a tree of dicts and lists with the credentials in its texts redacted."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, dict):
        return {redacted(name): redacted(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return tree


def write_libraries_as_json() -> None:
    """Write the warnings and prints of libraries in this process as objects of event `library`."""
    logging.basicConfig(handlers=[_JsonHandler()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    sys.stdout = _Prints()


class _JsonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level: Level = "error" if record.levelno >= logging.ERROR else "warning"
        write_json("library", record.getMessage(), level, logger=record.name)


class _Prints(io.TextIOBase):
    """A replacement of stdout, on which Ray prints coloured messages about lost workers."""

    def write(self, text: str) -> int:
        for line in _COLOURS.sub("", text).splitlines():
            if line.strip():
                write_json("library", line.strip())
        return len(text)


def size_text(num_bytes: int) -> str:
    """Return a number of bytes as text for people: `1.5 MiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
