"""Decoding against pictures whose pixels are known, and against damage of every kind."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from latentcache.errors import Reject
from latentcache.images import jpeg
from latentcache.images.decode import decode_image

MAX_PIXELS = 10**6


def decode(data: bytes) -> NDArray[np.uint8]:
    return decode_image(data, max_pixels=MAX_PIXELS)


def reason_of(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(Reject) as caught:
        decode_image(data, max_pixels=max_pixels)
    assert caught.value.stage == "decode"
    assert "\n" not in caught.value.message
    return caught.value.reason


ORDINARY_INFO = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "progressive"}
ORDINARY_INFO |= {"progression", "adobe", "adobe_transform", "comment"}


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def blocks(width: int = 48, height: int = 32) -> Image.Image:
    """Flat blocks of random colours, which JPEG keeps well."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3))
    return Image.fromarray(np.kron(colours, np.ones((8, 8, 1))).astype(np.uint8))


def png(depth: int, colour_type: int, size: tuple[int, int], rows: bytes, **chunks: bytes) -> bytes:
    """Write a PNG by hand, for what Pillow reads but cannot write."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), body) for name, body in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


SAMPLES = {
    "baseline": encoded(blocks(), "JPEG", quality=90),
    "progressive": encoded(blocks(), "JPEG", progressive=True),
    "png": encoded(blocks(), "PNG"),
    "webp": encoded(blocks(), "WEBP"),
    "lossless": encoded(blocks(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_colour_images_equal_pillows_pixels_and_are_writable(name: str):
    pixels = decode(SAMPLES[name])
    expected = np.asarray(Image.open(io.BytesIO(SAMPLES[name])).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def textured(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Edges and grain, on which decoders that round or interpolate otherwise would differ."""
    rng = np.random.default_rng(width)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / a + y / b) * 90 + 128 for a, b in ((3, 9), (7, 2), (5, 4))], -1)
    pixels = waves + rng.normal(0, 20, waves.shape) + (x // 8 % 2 * 60)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


JPEG_OPTIONS: dict[str, dict[str, object]] = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "progressive": {"progressive": True, "subsampling": "4:2:0"},
    "restarts by blocks": {"restart_marker_blocks": 3},
    "restarts by rows": {"restart_marker_rows": 1, "subsampling": "4:2:0"},
    "best": {"quality": 100, "subsampling": "4:4:4"},
    "own tables": {"optimize": True},
    "worst": {"quality": 1},
    "stored as RGB": {"keep_rgb": True},
    "with a comment": {"comment": b"\xff\xda\xff\xe1\xff\xd9"},
}


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 33), (16, 300), (301, 7), (250, 189)])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name in JPEG_OPTIONS
        for mode in ("RGB", "L", "CMYK")
        if mode == "RGB" or name != "stored as RGB"
    ],
)
def test_jpegs_of_all_encodings_equal_pillows_pixels(name: str, mode: str, size: tuple[int, int]):
    data = encoded(textured(*size, mode), "JPEG", **JPEG_OPTIONS[name])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    # By which of the two decoders:
    colour = jpeg.decode_jpeg(data, size, "RGB", 1) if mode != "CMYK" else expected
    np.testing.assert_array_equal(colour, expected)
    is_plain = mode != "CMYK" and name != "progressive"
    assert jpeg.read_plain_size(data) == (size if is_plain else None)


def test_gray_and_one_bit_images_decode_to_equal_channels():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(gray), "PNG")), np.stack([gray] * 3, -1)
    )
    bits = Image.fromarray(gray > 100)
    assert bits.mode == "1"
    np.testing.assert_array_equal(decode(encoded(bits, "PNG"))[..., 1], (gray > 100) * 255)


