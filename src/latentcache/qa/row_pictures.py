"""The pictures of a report as `data:` URIs, so that the report is one file."""

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

# A report scales larger pictures down to this side; the QA file keeps the full size.
MAX_SIDE_PX = 512

# Errors of this many of the 255 levels or more have the last colour. The scale is the same in
# every report.
MAX_ERROR_LEVELS = 64

# Latents this many standard deviations or more from the mean of their channel have the first or
# the last colour.
MAX_SIGMAS = 3.0

# Equally spaced colours, interpolated linearly in sRGB.
ERROR_COLOURS = ("#08081c", "#54196f", "#bb3654", "#f58a3c", "#fdf3b4")
LATENT_COLOURS = ("#1f4e9c", "#8fb3dd", "#f6f4ef", "#e3a08b", "#a3262a")

_NUM_SHADES = 128

_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class RowPictures:
    """The pictures of a QA row as `data:` URIs; `width_px` and `height_px` are its bucket's size.

    `error` is a heat map of the mean absolute difference over RGB. `channels` has one picture for
    each channel of the latent, with one pixel for each value.
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
        row: the row with its pictures.
        mean: each channel's mean over the dataset; it gets the middle colour.
        std: each channel's standard deviation over the dataset; it scales the colours.

    Raises:
        ValueError: a picture of the row cannot be decoded, or the shapes do not match.
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
    """Return an image file as a `data:` URI.

    Args:
        data: the file's content.
        kind: `png` or `jpeg`.
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _colour(values: npt.NDArray[np.floating[Any]], colours: Sequence[str]) -> Image.Image:
    """Return values as a palette image: 0 has the first colour, 1 has the last."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours])
    positions, shades = np.linspace(0, 1, len(stops)), np.linspace(0, 1, _NUM_SHADES)
    palette = np.stack([np.interp(shades, positions, stops[:, i]) for i in range(3)], axis=1)
    indices = (values.clip(0, 1) * (_NUM_SHADES - 1)).round().astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return image


def _jpeg_uri(image: Image.Image) -> str:
    # Copied, because thumbnail() works in place.
    small = image.copy()
    small.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    file = BytesIO()
    small.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return data_uri(file.getvalue(), "jpeg")


def _png_uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "png")
