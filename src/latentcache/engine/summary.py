"""The counts of a run so far, the gates that they must pass, and the summary at its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from latentcache.bottleneck import PipelineLoad
from latentcache.config import Config
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.receipts import UnitSummary
from latentcache.dataset.rejects import RejectReason, most_frequent
from latentcache.engine.commit import Committed
from latentcache.engine.work import Work
from latentcache.qa.gates import Gates, QaTotals

# During a run, the reject rate of fewer samples than this is not judged.
_MIN_SAMPLES_TO_JUDGE = 1000


@dataclass(slots=True)
class RunSummary:
    """How a run ended; `num_rows`, `num_rejects` and `num_images` count the whole dataset.

    Attributes:
        status: `complete`, `incomplete` (units failed, or another run gave them other kept
            columns), `interrupted`, `skipped` (another run is active and `compute.on_busy` is
            `skip`), `no_rows`, `too_many_rejects` or `failed_qa`.
        num_committed, num_skipped: units that this run committed, or that were committed already.
        num_other_columns: committed units that have other kept columns than this run requests.
        bottleneck: a sentence on the slowest stage of this run, if it worked for at least 10 s.
        breaches, failed: the QA gates that failed, and the source and message of failed units.
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


class RunCounts:
    """The counts of a run, and of the listed units that the output has; `work` is its units."""

    def __init__(self, config: Config, work: Work) -> None:
        self._config, self._work = config, work
        self.num_skipped = len(work.units()) - len(work.pending)
        self.num_committed = self.num_rows = 0  # by this run
        self.num_samples = self.num_rejects = 0  # of the output
        self.qa_totals = QaTotals(Gates.of(config.qa))
        self.loads = PipelineLoad()
        self.failed: dict[str, str] = {}  # the message of each failed unit, by the unit's title
        for unit in work.committed():
            self._add(unit, None)

    def add(self, committed: Committed) -> None:
        """Add a receipt that was put, in place of an earlier generation of its unit."""
        receipt = committed.receipt
        if committed.is_ours:
            self.num_committed += 1
            self.num_rows += receipt.record.num_rows
            self.loads.add_receipt(receipt.stages)
        else:
            self.num_skipped += 1
        self._add(UnitSummary.of(receipt.record), self._work.add(receipt))

    def _add(self, unit: UnitSummary, before: UnitSummary | None) -> None:
        self.num_samples += unit.num_samples - (before.num_samples if before else 0)
        self.num_rejects += unit.num_rejects - (before.num_rejects if before else 0)
        self.qa_totals.add(unit, before)

    def missing_qa_rows(self) -> dict[str, int]:
        """Return the number of QA rows that each bucket still lacks, by bucket name."""
        if not self._config.qa:
            return {}
        least = self._config.qa.min_rows_per_bucket
        names = [Bucket(*size).name for size in self._work.contract.transform.buckets]
        missing = {name: least - self.qa_totals.num_rows[name] for name in names}
        return {name: num for name, num in missing.items() if num > 0}

    @property
    def has_too_many_rejects(self) -> bool:
        """Whether more samples were rejected than allowed; during a run a few are not judged."""
        limit = self._config.rejects.max_rate * self.num_samples
        may_judge = self.num_samples >= _MIN_SAMPLES_TO_JUDGE or not self._work.remaining
        return may_judge and self.num_rejects > limit

    @property
    def may_complete(self) -> bool:
        """Whether the next manifest may be complete: the dataset has rows, and all gates pass."""
        has_failed = self.has_too_many_rejects or self.qa_totals.breaches()
        return not has_failed and not self._work.has_no_rows

    def failed_gates(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield the status, a message and fields of the JSON log for each gate that fails."""
        for breach in self.qa_totals.breaches(is_running=True):
            yield "failed_qa", f"stopping: {breach}", {}
        if self.has_too_many_rejects:
            rate = self.num_rejects / self.num_samples
            message = (
                f"stopping: {rate:.1%} of {self.num_samples} samples were rejected, more than "
                f"rejects.max_rate {self._config.rejects.max_rate:.1%}"
            )
            fields = {"num_samples": self.num_samples, "num_rejects": self.num_rejects}
            yield "too_many_rejects", message, fields

    def summarise(
        self, manifest: Manifest | None, stop_reason: str | None, elapsed_s: float
    ) -> RunSummary:
        """Return the summary of the run.

        Args:
            manifest, stop_reason, elapsed_s: the newest manifest, and how the run ended.
        """
        work, committed, num_units = self._work, self._work.committed(), len(self._work.units())
        num_other_columns = sum(unit.columns != work.columns for unit in committed)
        breaches = self.qa_totals.breaches(is_running=bool(work.remaining))
        if stop_reason == "skipped":
            status, exit_code = "skipped", 0
        elif work.has_no_rows:
            status, exit_code = "no_rows", 3
        elif self.has_too_many_rejects:
            status, exit_code = "too_many_rejects", 3
        elif breaches:
            status, exit_code = "failed_qa", 3
        elif not work.remaining and len(committed) == num_units and not num_other_columns:
            status, exit_code = "complete", 0
        else:
            status, exit_code = stop_reason or "incomplete", 1
        return RunSummary(
            status=status,
            num_units=num_units,
            num_committed=self.num_committed,
            num_skipped=self.num_skipped,
            num_rows=manifest.num_rows if manifest else 0,
            num_rejects=manifest.num_rejects if manifest else 0,
            manifest=manifest.number if manifest else None,
            num_images=manifest.num_images if manifest else 0,
            num_extra_images=manifest.num_extra_images if manifest else 0,
            elapsed_s=round(elapsed_s, 3),
            exit_code=exit_code,
            output=work.state.store.url,
            num_other_columns=num_other_columns,
            reject_reasons=most_frequent(work.state.store, work.counted()),
            num_qa_rows=self.qa_totals.num_rows.total(),
            mean_psnr_db=self.qa_totals.mean_psnr_db,
            bottleneck=self.loads.bottleneck_text if self.num_rows else None,
            breaches=breaches,
            failed=[{"source": s, "message": m} for s, m in sorted(self.failed.items())],
        )
