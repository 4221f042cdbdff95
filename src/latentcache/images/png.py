"""Remove the PNG chunks that may keep Pillow from reading the pixels.

Ancillary chunks carry metadata. Pillow refuses the whole file if one of them is damaged or large: a
text of more than 1 MiB, a wrong checksum, a chunk that is too short. Viewers ignore such chunks,
and `strip_chunks` drops them. Critical chunks and tRNS determine the pixels and are kept.
"""

from __future__ import annotations

import struct
import zlib

_SIGNATURE_BYTES = 8

# Pillow's limit of the decompressed size of one chunk (`PngImagePlugin.MAX_TEXT_CHUNK`).
_MAX_INFLATED_BYTES = 2**20

# Larger colour profiles are ignored. Those of printing presses have up to 3 MB.
_MAX_PROFILE_BYTES = 4 * 2**20

# Other metadata is kept up to this total size, so that an ordinary file is not copied.
_MAX_OTHER_BYTES = 64 * 2**10

# A file with more chunks is an attack that wastes time. Encoders write IDAT chunks of 8 KiB or
# more.
_MAX_CHUNKS = 65_536

# Pillow refuses a file if one of these chunks is shorter.
_MIN_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}

# Only the image in IDAT is used of an animation, and it needs none of these chunks.
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")

# The keywords of texts from which Pillow reads the orientation.
_ORIENTATION_TEXTS = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")


def strip_chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """Drop the ancillary chunks that are damaged, are large, or belong to an animation.

    Args:
        data: the whole file.

    Returns:
        The file without these chunks, which is `data` itself if nothing is dropped; and the colour
        profile of a dropped iCCP chunk, if it is intact and at most 4 MiB.

    Raises:
        ValueError: the file has an absurd number of chunks.
    """
    parts: list[bytes] = []
    profile = None
    position, run_start, other_bytes = _SIGNATURE_BYTES, 0, 0
    has_pixels = False
    for _ in range(_MAX_CHUNKS + len(data) // 1024):
        if position + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind == b"IEND" or not kind.isalpha():
            break
        is_cut = end > len(data)
        if kind[0] & 0x20 and kind != b"tRNS" and (has_pixels or not is_cut):
            is_kept = not is_cut and _is_kept(data, kind, position + 8, length, other_bytes)
            if is_kept:
                other_bytes += length
            else:
                if kind == b"iCCP" and not is_cut:
                    profile = _profile_of(data, position + 8, length)
                parts.append(data[run_start:position])
                run_start = end
        has_pixels = has_pixels or kind == b"IDAT"
        position = end
    else:
        raise ValueError("it has an absurd number of chunks")
    if not parts:
        return data, None
    parts.append(data[run_start:])
    return b"".join(parts), profile


def _is_kept(data: bytes, kind: bytes, start: int, length: int, other_bytes: int) -> bool:
    """Return whether to keep a complete ancillary chunk whose content begins at `start`."""
    if kind in _ANIMATION or length > _MAX_INFLATED_BYTES:
        return False
    if length < _MIN_BYTES.get(kind, 0) or not _is_checksum_right(data, start, length):
        return False
    if kind == b"iCCP":
        packed = _packed_profile(data[start : start + length])
        return packed is not None and _inflate(packed, _MAX_INFLATED_BYTES) is not None
    if kind == b"eXIf":
        return True
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        keyword, _, rest = data[start : start + length].partition(b"\0")
        if keyword in _ORIENTATION_TEXTS:
            return _is_small_text(kind, rest)
        # Pillow stores texts in one dict with its own values, whose names are in lower case. A text
        # named `transparency` would replace the transparency of the image.
        if kind != b"tEXt" or keyword.islower():
            return False
    return other_bytes + length <= _MAX_OTHER_BYTES


def _is_checksum_right(data: bytes, start: int, length: int) -> bool:
    checksum = int.from_bytes(data[start + length : start + length + 4], "big")
    return zlib.crc32(memoryview(data)[start - 4 : start + length]) == checksum


def _is_small_text(kind: bytes, rest: bytes) -> bool:
    """Return whether a text without its keyword inflates to at most Pillow's limit."""
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return True
    if kind == b"zTXt":
        return rest[:1] == b"\0" and _inflate(rest[1:], _MAX_INFLATED_BYTES) is not None
    packed = rest[2:].split(b"\0", 2)
    return len(packed) == 3 and _inflate(packed[2], _MAX_INFLATED_BYTES) is not None


def _packed_profile(content: bytes) -> bytes | None:
    _, separator, rest = content.partition(b"\0")
    return rest[1:] if separator and rest[:1] == b"\0" else None


def _profile_of(data: bytes, start: int, length: int) -> bytes | None:
    """Inflate the profile of an iCCP chunk that is too large for Pillow."""
    if length > _MAX_PROFILE_BYTES or not _is_checksum_right(data, start, length):
        return None
    packed = _packed_profile(data[start : start + length])
    if packed is None:
        return None
    try:
        profile = zlib.decompressobj().decompress(packed, _MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    # A profile begins with its size. Padding after it is dropped.
    size = int.from_bytes(profile[:4], "big")
    return profile[:size] if size <= len(profile) else None


def _inflate(packed: bytes, max_bytes: int) -> bytes | None:
    """Inflate a zlib stream; None if it is damaged or inflates to more than `max_bytes`."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(packed, max_bytes)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail else content
