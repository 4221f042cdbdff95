"""Metadata that is damaged or large costs no pixel; what would cost time or memory is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from latentcache.errors import Reject
from latentcache.images import containers, formats
from latentcache.images.decode import decode_image

Chunk = tuple[bytes, bytes]

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"TEMP").replace(b"bXYZ", b"rXYZ").replace(b"TEMP", b"bXYZ")
TURNED = Image.Exif()
TURNED[0x0112] = 6
EXIF = TURNED.tobytes()


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return image.resize((48, 32), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decode(data: bytes, max_pixels: int = 10**6) -> NDArray[np.uint8]:
    return decode_image(data, max_pixels=max_pixels)


def reject_of(data: bytes, max_pixels: int = 10**6) -> Reject:
    with pytest.raises(Reject) as caught:
        decode(data, max_pixels)
    assert caught.value.stage == "decode"
    assert "\n" not in caught.value.message
    return caught.value


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def as_png(*chunks: Chunk) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture()))
HEADER = (b"IHDR", struct.pack(">IIBBBBB", 48, 32, 8, 2, 0, 0, 0))
PIXELS = (b"IDAT", zlib.compress(ROWS))
END = (b"IEND", b"")
PLAIN_PNG = as_png(HEADER, PIXELS, END)
BIG = bytes(range(256)) * 2**13
ORIENTED = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"

ODD_CHUNKS: dict[str, list[Chunk]] = {
    "zTXt of 2 MiB": [(b"zTXt", b"workflow\0\0" + zlib.compress(BIG))],
    "zTXt bomb": [(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000)))] * 80,
    "zTXt of another method": [(b"zTXt", b"k\0\7abc")],
    "iTXt of 2 MiB": [(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(BIG))],
    "XMP of 2 MiB": [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG))],
    "tEXt of 2 MiB": [(b"tEXt", b"parameters\0" + BIG)],
    "tEXt of 70 MiB": [(b"tEXt", b"p\0" + bytes(10 * 2**20))] * 7,
    "tEXt named as Pillow's finding": [(b"tEXt", b"transparency\0abc"), (b"tEXt", b"bbox\0abc")],
    "eXIf of 2 MiB": [(b"eXIf", BIG)],
    "eXIf that is none": [(b"eXIf", b"MM\0*\xff\xff\xff\xff")],
    "iCCP bomb": [(b"iCCP", b"p\0\0" + zlib.compress(bytes(64 * 2**20)))],
    "iCCP that is none": [(b"iCCP", b"p\0\0" + zlib.compress(bytes(200)))],
    "iCCP of another method": [(b"iCCP", b"p\0\7abc")],
    "iCCP without a name": [(b"iCCP", b"")],
    "short gAMA": [(b"gAMA", b"\0")],
    "short cHRM": [(b"cHRM", b"\0")],
    "empty sRGB": [(b"sRGB", b"")],
    "short pHYs": [(b"pHYs", b"\0")],
    "private chunk": [(b"prVt", b"x" * 2**20)],
    "animation that contradicts itself": [(b"acTL", b""), (b"fcTL", bytes(26))],
    "late frame": [(b"fdAT", b"\0")],
}


@pytest.mark.parametrize("name", ODD_CHUNKS)
@pytest.mark.parametrize("where", ["before the pixels", "after the pixels"])
def test_a_png_with_a_damaged_or_large_ancillary_chunk_is_decoded(name: str, where: str):
    odd = ODD_CHUNKS[name]
    before, after = (odd, []) if where == "before the pixels" else ([], odd)
    data = as_png(HEADER, *before, PIXELS, *after, END)
    np.testing.assert_array_equal(decode(data), np.asarray(picture()))


@pytest.mark.parametrize("kind", [b"tEXt", b"iCCP", b"eXIf", b"gAMA", b"prVt", b"acTL"])
def test_a_png_checksum_may_be_wrong_in_metadata_only(kind: bytes):
    for index in (1, 2):
        parts = [chunk(*HEADER), chunk(*PIXELS), chunk(*END)]
        bad = bytearray(chunk(kind, b"Comment\0\0and something"))
        bad[-1] ^= 1
        parts.insert(index, bytes(bad))
        pixels = decode(PLAIN_PNG[:8] + b"".join(parts))
        np.testing.assert_array_equal(pixels, np.asarray(picture()))
    damaged = bytearray(PLAIN_PNG)
    damaged[8 + 8 + 13] ^= 1  # the checksum of IHDR
    assert reject_of(bytes(damaged)).reason == "corrupt_image"


def test_a_plain_png_is_not_copied():
    info = [(b"gAMA", b"\0\0\xb1\x8f"), (b"pHYs", bytes(9)), (b"tEXt", b"Software\0x")]
    profile = (b"iCCP", b"p\0\0" + zlib.compress(SRGB))
    data = as_png(HEADER, *info, profile, (b"eXIf", ORIENTED), PIXELS, (b"tEXt", b"Date\0y"), END)
    stripped, profile = containers.strip_png(data)
    assert stripped is data
    assert profile is None


def test_png_orientation_and_profile_are_kept_beside_dropped_chunks():
    plain = decode(PLAIN_PNG).astype(int)
    odd = (b"tEXt", b"parameters\0" + BIG)
    profile = (b"iCCP", b"p\0\0" + zlib.compress(SWAPPED))
    oriented = decode(as_png(HEADER, odd, profile, (b"eXIf", ORIENTED), PIXELS, END)).astype(int)
    assert np.abs(oriented - np.rot90(plain, -1)[..., ::-1]).max() <= 2
    late = decode(as_png(HEADER, odd, PIXELS, odd, (b"eXIf", ORIENTED), END))
    np.testing.assert_array_equal(late, np.rot90(plain, -1))
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    np.testing.assert_array_equal(
        decode(as_png(HEADER, odd, (b"iTXt", xmp), PIXELS, END)), np.rot90(plain, -1)
    )


@pytest.mark.parametrize("padding", [2**20, 3 * 2**20, 64 * 2**20])
def test_a_padded_png_profile_is_applied(padding: int):
    profile = (b"iCCP", b"p\0\0" + zlib.compress(SWAPPED + bytes(padding)))
    pixels = decode(as_png(HEADER, profile, PIXELS, END)).astype(int)
    assert np.abs(pixels - np.asarray(picture())[..., ::-1]).max() <= 2


def palette_png(depth: int, *chunks: Chunk) -> bytes:
    header = struct.pack(">IIBBBBB", 8, 8, depth, 3, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(depth) for _ in range(8)))
    return as_png((b"IHDR", header), (b"IDAT", rows), *chunks, END)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("late", [[], [(b"PLTE", bytes(9))]], ids=["missing", "late"])
def test_a_png_with_a_missing_or_late_palette_is_a_reject(depth: int, late: list[Chunk]):
    reject = reject_of(palette_png(depth, *late))
    assert reject.reason == "corrupt_image"
    assert "AssertionError" in reject.message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "corrupt_image"),
        (AttributeError("no such thing\nand more"), "corrupt_image"),
        (RecursionError("too deep"), "corrupt_image"),
        (NotImplementedError(), "corrupt_image"),
        (type("PanicException", (BaseException,), {})("index out of bounds"), "corrupt_image"),
        (OSError("image file is truncated"), "truncated_image"),
        (Image.DecompressionBombError("too large"), "too_many_pixels"),
    ],
)
def test_any_exception_of_a_decoder_is_a_reject(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
):
    raise_in_load(monkeypatch, error)
    reject = reject_of(PLAIN_PNG)
    assert reject.reason == reason
    assert type(error).__name__ in reject.message or reason == "too_many_pixels"


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_exhausted_memory_is_not_a_reject(monkeypatch: pytest.MonkeyPatch, error: BaseException):
    raise_in_load(monkeypatch, error)
    with pytest.raises(type(error)):
        decode(PLAIN_PNG)


def test_an_interrupt_is_passed_on(monkeypatch: pytest.MonkeyPatch):
    raise_in_load(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        decode(PLAIN_PNG)


def raise_in_load(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)


# JPEG and WebP


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


JPEG = encoded(picture(), "JPEG", quality=90)
PROGRESSIVE = encoded(picture(), "JPEG", quality=90, progressive=True)

ODD_SEGMENTS: dict[str, bytes] = {
    "EXIF that is none": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "EXIF of garbage": segment(0xE1, b"Exif\0\0" + BIG[:60_000]),
    "EXIF of 20 MiB": segment(0xE1, b"Exif\0\0" + BIG[:65_000]) * 320,
    "XMP of 8 MiB": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + BIG[:65_000]) * 128,
    "ICC with a part missing": segment(0xE2, b"ICC_PROFILE\0\1\2" + SWAPPED),
    "ICC without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "ICC of 16 MiB": segment(0xE2, b"ICC_PROFILE\0\1\xff" + BIG[:65_000]) * 255,
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "Photoshop of garbage": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\1x"),
    "short Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "MPF of garbage": segment(0xE2, b"MPF\0" + bytes(range(60))),
    "many comments": segment(0xFE, b"") * 20_000,
}


@pytest.mark.parametrize("name", ODD_SEGMENTS)
@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_a_jpeg_with_a_damaged_or_large_segment_is_decoded(name: str, data: bytes):
    odd = data[:2] + ODD_SEGMENTS[name] + data[2:]
    np.testing.assert_array_equal(decode(odd), decode(data))


def test_jpeg_orientation_and_profile_are_kept_beside_dropped_segments():
    data = encoded(picture(), "JPEG", quality=95, exif=EXIF, icc_profile=SWAPPED)
    plain = decode(data)
    assert plain.shape == (48, 32, 3)
    for name in ("short Adobe", "short Photoshop", "short JFIF", "XMP of 8 MiB", "many comments"):
        behind = data.index(b"\xff\xdb")
        odd = data[:behind] + ODD_SEGMENTS[name] + data[behind:]
        np.testing.assert_array_equal(decode(odd), plain)


def test_a_jpeg_or_png_with_too_many_segments_is_a_reject():
    flood = JPEG[:2] + segment(0xFE, b"") * 70_000 + JPEG[2:]
    assert "absurd" in reject_of(flood).message
    flood = as_png(HEADER, *[(b"prVt", b"")] * 70_000, PIXELS, END)
    assert "absurd" in reject_of(flood).message


def riff(*chunks: Chunk) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def chunks_of(data: bytes) -> list[Chunk]:
    results, position = [], 12
    while position < len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        results.append((data[position : position + 4], data[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return results


@pytest.mark.parametrize("kind", [b"EXIF", b"XMP ", b"ICCP"])
@pytest.mark.parametrize("content", [b"", b"\0", BIG[:999], BIG * 4], ids=len)
def test_a_webp_with_damaged_or_large_metadata_is_decoded(kind: bytes, content: bytes):
    data = encoded(picture(), "WEBP", lossless=True, exif=EXIF, icc_profile=SRGB, xmp=b"<x/>")
    plain = decode(encoded(picture(), "WEBP", lossless=True))
    odd = riff(*((k, content if k == kind else c) for k, c in chunks_of(data)))
    turned = plain if kind == b"EXIF" else np.rot90(plain, -1)
    np.testing.assert_array_equal(decode(odd), turned)


def test_a_webp_whose_metadata_exceeds_the_file_is_decoded():
    data = encoded(picture(), "WEBP", lossless=True, xmp=b"<x/>")
    start = data.rindex(b"XMP ")
    odd = data[: start + 4] + b"\xff\xff\0\0" + data[start + 8 :]
    assert containers.strip_webp(data) is data
    np.testing.assert_array_equal(decode(odd), decode(data))


def test_an_avif_with_damaged_exif_keeps_its_pixels():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    plain = decode(encoded(picture(), "AVIF"))
    data = encoded(picture(), "AVIF", exif=exif)
    start = data.rindex(b"a description") - 26  # behind a header and one entry
    assert data[start : start + 4] in (b"MM\0*", b"II*\0")
    damaged = data[:start] + b"none" + data[start + 4 :]
    np.testing.assert_array_equal(decode(damaged), plain)
    np.testing.assert_array_equal(decode(data), plain)


# Bombs


def test_a_webp_with_a_huge_canvas_is_rejected_before_allocation():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    data[24:30] = (59_999).to_bytes(3, "little") * 2
    assert reject_of(bytes(data), 10**8).message.startswith("60000x60000")
    for options in ({}, {"lossless": True}):
        plain = encoded(picture(), "WEBP", **options)
        assert containers.read_webp_size(plain) == (48, 32)


def with_scans(data: bytes, num_more: int, between: bytes = b"") -> bytes:
    """Repeat the last scan of a progressive JPEG."""
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (between + last) * num_more + data[-2:]


@pytest.fixture
def never_decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Pixels of JPEGs are never decoded; the result counts how often that was asked for."""
    calls: list[int] = []
    monkeypatch.setattr("latentcache.images.decode._decode_jpeg", lambda *_: calls.append(1))
    monkeypatch.setattr("latentcache.images.decode._decode_by_pillow", lambda *_: calls.append(1))
    return lambda: len(calls)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "between",
    [b"", b"\xff\xd0\xff\xd7", b"\xff\xff\xff", segment(0xFE, b"x"), segment(0xDD, b"\0\1")],
    ids=["bare", "restarts", "fill", "comment", "interval"],
)
def test_a_jpeg_with_too_many_scans_is_rejected_before_decoding(
    never_decoded: Callable[[], int], mode: str, between: bytes
):
    data = encoded(picture().convert(mode), "JPEG", progressive=True)
    assert reject_of(with_scans(data, 600, between)).reason == "too_many_scans"
    assert not never_decoded()


