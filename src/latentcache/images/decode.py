"""Image bytes to RGB pixels: what a person would see in a viewer, or a reason why not.

Thread-safe. Pillow and simplejpeg release the GIL while they decode, so threads are enough to use
all cores. Pillow reads every header, and decodes what simplejpeg does not: both have libjpeg-turbo
inside and give the same pixels, but simplejpeg writes them at once where they are wanted.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import simplejpeg
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

# Bytes a pixel at the peak of decoding, as measured. simplejpeg writes the array and no more.
# Pillow has the picture in four bytes and gathers its bytes twice before the array is made; where
# a mode or a colour profile is converted or transparency laid out, there are copies.
_PEAK_BYTES = 3
_PILLOW_PEAK_BYTES = 10
_CONVERTED_PEAK_BYTES = 18

# EXIF orientations as steps through rows and columns; those from 5 on swap the two thereafter.
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}


Reserve = Callable[[int], None]
"""Told how many bytes decoding takes from now on, before it takes them; may wait for them."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """An image as `decode_scaled` gives it, with the size (upright) that it has in full.

    `pixels` is uint8 [ceil(height / denominator), ceil(width / denominator), 3].
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    denominator: int


def decode_image(
    data: bytes, *, max_pixels: int, reserve: Reserve | None = None
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
        reserve: is told of the memory that decoding takes, and may wait for it.

    Returns:
        uint8 [height, width, 3], writable. Where the orientation swaps the sides it is the columns
        that lie one after another in memory, else the rows (C order).

    Raises:
        Reject: stage `decode`; `empty`, `not_an_image`, `unsupported_format`, `too_many_pixels`,
            `truncated_image` or `corrupt_image`.
    """
    whole = lambda width, height: 1  # noqa: E731
    return decode_scaled(data, max_pixels=max_pixels, denominator=whole, reserve=reserve).pixels


def decode_scaled(
    data: bytes,
    *,
    max_pixels: int,
    denominator: Callable[[int, int], int],
    reserve: Reserve | None = None,
) -> Scaled:
    """Decode as `decode_image` does, but a JPEG at a fraction of its size.

    libjpeg computes a smaller image from each block's low frequencies, without decoding the rest.

    Args:
        data: the whole file.
        max_pixels: of the image in full.
        denominator: given its width and height (upright, in full), by what to divide them: 1, 2, 4
            or 8. What only Pillow decodes is not divided.
        reserve: as for `decode_image`.
    """
    image_file = _format_of(data)
    try:
        # Not Image.open: its check for decompression bombs warns, and has a limit of its own.
        image = image_file(io.BytesIO(data))
        width, height = image.size
        if width * height <= max_pixels:
            found = _decode_jpeg(data, image, denominator, reserve)
            return found or _decode_by_pillow(image, reserve)
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


def _decode_jpeg(
    data: bytes,
    image: ImageFile.ImageFile,
    denominator: Callable[[int, int], int],
    reserve: Reserve | None,
) -> Scaled | None:
    """Decode by simplejpeg; None for other formats, CMYK, and where anything at all is amiss.

    Being strict, it refuses what libjpeg warns of. Pillow overlooks some of that, and is to judge.
    """
    if not isinstance(image, JpegImageFile) or image.mode not in ("L", "RGB"):
        return None
    profile = image.info.get("icc_profile")
    to_srgb = _srgb_transform(profile, image.mode) if profile else None
    width, height = image.size
    orientation = _orientation(image)
    upright = (height, width) if orientation > 4 else (width, height)
    divisor = denominator(*upright)
    if reserve:
        turned = _PEAK_BYTES if orientation > 1 else 0
        per_pixel = _CONVERTED_PEAK_BYTES if to_srgb else _PEAK_BYTES + turned
        reserve(width * height * per_pixel // divisor**2)
    try:
        # The two look for the header in their own ways.
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        pixels = simplejpeg.decode_jpeg(
            data,
            "GRAY" if to_srgb and image.mode == "L" else "RGB",
            min_height=-(-height // divisor),
            min_width=-(-width // divisor),
        )
    except ValueError:
        return None
    if to_srgb:
        unconverted = Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels)
        pixels = np.array(to_srgb.apply(unconverted))
    return Scaled(_turn(pixels, orientation), *upright, divisor)


def _decode_by_pillow(image: ImageFile.ImageFile, reserve: Reserve | None) -> Scaled:
    if reserve:
        is_plain = image.mode == "RGB" and "icc_profile" not in image.info
        per_pixel = _PILLOW_PEAK_BYTES if is_plain else _CONVERTED_PEAK_BYTES
        reserve(image.width * image.height * per_pixel)
    image.load()
    orientation = _orientation(image)
    profile = image.info.get("icc_profile")
    opaque, alpha = _split_alpha(_to_8_bit(image))
    rgb = _to_srgb(opaque, profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    pixels = _turn(np.array(rgb), orientation)
    return Scaled(pixels, pixels.shape[1], pixels.shape[0], 1)


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Bring an image upright by its EXIF orientation."""
    if orientation not in _FLIPS:
        return pixels
    down, across = _FLIPS[orientation]
    # As elements of three bytes, which NumPy copies faster than three elements of one.
    turned = np.ascontiguousarray(pixels.view("V3")[::down, ::across]).view(np.uint8)
    return turned.swapaxes(0, 1) if orientation > 4 else turned


def _orientation(image: Image.Image) -> int:
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:
        return 1
    return orientation if orientation in _FLIPS else 1


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
