"""What changed between two manifests of a dataset, by source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.contract import require_contract
from latentcache.dataset.manifest import Manifest, ManifestName, list_manifests, read_manifest
from latentcache.dataset.publish import find_manifest
from latentcache.dataset.segments import names_of, read_segments, without
from latentcache.errors import DatasetError
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

_COLUMNS = ("unit", "generation", "num_rows", "num_rejects")


@dataclass(frozen=True, slots=True)
class DiffUnit:
    """A unit that only one of the two manifests names; `version` is its source's."""

    unit: str
    version: str
    generation: int
    num_rows: int
    num_rejects: int


@dataclass(frozen=True, slots=True)
class SourceDiff:
    """A source whose units differ: those that count no more, and those that came for them."""

    source: str
    before: tuple[DiffUnit, ...]
    after: tuple[DiffUnit, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """What some units come to."""

    num_units: int
    num_rows: int
    num_rejects: int

    @classmethod
    def of(cls, units: Iterable[DiffUnit]) -> Counts:
        """Add up units."""
        units = list(units)
        num_rows = sum(unit.num_rows for unit in units)
        return cls(len(units), num_rows, sum(unit.num_rejects for unit in units))


@dataclass(frozen=True, slots=True)
class DiffCounts:
    """Totals of a diff: `before + added - removed - replaced + replacing = after`.

    `before` and `after` are the whole manifests; `replaced` units went, `replacing` ones came for
    them.
    """

    before: Counts
    added: Counts
    replaced: Counts
    replacing: Counts
    removed: Counts
    after: Counts


@dataclass(frozen=True, slots=True)
class ManifestDiff:
    """How manifest `after` differs from manifest `before`, both by number.

    `added` are sources that gained units and lost none, `removed` those that lost some and gained
    none, `replaced` those that did both; all in the order of their URLs.
    """

    before: int
    after: int
    counts: DiffCounts
    added: tuple[SourceDiff, ...]
    replaced: tuple[SourceDiff, ...]
    removed: tuple[SourceDiff, ...]


def diff_manifests(
    url: str | os.PathLike[str],
    before: ManifestName | None = None,
    after: ManifestName | None = None,
    *,
    storage: StorageOptions | None = None,
) -> ManifestDiff:
    """Compare two manifests of a dataset.

    A segment that both name is read only where they differ in what they leave out of segments.

    Args:
        url: the dataset.
        before: number of a manifest, or "published"; None takes the complete one before `after`.
        after: likewise; None takes the newest complete one.
        storage: how to reach the store.

    Raises:
        DatasetError: there is no dataset, or no such manifest.
    """
    store = Store(url, storage or StorageOptions())
    require_contract(store)
    new = find_manifest(store, after)
    old = _complete_before(store, new.number) if before is None else find_manifest(store, before)
    gone, come = _differing(store, old, new), _differing(store, new, old)
    by_source = [
        SourceDiff(source, tuple(gone.get(source, ())), tuple(come.get(source, ())))
        for source in sorted(gone.keys() | come.keys())
    ]
    added = tuple(diff for diff in by_source if not diff.before)
    removed = tuple(diff for diff in by_source if not diff.after)
    replaced = tuple(diff for diff in by_source if diff.before and diff.after)
    counts = DiffCounts(
        before=Counts(old.num_units, old.num_rows, old.num_rejects),
        added=Counts.of(unit for diff in added for unit in diff.after),
        replaced=Counts.of(unit for diff in replaced for unit in diff.before),
        replacing=Counts.of(unit for diff in replaced for unit in diff.after),
        removed=Counts.of(unit for diff in removed for unit in diff.before),
        after=Counts(new.num_units, new.num_rows, new.num_rejects),
    )
    return ManifestDiff(old.number, new.number, counts, added, replaced, removed)


def _complete_before(store: Store, number: int) -> Manifest:
    for earlier in reversed(list_manifests(store)):
        if earlier < number and (found := read_manifest(store, earlier)).complete:
            return found
    raise DatasetError(f"{store.url} has no complete manifest before {number} to compare it with")


def _differing(store: Store, one: Manifest, other: Manifest) -> dict[str, list[DiffUnit]]:
    """Give, by source, the units that count in one manifest and not in the other."""
    shared = {segment.path for segment in other.segments}
    own = [segment for segment in one.segments if segment.path not in shared]
    both = [segment for segment in one.segments if segment.path in shared]
    named_by = f"manifest {one.number}"
    found: dict[str, list[DiffUnit]] = {}
    for table in read_segments(store, own, named_by, _COLUMNS):
        for source, unit in _units_of(without(table, one.removed)):
            found.setdefault(source, []).append(unit)
    removed = set(other.removed).difference(one.removed)
    for table in read_segments(store, both if removed else [], named_by, _COLUMNS):
        is_in = pc.is_in(names_of(table), value_set=pa.array(removed, pa.string()))
        for source, unit in _units_of(table.filter(is_in)):
            found.setdefault(source, []).append(unit)
    return found


def _units_of(table: pa.Table) -> Iterator[tuple[str, DiffUnit]]:
    for row in table.to_pylist():
        unit = row.pop("unit")
        yield unit["source"], DiffUnit(unit=unit["id"], version=unit["version"], **row)
