"""Determine the scaling factor of a checkpoint's latents from its config, its tensors or the user.

Shapes do not determine it: SDXL's autoencoder has the same shapes as Stable Diffusion's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from latentcache.errors import ConfigError
from latentcache.vae.architecture import Architecture

_USUAL = (
    "0.18215 for Stable Diffusion 1 and 2 and sd-vae-ft-*; 0.13025 for SDXL; 1.5305 with "
    "vae.shift_factor 0.0609 for SD3; 0.3611 with vae.shift_factor 0.1159 for FLUX.1"
)

_FIRST_STAGE = "first_stage_model."
_SD_LATENT_CHANNELS = 4
# The configs of CompVis's Stable Diffusion 1 and 2, and of Stability's SDXL.
_SD, _SDXL = 0.18215, 0.13025


def recognised_factor(tensors: Mapping[str, Tensor]) -> float | None:
    """Return the scaling factor that the tensors of a CompVis checkpoint determine, or None.

    CompVis's `ddpm.py` stores a measured factor as the buffer `scale_factor`. Otherwise
    `conditioner` means SDXL, unless `edm_mean` shows that it is Playground's, which scales by
    channel. A U-Net alone means Stable Diffusion 1 or 2.
    """
    if (buffer := tensors.get("scale_factor")) is not None and buffer.numel() == 1:
        factor = float(buffer)
        return factor if math.isfinite(factor) and factor > 0 else None
    last = tensors.get(f"{_FIRST_STAGE}encoder.conv_out.weight")
    if last is None or not last.ndim or last.shape[0] != 2 * _SD_LATENT_CHANNELS:
        return None
    if "edm_mean" in tensors:
        return None
    if any(key.startswith("conditioner.") for key in tensors):
        return _SDXL
    return _SD if any(key.startswith("model.diffusion_model.") for key in tensors) else None


def resolve_scaling(
    architecture: Architecture,
    scaling_factor: float | None,
    shift_factor: float | None,
    checkpoint: str,
) -> tuple[float, float]:
    """Return the scaling factor and the shift factor that a checkpoint and a config specify.

    Args:
        architecture, checkpoint: of the checkpoint, and its URL for errors.
        scaling_factor, shift_factor: of the config; None if they are not set.

    Raises:
        ConfigError: checkpoint and config contradict each other, or neither has the scaling factor.
    """
    known = architecture.scaling_factor
    if known is None:
        if scaling_factor is None:
            raise ConfigError(
                f"{checkpoint} has no scaling factor: set vae.scaling_factor ({_USUAL}), or put "
                "the config.json of its diffusers version beside it"
            )
        return scaling_factor, shift_factor or 0.0
    known_shift = architecture.shift_factor or 0.0
    for field, given, actual in (
        ("scaling_factor", scaling_factor, known),
        ("shift_factor", shift_factor, known_shift),
    ):
        if given is not None and given != actual:
            raise ConfigError(
                f"vae.{field} is {given:g}, but that of {checkpoint} is {actual:g}: leave "
                "vae.scaling_factor and vae.shift_factor out, or correct its config.json"
            )
    return known, known_shift
