"""The command line: parse, call, print.

Only typer is imported here at once, so that help and tab completion answer at once; each command
imports what it needs. Results go to stdout, everything else to stderr; with `--json`, stdout gets
exactly one JSON object, or with `status --watch` one each time.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from latentcache.config import Config
    from latentcache.dataset.diff import ManifestDiff
    from latentcache.dataset.qa import Gates
    from latentcache.dataset.reader import Dataset
    from latentcache.engine.gc import Garbage
    from latentcache.engine.plan import Plan
    from latentcache.engine.run import RunSummary
    from latentcache.engine.watch import Watched
    from latentcache.log import Level
    from latentcache.quality.qa import Networks
    from latentcache.storage import StorageOptions

P = ParamSpec("P")

app = typer.Typer(
    help="Encode image datasets to KL-f8 latents once, and train from the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(help="The config, a YAML file.", metavar="CONFIG")]
Target = Annotated[
    str,
    typer.Argument(
        help="The dataset's URL, or the config that made it.",
        metavar="URL|CONFIG",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a setting of the config; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _manifest_name(text: str) -> int | str:
    if text != "published" and not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is no manifest: give its number, or `published`")
    return text if text == "published" else int(text)


# `Any`, for Typer takes no union; the parser gives a `ManifestName`.
ManifestNumber = Annotated[
    Any,
    typer.Option(
        "--manifest",
        parser=_manifest_name,
        metavar="N|published",
        help="Its number; the newest complete one if left out.",
    ),
]


class _Stdout:
    """The real stdout: Ray's processes write to file descriptor 1, which is stderr from here on."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self.file = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(2, 1)

    def print(self, text: str) -> None:
        """Print a line; nobody reading is no error."""
        try:
            print(text, file=self.file, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


_stdout: _Stdout | None = None
_log_json = False


def _print(text: str) -> None:
    assert _stdout
    _stdout.print(text)


def _print_json(tree: dict[str, Any]) -> None:
    _print(json.dumps(tree, ensure_ascii=False))


def _progress() -> Progress:
    """A progress bar on stderr, where a person is looking."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _complain(message: str, event: str = "note", level: Level = "warning", **fields: Any) -> None:
    """Say what is amiss on stderr; with --log-json, `event` names it and `fields` go with it."""
    from latentcache.log import one_line, write_json

    if _log_json:
        write_json(event, message, level, **fields)
        return
    lines = [one_line(line) for line in message.split("\n")]
    text = "\n".join(["error: " + lines[0] if event == "error" else lines[0], *lines[1:]])
    print(f"latentcache: {text}", file=sys.stderr, flush=True)


def _command(function: Callable[P, int | None]) -> Callable[P, None]:
    """Make a command: what it returns is the exit code; errors become one line, no traceback."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        global _stdout, _log_json
        from latentcache.errors import LatentCacheError

        _stdout = _Stdout()
        _log_json = bool(kwargs.get("log_json"))
        as_json = bool(kwargs.get("json_"))
        try:
            code = function(*args, **kwargs) or 0
        except LatentCacheError as error:
            _fail(str(error), error.exit_code, as_json)
        except OSError as error:  # of a local file that no store stands before
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", 1, as_json)
        except (KeyboardInterrupt, SystemExit):  # the latter is what Ray makes of SIGTERM
            _fail("interrupted", 1, as_json)
        raise typer.Exit(code)

    return run


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    _complain(message, "error", "error", exit_code=code)
    if as_json:
        _print_json({"status": "error", "error": message, "exit_code": code})
    raise typer.Exit(code)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        from latentcache import __version__

        print(__version__)
        raise typer.Exit


def _is_config(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _locate(target: str, overrides: list[str] | None) -> tuple[str, StorageOptions]:
    """Find the dataset that a URL or a config means."""
    from latentcache.config import load_config
    from latentcache.errors import ConfigError
    from latentcache.storage import StorageOptions, storage_options

    if not _is_config(target):
        if overrides:
            raise ConfigError("--set goes with a config, not with a dataset's URL")
        return target, StorageOptions()
    output = load_config(target, overrides or ()).output
    return output.url, storage_options(output.storage)


@app.command("run")
@_command
def run_command(
    config: ConfigPath,
    set_: Overrides = None,
    retry_rejects: Annotated[
        bool, typer.Option("--retry-rejects", help="Encode units with rejects again.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Make each line on stderr one JSON object.")
    ] = False,
    json_: Json = False,
) -> int:
    """Encode what is left to do. After anything, run it again: it takes up where it stopped."""
    from dataclasses import asdict

    from latentcache.log import write_libraries_as_json

    if log_json:
        write_libraries_as_json()
    parsed = _load(config, set_)
    from latentcache.engine.run import run

    summary = run(parsed, retry_rejects=retry_rejects, log_json=log_json)
    for failure in [] if log_json else summary.failed:  # whose log has had each at its time
        _complain(f"given up: {failure['message']}", "unit_given_up")
    if summary.exit_code == 1:
        again = shlex.join(_argv())
        _complain(f"{summary.status}; the same command goes on: {again}", "incomplete")
    for breach in summary.breaches:
        _complain(f"QA: {breach}", "gate_breached", "error")
    report = None
    is_over = summary.status not in ("interrupted", "skipped")
    if parsed.qa and summary.num_qa_rows and summary.manifest and is_over:
        report = _report_run(parsed, summary)
    if summary.status == "too_many_rejects":
        _complain(
            "too many rejects: look at them with `latentcache inspect`, then mend the source or "
            "raise rejects.max_rate",
            "too_many_rejects",
            "error",
        )
    if json_:
        _print_json(asdict(summary) | {"report": report})
    else:
        _print(
            f"{summary.status}: {summary.num_committed} units encoded, {summary.num_skipped} there "
            f"already, of {summary.num_units}; {summary.num_rows} rows and {summary.num_rejects} "
            f"rejects in manifest {summary.manifest} of {summary.output} "
            f"({summary.elapsed_s:.1f} s)"
        )
        if summary.bottleneck:
            _print(summary.bottleneck)
        if summary.mean_psnr_db is not None:
            _print(f"QA: {summary.num_qa_rows} rows, mean PSNR {summary.mean_psnr_db:.2f} dB")
        if report:
            _print(f"report: {report}")
    return summary.exit_code


def _report_run(config: Config, summary: RunSummary) -> str:
    """Write the report on the manifest that a run ended with; after a breach, name the worst rows.

    A report that is there stays: a manifest never changes, nor does what was seen of it.
    """
    from latentcache.dataset.reader import open_dataset
    from latentcache.engine.run import gates_of
    from latentcache.quality.report import build_report, report_path, write_report
    from latentcache.storage import storage_options

    assert config.qa
    options = storage_options(config.output.storage)
    dataset = open_dataset(config.output.url, summary.manifest, storage=options)
    path = report_path(dataset)
    is_there = dataset.store.exists(path)
    if summary.breaches or not is_there:
        report = build_report(
            dataset, summary.breaches, gates_of(config), decoder=config.qa.decoder
        )
        for line in report.worst_rows if summary.breaches else ():
            _complain(f"QA: {line}", "worst_row")
        if not is_there:
            write_report(report, dataset)
    return str(dataset.store.local_path(path) or dataset.store.url_of(path))


def _argv() -> list[str]:
    return ["latentcache", *sys.argv[1:]]


def _load(path: Path, overrides: list[str] | None) -> Config:
    from latentcache.config import load_config

    return load_config(path, overrides or ())


@app.command("plan")
@_command
def plan_command(
    config: ConfigPath,
    set_: Overrides = None,
    retry_rejects: Annotated[
        bool, typer.Option("--retry-rejects", help="Plan units with rejects again.")
    ] = False,
    calibrate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Encode N of the images, and say what the whole job takes: thousands on a GPU, "
            "a hundred on a CPU.",
            show_default=False,
        ),
    ] = None,
    usd_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="A price, for --calibrate.", show_default=False)
    ] = None,
    usd_per_cpu_hour: Annotated[
        float | None, typer.Option(min=0, help="A price, for --calibrate.", show_default=False)
    ] = None,
    usd_per_gb_month: Annotated[
        float | None,
        typer.Option(min=0, help="Price of the output's storage.", show_default=False),
    ] = None,
    json_: Json = False,
) -> int:
    """Say what `run` would encode, and why. Writes nothing."""
    from dataclasses import asdict

    parsed = _load(config, set_)
    from latentcache.engine.plan import make_plan
    from latentcache.errors import ConfigError

    prices = (usd_per_gpu_hour, usd_per_cpu_hour, usd_per_gb_month)
    if calibrate is None and any(price is not None for price in prices):
        raise ConfigError("prices are for --calibrate: without it nothing is known to price")
    plan = make_plan(parsed, retry_rejects=retry_rejects)
    forecast = None
    if calibrate and plan.pending and not plan.diff:
        from latentcache.engine.calibrate import Prices, make_forecast

        with _progress() as bar:
            bar.add_task(f"encoding {calibrate} images", total=None)
            forecast = make_forecast(parsed, plan, calibrate, Prices(*prices))
    if json_:
        _print_json(
            {
                "num_units": len(plan.units),
                "num_pending": len(plan.pending),
                "num_bytes_pending": plan.num_bytes_pending,
                "sources": asdict(plan.sources),
                "pending": [
                    {
                        "unit": p.unit.id,
                        "source": p.unit.source,
                        "range": p.unit.range,
                        "reason": p.reason,
                    }
                    for p in plan.pending
                ],
                "contract_diff": plan.diff,
                "forecast": asdict(forecast) if forecast else None,
            }
        )
    else:
        _print_plan(plan)
        if forecast:
            _print(forecast.to_text())
        elif calibrate and not plan.diff:
            _print("nothing to calibrate on")
    if plan.diff:
        _complain("the output holds latents made another way; `run` will refuse:")
        for line in plan.diff:
            _complain(f"  {line}")
        return 2
    return 0


