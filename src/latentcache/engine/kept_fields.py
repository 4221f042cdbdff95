"""The fields of the samples, and the check that each kept field occurs in one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from latentcache.dataset.columns import Columns
from latentcache.dataset.receipts import MAX_FIELDS, Receipt, UnitSummary
from latentcache.engine.dispatcher import Finished
from latentcache.engine.plan import PlannedUnit
from latentcache.errors import ConfigError
from latentcache.images.samples import escaped

# A field that occurs in none of this many units and samples counts as absent. If one sample in a
# thousand has a field, 10,000 samples without it occur once in 20,000 runs.
MIN_UNITS = 8
MIN_SAMPLES = 10_000

_NAME_CHARS = 100


def spread(units: Sequence[PlannedUnit]) -> list[PlannedUnit]:
    """Return units with some from all parts first, so that a field of few shards occurs early."""
    first = dict.fromkeys(index * len(units) // MIN_UNITS for index in range(MIN_UNITS))
    if len(units) <= MIN_UNITS:
        return list(units)
    return [units[i] for i in first] + [u for i, u in enumerate(units) if i not in first]


class SeenFields:
    """The names of the fields that a unit's samples have; `columns` are the kept columns."""

    def __init__(self, columns: Columns) -> None:
        self._kept = {column.field for column in columns}
        self._names: set[str] = set()
        self._last: frozenset[str] = frozenset()

    def add(self, names: frozenset[str]) -> None:
        """Add the fields of one sample."""
        if names == self._last:
            return
        self._last = names
        self._names |= names & self._kept
        # Names come from the source: they may be invalid UTF-8, and of any length.
        others = {escaped(name[:_NAME_CHARS]) for name in names - self._kept}
        num_free = MAX_FIELDS - len(self._names - self._kept)
        self._names.update(sorted(others - self._names)[:num_free])

    @property
    def absent(self) -> tuple[str, ...]:
        """The kept fields that no sample has."""
        return tuple(sorted(self._kept - self._names))

    @property
    def names(self) -> tuple[str, ...]:
        """Sorted fields of samples: all kept ones, and others up to `MAX_FIELDS` in total."""
        kept_first = sorted(self._names, key=lambda name: (name not in self._kept, name))
        return tuple(sorted(kept_first[:MAX_FIELDS]))


class FieldCheck:
    """A buffer that holds receipts back until each kept field has occurred in a sample.

    A run that keeps a field which no sample has therefore commits nothing. A run without rows is
    not checked, because its problem is larger than a field. If all fields hold images (`is_image`),
    the user cannot have meant another one; then `warning` says that the column stays empty.
    """

    def __init__(
        self, columns: Columns, committed: Iterable[UnitSummary], is_image: Callable[[str], bool]
    ) -> None:
        self._is_image = is_image
        self.warning: str | None = None
        self._missing = {column.field for column in columns}
        for unit in committed:
            kept = {column.field for column in unit.columns}
            self._missing -= kept.difference(unit.absent_fields)
        self._held: list[Finished] = []
        self._names: set[str] = set()
        self._num_samples = self._num_rows = 0
        self._lacking: list[str] = []  # messages of the units whose files lack a field

    @property
    def is_open(self) -> bool:
        """Whether a kept field has not occurred yet."""
        return bool(self._missing)

    def offer(self, finished: Finished) -> list[Finished]:
        """Add an encoded unit; return the units to commit; raise `ConfigError` like `end`."""
        if not self._missing:
            return [finished]
        receipt = Receipt.from_bytes(finished.receipt)
        self._missing.difference_update(receipt.fields)
        self._names.update(receipt.fields)
        self._num_samples += receipt.record.num_samples
        self._num_rows += receipt.record.num_rows
        self._held.append(finished)
        if len(self._held) >= MIN_UNITS and self._num_samples >= MIN_SAMPLES:
            self._require_fields(f"the first {len(self._held)} units")
            self._missing.clear()
        return [] if self._missing else self.release()

    def lacks(self, message: str) -> None:
        """Record a unit whose file lacks a field; raise `ConfigError` if many do, and none has."""
        self._lacking.append(message)
        if len(self._lacking) >= MIN_UNITS:
            self._refuse_if_all_lack(len(self._lacking))

    def _refuse_if_all_lack(self, num_failed: int) -> None:
        if self._missing and not self._held and num_failed == len(self._lacking):
            raise ConfigError(
                f"{self._lacking[0]}. This run committed nothing: correct source.keep"
            )

    def release(self) -> list[Finished]:
        """Return the units that were held back."""
        held, self._held = self._held, []
        return held

    def end(self, num_failed: int) -> None:
        """Raise `ConfigError` at the end of a run if a kept field occurs in no sample.

        It may occur in failed units, unless all of them failed because they lack a field.
        """
        if num_failed:
            self._refuse_if_all_lack(num_failed)
        else:
            self._require_fields("the source")

    def _require_fields(self, where: str) -> None:
        if not self._missing or not self._num_rows:
            return
        missing, names = ", ".join(sorted(self._missing)), sorted(self._names)
        if all(map(self._is_image, names)):
            self.warning = (
                f"source.keep names {missing}, but the samples of {where} have only images "
                f"({', '.join(names)}): the column is null in every row"
            )
            return
        more = f" and {len(names) - MAX_FIELDS} more" if len(names) > MAX_FIELDS else ""
        raise ConfigError(
            f"source.keep names {missing}, which no sample of {where} has ({self._num_samples} "
            f"samples); they have {', '.join(names[:MAX_FIELDS]) or 'no fields'}{more}. This run "
            "committed nothing: correct source.keep, or leave the field out and add it later: that "
            "encodes nothing again"
        )
