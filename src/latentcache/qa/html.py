"""Render a report as one HTML file: `templates/report.html` with Jinja, and embedded pictures.

Jinja escapes every value. The page's content security policy allows neither scripts nor requests.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from latentcache.dataset.bucket import Bucket
from latentcache.image_files import open_png
from latentcache.log import size_text
from latentcache.qa.qa_files import QaRow

# A report scales larger pictures down to this side; the QA file keeps the full size.
_MAX_SIDE_PX = 512

# Values beyond these limits have the first or last colour. The scales are the same in every report:
# errors in levels of 255, and latents in standard deviations from the mean of their channel.
_MAX_ERROR_LEVELS = 64
_MAX_SIGMAS = 3.0

# Equally spaced colours, interpolated linearly in sRGB.
_ERROR_COLOURS = ("#08081c", "#54196f", "#bb3654", "#f58a3c", "#fdf3b4")
_LATENT_COLOURS = ("#1f4e9c", "#8fb3dd", "#f6f4ef", "#e3a08b", "#a3262a")
_NUM_SHADES = 128


@dataclass(frozen=True, slots=True)
class RowPictures:
    """The pictures of a QA row as `data:` URIs, and its bucket's size."""

    width_px: int
    height_px: int
    original: str
    reconstruction: str
    error: str  # a heat map of the mean absolute difference over RGB
    channels: list[str]  # of the latent, with one pixel for each value


def draw_row(row: QaRow, mean: Sequence[float], std: Sequence[float]) -> RowPictures:
    """Draw a QA row.

    Args:
        row: a picture that is damaged or has another shape raises `ValueError`.
        mean, std: of each channel over the dataset; the mean gets the middle colour.
    """
    size = Bucket.parse(row.bucket)
    original, reconstruction = (open_png(data, size) for data in (row.image, row.reconstruction))
    difference = np.asarray(original, np.float32) - np.asarray(reconstruction, np.float32)
    error = np.abs(difference).mean(axis=2) / _MAX_ERROR_LEVELS
    latent = np.frombuffer(row.latent, "<f4").reshape(row.latent_shape)
    channels = []
    for values, centre, unit in zip(latent, mean, std, strict=True):
        sigmas = np.nan_to_num((values - centre) / (unit or 1.0))
        picture = _colour(sigmas / (2 * _MAX_SIGMAS) + 0.5, _LATENT_COLOURS)
        channels.append(_encode(picture, "png"))
    return RowPictures(
        *size,
        original=_scale_and_encode(original),
        reconstruction=_scale_and_encode(reconstruction),
        error=_scale_and_encode(_colour(error, _ERROR_COLOURS).convert("RGB")),
        channels=channels,
    )


def _colour(values: npt.NDArray[np.floating[Any]], colours: Sequence[str]) -> Image.Image:
    """Return values as a palette image: 0 has the first colour, 1 has the last."""
    stops = np.array([ImageColor.getrgb(colour) for colour in colours])
    positions, shades = np.linspace(0, 1, len(stops)), np.linspace(0, 1, _NUM_SHADES)
    palette = np.stack([np.interp(shades, positions, stop) for stop in stops.T], axis=1)
    image = Image.fromarray((values.clip(0, 1) * (_NUM_SHADES - 1)).round().astype(np.uint8))
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return image


def _scale_and_encode(image: Image.Image) -> str:
    image.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX))
    return _encode(image, "jpeg", quality=90)


def _encode(image: Image.Image, kind: str, **options: int) -> str:
    file = BytesIO()
    image.save(file, kind, optimize=True, **options)
    return _data_uri(file.getvalue(), kind)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def render(
    tree: dict[str, Any], pictures: dict[str, RowPictures], thumbnails: dict[str, bytes]
) -> str:
    """Return a report as HTML.

    Args:
        tree, pictures, thumbnails: as in `Report`.
    """
    contract = dict(_leaves(tree["contract"]))
    sizes = tree["contract"]["transform"]["buckets"]
    contract["transform.buckets"] = ", ".join(f"{width}x{height}" for width, height in sizes)
    page = _template().render(
        report=tree,
        pictures=pictures,
        thumbnails={name: _data_uri(data, "jpeg") for name, data in thumbnails.items()},
        contract=contract,
        provenance=dict(_leaves(tree["provenance"])),
        text=json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False),
        error_colours=", ".join(_ERROR_COLOURS),
        latent_colours=", ".join(_LATENT_COLOURS),
        max_error_levels=_MAX_ERROR_LEVELS,
        max_sigmas=_MAX_SIGMAS,
    )
    return page.lstrip()  # the template begins with its macros


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("latentcache.qa"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, "percent": "{:.2%}".format}
    environment.filters |= {"bytes": size_text, "fixed": _fixed}
    return environment.get_template("report.html")


def _fixed(value: float | None, digits: int = 2) -> str:
    return "—" if value is None else f"{value:,.{digits}f}"


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of each field of a JSON object."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)
