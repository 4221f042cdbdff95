"""What a run will do, and why: the listed source shards less the receipts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from latentcache.config import Calibration, Config, RatioBuckets, require_kind
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.columns import Columns, columns_of, describe_columns
from latentcache.dataset.contract import (
    Contract,
    LatentContract,
    QuantizationContract,
    TransformContract,
    VaeContract,
    contract_diff,
    read_contract,
)
from latentcache.dataset.receipts import Unit, failed_unit, list_failures, read_failures
from latentcache.dataset.state import SourceSnapshot, State, require_few
from latentcache.engine.twice import Twice, find_twice
from latentcache.errors import ConfigError, SourceError
from latentcache.images.samples import Wanted, file_key_and_field
from latentcache.images.source import SourceShard, list_source, source_contract
from latentcache.images.transform import ratio_buckets
from latentcache.storage import ObjectInfo, Store
from latentcache.vae.architecture import FAMILY
from latentcache.vae.scaling import resolve_scaling
from latentcache.vae.weights import encoder_fingerprint, load_vae


@dataclass(frozen=True, slots=True)
class PlannedUnit:
    """A unit to encode, the generation that its receipt will have, why, and a slot's files.

    `url` is where the source lies if it moved. A unit of kind `rewrite` has its rows written again,
    with other columns, around the latents that are stored.
    """

    unit: Unit
    generation: int
    reason: str
    files: tuple[ObjectInfo, ...] = ()
    url: str | None = None
    kind: Literal["encode", "rewrite"] = "encode"


@dataclass(frozen=True, slots=True)
class Sources:
    """What the listing means beside the newest manifest, in sources.

    `num_vanished` are no longer listed; the next manifest keeps their rows or, with
    `on_missing: drop`, drops them.
    """

    num_new: int
    num_changed: int
    num_unchanged: int
    num_vanished: int
    on_missing: str


@dataclass(frozen=True)
class Plan:
    """What is there, and what is left to do.

    `contract` is the one wanted, which before a first run may not be resolved: its units then have
    provisional names. `there` is the one that lies at the output, and `diff` names the fields in
    which they disagree. `twice` tells of new sources that look like known ones.
    """

    output: Store
    contract: Contract
    there: Contract | None
    diff: list[str]
    shards: list[SourceShard]
    units: list[Unit]
    pending: list[PlannedUnit]
    state: State
    on_missing: str
    twice: Twice | None = None

    @property
    def sources(self) -> Sources:
        """Count what is new, changed, unchanged and gone beside the newest manifest."""
        listing, live = self.listing, self.state.live
        changed = [
            source
            for source in listing.keys() & live.keys()
            if {unit.id for unit in listing[source]} != {unit.unit_id for unit in live[source]}
        ]
        return Sources(
            num_new=len(listing.keys() - live.keys()),
            num_changed=len(changed),
            num_unchanged=len(listing.keys() & live.keys()) - len(changed),
            num_vanished=len(live.keys() - listing.keys()),
            on_missing=self.on_missing,
        )

    @property
    def listing(self) -> SourceSnapshot:
        """Each listed source with its units."""
        return by_source(self.units)

    @property
    def num_images(self) -> int | None:
        """Count the image files of folders, which a listing shows; None for other sources."""
        files = [file for shard in self.shards for file in shard.files]
        if not files:
            return None
        wanted = Wanted(self.contract.source.image_fields, ())
        return sum(wanted.is_image(file_key_and_field(file.path)[1]) for file in files)

    @property
    def to_encode(self) -> list[PlannedUnit]:
        """The pending units whose images are encoded."""
        return [planned for planned in self.pending if planned.kind == "encode"]

    @property
    def to_rewrite(self) -> list[PlannedUnit]:
        """The pending units whose rows are written again around the stored latents."""
        return [planned for planned in self.pending if planned.kind == "rewrite"]

    @property
    def num_bytes_pending(self) -> int:
        """Bytes of source shards to read."""
        return sum(planned.unit.num_bytes for planned in self.pending)

    @property
    def num_bytes_rewritten(self) -> int:
        """Bytes of stored rows, latents included, to read for `to_rewrite`; asks the store."""
        units = {planned.unit.id for planned in self.to_rewrite}
        return self.state.num_stored_bytes(units) if units else 0


def make_plan(config: Config, *, retry_rejects: bool = False) -> Plan:
    """List the source, read the receipts, and say what is left to do.

    Args:
        config: the run.
        retry_rejects: encode units with rejects again, at their next generation.

    Raises:
        ConfigError: the checkpoint or the source cannot be used, or a folder is to be cut another
            way than it was, or holds the output.
        SourceError: a named shard is missing, a glob matches nothing, or more sources are gone than
            `on_missing: drop` believes.
        StorageError: a store cannot be reached.
        DatasetError: what lies at the output is damaged.
    """
    require_kind(config, Config)
    output = Store(config.output.url, config.output.storage)
    _require_apart(config, output)
    contract = wanted_contract(config)
    there = read_contract(output)
    if there:
        contract = contract.resolved_as(there)
    state = State(output)
    try:
        known = state.sources | state.live.keys()
        shards = list_source(config.source, config.source.num_units, known)
    except SourceError as error:
        raise _what_stays(error, state) from error
    units = units_of(shards, contract)
    diff = contract_diff(there, contract) if there else []
    on_missing = config.source.on_missing
    missing = state.live.keys() - {unit.source for unit in units}
    if on_missing == "drop":
        require_few(missing, len(state.live))  # before anything is encoded, not at the end
    why = "another contract" if diff else "changed"
    failures = _read_failures(output, units, state)
    columns = columns_of(config.source.keep)
    pending = list(_pending(shards, units, state, columns, failures, retry_rejects, why))
    twice = find_twice(config.source, shards, state, contract)
    return Plan(output, contract, there, diff, shards, units, pending, state, on_missing, twice)


def _require_apart(config: Config, output: Store) -> None:
    """Refuse a folder that holds the output: each run would find the files of the one before."""
    if config.source.folder is None:
        return
    folder = Store(config.source.folder, config.source.storage).url
    if f"{output.url}/".startswith(f"{folder}/"):
        raise ConfigError(
            f"output.url, {output.url}, lies in source.folder, whose files are read: choose one "
            "beside it"
        )


def _read_failures(output: Store, units: Iterable[Unit], state: State) -> dict[str, str]:
    """Read why units that are left failed before: of each its last hint, of one for every try."""
    left = {unit.id for unit in units if not state.current(unit.id)}
    hints = list_failures(output) if left else []
    last = {failed_unit(hint.path): hint.path for hint in hints}
    return read_failures(output, (path for unit, path in last.items() if unit in left))


def _what_stays(error: SourceError, state: State) -> SourceError:
    """Say of a listing that cannot be right what it means for the rows that are there."""
    num_units = sum(map(len, state.live.values()))
    if not num_units:
        return error
    return SourceError(
        f"{error}; {state.store.url} keeps its {num_units} units and nothing was changed, for such "
        "a listing counts as a mistake, whatever source.on_missing says"
    )


def units_of(shards: Iterable[SourceShard], contract: Contract) -> list[Unit]:
    """Name the units of some shards under a contract."""
    mark = contract.fingerprint
    return [Unit.of(s.source, s.size_bytes, s.version, mark, s.range) for s in shards]


def by_source(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """Put the units of each source together."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.source, []).append(unit)
    return found