def test_the_limit_of_scans_depends_on_the_image_size(never_decoded: Callable[[], int]):
    large = bytearray(with_scans(encoded(picture().convert("L"), "JPEG", progressive=True), 20))
    frame = large.index(b"\xff\xc2")
    large[frame + 5 : frame + 9] = struct.pack(">HH", 9000, 9000)
    assert reject_of(bytes(large), 10**8).reason == "too_many_scans"
    assert not never_decoded()


def test_sequential_jpegs_with_too_many_scans_are_rejected():
    """The components in scans of their own, which libjpeg then expects more of until the end."""
    parts = picture().convert("YCbCr").split()
    files = [encoded(part, "JPEG", quality=90) for part in parts]
    # One frame of three components, each with the gray file's tables, and a scan for each.
    frame = files[0].index(b"\xff\xc0")
    scan = files[0].index(b"\xff\xda")
    head = files[0][:frame] + segment(
        0xC0, files[0][frame + 4 : frame + 9] + b"\3\1\x11\0\2\x11\0\3\x11\0"
    )
    tables = files[0][frame + 2 + int.from_bytes(files[0][frame + 2 : frame + 4], "big") : scan]
    scans = b"".join(
        segment(0xDA, bytes((1, number, 0, 0, 63, 0))) + file[file.index(b"\xff\xda") + 10 : -2]
        for number, file in enumerate(files, start=1)
    )
    whole = head + tables + scans + b"\xff\xd9"
    assert np.abs(decode(whole).astype(int) - np.asarray(picture())).max() < 40
    last = scans[scans.rindex(b"\xff\xda") :]
    bomb = head + tables + scans + last * 600 + b"\xff\xd9"
    assert reject_of(bomb).reason == "too_many_scans"


