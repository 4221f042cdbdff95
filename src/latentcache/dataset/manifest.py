"""Manifests: numbered snapshots of which committed units make up the dataset.

Manifest N+1 is a function of manifest N, one listing of the source, and the receipts. Receipts hold
what was done; a manifest says which of it counts. It names its units through segments, immutable
Parquet files with one row per unit, less the names in `removed`; a new manifest adds one segment.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.columns import Column, Columns
from latentcache.dataset.contract import FORMAT_VERSION
from latentcache.dataset.segments import (
    SEGMENT_SCHEMA,
    Segment,
    Totals,
    UnitRecords,
    read_segments,
    without,
)
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.storage import Store

MANIFESTS = "manifests"

ManifestName: TypeAlias = int | Literal["published"]
"""Which manifest: its number, or the one that `published.json` names."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A numbered snapshot; `removed` names units of its segments (`<unit>-<generation>`) that no
    longer count, and `void` receipts, which are in no segment; `stale` the sources whose listed
    version is not encoded yet and whose older rows stand in for it. `columns` are the kept columns
    that its rows are to have. `complete` says that every listed source is encoded at its listed
    version, that its rows have these columns, and that there is at least one row.
    """

    number: int
    complete: bool
    created_at: str
    contract: str
    columns: Columns
    segments: tuple[Segment, ...]
    removed: tuple[str, ...]
    stale: tuple[str, ...]
    num_units: int
    num_samples: int
    num_rows: int
    num_rejects: int
    buckets: dict[str, int]
    statistics: Statistics
    num_images: int = 0
    num_extra_images: int = 0
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
            tree = json.loads(data)
            if tree["format_version"] != FORMAT_VERSION:
                raise DatasetError(f"{url} has format version {tree['format_version']}")
            tree["segments"] = tuple(Segment(**segment) for segment in tree["segments"])
            tree["columns"] = tuple(Column(**column) for column in tree["columns"])
            tree["removed"], tree["stale"] = tuple(tree["removed"]), tuple(tree["stale"])
            tree["statistics"] = Statistics.from_json(tree["statistics"])
            return cls(**tree)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{url} is not a manifest: {error}") from error


def put_manifest(store: Store, manifest: Manifest) -> bool:
    """Put a manifest; False if another came first.

    `gc` deletes old ones: that a number is free does not say that it is the next one.
    """
    if any(number >= manifest.number for number in list_manifests(store)):
        return False
    return store.put_if_absent(manifest.path, manifest.to_bytes())


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
        return Manifest.from_bytes(store.read_bytes(path), store.url_of(path))
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
    empty = SEGMENT_SCHEMA.empty_table().select(columns)
    return UnitRecords(pa.concat_tables([*_live_rows(store, manifest, columns), empty]))


def read_files(store: Store, manifest: Manifest) -> pa.Table:
    """Read the data files of a manifest's units, in the order of `read_records`.

    Columns are `unit` (its id) and those of `DataFile`. Millions of files take no Python object
    each, as records would.

    Raises:
        DatasetError: a segment is missing or damaged.
    """
    columns = ["unit", "generation", "files"]
    empty = SEGMENT_SCHEMA.empty_table().select(columns)
    live = pa.concat_tables([*_live_rows(store, manifest, columns), empty])
    unit = live["unit"].combine_chunks()
    keys = {name: pc.struct_field(unit, name) for name in ("source", "id")}
    units = pa.table({**keys, "files": live["files"]})
    units = units.sort_by([("source", "ascending"), ("id", "ascending")])
    lists = units["files"].combine_chunks()
    files = pa.Table.from_struct_array(pc.list_flatten(lists))
    ids = units["id"].take(pc.list_parent_indices(lists))
    return files.add_column(0, "unit", ids)


def _live_rows(store: Store, manifest: Manifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    tables = read_segments(store, manifest.segments, f"manifest {manifest.number}", columns)
    return (without(table, manifest.removed) for table in tables)
