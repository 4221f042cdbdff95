"""Write pixels as PNG and JPEG and read them back, for QA and reports."""

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
    *(ArithmeticError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, struct.error, zlib.error),
)

# The crops that a VAE encodes are much smaller. An image of this size takes 200 MB when decoded.
_MAX_PIXELS = 2**26

# The longest side of thumbnails, which help users inspect rejects.
_THUMBNAIL_PX = 128


def write_png(pixels: torch.Tensor) -> bytes:
    """Return pixels uint8 [3, H, W] as PNG, at the fastest compression level."""
    return _write(_to_image(pixels), "PNG", compress_level=1)


def open_png(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Open an image that `write_png` wrote, but do not trust the bytes.

    No other format is tried, because Pillow starts programs for some formats, and nothing is
    decoded before the size has been checked.

    Args:
        data, size: the file, and the expected (width, height) in pixels.

    Raises:
        ValueError: `data` is not an RGB image of this size as PNG.
    """
    try:
        image = PngImageFile(BytesIO(data))
        if image.size != size or math.prod(size) > _MAX_PIXELS or image.mode != "RGB":
            raise ValueError(
                f"an image is {image.mode}, {image.width}x{image.height}, not RGB, "
                f"{size[0]}x{size[1]}"
            )
        image.load()
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"an image is not PNG, or damaged: {first_line(error)}") from error
    return image


def read_png(data: bytes, size: tuple[int, int]) -> torch.Tensor:
    """Read an image of `write_png` as uint8 [3, H, W]. Args: see `open_png`, also for the error."""
    with open_png(data, size) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def rewrite_thumbnail(data: bytes) -> bytes | None:
    """Decode a result of `write_thumbnail` and encode it again; return None for other bytes."""
    try:
        image = JpegImageFile(BytesIO(data))
        if max(image.size) > _THUMBNAIL_PX:
            return None
        return _write(image.convert("RGB"), "JPEG", quality=80)
    except _DAMAGED:
        return None


def write_thumbnail(pixels: torch.Tensor) -> bytes:
    """Return pixels uint8 [3, H, W] as a JPEG with sides of at most 128 px."""
    image = _to_image(pixels)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return _write(image, "JPEG", quality=80)


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _write(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