def test_scans_of_thumbnails_and_appended_pictures_do_not_count():
    thumbnail = segment(0xE1, b"Exif\0\0" + b"\xff\xda" * 600)
    data = PROGRESSIVE[:2] + thumbnail + PROGRESSIVE[2:] + PROGRESSIVE * 100
    np.testing.assert_array_equal(decode(data), decode(PROGRESSIVE))
    few = with_scans(PROGRESSIVE, 200)
    expected = np.asarray(JpegImageFile(io.BytesIO(few)).convert("RGB"))
    np.testing.assert_array_equal(decode(few), expected)


@pytest.mark.parametrize("name", ["zTXt bomb", "iCCP bomb", "XMP of 2 MiB"])
def test_compressed_png_metadata_is_not_held_in_memory(name: str):
    data = as_png(HEADER, *ODD_CHUNKS[name], PIXELS, END)
    decode(data)
    tracemalloc.start()
    decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20


def test_an_image_without_pixels_is_a_reject():
    gif = bytearray(encoded(picture(), "GIF"))
    frame = gif.index(b",\0\0\0\0")
    gif[6:10] = gif[frame + 5 : frame + 9] = bytes(4)
    assert reject_of(bytes(gif)).reason == "corrupt_image"
    bmp = bytearray(encoded(picture(), "BMP"))
    bmp[18:22] = bytes(4)
    assert reject_of(bytes(bmp)).reason == "corrupt_image"


def test_the_number_of_reads_of_a_gif_is_limited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats._BoundedReads, "_num_left", 1000)
    gif = encoded(picture(), "GIF")
    start = gif.index(b",")
    flood = gif[:start] + b"!\xfe\0" * 1000 + gif[start:]
    assert decode(gif).shape == (32, 48, 3)
    assert "absurd" in reject_of(flood).message
