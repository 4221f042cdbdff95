"""Antialiased bicubic resizing of no more than a crop needs, by torch's kernel for uint8.

The kernel is fast only for pixels that lie [height, width, channel] without gaps, and knows nothing
of crops. Here are its two passes, each told which outputs are wanted; the result is to the bit the
whole image resized, then cropped. Nothing here starts threads: the caller's own use the cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Side:
    """A side that is resized from `length` to `new_length`; [start, stop) of it is wanted."""

    length: int
    new_length: int
    start: int
    stop: int


def resize(
    image: NDArray[np.uint8], rows: Side, columns: Side, denominator: int = 1
) -> NDArray[np.uint8]:
    """Resize and crop, within 2 levels of Pillow's `BICUBIC` (Keys 1981, a = -0.5).

    Args:
        image: uint8 [height, width, 3], writable; its rows or its columns without gaps.
        rows: what becomes of the height.
        columns: what becomes of the width.
        denominator: by which the image is smaller already than its sides say, rounded up.

    Returns:
        uint8 [rows.stop - rows.start, columns.stop - columns.start, 3], C-contiguous.
    """
    pixels = torch.from_numpy(image)
    height, width, _ = pixels.shape
    # Between the passes the pixels are clamped to 0..255, so their order shows. Pillow 13 resizes
    # the height first where that sheds more than twice as many lines as the width would.
    shed = height - rows.new_length
    is_height_first = shed > max(0, 2 * (width - columns.new_length))
    down, across = (_Pass.of(side, denominator) for side in (rows, columns))
    is_transposed = pixels.stride(0) < pixels.stride(1)
    if is_transposed:  # then "down" shall still be what strides from row to row in memory
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
    return pixels.numpy().copy()  # not a view, which would keep the whole image


@dataclass(frozen=True, slots=True)
class _Pass:
    """What to compute along one side.

    The kernel begins on an edge of the image, which is also the edge of its first output. Where the
    two grids meet again, at whole pixels of both, it can begin as well: at output `first`, which is
    at pixel `skip`. Outputs [start, stop) see nothing of that, nor of pixels from `end` on.
    """

    scale: float  # outputs to a pixel
    skip: int
    end: int
    first: int
    start: int
    stop: int

    @classmethod
    def of(cls, side: Side, denominator: int) -> _Pass:
        length, new_length = side.length, side.new_length * denominator
        # How far the filter sees to one side, in pixels and in outputs, with room to spare.
        reach = math.ceil(2 * max(length / new_length, 1)) + 1
        margin = math.ceil(reach * new_length / length)
        period = new_length // math.gcd(length, new_length)
        first = max(side.start - margin, 0) // period * period
        return cls(
            scale=new_length / length,
            skip=first * length // new_length,
            end=side.stop * length // new_length + 1 + reach,
            first=first,
            start=side.start,
            stop=side.stop,
        )


def _resize_down(pixels: torch.Tensor, down: _Pass) -> torch.Tensor:
    """Resize along the first side, of which `skip` pixels are gone already."""
    height, width, _ = pixels.shape
    if down.scale == 1:
        return pixels
    num = _ask_for(down.stop - down.first, height)
    return _bicubic(pixels, (num, width), (down.scale, None))


def _resize_across(pixels: torch.Tensor, across: _Pass) -> torch.Tensor:
    """Resize along the second side, and leave out what comes before output `first`."""
    height, width, _ = pixels.shape
    if across.scale == 1:
        return pixels[:, across.skip :]
    first, scales = across.first, (None, across.scale)
    if first == 0:
        return _bicubic(pixels, (height, _ask_for(across.stop, width)), scales)
    # A slice of columns would have gaps, which are slow. But from `skip` on, a row may as well run
    # on into the next one, for that is beyond what the wanted outputs see. Only the last has none.
    num = _ask_for(across.stop - first, width)
    found = torch.empty(height, num, 3, dtype=torch.uint8)
    if height > 1:
        offset = pixels.storage_offset() + 3 * across.skip
        shifted = pixels.as_strided((height - 1, width, 3), pixels.stride(), offset)
        _bicubic(shifted, (height - 1, num), scales, out=found[:-1])
    last = _bicubic(pixels[-1:], (1, _ask_for(across.stop, width)), scales)
    found[-1, : across.stop - first] = last[0, first : across.stop]
    return found


def _ask_for(num: int, length: int) -> int:
    """One output more than wanted where the kernel would think that there is nothing to resize."""
    return num + (num == length)


def _bicubic(
    pixels: torch.Tensor,
    size: tuple[int, int],
    scales: tuple[float | None, float | None],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel on [height, width, 3]: the first `size` outputs at the given scales."""
    channels_last = pixels.unsqueeze(0).permute(0, 3, 1, 2)
    # What F.interpolate(…, mode="bicubic", antialias=True) calls; it would derive the scales from
    # the sizes.
    kernel = torch.ops.aten._upsample_bicubic2d_aa
    if out is None:
        found: torch.Tensor = kernel(channels_last, size, False, *scales)
        return found[0].permute(1, 2, 0)
    kernel.out(channels_last, size, False, *scales, out=out.unsqueeze(0).permute(0, 3, 1, 2))
    return out
