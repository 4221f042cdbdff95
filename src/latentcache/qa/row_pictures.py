"""The pictures of a report, as `data:` URIs, which need no file beside them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from latentcache.dataset.bucket import Bucket
from latentcache.image_files import open_png
from latentcache.qa.qa_files import QaRow

# What a report shows of a larger picture; its QA file keeps the whole.
MAX_SIDE_PX = 512

# An error of this many of the 255 levels, and all above, has the last colour: in every report.
MAX_ERROR_LEVELS = 64

# A latent this many standard deviations from its channel's mean has the last colour.
MAX_SIGMAS = 3.0

# Equally spaced colours; between them, linear in sRGB.
ERROR_COLOURS = ("#08081c", "#54196f", "#bb3654", "#f58a3c", "#fdf3b4")
LATENT_COLOURS = ("#1f4e9c", "#8fb3dd", "#f6f4ef", "#e3a08b", "#a3262a")

_NUM_SHADES = 128

_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class RowPictures:
    """A QA row as `data:` URIs; `width_px` and `height_px` are of its bucket.

    `error` is a heat map of the mean absolute difference over RGB; `channels` has one picture for
    each channel of the latent, a pixel for each of its values.
    """

    width_px: int
    height_px: int
    original: str
    reconstruction: str
    error: str
    channels: tuple[str, ...]


def draw_row(row: QaRow, mean: Sequence[float], std: Sequence[float]) -> RowPictures:
    """Draw a QA row.

    Args:
        row: with its pictures.
        mean: of each channel over the whole dataset, which gets the middle colour.
        std: of each channel over the whole dataset, the unit of the colours.

    Raises:
        ValueError: a picture of the row cannot be decoded, or its parts do not fit each other.
    """
    width_px, height_px = Bucket.parse(row.bucket)
    original, reconstruction = (
        open_png(data, (width_px, height_px)) for data in (row.image, row.reconstruction)
    )
    difference = np.asarray(original, np.float32) - np.asarray(reconstruction, np.float32)
    error = np.abs(difference).mean(axis=2) / MAX_ERROR_LEVELS
    latent = np.frombuffer(row.latent, "<f4").reshape(row.latent_shape)
    channels = []
    for values, centre, unit in zip(latent, mean, std, strict=True):
        sigmas = np.nan_to_num((values - centre) / (unit or 1.0))
        channels.append(_png_uri(_colour(sigmas / (2 * MAX_SIGMAS) + 0.5, LATENT_COLOURS)))
    return RowPictures(
        width_px=original.width,
        height_px=original.height,
        original=_jpeg_uri(original),
        reconstruction=_jpeg_uri(reconstruction),
        error=_jpeg_uri(_colour(error, ERROR_COLOURS).convert("RGB")),
        channels=tuple(channels),
    )


def data_uri(data: bytes, kind: str) -> str:
    """Give an image file (`kind`: png or jpeg) as a URI that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _colour(values: npt.NDArray[np.floating[Any]], colours: Sequence[str]) -> Image.Image:
    """Colour values from 0 (the first colour) to 1 (the last), as a palette image."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours])
    at, shades = np.linspace(0, 1, len(stops)), np.linspace(0, 1, _NUM_SHADES)
    palette = np.stack([np.interp(shades, at, stops[:, i]) for i in range(3)], axis=1)
    indices = (values.clip(0, 1) * (_NUM_SHADES - 1)).round().astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return image


def _jpeg_uri(image: Image.Image) -> str:
    # A copy: thumbnail() works in place.
    small = image.copy()
    small.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    file = BytesIO()
    small.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return data_uri(file.getvalue(), "jpeg")


def _png_uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "png")
