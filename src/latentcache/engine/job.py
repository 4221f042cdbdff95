"""What the driver tells an actor, and what it hears of a unit that failed."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Unit
from latentcache.engine.sample import SampleSpec
from latentcache.errors import LatentCacheError
from latentcache.storage import StorageOptions


@dataclass(frozen=True, slots=True)
class QaJob:
    """Which rows are looked at, and with what; `lpips` is a network's (URL, SHA-256)."""

    sample: SampleSpec
    decoder: str
    decoder_storage: StorageOptions
    lpips: tuple[str, str] | None
    lpips_storage: StorageOptions


@dataclass(frozen=True, slots=True)
class Job:
    """What every unit of a run has in common."""

    contract: Contract
    checkpoint: str
    checkpoint_storage: StorageOptions
    source_storage: StorageOptions
    output_url: str
    output_storage: StorageOptions
    batch_size: int | None
    decode_threads: int
    qa: QaJob | None = None


@dataclass(frozen=True, slots=True)
class UnitTask:
    """One attempt at one unit; `qa_wanted` counts the QA rows wanted of each bucket, at least."""

    unit: Unit
    generation: int
    attempt: str
    qa_wanted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnitFailure:
    """Why an attempt gave no receipt.

    `changed`: the source is no longer the listed version. `fatal`: what ends the whole run, because
    no other unit can fare better, such as a disk without room.
    """

    message: str
    changed: bool = False
    fatal: LatentCacheError | None = None