def _pending(
    shards: Iterable[SourceShard],
    units: Iterable[Unit],
    state: State,
    columns: Columns,
    failures: dict[str, str],
    retry_rejects: bool,
    known: str,
) -> Iterable[PlannedUnit]:
    known_sources = state.sources
    for shard, unit in zip(shards, units, strict=True):
        done = state.current(unit.id)
        generation = state.generation(unit.id) + 1
        if done and not (retry_rejects and done.num_rejects):
            if rewrite := rewrite_of(shard, unit, state, columns):
                yield rewrite
            continue
        if done:
            reason = f"retry of {done.num_rejects} rejects"
        elif generation:
            reason = "removed before: encoded again"
        elif unit.id in failures:
            reason = f"failed before: {failures[unit.id]}"
        elif unit.source in known_sources:
            reason = known
        else:
            reason = "new"
        yield PlannedUnit(unit, generation, reason, shard.files, shard.url)


def rewrite_of(
    shard: SourceShard, unit: Unit, state: State, columns: Columns
) -> PlannedUnit | None:
    """Plan to write a committed unit's rows again, if they have other columns; else None."""
    done = state.current(unit.id)
    if done is None or done.columns == columns:
        return None
    before, after = describe_columns(done.columns), describe_columns(columns)
    reason = f"kept columns changed: {before} -> {after}"
    return PlannedUnit(unit, done.generation + 1, reason, shard.files, shard.url, kind="rewrite")


def wanted_contract(config: Config) -> Contract:
    """Make the contract that a config asks for; reads the checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: a bucket's side is no multiple of the VAE's downsampling; the scaling factor
            is unknown, or the config's is not the checkpoint's.
    """
    options = config.vae.storage
    vae = load_vae(config.vae.checkpoint, decoder=False, options=options)
    arch = vae.architecture
    scaling_factor, shift_factor = resolve_scaling(
        arch, config.vae.scaling_factor, config.vae.shift_factor, config.vae.checkpoint
    )
    buckets = _buckets(config)
    for bucket in buckets:
        if bucket.width_px % arch.downsample_factor or bucket.height_px % arch.downsample_factor:
            raise ConfigError(
                f"transform: {bucket.name} is no multiple of {arch.downsample_factor} px, by which "
                "this VAE divides each side"
            )
    return Contract(
        vae=VaeContract(
            family=FAMILY,
            encoder_fingerprint=encoder_fingerprint(vae),
            architecture=arch.encoder_fields,
            latent_channels=arch.latent_channels,
            downsample_factor=arch.downsample_factor,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=arch.latents_mean,
            latents_std=arch.latents_std,
        ),
        transform=TransformContract(
            crop=config.transform.crop,
            resample=config.transform.resample,
            buckets=tuple((*bucket,) for bucket in buckets),
            min_side_px=config.transform.min_side_px,
            max_upscale=config.transform.max_upscale,
            max_pixels=config.transform.max_pixels,
            dct_scaling=config.transform.dct_scaling,
        ),
        latents=LatentContract(
            posterior=config.latents.posterior,
            dtype=config.latents.dtype,
            format=config.latents.format,
            precision=_known_precision(config),
            quantization=_quantization(config),
        ),
        source=source_contract(config.source),
    )


def _known_precision(config: Config) -> str:
    # On a CPU, auto is fp32; on a GPU only a look at real images can tell.
    if config.compute.precision == "auto" and config.compute.num_gpus == 0:
        return "fp32"
    return config.compute.precision


def _quantization(config: Config) -> QuantizationContract | None:
    if config.latents.dtype != "int8":
        return None
    calibration = config.latents.calibration or Calibration()
    return QuantizationContract(calibration.num_images, calibration.seed)


def _buckets(config: Config) -> tuple[Bucket, ...]:
    resolution_px, wanted = config.transform.resolution_px, config.transform.buckets
    if wanted is None:
        return (Bucket(resolution_px, resolution_px),)
    if isinstance(wanted, RatioBuckets):
        return ratio_buckets(resolution_px, wanted.max_ratio, wanted.step_px)
    return tuple(sorted(Bucket(*size) for size in wanted))
