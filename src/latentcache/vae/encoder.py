"""From uint8 batches to latents: precision, batch size, memory back-off, the finite check."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentcache.metrics import drift_db
from latentcache.vae.model import KLAutoencoder

PRECISION_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Storing float16 alone costs about 70 dB; an encode this close to fp32 costs training nothing.
MIN_DRIFT_DB = 55.0

# Pixels encoded at once with `batch_size: auto`: 64 images of 256 px on a GPU, 4 on a CPU, where
# larger batches gain nothing.
_AUTO_BATCH_PIXELS = {"cuda": 64 * 256 * 256, "cpu": 4 * 256 * 256}


def require_fp32() -> None:
    """Make fp32 mean fp32 in this process.

    By default cuDNN computes convolutions of float32 in TF32, whose ten bits are those of float16:
    no reference for it, and no way out where float16 fails.
    """
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Moments of one batch: float32 [B, 2C, H, W] on the CPU, mean then log-variance.

    `num_in_fp32` latents were not finite and were encoded again in fp32; those listed in `bad` are
    still not finite.
    """

    moments: torch.Tensor
    num_in_fp32: int
    bad: tuple[int, ...]


class LatentEncoder:
    """Encodes batches on one device; not thread-safe.

    Args:
        vae: in fp32 on its device; its decoder is not used.
        precision: `fp32`, `fp16` or `bf16`.
        batch_size: images at once, or None to choose by bucket and device.
    """

    def __init__(self, vae: KLAutoencoder, precision: str, batch_size: int | None = None) -> None:
        self._reference = vae
        dtype = PRECISION_DTYPES[precision]
        self._vae = vae if dtype == torch.float32 else copy.deepcopy(vae).to(dtype)
        self._device = vae.device
        self._batch_size = batch_size
        self._limits: dict[tuple[int, int], int] = {}

    def batch_size(self, width_px: int, height_px: int) -> int:
        """How many images of that bucket to bring at once."""
        auto = _AUTO_BATCH_PIXELS[self._device.type] // (width_px * height_px)
        return self._limits.get((width_px, height_px), self._batch_size or max(1, auto))

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> Encoded:
        """Encode uint8 [B, 3, H, W] from the CPU.

        Running out of GPU memory halves the batch size of this bucket from then on.

        Raises:
            torch.OutOfMemoryError: not even one image fits.
        """
        moments = self._encode_in_batches(images)
        finite = moments.isfinite().all(dim=(1, 2, 3))
        if finite.all():
            return Encoded(moments, 0, ())
        again = [int(index) for index in (~finite).nonzero()]
        for index in again:
            pixels = images[index : index + 1].to(self._device)
            moments[index] = self._reference.encode(pixels).cpu()[0]
        bad = tuple(index for index in again if not moments[index].isfinite().all())
        return Encoded(moments, len(again) - len(bad), bad)

    def _encode_in_batches(self, images: torch.Tensor) -> torch.Tensor:
        height_px, width_px = images.shape[2:]
        done: list[torch.Tensor] = []
        while len(images):
            full = self.batch_size(width_px, height_px)
            try:
                done.append(self._encode_padded(images[:full], full))
                images = images[full:]
                continue
            except torch.OutOfMemoryError:
                if full == 1:
                    raise
            # Out here, where the error no longer holds on to the tensors that it met.
            torch.cuda.empty_cache()
            self._limits[width_px, height_px] = full // 2
        return torch.cat(done)

    def _encode_padded(self, images: torch.Tensor, full: int) -> torch.Tensor:
        num_images = len(images)
        if self._device.type == "cuda" and num_images < full:
            # One shape per bucket: cuDNN picks its kernels once, and a tail runs like any batch.
            images = torch.cat([images, images[-1:].expand(full - num_images, -1, -1, -1)])
        return self._vae.encode(images.to(self._device)).cpu()[:num_images]


def draw_latents(
    moments: torch.Tensor, posterior: str, unit_id: str, keys: Sequence[str]
) -> torch.Tensor:
    """Take what is stored from moments, float32 [B, 2C, H, W].

    `mean` is the first half of the channels, `moments` all of them, and `sample` is drawn from
    N(mean, exp(logvar)) with noise that depends on (unit, key) alone: Philox, keyed by their
    SHA-256, so that every attempt draws the same.

    Returns:
        float32 [B, C, H, W], or [B, 2C, H, W] for `moments`.
    """
    if posterior == "moments":
        return moments
    mean, logvar = moments.chunk(2, dim=1)
    if posterior == "mean":
        return mean
    noise = torch.empty_like(mean)
    for index, key in enumerate(keys):
        digest = hashlib.sha256(f"{unit_id}\0{key}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        drawn = generator.standard_normal(tuple(mean.shape[1:]), dtype=np.float32)
        noise[index] = torch.from_numpy(drawn)
    return mean + torch.exp(0.5 * logvar) * noise


@torch.inference_mode()
def resolve_precision(vae: KLAutoencoder, images: Sequence[torch.Tensor]) -> str:
    """Choose the fastest precision that stays `MIN_DRIFT_DB` from fp32 on real images.

    Args:
        vae: in fp32 on its device. A CPU is always told fp32.
        images: uint8 [3, H, W] each; none at all gives fp32.
    """
    if vae.device.type != "cuda" or not images:
        return "fp32"
    channels = vae.architecture.latent_channels
    # float16 is as fast as bfloat16 and has three more bits, but can overflow.
    for precision in ("fp16", "bf16"):
        fast = copy.deepcopy(vae).to(PRECISION_DTYPES[precision])
        batches = [image[None].to(vae.device) for image in images]
        drifts = [
            drift_db(fast.encode(pixels)[:, :channels], vae.encode(pixels)[:, :channels])
            for pixels in batches
        ]
        if min(drifts) >= MIN_DRIFT_DB:
            return precision
    return "fp32"
