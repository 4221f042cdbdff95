"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentcache.dataset.rejects import RejectReason


@dataclass(slots=True)
class RunSummary:
    """How a run ended; `num_rows` and `num_rejects` are of the whole dataset after it.

    `status`: `complete`, `incomplete` (units failed, or have other kept columns by another run),
    `interrupted`, `skipped` (another run is at work, and `compute.on_busy` is `skip`), `no_rows`,
    `too_many_rejects`, or `failed_qa`, for which `breaches` says why. `num_committed` units were
    committed by this run, `num_skipped` were there already, `num_other_columns` are there with
    other kept columns than this run's. `reject_reasons` are the most frequent ones of the whole
    dataset. `num_qa_rows` rows were looked at, at a mean PSNR of `mean_psnr_db`. `bottleneck` is
    the stage that held this run up, and what would help; None for a run that made no rows.
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
