"""What commands share: common options, printing, warnings and errors."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from latentcache.config import Config
    from latentcache.log import Level
    from latentcache.storage_options import StorageOptions

# Largest number of similar lines that a command prints.
MAX_LINES = 20

app = typer.Typer(
    help="Encode an image dataset to KL-f8 latents once, then train from the latents.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def manifest_name(text: str) -> int | str:
    """Parse the value of `--manifest`: a number, or `published`."""
    if text != "published" and not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is not a manifest: use its number, or `published`")
    return text if text == "published" else int(text)


ConfigPath = Annotated[Path, Argument(help="Path of the config, a YAML file.", metavar="CONFIG")]
Target = Annotated[
    str,
    Argument(help="URL of a dataset, or path of the config that made it.", metavar="URL|CONFIG"),
]
Overrides = Annotated[
    list[str] | None,
    Option("--set", metavar="A.B=C", help="Override a setting of the config. Repeatable."),
]
Json = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
# `Any`, because Typer accepts no union. The parser returns a `ManifestName`.
ManifestNumber = Annotated[
    Any,
    Option(
        "--manifest",
        parser=manifest_name,
        metavar="N|published",
        help="Manifest to read. Default: the newest complete one.",
    ),
]


# The real stdout, for results: file descriptor 1, to which Ray's processes write, becomes stderr.
stdout: TextIO | None = None
_log_json = False


def _print(text: str) -> None:
    """Print a line of a result. A closed pipe is not an error."""
    assert stdout
    try:
        print(text, file=stdout, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def print_lines(*lines: str) -> None:
    """Print lines of a result; control characters in them are escaped."""
    from latentcache.errors import one_line

    for line in lines:
        _print(one_line(line))


def print_json(tree: dict[str, Any]) -> None:
    """Print a result as one line of JSON; characters that are not printable are escaped."""
    from latentcache.log import redacted

    text = json.dumps(redacted(tree), ensure_ascii=False)
    _print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))


def print_result(result: Any, lines: Iterable[str], as_json: bool) -> None:
    """Print a result as JSON or as text for people.

    Args:
        result, lines, as_json: a dataclass or a dict, its text, and which of the two is printed.
    """
    if as_json:
        print_json(asdict(result) if is_dataclass(result) else result)  # type: ignore[arg-type]
    else:
        print_lines(*lines)


@contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if it is a terminal.

    Args:
        what, total: the text and the number of steps, which the yielded function updates.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def update(done: float, total: float | None = None, what: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield update


def complain(
    message: str, *more: str, event: str = "note", level: Level = "warning", **fields: Any
) -> None:
    """Print a warning or an error on stderr; with --log-json, as one JSON object.

    Args:
        message, more, level, fields: the lines, and the level and more fields of the JSON object.
        event: the name of the event in JSON; "error" also marks the text as an error.
    """
    from latentcache.errors import one_line
    from latentcache.log import write_json

    if _log_json:
        write_json(event, "\n".join([message, *more]), level, **fields)
        return
    lines = ["error: " + message if event == "error" else message, *more]
    print("latentcache: " + "\n".join(map(one_line, lines)), file=sys.stderr, flush=True)


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a command: its result is the exit code, and an error is one line, not a traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        global stdout, _log_json
        from latentcache.errors import ConfigError, LatentCacheError
        from latentcache.startup import start_process

        start_process()
        sys.stdout.flush()
        stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(2, 1)
        _log_json = bool(kwargs.get("log_json"))
        as_json = bool(kwargs.get("json_"))
        try:
            for name, value in kwargs.items():
                if isinstance(value, float) and not math.isfinite(value):
                    option = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{option} is {value}: it must be a finite number")
            code = function(*args, **kwargs) or 0
        except LatentCacheError as error:
            _fail(error.args, error.exit_code, as_json)
        except OSError as error:  # a local file that is not read through a store
            where = f"{error.filename}: " if error.filename else ""
            _fail([f"{where}{error.strerror or error}"], 1, as_json)
        except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into the latter
            _fail(["interrupted"], 1, as_json)
        raise typer.Exit(code)

    return run


def _fail(lines: Sequence[str], code: int, as_json: bool) -> NoReturn:
    complain(*lines, event="error", level="error", exit_code=code)
    if as_json:
        print_json({"status": "error", "error": "\n".join(lines), "exit_code": code})
    raise typer.Exit(code)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        from latentcache import __version__

        print(__version__)
        raise typer.Exit


def locate(target: str, overrides: list[str] | None) -> tuple[str, StorageOptions, Config | None]:
    """Return the URL of a dataset, how to reach it, and its config if the target is one.

    Args:
        target, overrides: the URL or the config, and the `--set` options of a config.
    """
    from latentcache.config import load_config
    from latentcache.errors import ConfigError
    from latentcache.storage_options import StorageOptions

    if not target.endswith((".yaml", ".yml")):
        if overrides:
            raise ConfigError("--set needs a config, not the URL of a dataset")
        return target, StorageOptions(), None
    config = load_config(target, overrides or ())
    return config.output.url, config.output.storage, config
