"""Measures of how close two images or two latents are."""

from __future__ import annotations

import torch


def psnr_db(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB; infinite where they are equal.

    Args:
        images: uint8 [B, 3, H, W].
        reference: the same shape and dtype; the peak is 255.

    Returns:
        float64 [B].
    """
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


def drift_db(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """How far latents are from a reference encode: signal variance over squared error, in dB.

    Args:
        latents: [B, C, H, W], any float dtype.
        reference: the same shape; its variance within each channel is the signal.

    Returns:
        The ratio over the whole batch; infinite where they are equal, -inf where any is not finite.
    """
    signal = reference.double()
    error = (latents.double() - signal).square().sum()
    if not torch.isfinite(error):
        return -float("inf")
    variance = (signal - signal.mean(dim=(0, 2, 3), keepdim=True)).square().sum()
    return float(10 * torch.log10(variance / error)) if error else float("inf")
