"""Receipts: the records that commit units, and the hints that units leave when they fail.

A unit's rows exist from the moment its receipt does. Its state is its receipt of the highest
generation: `rows`, or `void` where it is to be encoded again. Receipts are never deleted.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from latentcache.dataset.columns import Column, Columns
from latentcache.dataset.contract import canonical_json
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.storage import ObjectInfo, Store

COMMITS = "commits"
FAILURES = "failures"

MAX_FIELDS = 64
"""How many names of fields a receipt holds at most."""

_READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: a source shard in one version, to be encoded under one contract.

    With a `range`, `k/n`, it is a part of the source, of which it shares size and version with the
    others: the k-th of n, counted from 0.
    """

    id: str
    source: str
    size_bytes: int
    version: str
    range: str | None = None

    @classmethod
    def of(
        cls,
        source: str,
        size_bytes: int,
        version: str,
        contract_fingerprint: str,
        range: str | None = None,
    ) -> Unit:
        """Name the unit: its id is a hash (128 bits, hex) of all that decides its rows."""
        parts = [source, size_bytes, version, range, contract_fingerprint]
        digest = hashlib.sha256(canonical_json(parts)).hexdigest()
        return cls(digest[:32], source, size_bytes, version, range)

    @property
    def title(self) -> str:
        """What a person calls it: its source, and the range of it."""
        return f"{self.source} [{self.range}]" if self.range else self.source

    @property
    def num_bytes(self) -> int:
        """How many bytes of the source are its own, about."""
        num_parts = int(self.range.partition("/")[2]) if self.range else 1
        return self.size_bytes // num_parts


def new_attempt() -> str:
    """Name one attempt at a unit: 128 random bits, hex, so that no two ever share a file."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class DataFile:
    """One immutable file of a unit; `bucket` is `WIDTHxHEIGHT`, empty for rejects."""

    path: str
    size_bytes: int
    sha256: str
    num_rows: int
    bucket: str


@dataclass(frozen=True, slots=True)
class QaFile:
    """A unit's QA rows, and what they come to: enough to hold a run against its gates.

    `num_rows` counts them by bucket; see `dataset.qa.Measured` for the two figures.
    """

    file: DataFile
    num_rows: dict[str, int]
    mean_psnr_db: float
    min_drift_db: float


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """What a committed unit holds: all that a manifest repeats of its receipt.

    `num_images` counts the image files or members of the shard: rows, rejects with an image, and
    `num_extra_images`, which are further images of a sample, such as masks.
    `columns` are the kept columns of its rows, `absent_fields` those of their fields that no sample
    of the unit has, and `reject_reasons` counts the rejects by `stage/reason`.
    """

    unit: Unit
    generation: int
    attempt: str
    num_samples: int
    num_rows: int
    num_rejects: int
    files: tuple[DataFile, ...]
    rejects: DataFile | None
    qa: QaFile | None = None
    num_images: int = 0
    num_extra_images: int = 0
    columns: Columns = ()
    absent_fields: tuple[str, ...] = ()
    reject_reasons: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The receipt's own name, `<unit>-<generation>`."""
        return f"{self.unit.id}-{self.generation}"


@dataclass(frozen=True, slots=True)
class QaSummary:
    """What gates ask of a unit's QA: see `QaFile`."""

    num_rows: dict[str, int]
    mean_psnr_db: float
    min_drift_db: float


