"""Measures against scikit-image and scipy, and where those give up against the definition."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio

from latentcache.metrics import FeatureStatistics, frechet_distance, psnr_db, ssim
from makers import draw
from measures import (
    Pixels,
    as_tensor,
    frechet_by_singular_values,
    frechet_by_sqrtm,
    ssim_by_skimage,
)


def images_of(width: int, height: int, num: int = 3) -> Pixels:
    """Images [num, height, width, 3]."""
    return np.stack([np.asarray(draw(width, height, seed)) for seed in range(num)])


def noisy(images: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 12, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


CHANGES = {
    "noise": noisy,
    "darker": lambda images: (images * 0.6).astype(np.uint8),
    "mirrored": lambda images: images[:, :, ::-1].copy(),
    "coarse": lambda images: images // 32 * 32,
    "flat": lambda images: np.full_like(images, 128),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", [(11, 11), (64, 64), (96, 40), (256, 256)])
def test_psnr_and_ssim_are_those_of_scikit_image(change: str, size: tuple[int, int]):
    images = images_of(*size)
    changed = CHANGES[change](images)
    pair = as_tensor(changed), as_tensor(images)
    psnrs, ssims = psnr_db(*pair), ssim(*pair)
    assert (psnrs.dtype, ssims.dtype, len(ssims)) == (torch.float64, torch.float64, len(images))
    for index, (image, other) in enumerate(zip(images, changed, strict=True)):
        expected = peak_signal_noise_ratio(image, other, data_range=255)
        assert psnrs[index].item() == pytest.approx(expected, abs=1e-4)
        assert ssims[index].item() == pytest.approx(ssim_by_skimage(image, other), abs=1e-9)


def test_equal_images_have_ssim_one_and_infinite_psnr():
    images = as_tensor(images_of(40, 24))
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    assert psnr_db(images, images).tolist() == [float("inf")] * 3


@pytest.mark.parametrize(("size", "window"), [((8, 8), 7), ((9, 30), 9), ((1, 5), 1)])
def test_ssim_of_tiny_images_has_the_window_that_fits(size: tuple[int, int], window: int):
    images = images_of(*size, num=1)
    changed = noisy(images)
    x, y = images[0] / 255, changed[0] / 255
    axis = np.exp(-0.5 * (np.arange(-(window // 2), window // 2 + 1) / 1.5) ** 2)
    weights = np.outer(axis, axis) / np.outer(axis, axis).sum()
    actual = []
    for top in range(x.shape[0] - window + 1):
        for left in range(x.shape[1] - window + 1):
            for channel in range(3):
                position = (slice(top, top + window), slice(left, left + window), channel)
                a, b = x[position], y[position]
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                var_a = (weights * (a - mean_a) ** 2).sum()
                var_b = (weights * (b - mean_b) ** 2).sum()
                covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                above = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
                below = (mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)
                actual.append(above / below)
    (whole,) = ssim(as_tensor(changed), as_tensor(images)).tolist()
    assert whole == pytest.approx(np.mean(actual), abs=1e-9)


# Features.


def features(num: int, num_features: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Correlated features with a mean of their own."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(num, num_features)) @ rng.normal(size=(num_features, num_features))
    return (mixed / num_features**0.5 + rng.normal(size=num_features)).astype(np.float32)


def distance(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    return frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))


@pytest.mark.parametrize(("num_a", "num_b", "num_features"), [(300, 200, 64), (50, 90, 7)])
def test_frechet_distance_is_that_of_scipy(num_a: int, num_b: int, num_features: int):
    a, b = features(num_a, num_features, 1), features(num_b, num_features, 2)
    expected = frechet_by_sqrtm(a.astype(np.float64), b.astype(np.float64))
    assert distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert distance(b, a) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_a", "num_b"), [(20, 30), (2, 2), (20, 400), (400, 3)])
def test_frechet_distance_of_fewer_images_than_features(num_a: int, num_b: int):
    a, b = features(num_a, 256, 1), features(num_b, 256, 2)
    expected = frechet_by_singular_values(a.astype(np.float64), b.astype(np.float64))
    assert distance(a, b) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num", [2, 20, 400])
def test_frechet_distance_of_a_set_from_itself_is_zero(num: int):
    a = features(num, 128)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)
    shifted = a.astype(np.float64) + 0.5
    assert distance(a, shifted) == pytest.approx(128 * 0.25, abs=1e-6)


def test_frechet_distance_of_constant_features():
    a = np.ones((10, 5))
    assert distance(a, a) == 0
    assert distance(a, a + 2) == pytest.approx(20)


def test_frechet_distance_needs_two_vectors():
    with pytest.raises(ValueError, match="at least two"):
        distance(np.ones((1, 3)), np.ones((9, 3)))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([0.0, 1e4]))
def test_statistics_of_parts_merge_into_those_of_the_whole(sizes: list[int], offset: float):
    parts = [features(size, 6, seed) + offset for seed, size in enumerate(sizes)]
    total = FeatureStatistics.empty(6)
    for part in parts:
        total = total.merge(FeatureStatistics.of(part) if len(part) else FeatureStatistics.empty(6))
    whole = np.concatenate(parts).astype(np.float64)
    assert total.count == len(whole)
    if len(whole) > 1:
        np.testing.assert_allclose(total.mean, whole.mean(axis=0), rtol=1e-12)
        expected = np.cov(whole, rowvar=False)
        np.testing.assert_allclose(total.scatter / (len(whole) - 1), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(total.std, whole.std(axis=0), rtol=1e-9)
