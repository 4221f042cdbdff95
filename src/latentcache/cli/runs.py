"""Commands for runs: `run`, `plan`, `status`."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from latentcache.cli import base

if TYPE_CHECKING:
    from latentcache.config import Config
    from latentcache.engine.forecast import Forecast
    from latentcache.engine.plan import Plan
    from latentcache.engine.status import Status, Watched
    from latentcache.engine.summary import RunSummary


@base.app.command("run")
@base.command
def run_command(
    config: base.ConfigPath,
    set_: base.Overrides = None,
    retry_rejects: Annotated[
        bool, Option("--retry-rejects", help="Encode units that have rejects again.")
    ] = False,
    log_json: Annotated[
        bool, Option("--log-json", help="Print each line on stderr as one JSON object.")
    ] = False,
    json_: base.Json = False,
) -> int:
    """Encode the units that are not done yet. After an interruption, run it again to resume."""
    from dataclasses import asdict

    from latentcache.config import load_config
    from latentcache.log import write_libraries_as_json

    if log_json:
        write_libraries_as_json()
    parsed = load_config(config, set_ or ())
    from latentcache.engine.run import run

    summary = run(parsed, retry_rejects=retry_rejects, log_json=log_json)
    if not log_json:  # with --log-json, each failure was logged when it happened
        for failure in summary.failed:
            base.complain(f"unit given up: {failure['message']}", event="unit_given_up")
    if summary.exit_code == 1:
        again = shlex.join(["latentcache", *sys.argv[1:]])
        status = summary.status.capitalize()
        base.complain(f"{status}. To resume, run: {again}", event="incomplete")
    for breach in summary.breaches:
        base.complain(f"QA: {breach}", event="gate_breached", level="error")
    report = None
    is_over = summary.status not in ("interrupted", "skipped")
    if parsed.qa and summary.num_qa_rows and summary.manifest and is_over:
        report = _report_run(parsed, summary)
    _complain_of(summary)
    base.print_result(asdict(summary) | {"report": report}, _summary_lines(summary, report), json_)
    return summary.exit_code


def _complain_of(summary: RunSummary) -> None:
    """Print why a run is not a success, and what to do."""
    inspect = f"run `latentcache inspect --manifest {summary.manifest}`, then fix the source or"
    problems = {}
    if summary.num_other_columns:
        problems["other_columns"] = (
            f"another run committed {summary.num_other_columns} units with different kept columns: "
            "use the same source.keep in both configs, then run again"
        )
    if summary.status == "no_rows":
        problems["no_rows"] = (
            "no rows: every sample was rejected, or the source has no samples; to see the rejects, "
            f"{inspect} the config"
        )
    if summary.status == "too_many_rejects":
        num_samples = summary.num_rows + summary.num_rejects
        problems["too_many_rejects"] = (
            f"too many rejects: {summary.num_rejects} of {num_samples} samples; to see them, "
            f"{inspect} raise rejects.max_rate"
        )
    for event, message in problems.items():
        base.complain(message, event=event, level="error")


def _summary_lines(summary: RunSummary, report: str | None) -> Iterator[str]:
    yield (
        f"{summary.status}: {summary.num_committed} units encoded, {summary.num_skipped} of "
        f"{summary.num_units} already done; {summary.num_rows} rows and {summary.num_rejects} "
        f"rejects in manifest {summary.manifest} of {summary.output} "
        f"({summary.elapsed_s:.1f} s)"
    )
    if summary.num_extra_images:
        yield (
            f"{summary.num_extra_images} of {summary.num_images} images are extra images of "
            "a sample, such as masks, and were not encoded"
        )
    for reason in summary.reject_reasons:
        yield f"rejected: {reason.to_text()}"
    if summary.bottleneck:
        yield summary.bottleneck
    if summary.mean_psnr_db is not None:
        yield f"QA: {summary.num_qa_rows} rows, mean PSNR {summary.mean_psnr_db:.2f} dB"
    if report:
        yield f"report: {report}"


def _report_run(config: Config, summary: RunSummary) -> str:
    """Write the report on a run's manifest, unless it has one; after a breach, print worst rows."""
    from latentcache.dataset.reader import open_dataset
    from latentcache.qa.gates import Gates
    from latentcache.qa.report import build_report, report_path

    assert config.qa
    options = config.output.storage
    dataset = open_dataset(config.output.url, summary.manifest, storage=options)
    path = report_path(dataset)
    is_new = not dataset.store.exists(path)
    if summary.breaches or is_new:
        report = build_report(
            dataset, summary.breaches, Gates.of(config.qa), decoder=config.qa.decoder
        )
        for line in report.worst_rows if summary.breaches else ():
            base.complain(f"QA: {line}", event="worst_row")
        if is_new:
            report.put(dataset)
    return str(dataset.store.local_path(path) or dataset.store.url_of(path))


