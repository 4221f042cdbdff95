"""Other loaders, each used as its documentation recommends, in its own environment.

`prepare` writes the rows of one `.npy` array [N, C, H, W] in the format of a rival. `measure` reads
them shuffled from warm local disk, `positions` returns the order in which it reads them, and
`measure_cold` reads them once from S3. Each runs rivals/<package>.py in bench/.envs/<package>,
which is created on first use: one process (num_workers=0), one torch thread.

A name that ends in `-tuned` is the same loader with settings that we found to make it faster and
that its documentation does not mention for this use. Each file says what they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BENCH = Path(__file__).resolve().parent.parent
ENVIRONMENTS = BENCH / ".envs"


@dataclass(frozen=True, slots=True)
class Rival:
    """The program that reads, and the packages that `pip` installs for it."""

    program: str
    tuned: bool = False
    # Installed with their dependencies. If empty, the program runs in this environment.
    requirements: tuple[str, ...] = ()
    # Installed without their dependencies. Both require torchvision for pictures; `requirements`
    # lists what they import here.
    bare: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
STREAMING = (
    *(TORCH, "numpy==2.1.3", "boto3==1.44.5", "Brotli==1.2.1", "catalogue==2.0.10"),
    *("filelock==4.2.11", "pillow==13.0.0", "python-snappy==0.7.3", "requests==2.34.2"),
    *("tqdm==4.70.1", "transformers==4.57.6", "xxhash==4.1.0", "zstd==1.5.7.2"),
)
LITDATA = (
    *(TORCH, "numpy==2.4.6", "boto3==1.44.5", "filelock==4.2.11", "lightning-utilities==0.15.3"),
    *("obstore==0.12.1", "requests==2.34.2", "tifffile==2026.3.3", "urllib3==2.8.0"),
)
WEBDATASET = (TORCH, "numpy==2.4.6", "webdataset==1.0.2", "awscli==1.46.3")

RIVALS = {
    "streaming": Rival("streaming", False, STREAMING, ("mosaicml-streaming==0.13.0",)),
    "streaming-tuned": Rival("streaming", True, STREAMING, ("mosaicml-streaming==0.13.0",)),
    "litdata": Rival("litdata", False, LITDATA, ("litdata==0.2.76",)),
    "litdata-tuned": Rival("litdata", True, LITDATA, ("litdata==0.2.76",)),
    "webdataset": Rival("webdataset", False, WEBDATASET),
    "webdataset-tuned": Rival("webdataset", True, WEBDATASET),
    "npy": Rival("npy"),
}


def _python(rival: Rival) -> Path:
    """Return the interpreter of a rival's environment; rebuild it when its pins have changed."""
    if not rival.requirements:
        return Path(sys.executable)
    folder = ENVIRONMENTS / rival.program
    python = folder / "bin" / "python"
    pinned = "\n".join((*rival.requirements, *rival.bare))
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != pinned:
        print(f"{rival.program}: making {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        subprocess.run([*pip, *rival.requirements], check=True)
        if rival.bare:
            subprocess.run([*pip, "--no-deps", *rival.bare], check=True)
        stamp.write_text(pinned)
    return python


def _run(name: str, action: str, **arguments: Any) -> dict[str, Any]:
    """Run an action of a rival's program; the last line that it prints is the answer."""
    rival = RIVALS[name]
    paths = {k: os.path.abspath(v) for k, v in arguments.items() if isinstance(v, os.PathLike)}
    text = json.dumps({"tuned": rival.tuned, **arguments, **paths})
    command = [str(_python(rival)), "-m", f"rivals.{rival.program}", action, text]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BENCH, env=environment, stdout=subprocess.PIPE, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def prepare(name: str, latents: Path, folder: Path, row_bytes: int | None = None) -> None:
    """Write the latents in a rival's format, in their order.

    Args:
        name: a name in RIVALS.
        latents: a `.npy` file, [N, C, H, W] float16.
        folder: must not exist.
        row_bytes: fill a shard as if a row had this size; by default the real size.
    """
    _run(name, "prepare", latents=latents, folder=folder, row_bytes=row_bytes)


def measure(
    name: str, folder: Path, *, batch_size: int, num_batches: int, num_repetitions: int
) -> dict[str, Any]:
    """Read shuffled batches from local disk, after one whole pass as warm-up.

    A repetition is the next `num_batches` batches of repeated passes; with `num_batches = N //
    batch_size` it is a whole pass, including the cost of starting one. float16 batches are as
    stored, float32 ones normalised; the two take turns.

    Returns:
        {"version": str, "samples_per_s": {"float32": [one per repetition], "float16": […]}}.
    """
    return _run(
        *(name, "measure"),
        folder=folder,
        batch_size=batch_size,
        num_batches=num_batches,
        num_repetitions=num_repetitions,
    )


def write_positions(path: Path, num_rows: int) -> None:
    """Write a `.npy` file of tiny latents [N, 4, 1, 1] whose bytes are their row numbers."""
    np.save(path, np.arange(num_rows).view(np.float16).reshape(num_rows, 4, 1, 1))


def positions(
    name: str, folder: Path, *, batch_size: int, num_batches: int
) -> npt.NDArray[np.int64]:
    """Return the rows of a pass's first batches, from the file of `write_positions`.

    The shape is [num_batches, batch_size]. The shuffle quality over a part of a pass differs from
    that over a whole pass, so measure a whole pass.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.npy"
        _run(
            *(name, "positions"),
            folder=folder,
            batch_size=batch_size,
            num_batches=num_batches,
            output=rows,
        )
        read: npt.NDArray[np.int64] = np.load(rows)
    return read


def measure_cold(
    name: str, folder: Path, url: str, endpoint_url: str, cache: Path, *, batch_size: int
) -> dict[str, Any]:
    """Read one pass from S3 as normalised float32, including opening, with an empty cache.

    Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

    Args:
        name: a name in RIVALS.
        folder: the folder that `prepare` wrote.
        url: `s3://…`, where the server has the same files.
        endpoint_url: the server.
        cache: a folder for downloads; must not exist.
        batch_size: rows in a batch.

    Returns:
        {"version": str, "samples_per_s": float}, or {"version": str, "skipped": why}.
    """
    return _run(
        *(name, "cold"),
        folder=folder,
        url=url,
        endpoint_url=endpoint_url,
        cache=cache,
        batch_size=batch_size,
    )
