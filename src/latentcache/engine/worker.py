"""The part of an actor that does not depend on Ray: it loads models, runs units and calibrates.

Calibration measures the open values of a contract on real images, once, before a first run: the
precision if the config says `auto`, and the scale and zero point of int8.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from threading import Lock

import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.quantization import fit
from latentcache.dataset.receipts import Receipt
from latentcache.engine.attempt import Totals, at_boundary
from latentcache.engine.job import Job, UnitFailure, UnitTask
from latentcache.engine.rewrite import Rewriter
from latentcache.engine.unit import UnitRunner
from latentcache.errors import ClusterError, LatentCacheError, Reject, SourceError
from latentcache.images.source import Sample, SourceShard, read_images
from latentcache.images.transform import Transformed, load_image, transform_spec
from latentcache.qa.evaluator import QaEvaluator
from latentcache.vae.encoder import LatentEncoder, draw_latents, prepare_device, resolve_precision
from latentcache.vae.model import KLAutoencoder
from latentcache.vae.weights import encoder_fingerprint, load_vae

_PROBE_IMAGES = 16

# Calibration uses the first images of this many shards, or of more shards if those have too few.
# A shard costs little more than a request, because it is read no further than needed.
_CALIBRATION_SHARDS = 16
_CALIBRATION_BATCH = 32

# Values per channel and image that are used: all values of images up to 256 px.
_VALUES_PER_IMAGE = 1024


class ActorRunner:
    """The runner of one actor: rewrites units without an encoder, and encodes all others."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self._device = job, device
        self.totals = Totals()
        self._rewriter = Rewriter(job, self.totals)
        self._lock = Lock()
        self._encoding: UnitRunner | None = None
        if not job.loads_late:
            self.load()

    def run(self, task: UnitTask) -> Receipt | UnitFailure:
        """Run one unit and return its receipt or failure; two threads may call this at once."""
        if task.rewrites and (rewritten := self._rewriter.rewrite(task)):
            return rewritten
        loaded = at_boundary(task, self.load)
        return loaded if isinstance(loaded, UnitFailure) else loaded.run(task)

    def load(self) -> UnitRunner:
        """Return the runner that encodes; load it at the first call."""
        with self._lock:
            if self._encoding is None:
                self._encoding = load_runner(self.job, self._device, self.totals)
            return self._encoding


def load_runner(job: Job, device: str, totals: Totals | None = None) -> UnitRunner:
    """Load the models and return the runner that encodes units.

    Args:
        job, device, totals: `device` is `cuda` or `cpu`, and `totals` are those of the process.

    Raises:
        ClusterError: this node cannot use the device, or reads another checkpoint than the driver.
        CheckpointError: a checkpoint cannot be used.
    """
    vae = _load_vae(job, device)
    evaluator = QaEvaluator(job.contract, vae, job.qa.models) if job.qa else None
    encoder = LatentEncoder(vae, job.contract.latents.precision, job.batch_size)
    runner = UnitRunner(job, encoder, evaluator, totals)
    # The runner's threads use all cores. If few of them encode at once, torch's threads help.
    num_threads = torch.get_num_threads() // runner.encode_pool.num_threads
    torch.set_num_threads(max(1, num_threads) if device == "cpu" else 1)
    return runner


def calibrate_contract(job: Job, shards: Sequence[SourceShard], device: str) -> Contract:
    """Return the contract of a job with its open values measured.

    Args:
        job, shards, device: `device` is `cuda` or `cpu`.
    """
    return calibrate(_load_vae(job, device), job, shards)


def _load_vae(job: Job, device: str) -> KLAutoencoder:
    prepare_device(device)
    vae = load_vae(job.checkpoint, device=device, decoder=False, options=job.checkpoint_storage)
    if encoder_fingerprint(vae) != job.contract.vae.encoder_fingerprint:
        raise ClusterError(
            f"{job.checkpoint} has another encoder on a worker than on the driver: put the "
            "checkpoint where every node reads the same file"
        )
    return vae


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
