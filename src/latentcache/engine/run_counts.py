"""The counts of a run so far, and the gates of its config that they must pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from latentcache.bottleneck import PipelineLoad
from latentcache.config import Config
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import UnitSummary
from latentcache.engine.commit import Committed
from latentcache.qa.gates import Gates, QaTotals

# During a run, the reject rate of fewer samples than this is not judged.
MIN_SAMPLES_TO_JUDGE = 1000


class StopReason(NamedTuple):
    """Why a run must stop: its status, a message for the user, and fields of the JSON log."""

    status: str
    message: str
    fields: dict[str, Any]


class RunCounts:
    """The counts of a run, and of the listed units that the output has.

    Args:
        config: the config of the run.
        done: the listed units that the output has already.
        num_skipped: the number of listed units that need no work.
    """

    def __init__(self, config: Config, done: Iterable[UnitSummary], num_skipped: int) -> None:
        self._config = config
        self.num_skipped = num_skipped
        self.num_committed = self.num_rows = 0  # by this run
        self.num_samples = self.num_rejects = 0  # of the output
        self.qa_totals = QaTotals(Gates.of(config.qa))
        self.loads = PipelineLoad()
        for unit in done:
            self._add(unit, None)

    def add(self, committed: Committed, before: UnitSummary | None) -> None:
        """Count a unit whose receipt was put.

        Args:
            committed: the receipt in the store.
            before: the earlier generation of the unit, whose counts are replaced; None if none.
        """
        receipt = committed.receipt
        if committed.is_ours:
            self.num_committed += 1
            self.num_rows += receipt.record.num_rows
            self.loads.add_receipt(receipt.stages)
        else:
            self.num_skipped += 1
        self._add(UnitSummary.of(receipt.record), before)

    def _add(self, unit: UnitSummary, before: UnitSummary | None) -> None:
        self.num_samples += unit.num_samples - (before.num_samples if before else 0)
        self.num_rejects += unit.num_rejects - (before.num_rejects if before else 0)
        self.qa_totals.add(unit, before)

    def qa_wanted(self, contract: Contract) -> dict[str, int]:
        """Return the number of QA rows that each bucket still lacks, by bucket name."""
        if not self._config.qa:
            return {}
        least = self._config.qa.min_rows_per_bucket
        names = [Bucket(*size).name for size in contract.transform.buckets]
        missing = {name: least - self.qa_totals.num_rows[name] for name in names}
        return {name: num for name, num in missing.items() if num > 0}

    def has_too_many_rejects(self, *, at_work: bool) -> bool:
        """Return whether more samples were rejected than the config allows.

        Args:
            at_work: whether units are left; if not, any number of samples is judged.
        """
        limit = self._config.rejects.max_rate * self.num_samples
        may_judge = self.num_samples >= MIN_SAMPLES_TO_JUDGE or not at_work
        return may_judge and self.num_rejects > limit

    def stop_reasons(self, *, at_work: bool) -> list[StopReason]:
        """Return the reasons to stop the run; empty if all gates pass.

        Args:
            at_work: whether units are left.
        """
        reasons = [
            StopReason("failed_qa", f"stopping: {breach}", {})
            for breach in self.qa_totals.breaches(is_running=True)
        ]
        if self.has_too_many_rejects(at_work=at_work):
            rate = self.num_rejects / self.num_samples
            message = (
                f"stopping: {rate:.1%} of {self.num_samples} samples were rejected, more than "
                f"rejects.max_rate {self._config.rejects.max_rate:.1%}"
            )
            fields = {"num_samples": self.num_samples, "num_rejects": self.num_rejects}
            reasons.append(StopReason("too_many_rejects", message, fields))
        return reasons
