"""JPEG pixels by libjpeg-turbo, wherever it has nothing to say against the file.

Pillow has the same library inside and gives the same pixels; simplejpeg spares its copies. Being
strict here, it refuses whatever libjpeg warns of. Pillow overlooks some of that, and is to judge.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_START_OF_SCAN = 0xDA
# Segments that change no pixel and say nothing of them: JFIF, what applications keep for
# themselves, comments; then tables and the sequential frame headers.
_PLAIN = {0xE0, *range(0xE3, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD, 0xC0, 0xC1}


def read_plain_size(data: bytes) -> tuple[int, int] | None:
    """Read width and height where these are all that matters of the header.

    None for a progressive file or CMYK, for one with EXIF, XMP or an ICC profile (their segments,
    APP1 and APP2, may hold other things as well), and for one with anything unusual.
    """
    position = 2
    try:
        while data[position] == 0xFF and data[position + 1] in _PLAIN:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position : position + 2] != bytes((0xFF, _START_OF_SCAN)):
            return None
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except (IndexError, ValueError):
        return None
    return (int(width), int(height)) if colorspace in ("YCbCr", "RGB", "Gray") else None


def decode_jpeg(
    data: bytes, size: tuple[int, int], colorspace: str, denominator: int
) -> NDArray[np.uint8] | None:
    """Decode to uint8 [ceil(height / denominator), ceil(width / denominator), channels].

    Args:
        data: the whole file.
        size: its width and height. If libjpeg sees another size, the file is damaged.
        colorspace: of the result, `RGB` or `GRAY`.
        denominator: 1, 2, 4 or 8.

    Returns:
        A new array; None where Pillow is to judge.
    """
    width, height = size
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data,
            colorspace,
            # It takes the smallest of libjpeg's fractions (eighths) that is no smaller than this.
            min_height=-(-height // denominator),
            min_width=-(-width // denominator),
        )
    except ValueError:
        return None
    return pixels
