"""Pixels to picture files and back: what QA keeps, and what reports show."""

from __future__ import annotations

import math
import struct
import zlib
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from latentcache.errors import first_line

# What Pillow raises for a damaged file.
_DAMAGED = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

# No crop that a VAE encodes comes near; decoded, it takes 200 MB.
_MAX_PIXELS = 2**26

# Pictures kept for people who look at rejects.
_THUMBNAIL_PX = 128


def write_png(pixels: torch.Tensor) -> bytes:
    """Write uint8 [3, H, W] as PNG, at the compression that takes least time."""
    return _write(_to_image(pixels), "PNG", compress_level=1)


def open_png(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Open what `write_png` wrote.

    The bytes may be anybody's: no other format is tried, since Pillow has some that start programs,
    and nothing is decoded before the size is known.

    Args:
        data: the file.
        size: width and height that it must have, in pixels.

    Raises:
        ValueError: it is not an RGB image of this size as PNG.
    """
    try:
        image = PngImageFile(BytesIO(data))
        is_usable = image.size == size and math.prod(size) <= _MAX_PIXELS
        if not is_usable or image.mode != "RGB":
            width_px, height_px = image.size
            raise ValueError(
                f"a picture is {image.mode}, {width_px}x{height_px}, not RGB, {size[0]}x{size[1]}"
            )
        image.load()
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture is no PNG file, or damaged: {first_line(error)}") from error
    return image


def read_png(data: bytes, size: tuple[int, int]) -> torch.Tensor:
    """Read what `write_png` wrote: uint8 [3, H, W]; arguments and errors as of `open_png`."""
    with open_png(data, size) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def rewrite_thumbnail(data: bytes) -> bytes | None:
    """Decode what `write_thumbnail` wrote, and write it again; None if it is something else."""
    try:
        image = JpegImageFile(BytesIO(data))
        if max(image.size) > _THUMBNAIL_PX:
            return None
        return _write(image.convert("RGB"), "JPEG", quality=80)
    except _DAMAGED:
        return None


def write_thumbnail(pixels: torch.Tensor) -> bytes:
    """Write uint8 [3, H, W] as a JPEG of at most 128 px a side."""
    image = _to_image(pixels)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return _write(image, "JPEG", quality=80)


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _write(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
