"""How many images a GPU takes at once: tried once for each size of image, and then remembered.

The rate rises with the batch until the GPU is full; what is more costs memory, which QA wants too,
and gains nothing. So the smallest batch that is about as fast as the best is taken.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_MAX_IMAGES = 128

# One more would make 2**31 values of 128 channels, which the widest maps have: more than cuDNN's
# indices hold, so that torch would split the batch; and 4 GiB in 16 bits.
_MAX_PIXELS = 2**24 - 1

_GOOD_ENOUGH = 0.97
_MAX_IDLE_DOUBLINGS = 2


def find_batch_size(measure: Callable[[int], float], most: int) -> int:
    """Find the smallest power of two that comes within 3% of the best rate.

    Args:
        measure: gives images/s at a batch size; may raise `torch.OutOfMemoryError`, and is then
            asked for no larger one.
        most: the largest size to try.

    Returns:
        A batch size; 1 if not even that could be measured.
    """
    rates: dict[int, float] = {}
    best, num_idle, size = 0.0, 0, 1
    while size <= most and num_idle < _MAX_IDLE_DOUBLINGS:
        try:
            rates[size] = measure(size)
        except torch.OutOfMemoryError:
            break
        num_idle = num_idle + 1 if rates[size] * _GOOD_ENOUGH < best else 0
        best = max(best, rates[size])
        size *= 2
    return min((size for size, rate in rates.items() if rate >= _GOOD_ENOUGH * best), default=1)


def remembered_batch_size(
    encoder: str, width_px: int, height_px: int, measure: Callable[[int], float]
) -> int:
    """Look up the batch size for an encoder and a bucket, or find it and write it down.

    It is kept in `$XDG_CACHE_HOME/latentcache/batch_sizes.json`, or below `~/.cache`. A damaged
    file, or one that cannot be written, costs a search and nothing else. Buckets of about the same
    area share an entry: their shape hardly moves the rate, and a run may have forty of them.

    Args:
        encoder: what else the rate depends on: device, software, precision, the network's sizes.
        width_px: of the images.
        height_px: of the images.
        measure: as in `find_batch_size`.
    """
    path = _cache_home() / "latentcache" / "batch_sizes.json"
    num_pixels = width_px * height_px
    key = f"{encoder}, about {2 ** round(math.log2(num_pixels))} px"
    found = _read(path).get(key)
    if type(found) is not int or found < 1:
        most = max(1, min(_MAX_IMAGES, _MAX_PIXELS // num_pixels))
        found = find_batch_size(measure, most)
        with contextlib.suppress(OSError):
            _write(path, {**_read(path), key: found})
    return found


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())


def _read(path: Path) -> dict[str, object]:
    try:
        sizes = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return sizes if isinstance(sizes, dict) else {}


def _write(path: Path, sizes: dict[str, object]) -> None:
    """Replace the file in one step, for others on this machine read and write it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(sizes, indent=1, sort_keys=True) + "\n")
    Path(file.name).replace(path)
