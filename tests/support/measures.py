"""The package's measures by other libraries, or straight from their definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from stand_ins import vgg16_features

Pixels = npt.NDArray[np.uint8]
Float64 = npt.NDArray[np.float64]


def as_tensor(images: Pixels) -> torch.Tensor:
    """[N, H, W, 3] as the package has it: [N, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def ssim_by_skimage(image: Pixels, other: Pixels) -> float:
    """Structural similarity of two images [H, W, 3], as Wang et al. defined it."""
    return float(
        structural_similarity(
            image / 255,
            other / 255,
            data_range=1.0,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def frechet_by_sqrtm(a: Float64, b: Float64) -> float:
    """The definition, by scipy's matrix square root."""
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    delta = a.mean(axis=0) - b.mean(axis=0)
    total = np.trace(covariances[0] + covariances[1])
    return float(delta @ delta + total - 2 * np.trace(root).real)


def frechet_by_singular_values(a: Float64, b: Float64) -> float:
    """The definition where covariances are singular.

    tr((C_a C_b)^½) is the sum of the singular values of A Bᵀ, where A and B hold the deviations
    from the mean over the square root of N - 1.
    """
    deviations = [(x - x.mean(axis=0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    delta = a.mean(axis=0) - b.mean(axis=0)
    root = np.linalg.svd(deviations[0] @ deviations[1].T, compute_uv=False).sum()
    return float(delta @ delta + sum(np.square(x).sum() for x in deviations) - 2 * root)


def psim_by_modules(path: Path, images: Pixels, others: Pixels) -> list[float]:
    """PSIM of pairs of images [N, H, W, 3] by torch's modules, one pair at a time."""
    vgg16 = vgg16_features().eval().requires_grad_(False)
    state = torch.load(path, weights_only=True)
    vgg16.load_state_dict(
        {name.removeprefix("features."): t for name, t in state.items() if "features" in name}
    )
    actual = []
    for pair in zip(images, others, strict=True):
        total, x = 0.0, [_normalised(image) for image in pair]
        for index, layer in enumerate(vgg16):
            x = [layer(one) for one in x]
            if index in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                a, b = (F.normalize(one.double(), dim=1)[0].numpy() for one in x)
                total += float(np.square(a - b).sum(axis=0).mean())
        actual.append(total)
    return actual


def _normalised(image: Pixels) -> torch.Tensor:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((image / 255 - mean) / std).permute(2, 0, 1)[None].float()
