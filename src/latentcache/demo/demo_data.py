"""WebDataset shards for demos and tests: synthetic pictures in many image formats."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import ExifTags, Image

from latentcache.demo.draw import draw_image

Fields = dict[str, bytes]

# The range of the square root of the pixel count, and the longest side over the shortest.
_MEAN_SIDE_PX = (240, 360)
_MAX_RATIO = 2.0

# The formats of the pictures of a shard, in turn: mostly the common ones, and one of each rare one.
_FORMS = (
    *("jpeg", "jpeg", "rotated", "webp", "jpeg", "gray"),
    *("jpeg", "png", "cmyk", "alpha", "palette", "gray16"),
)

# The faults of the last sample of each shard, in turn, named by their reject reason. `too_small` is
# rejected only if `min_side_px` or `max_upscale` is set.
_FAULTS = ("truncated_image", "no_image", "duplicate_key", "not_an_image", "too_small")


@dataclass(frozen=True, slots=True)
class DemoData:
    """The counts of the written shards; `num_by_reason` counts broken samples by reject reason."""

    num_shards: int
    num_samples: int
    num_broken: int
    num_by_reason: dict[str, int]


def write_demo_data(
    folder: Path,
    *,
    num_shards: int = 8,
    samples_per_shard: int = 24,
    seed: int = 0,
    broken: bool = True,
) -> DemoData:
    """Write shards `demo-000000.tar`, … of pictures with captions (`txt`) and metadata (`json`).

    Sizes and aspect ratios vary. The images are JPEG, PNG and WebP. Some are rotated by EXIF, gray,
    CMYK, 16-bit, or have a palette or transparency. A shard depends only on seed and number.

    Args:
        folder, num_shards, samples_per_shard, seed: where, how much and from which seed to draw.
        broken: whether the last sample of each shard, unless it is the only one, has a fault.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faults = [_FAULTS[i % len(_FAULTS)] for i in range(num_shards)]
    if not broken or samples_per_shard < 2:
        faults = []
    for shard in range(num_shards):
        rng = np.random.default_rng([seed, shard])
        with (
            (folder / f"demo-{shard:06d}.tar").open("wb") as file,
            webdataset.TarWriter(file, encoder=False, mtime=0.0) as tar,
        ):
            for number in range(samples_per_shard):
                key = f"{shard:06d}-{number:05d}"
                fields = _draw_sample(rng, _FORMS[number % len(_FORMS)])
                if faults and number == samples_per_shard - 1:
                    if faults[shard] == "duplicate_key":
                        key = f"{shard:06d}-{0:05d}"
                    else:
                        fields = _break(rng, fields, faults[shard])
                tar.write({"__key__": key, **fields})
    num_samples = num_shards * samples_per_shard
    return DemoData(num_shards, num_samples, len(faults), dict(Counter(faults)))


def _draw_sample(rng: np.random.Generator, form: str) -> Fields:
    side_px = rng.uniform(*_MEAN_SIDE_PX)
    root_ratio = _MAX_RATIO ** rng.uniform(-0.5, 0.5)
    width_px, height_px = round(side_px * root_ratio), round(side_px / root_ratio)
    pixels, caption = draw_image(rng, width_px, height_px)
    name, data = _encode(pixels, form)
    about = {"width": width_px, "height": height_px, "form": form}
    return {name: data, "txt": caption.encode(), "json": json.dumps(about).encode()}


def _encode(pixels: NDArray[np.uint8], form: str) -> tuple[str, bytes]:
    """Return a field name and the image's bytes."""
    image, kind = Image.fromarray(pixels), "PNG"
    options: dict[str, Any] = {}
    match form:
        case "png":
            pass
        case "webp":
            kind, options = "WEBP", {"quality": 90, "method": 2}
        case "palette":
            image = image.quantize(256)
        case "alpha":
            # Opaque except for one corner, which fades out.
            ramp = np.add.outer(*(np.linspace(0, 4, side) for side in pixels.shape[:2]))
            image.putalpha(Image.fromarray((255 * ramp.clip(0, 1)).astype(np.uint8)))
        case "gray16":
            image = Image.fromarray((pixels.mean(axis=2) * 257).astype(np.uint16))
        case "rotated":
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6  # the camera lay on its side
            image = image.transpose(Image.Transpose.ROTATE_90)
            kind, options = "JPEG", {"quality": 90, "exif": exif}
        case _:
            image = image.convert({"gray": "L", "cmyk": "CMYK"}.get(form, "RGB"))
            kind, options = "JPEG", {"quality": 90}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return "jpg" if kind == "JPEG" else kind.lower(), buffer.getvalue()


def _break(rng: np.random.Generator, fields: Fields, fault: str) -> Fields:
    pixels, _ = draw_image(rng, 300, 200)
    jpeg = _encode(pixels, "jpeg")[1]
    images = {
        "truncated_image": jpeg[: len(jpeg) // 2],
        "not_an_image": b"This is a text that was saved as .jpg.\n",
        "too_small": _encode(pixels[:9, :12], "jpeg")[1],
    }
    texts = {name: fields[name] for name in ("txt", "json")}
    return texts | ({"jpg": images[fault]} if fault in images else {})
