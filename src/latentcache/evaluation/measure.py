"""Measure several decoders on the images of one shard, for the workers of `evaluate.py`.

The results are sums that merge, so memory does not grow with the number of images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from latentcache.config import MAX_PIXELS, Autoencoder
from latentcache.config_eval import EvalConfig, EvalModel, Networks
from latentcache.dataset.bucket import Bucket
from latentcache.errors import CheckpointError, ConfigError, Reject
from latentcache.evaluation.card import Picture
from latentcache.images.source import RejectedSample, SourceShard, read_images, source_contract
from latentcache.images.transform import TransformSpec, load_image
from latentcache.metrics import MAX_DB, MIN_DB, FeatureStatistics, psnr_db, ssim
from latentcache.networks import Distance, Features, load_inception, load_lpips, load_vgg16
from latentcache.vae.encoder import prepare_device
from latentcache.vae.model import KLAutoencoder, require_agreement, require_family, to_uint8
from latentcache.vae.weights import encoder_fingerprint, load_vae

# The number of images on which a model's own encoder is compared with the encoder in use.
_AGREEMENT_IMAGES = 8

# The number of images whose features are merged into the 2,048² covariance at once.
_CHUNK_IMAGES = 256


class Piece(NamedTuple):
    """A shard, the number of its images to measure (None: all), and the number to show."""

    shard: SourceShard
    max_images: int | None
    num_pictures: int


@dataclass(slots=True)
class EvalSums:
    """The sums over a set of images, by the names of the models.

    `statistics` has each measure of each model, and `features`: the Inception features of its
    reconstructions, and for the model "" those of the images. `agreements_db` has the
    lowest agreement with the encoder in use of each model that has another encoder.
    """

    num_images: int = 0
    statistics: dict[tuple[str, str], FeatureStatistics] = field(default_factory=dict)
    agreements_db: dict[str, float] = field(default_factory=dict)
    rejects: Counter[str] = field(default_factory=Counter)
    pictures: list[Picture] = field(default_factory=list)

    def add(self, other: EvalSums) -> None:
        """Add the sums over other images."""
        self.num_images += other.num_images
        for name, part in other.statistics.items():
            before = self.statistics.get(name)
            self.statistics[name] = before.merge(part) if before else part
        for model, agreement_db in other.agreements_db.items():
            before_db = self.agreements_db.get(model, agreement_db)
            self.agreements_db[model] = min(before_db, agreement_db)
        self.rejects += other.rejects
        self.pictures += other.pictures


class _Loaded(NamedTuple):
    """The models of a config in this process."""

    encoder: KLAutoencoder
    decoders: dict[str, tuple[KLAutoencoder, bool]]  # and whether its own encoder differs
    features: Features | None
    distances: dict[str, Distance]


@lru_cache(maxsize=1)
def _load(
    device: str, vae: Autoencoder, models: tuple[EvalModel, ...], networks: Networks
) -> _Loaded:
    prepare_device(device)
    features, distances, options = None, {}, networks.storage
    # The networks are loaded first, because a wrong hash is then reported within seconds.
    if file := networks.inception:
        features = load_inception(file.url, file.sha256, options, device)
    if file := networks.vgg16:
        distances["psim"] = load_vgg16(file.url, file.sha256, options, device)
    if file := networks.lpips:
        distances["lpips"] = load_lpips(file.url, file.sha256, options, device)
    encoder = load_vae(vae.checkpoint, device=device, decoder=False, options=vae.storage)
    fingerprint = encoder_fingerprint(encoder)
    decoders = {}
    for model in models:
        decoder = load_vae(model.checkpoint, device=device, options=model.storage)
        require_family(decoder, f"{model.name} ({model.checkpoint})", encoder.architecture)
        decoders[model.name] = (decoder, encoder_fingerprint(decoder) != fingerprint)
    return _Loaded(encoder, decoders, features, distances)


def evaluate_piece(config: EvalConfig, piece: Piece) -> EvalSums:
    """Measure the images of one shard; a process loads the models of a config once.

    Args:
        config, piece: the config, with absolute URLs, and the shard.

    Raises:
        CheckpointError, ConfigError: a model cannot be used, or the GPU's memory is too small.
        SourceChanged: the shard is no longer the listed version.
    """
    device = "cuda" if config.compute.num_gpus else "cpu"
    loaded = _load(device, config.vae, tuple(config.models), config.networks)
    sums, num_pictures = EvalSums(), piece.num_pictures  # at most the size of a chunk
    images = islice(_read(config, piece.shard, sums.rejects), piece.max_images)
    try:
        while chunk := list(islice(images, _CHUNK_IMAGES)):
            sums.add(_measure(loaded, chunk, config.compute.batch_size, num_pictures))
            num_pictures = 0
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"batches of {config.compute.batch_size} do not fit into the GPU's memory: lower "
            "compute.batch_size"
        ) from error
    return sums


def _read(
    config: EvalConfig, shard: SourceShard, rejects: Counter[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the key and the image (uint8 [3, side, side]) of each sample; count the rejects."""
    size = Bucket(config.resolution_px, config.resolution_px)
    spec = TransformSpec((size,), min_side_px=None, max_upscale=None, max_pixels=MAX_PIXELS)
    for sample in read_images(shard, source_contract(config.source), config.source.storage):
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
    loaded: _Loaded, chunk: Sequence[tuple[str, Tensor]], batch_size: int, num_pictures: int
) -> EvalSums:
    """Measure up to `_CHUNK_IMAGES` images, a batch at a time."""
    images = torch.stack([pixels for _, pixels in chunk])
    sums, panels = EvalSums(len(chunk)), [images[:num_pictures]]
    values: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
    batches = torch.split(images, batch_size)
    latents = [_encode(loaded.encoder, batch) for batch in batches]
    if loaded.features:
        values["", "features"] = [loaded.features(batch) for batch in batches]
    for model, (vae, is_foreign) in loaded.decoders.items():
        if is_foreign:
            own = _encode(vae, batches[0][:_AGREEMENT_IMAGES])
            agreement_db = require_agreement(own, latents[0][:_AGREEMENT_IMAGES], model)
            sums.agreements_db[model] = agreement_db
        shown = []
        for batch, z in zip(batches, latents, strict=True):
            originals, decoded = batch.to(z.device), _decode(vae, z, model)
            # Equal images have `MAX_DB` and not infinity.
            psnr = psnr_db(decoded, originals).clamp(MIN_DB, MAX_DB)
            values[model, "psnr_db"].append(psnr)
            values[model, "ssim"].append(ssim(decoded, originals))
            for name, distance in loaded.distances.items():
                values[model, name].append(distance(decoded, originals))
            if loaded.features:
                values[model, "features"].append(loaded.features(decoded))
            shown.append(decoded.cpu())
        panels.append(torch.cat(shown)[:num_pictures])
    for key, parts in values.items():
        vectors = torch.cat(parts).double().cpu().numpy()
        sums.statistics[key] = FeatureStatistics.of(vectors.reshape(len(chunk), -1))
    keys = (key for key, _ in chunk)
    sums.pictures += map(Picture, keys, torch.stack(panels, dim=1).numpy())
    return sums


def _encode(vae: KLAutoencoder, images: Tensor) -> Tensor:
    """Return the posterior's mean, [B, C, h, w] on the VAE's device."""
    return vae.encode(images.to(vae.device))[:, : vae.architecture.latent_channels]


def _decode(vae: KLAutoencoder, latents: Tensor, name: str) -> Tensor:
    decoded = vae.decode(latents)
    if not decoded.isfinite().all():
        raise CheckpointError(f"{name} decodes to values that are not finite: check its checkpoint")
    return to_uint8(decoded)
