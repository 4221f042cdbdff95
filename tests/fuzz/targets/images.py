"""`decode_image` gives pixels or a `Reject`, and takes no more memory than the image needs."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  (registers its encoder)
from PIL import Image, ImageCms

from fuzz import Target, mutate_bytes
from latentcache.errors import Reject
from latentcache.images.decode import decode_image

MAX_PIXELS = 1_000_000

pillow_heif.register_heif_opener()


def _seeds(_: Path) -> list[bytes]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((48, 40))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "description"
    rgba = image.convert("RGBA")
    rgba.putalpha(image.convert("L"))
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "lime")]
    animated = {"save_all": True, "append_images": frames[1:]}
    levels = Image.fromarray(rng.integers(0, 65536, (40, 48), dtype=np.uint16))
    cases: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "JPEG", {}),
        (image, "JPEG", {"progressive": True}),
        (image, "JPEG", {"icc_profile": srgb, "exif": exif, "xmp": b"<x/>", "comment": b"c"}),
        (image, "JPEG", {"restart_marker_blocks": 2}),
        (image.convert("L"), "JPEG", {"icc_profile": lab}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "PNG", {"exif": exif}),
        (rgba, "PNG", {"icc_profile": srgb}),
        (image.quantize(16), "PNG", {"transparency": 3}),
        (image.convert("1"), "PNG", {}),
        (rgba.convert("LA"), "PNG", {}),
        (levels, "PNG", {}),
        (frames[0], "PNG", animated),
        (image, "WEBP", {}),
        (rgba, "WEBP", {"lossless": True}),
        (image, "WEBP", {"exif": exif, "icc_profile": srgb, "xmp": b"<x/>"}),
        (frames[0], "WEBP", animated),
        (image, "AVIF", {"exif": exif}),
        (rgba, "AVIF", {"icc_profile": srgb}),
        (frames[0], "AVIF", animated),
        (image.quantize(16), "GIF", {"comment": b"c"}),
        (frames[0], "GIF", animated),
        (image, "BMP", {}),
        (image.quantize(4), "BMP", {}),
        (rgba, "BMP", {}),
        (image, "TIFF", {"exif": exif, "icc_profile": srgb}),
        (rgba, "TIFF", {"compression": "tiff_lzw"}),
        (image, "TIFF", {"compression": "jpeg"}),
        (image.convert("1"), "TIFF", {"compression": "group4"}),
        (levels, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (image.convert("CMYK"), "TIFF", {}),
        (frames[0], "TIFF", animated),
        (image, "HEIF", {"exif": exif}),
        (rgba, "JXL", {"exif": exif.tobytes()}),
        (levels, "JXL", {"lossless": True}),
    ]
    actual = []
    for picture, image_format, options in cases:
        buffer = io.BytesIO()
        picture.save(buffer, image_format, **options)
        actual.append(buffer.getvalue())
    return actual


def _mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.5:
        if data.startswith(b"\x89PNG"):
            return _mutate_png(rng, data, seeds)
        if data.startswith(b"\xff\xd8"):
            return _mutate_jpeg(rng, data, seeds)
    return mutate_bytes(rng, data, seeds)


def _mutate_png(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change, drop, repeat, move or insert chunks, and correct all checksums but a few."""
    chunks, position = [], 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    for _ in range(rng.choice([1, 1, 2, 4])):
        index, action = rng.randrange(len(chunks)), rng.randrange(6)
        kind, body = chunks[index]
        if action == 0:
            if kind == b"IDAT" and rng.random() < 0.5:
                with suppress(zlib.error):  # it may be mutated already
                    rows = mutate_bytes(rng, zlib.decompress(body), seeds)
                    body = zlib.compress(rows)
            else:
                body = mutate_bytes(rng, body or b"\0", seeds)
            chunks[index] = (kind, body)
        elif action == 1 and len(chunks) > 1:
            del chunks[index]
        elif action == 2:
            chunks.insert(rng.randrange(len(chunks) + 1), (kind, body))
        elif action == 3:
            chunks.insert(rng.randrange(len(chunks)), chunks.pop(index))
        else:
            chunks.insert(rng.randrange(len(chunks) + 1), _odd_chunk(rng))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        checksum = zlib.crc32(kind + body) ^ (rng.random() < 0.03)
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum))
    return b"".join(parts)


def _odd_chunk(rng: random.Random) -> tuple[bytes, bytes]:
    body = rng.choice([b"", b"\0", rng.randbytes(rng.randrange(40)), bytes(1000)])
    keyword = rng.choice([b"k", b"exif", b"transparency", b"Raw profile type exif", b"bbox", b""])
    packed = zlib.compress(bytes(rng.choice([10, 2**20, 8 * 2**20])))
    text = keyword + b"\0" + rng.choice([b"\0", b"\1\0\0\0", b"\0\0\0\0", b""])
    return rng.choice(
        [
            (rng.choice([b"gAMA", b"cHRM", b"pHYs", b"tRNS", b"eXIf", b"PLTE", b"prVt"]), body),
            (rng.choice([b"acTL", b"fcTL", b"fdAT", b"IHDR", b"IDAT", b"IEND", b"JDAT"]), body),
            (rng.choice([b"zTXt", b"iTXt", b"iCCP"]), text + packed),
            (rng.choice([b"tEXt", b"iTXt"]), text + body),
        ]
    )


def _mutate_jpeg(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change, drop, repeat or insert segments of the header, and repeat scans."""
    segments, position = [], 2
    while data[position] == 0xFF and data[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segments.append((data[position + 1], data[position + 4 : end]))
        position = end
    rest = data[position:]
    for _ in range(rng.choice([1, 1, 2, 4])):
        index, action = rng.randrange(len(segments)), rng.randrange(5)
        marker, body = segments[index]
        if action == 0:
            segments[index] = (marker, mutate_bytes(rng, body or b"\0", seeds)[:65_000])
        elif action == 1 and len(segments) > 1:
            del segments[index]
        elif action == 2:
            segments.insert(rng.randrange(len(segments) + 1), (marker, body))
        elif action == 3:
            prefix = rng.choice(
                [b"Exif\0\0", b"ICC_PROFILE\0\1\1", b"Photoshop 3.0\x008BIM", b"JFIF\0", b"Adobe"]
            )
            odd = prefix + rng.randbytes(rng.randrange(30))
            segments.insert(index, (rng.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE]), odd))
        else:
            scan = rest[rest.rindex(b"\xff\xda") : -2]
            rest = rest[:-2] + scan * rng.choice([1, 30, 700]) + rest[-2:]
    header = b"".join(
        bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return data[:2] + header + rest


def _check(data: bytes, _: Path) -> str:
    asked = [0]
    try:
        pixels = decode_image(data, max_pixels=MAX_PIXELS, reserve=asked.append)
    except Reject as caught:
        reject = caught
    else:
        reject = None
    if reject:
        assert reject.stage == "decode"
        assert "\n" not in reject.message
        return reject.reason
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert 0 < pixels.size <= 3 * MAX_PIXELS
    assert max(asked) >= pixels.size
    return "pixels"


# An image of a million pixels may take 40 bytes a pixel; what Pillow's decoders keep is small.
TARGET = Target(_seeds, _check, max_growth_mib=96, mutate=_mutate)
