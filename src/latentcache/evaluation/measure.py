"""Several decoders over the same latents: what is measured of the images of one shard.

This is what a worker does for `evaluate.py`. What it gives are sums that merge, so that memory
stays bounded whatever the number of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentcache.config import MAX_PIXELS, Autoencoder
from latentcache.config_eval import EvalModel, Networks
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import SourceContract
from latentcache.errors import CheckpointError, ConfigError, Reject
from latentcache.evaluation.card import Picture
from latentcache.images.source import RejectedSample, SourceShard, read_images
from latentcache.images.transform import TransformSpec, load_image
from latentcache.metrics import MAX_DB, MIN_DB, FeatureStatistics, psnr_db, ssim
from latentcache.networks import (
    NUM_INCEPTION_FEATURES,
    Distance,
    Features,
    load_inception,
    load_lpips,
    load_vgg16,
)
from latentcache.storage_options import StorageOptions
from latentcache.vae.compatibility import require_agreement, require_family
from latentcache.vae.encoder import prepare_device
from latentcache.vae.model import KLAutoencoder, to_uint8
from latentcache.vae.weights import encoder_fingerprint, load_vae

# To hold a model's own encoder against the one that is used.
_AGREEMENT_IMAGES = 8

# Images whose features are held before they become part of a covariance of 2,048².
_CHUNK_IMAGES = 256


@dataclass(frozen=True, slots=True)
class EvalJob:
    """What all pieces have in common; a process loads its models once for a job."""

    source: SourceContract
    source_storage: StorageOptions
    resolution_px: int
    vae: Autoencoder
    models: tuple[EvalModel, ...]
    networks: Networks
    batch_size: int
    device: str

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured of each image, in the order of the columns of `ModelSums.measures`."""
        psim = ("psim",) if self.networks.vgg16 else ()
        lpips = ("lpips",) if self.networks.lpips else ()
        return ("psnr_db", "ssim", *psim, *lpips)

    @property
    def num_features(self) -> int:
        """Inception features of an image."""
        return NUM_INCEPTION_FEATURES if self.networks.inception else 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard, how many of its images count (None: all), and how many of them are shown."""

    shard: SourceShard
    max_images: int | None
    num_pictures: int


@dataclass(frozen=True, slots=True)
class ModelSums:
    """What a model did: `EvalJob.measures` of each image, and features of its reconstructions.

    `agreement_db` is the least drift of its own encoder from the one that was used; None where it
    is the same encoder.
    """

    measures: FeatureStatistics
    features: FeatureStatistics
    agreement_db: float | None

    def merge(self, other: ModelSums) -> ModelSums:
        """Sums over both sets of images."""
        agreements = [x.agreement_db for x in (self, other) if x.agreement_db is not None]
        return ModelSums(
            self.measures.merge(other.measures),
            self.features.merge(other.features),
            min(agreements, default=None),
        )


@dataclass(frozen=True, slots=True)
class EvalSums:
    """What is known of some images; `features` are those of the images themselves."""

    models: tuple[ModelSums, ...]
    features: FeatureStatistics
    rejects: Counter[str]
    pictures: tuple[Picture, ...]

    @classmethod
    def empty(cls, job: EvalJob) -> EvalSums:
        """Sums over no images."""
        features = FeatureStatistics.empty(job.num_features)
        model = ModelSums(FeatureStatistics.empty(len(job.measures)), features, None)
        return cls((model,) * len(job.models), features, Counter(), ())

    @property
    def num_images(self) -> int:
        """How many images these are sums of."""
        return self.models[0].measures.count

    def merge(self, other: EvalSums) -> EvalSums:
        """Sums over both sets of images."""
        return EvalSums(
            tuple(a.merge(b) for a, b in zip(self.models, other.models, strict=True)),
            self.features.merge(other.features),
            self.rejects + other.rejects,
            self.pictures + other.pictures,
        )


@dataclass(frozen=True, slots=True)
class _Model:
    """A decoder; `has_own_encoder` says that its encoder is not the one that is used."""

    name: str
    vae: KLAutoencoder
    has_own_encoder: bool


@dataclass(frozen=True, slots=True)
class _Bench:
    """What this process measures with; `distances` are those of `EvalJob.measures`."""

    encoder: KLAutoencoder
    models: tuple[_Model, ...]
    features: Features | None
    distances: tuple[Distance, ...]


@lru_cache(maxsize=1)
def _load(job: EvalJob) -> _Bench:
    prepare_device(job.device)
    networks, options, device = job.networks, job.networks.storage, job.device
    features, distances = None, []
    # The networks first: a wrong hash is told in seconds.
    if inception := networks.inception:
        features = load_inception(inception.url, inception.sha256, options, device)
    if vgg16 := networks.vgg16:
        distances.append(load_vgg16(vgg16.url, vgg16.sha256, options, device))
    if lpips := networks.lpips:
        distances.append(load_lpips(lpips.url, lpips.sha256, options, device))
    options = job.vae.storage
    encoder = load_vae(job.vae.checkpoint, device=device, decoder=False, options=options)
    models = tuple(_load_model(job, model, encoder) for model in job.models)
    return _Bench(encoder, models, features, tuple(distances))


def _load_model(job: EvalJob, model: EvalModel, encoder: KLAutoencoder) -> _Model:
    options = model.storage
    vae = load_vae(model.checkpoint, device=job.device, options=options)
    require_family(vae, f"{model.name} ({model.checkpoint})", encoder.architecture)
    return _Model(model.name, vae, encoder_fingerprint(vae) != encoder_fingerprint(encoder))


def evaluate_piece(job: EvalJob, piece: Piece) -> EvalSums:
    """Measure the images of one shard.

    Raises:
        ConfigError: a model is of another family than the VAE, or belongs to another encoder; a
            checkpoint or a network cannot be used; a batch does not fit into the GPU's memory.
        CheckpointError: a model gives values that are not finite.
        SourceChanged: the shard is no longer the listed version.
        StorageError: the store cannot be read.
    """
    bench, sums = _load(job), EvalSums.empty(job)
    rejects: Counter[str] = Counter()
    images = islice(_images(job, piece.shard, rejects), piece.max_images)
    num_pictures = piece.num_pictures  # never more than a chunk has
    try:
        while chunk := list(islice(images, _CHUNK_IMAGES)):
            sums = sums.merge(_measure(job, bench, chunk, num_pictures))
            num_pictures = 0
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"batches of {job.batch_size} do not fit into the GPU's memory: lower "
            "compute.batch_size"
        ) from error
    return replace(sums, rejects=rejects)


def _images(
    job: EvalJob, shard: SourceShard, rejects: Counter[str]
) -> Iterator[tuple[str, Tensor]]:
    """Give a shard's images by key, uint8 [3, side, side]; counts the samples left out."""
    side = Bucket(job.resolution_px, job.resolution_px)
    spec = TransformSpec((side,), min_side_px=None, max_upscale=None, max_pixels=MAX_PIXELS)
    for sample in read_images(shard, job.source, job.source_storage):
        try:
            if isinstance(sample, RejectedSample):
                raise sample.reject
            pixels = load_image(sample.image, spec).pixels
        except Reject as reject:
            rejects[f"{reject.stage}: {reject.reason}"] += 1
        else:
            yield sample.key, pixels


