"""Measure several decoders on the images of one shard.

Workers run this for `evaluate.py`. The results are sums that merge, so memory does not grow with
the number of images.
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

# The number of images on which a model's own encoder is compared with the encoder in use.
_AGREEMENT_IMAGES = 8

# The number of images whose features are merged into the 2,048² covariance at once.
_CHUNK_IMAGES = 256


@dataclass(frozen=True, slots=True)
class EvalJob:
    """The settings that all pieces share; a process loads the models of a job once."""

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
        """The names of the measures, in the order of the columns of `ModelSums.measures`."""
        psim = ("psim",) if self.networks.vgg16 else ()
        lpips = ("lpips",) if self.networks.lpips else ()
        return ("psnr_db", "ssim", *psim, *lpips)

    @property
    def num_features(self) -> int:
        """The number of Inception features of an image; 0 without that network."""
        return NUM_INCEPTION_FEATURES if self.networks.inception else 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard, the number of its images to measure (None: all), and the number to show."""

    shard: SourceShard
    max_images: int | None
    num_pictures: int


@dataclass(frozen=True, slots=True)
class ModelSums:
    """The sums of one model: `EvalJob.measures`, and the features of its reconstructions.

    `agreement_db` is the lowest agreement of its own encoder with the encoder in use; None if they
    are the same.
    """

    measures: FeatureStatistics
    features: FeatureStatistics
    agreement_db: float | None

    def merge(self, other: ModelSums) -> ModelSums:
        """Return the sums over both sets of images."""
        agreements = [x.agreement_db for x in (self, other) if x.agreement_db is not None]
        return ModelSums(
            self.measures.merge(other.measures),
            self.features.merge(other.features),
            min(agreements, default=None),
        )


@dataclass(frozen=True, slots=True)
class EvalSums:
    """The sums over a set of images; `features` are those of the images themselves."""

    models: tuple[ModelSums, ...]
    features: FeatureStatistics
    rejects: Counter[str]
    pictures: tuple[Picture, ...]

    @classmethod
    def empty(cls, job: EvalJob) -> EvalSums:
        """Return the sums over no images."""
        features = FeatureStatistics.empty(job.num_features)
        model = ModelSums(FeatureStatistics.empty(len(job.measures)), features, None)
        return cls((model,) * len(job.models), features, Counter(), ())

    @property
    def num_images(self) -> int:
        """The number of images."""
        return self.models[0].measures.count

    def merge(self, other: EvalSums) -> EvalSums:
        """Return the sums over both sets of images."""
        return EvalSums(
            tuple(a.merge(b) for a, b in zip(self.models, other.models, strict=True)),
            self.features.merge(other.features),
            self.rejects + other.rejects,
            self.pictures + other.pictures,
        )


@dataclass(frozen=True, slots=True)
class _Model:
    """A decoder; `has_own_encoder` says whether its encoder differs from the encoder in use."""

    name: str
    vae: KLAutoencoder
    has_own_encoder: bool


@dataclass(frozen=True, slots=True)
class _LoadedModels:
    """The models of a job in this process; `distances` are those of `EvalJob.measures`."""

    encoder: KLAutoencoder
    models: tuple[_Model, ...]
    features: Features | None
    distances: tuple[Distance, ...]


@lru_cache(maxsize=1)
def _load(job: EvalJob) -> _LoadedModels:
    prepare_device(job.device)
    networks, options, device = job.networks, job.networks.storage, job.device
    features, distances = None, []
    # The networks are loaded first, because a wrong hash is then reported within seconds.
    if inception := networks.inception:
        features = load_inception(inception.url, inception.sha256, options, device)
    if vgg16 := networks.vgg16:
        distances.append(load_vgg16(vgg16.url, vgg16.sha256, options, device))
    if lpips := networks.lpips:
        distances.append(load_lpips(lpips.url, lpips.sha256, options, device))
    options = job.vae.storage
    encoder = load_vae(job.vae.checkpoint, device=device, decoder=False, options=options)
    models = tuple(_load_model(job, model, encoder) for model in job.models)
    return _LoadedModels(encoder, models, features, tuple(distances))


def _load_model(job: EvalJob, model: EvalModel, encoder: KLAutoencoder) -> _Model:
    options = model.storage
    vae = load_vae(model.checkpoint, device=job.device, options=options)
    require_family(vae, f"{model.name} ({model.checkpoint})", encoder.architecture)
    return _Model(model.name, vae, encoder_fingerprint(vae) != encoder_fingerprint(encoder))


