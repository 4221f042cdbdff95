"""Fit images to buckets: choose a bucket, resize, crop.

These rules are part of the dataset's contract: a change to any of them makes every cache stale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.errors import ConfigError, Reject
from latentcache.images.decode import Reserve, decode_scaled

# The maximum pixels of a resized image, relative to its bucket. Above it the crop would drop nearly
# all of the image, and a strip of 1 × 60,000 would need gigabytes of memory.
MAX_CROP_FACTOR = 16

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if that is at least this many times the size
# that it is resized to. After the resize, the decoder's box-like scaling then differs from the full
# decode by 48 dB. At the target size itself it would be 30 dB.
_DCT_HEADROOM = 2


@dataclass(frozen=True, slots=True)
class TransformSpec:
    """The parameters of the transform; see `config.Transform`. Limits of None accept all images."""

    buckets: tuple[Bucket, ...]
    min_side_px: int | None
    max_upscale: float | None
    max_pixels: int
    dct_scaling: bool = False


@dataclass(frozen=True, slots=True)
class Transformed:
    """An image resized and cropped to its bucket; `pixels` is uint8 [3, H, W], RGB, channels-last.

    SDXL's micro-conditioning needs the upright size of the original and the crop's start in the
    resized image (Podell et al. 2023).
    """

    pixels: torch.Tensor
    bucket: Bucket
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int


def ratio_buckets(resolution_px: int, max_ratio: float, step_px: int) -> tuple[Bucket, ...]:
    """Return sizes of about `resolution_px**2` pixels, in both orientations, sorted by width.

    For every long side that is a multiple of `step_px`, from `resolution_px` upwards, the short
    side is the multiple of `step_px` nearest to `resolution_px**2 / long`.

    Args:
        resolution_px, step_px: the side of the square size, a multiple of the divisor of all sides.
        max_ratio: the maximum of long over short.
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
    """Return the bucket with the nearest logarithmic ratio; of equal ones the largest, then widest.

    Args:
        width_px, height_px, buckets: the size of the image, and the buckets in any order.
    """

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        # max(a, b) / min(a, b) has the same order as |log a - log b|, without a rounded logarithm.
        a, b = width_px * bucket.height_px, height_px * bucket.width_px
        return max(a, b) / min(a, b), -bucket.num_pixels, -bucket.width_px

    return min(buckets, key=distance)


