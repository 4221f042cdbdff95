"""Pixels to picture files and back: what QA keeps, and what reports show."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image

# Pictures kept for people who look at rejects.
_THUMBNAIL_PX = 128


def write_png(pixels: torch.Tensor) -> bytes:
    """Write uint8 [3, H, W] as PNG, at the compression that takes least time."""
    return _write(_to_image(pixels), "PNG", compress_level=1)


def read_png(data: bytes) -> torch.Tensor:
    """Read what `write_png` wrote: uint8 [3, H, W]."""
    with Image.open(BytesIO(data)) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


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
