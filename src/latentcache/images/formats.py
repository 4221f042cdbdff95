"""The supported image formats: how to recognise and open each one, and how to detect a cut file.

Each format is opened with Pillow's class for it and never with `Image.open`, whose check for
decompression bombs warns and has its own limit.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from latentcache.errors import Reject
from latentcache.images import containers
from latentcache.images.jpeg import read_plain_size, strip_jpeg

_MAX_READS = 4_000_000

# TIFF tags: the sides of a tile, and the EXIF, GPS and interoperability directories.
_TIFF_TILE = (322, 323)
_TIFF_METADATA = (0x8769, 0x8825, 0xA005)
_MAX_TILE_PIXELS = 2**22
_MAX_TIFF_LAYERS = 6  # the maximum number of channels that Pillow reads

# A JPEG that cannot be opened with all of its metadata is opened with EXIF, XMP and the colour
# profile, and then without any.
_JPEG_METADATA = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0")

# Unsupported formats that samples may plausibly have, by their first bytes.
_NOT_READ = {b"\0\0\0\x0cjP  ": "JPEG 2000", b"%PDF": "PDF", b"8BPS": "PSD", b"qoif": "QOI"}


@dataclass(frozen=True, slots=True)
class Format:
    """One image format: its name, and what `open` does with Pillow: read the header or all.

    `read_size` returns width and height if they are needed before `open`. `open` allocates
    `open_bytes` per pixel, and loading at least `load_bytes`.
    """

    name: str
    open: Callable[[bytes], ImageFile.ImageFile]
    is_cut: Callable[[bytes], bool]
    read_size: Callable[[bytes], tuple[int, int] | None] = lambda data: None
    open_bytes: int = 0
    load_bytes: int = 10


def format_of(data: bytes) -> Format:
    """Return the format of a file, by its first bytes.

    Raises:
        Reject: stage `decode`; `empty`, `not_an_image` or `unsupported_format`.
    """
    if not data:
        raise Reject("decode", "empty", "the image field holds no bytes")
    for magic, image_format in _BY_MAGIC.items():
        if data.startswith(magic):
            return image_format
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _WEBP
    name = next((name for magic, name in _NOT_READ.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), 256)
        for brand in [data[8:12], *(data[i : i + 4] for i in range(16, end, 4))]:
            if brand in _BY_BRAND:
                return _BY_BRAND[brand]
        name = f"HEIF family ({data[8:12].decode('latin-1')!r})"
    if name is not None:
        known = "JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, JPEG XL and HEIC"
        raise Reject("decode", "unsupported_format", f"{name} is not read; {known} are")
    raise Reject("decode", "not_an_image", f"begins with {data[:12]!r}: no known image format")


def _open_jpeg(data: bytes) -> ImageFile.ImageFile:
    errors = []
    for keep in ((b"",), _JPEG_METADATA, ()):
        try:
            return JpegImagePlugin.JpegImageFile(io.BytesIO(strip_jpeg(data, keep)))
        except Exception as error:  # noqa: BLE001
            errors.append(error)
    raise errors[0]


def _open_png(data: bytes) -> ImageFile.ImageFile:
    stripped, profile = containers.strip_png(data)
    image = PngImagePlugin.PngImageFile(io.BytesIO(stripped))
    if profile:
        image.info["icc_profile"] = profile
    return image


def _open_avif(data: bytes) -> ImageFile.ImageFile:
    # One thread for each image, because the decode threads together use all cores.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    try:
        return AvifImagePlugin.AvifImageFile(io.BytesIO(data))
    except Exception:  # noqa: BLE001  (unreadable EXIF; any other damage raises again below)
        # The EXIF item gets an unknown type, which libavif ignores.
        size = int.from_bytes(data[:4], "big")
        meta = slice(size, size + int.from_bytes(data[size : size + 4], "big"))
        hidden = data[: meta.start] + data[meta].replace(b"Exif", b"none") + data[meta.stop :]
        return AvifImagePlugin.AvifImageFile(io.BytesIO(hidden))


class _BoundedReads(io.BytesIO):
    """A file with a limited number of reads, for Python parsers whose loops depend on the data."""

    _num_left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._num_left -= 1
        if self._num_left < 0:
            raise ValueError("it has an absurd number of blocks")
        return super().read(size)


def _open_tiff(data: bytes) -> ImageFile.ImageFile:
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    num_pixels = image.width * image.height
    # libtiff allocates a buffer for a whole tile, which may be larger than the image.
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TIFF_TILE)
    if width * height > max(4 * num_pixels, _MAX_TILE_PIXELS):
        raise ValueError(f"its tiles of {width}x{height} exceed the image by far")
    # Without compression, Pillow copies each listed strip, even if strips overlap. There are as
    # many layers as channels if the channels are stored separately.
    tiles = [tile.extents for tile in image.tile if tile.extents]
    if sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in tiles) > _MAX_TIFF_LAYERS * num_pixels:
        raise ValueError("its strips overlap")
    # Loading would read these directories, and fail if they are damaged.
    exif = image.getexif()
    for tag in _TIFF_METADATA:
        exif.pop(tag, None)
    return image


def _open_heic(data: bytes) -> ImageFile.ImageFile:
    module = _plugin("pillow_heif", "HEIC")
    module.options.DECODE_THREADS = 1
    image: ImageFile.ImageFile = module.HeifImageFile(io.BytesIO(data))
    return image


def _open_jxl(data: bytes) -> ImageFile.ImageFile:
    module = _plugin("pillow_jxl.JpegXLImagePlugin", "JPEG XL")
    module.DECODE_THREADS = 0
    image: ImageFile.ImageFile = module.JXLImageFile(io.BytesIO(data))
    if not image.jpeg:  # type: ignore[attr-defined]
        # libjxl has already applied the orientation, which EXIF repeats.
        image.info.pop("exif", None)
    return image


@cache
def _plugin(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        message = f"{name} needs a plugin that is not installed: pip install 'latentcache[images]'"
        raise Reject("decode", "unsupported_format", message) from error


def _is_short_iso(data: bytes) -> bool:
    """Return whether a top-level box extends beyond the end of the file."""
    return any(end > len(data) for _, _, end in containers.iso_boxes(data))


# Padding may follow the end mark of a JPEG, PNG or GIF.
JPEG = Format("JPEG", _open_jpeg, lambda data: b"\xff\xd9" not in data[-64:], read_plain_size)
_PNG = Format("PNG", _open_png, lambda data: b"IEND" not in data[-64:])
_WEBP = Format(
    "WEBP",
    lambda data: WebPImagePlugin.WebPImageFile(io.BytesIO(containers.strip_webp(data))),
    lambda data: len(data) < 8 + int.from_bytes(data[4:8], "little"),
    containers.read_webp_size,
    load_bytes=20,
)
_AVIF = Format("AVIF", _open_avif, _is_short_iso, load_bytes=20)
_HEIC = Format("HEIC", _open_heic, _is_short_iso, load_bytes=20)
_JXL = Format(
    "JPEG XL",
    _open_jxl,
    lambda data: data.startswith(containers.JXL_CONTAINER) and _is_short_iso(data),
    containers.read_jxl_size,
    open_bytes=16,
)
_GIF = Format(
    "GIF",
    lambda data: GifImagePlugin.GifImageFile(_BoundedReads(data)),
    lambda data: not data[-64:].rstrip(b"\0").endswith(b";"),
)
_BMP = Format(
    "BMP",
    lambda data: BmpImagePlugin.BmpImageFile(_BoundedReads(data)),
    lambda data: len(data) < max(54, int.from_bytes(data[2:6], "little")),
)
_TIFF = Format("TIFF", _open_tiff, lambda data: len(data) < 8, load_bytes=11)

_BY_MAGIC = {
    b"\xff\xd8": JPEG,
    b"\x89PNG": _PNG,
    b"GIF87a": _GIF,
    b"GIF89a": _GIF,
    b"BM": _BMP,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _TIFF),
    containers.JXL_CODESTREAM: _JXL,
    containers.JXL_CONTAINER: _JXL,
}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_BY_BRAND = {b"avif": _AVIF, b"avis": _AVIF, **dict.fromkeys(_HEIC_BRANDS, _HEIC)}