@dataclass(frozen=True, slots=True)
class UnitSummary:
    """What planning needs of a unit, and all of it that a driver keeps: a few hundred bytes.

    `is_void`: it is to be encoded again. `segment` is the position of the segment that names it
    among those of the newest manifest; None while no segment does.
    """

    unit_id: str
    source: str
    generation: int
    num_samples: int
    num_rows: int
    num_rejects: int
    qa: QaSummary | None = None
    columns: Columns = ()
    absent_fields: tuple[str, ...] = ()
    reject_reasons: dict[str, int] = field(default_factory=dict)
    is_void: bool = False
    segment: int | None = None
    num_images: int = 0
    num_extra_images: int = 0

    @classmethod
    def of(
        cls, record: UnitRecord, *, is_void: bool = False, segment: int | None = None
    ) -> UnitSummary:
        """Keep of a record what planning needs."""
        qa = record.qa
        return cls(
            unit_id=record.unit.id,
            source=record.unit.source,
            generation=record.generation,
            num_samples=record.num_samples,
            num_rows=record.num_rows,
            num_rejects=record.num_rejects,
            qa=QaSummary(qa.num_rows, qa.mean_psnr_db, qa.min_drift_db) if qa else None,
            columns=record.columns,
            absent_fields=record.absent_fields,
            reject_reasons=record.reject_reasons,
            is_void=is_void,
            segment=segment,
            num_images=record.num_images,
            num_extra_images=record.num_extra_images,
        )

    @property
    def name(self) -> str:
        """The name of the receipt that it is of, `<unit>-<generation>`."""
        return f"{self.unit_id}-{self.generation}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record that commits a unit.

    `stages` holds busy seconds, wait seconds and threads by stage, `elapsed_s` how long the attempt
    took, `versions` what encoded it; `notes` counts what is worth knowing: latents that were not
    finite and were encoded again in fp32, and with int8 the values that lay outside its range.
    `extra_image_fields` names fields that hold further images of samples.
    `fields` names fields that samples of the unit have, at most `MAX_FIELDS` of them.
    """

    record: UnitRecord
    contract_fingerprint: str
    statistics: Statistics
    state: Literal["rows", "void"] = "rows"
    stages: dict[str, dict[str, float]] | None = None
    elapsed_s: float | None = None
    versions: dict[str, str] | None = None
    notes: dict[str, int] | None = None
    extra_image_fields: list[str] | None = None
    fields: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where the receipt lies."""
        return f"{COMMITS}/{self.record.name}.json"

    def to_bytes(self) -> bytes:
        """Give the receipt as JSON."""
        tree = asdict(replace(self, statistics=None))  # type: ignore[arg-type]
        tree["statistics"] = self.statistics.to_json()
        return canonical_json(tree)

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """Read what `to_bytes` gave.

        Raises:
            DatasetError: it is not a receipt.
        """
        try:
            tree = json.loads(data)
            tree["record"] = record_from_json(tree["record"])
            tree["statistics"] = Statistics.from_json(tree["statistics"])
            tree["fields"] = tuple(tree["fields"])
            return cls(**tree)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"not a receipt: {error}") from error

    def voided(self) -> Receipt:
        """Give the receipt that undoes this one: no rows, at the next generation."""
        num_channels = len(self.statistics.mean)
        unit, generation = self.record.unit, self.record.generation + 1
        return void_receipt(unit, generation, self.contract_fingerprint, num_channels)


def void_receipt(
    unit: Unit, generation: int, contract_fingerprint: str, num_channels: int
) -> Receipt:
    """Give a receipt that says: this unit is to be encoded again, whatever it held before."""
    record = UnitRecord(unit, generation, new_attempt(), 0, 0, 0, files=(), rejects=None)
    empty = Statistics.empty(num_channels)
    return Receipt(record, contract_fingerprint, empty, state="void")


def record_from_json(tree: dict[str, Any]) -> UnitRecord:
    """Read a `UnitRecord` as JSON or a segment hold it."""
    qa = tree["qa"]
    return UnitRecord(
        **{
            **tree,
            "unit": Unit(**tree["unit"]),
            "files": tuple(DataFile(**file) for file in tree["files"]),
            "rejects": DataFile(**tree["rejects"]) if tree["rejects"] else None,
            "qa": QaFile(**{**qa, "file": DataFile(**qa["file"])}) if qa else None,
            "columns": tuple(Column(**column) for column in tree["columns"]),
            "absent_fields": tuple(tree["absent_fields"]),
        }
    )


def read_receipts(store: Store, names: Iterable[str]) -> list[Receipt]:
    """Read receipts by name, many at a time.

    Raises:
        DatasetError: one is damaged; the message names it.
    """

    def read(name: str) -> Receipt:
        path = f"{COMMITS}/{name}.json"
        try:
            return Receipt.from_bytes(store.read_bytes(path))
        except DatasetError as error:
            raise DatasetError(f"{store.url_of(path)}: {error}") from error

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(read, names))


def list_receipt_names(store: Store) -> list[str]:
    """List the names of all receipts. A listing is a hint: one it misses costs work, not rows."""
    paths = (info.path for info in store.list(COMMITS))
    return [
        p.removeprefix(f"{COMMITS}/").removesuffix(".json") for p in paths if p.endswith(".json")
    ]


def put_failure(store: Store, unit: Unit, attempt: str, message: str) -> None:
    """Leave a hint that a unit failed, and how; the next plan tells it."""
    tree = {"unit": asdict(unit), "attempt": attempt, "message": message}
    store.put(f"{FAILURES}/{unit.id}-{attempt}.json", canonical_json(tree))


def list_failures(store: Store) -> list[ObjectInfo]:
    """List the failure hints, the latest last."""
    return sorted(store.list(FAILURES), key=lambda info: info.modified_at or 0.0)


def failed_unit(path: str) -> str:
    """Tell from a hint's path the id of its unit."""
    return path.rpartition("/")[2].partition("-")[0]


def read_failures(store: Store, paths: Iterable[str]) -> dict[str, str]:
    """Read failure hints: unit id to its last one's message."""
    return {tree["unit"]["id"]: tree["message"] for tree in _read_hints(store, paths)}


def read_failed_units(store: Store, paths: Iterable[str]) -> list[Unit]:
    """Read which units some failure hints are of."""
    return [Unit(**tree["unit"]) for tree in _read_hints(store, paths)]


def _read_hints(store: Store, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    def read(path: str) -> bytes | None:
        try:
            return store.read_bytes(path)
        except ObjectNotFound:  # `gc` deletes old ones, beside whoever plans or asks for the status
            return None

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        yield from (json.loads(hint) for hint in pool.map(read, paths) if hint is not None)
