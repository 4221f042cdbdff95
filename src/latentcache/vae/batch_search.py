"""Find the batch size of a GPU: measured once for each image size, and then cached.

The rate rises until the GPU is fully used. A larger batch only costs memory that QA needs.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from latentcache.storage.local_files import replace_file

_MAX_IMAGES = 128

# The largest feature maps have 128 channels. One pixel more would make 2**31 values, which exceeds
# cuDNN's indices, so torch would split the batch; and it would take 4 GiB in 16 bits.
_MAX_PIXELS = 2**24 - 1

_GOOD_ENOUGH = 0.97
_MAX_IDLE_DOUBLINGS = 2


def find_batch_size(measure: Callable[[int], float], most: int) -> int:
    """Return the smallest power of two whose rate is within 3% of the best; 1 if none fits.

    Args:
        measure: returns images/s at a size up to `most`, or raises `torch.OutOfMemoryError`.
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
    """Return the cached batch size of an encoder and a bucket, or find it and cache it.

    The cache is `$XDG_CACHE_HOME/latentcache/batch_sizes.json`, or below `~/.cache`. It is
    optional. Buckets of about the same area share an entry, because shape hardly matters.

    Args:
        encoder: all else that affects the rate: device, software, precision, and network.
        width_px, height_px, measure: the size of the images; see `find_batch_size`.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    path = home / "latentcache" / "batch_sizes.json"
    num_pixels = width_px * height_px
    key = f"{encoder}, about {2 ** round(math.log2(num_pixels))} px"
    size = _read(path).get(key)
    if type(size) is not int or size < 1:
        most = max(1, min(_MAX_IMAGES, _MAX_PIXELS // num_pixels))
        size = find_batch_size(measure, most)
        with contextlib.suppress(OSError):
            sizes = json.dumps({**_read(path), key: size}, indent=1, sort_keys=True)
            replace_file(str(path), io.BytesIO(sizes.encode() + b"\n"))
    return size


def _read(path: Path) -> dict[str, object]:
    try:
        sizes = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return sizes if isinstance(sizes, dict) else {}
