"""Read the size in the header of a JPEG XL file.

The Pillow plugin decodes a file when it is opened, so the size must be known before.
"""

from __future__ import annotations

CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
CODESTREAM = b"\xff\x0a"

# The bit lengths of a side that is not small (ISO/IEC 18181-1, SizeHeader), and the ratios of width
# to height.
_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_MAX_BOXES = 1024


def read_jxl_size(data: bytes) -> tuple[int, int]:
    """Return width and height, before the orientation is applied.

    Raises:
        ValueError: the file has no codestream.
    """
    start = 0 if data.startswith(CODESTREAM) else _find_codestream(data)
    if data[start : start + 2] != CODESTREAM:
        raise ValueError("it has no codestream")
    bits = _Bits(int.from_bytes(data[start + 2 : start + 16], "little"))
    is_small = bits.take(1)
    height = _read_side(bits, is_small)
    ratio = bits.take(3)
    if ratio == 0:
        return _read_side(bits, is_small), height
    across, down = _RATIOS[ratio - 1]
    return height * across // down, height


class _Bits:
    """A number whose bits are read from the lowest upwards."""

    def __init__(self, number: int) -> None:
        self.number = number

    def take(self, num_bits: int) -> int:
        bits = self.number & ((1 << num_bits) - 1)
        self.number >>= num_bits
        return bits


def _read_side(bits: _Bits, is_small: int) -> int:
    if is_small:
        return (bits.take(5) + 1) * 8
    return bits.take(_SIDE_BITS[bits.take(2)]) + 1


def _find_codestream(data: bytes) -> int:
    """Return the offset of the content of the first codestream box."""
    position = 0
    for _ in range(_MAX_BOXES):
        size = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        header = 8
        if size == 1:
            size, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if kind == b"jxlc":
            return position + header
        if kind == b"jxlp":  # a part, which begins with its number
            return position + header + 4
        if size < header or position + size >= len(data):
            break
        position += size
    raise ValueError("it has no codestream")
