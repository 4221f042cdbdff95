"""What changed between two manifests of a dataset, by source."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.contract import require_contract
from latentcache.dataset.manifest import Manifest, ManifestName, list_manifests, read_manifest
from latentcache.dataset.manifest_parts import names_of, read_parts, without
from latentcache.dataset.publish import find_manifest
from latentcache.errors import DatasetError
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

_COLUMNS = ("unit", "generation", "num_rows", "num_rejects")


@dataclass(frozen=True, slots=True)
class DiffUnit:
    """A unit that counts in only one of two manifests; `version` is that of its source."""

    unit: str
    version: str
    generation: int
    num_rows: int
    num_rejects: int


@dataclass(frozen=True, slots=True)
class SourceDiff:
    """A source whose units differ: units only in the older manifest, and only in the newer one."""

    source: str
    before: tuple[DiffUnit, ...]
    after: tuple[DiffUnit, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of some units."""

    num_units: int
    num_rows: int
    num_rejects: int


@dataclass(frozen=True, slots=True)
class DiffCounts:
    """The totals of a diff: `before + added - removed - replaced + replacing = after`.

    `before` and `after` are totals of whole manifests. `replaced` counts the units that were
    removed from replaced sources, `replacing` the units that were added to them.
    """

    before: Counts
    added: Counts
    replaced: Counts
    replacing: Counts
    removed: Counts
    after: Counts


@dataclass(frozen=True, slots=True)
class ManifestDiff:
    """The differences between the manifests with the numbers `before` and `after`.

    `added` lists sources that only gained units, `removed` sources that only lost units, and
    `replaced` sources that did both. All are sorted by URL.
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

    Args:
        url, storage: see `open_dataset`.
        before: a manifest; None takes the last complete one before `after`.
        after: a manifest; None takes the newest complete one.

    Raises:
        DatasetError: there is no dataset, or no such manifest.
    """
    store = Store(url, storage or StorageOptions())
    require_contract(store)
    new = find_manifest(store, after)
    old = _complete_before(store, new.number) if before is None else find_manifest(store, before)
    lost, gained = _differing(store, old, new), _differing(store, new, old)
    diffs = [
        SourceDiff(source, tuple(lost.get(source, ())), tuple(gained.get(source, ())))
        for source in sorted(lost.keys() | gained.keys())
    ]
    added = tuple(diff for diff in diffs if not diff.before)
    removed = tuple(diff for diff in diffs if not diff.after)
    replaced = tuple(diff for diff in diffs if diff.before and diff.after)
    counts = DiffCounts(
        before=Counts(old.num_units, old.num_rows, old.num_rejects),
        added=_count(diff.after for diff in added),
        replaced=_count(diff.before for diff in replaced),
        replacing=_count(diff.after for diff in replaced),
        removed=_count(diff.before for diff in removed),
        after=Counts(new.num_units, new.num_rows, new.num_rejects),
    )
    return ManifestDiff(old.number, new.number, counts, added, replaced, removed)


def _count(groups: Iterable[Iterable[DiffUnit]]) -> Counts:
    units = list(chain.from_iterable(groups))
    num_rows = sum(unit.num_rows for unit in units)
    return Counts(len(units), num_rows, sum(unit.num_rejects for unit in units))


def _complete_before(store: Store, number: int) -> Manifest:
    for earlier in reversed(list_manifests(store)):
        if earlier < number and (manifest := read_manifest(store, earlier)).complete:
            return manifest
    raise DatasetError(f"{store.url} has no complete manifest before {number} to compare it with")


def _differing(store: Store, one: Manifest, other: Manifest) -> dict[str, list[DiffUnit]]:
    """Return, by source, the units that count in `one` manifest but not in the `other`.

    A part of both is read only if their `removed` units differ.
    """
    shared, named_by = set(other.parts), f"manifest {one.number}"
    own = [part for part in one.parts if part not in shared]
    both = [part for part in one.parts if part in shared]
    removed = set(other.removed).difference(one.removed)
    tables = [without(table, one.removed) for table in read_parts(store, own, named_by, _COLUMNS)]
    for table in read_parts(store, both if removed else [], named_by, _COLUMNS):
        is_in = pc.is_in(names_of(table), value_set=pa.array(removed, pa.string()))
        tables.append(table.filter(is_in))
    units: dict[str, list[DiffUnit]] = {}
    for row in chain.from_iterable(table.to_pylist() for table in tables):
        unit = row.pop("unit")
        added = DiffUnit(unit=unit["id"], version=unit["version"], **row)
        units.setdefault(unit["source"], []).append(added)
    return units
