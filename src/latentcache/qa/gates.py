"""The QA totals of many units, checked against the gates of a config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from latentcache.config import Qa
from latentcache.dataset.receipts import UnitSummary

# The mean PSNR of fewer QA rows than this is too uncertain to stop an active run.
_MIN_ROWS_TO_JUDGE = 32


@dataclass(frozen=True, slots=True)
class Gates:
    """The limits of a config's `qa` section; None means no limit."""

    min_psnr_db: float | None = None
    min_drift_db: float | None = None
    max_rejects: int | None = None

    @classmethod
    def of(cls, qa: Qa | None) -> Gates:
        """Return the gates of a config's `qa` section; without the section, no limits."""
        return cls(qa.min_psnr_db, qa.min_drift_db, qa.max_rejects) if qa else cls()


class QaTotals:
    """The QA totals of many units, to check against gates."""

    def __init__(self, gates: Gates, units: Iterable[UnitSummary] = ()) -> None:
        self.gates = gates
        self.num_rows: Counter[str] = Counter()  # by bucket
        self.num_rejects = 0
        self._sum_psnr_db = 0.0
        self._drifted: dict[str, tuple[float, str]] = {}  # unit id -> (decibels, source)
        for unit in units:
            self.add(unit)

    def add(self, unit: UnitSummary, before: UnitSummary | None = None) -> None:
        """Add a unit to the totals.

        Args:
            unit, before: the unit, and the same unit as it was added before, to subtract.
        """
        for part, sign in ((unit, 1), *([(before, -1)] if before else [])):
            self.num_rejects += sign * part.num_rejects
            if part.qa:
                self.num_rows.update({b: sign * num for b, num in part.qa.num_rows.items()})
                self._sum_psnr_db += sign * part.qa.mean_psnr_db * sum(part.qa.num_rows.values())
        self._drifted.pop(unit.unit_id, None)
        limit = self.gates.min_drift_db
        if unit.qa and limit is not None and unit.qa.min_drift_db < limit:
            self._drifted[unit.unit_id] = (unit.qa.min_drift_db, unit.source)

    @property
    def mean_psnr_db(self) -> float | None:
        """Mean PSNR over all QA rows; None without rows."""
        num_rows = self.num_rows.total()
        return self._sum_psnr_db / num_rows if num_rows else None

    def breaches(self, *, is_running: bool = False) -> list[str]:
        """Return a line for each gate that fails; `is_running` if more rows may follow."""
        lines = []
        gates, mean, num_rows = self.gates, self.mean_psnr_db, self.num_rows.total()
        is_judged = num_rows >= _MIN_ROWS_TO_JUDGE or not is_running
        limit = gates.min_psnr_db
        if is_judged and mean is not None and limit is not None and mean < limit:
            lines.append(
                f"the mean PSNR of {num_rows} QA rows is {mean:.2f} dB, below qa.min_psnr_db "
                f"{limit:g}"
            )
        if self._drifted:
            worst_db, source = min(self._drifted.values())
            lines.append(
                f"{len(self._drifted)} units have latents that are not what their images encode "
                f"to: {worst_db:.1f} dB in {source}, below qa.min_drift_db {gates.min_drift_db:g}"
            )
        if gates.max_rejects is not None and self.num_rejects > gates.max_rejects:
            lines.append(
                f"{self.num_rejects} samples were rejected, more than qa.max_rejects "
                f"{gates.max_rejects}"
            )
        return lines
