"""The quality of stored latents: they are decoded and compared with the crops they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.quantization import is_finite, to_values
from latentcache.dataset.shards import tensor_bytes
from latentcache.errors import ConfigError
from latentcache.image_files import read_png, write_png
from latentcache.metrics import MAX_DB, MIN_DB, psnr_db, ssim
from latentcache.networks import Distance, load_lpips
from latentcache.qa.qa_files import Measured, QaRow
from latentcache.storage_options import StorageOptions
from latentcache.vae.compatibility import require_agreement, require_family
from latentcache.vae.encoder import draw_latents
from latentcache.vae.model import KLAutoencoder, to_uint8
from latentcache.vae.weights import encoder_fingerprint, load_vae

# Decoding takes several times the memory of encoding, so a batch has few images.
_BATCH_PIXELS = 4 * 256 * 256


@dataclass(frozen=True, slots=True)
class QaModels:
    """The models of an evaluation in addition to the dataset's VAE.

    Args:
        decoder: a checkpoint whose decoder is used; None uses the dataset's VAE.
        lpips: the LPIPS network's (URL, SHA-256); None leaves LPIPS out.
        decoder_storage: how to reach the decoder.
        lpips_storage: how to reach the network.
    """

    decoder: str | None = None
    lpips: tuple[str, str] | None = None
    decoder_storage: StorageOptions = StorageOptions()
    lpips_storage: StorageOptions = StorageOptions()


def load_evaluator(contract: Contract, encoder: KLAutoencoder, models: QaModels) -> QaEvaluator:
    """Load the evaluator of a dataset's rows onto the device of its VAE.

    Args:
        contract: the dataset's contract.
        encoder: the dataset's VAE. It needs a decoder only if `models` names none.
        models: the other models to load.

    Raises:
        CheckpointError: the decoder's checkpoint cannot be used.
        ConfigError: the models do not fit (see `QaEvaluator`), or the LPIPS network is not the
            named file.
        StorageError: a file cannot be read.
    """
    decoder, lpips = encoder, None
    if models.decoder:
        decoder = load_vae(models.decoder, device=encoder.device, options=models.decoder_storage)
    if models.lpips:
        lpips = load_lpips(*models.lpips, models.lpips_storage, encoder.device)
    return QaEvaluator(contract, encoder, decoder, lpips)


class QaEvaluator:
    """The evaluator of one dataset's rows. All modules are in fp32 on one device.

    Args:
        contract: the dataset's contract.
        encoder: the dataset's VAE; its decoder is not used.
        decoder: the VAE that decodes; may be `encoder`.
        lpips: the LPIPS network; None leaves LPIPS out.

    Raises:
        ConfigError: the encoder is not the dataset's, or the decoder is of another family.
    """

    def __init__(
        self,
        contract: Contract,
        encoder: KLAutoencoder,
        decoder: KLAutoencoder,
        lpips: Distance | None = None,
    ) -> None:
        vae = contract.vae
        if encoder_fingerprint(encoder) != vae.encoder_fingerprint:
            raise ConfigError("the encoder is not the one that made these latents")
        require_family(decoder, "the decoder", vae)
        self._contract = contract
        self._encoder = encoder
        self._decoder = decoder
        self._lpips = lpips
        self._is_trusted = encoder is decoder or (
            encoder_fingerprint(decoder) == vae.encoder_fingerprint
        )
        self.agreement_db: float | None = None
        """Agreement of the decoder's encoder with the dataset's, in dB; None if not compared."""

    @torch.inference_mode()
    def evaluate(
        self,
        unit: str,
        bucket: str,
        crops: Mapping[str, bytes],
        stored: Mapping[str, Tensor],
        signal: float,
    ) -> list[QaRow]:
        """Measure rows of one bucket of one unit.

        Args:
            unit: the unit's id.
            bucket: the bucket's name.
            crops: the encoded pixels as PNG, by key.
            stored: the stored tensors by key, in the stored dtype: [C, h, w], or [2C, h, w] for
                moments.
            signal: the variance of the dataset's latents, averaged over its C channels; used for
                the drift.

        Returns:
            The rows of `crops` that `stored` has too, in the order of `crops`.

        Raises:
            ConfigError: the decoder's own encoder differs from the dataset's and does not agree.
            ValueError: a crop is not a PNG of the bucket's size.
        """
        width_px, height_px = Bucket.parse(bucket)
        batch = max(1, _BATCH_PIXELS // (width_px * height_px))
        keys = [key for key in crops if key in stored]
        rows: list[QaRow] = []
        for first in range(0, len(keys), batch):
            some = keys[first : first + batch]
            pixels = torch.stack([read_png(crops[key], (width_px, height_px)) for key in some])
            latents = torch.stack([stored[key] for key in some])
            measured, decoded = self._measure_in_turn(unit, some, pixels, latents, signal)
            means = to_values(latents, self._contract.latents)[
                :, : self._contract.vae.latent_channels
            ]
            rows += [
                QaRow(
                    key=key,
                    bucket=bucket,
                    measured=values,
                    image=crops[key],
                    reconstruction=write_png(picture),
                    latent=tensor_bytes(mean),
                    latent_shape=tuple(mean.shape),
                )
                for key, values, picture, mean in zip(some, measured, decoded, means, strict=True)
            ]
        return rows

    def _measure_in_turn(
        self, unit: str, keys: Sequence[str], images: Tensor, stored: Tensor, signal: float
    ) -> tuple[list[Measured], Tensor]:
        """Measure a batch at once, or row by row if the GPU's memory is too small for it."""
        try:
            return self._measure(unit, keys, images, stored, signal)
        except torch.OutOfMemoryError:
            pass
        # Outside the handler, because the error holds references to the tensors.
        torch.cuda.empty_cache()
        try:
            parts = [
                self._measure(unit, [key], images[i : i + 1], stored[i : i + 1], signal)
                for i, key in enumerate(keys)
            ]
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"decoding {images.shape[3]}x{images.shape[2]} for QA does not fit into the GPU's "
                "memory beside encoding: lower compute.batch_size, or run `latentcache qa` later"
            ) from error
        return [m for part, _ in parts for m in part], torch.cat([decoded for _, decoded in parts])

    def _measure(
        self, unit: str, keys: Sequence[str], images: Tensor, stored: Tensor, signal: float
    ) -> tuple[list[Measured], Tensor]:
        """Measure a batch; also return its reconstructions, uint8 [B, 3, H, W] on the CPU."""
        pixels = images.to(self._decoder.device)
        latents = to_values(stored, self._contract.latents)
        moments = self._encoder.encode(pixels)
        self._require_agreement(pixels, moments)
        posterior, channels = self._contract.latents.posterior, self._contract.vae.latent_channels
        reference = draw_latents(moments.cpu(), posterior, unit, keys)
        finite = is_finite(stored).all(dim=(1, 2, 3))
        decoded = self._decode(latents.nan_to_num(posinf=0.0, neginf=0.0)[:, :channels])
        psnrs = _within_limits(psnr_db(decoded, pixels), finite)
        costs: list[float | None] = [None] * len(keys)
        if self._contract.latents.quantization:
            best = _within_limits(psnr_db(self._decode(reference[:, :channels]), pixels), finite)
            costs = [*(best - psnrs).tolist()]
        measures = zip(
            psnrs.tolist(),
            ssim(decoded, pixels).tolist(),
            self._lpips(decoded, pixels).tolist() if self._lpips else [None] * len(keys),
            _row_drift_db(latents, reference, channels, signal),
            costs,
            strict=True,
        )
        return [Measured(*values) for values in measures], decoded.cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        return to_uint8(self._decoder.decode(latents.to(self._decoder.device)))

    def _require_agreement(self, pixels: Tensor, moments: Tensor) -> None:
        """Compare the decoder's own encoder with the dataset's, on the first images."""
        if not self._is_trusted:
            channels = self._contract.vae.latent_channels
            own = self._decoder.encode(pixels)[:, :channels]
            self.agreement_db = require_agreement(own, moments[:, :channels], "the decoder")
            self._is_trusted = True


