"""Manifests: numbered snapshots that define which committed units make up the dataset.

Manifest N+1 is a function of manifest N, one snapshot of the source, and the receipts. Receipts
record what was committed; a manifest defines which of it counts. A manifest lists parts:
immutable Parquet files with one row per unit. Units named in `removed` do not count. A new manifest
adds one part.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.columns import Columns
from latentcache.dataset.contract import FORMAT_VERSION, require_format
from latentcache.dataset.manifest_parts import (
    PART_SCHEMA,
    PARTS,
    ManifestPart,
    Totals,
    UnitRecords,
    read_parts,
    without,
)
from latentcache.dataset.parse import MAX_COUNT, Range, Sha256, UnitName, build, load_json
from latentcache.errors import DatasetError, DeadlinePassed, ObjectNotFound
from latentcache.storage import Store

MANIFESTS = "manifests"
MAX_MANIFEST = 99_999_999

ManifestName: TypeAlias = int | Literal["published"]
"""The number of a manifest, or "published" for the one that `published.json` names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Totals):
    """A numbered snapshot of the dataset, with the totals of its units.

    `removed` names the units (`<unit>-<generation>`) that do not count in this or any later
    manifest: units of its parts, and receipts of older versions of a source that no manifest
    listed. `stale` names the sources whose listed version is not encoded yet, so that rows of an
    older version count instead. `columns` are the kept columns that the rows should have.
    `complete` is true if every listed source is encoded at its listed version, its rows have these
    columns, and there is at least one row.
    """

    number: Annotated[int, Range(0, MAX_MANIFEST)]
    complete: bool
    created_at: str
    contract: Sha256
    columns: Columns
    parts: tuple[ManifestPart, ...]
    removed: tuple[UnitName, ...]
    stale: tuple[str, ...]
    format_version: int = FORMAT_VERSION

    @property
    def path(self) -> str:
        """The path of the manifest in the output."""
        return f"{MANIFESTS}/{self.number:08d}.json"

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON."""
        tree = asdict(self) | {"statistics": self.statistics.to_json()}
        return json.dumps(tree, sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Manifest:
        """Parse the result of `to_bytes`.

        Args:
            data, url: the JSON, and the URL for error messages.
        """
        try:
            tree = load_json(data)
            require_format(tree, url)
            manifest = build(cls, tree)
            for part in manifest.parts:
                if part.path != f"{PARTS}/{part.sha256}.parquet":
                    raise ValueError(f"parts has the path {part.path}")
            return manifest
        except ValueError as error:
            raise DatasetError(f"{url} is not a manifest: {error}") from error


def put_manifest(store: Store, manifest: Manifest, valid_until: float = math.inf) -> bool:
    """Put a manifest, unless its number or a higher one exists; return whether it was put.

    Args:
        store, manifest: the output, and the manifest with the next number.
        valid_until: deadline, as in `Store.put_if_absent`; after it nothing is put.
    """
    # `gc` deletes old manifests, so a free number is not always the next one.
    if any(number >= manifest.number for number in list_manifests(store)):
        return False
    try:
        return store.put_if_absent(manifest.path, manifest.to_bytes(), valid_until=valid_until)
    except DeadlinePassed:
        return False


def list_manifests(store: Store) -> list[int]:
    """Return the numbers of all manifests, oldest first."""
    matches = (re.fullmatch(rf"{MANIFESTS}/(\d{{8}})\.json", i.path) for i in store.list(MANIFESTS))
    return [int(match[1]) for match in matches if match]


def read_manifest(store: Store, number: int) -> Manifest:
    """Return a manifest; raise `DatasetError` if it is missing or damaged.

    Args:
        store, number: the output, and the number of the manifest.
    """
    path = f"{MANIFESTS}/{number:08d}.json"
    url = store.url_of(path)
    try:
        manifest = Manifest.from_bytes(store.read_bytes(path), url)
    except ObjectNotFound as error:
        known = list_manifests(store)
        have = f"it has {known[0]} to {known[-1]}" if known else "it has none"
        raise DatasetError(f"{store.url} has no manifest {number}; {have}") from error
    if manifest.number != number:
        raise DatasetError(f"{url} is damaged: it has the number {manifest.number}")
    return manifest


def newest_manifest(store: Store) -> Manifest | None:
    """Return the newest manifest, complete or not, or None if there is none."""
    numbers = list_manifests(store)
    return read_manifest(store, numbers[-1]) if numbers else None


def read_records(store: Store, manifest: Manifest) -> UnitRecords:
    """Return the records of the units that count in a manifest, sorted by source.

    Args:
        store, manifest: the output, and the manifest.
    """
    columns = [name for name in PART_SCHEMA.names if name != "statistics"]
    return UnitRecords(_live_units(store, manifest, columns))


def read_files(store: Store, manifest: Manifest) -> pa.Table:
    """Return a table of the data files of a manifest's units, in the order of `read_records`.

    Its columns are `unit` (the unit's id) and the fields of `DataFile`.

    Args:
        store, manifest: the output, and the manifest.
    """
    live = _live_units(store, manifest, ["unit", "generation", "files"])
    ids = pc.struct_field(live["unit"].combine_chunks(), "id")
    lists = live["files"].combine_chunks()
    files = pa.Table.from_struct_array(pc.list_flatten(lists))
    return files.add_column(0, "unit", ids.take(pc.list_parent_indices(lists)))


def _live_units(store: Store, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
    """Return the rows of the units that count, sorted by source; check that none counts twice."""
    tables = read_parts(store, manifest.parts, f"manifest {manifest.number}", columns)
    empty = PART_SCHEMA.empty_table().select(columns)
    live = pa.concat_tables([*(without(table, manifest.removed) for table in tables), empty])
    live = live.combine_chunks()
    unit = live["unit"].combine_chunks()
    keys = {name: pc.struct_field(unit, name) for name in ("source", "id")}
    num_rows = pc.struct_field(pc.list_flatten(live["files"].combine_chunks()), "num_rows")
    num_rows = pc.sum(num_rows.cast(pa.float64()), min_count=0).as_py()
    if pc.count_distinct(keys["id"]).as_py() < len(live) or num_rows > MAX_COUNT:
        raise DatasetError(f"{store.url_of(manifest.path)} lists a unit twice, or too many rows")
    order = [(name, "ascending") for name in keys]
    return live.take(pc.sort_indices(pa.table(keys), sort_keys=order))
