"""Antialiased bicubic resizing of only the pixels that a crop needs, with torch's uint8 kernel.

The kernel is fast only for contiguous pixels [height, width, channel], and does not support crops.
This module calls its two passes separately, each for the outputs of the crop. The result is
bit-identical to resizing the whole image and cropping it. The module starts no threads, because the
caller's threads use the cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Side:
    """A side that is resized from `length` to `new_length` and cropped to [start, stop)."""

    length: int
    new_length: int
    start: int
    stop: int


def resize(
    image: NDArray[np.uint8], rows: Side, columns: Side, denominator: int = 1
) -> NDArray[np.uint8]:
    """Resize and crop, within 2 levels of Pillow's `BICUBIC` (Keys 1981, a = -0.5).

    Args:
        image: uint8 [height, width, 3], writable, with contiguous rows or contiguous columns.
        rows: the resize of the height.
        columns: the resize of the width.
        denominator: the factor by which `image` is already smaller than the lengths of its sides,
            rounded up.

    Returns:
        uint8 [rows.stop - rows.start, columns.stop - columns.start, 3], C-contiguous.
    """
    pixels = torch.from_numpy(image)
    height, width, _ = pixels.shape
    # Between the passes the pixels are clamped to 0..255, so the order of the passes matters.
    # Pillow 13 resizes the height first if that removes more than twice as many lines as the width.
    removed = height - rows.new_length
    is_height_first = removed > max(0, 2 * (width - columns.new_length))
    down, across = _Pass(rows, denominator), _Pass(columns, denominator)
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


class _Pass:
    """The parameters of the pass along one side.

    The kernel begins at an edge of the image, which is also the edge of its first output. It can
    also begin where the two grids coincide again, at whole pixels of both: at output `first`, which
    is at pixel `skip`. This does not affect the outputs [start, stop), and neither do the pixels
    from `end` on. `scale` is in outputs per pixel.
    """

    def __init__(self, side: Side, denominator: int) -> None:
        length, new_length = side.length, side.new_length * denominator
        # The radius of the filter in pixels and in outputs, with a margin.
        reach = math.ceil(2 * max(length / new_length, 1)) + 1
        margin = math.ceil(reach * new_length / length)
        period = new_length // math.gcd(length, new_length)
        self.start, self.stop = side.start, side.stop
        self.scale = new_length / length
        self.first = max(side.start - margin, 0) // period * period
        self.skip = self.first * length // new_length
        self.end = side.stop * length // new_length + 1 + reach


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
    # F.interpolate(…, mode="bicubic", antialias=True) calls this kernel too, but derives the scales
    # from the sizes.
    kernel = torch.ops.aten._upsample_bicubic2d_aa
    if out is None:
        resized: torch.Tensor = kernel(channels_last, size, False, *scales)
        return resized[0].permute(1, 2, 0)
    kernel.out(channels_last, size, False, *scales, out=out.unsqueeze(0).permute(0, 3, 1, 2))
    return out