def load_image(data: bytes, spec: TransformSpec, reserve: Reserve | None = None) -> Transformed:
    """Decode an image, and resize and crop it. Args: see `decode_image`, `transform`."""

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

    The resize is antialiased bicubic at the smallest scale that covers the bucket. The other side
    is rounded to the nearest pixel, half up, so it is never below the bucket.

    Args:
        image, spec: uint8 [height, width, 3], writable, and the parameters.

    Raises:
        Reject: stage `transform`; `too_small`, `upscaled` or `aspect_ratio` (the resized image
            would hold more than `MAX_CROP_FACTOR` times the bucket's pixels).
    """
    return _fit(image, image.shape[1], image.shape[0], 1, spec)


def _fit(
    image: NDArray[np.uint8], width: int, height: int, denominator: int, spec: TransformSpec
) -> Transformed:
    """Resize and crop an image that was decoded at 1 / `denominator` of its width and height."""

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
    rows = _Pass(height, new_height, bucket.height_px, denominator)
    columns = _Pass(width, new_width, bucket.width_px, denominator)
    pixels = torch.from_numpy(_resize(image, rows, columns)).permute(2, 0, 1)
    return Transformed(pixels, bucket, width, height, rows.start, columns.start)


def _covering_size(width: int, height: int, bucket: Bucket) -> tuple[int, int]:
    if bucket.width_px * height >= bucket.height_px * width:
        return bucket.width_px, (2 * height * bucket.width_px + width) // (2 * width)
    return (2 * width * bucket.height_px + height) // (2 * height), bucket.height_px


class _Pass:
    """The resize of one side from `length` to `new_length`, and its crop to `num` pixels.

    The kernel can begin where the grids of pixels and outputs coincide, at whole pixels of both: at
    output `first`, which is at pixel `skip`. This does not affect the outputs [start, stop), and
    neither do the pixels from `end` on. `scale` is in outputs per pixel.
    """

    def __init__(self, length: int, new_length: int, num: int, denominator: int) -> None:
        self.num_removed = -(-length // denominator) - new_length
        self.start = (new_length - num) // 2
        self.stop = self.start + num
        new_length *= denominator
        # The radius of the filter in pixels and in outputs, with a margin.
        reach = math.ceil(2 * max(length / new_length, 1)) + 1
        margin = math.ceil(reach * new_length / length)
        period = new_length // math.gcd(length, new_length)
        self.scale = new_length / length
        self.first = max(self.start - margin, 0) // period * period
        self.skip = self.first * length // new_length
        self.end = self.stop * length // new_length + 1 + reach


def _resize(image: NDArray[np.uint8], rows: _Pass, columns: _Pass) -> NDArray[np.uint8]:
    """Resize and crop uint8 [height, width, 3], within 2 levels of Pillow's `BICUBIC`.

    The two passes of torch's uint8 kernel (Keys 1981, a = -0.5) are called separately, each for the
    outputs of the crop alone. The result is bit-identical to cropping the whole resized image.
    """
    pixels, down, across = torch.from_numpy(image), rows, columns
    # Between the passes the pixels are clamped to 0..255, so the order of the passes matters.
    # Pillow 13 resizes the height first if that removes more than twice as many lines as the width.
    is_height_first = rows.num_removed > max(0, 2 * columns.num_removed)
    is_transposed = pixels.stride(0) < pixels.stride(1)
    if is_transposed:  # "down" must be the side with the larger stride in memory
        pixels, down, across = pixels.transpose(0, 1), across, down
        is_height_first = not is_height_first
    pixels = pixels[down.skip : down.end]
    if is_height_first:
        pixels = _resize_across(_resize_down(pixels, down), across)
    else:
        pixels = _resize_down(_resize_across(pixels, across), down)
    pixels = pixels[down.start - down.first : down.stop - down.first]
    pixels = pixels[:, across.start - across.first : across.stop - across.first]
    if is_transposed:
        pixels = pixels.transpose(0, 1)
    return pixels.numpy().copy()  # a view would keep the whole image in memory


def _resize_down(pixels: torch.Tensor, down: _Pass) -> torch.Tensor:
    """Resize along the first side, from which `skip` pixels are already removed."""
    height, width, _ = pixels.shape
    if down.scale == 1:
        return pixels
    num = _num_outputs(down.stop - down.first, height)
    return _bicubic(pixels, (num, width), (down.scale, None))


def _resize_across(pixels: torch.Tensor, across: _Pass) -> torch.Tensor:
    """Resize along the second side, without the outputs before `first`."""
    height, width, _ = pixels.shape
    if across.scale == 1:
        return pixels[:, across.skip :]
    first, scales = across.first, (None, across.scale)
    if first == 0:
        return _bicubic(pixels, (height, _num_outputs(across.stop, width)), scales)
    # A slice of columns would not be contiguous, which is slow. Instead each row begins at `skip`
    # and continues into the next row, whose pixels do not affect the outputs of the crop. The last
    # row has no next row, so it is resized separately.
    num = _num_outputs(across.stop - first, width)
    resized = torch.empty(height, num, 3, dtype=torch.uint8)
    if height > 1:
        offset = pixels.storage_offset() + 3 * across.skip
        shifted = pixels.as_strided((height - 1, width, 3), pixels.stride(), offset)
        _bicubic(shifted, (height - 1, num), scales, out=resized[:-1])
    last = _bicubic(pixels[-1:], (1, _num_outputs(across.stop, width)), scales)
    resized[-1, : across.stop - first] = last[0, first : across.stop]
    return resized


def _num_outputs(num: int, length: int) -> int:
    """Return `num`, or one more if the kernel would otherwise see equal sizes and not resize."""
    return num + (num == length)


def _bicubic(
    pixels: torch.Tensor,
    size: tuple[int, int],
    scales: tuple[float | None, float | None],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel on [height, width, 3] for the first `size` outputs at the given scales."""
    channels_last = pixels.unsqueeze(0).permute(0, 3, 1, 2)
    # F.interpolate also calls this kernel, but derives the scales from the sizes.
    kernel = torch.ops.aten._upsample_bicubic2d_aa
    if out is None:
        resized: torch.Tensor = kernel(channels_last, size, False, *scales)
        return resized[0].permute(1, 2, 0)
    kernel.out(channels_last, size, False, *scales, out=out.unsqueeze(0).permute(0, 3, 1, 2))
    return out
