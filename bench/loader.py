"""Measure the rate and the shuffle quality of `LatentLoader`, against other loaders and memory.

    python bench/loader.py [--part NAME] [--rows 250000] [--passes 3] [--skip-rivals]

One run, one machine, one process, one torch thread, batch 256, warm local disk unless it says cold.
The limit is `torch.index_select` from memory into a ring of four outputs, in the same dtype with
the same normalisation. The rivals are in bench/rivals/. It prints tables and writes
bench/results/loader.json. Compare ratios; the rates depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import write_results
from latentcache import LatentLoader, StorageOptions
from latentcache.dataset.bucket import Bucket
from latentcache.loader.files import Files, open_sources
from latentcache.loader.order import Order, OrderOptions
from rivals import RIVALS, measure, measure_cold, positions, prepare, write_positions
from synthetic import make_contract, write_dataset, write_manifest

BATCH_SIZE = 256
ROWS_PER_UNIT = 10_000
NUM_REPETITIONS = 7
FORMATS = ("safetensors", "parquet")
DTYPES = {"float16": torch.float16, "float32": torch.float32}  # as stored; normalised
SCALE = 0.18215
KEYS = {"AWS_ACCESS_KEY_ID": "latentcachekey", "AWS_SECRET_ACCESS_KEY": "latentcachesecret"}


def make_loader(url: str, dtype: str, **options: Any) -> LatentLoader:
    """Return our loader as in a training run, without captions, which the rivals do not have."""
    settings = {"columns": [], "dtype": DTYPES[dtype], "normalize": dtype == "float32", **options}
    return LatentLoader(url, batch_size=BATCH_SIZE, **settings)


def write_rows(folder: Path, name: str, num_rows: int, side: int) -> Path:
    """Write latents [N, 4, side, side] float16 as `.npy` and as our datasets; idempotent."""
    path = folder / f"{name}.npy"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(
        folder / "rows.tmp", "w+", np.float16, (num_rows, 4, side, side)
    )
    for first in range(0, num_rows, 4096):
        part = rows[first : first + 4096]
        part[:] = rng.standard_normal(part.shape, np.float32)
    write_ours(folder, name, rows)
    os.rename(folder / "rows.tmp", path)
    return path


def write_ours(folder: Path, name: str, rows: np.ndarray[Any, np.dtype[np.float16]]) -> None:
    """Write rows as a dataset of each format, in units of ten thousand."""
    bucket = Bucket(rows.shape[3] * 8, rows.shape[2] * 8)
    counts = [min(ROWS_PER_UNIT, len(rows) - n) for n in range(0, len(rows), ROWS_PER_UNIT)]

    def latents(number: int, bucket: tuple[int, int], num_rows: int) -> torch.Tensor:
        first = number * ROWS_PER_UNIT
        return torch.from_numpy(rows[first : first + num_rows].copy())

    for format_ in FORMATS:
        url = folder / f"{name}-{format_}"
        shutil.rmtree(url, ignore_errors=True)
        contract = make_contract([bucket], format=format_)
        units = [{bucket: n} for n in counts]
        write_dataset(str(url), contract, units, latents=latents, keep=())


def limit(rows: torch.Tensor, dtype: str) -> Callable[[], float]:
    """Return a function that measures a pass over shuffled rows in memory, in rows/s."""
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    num_batches = len(rows) // BATCH_SIZE
    order = list(shuffled[: num_batches * BATCH_SIZE].reshape(num_batches, BATCH_SIZE))
    shape = (BATCH_SIZE, *rows.shape[1:])
    stored = [torch.empty(shape, dtype=torch.float16) for _ in range(4)]
    ring = [torch.empty(shape) for _ in range(4)]

    def measure_pass() -> float:
        begun = time.perf_counter()
        for number, index in enumerate(order):
            selected = torch.index_select(rows, 0, index, out=stored[number % 4])
            if dtype == "float32":
                ring[number % 4].copy_(selected).mul_(SCALE)
        return len(order) * BATCH_SIZE / (time.perf_counter() - begun)

    return measure_pass


def ours(url: Path, dtype: str) -> Callable[[], float]:
    """Return a function that measures our next epoch, including its first batch, in rows/s."""
    loader = make_loader(str(url), dtype)

    def measure_pass() -> float:
        begun = time.perf_counter()
        num_rows = sum(len(batch) for batch in loader)
        return num_rows / (time.perf_counter() - begun)

    return measure_pass


def compare(
    folder: Path, name: str, rivals: list[str], num_batches: int, num_repetitions: int
) -> dict[str, dict[str, Any]]:
    """Measure all loaders on the same rows, in turns.

    Ours and the limit run whole passes. Each rival runs `num_batches` at a time, after a whole
    pass as warm-up.
    """
    rows = torch.from_numpy(np.load(folder / f"{name}.npy"))
    row_bytes = rows[0].nbytes
    passes = {("limit", dtype): limit(rows, dtype) for dtype in DTYPES}
    for format_ in FORMATS:
        for dtype in DTYPES:
            passes[format_, dtype] = ours(folder / f"{name}-{format_}", dtype)
    rates: dict[tuple[str, str], list[float]] = {which: [] for which in passes}
    for measure_pass in passes.values():
        measure_pass()
    for _ in range(NUM_REPETITIONS):
        for which, measure_pass in passes.items():
            rates[which].append(measure_pass())
    del rows, passes
    versions = {}
    for rival in rivals:
        written = folder / f"{name}-{rival}"
        if not written.exists():
            prepare(rival, folder / f"{name}.npy", written)
        answer = measure(
            rival,
            written,
            batch_size=BATCH_SIZE,
            num_batches=num_batches,
            num_repetitions=num_repetitions,
        )
        versions[rival] = answer["version"]
        for dtype in DTYPES:
            rates[rival, dtype] = answer["samples_per_s"][dtype]
        shutil.rmtree(written)
        print(f"{name}: {rival} measured", file=sys.stderr)
    table: dict[str, dict[str, Any]] = {}
    for (reader, dtype), values in rates.items():
        rate = statistics.median(values)
        entry = table.setdefault(reader, {"version": versions.get(reader)})
        entry[dtype] = {
            "rows_per_s": rate,
            "gigabytes_per_s": rate * row_bytes / 1e9,
            "of_limit": rate / statistics.median(rates["limit", dtype]),
            "repetitions": values,
        }
    return table


def shuffle_quality(folder: Path, rivals: list[str], num_rows: int = 1_000_000) -> dict[str, float]:
    """Return the spread of batches' mean positions, relative to that of a perfect shuffle.

    It is measured over whole passes of a million rows, each of which holds its own number.
    """
    path = folder / "positions.npy"
    write_positions(path, num_rows)
    write_ours(folder, "positions", np.load(path))
    orders = {}
    loader = make_loader(str(folder / f"positions-{FORMATS[0]}"), "float16")
    batches = [batch.latents.flatten(1).view(torch.int64).clone() for batch in loader]
    orders["latentcache"] = torch.stack(batches).numpy()
    for rival in rivals:
        written = folder / f"positions-{rival}"
        shutil.rmtree(written, ignore_errors=True)
        # Shards have as many rows as if they were latents of 256 px.
        prepare(rival, path, written, row_bytes=8192)
        orders[rival] = positions(
            rival, written, batch_size=BATCH_SIZE, num_batches=num_rows // BATCH_SIZE
        )
        shutil.rmtree(written)
    perfect = num_rows / (12 * BATCH_SIZE) ** 0.5
    return {name: float(order.mean(axis=1).std()) / perfect for name, order in orders.items()}


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Serve the subfolders of a folder as buckets; yield the endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rclone = Path(sysconfig.get_path("scripts"), "rclone")
    command = [str(rclone), "serve", "s3", "--auth-key", ",".join(KEYS.values())]
    server = subprocess.Popen(
        [*command, "--addr", f"127.0.0.1:{port}", str(folder)], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def cold(folder: Path, name: str, rivals: list[str]) -> dict[str, Any]:
    """Read one pass from S3 on loopback into an empty cache, as normalised float32."""
    figures: dict[str, Any] = {}
    os.environ |= KEYS
    cache = folder / "cache"
    for rival in rivals:  # before the server starts, because it lists the folders once
        if not (folder / f"{name}-{rival}").exists():
            prepare(rival, folder / f"{name}.npy", folder / f"{name}-{rival}")
    with s3_server(folder) as endpoint:
        for format_ in FORMATS:
            shutil.rmtree(cache, ignore_errors=True)
            begun = time.perf_counter()
            options = StorageOptions(endpoint_url=endpoint)
            loader = make_loader(
                f"s3://{name}-{format_}", "float32", storage=options, cache_dir=cache
            )
            num_rows = sum(len(batch) for batch in loader)
            figures[format_] = {"rows_per_s": num_rows / (time.perf_counter() - begun)}
        for rival in rivals:
            written = folder / f"{name}-{rival}"
            shutil.rmtree(cache, ignore_errors=True)
            measured = measure_cold(
                rival, written, f"s3://{written.name}", endpoint, cache, batch_size=BATCH_SIZE
            )
            rate = measured.get("samples_per_s")
            figures[rival] = {"rows_per_s": rate, "skipped": measured.get("skipped")}
            shutil.rmtree(written)
    shutil.rmtree(cache, ignore_errors=True)
    return figures


def plan_two_billion(folder: Path) -> dict[str, float]:
    """Find the first batch of two billion rows in its own process: seconds and memory."""
    url = folder / "two-billion"
    if not url.exists():
        write_manifest(str(url), make_contract([Bucket(256, 256)]), 200_000, ROWS_PER_UNIT)
    done = subprocess.run(
        [sys.executable, __file__, "--plan", str(url)], stdout=subprocess.PIPE, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def plan(url: str) -> dict[str, float]:
    """Find a first batch, and one in the middle of the fourth epoch."""
    begun = time.perf_counter()
    files = Files(open_sources([url], None, None))
    order = Order(files.streams(files.num_rows), OrderOptions(BATCH_SIZE))
    next(order.batches(0))
    first = time.perf_counter()
    next(order.batches(3, len(order) // 2))
    return {
        "num_rows": int(files.num_rows.sum()),
        "first_batch_s": first - begun,
        "middle_batch_s": time.perf_counter() - first,
        "peak_mebibytes": peak_mebibytes(),
    }


def peak_mebibytes() -> float:
    """Return the peak memory of this program; getrusage includes its parent's."""
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s]
    return int(line.split()[1]) / 1024


