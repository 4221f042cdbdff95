"""Receipts, which commit units, and failure hints, which record that a unit failed.

A unit's rows exist once its receipt exists. The receipt of the highest generation counts, unless
the newest manifest lists its name in `removed`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, TypeVar

from latentcache.dataset.columns import Columns
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

T = TypeVar("T")

COMMITS = "commits"
FAILURES = "failures"

PUT_WITHIN_S = 86400.0
"""How long after the upload of a file a driver may still put an object that names it. `gc` relies
on this limit: an unreferenced file that is older than two days stays unreferenced."""

MAX_FIELDS = 64
"""The maximum number of field names in a receipt."""

_READ_THREADS = 16

_RECEIPT = re.compile(rf"{COMMITS}/({UNIT_NAME})\.json")

_log = logging.getLogger(__name__)
_warned_of: set[str] = set()  # URLs of unreadable hints, each of which is logged once


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work: one version of a source shard, to be encoded under one contract.

    A `range` `k/n` means the k-th of n parts of the source, counted from 0; `size_bytes` and
    `version` are those of the whole source.
    """

    id: UnitId
    source: str
    size_bytes: Count
    version: str
    range: Annotated[str, Pattern(r"[0-9]{1,9}/[1-9][0-9]{0,8}")] | None = None

    @classmethod
    def of(
        cls,
        source: str,
        size_bytes: int,
        version: str,
        contract_fingerprint: str,
        range: str | None = None,
    ) -> Unit:
        """Return the unit; its id is a hash (128 bits, hex) of everything that decides its rows.

        Args:
            source, size_bytes, version, contract_fingerprint, range: what decides the rows.
        """
        parts = [source, size_bytes, version, range, contract_fingerprint]
        digest = hashlib.sha256(canonical_json(parts)).hexdigest()
        return cls(digest[:32], source, size_bytes, version, range)

    @property
    def title(self) -> str:
        """The name of the unit in messages: its source, and its range in brackets."""
        return f"{self.source} [{self.range}]" if self.range else self.source

    @property
    def num_bytes(self) -> int:
        """The approximate number of source bytes that belong to the unit."""
        return self.size_bytes // (int(self.range.partition("/")[2]) if self.range else 1)


def new_attempt() -> str:
    """Return the name of a new attempt: 128 random bits in hex, so that no two share a file."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class DataFile:
    """One immutable file of a unit; `bucket` is `WIDTHxHEIGHT`, empty for rejects."""

    path: FilePath
    size_bytes: NumBytes
    sha256: Sha256
    num_rows: Count
    bucket: Annotated[str, Pattern(f"(?:{BUCKET})?")]


def fields_of(cls: type, instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that an instance of a subclass has, by name."""
    return {field.name: getattr(instance, field.name) for field in fields(cls)}


@dataclass(frozen=True, slots=True, kw_only=True)
class QaSummary:
    """The number of QA rows by bucket, and figures of `qa.qa_files.Measured`."""

    num_rows: dict[BucketName, Count]
    mean_psnr_db: float
    min_drift_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QaFile(QaSummary):
    """A unit's QA file and its figures."""

    file: DataFile

    @property
    def summary(self) -> QaSummary:
        """The figures without the file."""
        return QaSummary(**fields_of(QaSummary, self))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """The counts of units; `num_samples = num_rows + num_rejects`.

    `num_images` counts image files and members of shards, also the `num_extra_images`, which are
    additional images of a sample, such as masks.
    """

    num_samples: Count
    num_rows: Count
    num_rejects: Count
    num_images: Count = 0
    num_extra_images: Count = 0


