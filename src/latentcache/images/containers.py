"""Read the size of WebP and JPEG XL files, and drop metadata that keeps Pillow from the pixels.

Pillow refuses a PNG if an ancillary chunk, which carries metadata, is damaged or large. Viewers
ignore such chunks. Critical chunks and tRNS determine the pixels and are kept.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

# A file with more chunks, and more than one per KiB, is an attack that wastes time. Encoders write
# IDAT chunks of 8 KiB or more.
_MAX_CHUNKS = 65_536
_MAX_BOXES = 1024

# Larger metadata is dropped. The colour profile of a printing press has 3 MB.
_MAX_METADATA_BYTES = 4 * 2**20

# Pillow's limit of the decompressed size of one PNG chunk (`PngImagePlugin.MAX_TEXT_CHUNK`).
_MAX_INFLATED_BYTES = 2**20

# Other metadata of PNG is kept up to this total size, so that an ordinary file is not copied.
_MAX_OTHER_BYTES = 64 * 2**10

# Pillow refuses a PNG if one of these chunks is shorter.
_MIN_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}

# Only the image in IDAT is used of an animated PNG, and it needs none of these chunks.
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")

# The keywords of texts from which Pillow reads the orientation.
_ORIENTATION_TEXTS = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")

JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
JXL_CODESTREAM = b"\xff\x0a"

# ISO/IEC 18181-1, SizeHeader: the bit lengths of a side that is not small, and width to height.
_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def without(data: bytes, ranges: list[tuple[int, int]]) -> bytes:
    """Return `data` without some ranges of its bytes; `data` itself if there are none.

    Args:
        data, ranges: the bytes, and start and end of each range, in order.
    """
    if not ranges:
        return data
    ends = [0, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), len(data)]
    return b"".join(data[end:start] for end, start in zip(ends, starts, strict=True))


def strip_png(data: bytes) -> tuple[bytes, bytes | None]:
    """Drop the ancillary chunks that are damaged, are large, or belong to an animation.

    Returns:
        The file without them, which is `data` itself if nothing is dropped; and the colour profile
        of a dropped iCCP chunk, if it is intact and at most 4 MiB.
    """
    dropped, profile = list[tuple[int, int]](), None
    position, other_bytes, has_pixels = 8, 0, False
    for _ in range(_MAX_CHUNKS + len(data) // 1024):
        if position + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        start, end = position, position + 12 + length
        if kind == b"IEND" or not kind.isalpha():
            break
        is_cut = end > len(data)
        if kind[0] & 0x20 and kind != b"tRNS" and (has_pixels or not is_cut):
            limit = _MAX_METADATA_BYTES if kind == b"iCCP" else _MAX_INFLATED_BYTES
            is_used = length <= limit and kind not in _ANIMATION
            body = data[start + 8 : end - 4] if is_used else b""
            checksum = struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
            is_intact = is_used and data[end - 4 : end] == checksum
            if is_intact and _is_harmless(kind, body, other_bytes):
                other_bytes += length
            else:
                dropped.append((start, end))
                if is_intact and kind == b"iCCP":
                    packed = body.partition(b"\0")[2]
                    profile = _inflate(packed[1:], _MAX_METADATA_BYTES) or b""
                    # A profile begins with its size. Padding after it is dropped.
                    profile = profile[: int.from_bytes(profile[:4], "big")]
        has_pixels = has_pixels or kind == b"IDAT"
        position = end
    else:
        raise ValueError("it has an absurd number of chunks")
    return without(data, dropped), profile


def _is_harmless(kind: bytes, body: bytes, other_bytes: int) -> bool:
    """Return whether Pillow reads an ancillary chunk of PNG without trouble."""
    if not _MIN_BYTES.get(kind, 0) <= len(body) <= _MAX_INFLATED_BYTES:
        return False
    keyword, _, text = body.partition(b"\0")
    if kind == b"eXIf":
        return True
    if kind == b"iCCP" or (kind in (b"tEXt", b"zTXt", b"iTXt") and keyword in _ORIENTATION_TEXTS):
        if kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0"):
            return True
        if kind == b"iTXt":  # a flag, the method, the language and the translated keyword
            packed = text[2:].split(b"\0", 2)[2:]
        else:  # the method
            packed = [text[1:]] if text[:1] == b"\0" else []
        inflated = _inflate(packed[0], _MAX_INFLATED_BYTES + 1) if packed else None
        return inflated is not None and len(inflated) <= _MAX_INFLATED_BYTES
    # Pillow stores texts in one dict with its own values, whose names are in lower case. A text
    # named `transparency` would replace the transparency of the image.
    if kind in (b"zTXt", b"iTXt") or (kind == b"tEXt" and keyword.islower()):
        return False
    return other_bytes + len(body) <= _MAX_OTHER_BYTES


def _inflate(packed: bytes, max_bytes: int) -> bytes | None:
    """Inflate the first bytes of a zlib stream; None if they are damaged."""
    try:
        return zlib.decompressobj().decompress(packed, max_bytes)
    except zlib.error:
        return None


def strip_webp(data: bytes) -> bytes:
    """Drop metadata chunks of WebP that are large or extend beyond the end of the file."""
    riff_end = 8 + int.from_bytes(data[4:8], "little")
    if riff_end > len(data):
        return data  # the end is missing, which libwebp reports
    dropped, position = list[tuple[int, int]](), 12
    for _ in range(_MAX_CHUNKS + len(data) // 1024):
        if position + 8 > riff_end:
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        end = position + 8 + length + length % 2
        if kind in (b"ICCP", b"EXIF", b"XMP ") and (length > _MAX_METADATA_BYTES or end > riff_end):
            dropped.append((position, min(end, riff_end)))
        position = end
    else:
        raise ValueError("it has an absurd number of chunks")
    if not dropped:
        return data
    chunks = without(data[:riff_end], dropped)[8:]
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def read_webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height from the first chunk (RFC 9649, 2.5 to 2.7); None if it has none.

    libwebp allocates buffers for the whole canvas when it opens a file.
    """
    kind, content = data[12:16], data[20:30]
    if len(content) < 10:
        return None
    if kind == b"VP8X":
        width, height = content[4:7], content[7:10]
        return 1 + int.from_bytes(width, "little"), 1 + int.from_bytes(height, "little")
    if kind == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        bits = int.from_bytes(content[6:10], "little")
        return bits & 0x3FFF, bits >> 16 & 0x3FFF
    return None


