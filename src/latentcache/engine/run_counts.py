"""What a run has done so far, and whether the output still passes what its config asks for."""

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

# While a run goes on, the reject rate of fewer samples than this says nothing.
MIN_SAMPLES_TO_JUDGE = 1000


class StopReason(NamedTuple):
    """Why a run has to stop: its status, a line for the user, and fields of the log."""

    status: str
    message: str
    fields: dict[str, Any]


class RunCounts:
    """Counts of a run, and of the units of the listing that the output has.

    Args:
        config: of the run.
        done: the units that the output has already.
        num_skipped: how many units of the listing need no work.
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
        """Count a unit whose receipt was put, in place of what the output had of it before."""
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
        """Count the QA rows that each bucket is still short of."""
        if not self._config.qa:
            return {}
        least = self._config.qa.min_rows_per_bucket
        names = [Bucket(*size).name for size in contract.transform.buckets]
        missing = {name: least - self.qa_totals.num_rows[name] for name in names}
        return {name: num for name, num in missing.items() if num > 0}

    def has_too_many_rejects(self, *, at_work: bool) -> bool:
        """Whether more samples were rejected than the config allows; `at_work` if more may come."""
        limit = self._config.rejects.max_rate * self.num_samples
        may_judge = self.num_samples >= MIN_SAMPLES_TO_JUDGE or not at_work
        return may_judge and self.num_rejects > limit

    def stop_reasons(self, *, at_work: bool) -> list[StopReason]:
        """Return why going on would only make more of what is wrong; empty if it is not."""
        reasons = [
            StopReason("failed_qa", f"stopping: {breach}", {})
            for breach in self.qa_totals.breaches(at_work=True)
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
