"""Image bytes to RGB pixels: what a person would see in a viewer, or a reason why not.

Thread-safe. Pillow releases the GIL while it decodes, so threads are enough to use all cores.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from latentcache.errors import Reject

# Pillow warns of oddities in metadata that do not touch the pixels. `catch_warnings` is not
# thread-safe, so the filter is set once, for Pillow's modules alone.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Formats that a sample may plausibly hold but that are not read, by their first bytes.
_UNSUPPORTED = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"%PDF": "PDF",
}

# What Pillow's parsers raise on damaged bytes, found by flipping and cutting them.
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

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Bytes a pixel at the peak of decoding, as measured: the picture in Pillow's own four, its bytes
# gathered twice, and the array. Another mode is converted on the way, and transparency laid out.
_PEAK_BYTES = 10
_PEAK_BYTES_CONVERTED = 18


def decode_image(
    data: bytes, *, max_pixels: int, reserve: Callable[[int], object] | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP to sRGB; the content decides, not the name.

    The EXIF orientation is applied. An embedded ICC profile is converted to sRGB; a profile that
    cannot be used is ignored, and so is unreadable EXIF, as viewers do. CMYK without a profile is
    converted by complement. Transparency is laid over white. 16-bit gray is scaled by 1/257; of
    16-bit colour Pillow keeps the high byte, which is within one level of that. Of an animation
    the first frame counts.

    Args:
        data: the whole file.
        max_pixels: refuse larger images from their header, before any pixel is decoded.
        reserve: called with the bytes that decoding will take at most, before it takes them.

    Returns:
        uint8 [height, width, 3], writable.

    Raises:
        Reject: stage `decode`; `empty`, `not_an_image`, `unsupported_format`, `too_many_pixels`,
            `truncated_image` or `corrupt_image`.
    """
    image_file = _format_of(data)
    try:
        # Not Image.open: its check for decompression bombs warns, and has a limit of its own.
        image = image_file(io.BytesIO(data))
        width, height = image.size
        if width * height <= max_pixels:
            if reserve:
                per_pixel = _PEAK_BYTES if image.mode == "RGB" else _PEAK_BYTES_CONVERTED
                reserve(width * height * per_pixel)
            return _to_pixels(image)
    except Image.DecompressionBombError as error:
        raise Reject("decode", "too_many_pixels", str(error)) from error
    except _DAMAGED as error:
        if _is_cut(data, image_file):
            message = f"{image_file.format} ends early, after {len(data)} bytes: {error}"
            raise Reject("decode", "truncated_image", message) from error
        message = f"{image_file.format} is damaged: {error}"
        raise Reject("decode", "corrupt_image", message) from error
    raise Reject(
        "decode",
        "too_many_pixels",
        f"{width}x{height} is {width * height} pixels, max_pixels is {max_pixels}",
    )


def _format_of(data: bytes) -> type[ImageFile.ImageFile]:
    if not data:
        raise Reject("decode", "empty", "the image field holds no bytes")
    if data.startswith(b"\xff\xd8"):
        return JpegImageFile
    if data.startswith(b"\x89PNG"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    name = next((n for magic, n in _UNSUPPORTED.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        name = f"HEIF family ({data[8:12].decode('latin-1')})"
    if name is not None:
        raise Reject("decode", "unsupported_format", f"{name}; only JPEG, PNG and WebP are read")
    raise Reject("decode", "not_an_image", f"begins with {data[:12]!r}: no known image format")


def _is_cut(data: bytes, image_file: type[ImageFile.ImageFile]) -> bool:
    """Whether the file's end is missing, judged by its own end mark (some padding may follow)."""
    if image_file is WebPImageFile:
        return len(data) < 12 or len(data) < 8 + int.from_bytes(data[4:8], "little")
    return (b"\xff\xd9" if image_file is JpegImageFile else b"IEND") not in data[-64:]


def _to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    image.load()
    upright = _UPRIGHT.get(_orientation(image))
    profile = image.info.get("icc_profile")
    image, alpha = _split_alpha(_to_8_bit(image))
    image = _to_srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    if upright is not None:
        image = image.transpose(upright)
    return np.array(image)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:
        return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode == "1":
        return image if image.has_transparency_data else image.convert("L")
    if image.mode == "I;16":
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split into L, RGB or CMYK, and the alpha channel if there is one."""
    if image.has_transparency_data:
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("RGBA")
        return image.convert(image.mode.removesuffix("A")), image.getchannel("A")
    return (image.convert("RGB") if image.mode == "P" else image), None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        to_srgb = _srgb_transform(profile, image.mode)
        if to_srgb is not None:
            return to_srgb.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the conversion from a profile to sRGB; None if it is broken, or sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        to_srgb = ImageCms.buildTransform(source, target, mode, "RGB")
    except (ImageCms.PyCMSError, *_DAMAGED):
        return None
    if mode == "RGB":
        # Most profiles in the wild are sRGB under some name: they move no colour of a 16³ grid by
        # more than a level of rounding, and the conversion takes longer than decoding.
        grid = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), -1).reshape(64, 64, 3)
        moved = np.asarray(to_srgb.apply(Image.fromarray(grid.astype(np.uint8)))) - grid
        if np.abs(moved).max() <= 1:
            return None
    return to_srgb