def evaluate_piece(job: EvalJob, piece: Piece) -> EvalSums:
    """Measure the images of one shard.

    Args:
        job: the settings of all pieces.
        piece: the shard.

    Raises:
        ConfigError: a model is of another family than the VAE, or belongs to another encoder; a
            checkpoint or a network cannot be used; or a batch does not fit into the GPU's memory.
        CheckpointError: a model returns values that are not finite.
        SourceChanged: the shard is no longer the listed version.
        StorageError: the store cannot be read.
    """
    loaded, sums = _load(job), EvalSums.empty(job)
    rejects: Counter[str] = Counter()
    images = islice(_images(job, piece.shard, rejects), piece.max_images)
    num_pictures = piece.num_pictures  # at most the size of a chunk
    try:
        while chunk := list(islice(images, _CHUNK_IMAGES)):
            sums = sums.merge(_measure(job, loaded, chunk, num_pictures))
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
    """Yield the key and the image (uint8 [3, side, side]) of each sample; count the rejects."""
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
    job: EvalJob, loaded: _LoadedModels, chunk: Sequence[tuple[str, Tensor]], num_pictures: int
) -> EvalSums:
    """Measure up to `_CHUNK_IMAGES` images, `batch_size` at a time."""
    keys, images = [key for key, _ in chunk], torch.stack([pixels for _, pixels in chunk])
    batches = torch.split(images, job.batch_size)
    latents = [_encode(loaded.encoder, batch) for batch in batches]
    models, panels = [], [images[:num_pictures]]
    for model in loaded.models:
        agreement_db = _agreement_db(model, batches[0], latents[0])
        measures, features, shown = [], [], []
        for batch, z in zip(batches, latents, strict=True):
            originals, decoded = batch.to(job.device), _decode(model, z)
            measures.append(_measures(loaded, decoded, originals))
            features.append(_features(loaded, decoded))
            shown.append(decoded.cpu())
        models.append(ModelSums(_statistics(measures), _statistics(features), agreement_db))
        panels.append(torch.cat(shown)[:num_pictures])
    originals_features = _statistics([_features(loaded, batch) for batch in batches])
    by_image = torch.stack(panels, dim=1).numpy()
    pictures = map(Picture, keys, by_image)
    return EvalSums(tuple(models), originals_features, Counter(), tuple(pictures))


def _encode(vae: KLAutoencoder, images: Tensor) -> Tensor:
    """Return the posterior's mean, [B, C, h, w] on the VAE's device."""
    return vae.encode(images.to(vae.device))[:, : vae.architecture.latent_channels]


def _agreement_db(model: _Model, images: Tensor, latents: Tensor) -> float | None:
    """Compare a model's own encoder, if it has one, with the latents that the model decodes."""
    if not model.has_own_encoder:
        return None
    few = slice(_AGREEMENT_IMAGES)
    return require_agreement(_encode(model.vae, images[few]), latents[few], model.name)


def _decode(model: _Model, latents: Tensor) -> Tensor:
    decoded = model.vae.decode(latents)
    if not decoded.isfinite().all():
        raise CheckpointError(
            f"{model.name} decodes to values that are not finite: check its checkpoint"
        )
    return to_uint8(decoded)


def _measures(loaded: _LoadedModels, decoded: Tensor, originals: Tensor) -> npt.NDArray[np.float64]:
    """Return `EvalJob.measures` as [B, measures]; equal images have `MAX_DB` and not infinity."""
    columns = [psnr_db(decoded, originals).clamp(MIN_DB, MAX_DB), ssim(decoded, originals)]
    columns += [distance(decoded, originals) for distance in loaded.distances]
    measures: npt.NDArray[np.float64] = torch.stack(columns, dim=1).cpu().numpy()
    return measures


def _features(loaded: _LoadedModels, images: Tensor) -> npt.NDArray[np.float32]:
    if loaded.features is None:
        return np.zeros((len(images), 0), np.float32)
    features: npt.NDArray[np.float32] = loaded.features(images).float().cpu().numpy()
    return features


def _statistics(batches: Sequence[npt.NDArray[np.floating]]) -> FeatureStatistics:
    return FeatureStatistics.of(np.concatenate(batches))
