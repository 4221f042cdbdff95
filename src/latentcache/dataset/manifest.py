"""Manifests: numbered snapshots of which committed units make up the dataset.

Manifest N+1 is a function of manifest N, one listing of the source, and the receipts. Receipts hold
what was done; a manifest says which of it counts. It names its units through segments, immutable
Parquet files with one row per unit, less the names in `removed`; a new manifest adds one segment.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.columns import Columns, require_columns
from latentcache.dataset.contract import FORMAT_VERSION, require_format
from latentcache.dataset.parse import (
    MAX_COUNT,
    BucketName,
    Count,
    Range,
    Sha256,
    UnitName,
    build,
    load_json,
)
from latentcache.dataset.segments import (
    SEGMENT_SCHEMA,
    Segment,
    Totals,
    UnitRecords,
    read_segments,
    segment_path,
    without,
)
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError, DeadlinePassed, ObjectNotFound
from latentcache.storage import Store

MANIFESTS = "manifests"
MAX_MANIFEST = 99_999_999

ManifestName: TypeAlias = int | Literal["published"]
"""Which manifest: its number, or the one that `published.json` names."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A numbered snapshot of the dataset.

    `removed` names the units (`<unit>-<generation>`) that never count again, in this manifest and
    in those after it: units of its segments, and receipts of older versions of a source that no
    manifest named. `stale` names the sources whose listed version is not encoded yet and whose
    older rows stand in for it. `columns` are the kept columns that its rows are to have. `complete`
    says that every listed source is encoded at its listed version, that its rows have these
    columns, and that there is at least one row.
    """

    number: Annotated[int, Range(0, MAX_MANIFEST)]
    complete: bool
    created_at: str
    contract: Sha256
    columns: Columns
    segments: tuple[Segment, ...]
    removed: tuple[UnitName, ...]
    stale: tuple[str, ...]
    num_units: Count
    num_samples: Count
    num_rows: Count
    num_rejects: Count
    buckets: dict[BucketName, Count]
    statistics: Statistics
    num_images: Count = 0
    num_extra_images: Count = 0
    format_version: int = FORMAT_VERSION

    @property
    def path(self) -> str:
        """Where the manifest lies."""
        return f"{MANIFESTS}/{self.number:08d}.json"

    @property
    def totals(self) -> Totals:
        """What the units of the manifest come to."""
        return Totals(
            self.num_units,
            self.num_samples,
            self.num_rows,
            self.num_rejects,
            Counter(self.buckets),
            self.statistics,
            self.num_images,
            self.num_extra_images,
        )

    def to_bytes(self) -> bytes:
        """Give the manifest as JSON."""
        tree = asdict(replace(self, statistics=None))  # type: ignore[arg-type]
        tree["statistics"] = self.statistics.to_json()
        return json.dumps(tree, sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Manifest:
        """Read what `to_bytes` gave; `url` is for the error.

        Raises:
            DatasetError: it is damaged or of another format version.
        """
        try:
            tree = load_json(data)
            require_format(tree, url)
            manifest = build(cls, tree)
            require_columns(manifest.columns)
            if wrong := [s.path for s in manifest.segments if s.path != segment_path(s.sha256)]:
                raise ValueError(f"segments has the path {wrong[0]}")
            return manifest
        except ValueError as error:
            raise DatasetError(f"{url} is not a manifest: {error}") from error


def put_manifest(store: Store, manifest: Manifest, valid_until: float = math.inf) -> bool:
    """Put a manifest.

    `gc` deletes old ones: that a number is free does not say that it is the next one.

    Args:
        store: the output.
        manifest: has the next number.
        valid_until: as in `Store.put_if_absent`.

    Returns:
        False if another came first, or if it is too late.
    """
    if any(number >= manifest.number for number in list_manifests(store)):
        return False
    try:
        return store.put_if_absent(manifest.path, manifest.to_bytes(), valid_until=valid_until)
    except DeadlinePassed:
        return False


def list_manifests(store: Store) -> list[int]:
    """List the numbers of all manifests, oldest first."""
    matches = (re.fullmatch(rf"{MANIFESTS}/(\d{{8}})\.json", i.path) for i in store.list(MANIFESTS))
    return [int(match[1]) for match in matches if match]


def read_manifest(store: Store, number: int) -> Manifest:
    """Read one manifest.

    Raises:
        DatasetError: there is none of that number, or it is damaged.
    """
    path = f"{MANIFESTS}/{number:08d}.json"
    try:
        manifest = Manifest.from_bytes(store.read_bytes(path), store.url_of(path))
        if manifest.number != number:
            raise DatasetError(f"{store.url_of(path)} says that it is manifest {manifest.number}")
        return manifest
    except ObjectNotFound as error:
        known = list_manifests(store)
        have = f"it has {known[0]} to {known[-1]}" if known else "it has none"
        raise DatasetError(f"{store.url} has no manifest {number}; {have}") from error


def newest_manifest(store: Store) -> Manifest | None:
    """Read the newest manifest, complete or not; None where there is none."""
    numbers = list_manifests(store)
    return read_manifest(store, numbers[-1]) if numbers else None


def read_records(store: Store, manifest: Manifest) -> UnitRecords:
    """Read the units that count in a manifest, in the order of their sources.

    Raises:
        DatasetError: a segment is missing or damaged.
    """
    columns = [name for name in SEGMENT_SCHEMA.names if name != "statistics"]
    return UnitRecords(_live_units(store, manifest, columns))


def read_files(store: Store, manifest: Manifest) -> pa.Table:
    """Read the data files of a manifest's units, in the order of `read_records`.

    Columns are `unit` (its id) and those of `DataFile`. Millions of files take no Python object
    each, as records would.

    Raises:
        DatasetError: a segment is missing or damaged.
    """
    columns = ["unit", "generation", "files"]
    live = _live_units(store, manifest, columns)
    unit = live["unit"].combine_chunks()
    keys = {name: pc.struct_field(unit, name) for name in ("source", "id")}
    units = pa.table({**keys, "files": live["files"]})
    units = units.sort_by([("source", "ascending"), ("id", "ascending")])
    lists = units["files"].combine_chunks()
    files = pa.Table.from_struct_array(pc.list_flatten(lists))
    ids = units["id"].take(pc.list_parent_indices(lists))
    return files.add_column(0, "unit", ids)


def _live_units(store: Store, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
    """Read the segments' rows that count, and refuse a unit that would count twice."""
    tables = read_segments(store, manifest.segments, f"manifest {manifest.number}", columns)
    empty = SEGMENT_SCHEMA.empty_table().select(columns)
    live = pa.concat_tables([*(without(table, manifest.removed) for table in tables), empty])
    ids = pc.struct_field(live["unit"].combine_chunks(), "id")
    num_rows = pc.struct_field(pc.list_flatten(live["files"].combine_chunks()), "num_rows")
    num_rows = pc.sum(num_rows.cast(pa.float64()), min_count=0).as_py()
    if pc.count_distinct(ids).as_py() < len(ids) or num_rows > MAX_COUNT:
        raise DatasetError(f"{store.url_of(manifest.path)} names a unit twice, or too many rows")
    return live
