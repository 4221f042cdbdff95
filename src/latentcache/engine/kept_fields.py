"""Which fields the samples have, and whether each kept field occurs at all.

A kept field that no sample has is a mistake in `source.keep`: every row would have null there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from latentcache.dataset.columns import Columns
from latentcache.dataset.receipts import MAX_FIELDS, Receipt, UnitSummary
from latentcache.errors import ConfigError
from latentcache.images.samples import escaped

if TYPE_CHECKING:
    from latentcache.engine.actors import Finished

# A field that is in none of so many units and samples is taken to be absent. Of a field that one
# sample in a thousand has, 10,000 samples without it occur once in 20,000 runs.
MIN_UNITS = 8
MIN_SAMPLES = 10_000

_NAME_CHARS = 100

T = TypeVar("T")


def spread(units: Sequence[T]) -> list[T]:
    """Put `MIN_UNITS` units from all over the source first, for fields that only some shards have.

    Args:
        units: in the order of the source.
    """
    first = [index * len(units) // MIN_UNITS for index in range(MIN_UNITS)]
    if len(units) <= MIN_UNITS:
        return list(units)
    chosen = set(first)
    return [units[i] for i in first] + [u for i, u in enumerate(units) if i not in chosen]


class SeenFields:
    """Collects the fields that a unit's samples have.

    Args:
        columns: the kept columns.
    """

    def __init__(self, columns: Columns) -> None:
        self._kept = {column.field for column in columns}
        self._names: set[str] = set()
        self._last: frozenset[str] = frozenset()

    def add(self, names: frozenset[str]) -> None:
        """Take in the fields of one sample."""
        if names == self._last:
            return
        self._last = names
        self._names |= names & self._kept
        # Names come from the source: they may be no UTF-8, and of any length.
        others = {escaped(name[:_NAME_CHARS]) for name in names - self._kept}
        room = MAX_FIELDS - len(self._names - self._kept)
        self._names.update(sorted(others - self._names)[:room])

    @property
    def absent(self) -> tuple[str, ...]:
        """The kept fields that no sample has."""
        return tuple(sorted(self._kept - self._names))

    @property
    def names(self) -> tuple[str, ...]:
        """Fields that samples have: every kept one, and others, at most `MAX_FIELDS` together."""
        kept = sorted(self._names & self._kept)
        return tuple(sorted([*kept, *sorted(self._names - self._kept)][:MAX_FIELDS]))


class FieldCheck:
    """Holds receipts back until each kept field has occurred in a sample.

    So a run that keeps a field which no sample has commits nothing. A run without a row is not
    judged: whatever is wrong there, it is more than a field. Where samples have nothing but images,
    no other field can be meant: `warning` says that the column stays empty.

    Args:
        columns: the kept columns.
        done: the units that are committed.
        is_image: whether a field holds an image.
    """

    def __init__(
        self, columns: Columns, done: Iterable[UnitSummary], is_image: Callable[[str], bool]
    ) -> None:
        self._is_image = is_image
        self.warning: str | None = None
        self._missing = {column.field for column in columns}
        for unit in done:
            kept = {column.field for column in unit.columns}
            self._missing -= kept.difference(unit.absent_fields)
        self._held: list[Finished] = []
        self._names: set[str] = set()
        self._num_samples = self._num_rows = 0
        self._lacking: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether a field still has to occur."""
        return bool(self._missing)

    def offer(self, finished: Finished) -> list[Finished]:
        """Take in a unit that was encoded; return those whose receipts may be put.

        Raises:
            ConfigError: a field occurs in none of the samples of many units.
        """
        if not self._missing:
            return [finished]
        receipt = Receipt.from_bytes(finished.receipt)
        self._missing.difference_update(receipt.fields)
        self._names.update(receipt.fields)
        self._num_samples += receipt.record.num_samples
        self._num_rows += receipt.record.num_rows
        self._held.append(finished)
        is_enough = len(self._held) >= MIN_UNITS and self._num_samples >= MIN_SAMPLES
        if is_enough and self._missing and self._num_rows:
            self._judge(f"the first {len(self._held)} units")
        if is_enough:
            self._missing.clear()
        return [] if self._missing else self.release()

    def lacks(self, message: str) -> None:
        """Take in that a unit failed because its file has no column for a field.

        Args:
            message: names the file, the field, and what the file has.

        Raises:
            ConfigError: so it was with many units, and with none otherwise.
        """
        self._lacking.append(message)
        if len(self._lacking) >= MIN_UNITS:
            self._refuse_if_all_lack(len(self._lacking))

    def _refuse_if_all_lack(self, num_failed: int) -> None:
        if self._missing and not self._held and num_failed == len(self._lacking):
            raise ConfigError(
                f"{self._lacking[0]}. This run committed nothing: correct source.keep"
            )

    def release(self) -> list[Finished]:
        """Return what was held back."""
        held, self._held = self._held, []
        return held

    def end(self, num_failed: int) -> None:
        """Judge at the end of a run that tried every unit.

        A field may occur in the units that failed, unless they failed for want of it.

        Args:
            num_failed: units that were given up.

        Raises:
            ConfigError: a field occurs in no sample; nothing was put.
        """
        if num_failed:
            self._refuse_if_all_lack(num_failed)
        elif self._missing and self._num_rows:
            self._judge("the source")

    def _judge(self, where: str) -> None:
        missing, names = ", ".join(sorted(self._missing)), sorted(self._names)
        if all(map(self._is_image, names)):
            self.warning = (
                f"source.keep names {missing}, but the samples of {where} have nothing but images "
                f"({', '.join(names)}): the column is null in every row"
            )
            return
        more = f" and {len(names) - MAX_FIELDS} more" if len(names) > MAX_FIELDS else ""
        raise ConfigError(
            f"source.keep names {missing}, which no sample of {where} has ({self._num_samples} "
            f"samples); they have {', '.join(names[:MAX_FIELDS]) or 'no fields'}{more}. This run "
            "committed nothing: correct source.keep, or leave the field out and add it later: that "
            "needs no new encoding"
        )
