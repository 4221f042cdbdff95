"""Whether the decoder of one VAE may decode the latents of another one's encoder.

The three decoders of the `sd-vae-ft-mse` model card share an encoder; others may look like it.
"""

from __future__ import annotations

from torch import Tensor

from latentcache.dataset.contract import VaeContract
from latentcache.errors import ConfigError
from latentcache.metrics import drift_db
from latentcache.vae.architecture import Architecture
from latentcache.vae.model import KLAutoencoder

# Copies of one encoder at other precisions agree this well, autoencoders trained apart do not.
MIN_AGREEMENT_DB = 50.0


def require_family(vae: KLAutoencoder, name: str, wanted: Architecture | VaeContract) -> None:
    """Refuse a VAE whose latents are of another shape than those that it is to decode.

    Raises:
        ConfigError: they are; the message calls the VAE `name`.
    """
    for field in ("latent_channels", "downsample_factor"):
        given, value = getattr(vae.architecture, field), getattr(wanted, field)
        if given != value:
            raise ConfigError(
                f"{name} is of another family: its {field} is {given}, that of the latents is "
                f"{value}; name a decoder of the same VAE"
            )


def require_agreement(own: Tensor, latents: Tensor, name: str) -> float:
    """Refuse a VAE whose own encoder gives other latents than those that it is to decode.

    Args:
        own: what its encoder makes of some images, [B, C, h, w].
        latents: what the encoder in use makes of them, of the same shape.
        name: of the VAE.

    Returns:
        How well the two agree, in dB.

    Raises:
        ConfigError: less than `MIN_AGREEMENT_DB`.
    """
    agreement_db = drift_db(own, latents)
    if agreement_db < MIN_AGREEMENT_DB:
        raise ConfigError(
            f"{name} belongs to another encoder: on the first images the two agree to "
            f"{agreement_db:.1f} dB, and {MIN_AGREEMENT_DB:g} dB are asked for; name a decoder of "
            "the same VAE"
        )
    return agreement_db
