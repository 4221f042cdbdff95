"""Measure whole runs: `latentcache run` against the usual script, Ray Data, and its own stages.

`python bench/run.py [--part demo|free|stages]`, or all parts. Each contender (bench/contenders/)
encodes the 250 photographs of ../shared/data (drawn pictures if those are absent), repeated, in
shards of 125, to 256 × 256 px latents on the local disk. Each runs in its own process on the same
cores:

- `demo`: 1,500 images with the demo VAE, which the peers run with diffusers;
- `free`: 12,000 images with an encoder that costs nothing, which shows the cost of everything else;
- `stages`: each of our stages alone on the threads that it has in a run, in turns with the whole
  pipeline, in one process. In addition to `demo` and `free`, the encoder `device` takes 4 ms per
  image and no CPU, like an accelerator: the part shows whether it is kept busy.

The settings of each contender are tried on two small shards, and the best count. Rates are those of
the work alone and of the work with start-up (imports, models, Ray). It writes
bench/results/run.json, and from `demo` the picture bench/results/profile.svg.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import profile_picture
from contenders import RESOLUTION_PX, Asked, free_moments, run
from harness import print_table, take_turns, write_results
from latentcache.dataset.receipts import (
    Receipt,
    Unit,
    list_receipt_names,
    new_attempt,
    read_receipts,
)
from latentcache.dataset.shards import BucketWriter, RowMeta, describe_file
from latentcache.dataset.statistics import Statistics
from latentcache.demo.draw import draw_image
from latentcache.engine.job import UNITS_PER_ACTOR, UnitTask
from latentcache.images.source import Sample, SourceShard, read_shard
from latentcache.images.transform import load_image
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions
from latentcache.vae.encoder import Encoded
from local_runner import make_runner

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
IMAGES_PER_SHARD = 125
NUM_SHARDS = {"demo": 12, "free": 96}
TUNING_SHARDS, IMAGES_PER_TUNING_SHARD = 2, {"demo": 60, "free": 250}
NUM_CORES = os.cpu_count() or 1
DEVICE_S = 0.004

# What a user of each might try on a small machine.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "ours": [{"num_cpu_actors": 1}, {"num_cpu_actors": NUM_CORES}],
    "dataloader": [
        {"num_workers": workers, "batch_size": batch}
        for workers, batch in ((0, 4), (1, 4), (2, 4), (1, 1))
    ],
    "raydata": [
        {"num_actors": 1, "num_cpus_per_actor": 1, "batch_size": 4},
        {"num_actors": NUM_CORES, "num_cpus_per_actor": 0.5, "batch_size": 4},
    ],
}
NAMES = {"ours": "latentcache", "dataloader": "the usual script", "raydata": "Ray Data"}


def read_photos() -> tuple[list[bytes], str]:
    """Return the photographs, or drawn pictures if there are none, and which they are."""
    files = sorted(PHOTOS.glob("*.tar"))
    photos = []
    for file in files:
        with tarfile.open(file) as tar:
            members = (member for member in tar if member.name.endswith(".jpg"))
            photos += [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    if photos:
        return photos, "photographs"
    rng = np.random.default_rng(0)
    for _ in range(250):
        buffer = io.BytesIO()
        Image.fromarray(draw_image(rng, 500, 375)[0]).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos, "drawn pictures"


def write_shards(
    folder: Path, photos: list[bytes], num_shards: int, num_images: int = IMAGES_PER_SHARD
) -> Path:
    """Write shards of images."""
    folder.mkdir()
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for number in range(shard * num_images, (shard + 1) * num_images):
                data = photos[number % len(photos)]
                header = tarfile.TarInfo(f"{number:06d}.jpg")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return folder


def rates(name: str, asked: Asked) -> dict[str, Any]:
    """Run a contender; return images/s of the work alone and with start-up."""
    shutil.rmtree(asked.out, ignore_errors=True)
    measured = run(name, asked)
    work_s, total_s = measured["working_s"], measured["total_s"]
    line = f"{NAMES[name]} {asked.settings}: {measured['num_images']} images in {work_s:.1f} s"
    print(f"{line}, {total_s:.1f} s with start-up", file=sys.stderr)
    return {
        "settings": asked.settings,
        "images_per_s": round(measured["num_images"] / measured["working_s"], 1),
        "with_start_up": round(measured["num_images"] / measured["total_s"], 1),
        "start_up_s": round(measured["total_s"] - measured["working_s"], 1),
        "num_images": measured["num_images"],
    }


def against_peers(folder: Path, photos: list[bytes], encoder: str) -> dict[str, Any]:
    """Run all contenders with the same encoder."""
    num_tuning = IMAGES_PER_TUNING_SHARD[encoder]
    tuning = write_shards(folder / "tuning", photos, TUNING_SHARDS, num_tuning)
    shards = write_shards(folder / "shards", photos, NUM_SHARDS[encoder])
    out = folder / "out"
    figures: dict[str, Any] = {}
    for name, trials in TRIALS.items():
        tried = [rates(name, Asked(tuning, out, encoder, settings)) for settings in trials]
        best = max(tried, key=lambda trial: trial["images_per_s"])
        figures[name] = rates(name, Asked(shards, out, encoder, best["settings"])) | {
            "tried": tried
        }
        if (name, encoder) == ("ours", "demo"):
            store = Store(str(out))
            receipts = read_receipts(store, list_receipt_names(store))
            profile_picture.write(receipts, Path(__file__).parent / "results" / "profile.svg")
    ours = figures["ours"]
    for peer in ("dataloader", "raydata"):
        assert figures[peer]["num_images"] == ours["num_images"], "all do the same work"
        figures[peer]["ours_by_theirs"] = {
            rate: round(ours[rate] / figures[peer][rate], 2)
            for rate in ("images_per_s", "with_start_up")
        }
    rows = [
        [
            NAMES[name],
            f"{it['images_per_s']:.1f}",
            f"{ours['images_per_s'] / it['images_per_s']:.2f}",
            f"{it['with_start_up']:.1f}",
            f"{ours['with_start_up'] / it['with_start_up']:.2f}",
            f"{it['start_up_s']:.1f}",
        ]
        for name, it in figures.items()
    ]
    columns = ["images/s", "ours/theirs", "with start-up", "ours/theirs", "start-up s"]
    print_table(f"{ours['num_images']} images, {encoder} encoder", columns, rows)
    return figures


class Alone:
    """Our pipeline and each of its stages alone, in this process, on the threads of an actor."""

    def __init__(self, folder: Path, shards: Path, encoder: str) -> None:
        self.plan, self.runner = make_runner(shards, folder / "alone", NUM_CORES)
        self.folder = folder
        vae = self.runner.encoder
        device = threading.Lock()

        def start(images: torch.Tensor) -> Callable[[], Encoded]:
            if encoder == "device":
                with device:
                    time.sleep(DEVICE_S * len(images))
            return partial(Encoded, free_moments(images), 0, ())

        if encoder != "demo":
            vae.start = start  # type: ignore[method-assign]
        self.units = self.plan.units
        self.samples = [sample for unit in self.units for sample in self._read(unit)]
        self.crops = [load_image(sample.image, self.runner.spec) for sample in self.samples]
        moments = torch.cat([vae.encode(crop.pixels[None]).moments for crop in self.crops[:4]])
        self.latent = moments[:1, : self.plan.contract.stored_channels].half()

    def _read(self, unit: Unit) -> Iterator[Sample]:
        shard = SourceShard(unit.source, unit.size_bytes, unit.version)
        for sample in read_shard(shard, image=("jpg",), keep=(), options=StorageOptions()):
            assert isinstance(sample, Sample)
            yield sample

    def fetch(self) -> None:
        """Read all samples."""
        with ThreadPoolExecutor(UNITS_PER_ACTOR) as threads:
            list(threads.map(lambda unit: sum(1 for _ in self._read(unit)), self.units))

    def decode(self) -> None:
        """Decode and transform all images."""
        with ThreadPoolExecutor(NUM_CORES) as threads:
            list(threads.map(lambda s: load_image(s.image, self.runner.spec).bucket, self.samples))

    def encode(self) -> None:
        """Encode all crops, in the batches of a run."""
        encoder = self.runner.encoder
        size = encoder.batch_size(RESOLUTION_PX, RESOLUTION_PX)
        batches = [self.crops[first : first + size] for first in range(0, len(self.crops), size)]
        with ThreadPoolExecutor(self.runner.encode_pool.num_threads) as threads:
            list(threads.map(self._encode, batches))

    def _encode(self, batch: list[Any]) -> None:
        self.runner.encoder.encode(torch.stack([crop.pixels for crop in batch]))

    def write(self) -> None:
        """Write as many rows as there are images, hash and upload."""
        with ThreadPoolExecutor(UNITS_PER_ACTOR) as threads:
            list(threads.map(self._write, self.units))

    def _write(self, unit: Unit) -> None:
        contract, values = self.plan.contract, self.latent.float().numpy()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            writer = BucketWriter(Path(folder, "rows"), contract, (), unit.id, (RESOLUTION_PX,) * 2)
            statistics = Statistics.empty(contract.stored_channels)
            for number in range(IMAGES_PER_SHARD):
                writer.append(self.latent, [RowMeta(str(number), 500, 375, 0, 0, {})])
                statistics = statistics.merge(Statistics.of(values))
            writer.close()
            writer.check()
            for path in writer.paths:
                file = describe_file(path, f"alone/{unit.id}", writer.num_rows, "")
                self.runner.output.put_file(path, file.path)

    def whole(self) -> None:
        """Run all units through the pipeline, two at once."""
        tasks = [UnitTask(unit, 0, new_attempt()) for unit in self.units]
        with ThreadPoolExecutor(UNITS_PER_ACTOR) as threads:
            assert all(isinstance(done, Receipt) for done in threads.map(self.runner.run, tasks))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a function, over all threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def against_its_stages(folder: Path, photos: list[bytes], encoder: str) -> dict[str, Any]:
    """Compare the whole pipeline with its slowest stage, and with the time of the cores."""
    shards = write_shards(folder / f"shards-{encoder}", photos, NUM_SHARDS["demo"])
    alone = Alone(folder, shards, encoder)
    stages = ("fetch", "decode", "encode", "write")
    seconds = take_turns({name: getattr(alone, name) for name in (*stages, "whole")}, rounds=2)
    cpu_s = {name: cpu_seconds(getattr(alone, name)) for name in stages}
    num_images = len(alone.samples)
    per_s = {name: num_images / elapsed_s for name, elapsed_s in seconds.items()}
    slowest = min(stages, key=lambda name: per_s[name])
    cores_allow = NUM_CORES * num_images / sum(cpu_s.values())
    figures = {
        "images_per_s": {name: round(rate, 1) for name, rate in per_s.items()},
        "cpu_ms_per_image": {name: round(1e3 * s / num_images, 3) for name, s in cpu_s.items()},
        "slowest": slowest,
        "share_of_slowest": round(per_s["whole"] / per_s[slowest], 3),
        "cores_allow": round(cores_allow, 1),
        "share_of_what_cores_allow": round(per_s["whole"] / cores_allow, 3),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    rows = [
        [name, f"{per_s[name]:.1f}", f"{1e3 * cpu_s[name] / num_images:.2f}"] for name in stages
    ]
    rows += [
        ["all, if cores were all", f"{cores_allow:.1f}", ""],
        ["whole", f"{per_s['whole']:.1f}", ""],
    ]
    print_table(f"stages alone, {encoder} encoder", ["images/s", "CPU ms/image"], rows)
    print(
        f"the whole is {figures['share_of_slowest']:.1%} of {slowest} alone, and "
        f"{figures['share_of_what_cores_allow']:.1%} of what {NUM_CORES} cores allow for all stages"
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["demo", "free", "stages"], action="append")
    parts = parser.parse_args().part or ["demo", "free", "stages"]
    photos, kind = read_photos()
    figures: dict[str, Any] = {}
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "stages":
                figures[part] = {
                    encoder: against_its_stages(folder, photos, encoder)
                    for encoder in ("demo", "device", "free")
                }
            else:
                figures[part] = against_peers(folder, photos, part)
        figures[part]["images"] = kind
    write_results("run", figures, ["ray", "diffusers", "pillow", "simplejpeg", "webdataset"])


if __name__ == "__main__":
    main()