@base.app.command("plan")
@base.command
def plan_command(
    config: base.ConfigPath,
    set_: base.Overrides = None,
    retry_rejects: Annotated[
        bool, Option("--retry-rejects", help="Plan units that have rejects again.")
    ] = False,
    calibrate: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Encode N images and estimate the time and cost of the whole run. Use thousands "
            "on a GPU, a hundred on a CPU.",
        ),
    ] = None,
    usd_per_gpu_hour: Annotated[
        float | None, Option(min=0, help="Price of a GPU hour, for --calibrate.")
    ] = None,
    usd_per_cpu_hour: Annotated[
        float | None, Option(min=0, help="Price of a CPU hour, for --calibrate.")
    ] = None,
    usd_per_gb_month: Annotated[
        float | None,
        Option(
            min=0, help="Price of storing a GB for a month, for --calibrate.", show_default=False
        ),
    ] = None,
    json_: base.Json = False,
) -> int:
    """List the units that `run` would encode, and why. It writes nothing."""
    from latentcache.config import load_config
    from latentcache.errors import ConfigError

    parsed = load_config(config, set_ or ())
    from latentcache.engine.plan import make_plan

    prices = (usd_per_gpu_hour, usd_per_cpu_hour, usd_per_gb_month)
    if calibrate is None and any(price is not None for price in prices):
        raise ConfigError("prices need --calibrate, which estimates the run")
    plan = make_plan(parsed, retry_rejects=retry_rejects)
    forecast = None
    if calibrate and plan.to_encode and not plan.diff:
        from latentcache.engine.forecast import Prices, make_forecast

        with base.progress(f"encoding {calibrate} images"):
            forecast = make_forecast(parsed, plan, calibrate, Prices(*prices))
    lines = [*_plan_lines(plan), *(forecast.to_text().split("\n") if forecast else ())]
    if calibrate and not forecast and not plan.diff:
        lines.append("no units to calibrate on")
    base.print_result(_plan_tree(plan, forecast), lines, json_)
    if plan.duplicates:
        base.complain(plan.duplicates.to_text())
    if plan.diff:
        base.complain(f"{plan.output.url} was created with different settings; `run` will refuse:")
        for line in plan.diff:
            base.complain(f"  {line}")
    return 2 if plan.diff else 0


def _plan_tree(plan: Plan, forecast: Forecast | None) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "num_units": len(plan.units),
        "num_pending": len(plan.pending),
        "num_rewrites": len(plan.to_rewrite),
        "num_bytes_pending": plan.num_bytes_pending,
        "num_images": plan.num_images,
        "num_bytes_rewritten": plan.num_bytes_rewritten,
        "sources": asdict(plan.sources),
        "pending": [
            {
                "unit": planned.unit.id,
                "source": planned.unit.source,
                "range": planned.unit.range,
                "kind": planned.kind,
                "reason": planned.reason,
            }
            for planned in plan.pending
        ],
        "sources_twice": asdict(plan.duplicates) if plan.duplicates else None,
        "contract_diff": plan.diff,
        "forecast": asdict(forecast) if forecast else None,
    }


