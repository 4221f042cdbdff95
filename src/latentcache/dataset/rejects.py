"""Summarize rejects: the most frequent reasons, each with an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from latentcache.dataset.parquet import read_table
from latentcache.dataset.receipts import UnitSummary, read_receipts
from latentcache.dataset.shards import RejectRow
from latentcache.errors import LatentCacheError
from latentcache.storage import Store

MAX_REASONS = 5

_MESSAGE_CHARS = 300


@dataclass(frozen=True, slots=True)
class RejectReason:
    """A reason of rejects, `stage/reason`, and one reject as an example.

    `source`, `key` and `message` of the example are None if its file could not be read; `key` is
    also None for a whole shard.
    """

    reason: str
    num_rejects: int
    source: str | None = None
    key: str | None = None
    message: str | None = None

    def to_text(self) -> str:
        """Return one line of text."""
        text = f"{self.num_rejects} x {self.reason}"
        if self.source is None:
            return text
        key = "" if self.key is None else f", key {self.key}"
        return f"{text}, for example {self.source}{key}: {self.message}"


def count_reasons(rejects: Iterable[RejectRow]) -> dict[str, int]:
    """Count rejects by `stage/reason`."""
    return dict(sorted(Counter(f"{row.stage}/{row.reason}" for row in rejects).items()))


def most_frequent(store: Store, units: Iterable[UnitSummary]) -> list[RejectReason]:
    """Return the `MAX_REASONS` most frequent reject reasons, the most frequent first.

    Args:
        store, units: the output, and the units whose rejects are counted.
    """
    counts: Counter[str] = Counter()
    first_units: dict[str, UnitSummary] = {}
    for unit in units:
        for reason, number in unit.reject_reasons.items():
            counts[reason] += number
            first_units.setdefault(reason, unit)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [_with_example(store, r, n, first_units[r]) for r, n in ordered[:MAX_REASONS]]


def _with_example(store: Store, reason: str, number: int, unit: UnitSummary) -> RejectReason:
    """Return a reason with the first such reject of a unit, if its files can be read."""
    try:
        (receipt,) = read_receipts(store, [unit.name])
        if receipt.record.rejects:
            with store.open(receipt.record.rejects.path) as file:
                table = read_table(file, ["key", "stage", "reason", "message"])
            for row in table.to_pylist():
                if f"{row['stage']}/{row['reason']}" == reason:
                    message = row["message"][:_MESSAGE_CHARS]
                    return RejectReason(reason, number, unit.source, row["key"], message)
    except (LatentCacheError, pa.ArrowException, OSError, KeyError, ValueError):
        pass
    return RejectReason(reason, number)