def test_a_palette_image_decodes_to_its_colours():
    image = blocks().quantize(16, dither=Image.Dither.NONE)
    assert image.mode == "P"
    np.testing.assert_array_equal(decode(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_alpha_is_composited_over_white():
    colour = np.zeros((1, 5, 4), np.uint8)
    colour[..., 0] = 200
    colour[0, :, 3] = [0, 64, 128, 254, 255]
    alpha = colour[0, :, 3] / 255
    for image_format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        pixels = decode(encoded(Image.fromarray(colour), image_format, **options))[0]
        np.testing.assert_allclose(pixels[:, 0], 200 * alpha + 255 * (1 - alpha), atol=1)
        np.testing.assert_allclose(pixels[:, 1], 255 * (1 - alpha), atol=1)
    gray = decode(encoded(Image.fromarray(colour).convert("LA"), "PNG"))[0]
    np.testing.assert_allclose(gray[:, 2], 60 * alpha + 255 * (1 - alpha), atol=1)


def test_trns_transparency_is_composited_over_white():
    one, two = (200, 10, 20), (30, 40, 50)
    palette = bytes((*one, *two))
    rows = b"\0\x00\x01"
    by_table = decode(png(8, 3, (2, 1), rows, PLTE=palette, tRNS=b"\x80\xff"))
    np.testing.assert_allclose(by_table[0], [(227, 132, 137), two], atol=1)
    by_index = decode(png(8, 3, (2, 1), rows, PLTE=palette, tRNS=b"\x00"))
    np.testing.assert_array_equal(by_index[0], [(255, 255, 255), two])
    key = struct.pack(">HHH", *one)
    by_colour = decode(png(8, 2, (2, 1), b"\0" + palette, tRNS=key))
    np.testing.assert_array_equal(by_colour[0], [(255, 255, 255), two])
    by_level = decode(png(8, 0, (2, 1), b"\0\x05\x06", tRNS=struct.pack(">H", 5)))
    np.testing.assert_array_equal(by_level[0, :, 0], [255, 6])
    by_bit = decode(png(1, 0, (2, 1), b"\0\x40", tRNS=struct.pack(">H", 0)))
    np.testing.assert_array_equal(by_bit[0, :, 0], [255, 255])


def test_sixteen_bits_are_scaled_not_truncated():
    levels = np.array([0, 128, 129, 255, 256, 257, 32767, 32768, 65407, 65535], np.uint16)
    rows = b"\0" + levels.astype(">u2").tobytes()
    gray = decode(png(16, 0, (len(levels), 1), rows))
    np.testing.assert_array_equal(gray[0, :, 0], np.rint(levels / 257))
    colour = decode(png(16, 2, (2, 1), b"\0" + levels[-6:].astype(">u2").tobytes()))
    np.testing.assert_allclose(colour.reshape(-1), levels[-6:] / 257, atol=1)
    with_alpha = np.array([65535, 0, 32768, 65535, 65535, 0, 0, 0], ">u2")
    np.testing.assert_array_equal(
        decode(png(16, 6, (2, 1), b"\0" + with_alpha.tobytes()))[0], [(255, 0, 128), (255,) * 3]
    )
    keyed = png(16, 2, (1, 1), b"\0" + bytes(6), tRNS=struct.pack(">HHH", 60_000, 1, 2))
    assert decode(keyed).shape == (1, 1, 3)


def test_inverted_cmyk_is_decoded():
    image = Image.merge("CMYK", [Image.new("L", (16, 16), ink) for ink in (0, 255, 255, 0)])
    pixels = decode(encoded(image, "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


def exif_with(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, image_format: str):
    data = encoded(blocks(), image_format, exif=exif_with(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data), np.asarray(upright))
    assert decode(data).shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_an_orientation_in_xmp_alone_is_applied(image_format: str):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(blocks(), image_format, xmp=xmp, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == (32, 48)
    np.testing.assert_array_equal(decode(data), np.asarray(upright))


def red_blue_swapped_profile() -> bytes:
    """A valid profile whose red primary is sRGB's blue one, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"TEMP").replace(b"bXYZ", b"rXYZ").replace(b"TEMP", b"bXYZ")


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_an_icc_profile_is_converted_to_srgb(image_format: str):
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = blocks()
    plain = decode(encoded(image, image_format, **options)).astype(int)
    data = encoded(image, image_format, icc_profile=red_blue_swapped_profile(), **options)
    assert np.abs(decode(data).astype(int) - plain[..., ::-1]).max() <= 2


def test_an_srgb_profile_changes_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    np.testing.assert_array_equal(decode(encoded(image, "PNG", icc_profile=srgb)), image)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_broken_or_foreign_profile_is_ignored(mode: str):
    image = blocks().convert(mode)
    plain = decode(encoded(image, "JPEG"))
    profiles = [b"no profile at all", red_blue_swapped_profile()[:200]]
    if mode != "RGB":
        profiles.append(red_blue_swapped_profile())
    for profile in profiles:
        np.testing.assert_array_equal(decode(encoded(image, "JPEG", icc_profile=profile)), plain)


def test_an_image_with_alpha_is_converted_by_its_profile():
    rgba = blocks().convert("RGBA")
    rgba.putalpha(128)
    plain = decode(encoded(rgba, "PNG")).astype(int)
    data = encoded(rgba, "PNG", icc_profile=red_blue_swapped_profile())
    assert np.abs(decode(data).astype(int) - plain[..., ::-1]).max() <= 2


@pytest.mark.parametrize("image_format", ["WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_decoded(image_format: str):
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "lime", "blue")]
    data = encoded(
        frames[0],
        image_format,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if image_format == "WEBP" else {}),
    )
    assert (decode(data) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"a caption that a user saved as .jpg\n", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (bytes(5000), "not_an_image"),
        (b"\xff", "not_an_image"),
        (b"%PDF-1.7\n", "unsupported_format"),
        (b"\0\0\0\x18ftypmp42" + bytes(20), "unsupported_format"),
        (b"\0\0\0\x20ftypavif" + bytes(20), "corrupt_image"),
        (b"\0\0\0\x21ftypavif" + bytes(20), "truncated_image"),
        (b"GIF89a" + bytes(20), "truncated_image"),
        (b"\xff\xd8\xff\xe0", "truncated_image"),
        (SAMPLES["baseline"][:400], "truncated_image"),
        (b"\xff\xd8\xff" + bytes(200) + b"\xff\xd9", "corrupt_image"),
        (SAMPLES["png"][:50] + bytes(200) + SAMPLES["png"][250:], "corrupt_image"),
        (SAMPLES["webp"][:20] + bytes(len(SAMPLES["webp"]) - 20), "corrupt_image"),
    ],
)
def test_data_that_is_no_image_is_rejected_with_a_reason(data: bytes, reason: str):
    assert reason_of(data) == reason


@pytest.mark.parametrize("name", SAMPLES)
def test_a_truncated_image_is_rejected_unless_all_pixels_are_present(name: str):
    data = SAMPLES[name]
    whole = decode(data)
    for end in range(12, len(data)):
        try:
            pixels = decode(data[:end])
        except Reject as reject:
            reason = reject.reason
        else:
            reason = None
            np.testing.assert_array_equal(pixels, whole)
        assert reason in (None, "truncated_image"), end


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4))),
)
def test_damaged_images_raise_only_reject(name: str, patches: list[tuple[float, bytes]]):
    data = bytearray(SAMPLES[name])
    for where, patch in patches:
        start = int(where**2 * len(data))  # more often in the headers
        data[start : start + len(patch)] = patch
    try:
        pixels = decode(bytes(data))
    except Reject as reject:
        assert reject.reason  # noqa: PT017  (either outcome is right)
    else:
        assert pixels.shape[2] == 3


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["baseline", "progressive"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.2, 3),
)
def test_damaged_jpegs_decode_as_in_pillow(
    name: str, patches: list[tuple[float, int]], power: float
):
    data = bytearray(SAMPLES[name])
    for where, byte in patches:
        data[2 + int(where**power * (len(data) - 3))] = byte
    try:
        image = JpegImageFile(io.BytesIO(bytes(data)))
        if image.width * image.height > MAX_PIXELS or len(image.info.keys() - ORDINARY_INFO):
            return  # another rule decides
        expected = np.asarray(image.convert("RGB"))
    except Exception:  # noqa: BLE001  (whatever Pillow stumbles over)
        with pytest.raises(Reject, match=r"ends early|damaged"):
            decode(bytes(data))
    else:
        np.testing.assert_array_equal(decode(bytes(data)), expected)


def test_a_decompression_bomb_is_rejected_by_its_header():
    jpeg_bomb = bytearray(SAMPLES["baseline"])
    frame = jpeg_bomb.index(b"\xff\xc0")
    jpeg_bomb[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    assert reason_of(bytes(jpeg_bomb), max_pixels=100_000_000) == "too_many_pixels"
    png_bomb = png(8, 2, (60_000, 60_000), b"")
    assert reason_of(png_bomb, max_pixels=100_000_000) == "too_many_pixels"
    webp = bytearray(encoded(blocks().convert("RGBA"), "WEBP", exif=exif_with(1)))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xfe\x3f\x00\xfe\x3f\x00"
    assert reason_of(bytes(webp), max_pixels=100_000_000) == "too_many_pixels"


def test_the_pixel_limit_is_inclusive():
    assert decode_image(SAMPLES["png"], max_pixels=48 * 32).shape == (32, 48, 3)
    assert reason_of(SAMPLES["png"], max_pixels=48 * 32 - 1) == "too_many_pixels"


def test_pillows_own_pixel_limit_does_not_apply():
    """It warns above 89 million pixels, which is an error in these tests."""
    assert reason_of(png(8, 2, (12_000, 8_000), b""), max_pixels=95_999_999) == "too_many_pixels"


def test_broken_exif_prints_no_warning():
    broken_exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a\x01\x05\0"
    data = encoded(blocks(), "JPEG", exif=broken_exif)
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(data)).getexif()
    program = (
        "import sys; from latentcache.images.decode import decode_image\n"
        "from latentcache.startup import start_process; start_process()\n"
        "print(decode_image(sys.stdin.buffer.read(), max_pixels=10**9).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        input=data,
        capture_output=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == (b"(48, 32, 3)", b"")


def test_threads_decode_the_same_pixels():
    profiled = encoded(blocks(), "PNG", icc_profile=red_blue_swapped_profile())
    work = [*SAMPLES.values(), profiled] * 20
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, work))
    for pixels, data in zip(together, work, strict=True):
        np.testing.assert_array_equal(pixels, decode(data))
