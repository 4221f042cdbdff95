"""The messages between driver and actor: the job, the task of a unit, the failure of a unit."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentcache.config import Config
from latentcache.dataset.columns import Columns, columns_of
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Unit
from latentcache.errors import LatentCacheError
from latentcache.images.source import SourceShard
from latentcache.qa.evaluator import QaModels
from latentcache.storage import ObjectInfo, Store
from latentcache.storage_options import StorageOptions
from latentcache.vae.weights import absolute_url

# While one unit is finished, the next one is fetched and decoded.
UNITS_PER_ACTOR = 2


@dataclass(frozen=True, slots=True)
class QaJob:
    """The share of rows that QA evaluates, the seed of their sample, and the models to use."""

    fraction: float
    seed: int
    models: QaModels


@dataclass(frozen=True, slots=True)
class Job:
    """The settings that all units of a run share.

    With `loads_late` an actor loads the encoder when the first unit needs it.
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
    """Return the part of a config that actors need.

    Args:
        config, contract, decode_threads: `decode_threads` is the number in each actor.
    """
    batch_size, output_storage, qa = config.compute.batch_size, config.output.storage, config.qa
    qa_job = None
    if qa:
        models = QaModels(
            # An actor loads only the encoder of the VAE, so the decoder is always named.
            decoder=absolute_url(qa.decoder or config.vae.checkpoint),
            lpips=(absolute_url(qa.lpips.url), qa.lpips.sha256) if qa.lpips else None,
            decoder_storage=qa.storage if qa.decoder else config.vae.storage,
            lpips_storage=qa.storage,
        )
        qa_job = QaJob(qa.fraction, qa.seed, models)
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
        qa=qa_job,
        name=config.name,
    )


@dataclass(frozen=True, slots=True)
class UnitTask:
    """One attempt at one unit; see `PlannedUnit`.

    `rewrites` writes the rows of the generation before this one again with other columns. A trial
    with `max_samples` has a receipt that must not be put.
    """

    unit: Unit
    generation: int
    attempt: str
    min_qa_rows: dict[str, int] = field(default_factory=dict)  # by bucket
    max_samples: int | None = None
    files: tuple[ObjectInfo, ...] = ()
    rewrites: bool = False
    url: str | None = None

    @property
    def shard(self) -> SourceShard:
        """The source shard of the unit."""
        unit, url = self.unit, self.url or self.unit.source
        return SourceShard(
            url, unit.size_bytes, unit.version, unit.range, self.files, identity=unit.source
        )


@dataclass(frozen=True, slots=True)
class UnitFailure:
    """Why an attempt has no receipt."""

    message: str
    changed: bool = False  # the source no longer has the listed version
    denied: bool = False  # a store refused access to this node
    fatal: LatentCacheError | None = None  # affects all units and ends the run
    lacks_field: bool = False  # of the config, so another attempt would fail too
