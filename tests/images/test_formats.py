"""Formats beside JPEG, PNG and WebP, against what Pillow shows of the same bytes."""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np
import pillow_heif
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from latentcache.errors import Reject
from latentcache.images import containers
from latentcache.images.decode import decode_image

pytest.importorskip("pillow_jxl")
pillow_heif.register_heif_opener()

WIDTH, HEIGHT = 61, 45
FORMATS = ("AVIF", "GIF", "BMP", "TIFF", "HEIF", "JXL")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")
LOSSLESS = {"TIFF": {"compression": "tiff_lzw"}, "BMP": {}}


def picture(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.tile(np.arange(WIDTH, dtype=np.uint8) * 4, (HEIGHT, 1))))
    return image.quantize(16) if mode == "P" else image.convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> NDArray[np.int64]:
    return decode_image(data, max_pixels=WIDTH * HEIGHT).astype(int)


def reject_of(data: bytes, max_pixels: int = WIDTH * HEIGHT) -> Reject:
    with pytest.raises(Reject) as caught:
        decode_image(data, max_pixels=max_pixels)
    assert caught.value.stage == "decode"
    assert "\n" not in caught.value.message
    return caught.value


def shown(data: bytes) -> NDArray[np.int64]:
    """What Pillow shows on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_pillows(image_format: str, mode: str):
    try:
        data = encoded(picture(mode), image_format)
    except (OSError, NotImplementedError, ValueError):
        return  # the format has no such mode
    pixels = decode(data)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(pixels - shown(data)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["AVIF", "TIFF", "HEIF"])
def test_the_orientation_is_applied(image_format: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), image_format, exif=exif.tobytes())
    pixels = decode(data)
    assert pixels.shape == ((HEIGHT, WIDTH, 3) if orientation < 5 else (WIDTH, HEIGHT, 3))
    np.testing.assert_array_equal(pixels, shown(data))


def test_the_orientation_of_jpeg_xl_is_applied_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "JXL", exif=exif.tobytes())
    assert decode(data).shape == (HEIGHT, WIDTH, 3)


def test_a_jpeg_recompressed_as_jpeg_xl_keeps_its_pixels(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(), "JPEG"))
    with Image.open(tmp_path / "a.jpg") as image:
        data = encoded(image, "JXL", lossless_jpeg=True)
    assert data.startswith(containers.JXL_CONTAINER)
    assert containers.read_jxl_size(data) == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(decode(data), decode((tmp_path / "a.jpg").read_bytes()))


@pytest.mark.parametrize("image_format", ["AVIF", "TIFF", "HEIF"])
def test_a_profile_is_converted_and_a_damaged_one_ignored(image_format: str):
    plain = decode(encoded(picture(), image_format))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"TEMP").replace(b"bXYZ", b"rXYZ").replace(b"TEMP", b"bXYZ")
    data = encoded(picture(), image_format, icc_profile=swapped)
    assert np.abs(decode(data) - plain[..., ::-1]).max() <= 3
    data = encoded(picture(), image_format, icc_profile=swapped[:200])
    np.testing.assert_array_equal(decode(data), plain)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_sixteen_bits_of_tiff_are_scaled(options: dict[str, object], byteorder: str):
    levels = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)

    def tiff(values: NDArray[np.uint16], **more: object) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, byteorder=byteorder, **options, **more)
        return buffer.getvalue()

    gray = levels[..., 0]
    for name in ("minisblack", "miniswhite") if byteorder == "<" else ("minisblack",):
        expected = np.rint(gray / 257)
        pixels = decode(tiff(gray, photometric=name))[..., 0]
        np.testing.assert_array_equal(pixels, 255 - expected if name == "miniswhite" else expected)
    np.testing.assert_allclose(decode(tiff(levels, photometric="rgb")), levels / 257, atol=1)


def test_twelve_bits_of_tiff_are_scaled():
    levels = np.linspace(0, 4095, 2048).astype(np.uint16).reshape(32, 64)
    even, odd = levels[:, ::2], levels[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], -1).astype(np.uint8)
    tags = {256: 64, 257: 32, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 32, 279: packed.size}
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag != 273 else 4, 1, value) for tag, value in tags.items()
    )
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed.tobytes()
    np.testing.assert_array_equal(decode(data)[..., 0], np.rint(levels / 4095 * 255))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint32])
def test_float_and_32_bit_images_are_rejects(dtype: type):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.ones((8, 8), dtype))
    reject = reject_of(buffer.getvalue())
    assert (reject.reason, "white is unknown" in reject.message) == ("unsupported_format", True)


@pytest.mark.parametrize("image_format", ["AVIF", "GIF", "TIFF", "HEIF"])
def test_the_first_frame_or_page_is_decoded(image_format: str):
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_pixel_limit_is_read_from_the_header(image_format: str):
    data = encoded(picture(), image_format)
    assert decode(data).shape == (HEIGHT, WIDTH, 3)
    assert reject_of(data, WIDTH * HEIGHT - 1).reason == "too_many_pixels"


@pytest.mark.parametrize(
    "size", [(8, 8), (256, 256), (600, 400), (1000, 37), (3, 700), (1920, 1080)]
)
def test_the_size_of_jpeg_xl_is_known_before_it_is_decoded(size: tuple[int, int]):
    assert containers.read_jxl_size(encoded(Image.new("L", size), "JXL", effort=1)) == size


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_truncated_file_is_a_reject(image_format: str):
    data = encoded(picture(), image_format)
    reasons = {reject_of(data[: len(data) * part // 8]).reason for part in range(1, 7)}
    expected = (
        {"truncated_image", "corrupt_image"} if image_format == "JXL" else {"truncated_image"}
    )
    assert reasons <= expected


def test_a_tiff_of_overlapping_strips_or_huge_tiles_is_a_reject():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((64, 64), np.uint8), rowsperstrip=1)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tiff:
        height = tiff.pages[0].tags["ImageLength"].valueoffset
        rows = tiff.pages[0].tags["RowsPerStrip"].valueoffset
    data[height], data[rows] = 48, 40  # 64 strips where two make the image
    assert "overlap" in reject_of(bytes(data)).message
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((64, 64), np.uint8), tile=(16, 16), compression="zlib")
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tiff:
        for name in ("TileWidth", "TileLength"):
            offset = tiff.pages[0].tags[name].valueoffset
            data[offset : offset + 2] = (32_000).to_bytes(2, "little")
    assert "tiles of 32000x32000" in reject_of(bytes(data)).message


@pytest.mark.parametrize(
    ("image_format", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")]
)
def test_without_its_plugin_the_reject_names_what_to_install(image_format: str, module: str):
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from latentcache.errors import Reject\n"
        "from latentcache.images.decode import decode_image\n"
        "try: decode_image(sys.stdin.buffer.read(), max_pixels=10**9)\n"
        "except Reject as reject: print(reject.reason, reject.message)"
    )
    data = encoded(picture(), image_format)
    done = subprocess.run(
        [sys.executable, "-c", program], input=data, stdout=subprocess.PIPE, check=True
    )
    assert b"unsupported_format" in done.stdout
    assert b"pip install 'latentcache[images]'" in done.stdout
