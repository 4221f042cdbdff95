"""The plan of a run: the units of the source that have no receipt yet, each with a reason."""

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
from latentcache.images.samples import FieldSelection, file_key_and_field
from latentcache.images.source import SourceShard, list_source, source_contract
from latentcache.images.transform import ratio_buckets
from latentcache.storage import ObjectInfo, Store
from latentcache.vae.architecture import FAMILY
from latentcache.vae.scaling import resolve_scaling
from latentcache.vae.weights import encoder_fingerprint, load_vae


@dataclass(frozen=True, slots=True)
class PlannedUnit:
    """A unit to encode or to rewrite.

    Attributes:
        unit: the unit.
        generation: the generation of its next receipt.
        reason: why the unit is pending, for the user.
        files: the files of a folder's slot; empty for other sources.
        url: the present URL of a source that moved; None if it did not move.
        kind: `rewrite` writes the rows again with other kept columns and keeps the stored latents.
    """

    unit: Unit
    generation: int
    reason: str
    files: tuple[ObjectInfo, ...] = ()
    url: str | None = None
    kind: Literal["encode", "rewrite"] = "encode"


@dataclass(frozen=True, slots=True)
class Sources:
    """Counts of sources: the listing compared with the newest manifest.

    `num_vanished` counts sources that are no longer listed. The next manifest keeps their rows, or
    drops them with `on_missing: drop`.
    """

    num_new: int
    num_changed: int
    num_unchanged: int
    num_vanished: int
    on_missing: str


@dataclass(frozen=True)
class Plan:
    """The state of an output and the units that are pending.

    Attributes:
        output: the store of the dataset.
        contract: the contract that the config requests. Before a first run it may be unresolved;
            its units then have provisional ids.
        there: the contract at the output; None before a first run.
        diff: the fields in which `contract` and `there` differ.
        shards: the listed source shards.
        units: the unit of each shard, in the same order.
        pending: the units to encode or to rewrite.
        state: the receipts and the newest manifest of the output.
        on_missing: what the next manifest does with rows of vanished sources: `keep` or `drop`.
        twice: new sources that look like known ones; None if there are none.
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
        """Counts of new, changed, unchanged and vanished sources against the newest manifest."""
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
        """The units of each listed source."""
        return by_source(self.units)

    @property
    def num_images(self) -> int | None:
        """The number of image files of a folder; None for sources whose listing shows none."""
        files = [file for shard in self.shards for file in shard.files]
        if not files:
            return None
        selection = FieldSelection(self.contract.source.image_fields, ())
        return sum(selection.is_image(file_key_and_field(file.path)[1]) for file in files)

    @property
    def to_encode(self) -> list[PlannedUnit]:
        """The pending units whose images are encoded."""
        return [planned for planned in self.pending if planned.kind == "encode"]

    @property
    def to_rewrite(self) -> list[PlannedUnit]:
        """The pending units whose rows are written again with the stored latents."""
        return [planned for planned in self.pending if planned.kind == "rewrite"]

    @property
    def num_bytes_pending(self) -> int:
        """Bytes of source shards that the pending units read."""
        return sum(planned.unit.num_bytes for planned in self.pending)

    @property
    def num_bytes_rewritten(self) -> int:
        """Bytes of stored rows, latents included, that `to_rewrite` reads; queries the store."""
        units = {planned.unit.id for planned in self.to_rewrite}
        return self.state.num_stored_bytes(units) if units else 0


def make_plan(config: Config, *, retry_rejects: bool = False) -> Plan:
    """List the source, read the receipts, and return the units that are pending.

    Args:
        config: the config of the run.
        retry_rejects: encode units with rejects again, at their next generation.

    Returns:
        The plan; nothing is written.

    Raises:
        ConfigError: the checkpoint or the source cannot be used, a folder would be cut into another
            number of units than before, or the source folder contains the output.
        SourceError: a named shard is missing, a glob matches nothing, or more sources are missing
            than `on_missing: drop` accepts.
        StorageError: a store cannot be reached.
        DatasetError: the dataset at the output is damaged.
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
        raise _with_kept_units(error, state) from error
    units = units_of(shards, contract)
    diff = contract_diff(there, contract) if there else []
    on_missing = config.source.on_missing
    missing = state.live.keys() - {unit.source for unit in units}
    if on_missing == "drop":
        require_few(missing, len(state.live))  # fail before anything is encoded
    reason = "another contract" if diff else "changed"
    failures = _read_failures(output, units, state)
    columns = columns_of(config.source.keep)
    pending = list(_pending(shards, units, state, columns, failures, retry_rejects, reason))
    twice = find_twice(config.source, shards, state, contract)
    return Plan(output, contract, there, diff, shards, units, pending, state, on_missing, twice)


