"""The summary of a run: how it ended, with its counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentcache.dataset.manifest import Manifest
from latentcache.dataset.rejects import RejectReason, most_frequent
from latentcache.engine.run_counts import RunCounts
from latentcache.engine.work import Work
from latentcache.storage import Store


@dataclass(slots=True)
class RunSummary:
    """How a run ended; `num_rows`, `num_rejects` and `num_images` count the whole dataset.

    Attributes:
        status: `complete`, `incomplete` (units failed, or another run gave them other kept
            columns), `interrupted`, `skipped` (another run is active and `compute.on_busy` is
            `skip`), `no_rows`, `too_many_rejects` or `failed_qa`.
        num_committed: units that this run committed.
        num_skipped: units that were committed already.
        num_other_columns: committed units that have other kept columns than this run requests.
        manifest: the number of the newest manifest; None if there is none.
        reject_reasons: the most frequent reasons of the whole dataset.
        num_qa_rows: rows that QA evaluated, with a mean PSNR of `mean_psnr_db`.
        bottleneck: a sentence on the slowest stage of this run; None for a run that made no rows or
            worked less than 10 s.
        breaches: the QA gates that failed.
        failed: the source and the message of each unit that was given up.
    """

    status: str
    num_units: int
    num_committed: int
    num_skipped: int
    num_rows: int
    num_rejects: int
    manifest: int | None
    elapsed_s: float
    exit_code: int
    output: str
    num_other_columns: int = 0
    reject_reasons: list[RejectReason] = field(default_factory=list)
    num_qa_rows: int = 0
    mean_psnr_db: float | None = None
    bottleneck: str | None = None
    num_images: int = 0
    num_extra_images: int = 0
    breaches: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


def summarise(
    work: Work,
    counts: RunCounts,
    output: Store,
    manifest: Manifest | None,
    stop_reason: str | None,
    failed: dict[str, str],
    elapsed_s: float,
) -> RunSummary:
    """Return the summary of a run.

    Args:
        work: the units of the run and the state of the output.
        counts: the counts of the run.
        output: the store.
        manifest: the newest manifest; None if there is none.
        stop_reason: why the run was stopped; None or empty if it was not.
        failed: the message of each unit that was given up, by the unit's title.
        elapsed_s: the duration of the run in seconds.
    """
    done, at_work = work.done(), bool(work.left)
    num_other_columns = sum(unit.columns != work.columns for unit in done)
    breaches = counts.qa_totals.breaches(is_running=at_work)
    if stop_reason == "skipped":
        status, exit_code = "skipped", 0
    elif work.has_no_rows:
        status, exit_code = "no_rows", 3
    elif counts.has_too_many_rejects(at_work=at_work):
        status, exit_code = "too_many_rejects", 3
    elif breaches:
        status, exit_code = "failed_qa", 3
    elif not at_work and len(done) == len(work.units()) and not num_other_columns:
        status, exit_code = "complete", 0
    else:
        status, exit_code = stop_reason or "incomplete", 1
    return RunSummary(
        status=status,
        num_units=len(work.units()),
        num_committed=counts.num_committed,
        num_skipped=counts.num_skipped,
        num_rows=manifest.num_rows if manifest else 0,
        num_rejects=manifest.num_rejects if manifest else 0,
        manifest=manifest.number if manifest else None,
        num_images=manifest.num_images if manifest else 0,
        num_extra_images=manifest.num_extra_images if manifest else 0,
        elapsed_s=round(elapsed_s, 3),
        exit_code=exit_code,
        output=output.url,
        num_other_columns=num_other_columns,
        reject_reasons=most_frequent(output, work.counted()),
        num_qa_rows=counts.qa_totals.num_rows.total(),
        mean_psnr_db=counts.qa_totals.mean_psnr_db,
        bottleneck=counts.loads.bottleneck_text if counts.num_rows else None,
        breaches=breaches,
        failed=[{"source": s, "message": m} for s, m in sorted(failed.items())],
    )
