"""Decode image bytes to the RGB pixels that a viewer shows, or raise a reject. Thread-safe.

Pillow and simplejpeg release the GIL while they decode, so threads are enough to use all cores.
"""

from __future__ import annotations

import errno
import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile

from latentcache.errors import Reject, first_line
from latentcache.images.formats import JPEG, Format, format_of
from latentcache.images.jpeg import decode_jpeg, require_few_scans

# The modes that Pillow converts to 8 bits a channel. In other modes the value of white is unknown.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_GRAY16_MODES = {"I;16", "I;16B", "I;16L", "I;16N"}

# The transforms of larger colour profiles are used but not cached for the next image.
_MAX_CACHED_PROFILE_BYTES = 2**20

# Measured bytes per pixel at the peak of decoding: of simplejpeg, of the coefficients that libjpeg
# holds of progressive files, and of Pillow's copies in conversions of modes, profiles and alpha.
_PEAK_BYTES = 3
_COEFFICIENT_BYTES = 6
_CONVERTED_PEAK_BYTES = 22

# EXIF orientations as steps through rows and columns. Orientations from 5 on then swap the sides.
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}

Reserve: TypeAlias = Callable[[int], None]
"""Called with the bytes that decoding takes from now on, before it takes them. It may wait."""

Scaled: TypeAlias = tuple[NDArray[np.uint8], tuple[int, int], int]
"""Pixels uint8 [ceil(height / n), ceil(width / n), 3], the full upright (width, height), and n."""

ChooseScale: TypeAlias = Callable[[int, int], int]
"""Returns the denominator for a full upright width and height: 1, 2, 4 or 8."""


def decode_image(
    data: bytes, *, max_pixels: int, reserve: Reserve | None = None
) -> NDArray[np.uint8]:
    """Decode an image to sRGB. The content determines the format, not the name.

    The EXIF orientation and the ICC profile are applied if they are usable. CMYK without a profile
    is converted by complement. Transparency is composited over white. 16-bit gray is scaled by
    1/257. For 16-bit colour, Pillow keeps the high byte, which is within one level of that. Only
    the first frame or page is used.

    Args:
        data, max_pixels: the whole file, and the limit above which its header is a reject.
        reserve: called with the bytes that decoding takes, before it takes them; may wait.

    Returns:
        uint8 [height, width, 3], writable. If the orientation swaps the sides, the columns are
        contiguous in memory, otherwise the rows (C order).

    Raises:
        Reject: stage `decode`; `empty`, `not_an_image`, `unsupported_format`, `too_many_pixels`,
            `too_many_scans`, `truncated_image` or `corrupt_image`. The last two cover every
            exception of a decoder, and their message has the exception's name.
        MemoryError: memory is exhausted. An OSError of ENOMEM means the same.
    """
    return decode_scaled(data, lambda width, height: 1, max_pixels=max_pixels, reserve=reserve)[0]


