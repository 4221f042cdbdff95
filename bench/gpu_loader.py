"""Load the batches of a dataset on the GPU and compare them with the CPU's: part of bench/gpu.sh.

`python bench/gpu_loader.py DATASET`
"""

from __future__ import annotations

import functools
import itertools
import sys

import torch

from latentcache import LatentLoader
from latentcache.loader.benchmark import measure_loader


def main() -> None:
    make = functools.partial(LatentLoader, sys.argv[1], batch_size=256, tail="pad")
    pairs = itertools.islice(zip(make(device="cuda"), make(), strict=True), 20)
    for ours, theirs in pairs:
        assert ours.latents.is_cuda
        torch.testing.assert_close(ours.latents.cpu(), theirs.latents)
    for device in ("cuda", "cpu"):
        speed = measure_loader(functools.partial(make, device=device), 5.0)
        print(f"{device}: {speed.rows_per_s:,.0f} samples/s, {speed.megabytes_per_s:,.0f} MB/s")


if __name__ == "__main__":
    main()
