"""What a contract leaves open until real images have been seen; found out once, before a first run.

That is the precision where the config says `auto`, and int8's scale and zero point. Both are fixed
in the contract: every later run takes them from there.
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

# Calibration takes the first images of this many shards, or of more where those have too few. Each
# costs a request and little more, for a shard is read no further than it is needed.
_CALIBRATION_SHARDS = 16
_CALIBRATION_BATCH = 32

# Values of each channel that an image gives: all of them up to 256 px.
_VALUES_OF_IMAGE = 1024


def calibrate(vae: KLAutoencoder, job: Job, shards: Sequence[SourceShard]) -> Contract:
    """Fill in what the job's contract leaves open.

    Args:
        vae: in fp32, on the device that the run encodes on.
        job: the run's.
        shards: its source.

    Raises:
        SourceError: int8 is to be calibrated, and no image can be encoded.
    """
    contract = job.contract
    if contract.latents.precision == "auto":
        found = chain.from_iterable(_images(job, shard) for shard in shards)
        images = [image.pixels for _, image in islice(found, _PROBE_IMAGES)]
        precision = resolve_precision(vae, images)
        contract = replace(contract, latents=replace(contract.latents, precision=precision))
    quantization = contract.latents.quantization
    if quantization and quantization.scale is None:
        quantization = fit(quantization, _look_at_latents(vae, job, contract, shards))
        contract = replace(contract, latents=replace(contract.latents, quantization=quantization))
    return contract


def _look_at_latents(
    vae: KLAutoencoder, job: Job, contract: Contract, shards: Sequence[SourceShard]
) -> torch.Tensor:
    """Encode a seeded sample of the images as the run will: values by stored channel, [C, n]."""
    terms = contract.latents
    assert terms.quantization
    encoder = LatentEncoder(vae, terms.precision, job.batch_size)
    found: list[torch.Tensor] = []
    sample = _sample(job, shards)
    while batch := list(islice(sample, _CALIBRATION_BATCH)):
        buckets: dict[Bucket, list[tuple[str, torch.Tensor]]] = {}
        for name, image in batch:
            buckets.setdefault(image.bucket, []).append((name, image.pixels))
        for images in buckets.values():
            encoded = encoder.encode(torch.stack([pixels for _, pixels in images]))
            names = [name for name, _ in images]
            latents = draw_latents(encoded.moments, terms.posterior, "calibration", names)
            latents = latents[latents.isfinite().all(dim=(1, 2, 3))].flatten(2)
            # An odd stride, for an even one would take the same columns of each row.
            stride = latents.shape[2] // _VALUES_OF_IMAGE | 1
            found.append(latents[:, :, ::stride].transpose(0, 1).flatten(1))
    if not any(values.numel() for values in found):
        raise SourceError(
            "int8 is calibrated on images, and no source shard has one that can be encoded: look "
            f"into {shards[0].url}, or choose another latents.dtype"
        )
    return torch.cat(found, dim=1)


def _sample(job: Job, shards: Sequence[SourceShard]) -> Iterator[tuple[str, Transformed]]:
    """Give the first few images of some shards, in an order that the seed decides."""
    spec = job.contract.latents.quantization
    assert spec
    order = random.Random(spec.seed).sample(shards, len(shards))
    each = math.ceil(spec.num_images / min(len(shards), _CALIBRATION_SHARDS))
    found = (islice(_images(job, shard), each) for shard in order)
    return islice(chain.from_iterable(found), spec.num_images)


def _images(job: Job, shard: SourceShard) -> Iterator[tuple[str, Transformed]]:
    """Give a shard's images with their names; what is wrong there, its unit will record."""
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