def _require_apart(config: Config, output: Store) -> None:
    """Refuse a folder that contains the output: each run would list the files of earlier runs."""
    if config.source.folder is None:
        return
    folder = Store(config.source.folder, config.source.storage).url
    if f"{output.url}/".startswith(f"{folder}/"):
        raise ConfigError(
            f"output.url, {output.url}, is inside source.folder, whose files are read: choose a "
            "folder outside it"
        )


def _read_failures(output: Store, units: Iterable[Unit], state: State) -> dict[str, str]:
    """Return the last recorded failure of each unit that has no receipt, by unit id."""
    left = {unit.id for unit in units if not state.current(unit.id)}
    hints = list_failures(output) if left else []
    last = {failed_unit(hint.path): hint.path for hint in hints}
    return read_failures(output, (path for unit, path in last.items() if unit in left))


def _with_kept_units(error: SourceError, state: State) -> SourceError:
    """Add to the error of an implausible listing that the committed units are kept."""
    num_units = sum(map(len, state.live.values()))
    if not num_units:
        return error
    return SourceError(
        f"{error}; {state.store.url} keeps its {num_units} units and nothing was changed, because "
        "such a listing counts as a mistake for every value of source.on_missing"
    )


def units_of(shards: Iterable[SourceShard], contract: Contract) -> list[Unit]:
    """Return the units of shards under a contract.

    Args:
        shards: source shards.
        contract: its fingerprint is part of each unit's id.
    """
    mark = contract.fingerprint
    return [Unit.of(s.source, s.size_bytes, s.version, mark, s.range) for s in shards]


def by_source(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """Group units by their source."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.source, []).append(unit)
    return groups


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
    """Return a plan to rewrite a committed unit, or None if its kept columns are right.

    Args:
        shard: the source shard of the unit.
        unit: the unit.
        state: the receipts of the output.
        columns: the kept columns that the config requests.
    """
    done = state.current(unit.id)
    if done is None or done.columns == columns:
        return None
    before, after = describe_columns(done.columns), describe_columns(columns)
    reason = f"kept columns changed: {before} -> {after}"
    return PlannedUnit(unit, done.generation + 1, reason, shard.files, shard.url, kind="rewrite")


def wanted_contract(config: Config) -> Contract:
    """Return the contract that a config requests; reads the checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: the side of a bucket is not a multiple of the VAE's downsampling factor, the
            scaling factor is unknown, or that of the config differs from the checkpoint's.
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
                f"transform: {bucket.name} is not a multiple of {arch.downsample_factor} px, the "
                "factor by which this VAE divides each side: choose other sizes"
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
    # On a CPU, `auto` is fp32. On a GPU it depends on real images.
    if config.compute.precision == "auto" and config.compute.num_gpus == 0:
        return "fp32"
    return config.compute.precision


def _quantization(config: Config) -> QuantizationContract | None:
    if config.latents.dtype != "int8":
        return None
    calibration = config.latents.calibration or Calibration()
    return QuantizationContract(calibration.num_images, calibration.seed)


def _buckets(config: Config) -> tuple[Bucket, ...]:
    resolution_px, buckets = config.transform.resolution_px, config.transform.buckets
    if buckets is None:
        return (Bucket(resolution_px, resolution_px),)
    if isinstance(buckets, RatioBuckets):
        return ratio_buckets(resolution_px, buckets.max_ratio, buckets.step_px)
    return tuple(sorted(Bucket(*size) for size in buckets))