def decode_scaled(
    data: bytes, choose: ChooseScale, *, max_pixels: int, reserve: Reserve | None = None
) -> Scaled:
    """Decode as `decode_image` does, but a JPEG at a fraction of its size (its low frequencies).

    Args:
        data, max_pixels, reserve: see `decode_image`, also for the errors.
        choose: chooses the fraction for a JPEG. Images that Pillow decodes keep their size.
    """
    image_format = format_of(data)
    try:
        return _decode(data, image_format, choose, max_pixels, reserve or (lambda num_bytes: None))
    except (Reject, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Reject("decode", "too_many_pixels", first_line(error)) from error
    except BaseException as error:
        # Plugins in Rust raise this exception, which is not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        name, text = image_format.name, type(error).__name__
        if str(error).strip():
            text += f": {first_line(error)}"
        if image_format.is_cut(data) or "truncated" in text:
            message = f"{name} ends early, after {len(data)} bytes: {text}"
            raise Reject("decode", "truncated_image", message) from error
        raise Reject("decode", "corrupt_image", f"{name} is damaged: {text}") from error


def _decode(
    data: bytes, image_format: Format, choose: ChooseScale, max_pixels: int, reserve: Reserve
) -> Scaled:
    image, is_jpeg = None, image_format is JPEG
    size = image_format.read_size(data)
    if size is not None:
        _require_few_pixels(size, max_pixels)
    if size is None or not is_jpeg:
        if size is not None:
            reserve(math.prod(size) * image_format.open_bytes)
        image = image_format.open(data)
        size = image.size
        _require_few_pixels(size, max_pixels)
    if is_jpeg:
        if image is not None:
            require_few_scans(data, math.prod(size))
        if image is None or image.mode in ("L", "RGB"):
            scaled = _decode_jpeg(data, size, image, choose, reserve)
            if scaled:
                return scaled
    if image is None:
        image = image_format.open(data)
    if min(image.size) < 1:
        raise ValueError("it has no pixels")
    return _decode_by_pillow(image, image_format, reserve)


def _require_few_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if math.prod(size) > max_pixels:
        message = f"{size[0]}x{size[1]} is {math.prod(size)} pixels, max_pixels is {max_pixels}"
        raise Reject("decode", "too_many_pixels", message)


def _decode_jpeg(
    data: bytes,
    size: tuple[int, int],
    image: Image.Image | None,
    choose: ChooseScale,
    reserve: Reserve,
) -> Scaled | None:
    """Decode with simplejpeg; return None if Pillow must decode.

    `image` has the header as read by Pillow; None for a header with nothing but the size.
    """
    orientation, to_srgb, is_gray, is_progressive = 1, None, False, False
    if image is not None:
        orientation, to_srgb = _orientation(image), _to_srgb_from(image, image.info)
        is_gray, is_progressive = image.mode == "L", "progressive" in image.info
    upright = size[::-1] if orientation > 4 else size
    denominator = choose(*upright)
    down, across = _FLIPS.get(orientation, (1, 1))
    # If a side is not divisible, its last pixel covers fewer source pixels and must stay the last,
    # so such a side must not be flipped.
    while (down < 0 and size[1] % denominator) or (across < 0 and size[0] % denominator):
        denominator //= 2
    per_pixel = _PEAK_BYTES * 2 if orientation > 1 else _PEAK_BYTES
    per_pixel = _CONVERTED_PEAK_BYTES if to_srgb else per_pixel
    coefficients = _COEFFICIENT_BYTES if is_progressive else 0
    reserve(math.prod(size) * per_pixel // denominator**2 + math.prod(size) * coefficients)
    pixels = decode_jpeg(data, size, "GRAY" if to_srgb and is_gray else "RGB", denominator)
    if pixels is None:
        return None
    if to_srgb:
        unconverted = Image.fromarray(pixels[..., 0] if is_gray else pixels)
        pixels = np.array(to_srgb.apply(unconverted))
    return _turn(pixels, orientation), upright, denominator


def _decode_by_pillow(image: ImageFile.ImageFile, image_format: Format, reserve: Reserve) -> Scaled:
    if image.mode not in _MODES | _GRAY16_MODES:
        message = f"{image_format.name} of mode {image.mode} is not read: its white is unknown"
        raise Reject("decode", "unsupported_format", message)
    per_pixel = image_format.open_bytes + image_format.load_bytes
    if image.mode != "RGB" or "icc_profile" in image.info:
        per_pixel = max(per_pixel, _CONVERTED_PEAK_BYTES)
    reserve(image.width * image.height * per_pixel)
    image.load()
    orientation = _orientation(image)
    opaque, alpha = _split_alpha(_to_8_bit(image))
    to_srgb = _to_srgb_from(opaque, image.info)
    rgb = to_srgb.apply(opaque) if to_srgb else opaque
    rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    pixels = _turn(np.array(rgb), orientation)
    return pixels, (pixels.shape[1], pixels.shape[0]), 1


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return an image turned upright according to its EXIF orientation."""
    if orientation not in _FLIPS:
        return pixels
    down, across = _FLIPS[orientation]
    # NumPy copies elements of three bytes faster than three elements of one byte.
    turned = np.ascontiguousarray(pixels.view("V3")[::down, ::across]).view(np.uint8)
    return turned.swapaxes(0, 1) if orientation > 4 else turned


def _orientation(image: Image.Image) -> int:
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  (damaged EXIF costs the orientation, not the image)
        return 1
    return orientation if orientation in _FLIPS else 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode == "1":
        return image if image.has_transparency_data else image.convert("L")
    if image.mode in _GRAY16_MODES:
        tags = getattr(image, "tag_v2", {})
        # A TIFF of 12 bits (tag 258) also has this mode.
        white = 4095 if tags.get(258) == (12,) else 65535
        levels = np.asarray(image).astype(np.uint32)
        gray = ((levels * 255 + white // 2) // white).astype(np.uint8)
        # Pillow inverts a TIFF whose 0 is white (tag 262) in all modes except this one.
        return Image.fromarray(255 - gray if tags.get(262) == 0 else gray)
    return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an image into L, RGB or CMYK, and the alpha channel if there is one."""
    if image.has_transparency_data:
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("RGBA")
        return image.convert(image.mode.removesuffix("A")), image.getchannel("A")
    return (image.convert("RGB") if image.mode == "P" else image), None


def _to_srgb_from(image: Image.Image, info: dict[Any, Any]) -> ImageCms.ImageCmsTransform | None:
    profile = info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return None
    # A profile begins with its size. Padding after it is dropped.
    profile = profile[: int.from_bytes(profile[:4], "big")] or profile
    if len(profile) > _MAX_CACHED_PROFILE_BYTES:
        return _srgb_transform.__wrapped__(profile, image.mode)
    return _srgb_transform(profile, image.mode)


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform from a profile to sRGB; None if the profile is broken or is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        to_srgb = ImageCms.buildTransform(source, target, mode, "RGB")
    except Exception:  # noqa: BLE001  (a damaged profile costs the colours, not the image)
        return None
    if mode == "RGB":
        # Most profiles in practice are sRGB under various names. They change no colour of a 16³
        # grid by more than one level of rounding, and the conversion takes longer than decoding.
        grid = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), -1).reshape(64, 64, 3)
        moved = np.asarray(to_srgb.apply(Image.fromarray(grid.astype(np.uint8)))) - grid
        if np.abs(moved).max() <= 1:
            return None
    return to_srgb
