"""What the driver tells an actor, and what it hears of a unit that failed."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentcache.config import Config
from latentcache.dataset.columns import Columns, columns_of
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Unit
from latentcache.errors import LatentCacheError
from latentcache.images.source import SourceShard
from latentcache.qa.evaluator import QaModels
from latentcache.qa.row_sample import SampleSpec
from latentcache.storage import ObjectInfo, Store
from latentcache.storage_options import StorageOptions
from latentcache.vae.weights import absolute_url

# One unit is finished while the next is fetched and decoded.
UNITS_PER_ACTOR = 2


@dataclass(frozen=True, slots=True)
class QaJob:
    """Which rows of a unit are measured, and with what."""

    sample: SampleSpec
    models: QaModels


@dataclass(frozen=True, slots=True)
class Job:
    """What every unit of a run has in common; `name` is the config's.

    `columns` are the kept columns. With `loads_late` an actor loads the encoder once a unit needs
    it: a run may have nothing to encode.
    """

    contract: Contract
    checkpoint: str
    checkpoint_storage: StorageOptions
    source_storage: StorageOptions
    output_url: str
    output_storage: StorageOptions
    batch_size: int | None
    decode_threads: int
    qa: QaJob | None = None
    name: str = ""
    columns: Columns = ()
    loads_late: bool = False


def make_job(config: Config, contract: Contract, decode_threads: int) -> Job:
    """Tell of a config what an actor needs to know."""
    batch_size = config.compute.batch_size
    output_storage = config.output.storage
    return Job(
        contract=contract,
        columns=columns_of(config.source.keep),
        checkpoint=absolute_url(config.vae.checkpoint),
        checkpoint_storage=config.vae.storage,
        source_storage=config.source.storage,
        output_url=Store(config.output.url, output_storage).url,
        output_storage=output_storage,
        batch_size=None if batch_size == "auto" else batch_size,
        decode_threads=decode_threads,
        qa=_qa_job(config),
        name=config.name,
    )


def _qa_job(config: Config) -> QaJob | None:
    qa = config.qa
    if qa is None:
        return None
    models = QaModels(
        # An actor loads the encoder alone, so a decoder is always named.
        decoder=absolute_url(qa.decoder or config.vae.checkpoint),
        lpips=(absolute_url(qa.lpips.url), qa.lpips.sha256) if qa.lpips else None,
        decoder_storage=qa.storage if qa.decoder else config.vae.storage,
        lpips_storage=qa.storage,
    )
    return QaJob(SampleSpec(qa.fraction, qa.seed), models)


@dataclass(frozen=True, slots=True)
class UnitTask:
    """One attempt at one unit; `qa_wanted` counts the QA rows wanted of each bucket, at least.

    With `max_samples` no more are read: a trial, whose receipt nobody may put. `files` are those of
    a folder's slot, and `url` is where the source lies if it moved. `rewrites`: the generation
    before this one has the latents, and its rows are written again with other columns.
    """

    unit: Unit
    generation: int
    attempt: str
    qa_wanted: dict[str, int] = field(default_factory=dict)
    max_samples: int | None = None
    files: tuple[ObjectInfo, ...] = ()
    rewrites: bool = False
    url: str | None = None

    @property
    def shard(self) -> SourceShard:
        """What the unit reads."""
        unit, url = self.unit, self.url or self.unit.source
        return SourceShard(
            url, unit.size_bytes, unit.version, unit.range, self.files, identity=unit.source
        )


@dataclass(frozen=True, slots=True)
class UnitFailure:
    """Why an attempt gave no receipt.

    `changed`: the source is no longer the listed version. `denied`: a store refused this node; if
    the driver may read the source, that is the node's fault and not the unit's. `fatal`: what ends
    the whole run, because no other unit can fare better, such as a disk without room.
    `lacks_field`: its file has no column for a field that the config names, which no other attempt
    changes.
    """

    message: str
    changed: bool = False
    denied: bool = False
    fatal: LatentCacheError | None = None
    lacks_field: bool = False