def show(title: str, table: dict[str, dict[str, Any]], unit: str) -> None:
    """Print a table of rates."""
    print(f"\n{title}")
    print(f"{'':20}{'float16':>12}{'of limit':>10}{'float32':>12}{'of limit':>10}  ({unit})")
    for name, entry in table.items():
        cells = ""
        for dtype in DTYPES:
            rate = entry[dtype]["rows_per_s"] / 1e3
            if unit == "GB/s":
                rate = entry[dtype]["gigabytes_per_s"]
            cells += f"{rate:>12.2f}{entry[dtype]['of_limit']:>10.1%}"
        print(f"{name:20}{cells}")


def run_part(part: str, folder: Path, rivals: list[str], rows: int, passes: int) -> Any:
    """Measure one part, and print it as a table."""
    # .npy files are read in the order of torch's sampler, which is a perfect shuffle.
    shuffling = [name for name in rivals if not RIVALS[name].tuned and name != "npy"]
    figures: dict[str, Any]
    if part == "two_billion":
        figures = plan_two_billion(folder)
        print(f"\nthe first batch of two billion rows: {figures}")
    elif part == "rows_8_kib":
        write_rows(folder, "small", rows, 32)
        figures = compare(folder, "small", rivals, rows // BATCH_SIZE, passes)
        show("rows of 8 KiB, warm, thousand rows/s", figures, "k/s")
    elif part == "rows_128_kib":
        write_rows(folder, "large", rows // 16, 128)
        figures = compare(folder, "large", rivals, 20, passes)
        show("rows of 128 KiB, warm, GB/s", figures, "GB/s")
    elif part == "shuffle_quality":
        figures = shuffle_quality(folder, shuffling)
        print("\nshuffle quality at a million rows (1 is perfect)")
        for name, value in figures.items():
            print(f"{name:20}{value:>8.2f}")
    else:
        write_rows(folder, "cold", rows // 5, 32)
        figures = cold(folder, "cold", shuffling)
        print("\ncold, from S3 on loopback, normalised float32, thousand rows/s")
        for name, entry in figures.items():
            rate = entry["rows_per_s"]
            print(f"{name:20}{rate / 1e3:>8.1f}" if rate else f"{name:20} {entry['skipped']}")
    return figures


PARTS = ("two_billion", "rows_8_kib", "rows_128_kib", "shuffle_quality", "cold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--passes", type=int, default=3, help="of each rival, by dtype")
    parser.add_argument("--skip-rivals", action="store_true")
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable; default: all")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / ".data")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(plan(arguments.plan)))
        return
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rivals = [] if arguments.skip_rivals else list(RIVALS)
    for part in arguments.part or PARTS:
        figures = run_part(part, arguments.folder, rivals, arguments.rows, arguments.passes)
        write_results("loader", {part: figures})


if __name__ == "__main__":
    main()
