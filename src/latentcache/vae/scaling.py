"""Which scaling factor the latents of a checkpoint have: of its config, its contents, or the user.

A diffusion model is trained on `(z - shift_factor) * scaling_factor`. A diffusers config says both.
A file without a config does not: SDXL's autoencoder has the shapes of Stable Diffusion's.
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
    """Tell the scaling factor from the tensors of a CompVis checkpoint, where they determine it.

    A `LatentDiffusion` that was trained with a measured factor keeps it as a buffer, `scale_factor`
    (CompVis's `ddpm.py`). Else a whole checkpoint tells its family by the networks beside the
    autoencoder: `conditioner` is SDXL's, but with `edm_mean` it is Playground's, which scales by
    channel; a U-Net without it is Stable Diffusion 1 or 2. An autoencoder alone tells nothing.
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
    """Bring together what a checkpoint and a config say of the scaling and shift factors.

    Args:
        architecture: of the checkpoint.
        scaling_factor: `vae.scaling_factor` of the config; None if it says nothing.
        shift_factor: `vae.shift_factor` of the config; None if it says nothing.
        checkpoint: its URL, for errors.

    Returns:
        The scaling factor and the shift factor.

    Raises:
        ConfigError: the two contradict each other, or neither says the scaling factor.
    """
    known = architecture.scaling_factor
    if known is None:
        if scaling_factor is None:
            raise ConfigError(
                f"{checkpoint} does not say its scaling factor: set vae.scaling_factor ({_USUAL}), "
                "or put the config.json of its diffusers version beside it"
            )
        return scaling_factor, shift_factor or 0.0
    known_shift = architecture.shift_factor or 0.0
    for field, given, found in (
        ("scaling_factor", scaling_factor, known),
        ("shift_factor", shift_factor, known_shift),
    ):
        if given is not None and given != found:
            raise ConfigError(
                f"vae.{field} is {given:g}, but that of {checkpoint} is {found:g}: leave "
                "vae.scaling_factor and vae.shift_factor out, or correct its config.json"
            )
    return known, known_shift
