"""The common program of all rivals: write the rows, then read them and measure the time.

rivals/__init__.py calls it as `python -m rivals.<program> <action> <arguments as JSON>`. The last
line of the standard output is the answer, one JSON object.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# `(z - shift) * scale` for KL-f8. The shift of 0 is left out, which favours the rivals.
SCALE = 0.18215


@dataclass(frozen=True, slots=True)
class Remote:
    """The same files on an S3 server, and an empty folder for their cache."""

    url: str
    endpoint_url: str
    cache: Path


@dataclass(frozen=True, slots=True)
class Dataset:
    """What to read, and how. With a `remote`, nothing may be read from the folder."""

    folder: Path
    shape: tuple[int, ...]
    batch_size: int
    tuned: bool
    remote: Remote | None = None


# (latents [N, C, H, W], folder, row_bytes, tuned): writes the latents into the empty folder. Shards
# have as many rows as if a row had that many bytes.
Write = Callable[[npt.NDArray[np.float16], Path, int, bool], None]

# Opens a dataset. Each call of the result starts a pass over full batches [B, C, H, W] float16.
Read = Callable[[Dataset], Callable[[], Iterable[Tensor]]]


def prepare(write: Write, latents: str, folder: str, row_bytes: int | None, tuned: bool) -> None:
    rows = np.load(latents, mmap_mode="r")
    Path(folder).mkdir(parents=True)
    write(rows, Path(folder), row_bytes or rows[0].nbytes, tuned)
    (Path(folder) / "latents.json").write_text(json.dumps({"shape": rows.shape[1:]}))


def measure(read: Read, data: Dataset, num_batches: int, num_repetitions: int) -> dict[str, Any]:
    begin_pass = read(data)
    for batch in begin_pass():
        assert batch.shape == (data.batch_size, *data.shape), batch.shape
        assert batch.dtype == torch.float16, batch.dtype
    batches = itertools.chain.from_iterable(begin_pass() for _ in itertools.count())
    rates: dict[str, list[float]] = {"float32": [], "float16": []}
    for _ in range(num_repetitions):
        for dtype in rates:
            began = time.perf_counter()
            consume(itertools.islice(batches, num_batches), normalize=dtype == "float32")
            elapsed_s = time.perf_counter() - began
            rates[dtype].append(num_batches * data.batch_size / elapsed_s)
    return {"samples_per_s": rates}


def consume(batches: Iterator[Tensor], normalize: bool) -> int:
    """Read batches and drop them; return the number of rows."""
    num_rows = 0
    for batch in batches:
        latents = batch.float().mul_(SCALE) if normalize else batch
        num_rows += len(latents)
    return num_rows


def positions(read: Read, data: Dataset, num_batches: int, output: str) -> None:
    """Record which rows come; the bytes of each row are its number."""
    batches = itertools.islice(read(data)(), num_batches)
    rows = torch.stack([batch.flatten(1).view(torch.int64)[:, 0] for batch in batches])
    figures = rows.numpy()
    assert len(np.unique(figures)) == figures.size, "a row came twice in a pass"
    np.save(output, figures)


def cold(read: Read, data: Dataset) -> dict[str, Any]:
    began = time.perf_counter()
    num_rows = consume(iter(read(data)()), normalize=True)
    return {"samples_per_s": num_rows / (time.perf_counter() - began)}


def main(package: str, write: Write, read: Read, no_remote: str = "") -> None:
    """Run the action of the command line.

    Args:
        package: the package whose version to report.
        write: writes a dataset.
        read: reads it.
        no_remote: why it cannot read from S3, if it cannot.
    """
    torch.set_num_threads(1)
    action, arguments = sys.argv[1], json.loads(sys.argv[2])
    answer: dict[str, Any] = {"version": importlib.metadata.version(package)}
    if action == "prepare":
        prepare(write, **arguments)
    elif action == "cold" and no_remote:
        answer["skipped"] = no_remote
    else:
        folder = Path(arguments.pop("folder"))
        shape = tuple(json.loads((folder / "latents.json").read_text())["shape"])
        batch_size, tuned = arguments.pop("batch_size"), arguments.pop("tuned")
        if action == "measure":
            answer |= measure(read, Dataset(folder, shape, batch_size, tuned), **arguments)
        elif action == "positions":
            positions(read, Dataset(folder, shape, batch_size, tuned), **arguments)
        elif action == "cold":
            cache = Path(arguments.pop("cache"))
            cache.mkdir(parents=True)
            remote = Remote(**arguments, cache=cache)
            answer |= cold(read, Dataset(folder, shape, batch_size, tuned, remote))
    print(json.dumps(answer))
