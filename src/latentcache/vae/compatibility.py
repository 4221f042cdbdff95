"""Check whether the decoder of one VAE may decode the latents of another VAE's encoder.

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


def require_family(vae: KLAutoencoder, name: str, wanted: Architecture | VaeContract) -> None:
    """Raise an error if the latents of a VAE have another shape than the latents to decode.

    Args:
        vae: the VAE.
        name: the name of the VAE in errors.
        wanted: the VAE of the latents to decode.

    Raises:
        ConfigError: the shapes differ.
    """
    for field in ("latent_channels", "downsample_factor"):
        given, value = getattr(vae.architecture, field), getattr(wanted, field)
        if given != value:
            raise ConfigError(
                f"{name} is of another family: its {field} is {given}, that of the latents is "
                f"{value}: name a decoder of the same VAE"
            )


def require_agreement(own: Tensor, latents: Tensor, name: str) -> float:
    """Raise an error if a VAE's own encoder does not agree with the latents that it must decode.

    Args:
        own: the latents of some images from the VAE's own encoder, [B, C, h, w].
        latents: the latents of these images from the encoder in use, of the same shape.
        name: the name of the VAE in errors.

    Returns:
        The agreement of the two, in dB.

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