def _plan_lines(plan: Plan) -> Iterator[str]:
    from latentcache.log import size_text

    for planned in plan.pending[: base.MAX_LINES]:
        yield f"{planned.unit.title}  {size_text(planned.unit.num_bytes)}  {planned.reason}"
    if len(plan.pending) > base.MAX_LINES:
        yield f"… and {len(plan.pending) - base.MAX_LINES} more"
    sources, newest = plan.sources, plan.state.manifest
    fate = "kept" if sources.on_missing == "keep" else "dropped"
    yield (
        f"sources: {sources.num_new} new, {sources.num_changed} changed, {sources.num_unchanged} "
        f"unchanged, {sources.num_vanished} vanished ({fate}), compared with "
        + (f"manifest {newest.number}" if newest else "an empty dataset")
    )
    # What a change of `source.keep` costs, by the present columns of the units.
    reasons = Counter(planned.reason for planned in plan.to_rewrite)
    for reason, number in reasons.items():
        yield f"{number} units: {reason}: rows are rewritten with the stored latents, not encoded"
    if reasons:
        num_bytes = sum(planned.unit.num_bytes for planned in plan.to_rewrite)
        yield (
            f"rewriting reads {size_text(num_bytes)} of source and "
            f"{size_text(plan.num_bytes_rewritten)} of latents, and writes the latents again"
        )
    num_bytes = sum(planned.unit.num_bytes for planned in plan.to_encode)
    images = "" if plan.num_images is None else f"; {plan.num_images} image files in total"
    yield (
        f"{len(plan.to_encode)} of {len(plan.units)} units to encode "
        f"({size_text(num_bytes)} to read{images}) into {plan.output.url}"
    )
    channels, *_ = plan.contract.latent_shape((8, 8))
    buckets = ", ".join(f"{width}x{height}" for width, height in plan.contract.transform.buckets)
    terms = plan.contract.latents
    yield (
        f"latents: {terms.posterior}, {channels} channels, {terms.dtype}, {terms.format}; "
        f"buckets: {buckets}"
    )


@base.app.command("status")
@base.command
def status_command(
    target: base.Target,
    set_: base.Overrides = None,
    watch_: Annotated[
        bool, Option("--watch", help="Repeat until the dataset is complete and no run is active.")
    ] = False,
    every_s: Annotated[
        float, Option("--every", min=0.1, metavar="SECONDS", help="Interval of --watch.")
    ] = 10.0,
    json_: base.Json = False,
) -> None:
    """Show the progress of a dataset and its active runs."""
    from latentcache.engine.status import read_status, watch

    url, options, _ = base.locate(target, set_)
    if watch_:
        _show_each(watch(url, options, every_s), url, as_json=json_)
        return
    status = read_status(url, options)
    base.print_result(status, _status_lines(status), json_)


def _status_lines(status: Status) -> Iterator[str]:
    yield (
        f"{status.num_committed} of {status.num_units} known units committed, "
        f"{status.num_rows} rows, {status.num_rejects} rejects"
    )
    for reason in status.reject_reasons:
        yield f"rejected: {reason.to_text()}"
    newest = f"manifests: {', '.join(map(str, status.manifests[-10:])) or 'none yet'}"
    yield newest + ("" if status.complete else "; the newest is not complete")
    if status.published is not None:
        yield f"published: manifest {status.published}"
    if status.bottleneck:
        yield f"{status.bottleneck} (latest units)"
    for source, message in status.failed.items():
        yield f"failed: {source}: {message}"
    for active in status.active_runs:
        yield (
            f"running: {active.run} on {active.host} (pid {active.pid}), {active.num_committed} of "
            f"{active.num_units} units, seen {active.age_s:.0f} s ago"
        )
    if status.gc_at_work:
        yield "gc is active"


def _show_each(statuses: Iterator[Watched], url: str, *, as_json: bool) -> None:
    """Show each status: in place on a terminal, one line each elsewhere. Ctrl-C ends it."""
    from contextlib import suppress

    from rich.console import Console
    from rich.live import Live

    console = Console(file=base.stdout)
    with suppress(KeyboardInterrupt):
        if as_json or not console.is_terminal:
            for status in statuses:
                base.print_json(status.to_json()) if as_json else base.print_lines(status.to_line())
            return
        with Live(console=console, auto_refresh=False) as live:
            for status in statuses:
                live.update(status.to_table(url), refresh=True)
