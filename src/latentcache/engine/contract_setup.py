"""The contract of a run: what its config requests, put before the first unit."""

from __future__ import annotations

from importlib.metadata import version

from latentcache import __version__
from latentcache.config import Calibration, Config, RatioBuckets
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import (
    CONTRACT_PATH,
    Contract,
    LatentContract,
    QuantizationContract,
    TransformContract,
    VaeContract,
    establish_contract,
    read_contract,
    require_same,
)
from latentcache.errors import ConfigError, ContractMismatch
from latentcache.images.source import source_contract
from latentcache.images.transform import ratio_buckets
from latentcache.storage import Store
from latentcache.vae.architecture import FAMILY, resolve_scaling
from latentcache.vae.weights import absolute_url, encoder_fingerprint, load_vae


def requested_contract(config: Config) -> Contract:
    """Return the contract that a config requests; reads the checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: a bucket does not fit the VAE, or the scaling factor is unknown or differs.
    """
    vae = load_vae(config.vae.checkpoint, decoder=False, options=config.vae.storage)
    arch, transform, latents = vae.architecture, config.transform, config.latents
    scaling_factor, shift_factor = resolve_scaling(arch, config.vae)
    buckets = _buckets(config)
    for bucket in buckets:
        if bucket.width_px % arch.downsample_factor or bucket.height_px % arch.downsample_factor:
            raise ConfigError(
                f"transform: {bucket.name} is not a multiple of {arch.downsample_factor} px, the "
                "factor by which this VAE divides each side: choose other sizes"
            )
    precision = config.compute.precision
    if precision == "auto" and config.compute.num_gpus == 0:
        precision = "fp32"  # on a GPU it depends on real images
    calibration = latents.calibration or Calibration()
    quantization = QuantizationContract(calibration.num_images, calibration.seed)
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
            buckets=tuple((*bucket,) for bucket in buckets),
            **transform.model_dump(exclude={"resolution_px", "buckets"}),
        ),
        latents=LatentContract(
            posterior=latents.posterior,
            dtype=latents.dtype,
            format=latents.format,
            precision=precision,
            quantization=quantization if latents.dtype == "int8" else None,
        ),
        source=source_contract(config.source),
    )


def _buckets(config: Config) -> tuple[Bucket, ...]:
    resolution_px, buckets = config.transform.resolution_px, config.transform.buckets
    if buckets is None:
        return (Bucket(resolution_px, resolution_px),)
    if isinstance(buckets, RatioBuckets):
        return ratio_buckets(resolution_px, buckets.max_ratio, buckets.step_px)
    return tuple(sorted(Bucket(*size) for size in buckets))


def put_contract(
    config: Config, output: Store, requested: Contract, resolved: Contract
) -> Contract:
    """Put the contract if there is none, and probe whether the store has conditional writes.

    Return the contract at the output, which has the values of the driver that put it first.

    Args:
        config, output, requested, resolved: `resolved` has the values that this run measured.

    Raises:
        ContractMismatch: the output has a different contract.
    """
    provenance = {
        "name": config.name,
        "checkpoint": absolute_url(config.vae.checkpoint),
        # `__version__`, because the package may have come with a Ray job and not be installed.
        "versions": {"latentcache": __version__}
        | {name: version(name) for name in ("torch", "pillow", "ray")},
    }
    try:
        data = establish_contract(output, resolved, provenance)
    except ContractMismatch:
        existing = read_contract(output)
        if existing is None:
            raise
        resolved = requested.resolved_as(existing)
        require_same(output, existing, resolved)
        data = establish_contract(output, resolved, provenance)
    output.probe_conditional(CONTRACT_PATH, data)
    return resolved