def iso_boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start of the content and end of the top-level boxes of an ISO base media file."""
    position = 0
    for _ in range(_MAX_BOXES):
        size, header = int.from_bytes(data[position : position + 4], "big"), 8
        kind = data[position + 4 : position + 8]
        if size == 1:
            size, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        end = position + size if size >= header else len(data)  # 0: to the end of the file
        yield kind, position + header, end
        if end >= len(data):
            return
        position = end


def read_jxl_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a JPEG XL before the orientation is applied.

    The Pillow plugin decodes a file when it is opened.
    """
    start = 0
    if not data.startswith(JXL_CODESTREAM):
        # `jxlp` is a part of the codestream, which begins with its number.
        offsets = {b"jxlc": 0, b"jxlp": 4}
        boxes = iso_boxes(data)
        start = next((at + offsets[kind] for kind, at, _ in boxes if kind in offsets), 0)
    if data[start : start + 2] != JXL_CODESTREAM:
        raise ValueError("it has no codestream")
    bits = int.from_bytes(data[start + 2 : start + 16], "little")

    def take(num_bits: int) -> int:
        nonlocal bits
        value = bits & ((1 << num_bits) - 1)
        bits >>= num_bits
        return value

    is_small = take(1)

    def take_side() -> int:
        return (take(5) + 1) * 8 if is_small else take(_SIDE_BITS[take(2)]) + 1

    height = take_side()
    ratio = take(3)
    if ratio == 0:
        return take_side(), height
    across, down = _RATIOS[ratio - 1]
    return height * across // down, height