NO_SAMPLES: dict[str, Any] = {"num_samples": 0, "num_rows": 0, "num_rejects": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFacts(RowCounts):
    """What both a unit's record and its summary hold.

    `columns` are the kept columns of the rows, `absent_fields` the fields of these columns that no
    sample of the unit has. `reject_reasons` counts the rejects by `stage/reason`.
    """

    generation: Generation
    columns: Columns = ()
    absent_fields: tuple[str, ...] = ()
    reject_reasons: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord(UnitFacts):
    """The part of a unit's receipt that a manifest part repeats."""

    unit: Unit
    attempt: UnitId
    files: tuple[DataFile, ...]
    rejects: DataFile | None
    qa: QaFile | None = None

    @property
    def name(self) -> str:
        """The name of the receipt, `<unit>-<generation>`."""
        return f"{self.unit.id}-{self.generation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSummary(UnitFacts):
    """The part of a unit's record that planning needs and a driver keeps: a few hundred bytes.

    `part` is the index of the unit's part in the newest manifest; None if it has none yet.
    """

    unit_id: str
    source: str
    qa: QaSummary | None = None
    part: int | None = None

    @classmethod
    def of(cls, record: UnitRecord) -> UnitSummary:
        """Return the summary of a record."""
        unit, qa = record.unit, record.qa and record.qa.summary
        return cls(unit_id=unit.id, source=unit.source, qa=qa, **fields_of(UnitFacts, record))

    @property
    def name(self) -> str:
        """The name of the unit's receipt, `<unit>-<generation>`."""
        return f"{self.unit_id}-{self.generation}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record that commits a unit.

    `stages` holds busy seconds, wait seconds and the number of threads by stage, `elapsed_s` is the
    duration of the attempt, and `versions` are those of the software that encoded the unit.
    `notes` counts latents that were not finite and were encoded again in fp32, and with int8 the
    values outside its range. `extra_image_fields` lists the fields that hold additional images of
    samples. `fields` lists fields that samples of the unit have, at most `MAX_FIELDS` of them.
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
        """The path of the receipt in the output."""
        return f"{COMMITS}/{self.record.name}.json"

    def to_bytes(self) -> bytes:
        """Return the receipt as canonical JSON."""
        return canonical_json(asdict(self) | {"statistics": self.statistics.to_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """Parse the result of `to_bytes`; raise `DatasetError` if it is something else."""
        try:
            receipt = build(cls, load_json(data))
            _require_own_files(receipt.record)
            return receipt
        except ValueError as error:
            raise DatasetError(f"not a receipt: {error}") from error


def _require_own_files(record: UnitRecord) -> None:
    """Raise `ValueError` if a record lists files of another unit or kind, or a file twice."""
    files = [("data", file) for file in record.files]
    files += [("rejects", record.rejects)] if record.rejects else []
    files += [("qa", record.qa.file)] if record.qa else []
    for folder, file in files:
        if not file.path.startswith(f"{folder}/{record.unit.id}/"):
            raise ValueError(f"{file.path} is not a file in {folder}/{record.unit.id}")
        if bool(file.bucket) != (folder == "data"):
            raise ValueError(f"{file.path} has bucket {file.bucket!r}")
    if len({file.path for _, file in files}) < len(files):
        raise ValueError("it lists a file twice")


def _read_all(read: Callable[[str], T | None], names: Iterable[str]) -> list[T]:
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return [result for result in pool.map(read, names) if result is not None]


def read_receipts(store: Store, names: Iterable[str], *, missing_ok: bool = False) -> list[Receipt]:
    """Read receipts by name (`<unit>-<generation>`); return them in the order of the names.

    Args:
        store, names: the output, and the names.
        missing_ok: leave out receipts that do not exist, instead of raising `ObjectNotFound`.
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

    return _read_all(read, names)


def list_receipts(store: Store) -> dict[str, ObjectInfo]:
    """Return all receipts by name. The result may lack a receipt; this costs work, but no rows."""
    matches = ((_RECEIPT.fullmatch(info.path), info) for info in store.list(COMMITS))
    return {match[1]: info for match, info in matches if match}


def list_receipt_names(store: Store) -> list[str]:
    """Return the names of `list_receipts`."""
    return list(list_receipts(store))


def put_failure(store: Store, unit: Unit, attempt: str, message: str) -> None:
    """Put a hint that an attempt at a unit failed, which the next plan shows.

    Args:
        store, unit, attempt, message: the output, and what failed.
    """
    tree = {"unit": asdict(unit), "attempt": attempt, "message": message}
    store.put(f"{FAILURES}/{unit.id}-{attempt}.json", canonical_json(tree))


def list_failures(store: Store) -> list[ObjectInfo]:
    """Return the failure hints, sorted by time of modification, the latest last."""
    return sorted(store.list(FAILURES), key=lambda info: info.modified_at or 0.0)


def failed_unit(path: str) -> str:
    """Return the id of the unit of a hint, from the hint's path."""
    return path.rpartition("/")[2].partition("-")[0]


@dataclass(frozen=True, slots=True)
class _Hint:
    unit: Unit
    message: str


def read_failures(store: Store, paths: Iterable[str]) -> dict[str, str]:
    """Return the message of each unit's last hint by unit id; warn once of an unreadable hint.

    Args:
        store, paths: the output, and the paths of the hints, the latest last.
    """

    def read(path: str) -> tuple[str, str] | None:
        try:
            hint = build(_Hint, load_json(store.read_bytes(path)), ignore_unknown=True)
            if hint.unit.id != failed_unit(path):
                raise ValueError(f"it is of unit {hint.unit.id}")
            return hint.unit.id, hint.message
        except ObjectNotFound:  # `gc` may delete old hints during `plan` and `status`
            return None
        except ValueError as error:
            if (url := store.url_of(path)) not in _warned_of:
                _warned_of.add(url)
                _log.warning("%s is ignored: %s; delete it if this warning repeats", url, error)
            return None

    return dict(_read_all(read, paths))