def _row_drift_db(latents: Tensor, reference: Tensor, channels: int, signal: float) -> list[float]:
    """Return each row's drift in dB: signal over the mean squared error of the training samples.

    From moments, training draws `mean + exp(logvar / 2) * n` with a standard normal n. The expected
    squared error is therefore that of the mean plus that of the standard deviation.
    """
    latents, reference = latents.double(), reference.double()
    error = (latents[:, :channels] - reference[:, :channels]).square()
    if latents.shape[1] > channels:
        std, reference_std = ((0.5 * z[:, channels:]).exp() for z in (latents, reference))
        error = error + (std - reference_std).square()
    means = error.mean(dim=(1, 2, 3))
    decibels = torch.where(means == 0, math.inf, 10 * torch.log10(signal / means))
    return [_limited(value) for value in decibels.tolist()]


def _within_limits(decibels: Tensor, finite: Tensor) -> Tensor:
    """Clamp decibels to the limits; rows with non-finite latents get the lower limit."""
    bounded = decibels.cpu().clamp(MIN_DB, MAX_DB)
    return torch.where(finite, bounded, torch.full_like(bounded, MIN_DB))


def _limited(decibels: float) -> float:
    # In this order of arguments, NaN becomes the lower limit.
    return min(max(MIN_DB, decibels), MAX_DB)
