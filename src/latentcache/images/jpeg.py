"""Decode JPEGs with libjpeg-turbo through simplejpeg, which makes fewer copies than Pillow.

In strict mode simplejpeg refuses every file for which libjpeg warns. Pillow, which tolerates some
of these warnings and gives the same pixels, decodes the refused files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from latentcache.errors import Reject
from latentcache.images.containers import without

_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
# Segments that do not affect the interpretation of pixels (JFIF, private segments of applications,
# comments), then tables and the headers of sequential frames.
_PLAIN = {0xE0, *range(0xE3, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD, 0xC0, 0xC1}
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}

# Each scan of a progressive file passes over all coefficients, even if it has only a dozen bytes.
# No common encoder writes more than about 20. More are decoded if scans times pixels is below 1e9
# (about 5 s of one core), but never more than 500, the limit of libjpeg-turbo's fuzzers.
_MIN_SCANS = 20
_MAX_SCANS = 500
_MAX_SCANNED_PIXELS = 10**9

# Pillow copies all segments for each new one that it joins. A printing press's profile has 3 MB.
_MAX_METADATA_BYTES = 4 * 2**20
_MAX_SEGMENTS = 65_536

_METADATA = {*range(0xE0, 0xF0), 0xFE}
_ADOBE = 0xEE  # the coding of colours

# A marker that is not a stuffed 0xFF, a fill byte, or one without a length other than the end mark.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


def read_plain_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height if the header has no other information that decoding needs.

    Return None for a file that is progressive, CMYK or unusual, has several scans, or has EXIF, XMP
    or an ICC profile (APP1 or APP2).
    """
    try:
        if not _is_single_scan(data, _PLAIN):
            return None
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (int(width), int(height)) if colorspace in ("YCbCr", "RGB", "Gray") else None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment before the first scan or other data."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        while data[position : position + 2] == b"\xff\xff":
            position += 1
        if position + 4 > len(data) or data[position] != 0xFF:
            return
        marker = data[position + 1]
        if marker == _START_OF_SCAN or marker < 0xC0:
            return
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, position, end
        position = end
    raise ValueError("its header has an absurd number of segments")


def strip_jpeg(data: bytes, keep: tuple[bytes, ...]) -> bytes:
    """Drop metadata except Adobe's colour marker; return `data` itself if nothing is dropped.

    Args:
        data, keep: the file, and the starts of the segments to keep, up to 4 MiB.
    """
    num_bytes, dropped = 0, []
    for marker, start, end in _segments(data):
        if marker == _ADOBE:
            is_kept = end - start >= 4 + 12
        elif marker in _METADATA:
            num_bytes += end - start
            is_kept = num_bytes <= _MAX_METADATA_BYTES and data.startswith(keep, start + 4)
        else:
            continue
        if not is_kept:
            dropped.append((start, end))
    return without(data, dropped)


def require_few_scans(data: bytes, num_pixels: int) -> None:
    """Raise a `Reject` for a file whose scans would occupy a thread for too long.

    Args:
        data, num_pixels: the whole file, and the pixels of its image.
    """
    if _is_single_scan(data):
        return
    allowed = _MAX_SCANNED_PIXELS // max(num_pixels, 1)
    allowed = min(max(allowed, _MIN_SCANS), _MAX_SCANS)
    position, num_scans = 2, 0
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, position)
        if match is None or match[1][0] == _END_OF_IMAGE:
            return
        num_scans += match[1][0] == _START_OF_SCAN
        if num_scans > allowed:
            message = f"it has more than {allowed} scans of {num_pixels} pixels each"
            raise Reject("decode", "too_many_scans", message)
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    raise ValueError("it has an absurd number of segments")


def _is_single_scan(data: bytes, markers: Collection[int] = range(256)) -> bool:
    """Return whether a sequential file has all components in its first scan, and only `markers`."""
    num_components, end = 0, 2
    for marker, start, end in _segments(data):  # noqa: B007  (the last end is used)
        if marker not in markers:
            return False
        if marker in _FRAMES:
            if marker not in _SEQUENTIAL or num_components:
                return False
            num_components = data[start + 9] if start + 9 < len(data) else 0
    is_scan = data[end : end + 2] == bytes((0xFF, _START_OF_SCAN)) and end + 4 < len(data)
    return is_scan and 0 < num_components == data[end + 4]


def decode_jpeg(
    data: bytes, size: tuple[int, int], colorspace: str, denominator: int
) -> NDArray[np.uint8] | None:
    """Decode to uint8 [ceil(height / denominator), ceil(width / denominator), channels].

    Return None if simplejpeg refuses the file, so that Pillow must decode it.

    Args:
        data, size: the whole file, and the (width, height) that it should have.
        colorspace, denominator: of the result, `RGB` or `GRAY`; and 1, 2, 4 or 8.
    """
    width, height = size
    # simplejpeg uses the smallest fraction of libjpeg (in eighths) that is at least this.
    least = {"min_height": -(-height // denominator), "min_width": -(-width // denominator)}
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace, **least)
    except ValueError:
        return None
    return pixels
