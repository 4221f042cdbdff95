"""Fit images to buckets: choose a bucket, resize, crop.

These rules determine which pixels a latent represents. They are part of the dataset's contract, so
a change to any of them makes every existing cache stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.errors import ConfigError, Reject
from latentcache.images.decode import Reserve, decode_scaled
from latentcache.images.resize import Side, resize

# An image is rejected if its resized form has more than this many times the pixels of its bucket:
# the crop would drop nearly all of it, and a strip of 1 × 60,000 would need gigabytes of memory.
MAX_CROP_FACTOR = 16

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if that is at least this many times the size
# that it is resized to. After the resize, the decoder's box-like scaling then differs from the full
# decode by 48 dB. At the target size itself it would be 30 dB.
_DCT_HEADROOM = 2


@dataclass(frozen=True, slots=True)
class TransformSpec:
    """The parameters of the transform; None for a limit accepts all images.

    Attributes:
        buckets: the sizes to choose from, at least one.
        min_side_px: images with a shorter side are rejected.
        max_upscale: images that would be enlarged by a larger factor are rejected.
        max_pixels: images of more pixels are rejected before they are decoded.
        dct_scaling: whether large JPEGs are decoded at a fraction of their size (by `load_image`).
    """

    buckets: tuple[Bucket, ...]
    min_side_px: int | None
    max_upscale: float | None
    max_pixels: int
    dct_scaling: bool = False


@dataclass(frozen=True, slots=True)
class Transformed:
    """An image resized and cropped to its bucket.

    `pixels` is uint8 [3, height_px, width_px], RGB. Its memory format is channels-last, which is
    the output of decoders and the input of fast encoders. The offsets are the start of the crop in
    pixels of the resized image. The sizes are those of the original image after its EXIF
    orientation. SDXL's micro-conditioning needs both (Podell et al. 2023, section 2.2).
    """

    pixels: torch.Tensor
    bucket: Bucket
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int


def ratio_buckets(resolution_px: int, max_ratio: float, step_px: int) -> tuple[Bucket, ...]:
    """Return sizes of about `resolution_px**2` pixels, sorted by width.

    For every long side that is a multiple of `step_px`, from `resolution_px` upwards, the short
    side is the multiple of `step_px` nearest to `resolution_px**2 / long`. Sizes are included in
    both orientations as long as long over short is at most `max_ratio`.

    Args:
        resolution_px: the side of the square size.
        max_ratio: the maximum of long over short.
        step_px: the divisor of all sides.

    Raises:
        ConfigError: `resolution_px` is not a multiple of `step_px`, so there is no square size.
    """
    if resolution_px % step_px:
        raise ConfigError(
            f"transform.resolution_px {resolution_px} is not a multiple of "
            f"transform.buckets.step_px {step_px}: change one of them"
        )
    sizes = set()
    long = short = resolution_px
    while short > 0 and long <= max_ratio * short:
        sizes |= {(long, short), (short, long)}
        long += step_px
        # The nearest multiple, in integers: floor(area / (long * step) + 1/2).
        short = (2 * resolution_px**2 + long * step_px) // (2 * long * step_px) * step_px
    return tuple(Bucket(*size) for size in sorted(sizes))


def transform_spec(contract: Contract) -> TransformSpec:
    """Return the parameters of the transform in a contract."""
    terms = contract.transform
    buckets = tuple(Bucket(*size) for size in terms.buckets)
    limits = terms.min_side_px, terms.max_upscale, terms.max_pixels
    return TransformSpec(buckets, *limits, terms.dct_scaling)


def choose_bucket(width_px: int, height_px: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket with the nearest aspect ratio; ratios are compared as logarithms.

    Of equally near buckets, the one with the most pixels is chosen, then the widest one. The order
    of the buckets does not matter.
    """

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        # max(a, b) / min(a, b) has the same order as |log a - log b|, without a rounded logarithm.
        a, b = width_px * bucket.height_px, height_px * bucket.width_px
        return max(a, b) / min(a, b), -bucket.num_pixels, -bucket.width_px

    return min(buckets, key=distance)


def load_image(data: bytes, spec: TransformSpec, reserve: Reserve | None = None) -> Transformed:
    """Decode the bytes of an image, and resize and crop it to its bucket.

    Args:
        data: the whole file.
        spec: the parameters.
        reserve: see `decode_image`.

    Raises:
        Reject: stage `decode` (see `decode_image`) or `transform` (see `transform`).
    """

    def choose(width: int, height: int) -> int:
        if not spec.dct_scaling:
            return 1
        new_width, new_height = _covering_size(
            width, height, choose_bucket(width, height, spec.buckets)
        )
        headroom = min(width // new_width, height // new_height) // _DCT_HEADROOM
        return next(n for n in (8, 4, 2, 1) if n <= max(headroom, 1))

    image, size, denominator = decode_scaled(
        data, choose, max_pixels=spec.max_pixels, reserve=reserve
    )
    return _fit(image, *size, denominator, spec)


def transform(image: NDArray[np.uint8], spec: TransformSpec) -> Transformed:
    """Resize an image to cover its bucket, and crop the centre.

    The resize is antialiased bicubic at the smallest scale that covers the bucket. The side that
    does not fit exactly is rounded to the nearest pixel, half up, so it is never below the bucket.

    Args:
        image: uint8 [height, width, 3], writable.
        spec: the parameters.

    Raises:
        Reject: stage `transform`; `too_small`, `upscaled` or `aspect_ratio` (the resized image
            would hold more than `MAX_CROP_FACTOR` times the bucket's pixels).
    """
    return _fit(image, image.shape[1], image.shape[0], 1, spec)


def _fit(
    image: NDArray[np.uint8], width: int, height: int, denominator: int, spec: TransformSpec
) -> Transformed:
    """Resize and crop an image, whose width and height `denominator` has already divided."""

    def reject(reason: str, problem: str) -> Reject:
        return Reject("transform", reason, f"{width}x{height}{problem}")

    if spec.min_side_px is not None and min(width, height) < spec.min_side_px:
        raise reject("too_small", f": a side is below min_side_px {spec.min_side_px}")
    bucket = choose_bucket(width, height, spec.buckets)
    new_width, new_height = _covering_size(width, height, bucket)
    scale = max(bucket.width_px / width, bucket.height_px / height)
    if spec.max_upscale is not None and scale > spec.max_upscale:
        raise reject(
            "upscaled",
            f" to {bucket.name} enlarges {scale:.3g} times, max_upscale is {spec.max_upscale:g}",
        )
    if new_width * new_height > MAX_CROP_FACTOR * bucket.num_pixels:
        raise reject(
            "aspect_ratio",
            f" to {bucket.name} would crop away more than {MAX_CROP_FACTOR - 1}/{MAX_CROP_FACTOR} "
            "of the image",
        )
    top, left = (new_height - bucket.height_px) // 2, (new_width - bucket.width_px) // 2
    rows = Side(height, new_height, top, top + bucket.height_px)
    columns = Side(width, new_width, left, left + bucket.width_px)
    pixels = resize(image, rows, columns, denominator)
    return Transformed(torch.from_numpy(pixels).permute(2, 0, 1), bucket, width, height, top, left)


def _covering_size(width: int, height: int, bucket: Bucket) -> tuple[int, int]:
    if bucket.width_px * height >= bucket.height_px * width:
        return bucket.width_px, (2 * height * bucket.width_px + width) // (2 * width)
    return (2 * width * bucket.height_px + height) // (2 * height), bucket.height_px