@torch.inference_mode()
def _measure(
    job: EvalJob, bench: _Bench, chunk: Sequence[tuple[str, Tensor]], num_pictures: int
) -> EvalSums:
    """Measure up to `_CHUNK_IMAGES` images, `batch_size` at a time."""
    keys, images = [key for key, _ in chunk], torch.stack([pixels for _, pixels in chunk])
    batches = torch.split(images, job.batch_size)
    latents = [_encode(bench.encoder, batch) for batch in batches]
    models, panels = [], [images[:num_pictures]]
    for model in bench.models:
        agreement_db = _agreement_db(model, batches[0], latents[0])
        measures, features, shown = [], [], []
        for batch, z in zip(batches, latents, strict=True):
            originals, decoded = batch.to(job.device), _decode(model, z)
            measures.append(_measures(bench, decoded, originals))
            features.append(_features(bench, decoded))
            shown.append(decoded.cpu())
        models.append(ModelSums(_statistics(measures), _statistics(features), agreement_db))
        panels.append(torch.cat(shown)[:num_pictures])
    originals_features = _statistics([_features(bench, batch) for batch in batches])
    by_image = torch.stack(panels, dim=1).numpy()
    pictures = map(Picture, keys, by_image)
    return EvalSums(tuple(models), originals_features, Counter(), tuple(pictures))


def _encode(vae: KLAutoencoder, images: Tensor) -> Tensor:
    """Give the posterior's mean, [B, C, h, w] on the VAE's device."""
    return vae.encode(images.to(vae.device))[:, : vae.architecture.latent_channels]


def _agreement_db(model: _Model, images: Tensor, latents: Tensor) -> float | None:
    """Hold a model's own encoder, if it has one, against the latents that it is to decode."""
    if not model.has_own_encoder:
        return None
    few = slice(_AGREEMENT_IMAGES)
    return require_agreement(_encode(model.vae, images[few]), latents[few], model.name)


def _decode(model: _Model, latents: Tensor) -> Tensor:
    decoded = model.vae.decode(latents)
    if not decoded.isfinite().all():
        raise CheckpointError(f"{model.name} decodes to NaN; check its checkpoint")
    return to_uint8(decoded)


def _measures(bench: _Bench, decoded: Tensor, originals: Tensor) -> npt.NDArray[np.float64]:
    """What `EvalJob.measures` names, [B, measures]; equal images count `MAX_DB`, not infinity."""
    columns = [psnr_db(decoded, originals).clamp(MIN_DB, MAX_DB), ssim(decoded, originals)]
    columns += [distance(decoded, originals) for distance in bench.distances]
    found: npt.NDArray[np.float64] = torch.stack(columns, dim=1).cpu().numpy()
    return found


def _features(bench: _Bench, images: Tensor) -> npt.NDArray[np.float32]:
    if bench.features is None:
        return np.zeros((len(images), 0), np.float32)
    found: npt.NDArray[np.float32] = bench.features(images).float().cpu().numpy()
    return found


def _statistics(batches: Sequence[npt.NDArray[np.floating]]) -> FeatureStatistics:
    return FeatureStatistics.of(np.concatenate(batches))