def _print_plan(plan: Plan, most: int = 20) -> None:
    for planned in plan.pending[:most]:
        _print(f"{planned.unit.title}  {_bytes(planned.unit.num_bytes)}  {planned.reason}")
    if len(plan.pending) > most:
        _print(f"… and {len(plan.pending) - most} more")
    found = plan.sources
    fate = "kept" if found.on_missing == "keep" else "dropped"
    newest = plan.state.manifest
    _print(
        f"sources: {found.num_new} new, {found.num_changed} changed, {found.num_unchanged} "
        f"unchanged, {found.num_vanished} vanished ({fate}), beside "
        + (f"manifest {newest.number}" if newest else "no manifest yet")
    )
    buckets = ", ".join(f"{width}x{height}" for width, height in plan.contract.transform.buckets)
    channels, *_ = plan.contract.latent_shape((8, 8))
    terms = plan.contract.latents
    _print(
        f"{len(plan.pending)} of {len(plan.units)} units to encode "
        f"({_bytes(plan.num_bytes_pending)} to read) into {plan.output.url}\n"
        f"latents: {terms.posterior}, {channels} channels, {terms.dtype}, {terms.format}; "
        f"buckets: {buckets}"
    )


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@app.command("status")
@_command
def status_command(
    target: Target,
    set_: Overrides = None,
    watch_: Annotated[
        bool,
        typer.Option("--watch", help="Go on until it is complete and no run is at work."),
    ] = False,
    every_s: Annotated[
        float, typer.Option("--every", min=0.1, metavar="SECONDS", help="With --watch: how often.")
    ] = 10.0,
    json_: Json = False,
) -> None:
    """Say how far a dataset is, and who works on it."""
    from dataclasses import asdict

    from latentcache.engine.status import read_status
    from latentcache.engine.watch import watch

    url, options = _locate(target, set_)
    if watch_:
        _show_each(watch(url, options, every_s), url, as_json=json_)
        return
    status = read_status(url, options)
    if json_:
        _print_json(asdict(status))
        return
    _print(
        f"{status.num_committed} of {status.num_units} known units committed, "
        f"{status.num_rows} rows, {status.num_rejects} rejects"
    )
    newest = f"manifests: {', '.join(map(str, status.manifests[-10:])) or 'none yet'}"
    _print(newest + ("" if status.complete else "; the newest is not complete"))
    if status.published is not None:
        _print(f"published: manifest {status.published}")
    if status.bottleneck:
        _print(f"its latest units: {status.bottleneck}")
    for source, message in status.failed.items():
        _print(f"failed: {source}: {message}")
    for active in status.active_runs:
        _print(
            f"running: {active.run} on {active.host} (pid {active.pid}), {active.num_committed} of "
            f"{active.num_units} units, seen {active.age_s:.0f} s ago"
        )


