"""The transform against Pillow's bicubic, and its arithmetic against exact fractions."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from latentcache.dataset.bucket import Bucket
from latentcache.demo.draw import draw_image
from latentcache.errors import ConfigError, Reject
from latentcache.images.transform import (
    MAX_CROP_FACTOR,
    TransformSpec,
    choose_bucket,
    load_image,
    ratio_buckets,
    transform,
)

BUCKETS_512 = ratio_buckets(512, 2.0, 64)
sides = st.one_of(st.integers(1, 8), st.integers(1, 1500))
buckets = st.builds(Bucket, st.integers(1, 40).map(lambda n: 8 * n), st.integers(1, 40))


def spec_of(*sizes: Bucket, min_side_px: int | None = None, max_upscale: float | None = None):
    return TransformSpec(sizes, min_side_px, max_upscale, max_pixels=10**9)


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def stripes(width: int, height: int) -> NDArray[np.uint8]:
    """Hard edges, so that the filter overshoots 0 and 255 everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x // 3 % 2 * 255, y // 2 % 2 * 255, (x + y) // 5 % 2 * 255], -1).astype(
        np.uint8
    )


def pillow_reference(image: NDArray[np.uint8], bucket: Bucket) -> NDArray[np.uint8]:
    """Resize with Pillow to the exact covering size (as a fraction, half up) and crop."""
    height, width = image.shape[:2]
    scale = max(Fraction(bucket.width_px, width), Fraction(bucket.height_px, height))
    size = tuple(math.floor(side * scale + Fraction(1, 2)) for side in (width, height))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - bucket.width_px) // 2, (size[1] - bucket.height_px) // 2
    return np.asarray(resized.crop((left, top, left + bucket.width_px, top + bucket.height_px)))


def reject_reason(image: NDArray[np.uint8], spec: TransformSpec) -> str | None:
    try:
        transform(image, spec)
    except Reject as reject:
        return reject.reason
    return None


def difference(image: NDArray[np.uint8], bucket: Bucket) -> NDArray[np.int64]:
    pixels = transform(image, spec_of(bucket)).pixels
    return np.abs(
        pixels.permute(1, 2, 0).numpy().astype(np.int64) - pillow_reference(image, bucket)
    )


def test_pixels_are_pillows_bicubic_within_two_levels_over_many_sizes():
    rng = np.random.default_rng(7)
    means = []
    for i in range(400):
        width, height = (int(2 ** rng.uniform(0, 9.5)) for _ in range(2))
        if i % 10 == 0:
            width = 1
        if i % 10 == 1:
            height = 1
        bucket = Bucket(*(8 * int(rng.integers(1, 40)) for _ in range(2)))
        image = noise(width, height, i) if i % 2 else stripes(width, height)
        if (reason := reject_reason(image, spec_of(bucket))) is not None:
            assert reason == "aspect_ratio"
            continue
        worst = difference(image, bucket)
        assert worst.max() <= 2, (width, height, bucket)
        means.append(worst.mean())
    assert len(means) > 200
    assert np.mean(means) < 0.1


def whole_reference(image: NDArray[np.uint8], bucket: Bucket) -> tuple[torch.Tensor, bool]:
    """The whole image by torch, then the crop; and whether the crop may begin at whole pixels."""
    height, width = image.shape[:2]
    scale = max(Fraction(bucket.width_px, width), Fraction(bucket.height_px, height))
    new_width, new_height = (math.floor(side * scale + Fraction(1, 2)) for side in (width, height))
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    if new_height < height and height - new_height > 2 * (width - new_width):
        pixels = F.interpolate(pixels, (new_height, width), mode="bicubic", antialias=True)
    pixels = F.interpolate(pixels, (new_height, new_width), mode="bicubic", antialias=True)[0]
    left, top = (new_width - bucket.width_px) // 2, (new_height - bucket.height_px) // 2
    meets = any(
        0 < new // math.gcd(old, new) < offset - 8
        for old, new, offset in ((width, new_width, left), (height, new_height, top))
    )
    return pixels[:, top : top + bucket.height_px, left : left + bucket.width_px], meets


