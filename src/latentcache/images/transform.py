"""Pixels of any size to pixels of one of a few sizes: choose a bucket, resize, crop.

The rules here decide which pixels a latent stands for. They are part of the dataset's contract, so
a change to any of them makes every existing cache stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from latentcache.dataset.contract import Contract
from latentcache.errors import ConfigError, Reject

# A picture whose resized form holds more than this many times its bucket's pixels is rejected: the
# crop would throw nearly all of it away, and a strip of 1 × 60,000 would need gigabytes on the way.
MAX_CROP_FACTOR = 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """One image size that samples are brought to; all latents of a bucket have one shape."""

    width_px: int
    height_px: int

    @property
    def name(self) -> str:
        """`WIDTHxHEIGHT`, as in file names."""
        return f"{self.width_px}x{self.height_px}"


@dataclass(frozen=True, slots=True)
class TransformSpec:
    """What becomes of an image.

    Args:
        buckets: the sizes to choose from, at least one.
        min_side_px: reject images with a shorter side; None accepts all.
        max_upscale: reject images that would be enlarged by more than this; None accepts all.
        max_pixels: reject images of more pixels (`decode_image` does, before it decodes).
    """

    buckets: tuple[Bucket, ...]
    min_side_px: int | None
    max_upscale: float | None
    max_pixels: int


@dataclass(frozen=True, slots=True)
class Transformed:
    """An image brought to its bucket.

    `pixels` is uint8 [3, height_px, width_px], RGB. The offsets say where the crop begins, in
    pixels of the resized image, and the sizes are those of the image as it came (after its EXIF
    orientation): what SDXL's micro-conditioning asks for (Podell et al. 2023, section 2.2).
    """

    pixels: torch.Tensor
    bucket: Bucket
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int


def ratio_buckets(resolution_px: int, max_ratio: float, step_px: int) -> tuple[Bucket, ...]:
    """List sizes of about `resolution_px` squared pixels, by width.

    For every long side that is a multiple of `step_px`, from `resolution_px` upwards, the short
    side is the multiple of `step_px` nearest to `resolution_px**2 / long`. Sizes stay while long
    over short is at most `max_ratio`, and each stands in both orientations.

    Raises:
        ConfigError: `resolution_px` is no multiple of `step_px`, so there would be no square.
    """
    if resolution_px % step_px:
        raise ConfigError(
            f"transform.resolution_px {resolution_px} is no multiple of "
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
    """Read the transform off a contract."""
    terms = contract.transform
    return TransformSpec(
        buckets=tuple(Bucket(width, height) for width, height in terms.buckets),
        min_side_px=terms.min_side_px,
        max_upscale=terms.max_upscale,
        max_pixels=terms.max_pixels,
    )


def choose_bucket(width_px: int, height_px: int, buckets: Sequence[Bucket]) -> Bucket:
    """Find the bucket whose aspect ratio is nearest, compared as logarithms.

    Of equally near ones it takes the one of most pixels, and then the widest; the order in which
    the buckets are given does not matter.
    """

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        # |log a - log b| is ordered as max(a, b) / min(a, b), which needs no rounding logarithm.
        a, b = width_px * bucket.height_px, height_px * bucket.width_px
        return max(a, b) / min(a, b), -bucket.width_px * bucket.height_px, -bucket.width_px

    return min(buckets, key=distance)


def transform(image: NDArray[np.uint8], spec: TransformSpec) -> Transformed:
    """Bring an image to its bucket: resize it to cover the bucket, then crop the centre.

    The resize is antialiased bicubic at the smallest scale that covers the bucket; the side that
    does not fit exactly is rounded to the nearest pixel, half up, hence never below the bucket.

    Args:
        image: uint8 [height, width, 3], writable.
        spec: the buckets and what to reject.

    Raises:
        Reject: stage `transform`; `too_small`, `upscaled` or `aspect_ratio` (the resized image
            would hold more than `MAX_CROP_FACTOR` times the bucket's pixels).
    """
    height, width = image.shape[:2]
    if spec.min_side_px is not None and min(width, height) < spec.min_side_px:
        raise _reject(
            "too_small", f"{width}x{height}: a side is below min_side_px {spec.min_side_px}"
        )
    bucket = choose_bucket(width, height, spec.buckets)
    new_width, new_height = _covering_size(width, height, bucket)
    scale = max(bucket.width_px / width, bucket.height_px / height)
    if spec.max_upscale is not None and scale > spec.max_upscale:
        raise _reject(
            "upscaled",
            f"{width}x{height} to {bucket.name} enlarges {scale:.3g} times, "
            f"max_upscale is {spec.max_upscale:g}",
        )
    if new_width * new_height > MAX_CROP_FACTOR * bucket.width_px * bucket.height_px:
        raise _reject(
            "aspect_ratio",
            f"{width}x{height} to {bucket.name} would crop away more than "
            f"{MAX_CROP_FACTOR - 1}/{MAX_CROP_FACTOR} of the image",
        )
    resized = _resize(image, new_width, new_height)
    top, left = (new_height - bucket.height_px) // 2, (new_width - bucket.width_px) // 2
    crop = resized[:, top : top + bucket.height_px, left : left + bucket.width_px]
    return Transformed(
        pixels=crop.contiguous(),
        bucket=bucket,
        original_width=width,
        original_height=height,
        crop_top=top,
        crop_left=left,
    )


def _reject(reason: str, message: str) -> Reject:
    return Reject("transform", reason, message)


def _covering_size(width: int, height: int, bucket: Bucket) -> tuple[int, int]:
    if bucket.width_px * height >= bucket.height_px * width:
        return bucket.width_px, (2 * height * bucket.width_px + width) // (2 * width)
    return (2 * width * bucket.height_px + height) // (2 * height), bucket.height_px


def _resize(image: NDArray[np.uint8], new_width: int, new_height: int) -> torch.Tensor:
    """Resize to uint8 [3, new_height, new_width], within 2 levels of Pillow's `BICUBIC`."""
    height, width = image.shape[:2]
    pixels = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    # Between the two passes the pixels are clamped to 0..255, so their order shows. torch takes
    # rows first; Pillow 13 takes columns first where that sheds more than twice as many lines.
    if new_height < height and height - new_height > 2 * (width - new_width):
        pixels = _bicubic(pixels, new_height, width)
    return _bicubic(pixels, new_height, new_width)[0]


def _bicubic(pixels: torch.Tensor, new_height: int, new_width: int) -> torch.Tensor:
    return F.interpolate(pixels, size=(new_height, new_width), mode="bicubic", antialias=True)
