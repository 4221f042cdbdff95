"""Read the size of a WebP and remove damaged metadata, before libwebp opens the file."""

from __future__ import annotations

import struct

# The header is RIFF, a size, WEBP. Then follow chunks of a name, a size and content, padded to an
# even length.
_HEADER_BYTES = 12
_METADATA = (b"ICCP", b"EXIF", b"XMP ")
_MAX_CHUNKS = 65_536

# Larger metadata is dropped. The colour profile of a printing press has 3 MB.
_MAX_METADATA_BYTES = 4 * 2**20


def read_webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height from the first chunk; None if it has no size.

    The layouts are in RFC 9649, sections 2.5 to 2.7. The size is read before libwebp opens the
    file, because libwebp then allocates buffers for the whole canvas.
    """
    kind, content = data[12:16], data[20:30]
    if len(content) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(
            content[7:10], "little"
        )
    if kind == b"VP8L" and content[0] == 0x2F:
        (bits,) = struct.unpack_from("<I", content, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def strip_metadata(data: bytes) -> bytes:
    """Drop metadata chunks that are large or extend beyond the end of the file.

    Returns:
        The file without these chunks; `data` itself if nothing is dropped.

    Raises:
        ValueError: the file has an absurd number of chunks.
    """
    riff_end = 8 + int.from_bytes(data[4:8], "little")
    if riff_end > len(data):
        return data  # the end is missing, which libwebp reports
    parts: list[bytes] = []
    position, run_start = _HEADER_BYTES, _HEADER_BYTES
    for _ in range(_MAX_CHUNKS + len(data) // 1024):
        if position + 8 > riff_end:
            break
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + length + length % 2
        if kind in _METADATA and (length > _MAX_METADATA_BYTES or end > riff_end):
            parts.append(data[run_start:position])
            run_start = min(end, riff_end)
        position = end
    else:
        raise ValueError("it has an absurd number of chunks")
    if not parts:
        return data
    chunks = b"".join([*parts, data[run_start:riff_end]])
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
