"""WebDataset: tar shards. The files named here are those of its repository."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset
from torch import Tensor

from rivals.program import Dataset, main

SHARD_BYTES = 1_000_000_000  # docs/imagenet-to-shards.md, docs/sharding.md


def write(latents: npt.NDArray[np.float16], folder: Path, row_bytes: int, tuned: bool) -> None:
    max_rows = SHARD_BYTES // row_bytes
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=max_rows, maxsize=1e12, verbose=0) as writer:
        for number, latent in enumerate(latents):
            # ShardWriter and decode() know `.npy` by its ending (docs/decoding.md, FAQ.md). Bare
            # bytes of a known shape are read twice as fast.
            value = {"bin": latent.tobytes()} if tuned else {"npy": np.array(latent)}
            writer.write({"__key__": f"{number:09d}", **value})


def read(data: Dataset) -> Callable[[], Iterable[Tensor]]:
    urls = [str(path) for path in sorted(data.folder.glob("*.tar"))]
    if data.remote:
        # FAQ.md: the store's own command line program, through a pipe.
        aws = f"{Path(sys.executable).with_name('aws')} --endpoint-url {data.remote.endpoint_url}"
        names = [Path(url).name for url in urls]
        urls = [f"pipe:{aws} s3 cp {data.remote.url}/{name} -" for name in names]

    def from_bytes(sample: dict[str, Any]) -> tuple[npt.NDArray[np.float16]]:
        return (np.frombuffer(sample["bin"], np.float16).reshape(data.shape),)

    # README.md: shuffle the shards (100 of them ahead) and 1,000 samples. FAQ.md: before decoding.
    dataset = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000)
    dataset = dataset.map(from_bytes) if data.tuned else dataset.decode().to_tuple("npy")
    # docs/sharding.md: batch in the dataset, not in the loader.
    dataset = dataset.batched(data.batch_size, partial=False)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=0)
    return lambda: (batch for (batch,) in loader)


if __name__ == "__main__":
    main("webdataset", write, read)
