"""Measurement of the open values of a contract on real images, once, before a first run.

Open values are the precision if the config says `auto`, and the scale and zero point of int8.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.quantization import fit
from latentcache.engine.job import Job
from latentcache.errors import LatentCacheError, Reject, SourceError
from latentcache.images.source import Sample, SourceShard, read_images
from latentcache.images.transform import Transformed, load_image, transform_spec
from latentcache.vae.encoder import LatentEncoder, draw_latents, resolve_precision
from latentcache.vae.model import KLAutoencoder

_PROBE_IMAGES = 16

# Calibration uses the first images of this many shards, or of more shards if those have too few.
# A shard costs little more than a request, because it is read no further than needed.
_CALIBRATION_SHARDS = 16
_CALIBRATION_BATCH = 32

# Values per channel and image that are used: all values of images up to 256 px.
_VALUES_PER_IMAGE = 1024


def calibrate(vae: KLAutoencoder, job: Job, shards: Sequence[SourceShard]) -> Contract:
    """Return the contract of a job with its open values measured.

    Args:
        vae, job, shards: the VAE in fp32 on the device of the run, its job and its source shards.

    Raises:
        SourceError: int8 must be calibrated, and no image can be encoded.
    """
    contract = job.contract
    if contract.latents.precision == "auto":
        candidates = chain.from_iterable(_images(job, shard) for shard in shards)
        images = [image.pixels for _, image in islice(candidates, _PROBE_IMAGES)]
        precision = resolve_precision(vae, images)
        contract = replace(contract, latents=replace(contract.latents, precision=precision))
    quantization = contract.latents.quantization
    if quantization and quantization.scale is None:
        order = random.Random(quantization.seed).sample(shards, len(shards))
        each = math.ceil(quantization.num_images / min(len(shards), _CALIBRATION_SHARDS))
        samples = chain.from_iterable(islice(_images(job, shard), each) for shard in order)
        images_used = islice(samples, quantization.num_images)
        values = _encode_sample(vae, job, contract, images_used)
        if values is None:
            raise SourceError(
                "int8 is calibrated on images, and no source shard has one that can be encoded: "
                f"check {shards[0].url}, or choose another latents.dtype"
            )
        quantization = fit(quantization, values)
        contract = replace(contract, latents=replace(contract.latents, quantization=quantization))
    return contract


def _encode_sample(
    vae: KLAutoencoder, job: Job, contract: Contract, sample: Iterator[tuple[str, Transformed]]
) -> torch.Tensor | None:
    """Encode images as the run does; return their latent values by channel, [C, n], if any."""
    terms = contract.latents
    encoder = LatentEncoder(vae, terms.precision, job.batch_size)
    values_by_channel: list[torch.Tensor] = []
    while batch := list(islice(sample, _CALIBRATION_BATCH)):
        buckets: dict[Bucket, list[tuple[str, torch.Tensor]]] = {}
        for name, image in batch:
            buckets.setdefault(image.bucket, []).append((name, image.pixels))
        for images in buckets.values():
            encoded = encoder.encode(torch.stack([pixels for _, pixels in images]))
            names = [name for name, _ in images]
            latents = draw_latents(encoded.moments, terms.posterior, "calibration", names)
            latents = latents[latents.isfinite().all(dim=(1, 2, 3))].flatten(2)
            # The stride is odd, because an even one would take the same columns of each row.
            stride = latents.shape[2] // _VALUES_PER_IMAGE | 1
            values_by_channel.append(latents[:, :, ::stride].transpose(0, 1).flatten(1))
    if not any(values.numel() for values in values_by_channel):
        return None
    return torch.cat(values_by_channel, dim=1)


def _images(job: Job, shard: SourceShard) -> Iterator[tuple[str, Transformed]]:
    """Yield the images of a shard with their names; skip errors, which its unit records later."""
    spec = transform_spec(job.contract)
    try:
        for sample in read_images(shard, job.contract.source, job.source_storage):
            if isinstance(sample, Sample):
                try:
                    transformed = load_image(sample.image, spec)
                except Reject:
                    continue
                yield f"{shard.source}/{sample.key}", transformed
    except LatentCacheError:
        return
