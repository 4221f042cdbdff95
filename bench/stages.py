"""Where one core's time goes: decode, transform and encode, against what people use instead.

`make bench`, or `python bench/stages.py`. Draws its own photographs-like JPEGs, measures each stage
alone, alternating with its counterpart so that both meet the same machine, prints a table and
writes bench/results/stages.json. The ratios are what to quote; single figures are this machine's.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import PIL
import torch
from diffusers import AutoencoderKL
from PIL import Image

import latentcache
import latentcache.vae
from latentcache.images.decode import decode_image
from latentcache.images.draw import draw_image
from latentcache.images.transform import Bucket, TransformSpec, transform
from latentcache.metrics import drift_db
from latentcache.vae.encoder import PRECISION_DTYPES, LatentEncoder
from latentcache.vae.model import Architecture, KLAutoencoder

NUM_IMAGES = 32
NUM_ROUNDS = 5
KL_F8 = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
TARGET_PX = 256
RESULTS = Path(__file__).parent / "results" / "stages.json"


def pair(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Median images/s of both over alternating rounds, and the median of their ratios."""
    ours(), theirs()
    times = []
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        ours()
        between = time.perf_counter()
        theirs()
        times.append((between - began, time.perf_counter() - between))
    return (
        NUM_IMAGES / statistics.median(a for a, _ in times),
        NUM_IMAGES / statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
    )


def draw_jpegs() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(NUM_IMAGES):
        pixels, _ = draw_image(rng, 512, 400)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def pil_decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pil_transform(pixels: np.ndarray, filter_: Image.Resampling) -> np.ndarray:
    image = Image.fromarray(pixels)
    scale = TARGET_PX / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), filter_)
    left, top = (image.width - TARGET_PX) // 2, (image.height - TARGET_PX) // 2
    return np.asarray(image.crop((left, top, left + TARGET_PX, top + TARGET_PX)))


def measure() -> dict[str, tuple[float, float, float]]:
    torch.set_num_threads(1)
    jpegs = draw_jpegs()
    decoded = [decode_image(data, max_pixels=10**8) for data in jpegs]
    spec = TransformSpec((Bucket(TARGET_PX, TARGET_PX),), None, None, 10**8)
    batch = torch.stack([transform(pixels, spec).pixels for pixels in decoded])
    vae = latentcache.load_vae("demo")
    folder = Path(latentcache.vae.__path__[0]) / "demo"
    reference = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()

    def theirs_encode() -> None:
        with torch.inference_mode():
            for chunk in torch.split(batch, 4):
                reference.encode(chunk.float() / 127.5 - 1)

    def ours_encode() -> None:
        with torch.inference_mode():
            for chunk in torch.split(batch, 4):
                vae.encode(chunk)

    return {
        "decode, against Pillow alone": pair(
            lambda: [decode_image(data, max_pixels=10**8) for data in jpegs],
            lambda: [pil_decode(data) for data in jpegs],
        ),
        "resize and crop to 256 px, against Pillow bicubic": pair(
            lambda: [transform(pixels, spec) for pixels in decoded],
            lambda: [pil_transform(pixels, Image.Resampling.BICUBIC) for pixels in decoded],
        ),
        "resize and crop to 256 px, against Pillow Lanczos": pair(
            lambda: [transform(pixels, spec) for pixels in decoded],
            lambda: [pil_transform(pixels, Image.Resampling.LANCZOS) for pixels in decoded],
        ),
        "encode with the demo VAE, against diffusers": pair(ours_encode, theirs_encode),
    }


def measure_drift() -> dict[str, dict[str, float]]:
    """How far narrow precisions are from fp32, in dB, on drawn images of 256 px."""
    rng = np.random.default_rng(1)
    drawn = [torch.from_numpy(draw_image(rng, TARGET_PX, TARGET_PX)[0].copy()) for _ in range(8)]
    images = torch.stack(drawn).permute(0, 3, 1, 2).contiguous()
    torch.manual_seed(0)
    with torch.device("cpu"):
        random = KLAutoencoder(Architecture.from_config(KL_F8), decoder=False).eval()
    found: dict[str, dict[str, float]] = {}
    for name, vae in {"demo": latentcache.load_vae("demo"), "kl-f8, random": random}.items():
        encoders = {p: LatentEncoder(vae.requires_grad_(False), p) for p in PRECISION_DTYPES}
        channels = vae.architecture.latent_channels
        moments = {p: e.encode(images).moments[:, :channels] for p, e in encoders.items()}
        exact = moments.pop("fp32")
        found[name] = {p: round(drift_db(narrow, exact), 1) for p, narrow in moments.items()}
    return found


def main() -> None:
    measured = measure()
    drift = measure_drift()
    width = max(map(len, measured))
    print(f"{'one thread':{width}}  {'ours':>9}  {'theirs':>9}  {'ratio':>6}")
    for name, (ours, theirs, ratio) in measured.items():
        print(f"{name:{width}}  {ours:7.1f}/s  {theirs:7.1f}/s  {ratio:5.2f}x")
    for name, by_precision in drift.items():
        figures = ", ".join(f"{precision} {value} dB" for precision, value in by_precision.items())
        print(f"drift from fp32, {name}: {figures}")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result = {
        "command": "python bench/stages.py",
        "commit": commit,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "drift_db": drift,
        "images_per_s": {
            name: {"ours": round(ours, 1), "theirs": round(theirs, 1), "ratio": round(ratio, 2)}
            for name, (ours, theirs, ratio) in measured.items()
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
