"""Decode JPEGs with libjpeg-turbo through simplejpeg.

Pillow uses the same library and gives the same pixels, but makes copies that simplejpeg avoids.
simplejpeg is used in strict mode: it refuses every file for which libjpeg warns. Pillow tolerates
some of these warnings, so it decodes the refused files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from latentcache.errors import Reject

_START_OF_SCAN = 0xDA
# Segments that do not affect the interpretation of pixels (JFIF, private segments of applications,
# comments), then tables and the headers of sequential frames.
_PLAIN = {0xE0, *range(0xE3, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD, 0xC0, 0xC1}
_FRAMES = (0xC0, 0xC1)

# A progressive file is decoded scan by scan. Each scan passes over all coefficients, even if it has
# only a dozen bytes. libjpeg's default script has 10 scans, and no common encoder writes more than
# about 20. Up to 20 scans are always decoded. More are decoded if scans times pixels is below 1e9
# (about 5 s of one core), but never more than 500, the limit of libjpeg-turbo's fuzzers and of
# djpeg's example of `-maxscans`.
_MIN_SCANS = 20
_MAX_SCANS = 500
_MAX_SCANNED_PIXELS = 10**9

# Metadata of a header beyond this limit is dropped before Pillow reads the file, because Pillow
# joins segments by copying all of them for each new one. A printing press's colour profile has
# 3 MB.
_MAX_METADATA_BYTES = 4 * 2**20
_MAX_SEGMENTS = 65_536

_METADATA = {*range(0xE0, 0xF0), 0xFE}
_ADOBE = 0xEE  # the coding of colours

# A marker in the data of a scan that is not a stuffed 0xFF, a restart marker or a fill byte.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")


def read_plain_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height if the header has no other information that decoding needs.

    Returns:
        None for a file that is progressive, CMYK or unusual, for one with several scans, and for
        one with segments APP1 or APP2, which hold EXIF, XMP and ICC profiles.
    """
    position, num_components = 2, 0
    try:
        for _ in range(_MAX_SEGMENTS):
            if data[position] != 0xFF or data[position + 1] not in _PLAIN:
                break
            if data[position + 1] in _FRAMES:
                num_components = data[position + 9]
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position : position + 2] != bytes((0xFF, _START_OF_SCAN)):
            return None
        if data[position + 4] != num_components:
            return None  # the other components have their own scans
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except (IndexError, ValueError):
        return None
    return (int(width), int(height)) if colorspace in ("YCbCr", "RGB", "Gray") else None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment before the first scan or the first non-segment.

    Raises:
        ValueError: the header has an absurd number of segments.
    """
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


def strip_large_metadata(data: bytes) -> bytes:
    """Drop the metadata segments beyond the first 4 MiB; return `data` itself if there are none."""
    if len(data) <= _MAX_METADATA_BYTES:
        return data
    num_bytes, dropped = 0, []
    for marker, start, end in _segments(data):
        if marker in _METADATA and marker != _ADOBE:
            num_bytes += end - start
            if num_bytes > _MAX_METADATA_BYTES:
                dropped.append((start, end))
    return _without(data, dropped)


def strip_metadata(data: bytes, keep: tuple[bytes, ...] = ()) -> bytes:
    """Drop all metadata except Adobe's colour marker and the segments to keep.

    Args:
        data: the whole file.
        keep: segments are kept if their content begins with one of these.

    Returns:
        The file without metadata; `data` itself if nothing is dropped.
    """
    dropped = []
    for marker, start, end in _segments(data):
        is_kept = data.startswith(keep, start + 4) if keep else False
        if marker == _ADOBE:
            is_kept = end - start >= 4 + 12
        if marker in _METADATA and not is_kept:
            dropped.append((start, end))
    return _without(data, dropped)


def _without(data: bytes, ranges: list[tuple[int, int]]) -> bytes:
    if not ranges:
        return data
    ends = [0, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), len(data)]
    return b"".join(data[end:start] for end, start in zip(ends, starts, strict=True))


def require_few_scans(data: bytes, num_pixels: int) -> None:
    """Reject a file whose scans would occupy a thread for too long.

    Args:
        data: the whole file.
        num_pixels: the pixels of the image.

    Raises:
        Reject: stage `decode`, `too_many_scans`.
    """
    allowed = _MAX_SCANNED_PIXELS // max(num_pixels, 1)
    allowed = min(max(allowed, _MIN_SCANS), _MAX_SCANS)
    if _is_single_scan(data) or _bound_scans(data) <= allowed:
        return
    if _count_scans(data, allowed) > allowed:
        raise Reject(
            "decode",
            "too_many_scans",
            f"it has more than {allowed} scans of {num_pixels} pixels each",
        )


def _is_single_scan(data: bytes) -> bool:
    """Return whether libjpeg stops after the first scan.

    It does if the file is sequential and the scan has all components.
    """
    num_components, end = 0, 2
    for marker, start, end in _segments(data):  # noqa: B007  (the last end is used)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _FRAMES or num_components:
                return False
            num_components = data[start + 9] if start + 9 < len(data) else 0
    is_scan = data[end : end + 2] == bytes((0xFF, _START_OF_SCAN)) and end + 4 < len(data)
    return is_scan and 0 < num_components == data[end + 4]


def _bound_scans(data: bytes) -> int:
    """Return an upper bound of the scans, which includes those of thumbnails and later pictures.

    `bytes.count` takes a tenth of the time of decoding. Comparing arrays takes a hundredth.
    """
    num_marks, view = 0, np.frombuffer(data, np.uint8)
    for start in range(0, len(data), 2**20):
        block = view[start : start + 2**20 + 1]
        num_marks += int(np.count_nonzero((block[:-1] == 0xFF) & (block[1:] == _START_OF_SCAN)))
    return num_marks


def _count_scans(data: bytes, enough: int) -> int:
    """Return the number of scans before the end mark; stop at one more than `enough`."""
    position, num_scans = 2, 0
    while num_scans <= enough and (match := _MARKER.search(data, position)):
        marker, position = match[1][0], match.end()
        if marker == 0xD9:
            break
        if marker != 0x01 and marker != 0xD8:
            position += int.from_bytes(data[position : position + 2], "big")
        num_scans += marker == _START_OF_SCAN
    return num_scans


def decode_jpeg(
    data: bytes, size: tuple[int, int], colorspace: str, denominator: int
) -> NDArray[np.uint8] | None:
    """Decode to uint8 [ceil(height / denominator), ceil(width / denominator), channels].

    Args:
        data: the whole file.
        size: its width and height. If libjpeg reads another size, the file is damaged.
        colorspace: the colour space of the result, `RGB` or `GRAY`.
        denominator: 1, 2, 4 or 8.

    Returns:
        A new array; None if simplejpeg refuses the file, so that Pillow must decode it.
    """
    width, height = size
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data,
            colorspace,
            # simplejpeg uses the smallest fraction of libjpeg (in eighths) that is at least this.
            min_height=-(-height // denominator),
            min_width=-(-width // denominator),
        )
    except ValueError:
        return None
    return pixels
