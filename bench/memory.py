"""Measure the memory of an actor while it reads a stream of JPEGs of 12 megapixels.

`python bench/memory.py [--images 500] [--threads 16]`. It draws JPEGs of 4000 × 3000 px like
photographs, writes them into shards, and runs these through a `UnitRunner` with the demo VAE in
this process, two units at once, as an actor does. It prints the peak of the resident memory, how
much of that was used before the first unit (Python, torch, the model), and the slope: that of a
line through the peaks over each 25 images, without the first fifth and the last ones, when the
queues run empty. It writes bench/results/memory.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from harness import print_table, write_results
from latentcache.dataset.receipts import Receipt, new_attempt
from latentcache.demo.draw import draw_image
from latentcache.engine.job import UNITS_PER_ACTOR, UnitTask
from latentcache.engine.unit import UnitRunner
from local_runner import make_runner

WIDTH_PX, HEIGHT_PX = 4000, 3000
IMAGES_PER_SHARD = 25
NUM_DRAWN = 5
MIB = 2**20


def draw_jpeg(seed: int) -> bytes:
    """Draw a picture with the noise of a camera: 5 MB, like a file of a camera."""
    rng = np.random.default_rng(seed)
    small, _ = draw_image(rng, WIDTH_PX // 4, HEIGHT_PX // 4)
    large = Image.fromarray(small).resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (HEIGHT_PX, WIDTH_PX, 1))
    buffer = io.BytesIO()
    pixels = (np.asarray(large) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, num_images: int) -> int:
    """Write the shards; return the bytes of an image."""
    drawn = [draw_jpeg(seed) for seed in range(NUM_DRAWN)]
    for first in range(0, num_images, IMAGES_PER_SHARD):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for number in range(first, min(first + IMAGES_PER_SHARD, num_images)):
                data = drawn[number % NUM_DRAWN]
                header = tarfile.TarInfo(f"{number:06d}.jpg")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return sum(map(len, drawn)) // NUM_DRAWN


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


class Watch(threading.Thread):
    """A thread that records every few milliseconds the number of rows and the memory."""

    def __init__(self, runner: UnitRunner) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[int, int]] = []
        self.is_over = False
        self._runner = runner

    def run(self) -> None:
        """Watch until `is_over` is set."""
        while not self.is_over:
            self.seen.append((int(self._runner.totals.stats()["num_rows"]), resident_bytes()))
            time.sleep(0.005)


def measure(folder: Path, num_threads: int) -> dict[str, float]:
    """Run the units and return their memory figures."""
    plan, runner = make_runner(folder / "shards", folder / "out", num_threads)
    tasks = [UnitTask(unit, 0, new_attempt()) for unit in plan.units]
    before = resident_bytes()
    watch = Watch(runner)
    watch.start()
    with ThreadPoolExecutor(UNITS_PER_ACTOR) as threads:
        for receipt in threads.map(runner.run, tasks):
            assert isinstance(receipt, Receipt), receipt
    watch.is_over = True
    watch.join()
    rows, held = np.array(watch.seen).T
    windows = [held[rows // 25 == number] for number in range(int(rows.max()) // 25)]
    peaks = [(25 * number, window.max()) for number, window in enumerate(windows) if len(window)]
    steady = np.array([peak for peak in peaks[:-1] if peak[0] >= rows.max() / 5])
    slope = np.polyfit(steady[:, 0], steady[:, 1], 1)[0]
    return {
        "num_images": float(int(runner.totals.stats()["num_rows"])),
        "num_decode_threads": float(num_threads),
        "before_mib": before / MIB,
        "peak_mib": held.max() / MIB,
        "slope_mib_per_100_images": 100 * slope / MIB,
        "after_mib": resident_bytes() / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.threads)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        image_bytes = write_shards(folder / "shards", options.images)
        # A separate process, with the environment that the engine gives to workers.
        command = [sys.executable, __file__, "--threads", str(options.threads), "--measure", name]
        from latentcache.engine.connection import (
            WORKER_ENVIRONMENT,
        )  # not in the process that is measured

        env = WORKER_ENVIRONMENT | os.environ
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    rates = {"image_bytes": image_bytes, **{name: round(v, 1) for name, v in measured.items()}}
    title = f"{options.images} JPEGs of 12 megapixels, {options.threads} decode threads"
    print_table(title, ["MiB"], [[n, f"{v:.1f}"] for n, v in rates.items() if "mib" in n])
    write_results("memory", {"stream": rates}, ["pillow", "simplejpeg", "numpy"])


if __name__ == "__main__":
    main()
