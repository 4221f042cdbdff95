"""Shared parts of the benchmarks: fair turns, tables, and result files with machine details."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each contender.

    The contenders run one after the other. Each round starts with another one, so that a machine
    that slows down favours none. A first round, which is not counted, warms caches.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            contenders[name]()
            if number >= 0:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text; the first column has the names, and the others are right-aligned."""
    lines = [["", *columns], *map(list, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    print(f"\n{title}")
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())


def write_results(name: str, figures: Mapping[str, Any], packages: Sequence[str] = ()) -> None:
    """Write `results/<name>.json`: the results, and the command, commit, machine and versions.

    Parts of the file that `figures` lacks are kept, each with the details of its own run.

    Args:
        name: name of the benchmark.
        figures: a tree for each part.
        packages: packages whose versions matter, in addition to torch.
    """
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    facts = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit,
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: version(package) for package in packages},
        },
    }
    path = RESULTS / f"{name}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept |= {part: {**facts, "found": tree} for part, tree in figures.items()}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written to {os.path.relpath(path)}")


def peak_mib() -> float:
    """Return the peak memory of this process. Not `ru_maxrss`, which a child inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores and the GPU of this machine."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    processor = models[0] if models else platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), **gpu}
