"""Receipts: the records that commit units, and the hints that units leave when they fail.

A unit's rows exist from the moment its receipt does. The receipt of its highest generation counts,
unless the newest manifest has that name in `removed`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from latentcache.dataset.columns import Columns, require_columns
from latentcache.dataset.contract import canonical_json
from latentcache.dataset.parse import (
    BUCKET,
    UNIT_NAME,
    BucketName,
    Count,
    FilePath,
    Generation,
    NumBytes,
    Pattern,
    Sha256,
    UnitId,
    build,
    load_json,
)
from latentcache.dataset.statistics import Statistics
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.storage import ObjectInfo, Store

COMMITS = "commits"
FAILURES = "failures"

PUT_WITHIN_S = 86400.0
"""A driver puts what names an uploaded file within this time of the upload, or not at all. `gc`
relies on it: a file that is older than two days, and that nothing names, stays unnamed."""

MAX_FIELDS = 64
"""How many names of fields a receipt holds at most."""

_READ_THREADS = 16

_RECEIPT = re.compile(rf"{COMMITS}/({UNIT_NAME})\.json")
_PartName = Annotated[str, Pattern(r"[0-9]{1,9}/[1-9][0-9]{0,8}")]

_log = logging.getLogger(__name__)
_warned_of: set[str] = set()  # hints that cannot be read, each told of once


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: a source shard in one version, to be encoded under one contract.

    With a `range`, `k/n`, it is a part of the source, of which it shares size and version with the
    others: the k-th of n, counted from 0.
    """

    id: UnitId
    source: str
    size_bytes: Count
    version: str
    range: _PartName | None = None

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

    path: FilePath
    size_bytes: NumBytes
    sha256: Sha256
    num_rows: Count
    bucket: Annotated[str, Pattern(f"(?:{BUCKET})?")]


@dataclass(frozen=True, slots=True)
class QaFile:
    """A unit's QA rows, and what they come to: enough to hold a run against its gates.

    `num_rows` counts them by bucket; see `qa.qa_files.Measured` for the two figures.
    """

    file: DataFile
    num_rows: dict[BucketName, Count]
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
    generation: Generation
    attempt: UnitId
    num_samples: Count
    num_rows: Count
    num_rejects: Count
    files: tuple[DataFile, ...]
    rejects: DataFile | None
    qa: QaFile | None = None
    num_images: Count = 0
    num_extra_images: Count = 0
    columns: Columns = ()
    absent_fields: tuple[str, ...] = ()
    reject_reasons: dict[str, Count] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The receipt's own name, `<unit>-<generation>`."""
        return f"{self.unit.id}-{self.generation}"


@dataclass(frozen=True, slots=True)
class QaSummary:
    """What gates ask of a unit's QA: see `QaFile`."""

    num_rows: dict[BucketName, Count]
    mean_psnr_db: float
    min_drift_db: float


@dataclass(frozen=True, slots=True)
class UnitSummary:
    """What planning needs of a unit, and all of it that a driver keeps: a few hundred bytes.

    `segment` is the position of the segment that names it among those of the newest manifest; None
    while no segment does.
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
    segment: int | None = None
    num_images: int = 0
    num_extra_images: int = 0

    @classmethod
    def of(cls, record: UnitRecord, *, segment: int | None = None) -> UnitSummary:
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
    contract_fingerprint: Sha256
    statistics: Statistics
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
            receipt = build(cls, load_json(data))
            _require_own_files(receipt.record)
            require_columns(receipt.record.columns)
            return receipt
        except ValueError as error:
            raise DatasetError(f"not a receipt: {error}") from error


def _require_own_files(record: UnitRecord) -> None:
    """Raise `ValueError` if a record names files of another unit or kind, or one twice."""
    files = {"data": list(record.files)}
    files |= {"rejects": [record.rejects] if record.rejects else []}
    files |= {"qa": [record.qa.file] if record.qa else []}
    for folder, members in files.items():
        for file in members:
            if not file.path.startswith(f"{folder}/{record.unit.id}/"):
                raise ValueError(f"{file.path} is no file of {folder}/{record.unit.id}")
            if bool(file.bucket) != (folder == "data"):
                raise ValueError(f"{file.path} has bucket {file.bucket!r}")
    if len({file.path for file in record.files}) < len(record.files):
        raise ValueError("it names a file twice")


def read_receipts(store: Store, names: Iterable[str], *, missing_ok: bool = False) -> list[Receipt]:
    """Read receipts by name, many at a time.

    Args:
        store: the output.
        names: `<unit>-<generation>` of each.
        missing_ok: leave out those that do not exist.

    Returns:
        The receipts, in the order of their names.

    Raises:
        DatasetError: one is damaged; the message names it.
        ObjectNotFound: one does not exist, without `missing_ok`.
    """

    def read(name: str) -> Receipt | None:
        path = f"{COMMITS}/{name}.json"
        try:
            receipt = Receipt.from_bytes(store.read_bytes(path))
            if receipt.record.name != name:
                raise DatasetError(f"it is the receipt of {receipt.record.name}")
            return receipt
        except DatasetError as error:
            raise DatasetError(f"{store.url_of(path)}: {error}") from error
        except ObjectNotFound:
            if missing_ok:
                return None
            raise

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return [receipt for receipt in pool.map(read, names) if receipt]


def list_receipts(store: Store) -> dict[str, ObjectInfo]:
    """List all receipts by name. A listing is a hint: one it misses costs work, not rows."""
    matches = ((_RECEIPT.fullmatch(info.path), info) for info in store.list(COMMITS))
    return {match[1]: info for match, info in matches if match}


def list_receipt_names(store: Store) -> list[str]:
    """List the names of all receipts; see `list_receipts`."""
    return list(list_receipts(store))


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


@dataclass(frozen=True, slots=True)
class _Hint:
    """What a hint holds."""

    unit: Unit
    message: str


def read_failures(store: Store, paths: Iterable[str]) -> dict[str, str]:
    """Read failure hints: unit id to its last one's message. See `read_failed_units`."""
    return {hint.unit.id: hint.message for hint in _read_hints(store, paths)}


def read_failed_units(store: Store, paths: Iterable[str]) -> list[Unit]:
    """Read which units some failure hints are of.

    A hint that cannot be parsed is left out, with one warning that names it: it is of another
    release, or damaged, and no more than a hint.
    """
    return [hint.unit for hint in _read_hints(store, paths)]


def _read_hints(store: Store, paths: Iterable[str]) -> Iterator[_Hint]:
    def read(path: str) -> _Hint | None:
        try:
            hint = build(_Hint, load_json(store.read_bytes(path)), ignore_unknown=True)
            if hint.unit.id != failed_unit(path):
                raise ValueError(f"it is of unit {hint.unit.id}")
            return hint
        except ObjectNotFound:  # `gc` deletes old ones, beside whoever plans or asks for the status
            return None
        except ValueError as error:
            if (url := store.url_of(path)) not in _warned_of:
                _warned_of.add(url)
                _log.warning("%s is left out: %s; delete it if it stays", url, error)
            return None

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        yield from (hint for hint in pool.map(read, paths) if hint is not None)
