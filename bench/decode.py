"""Measure decoding and the transform on one core: JPEG bytes to a square crop, against other tools.

`make bench`, or `python bench/decode.py [--rounds 5]`. There are two jobs: photographs of 0.2
megapixels to 256 px, and 1080p JPEGs (quality 90, 4:2:0) to 512 px. The 1080p JPEGs are enlarged
photographs, which have few bytes, and mosaics of twelve photographs, which have many. The benchmark
prints images/s of each contender on one thread, our speed-up over it, and the distance of its
pixels from a bicubic resize in float64 of its own decoded image. It writes
bench/results/decode.json. The photographs are those in ../shared/data, or drawn pictures if that
folder is absent.

Each contender gets the bytes of the file and returns a uint8 array [side, side, 3]. Only ours also
applies EXIF orientation, converts ICC profiles to sRGB and refuses truncated files.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from harness import print_table, take_turns, write_results
from latentcache.dataset.bucket import Bucket
from latentcache.demo.draw import draw_image
from latentcache.images.decode import decode_image
from latentcache.images.transform import TransformSpec, load_image

Pixels = NDArray[np.uint8]

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
NUM_LARGE = 8
NUM_COMPARED = 32  # pictures of a job whose errors are measured
OURS = "latentcache"


def covering(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / min(width, height)
    return int(width * scale + 0.5), int(height * scale + 0.5)


def crop_box(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def open_rgb(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def by_pil(resample: Image.Resampling) -> Callable[[bytes, int], Pixels]:
    def load(data: bytes, side: int) -> Pixels:
        image = open_rgb(data)
        image = image.resize(covering(*image.size, side), resample)
        return np.asarray(image.crop(crop_box(*image.size, side)))

    return load


def by_adm(data: bytes, side: int) -> Pixels:
    """Resize as the training code of ADM and DiT does: halve by averaging while the image is large.

    Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021).
    """
    image = open_rgb(data)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(covering(*image.size, side), Image.Resampling.BICUBIC)
    left, top, right, bottom = crop_box(*image.size, side)
    return np.asarray(image)[top:bottom, left:right]


def by_kohya(data: bytes, side: int) -> Pixels:
    """Resize as the scripts of kohya do: area averages (OpenCV) to shrink, Lanczos to enlarge."""
    image = open_rgb(data)
    width, height = size = covering(*image.size, side)
    if size < image.size:
        pixels = cv2.resize(np.array(image), size, interpolation=cv2.INTER_AREA)
    else:
        pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
    left, top, right, bottom = crop_box(width, height, side)
    return np.asarray(pixels[top:bottom, left:right], np.uint8)


def read_by_opencv(data: bytes, flags: int) -> Pixels:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert pixels is not None
    return np.asarray(pixels, np.uint8)


def by_opencv(interpolation: int) -> Callable[[bytes, int], Pixels]:
    def load(data: bytes, side: int) -> Pixels:
        pixels = read_by_opencv(data, cv2.IMREAD_COLOR)
        width, height = size = covering(pixels.shape[1], pixels.shape[0], side)
        left, top, right, bottom = crop_box(width, height, side)
        resized = cv2.resize(pixels, size, interpolation=interpolation)
        crop = cv2.cvtColor(resized[top:bottom, left:right], cv2.COLOR_BGR2RGB)
        return np.asarray(crop, np.uint8)

    return load


def by_us(*, dct_scaling: bool) -> Callable[[bytes, int], Pixels]:
    base = TransformSpec((), None, None, 10**8, dct_scaling)

    def load(data: bytes, side: int) -> Pixels:
        spec = replace(base, buckets=(Bucket(side, side),))
        return load_image(data, spec).pixels.permute(1, 2, 0).numpy()

    return load


def decode_by_us(data: bytes) -> Pixels:
    return decode_image(data, max_pixels=10**8)


def decode_by_pil(data: bytes) -> Pixels:
    return np.asarray(open_rgb(data))


def decode_by_opencv(data: bytes) -> Pixels:
    return read_by_opencv(data, cv2.IMREAD_COLOR_RGB)


# Each contender with the decoder whose pixels it resizes.
CONTENDERS: dict[str, tuple[Callable[[bytes, int], Pixels], Callable[[bytes], Pixels]]] = {
    OURS: (by_us(dct_scaling=False), decode_by_us),
    "latentcache, dct_scaling": (by_us(dct_scaling=True), decode_by_us),
    "PIL Lanczos": (by_pil(Image.Resampling.LANCZOS), decode_by_pil),
    "PIL bicubic": (by_pil(Image.Resampling.BICUBIC), decode_by_pil),
    "ADM, fast-DiT": (by_adm, decode_by_pil),
    "kohya": (by_kohya, decode_by_pil),
    "OpenCV cubic": (by_opencv(cv2.INTER_CUBIC), decode_by_opencv),
    "OpenCV area": (by_opencv(cv2.INTER_AREA), decode_by_opencv),
}


def bicubic_weights(length: int, new_length: int) -> NDArray[np.float64]:
    """Return rows of antialiased bicubic weights, [new_length, length].

    The kernel is that of Keys (1981) with a = -0.5, scaled to the distance between output pixels.
    """
    step = length / new_length
    centers = (np.arange(new_length)[:, None] + 0.5) * step
    x = np.abs(np.arange(length) + 0.5 - centers) / max(step, 1.0)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    total: NDArray[np.float64] = weights.sum(axis=1, keepdims=True)
    return weights / total


def exact_resize(pixels: Pixels, side: int) -> NDArray[np.float64]:
    """Resize and crop in float64, without rounding or clamping before the end."""
    height, width = pixels.shape[:2]
    new_width, new_height = covering(width, height, side)
    left, top, right, bottom = crop_box(new_width, new_height, side)
    across = bicubic_weights(width, new_width)[left:right]
    narrow = across @ pixels.astype(np.float64)  # [height, side, 3]
    down = bicubic_weights(height, new_height)[top:bottom]
    exact: NDArray[np.float64] = (down @ narrow.reshape(height, -1)).reshape(side, side, 3)
    return exact.clip(0, 255)


def find_errors(jpegs: Sequence[bytes], side: int) -> dict[str, tuple[float, float]]:
    """Return the mean and the maximum absolute difference of each contender, in levels of 255."""
    differences: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for data in jpegs[:: max(1, len(jpegs) // NUM_COMPARED)]:
        decoders = {decode for _, decode in CONTENDERS.values()}
        exact = {decode: exact_resize(decode(data), side) for decode in decoders}
        for name, (load, decode) in CONTENDERS.items():
            difference = np.abs(load(data, side) - exact[decode])
            differences[name].append((float(difference.mean()), float(difference.max())))
    return {
        name: (float(np.mean([mean for mean, _ in figures])), max(most for _, most in figures))
        for name, figures in differences.items()
    }


def to_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()


def small_jpegs() -> tuple[list[bytes], str]:
    """Return photographs, or drawings of their size if there are none, and which they are."""
    figures = []
    for tar in sorted(PHOTOS.glob("*.tar")):
        with tarfile.open(tar) as members:
            files = [members.extractfile(m) for m in members if m.name.endswith(".jpg")]
            figures += [file.read() for file in files if file]
    if figures:
        return figures, "photographs"
    rng = np.random.default_rng(0)
    return [to_jpeg(Image.fromarray(draw_image(rng, 500, 375)[0])) for _ in range(64)], "drawings"


def enlarged(jpegs: Sequence[bytes]) -> list[bytes]:
    """Return each photograph enlarged to 1080p and cropped."""
    large = []
    for data in jpegs[:NUM_LARGE]:
        image = open_rgb(data)
        scale = max(1920 / image.width, 1080 / image.height)
        size = round(image.width * scale), round(image.height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
        large.append(to_jpeg(image.crop((0, 0, 1920, 1080))))
    return large


def side_by_side(jpegs: Sequence[bytes]) -> list[bytes]:
    """Return 1080p mosaics of twelve photographs each, 4 across and 3 down."""
    large = []
    for number in range(NUM_LARGE):
        image = Image.new("RGB", (1920, 1080))
        for position in range(12):
            tile = open_rgb(jpegs[(12 * number + position) % len(jpegs)]).resize((480, 360))
            image.paste(tile, (position % 4 * 480, position // 4 * 360))
        large.append(to_jpeg(image))
    return large


def compare(title: str, jpegs: Sequence[bytes], side: int, rounds: int) -> dict[str, Any]:
    """Time and check all contenders on one job, and print the table."""

    def run(load: Callable[[bytes, int], Pixels]) -> None:
        for data in jpegs:
            load(data, side)

    contenders = {name: lambda load=load: run(load) for name, (load, _) in CONTENDERS.items()}
    seconds = take_turns(contenders, rounds)
    errors = find_errors(jpegs, side)
    figures = {
        name: {
            "images_per_s": round(len(jpegs) / seconds[name], 1),
            "ours_is_faster": round(seconds[name] / seconds[OURS], 2),
            "mean_error": round(errors[name][0], 3),
            "max_error": round(errors[name][1], 1),
        }
        for name in CONTENDERS
    }
    rows = [
        [
            name,
            f"{row['images_per_s']:.1f}/s",
            f"{row['ours_is_faster']:.2f}x",
            f"{row['mean_error']:.3f}",
            f"{row['max_error']:.1f}",
        ]
        for name, row in figures.items()
    ]
    mean_bytes = round(sum(map(len, jpegs)) / len(jpegs))
    title = f"{title}: {len(jpegs)} of {mean_bytes / 1000:.0f} kB, to {side} px, one thread"
    print_table(title, ["images", "ours is faster", "mean error", "max error"], rows)
    return {"num_images": len(jpegs), "mean_bytes": mean_bytes, "side_px": side, "rows": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    small, kind = small_jpegs()
    jobs = {
        "small": (f"{kind} of 0.2 MP", small, 256),
        "1080p": (f"{kind} enlarged to 1080p", enlarged(small), 512),
        "1080p_dense": (f"{kind}, twelve to a 1080p picture", side_by_side(small), 512),
    }
    figures = {name: compare(*job, rounds) for name, job in jobs.items()}
    packages = ["pillow", "simplejpeg", "opencv-python-headless", "numpy"]
    write_results("decode", figures, packages)


if __name__ == "__main__":
    main()