@app.command("diff")
@_command
def diff_command(
    target: Target,
    before: Annotated[
        Any,
        typer.Argument(
            parser=_manifest_name,
            metavar="N",
            help="A manifest's number, or `published`; the complete one before M if left out.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        Any,
        typer.Argument(
            parser=_manifest_name,
            metavar="M",
            help="Likewise; the newest complete one if left out.",
            show_default=False,
        ),
    ] = None,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Say which units and rows came, went or were replaced between two manifests."""
    from dataclasses import asdict

    from latentcache.dataset.diff import diff_manifests

    url, options = _locate(target, set_)
    found = diff_manifests(url, before, after, storage=options)
    if json_:
        _print_json(asdict(found))
    else:
        _print_diff(found)


def _print_diff(found: ManifestDiff, most: int = 20) -> None:
    for kind in ("added", "replaced", "removed"):
        diffs = getattr(found, kind)
        for diff in diffs[:most]:
            gone, come = (sum(u.num_rows for u in units) for units in (diff.before, diff.after))
            rows = f"{gone} -> {come}" if kind == "replaced" else f"{gone + come}"
            _print(f"{kind:9}  {diff.source}  {rows} rows")
        if len(diffs) > most:
            _print(f"… and {len(diffs) - most} more {kind}")
    names = ("before", "added", "replaced", "replacing", "removed", "after")
    _print(f"{'':10}{'units':>10}{'rows':>14}{'rejects':>12}")
    for name in names:
        counts = getattr(found.counts, name)
        number = {"before": found.before, "after": found.after}.get(name)
        label = name if number is None else f"{number:08d}"
        _print(f"{label:10}{counts.num_units:>10}{counts.num_rows:>14}{counts.num_rejects:>12}")


@app.command("publish")
@_command
def publish_command(
    target: Target,
    number: Annotated[
        int | None,
        typer.Argument(
            metavar="N",
            help="The manifest's number; the newest complete one if left out.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go back to an older manifest than the published one.")
    ] = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Let `published.json` name a complete manifest, which readers can ask for as `published`."""
    from dataclasses import asdict

    from latentcache.dataset.publish import publish

    url, options = _locate(target, set_)
    published = publish(url, number, force=force, storage=options)
    if json_:
        _print_json(asdict(published))
    else:
        _print(f"published: manifest {published.manifest}, at {published.published_at}")


@app.command("gc")
@_command
def gc_command(
    target: Target,
    set_: Overrides = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete it; without this, nothing is changed.")
    ] = False,
    keep_last: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Keep no more than the K newest complete manifests, the published one, and those "
            "that readers were given lately; all are kept if left out.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="With --keep-last: keep this one, too; repeatable."),
    ] = None,
    older_than_days: Annotated[
        float, typer.Option(min=0, help="What is younger stays, by the store's clock.")
    ] = 7.0,
    json_: Json = False,
) -> None:
    """Find what no kept manifest names: files of lost attempts, old units, leftovers of kills."""
    from dataclasses import asdict

    from latentcache.engine.gc import collect_garbage

    url, options = _locate(target, set_)
    with _progress() as bar:
        task = bar.add_task("looking", total=None)
        found = collect_garbage(
            url,
            delete=delete,
            keep_last=keep_last,
            keep=keep or (),
            older_than_days=older_than_days,
            storage=options,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    for note in found.notes:
        _complain(note)
    if json_:
        totals = {"num_objects": found.num_objects, "num_bytes": found.num_bytes}
        _print_json(asdict(found) | totals)
    else:
        _print_garbage(found)


def _print_garbage(found: Garbage) -> None:
    from latentcache.dataset.garbage import KINDS

    for kind, objects in found.found.items():
        if objects:
            size = _bytes(sum(each.size_bytes for each in objects))
            _print(f"{len(objects):>8}  {size:>10}  {KINDS[kind]}")
    if found.uploads:
        _print(f"{len(found.uploads):>8}  {'':>10}  multipart uploads that never ended")
    if found.voided:
        _print(f"{len(found.voided):>8}  {'':>10}  units or attempts marked void first")
    did = "deleted" if found.is_deleted else "would delete"
    is_clean = not (found.num_objects or found.uploads)
    hint = "" if found.is_deleted or is_clean else "; --delete does it"
    kept = ", ".join(map(str, found.kept[-10:]))
    more = f"{len(found.kept) - 10} and " if len(found.kept) > 10 else ""
    _print(
        f"{did} {found.num_objects} objects, {_bytes(found.num_bytes)}; kept manifests: "
        f"{more}{kept}{hint}"
    )


def _show_each(found: Iterator[Watched], url: str, *, as_json: bool) -> None:
    """Show each: in place on a terminal, elsewhere a line each. An interrupt is how one ends it."""
    from contextlib import suppress

    from rich.console import Console
    from rich.live import Live

    assert _stdout
    console = Console(file=_stdout.file)
    with suppress(KeyboardInterrupt):
        if as_json or not console.is_terminal:
            for watched in found:
                _print_json(watched.to_json()) if as_json else _print(watched.to_line())
            return
        with Live(console=console, auto_refresh=False) as live:
            for watched in found:
                live.update(watched.to_table(url), refresh=True)


@app.command("verify")
@_command
def verify_command(
    target: Target,
    set_: Overrides = None,
    manifest: ManifestNumber = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only that objects exist in the right size.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mark bad units; the next run encodes them again.")
    ] = False,
    json_: Json = False,
) -> int:
    """Hold a manifest against its objects: existence, size, SHA-256, rows, finite latents."""
    from dataclasses import asdict

    from latentcache.quality.verify import verify

    url, options = _locate(target, set_)
    with _progress() as bar:
        task = bar.add_task("verifying", total=None)
        found = verify(
            url,
            manifest,
            storage=options,
            quick=quick,
            repair=repair,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json_:
        _print_json(asdict(found))
    else:
        for problem in found.problems:
            _print(f"{problem.path or problem.source}: {problem.message}")
        verdict = "ok" if found.ok else f"{len(found.problems)} problems"
        _print(
            f"{verdict}: manifest {found.manifest}, {found.num_units} units, {found.num_files} "
            f"files, {found.num_rows} rows, {found.num_rejects} rejects"
        )
    if found.repaired:
        _complain(f"{len(found.repaired)} units marked; run the config again to encode them")
    elif not found.ok and not repair:
        _complain("`latentcache verify --repair` marks the bad units to be encoded again")
    return 0 if found.ok else 3


@app.command("inspect")
@_command
def inspect_command(
    target: Target,
    set_: Overrides = None,
    manifest: ManifestNumber = None,
    num_rows: Annotated[
        int | None,
        typer.Option("--rows", min=0, help="How many rows to show; 5, in a picture 24."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Decode rows drawn at random into a picture, instead."),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(metavar="URL", help="With --image: a checkpoint other than the encoder's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --image: draws other rows.")] = 0,
    json_: Json = False,
) -> None:
    """Show what a dataset is: contract, totals, buckets, statistics, a few rows and rejects."""
    from latentcache.dataset.reader import open_dataset
    from latentcache.errors import ConfigError
    from latentcache.quality.inspect import describe, render

    if decoder and not image:
        raise ConfigError("--decoder goes with --image")
    url, options = _locate(target, set_)
    dataset = open_dataset(url, manifest, storage=options)
    if image:
        drawn = _draw_rows(dataset, image, num_rows, decoder, _vae_storage(target, set_), seed)
        _print_json(drawn) if json_ else _print(f"{drawn['num_rows']} rows in {image}")
        return
    described = describe(dataset, 5 if num_rows is None else num_rows)
    if json_:
        _print_json(described)
    else:
        _print(render(described))


def _vae_storage(target: str, overrides: list[str] | None) -> StorageOptions:
    """How to reach the VAE, where a config says so."""
    from latentcache.config import load_config
    from latentcache.storage import StorageOptions, storage_options

    if not _is_config(target):
        return StorageOptions()
    return storage_options(load_config(target, overrides or ()).vae.storage)


def _draw_rows(
    dataset: Dataset,
    image: Path,
    num_rows: int | None,
    decoder: str | None,
    storage: StorageOptions,
    seed: int,
) -> dict[str, Any]:
    """Write a contact sheet; see `quality/sheet.py`."""
    from latentcache.errors import ConfigError
    from latentcache.quality.sheet import DEFAULT_NUM_ROWS, load_decoder, save_sheet

    if num_rows == 0:
        raise ConfigError("--rows 0 leaves nothing to draw with --image")
    vae, notes = load_decoder(dataset, decoder, storage)
    for note in notes:
        _complain(note)
    with _progress() as bar:
        task = bar.add_task("decoding", total=None)
        num_drawn = save_sheet(
            dataset,
            vae,
            image,
            num_rows or DEFAULT_NUM_ROWS,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return {"image": str(image), "num_rows": num_drawn, "notes": notes}


@app.command("qa")
@_command
def qa_command(
    target: Target,
    set_: Overrides = None,
    manifest: ManifestNumber = None,
    num_rows: Annotated[
        int, typer.Option("--rows", min=1, help="How many rows to look at, over all buckets.")
    ] = 256,
    num_units: Annotated[
        int,
        typer.Option(
            "--units", min=0, help="Read this many source shards again, not the run's own crops."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Draws other rows.")] = 0,
    checkpoint: Annotated[
        str | None, typer.Option(help="The dataset's VAE; by default where its run found it.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="A checkpoint whose decoder is used; by default the VAE's.")
    ] = None,
    min_psnr_db: Annotated[
        float | None, typer.Option(help="Gate: the mean PSNR, at least.", show_default="15")
    ] = None,
    min_drift_db: Annotated[
        float | None,
        typer.Option(help="Gate: each latent against an fp32 encode, at least.", show_default="30"),
    ] = None,
    max_rejects: Annotated[
        int | None, typer.Option(help="Gate: samples left out, at most.", show_default="any")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the report to this .html (or .json) file.")
    ] = None,
    json_: Json = False,
) -> int:
    """Decode stored latents and hold them against their images; a gate not passed exits 3.

    A config's section `qa` says what decodes and what the gates are, unless options here do.
    """
    import tempfile

    from latentcache.dataset.qa import Gates
    from latentcache.dataset.reader import open_dataset
    from latentcache.quality.qa import Selection, look_again
    from latentcache.quality.report import Looked, build_report, require_writable, save_report

    url, options = _locate(target, set_)
    gates, networks, source_storage = _qa_settings(target, set_, checkpoint, decoder)
    gates = Gates(
        gates.min_psnr_db if min_psnr_db is None else min_psnr_db,
        gates.min_drift_db if min_drift_db is None else min_drift_db,
        gates.max_rejects if max_rejects is None else max_rejects,
    )
    if report:
        require_writable(report)
    dataset = open_dataset(url, manifest, storage=options)
    selection = Selection(num_rows, num_units, seed, source_storage)
    with tempfile.TemporaryDirectory(prefix="latentcache-") as folder:
        with _progress() as bar:
            task = bar.add_task("decoding", total=num_rows)
            look = look_again(
                dataset,
                networks,
                selection,
                gates,
                Path(folder),
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        found = build_report(
            dataset,
            look.breaches,
            gates,
            notes=look.notes,
            decoder=look.decoder,
            looked=Looked(look.store, look.records),
        )
        if report:
            save_report(found, report)
    for note in look.notes:
        _complain(note)
    for breach in look.breaches:
        _complain(f"QA: {breach}")
    if json_:
        _print_json(found.to_json())
    else:
        _print(found.to_text())
    return 3 if look.breaches else 0


def _qa_settings(
    target: str, overrides: list[str] | None, checkpoint: str | None, decoder: str | None
) -> tuple[Gates, Networks, StorageOptions]:
    """Read off a config what measures and what the gates are; the defaults where it has none."""
    from latentcache.config import Qa, Storage
    from latentcache.dataset.qa import Gates
    from latentcache.quality.qa import Networks
    from latentcache.storage import storage_options

    config = _load(Path(target), overrides) if _is_config(target) else None
    qa = config.qa if config and config.qa else Qa()

    networks = Networks(
        checkpoint=checkpoint or (config.vae.checkpoint if config else None),
        checkpoint_storage=storage_options(config.vae.storage if config else Storage()),
        decoder=decoder or qa.decoder,
        decoder_storage=storage_options(qa.storage),
        lpips=(qa.lpips.url, qa.lpips.sha256) if qa.lpips else None,
    )
    source_storage = storage_options(config.source.storage if config else Storage())
    return Gates(qa.min_psnr_db, qa.min_drift_db, qa.max_rejects), networks, source_storage


@app.command("bench-loader")
@_command
def bench_loader_command(
    target: Target,
    set_: Overrides = None,
    manifest: ManifestNumber = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to go on.")] = 10.0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    normalize: Annotated[bool, typer.Option(help="As a model is trained on.")] = True,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="Read only these columns; repeatable.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where files of a remote store are kept.")
    ] = None,
    cache_bytes: Annotated[str, typer.Option(help="How much of them.")] = "100gb",
    json_: Json = False,
) -> None:
    """Measure how fast a training loop would get batches here, if it did nothing else."""
    from dataclasses import asdict

    from latentcache.dataset.shards import TORCH_DTYPES
    from latentcache.errors import ConfigError
    from latentcache.loader.loader import LatentLoader
    from latentcache.loader.measure import measure_loader

    known = {name: kind for name, kind in TORCH_DTYPES.items() if kind.is_floating_point}
    if dtype not in known:
        raise ConfigError(f"--dtype is {dtype!r}; it must be one of {', '.join(known)}")
    url, options = _locate(target, set_)
    make = functools.partial(
        LatentLoader,
        url,
        batch_size=batch_size,
        manifest=manifest,
        tail="pad",  # else a small dataset would have no batch
        dtype=known[dtype],
        normalize=normalize,
        columns=columns,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
        storage=options,
    )
    with _progress() as bar:
        task = bar.add_task("reading", total=seconds)
        speed = measure_loader(make, seconds, lambda passed: bar.update(task, completed=passed))
    if json_:
        _print_json(asdict(speed))
        return
    _print(
        f"{speed.rows_per_s:,.0f} samples/s, {speed.megabytes_per_s:,.0f} MB/s of {dtype}, over "
        f"{speed.num_steps} steps in {speed.elapsed_s:.1f} s\n"
        f"a step of {batch_size}: {speed.step_p50_ms:.2f} ms (median), {speed.step_p99_ms:.2f} ms "
        f"(99%)\n"
        f"first batch after {speed.first_batch_s:.2f} s, manifest read in {speed.open_s:.2f} s; "
        f"resumed in {speed.resume_s:.2f} s"
    )


@app.command("eval")
@_command
def eval_command(config: ConfigPath, set_: Overrides = None, json_: Json = False) -> None:
    """Hold decoders against each other: the model card's table, over images of your own."""
    from contextlib import ExitStack
    from dataclasses import asdict

    from latentcache.config import load_eval_config
    from latentcache.quality.card import render_card
    from latentcache.quality.evaluate import Map, evaluate, plan_evaluation

    parsed = load_eval_config(config, set_ or ())
    plan, compute = plan_evaluation(parsed), parsed.compute
    with ExitStack() as stack:
        run: Map = map
        if compute.num_gpus or compute.num_cpu_actors > 1:
            from latentcache.engine.cluster import Cluster

            cluster = Cluster(compute.num_gpus, compute.num_cpu_actors, None)
            run = stack.enter_context(cluster).map
        bar = _progress()
        task = stack.enter_context(bar).add_task("evaluating", total=None)
        found = evaluate(
            plan, run, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if json_:
        _print_json(asdict(found))
    else:
        _print(f"{render_card(found)}\n\nwritten to {found.output}")


@app.command("schema")
@_command
def schema_command(
    eval_: Annotated[bool, typer.Option("--eval", help="Of a config of `eval`.")] = False,
) -> None:
    """Print the JSON Schema of a config."""
    from latentcache.config import Config, EvalConfig

    kind = EvalConfig if eval_ else Config
    _print(json.dumps(kind.model_json_schema(), indent=2))


@app.command("demo-data")
@_command
def demo_data_command(
    folder: Annotated[Path, typer.Argument(help="Where to write the shards.")],
    shards: Annotated[int, typer.Option(min=1, help="How many shards.")] = 8,
    samples: Annotated[int, typer.Option(min=1, help="Samples in each.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Draws other pictures.")] = 0,
    broken: Annotated[bool, typer.Option(help="Break some samples on purpose.")] = True,
    json_: Json = False,
) -> None:
    """Draw WebDataset shards of varied pictures with captions, some broken on purpose."""
    from dataclasses import asdict

    from latentcache.images.demo_data import write_demo_data

    made = write_demo_data(
        folder, num_shards=shards, samples_per_shard=samples, seed=seed, broken=broken
    )
    if json_:
        _print_json(asdict(made))
    else:
        _print(f"{made.num_samples} samples, {made.num_broken} of them broken, in {folder}")


def main() -> None:
    """Run the command line."""
    app(prog_name="latentcache")


if __name__ == "__main__":
    main()
