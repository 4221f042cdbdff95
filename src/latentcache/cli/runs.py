"""Commands for runs: `run`, `plan`, `status`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from latentcache.cli.base import (
    ConfigPath,
    Json,
    Overrides,
    Target,
    app,
    command,
    complain,
    load,
    locate,
    print_json,
    print_line,
    print_text,
    progress_bar,
    stdout_console,
)

if TYPE_CHECKING:
    from latentcache.config import Config
    from latentcache.dataset.rejects import RejectReason
    from latentcache.engine.plan import Plan
    from latentcache.engine.summary import RunSummary
    from latentcache.engine.watch import Watched


@app.command("run")
@command
def run_command(
    config: ConfigPath,
    set_: Overrides = None,
    retry_rejects: Annotated[
        bool, typer.Option("--retry-rejects", help="Encode units that have rejects again.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Print each line on stderr as one JSON object.")
    ] = False,
    json_: Json = False,
) -> int:
    """Encode the units that are not done yet. After an interruption, run it again to resume."""
    from dataclasses import asdict

    from latentcache.log import write_libraries_as_json

    if log_json:
        write_libraries_as_json()
    parsed = load(config, set_)
    from latentcache.engine.run import run

    summary = run(parsed, retry_rejects=retry_rejects, log_json=log_json)
    for failure in (
        [] if log_json else summary.failed
    ):  # with --log-json, each was logged when it happened
        complain(f"unit given up: {failure['message']}", event="unit_given_up")
    if summary.exit_code == 1:
        again = shlex.join(_argv())
        status = summary.status.capitalize()
        complain(f"{status}. To resume, run: {again}", event="incomplete")
    for breach in summary.breaches:
        complain(f"QA: {breach}", event="gate_breached", level="error")
    report = None
    is_over = summary.status not in ("interrupted", "skipped")
    if parsed.qa and summary.num_qa_rows and summary.manifest and is_over:
        report = _report_run(parsed, summary)
    if summary.num_other_columns:
        complain(
            f"another run committed {summary.num_other_columns} units with different kept columns: "
            "use the same source.keep in both configs, then run again",
            event="other_columns",
            level="error",
        )
    if summary.status == "no_rows":
        complain(
            "no rows: every sample was rejected, or the source has no samples; to see the rejects, "
            f"run `latentcache inspect --manifest {summary.manifest}`, then fix the source or the "
            "config",
            event="no_rows",
            level="error",
        )
    if summary.status == "too_many_rejects":
        complain(
            f"too many rejects: {summary.num_rejects} of "
            f"{summary.num_rows + summary.num_rejects} samples; to see them, run `latentcache "
            f"inspect --manifest {summary.manifest}`, then fix the source or raise "
            "rejects.max_rate",
            event="too_many_rejects",
            level="error",
        )
    if json_:
        print_json(asdict(summary) | {"report": report})
    else:
        print_line(
            f"{summary.status}: {summary.num_committed} units encoded, {summary.num_skipped} of "
            f"{summary.num_units} already done; {summary.num_rows} rows and {summary.num_rejects} "
            f"rejects in manifest {summary.manifest} of {summary.output} "
            f"({summary.elapsed_s:.1f} s)"
        )
        if summary.num_extra_images:
            print_line(
                f"{summary.num_extra_images} of {summary.num_images} images are extra images of "
                "a sample, such as masks, and were not encoded"
            )
        _print_reasons(summary.reject_reasons)
        if summary.bottleneck:
            print_line(summary.bottleneck)
        if summary.mean_psnr_db is not None:
            print_line(f"QA: {summary.num_qa_rows} rows, mean PSNR {summary.mean_psnr_db:.2f} dB")
        if report:
            print_line(f"report: {report}")
    return summary.exit_code


def _report_run(config: Config, summary: RunSummary) -> str:
    """Write the report on the last manifest of a run; after a breach, print the worst rows.

    An existing report stays, because neither a manifest nor its QA results ever change.
    """
    from latentcache.dataset.reader import open_dataset
    from latentcache.qa.gates import Gates
    from latentcache.qa.report import build_report, report_path

    assert config.qa
    options = config.output.storage
    dataset = open_dataset(config.output.url, summary.manifest, storage=options)
    path = report_path(dataset)
    is_there = dataset.store.exists(path)
    if summary.breaches or not is_there:
        report = build_report(
            dataset, summary.breaches, Gates.of(config.qa), decoder=config.qa.decoder
        )
        for line in report.worst_rows if summary.breaches else ():
            complain(f"QA: {line}", event="worst_row")
        if not is_there:
            report.put(dataset)
    return str(dataset.store.local_path(path) or dataset.store.url_of(path))


def _print_reasons(reasons: list[RejectReason]) -> None:
    for reason in reasons:
        print_line(f"rejected: {reason.to_text()}")


def _argv() -> list[str]:
    return ["latentcache", *sys.argv[1:]]


@app.command("plan")
@command
def plan_command(
    config: ConfigPath,
    set_: Overrides = None,
    retry_rejects: Annotated[
        bool, typer.Option("--retry-rejects", help="Plan units that have rejects again.")
    ] = False,
    calibrate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Encode N images and estimate the time and cost of the whole run. Use thousands "
            "on a GPU, a hundred on a CPU.",
            show_default=False,
        ),
    ] = None,
    usd_per_gpu_hour: Annotated[
        float | None,
        typer.Option(min=0, help="Price of a GPU hour, for --calibrate.", show_default=False),
    ] = None,
    usd_per_cpu_hour: Annotated[
        float | None,
        typer.Option(min=0, help="Price of a CPU hour, for --calibrate.", show_default=False),
    ] = None,
    usd_per_gb_month: Annotated[
        float | None,
        typer.Option(
            min=0, help="Price of storing a GB for a month, for --calibrate.", show_default=False
        ),
    ] = None,
    json_: Json = False,
) -> int:
    """List the units that `run` would encode, and why. It writes nothing."""
    from dataclasses import asdict

    parsed = load(config, set_)
    from latentcache.engine.plan import make_plan
    from latentcache.errors import ConfigError

    prices = (usd_per_gpu_hour, usd_per_cpu_hour, usd_per_gb_month)
    if calibrate is None and any(price is not None for price in prices):
        raise ConfigError("prices need --calibrate, which estimates the run")
    plan = make_plan(parsed, retry_rejects=retry_rejects)
    forecast = None
    if calibrate and plan.to_encode and not plan.diff:
        from latentcache.engine.forecast import Prices, make_forecast

        with progress_bar() as bar:
            bar.add_task(f"encoding {calibrate} images", total=None)
            forecast = make_forecast(parsed, plan, calibrate, Prices(*prices))
    if json_:
        print_json(
            {
                "num_units": len(plan.units),
                "num_pending": len(plan.pending),
                "num_rewrites": len(plan.to_rewrite),
                "num_bytes_pending": plan.num_bytes_pending,
                "num_images": plan.num_images,
                "num_bytes_rewritten": plan.num_bytes_rewritten,
                "sources": asdict(plan.sources),
                "pending": [
                    {
                        "unit": p.unit.id,
                        "source": p.unit.source,
                        "range": p.unit.range,
                        "kind": p.kind,
                        "reason": p.reason,
                    }
                    for p in plan.pending
                ],
                "sources_twice": asdict(plan.duplicates) if plan.duplicates else None,
                "contract_diff": plan.diff,
                "forecast": asdict(forecast) if forecast else None,
            }
        )
    else:
        _print_plan(plan)
        if forecast:
            print_text(forecast.to_text())
        elif calibrate and not plan.diff:
            print_line("no units to calibrate on")
    if plan.duplicates:
        complain(plan.duplicates.to_text())
    if plan.diff:
        complain(f"{plan.output.url} was created with different settings; `run` will refuse:")
        for line in plan.diff:
            complain(f"  {line}")
        return 2
    return 0


def _print_plan(plan: Plan, most: int = 20) -> None:
    from latentcache.log import size_text

    for planned in plan.pending[:most]:
        print_line(f"{planned.unit.title}  {size_text(planned.unit.num_bytes)}  {planned.reason}")
    if len(plan.pending) > most:
        print_line(f"… and {len(plan.pending) - most} more")
    found = plan.sources
    fate = "kept" if found.on_missing == "keep" else "dropped"
    newest = plan.state.manifest
    print_line(
        f"sources: {found.num_new} new, {found.num_changed} changed, {found.num_unchanged} "
        f"unchanged, {found.num_vanished} vanished ({fate}), compared with "
        + (f"manifest {newest.number}" if newest else "an empty dataset")
    )
    buckets = ", ".join(f"{width}x{height}" for width, height in plan.contract.transform.buckets)
    channels, *_ = plan.contract.latent_shape((8, 8))
    terms = plan.contract.latents
    num_bytes = sum(planned.unit.num_bytes for planned in plan.to_encode)
    images = "" if plan.num_images is None else f"; {plan.num_images} image files in total"
    _print_rewrites(plan)
    print_line(
        f"{len(plan.to_encode)} of {len(plan.units)} units to encode "
        f"({size_text(num_bytes)} to read{images}) into {plan.output.url}"
    )
    print_line(
        f"latents: {terms.posterior}, {channels} channels, {terms.dtype}, {terms.format}; "
        f"buckets: {buckets}"
    )


def _print_rewrites(plan: Plan) -> None:
    """Print what a change of `source.keep` costs, by the present columns of the units."""
    from collections import Counter

    from latentcache.log import size_text

    reasons = Counter(planned.reason for planned in plan.to_rewrite)
    for reason, number in reasons.items():
        print_line(
            f"{number} units: {reason}: rows are rewritten with the stored latents, not encoded"
        )
    if reasons:
        num_bytes = sum(planned.unit.num_bytes for planned in plan.to_rewrite)
        print_line(
            f"rewriting reads {size_text(num_bytes)} of source and "
            f"{size_text(plan.num_bytes_rewritten)} of latents, and writes the latents again"
        )


@app.command("status")
@command
def status_command(
    target: Target,
    set_: Overrides = None,
    watch_: Annotated[
        bool,
        typer.Option("--watch", help="Repeat until the dataset is complete and no run is active."),
    ] = False,
    every_s: Annotated[
        float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Interval of --watch.")
    ] = 10.0,
    json_: Json = False,
) -> None:
    """Show the progress of a dataset and its active runs."""
    from dataclasses import asdict

    from latentcache.engine.status import read_status
    from latentcache.engine.watch import watch

    url, options = locate(target, set_)
    if watch_:
        _show_each(watch(url, options, every_s), url, as_json=json_)
        return
    status = read_status(url, options)
    if json_:
        print_json(asdict(status))
        return
    print_line(
        f"{status.num_committed} of {status.num_units} known units committed, "
        f"{status.num_rows} rows, {status.num_rejects} rejects"
    )
    _print_reasons(status.reject_reasons)
    newest = f"manifests: {', '.join(map(str, status.manifests[-10:])) or 'none yet'}"
    print_line(newest + ("" if status.complete else "; the newest is not complete"))
    if status.published is not None:
        print_line(f"published: manifest {status.published}")
    if status.bottleneck:
        print_line(f"{status.bottleneck} (latest units)")
    for source, message in status.failed.items():
        print_line(f"failed: {source}: {message}")
    for active in status.active_runs:
        print_line(
            f"running: {active.run} on {active.host} (pid {active.pid}), {active.num_committed} of "
            f"{active.num_units} units, seen {active.age_s:.0f} s ago"
        )
    if status.gc_at_work:
        print_line("gc is active")


def _show_each(found: Iterator[Watched], url: str, *, as_json: bool) -> None:
    """Show each status: in place on a terminal, one line each elsewhere. Ctrl-C ends it."""
    from contextlib import suppress

    from rich.live import Live

    console = stdout_console()
    with suppress(KeyboardInterrupt):
        if as_json or not console.is_terminal:
            for watched in found:
                print_json(watched.to_json()) if as_json else print_line(watched.to_line())
            return
        with Live(console=console, auto_refresh=False) as live:
            for watched in found:
                live.update(watched.to_table(url), refresh=True)