def test_resizing_only_the_crop_is_bit_identical_to_resizing_all():
    rng = np.random.default_rng(3)
    num_meeting = 0
    sizes = [(1920, 1080), (1080, 1920), (1280, 720), (196, 8), (379, 134), (181, 16), (13, 45)]
    chosen = [Bucket(512, 512)] * 3 + [
        Bucket(216, 8),
        Bucket(32, 136),
        Bucket(240, 8),
        Bucket(8, 64),
    ]
    while len(sizes) < 250:
        step = int(rng.integers(1, 60))
        sizes.append(tuple(step * int(rng.integers(1, 2 + 400 // step)) for _ in range(2)))
        chosen.append(Bucket(*(8 * int(rng.integers(1, 40)) for _ in range(2))))
    for number, ((width, height), bucket) in enumerate(zip(sizes, chosen, strict=True)):
        image = noise(width, height, number) if number % 2 else stripes(width, height)
        if number % 3 == 0:  # as after an EXIF orientation that swaps the sides
            image = np.ascontiguousarray(image.swapaxes(0, 1)).swapaxes(0, 1)
        if reject_reason(image, spec_of(bucket)) is not None:
            continue
        expected, meets = whole_reference(image, bucket)
        assert torch.equal(transform(image, spec_of(bucket)).pixels, expected), number
        num_meeting += meets
    assert num_meeting > 20


@pytest.mark.parametrize("size", [(1000, 667), (667, 1000), (3000, 2000), (300, 1100), (1100, 300)])
def test_photograph_sized_pictures_match_pillow_closely(size: tuple[int, int]):
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    waves = [127.5 + 127.5 * np.sin(x / a + y / b) for a, b in ((9, 40), (33, 7), (120, 90))]
    worst = difference(np.stack(waves, -1).astype(np.uint8), Bucket(256, 256))
    assert worst.max() <= 2
    assert worst.mean() < 0.02


def test_an_image_of_the_buckets_size_passes_through():
    image = noise(64, 48)
    done = transform(image, spec_of(Bucket(64, 48)))
    assert torch.equal(done.pixels, torch.from_numpy(image).permute(2, 0, 1))
    assert done.pixels.permute(1, 2, 0).is_contiguous()
    assert (done.crop_top, done.crop_left) == (0, 0)


@settings(deadline=None, max_examples=200)
@given(sides, sides, st.lists(buckets, min_size=1, max_size=6))
def test_the_resized_image_always_covers_the_bucket(width: int, height: int, choice: list[Bucket]):
    image = np.zeros((height, width, 3), np.uint8)
    if (reason := reject_reason(image, spec_of(*choice))) is not None:
        assert reason == "aspect_ratio"
        return
    done = transform(image, spec_of(*choice))
    bucket = done.bucket
    assert done.pixels.shape == (3, bucket.height_px, bucket.width_px)
    assert done.pixels.dtype == torch.uint8
    assert (done.original_width, done.original_height) == (width, height)
    # One of the two offsets is 0, the other leaves as much on the far side, or one pixel more.
    assert min(done.crop_top, done.crop_left) == 0
    scale = max(Fraction(bucket.width_px, width), Fraction(bucket.height_px, height))
    surplus = max(height * scale - bucket.height_px, width * scale - bucket.width_px)
    assert abs(2 * max(done.crop_top, done.crop_left) - surplus) <= Fraction(3, 2)


@given(sides, sides, st.lists(buckets, min_size=1, max_size=12), st.randoms())
def test_the_chosen_bucket_is_the_nearest_and_the_order_does_not_matter(
    width: int, height: int, choice: list[Bucket], random
):
    chosen = choose_bucket(width, height, choice)

    def distance(bucket: Bucket) -> Fraction:
        ratio = Fraction(width * bucket.height_px, height * bucket.width_px)
        return max(ratio, 1 / ratio)

    assert distance(chosen) == min(map(distance, choice))
    shuffled = list(choice)
    random.shuffle(shuffled)
    assert choose_bucket(width, height, shuffled) == chosen


def test_of_equally_near_buckets_the_largest_then_the_widest_is_chosen():
    assert choose_bucket(300, 300, [Bucket(256, 256), Bucket(512, 512)]) == Bucket(512, 512)
    assert choose_bucket(300, 300, [Bucket(256, 512), Bucket(512, 256)]) == Bucket(512, 256)


def test_ratio_buckets_of_512():
    names = [bucket.name for bucket in BUCKETS_512]
    assert names == [
        "384x640", "384x704", "448x576", "512x512", "576x448", "640x384", "704x384",
    ]  # fmt: skip


@given(
    st.integers(1, 32),
    st.sampled_from([8, 32, 64, 128]),
    st.floats(1.0, 16.0),
)
def test_ratio_buckets_respect_step_area_and_ratio(num_steps: int, step_px: int, max_ratio: float):
    resolution_px = num_steps * step_px
    buckets = ratio_buckets(resolution_px, max_ratio, step_px)
    sizes = [(b.width_px, b.height_px) for b in buckets]
    assert sizes == sorted(set(sizes))
    assert (resolution_px, resolution_px) in sizes
    assert {(h, w) for w, h in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step_px == 0
        assert height % step_px == 0
        assert max(width, height) <= max_ratio * min(width, height)
        # Nearest multiple: the area is off by at most half a step of the long side.
        assert abs(width * height - resolution_px**2) <= max(width, height) * step_px / 2
    # Nothing within the ratio is left out at the end.
    long = max(sizes)[0] + step_px
    short = round(resolution_px**2 / long / step_px) * step_px
    assert short == 0 or long > max_ratio * short


def test_a_resolution_that_is_no_multiple_of_the_step_is_a_config_error():
    with pytest.raises(ConfigError, match=r"transform\.resolution_px 500 .*step_px 64"):
        ratio_buckets(500, 2.0, 64)


@pytest.mark.parametrize(
    ("size", "limits", "reason", "text"),
    [
        ((63, 400), {"min_side_px": 64}, "too_small", "63x400.*min_side_px 64"),
        ((100, 64), {"max_upscale": 3.9}, "upscaled", "100x64 to 256x256 enlarges 4 times"),
        ((60_000, 1), {}, "aspect_ratio", "60000x1"),
        ((1, 60_000), {}, "aspect_ratio", "1x60000"),
    ],
)
def test_too_small_upscaled_and_elongated_images_are_rejects(
    size: tuple[int, int], limits: dict[str, float], reason: str, text: str
):
    image = np.zeros((size[1], size[0], 3), np.uint8)
    with pytest.raises(Reject, match=text) as caught:
        transform(image, spec_of(Bucket(256, 256), **limits))
    assert (caught.value.stage, caught.value.reason) == ("transform", reason)


def test_limits_are_inclusive():
    spec = spec_of(Bucket(256, 256), min_side_px=64, max_upscale=4.0)
    assert transform(noise(64, 100), spec).bucket == Bucket(256, 256)
    strip = noise(64 * MAX_CROP_FACTOR, 64)
    assert transform(strip, spec).crop_left == (256 * MAX_CROP_FACTOR - 256) // 2


def as_jpeg(pixels: NDArray[np.uint8], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def scaling_spec(*sizes: Bucket, **limits: float) -> TransformSpec:
    return replace(spec_of(*sizes, **limits), dct_scaling=True)


def psnr_db(one: torch.Tensor, other: torch.Tensor) -> float:
    error = (one.double() - other.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize(
    ("size", "side", "denominator"),
    [((397, 301), 64, 2), ((613, 517), 64, 4), ((517, 613), 32, 8), ((523, 519), 32, 8)],
)
def test_scaled_decoding_is_close_to_full_decoding(
    size: tuple[int, int], side: int, denominator: int, subsampling: str
):
    pixels, _ = draw_image(np.random.default_rng(size[0]), *size)
    data = as_jpeg(pixels, subsampling=subsampling)
    full = load_image(data, spec_of(Bucket(side, side)))
    asked = []

    def reserve(num_bytes: int) -> None:
        asked.append(num_bytes)

    scaled = load_image(data, scaling_spec(Bucket(side, side)), reserve)
    assert psnr_db(scaled.pixels, full.pixels) > 45
    assert not torch.equal(scaled.pixels, full.pixels)
    assert asked == [size[0] * size[1] * 3 // denominator**2]
    assert replace(scaled, pixels=full.pixels) == full, "bucket, sizes and crop are of the whole"


def test_scaled_decoding_keeps_orientation_and_gray_and_leaves_other_formats_alone():
    pixels, _ = draw_image(np.random.default_rng(5), 600, 401)
    bucket = Bucket(48, 64)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = as_jpeg(pixels, exif=exif)
        full, scaled = (load_image(turned, f(bucket)) for f in (spec_of, scaling_spec))
        sizes = (scaled.original_width, scaled.original_height)
        assert sizes == ((401, 600) if orientation > 4 else (600, 401))
        assert psnr_db(scaled.pixels, full.pixels) > 45, orientation
    gray = as_jpeg(pixels[..., 1])
    full, scaled = (load_image(gray, f(bucket)) for f in (spec_of, scaling_spec))
    assert psnr_db(scaled.pixels, full.pixels) > 45
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", compress_level=1)
    for data in (cmyk.getvalue(), png.getvalue()):
        full, scaled = (load_image(data, f(bucket)) for f in (spec_of, scaling_spec))
        assert torch.equal(scaled.pixels, full.pixels)


def test_scaled_decoding_has_the_same_rejects_as_full_decoding():
    strip = as_jpeg(np.zeros((40, 6000, 3), np.uint8))
    small = as_jpeg(np.zeros((500, 700, 3), np.uint8))
    for spec, data, reason in (
        (scaling_spec(Bucket(16, 16)), strip, "aspect_ratio"),
        (scaling_spec(Bucket(64, 64), min_side_px=501), small, "too_small"),
        (replace(scaling_spec(Bucket(64, 64)), max_pixels=349_999), small, "too_many_pixels"),
        (scaling_spec(Bucket(64, 64)), small[: len(small) // 2], "truncated_image"),
    ):
        with pytest.raises(Reject) as caught:
            load_image(data, spec)
        assert caught.value.reason == reason


def test_jpegs_below_twice_the_size_are_decoded_in_full():
    bucket = Bucket(96, 96)
    for size, is_scaled in (((400, 383), False), ((384, 384), True), ((2000, 383), False)):
        data = as_jpeg(draw_image(np.random.default_rng(1), *size)[0])
        full, scaled = (load_image(data, f(bucket)).pixels for f in (spec_of, scaling_spec))
        assert torch.equal(full, scaled) != is_scaled, size
