"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentcache.dataset.manifest import Manifest
from latentcache.dataset.rejects import RejectReason, most_frequent
from latentcache.engine.run_counts import RunCounts
from latentcache.engine.work import Work
from latentcache.storage import Store


@dataclass(slots=True)
class RunSummary:
    """How a run ended; `num_rows` and `num_rejects` are of the whole dataset after it.

    `status`: `complete`, `incomplete` (units failed, or have other kept columns by another run),
    `interrupted`, `skipped` (another run is at work, and `compute.on_busy` is `skip`), `no_rows`,
    `too_many_rejects`, or `failed_qa`, for which `breaches` says why. `num_committed` units were
    committed by this run, `num_skipped` were there already, `num_other_columns` are there with
    other kept columns than this run's. `reject_reasons` are the most frequent ones of the whole
    dataset. `num_qa_rows` rows were looked at, at a mean PSNR of `mean_psnr_db`. `bottleneck` is
    a sentence on this run's slowest stage; None for a run that made no rows or worked less than
    10 s.
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
    """Say how a run ended.

    Args:
        work: its units and the state of the output.
        counts: what it did.
        output: the store.
        manifest: the newest; None where there is none.
        stop_reason: why it was stopped; None or empty if it was not.
        failed: the message for each unit that was given up, by the unit's title.
        elapsed_s: how long it took.
    """
    done, at_work = work.done(), bool(work.left)
    num_other_columns = sum(unit.columns != work.columns for unit in done)
    breaches = counts.qa_totals.breaches(at_work=at_work)
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
