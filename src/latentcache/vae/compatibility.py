"""Check whether one VAE's decoder may decode another VAE's latents.

The three decoders of the `sd-vae-ft-mse` model card share an encoder. Other VAEs may have the same
shapes and another encoder.
"""

from __future__ import annotations

from torch import Tensor

from latentcache.dataset.contract import VaeContract
from latentcache.errors import ConfigError
from latentcache.metrics import drift_db
from latentcache.vae.architecture import Architecture
from latentcache.vae.model import KLAutoencoder

# Copies of one encoder in other precisions agree at least this well. Separately trained
# autoencoders do not.
MIN_AGREEMENT_DB = 50.0


def require_family(vae: KLAutoencoder, name: str, other: Architecture | VaeContract) -> None:
    """Raise `ConfigError` if the latents of a VAE have another shape than the latents to decode.

    Args:
        vae, name, other: the VAE, its name in errors, and the VAE of the latents to decode.
    """
    for field in ("latent_channels", "downsample_factor"):
        given, value = getattr(vae.architecture, field), getattr(other, field)
        if given != value:
            raise ConfigError(
                f"{name} is of another family: its {field} is {given}, that of the latents is "
                f"{value}: name a decoder of the same VAE"
            )


def require_agreement(own: Tensor, latents: Tensor, name: str) -> float:
    """Return the agreement in dB of a VAE's own encoder with the latents that it must decode.

    Args:
        own, latents, name: both latents of some images, [B, C, h, w], and the VAE's name in errors.

    Raises:
        ConfigError: the agreement is below `MIN_AGREEMENT_DB`.
    """
    agreement_db = drift_db(own, latents)
    if agreement_db < MIN_AGREEMENT_DB:
        raise ConfigError(
            f"{name} belongs to another encoder: on the first images the two agree to "
            f"{agreement_db:.1f} dB, and {MIN_AGREEMENT_DB:g} dB are required: name a decoder of "
            "the same VAE"
        )
    return agreement_db
