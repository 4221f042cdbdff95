"""Metrics of the similarity of two images, two latents or two sets of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float64 = npt.NDArray[np.float64]

# Stored decibels are clamped to this range, so that a mean stays finite. NaN becomes the minimum.
MIN_DB, MAX_DB = -100.0, 150.0

# Wang et al. 2004, section III: the window, and the constants for a data range of 1.
_SSIM_WINDOW_PX = 11
_SSIM_SIGMA_PX = 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def psnr_db(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, float64 [B]; infinite if equal.

    Args:
        images, reference: uint8 [B, 3, H, W]; the peak is 255.
    """
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity (SSIM) of each image, float64 [B]; 1 for equal images.

    The formula is equation 13 of Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment:
    From Error Visibility to Structural Similarity" (2004), in each channel. It uses a Gaussian
    window of 11×11 px with sigma 1.5, population covariance and data range 1. The result is the
    mean over channels and over the positions where the window lies completely within the image. If
    a side is below 11 px, the window has the largest odd side that fits.

    Args:
        images, reference: uint8 [B, 3, H, W].
    """
    x, y = images.double() / 255, reference.double() / 255
    half = (min(_SSIM_WINDOW_PX, *x.shape[2:]) - 1) // 2
    window = np.exp(-0.5 * np.square(np.arange(-half, half + 1) / _SSIM_SIGMA_PX))
    window /= window.sum()
    mean_x, mean_y = _local_mean(x, window), _local_mean(y, window)
    variance_x = _local_mean(x * x, window) - mean_x * mean_x
    variance_y = _local_mean(y * y, window) - mean_y * mean_y
    covariance = _local_mean(x * y, window) - mean_x * mean_y
    above = (2 * mean_x * mean_y + _SSIM_C1) * (2 * covariance + _SSIM_C2)
    below = (mean_x.square() + mean_y.square() + _SSIM_C1) * (variance_x + variance_y + _SSIM_C2)
    return (above / below).mean(dim=(1, 2, 3))


def _local_mean(maps: Tensor, window: Float64) -> Tensor:
    """Return weighted means at all positions where the window lies within maps [B, C, H, W]."""
    for dim in (2, 3):
        # Sum over shifts, because convolutions in float64 on a CPU are several times slower.
        length = maps.shape[dim] - len(window) + 1
        sums = torch.zeros_like(maps.narrow(dim, 0, length))
        for offset, weight in enumerate(window.tolist()):
            sums.add_(maps.narrow(dim, offset, length), alpha=weight)
        maps = sums
    return maps


def drift_db(latents: Tensor, reference: Tensor) -> float:
    """Return the ratio of signal variance to squared error over a batch of latents, in dB.

    It is inf for equal latents, and -inf for infinite or NaN ones. Args: [B, C, H, W]; the variance
    of the reference in each channel is the signal.
    """
    signal = reference.double()
    error = (latents.double() - signal).square().sum()
    if not torch.isfinite(error):
        return -float("inf")
    variance = (signal - signal.mean(dim=(0, 2, 3), keepdim=True)).square().sum()
    return float(10 * torch.log10(variance / error)) if error else float("inf")


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """The mean and covariance of `count` vectors of D features, which can be merged.

    `mean` is float64 [D]. `scatter`, float64 [D, D], sums the outer products of deviations from it.
    """

    count: int
    mean: Float64
    scatter: Float64

    @classmethod
    def empty(cls, num_features: int) -> FeatureStatistics:
        """Return the statistics of no vectors."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, features: npt.NDArray[np.floating]) -> FeatureStatistics:
        """Return the statistics of a batch: any float dtype [N, D], N ≥ 1."""
        vectors = features.astype(np.float64)
        mean = vectors.mean(axis=0)
        vectors -= mean
        return cls(len(vectors), mean, vectors.T @ vectors)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of both sets of vectors (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta = other.mean - self.mean
        scatter = np.outer(delta, delta)
        scatter *= self.count * other.count / count
        scatter += self.scatter
        scatter += other.scatter
        return FeatureStatistics(count, self.mean + delta * (other.count / count), scatter)

    @property
    def std(self) -> Float64:
        """The population standard deviation of each feature, float64 [D]; zero for no vectors."""
        return np.sqrt(np.diag(self.scatter) / max(self.count, 1))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the Fréchet distance of two Gaussians with the given means and sample covariances.

    The formula is |m_a - m_b|² + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^½) (Dowson and Landau 1982).
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), equation 6, use it as a
    distance of image sets. The last trace is computed from the eigenvalues of C_a^½ C_b C_a^½,
    which is symmetric. Rounding errors of eigenvalues that are zero are removed.

    Args:
        a, b: statistics of at least two vectors each; fewer raise a ValueError.
    """
    if min(a.count, b.count) < 2:
        raise ValueError("a Fréchet distance needs at least two vectors on each side")
    covariance_a, covariance_b = a.scatter / (a.count - 1), b.scatter / (b.count - 1)
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(_without_noise(values))) @ vectors.T
    products = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace_of_root = np.sqrt(_without_noise(products)).sum()
    distance = np.square(a.mean - b.mean).sum()
    distance += np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root
    return max(0.0, float(distance))


def _without_noise(eigenvalues: Float64) -> Float64:
    """Return eigenvalues with those set to zero that are negative or within rounding error."""
    least = eigenvalues.max(initial=0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    return np.where(eigenvalues > least, eigenvalues, 0.0)
