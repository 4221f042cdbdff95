"""MosaicML Streaming: MDS shards through StreamingDataset.

The pages named here are those of docs.mosaicml.com/projects/streaming.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import DataLoader

from rivals.program import Dataset, main

# `import streaming` imports datasets that need torchvision. An empty module replaces it, because
# nothing that is measured uses it.
sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")

from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]  # noqa: E402

# Its arrays are views of bytes; torch would warn that they cannot be written to.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

SHARD_BYTES = 1 << 26  # MDSWriter's default; "Basic Dataset Conversion": 50 to 100 MB work well


def write(latents: npt.NDArray[np.float16], folder: Path, row_bytes: int, tuned: bool) -> None:
    # A fixed dtype and shape is the most efficient of its encodings for arrays; no compression,
    # which is for egress costs ("Basic Dataset Conversion").
    columns = {"latent": "ndarray:float16:" + ",".join(map(str, latents.shape[1:]))}
    offset_bytes = 4  # the overhead of a row in a shard
    size_limit = SHARD_BYTES * (latents[0].nbytes + offset_bytes) // (row_bytes + offset_bytes)
    with MDSWriter(out=str(folder), columns=columns, size_limit=size_limit) as writer:
        for latent in latents:
            writer.write({"latent": latent})


def read(data: Dataset) -> Callable[[], Iterable[Tensor]]:
    if data.remote:
        # "Configure Cloud Storage Credentials": any S3 compatible store, by this variable.
        os.environ["S3_ENDPOINT_URL"] = data.remote.endpoint_url
    dataset = StreamingDataset(
        # "Shard Retrieval": only `local` where the data is already there.
        remote=data.remote.url if data.remote else None,
        local=str(data.remote.cache if data.remote else data.folder),
        # "Shuffling": the defaults (py1e, its block size) are good, so set `shuffle` alone.
        shuffle=True,
        # Required, and equal to the DataLoader's (the reference of StreamingDataset).
        batch_size=data.batch_size,
        # How many rows its two threads may prefetch; default 8 batches. "Performance Tuning" says
        # to raise it where downloads are late. It also helps where nothing is downloaded: the
        # threads finish early in a pass and no longer take turns with the reader.
        predownload=1 << 40 if data.tuned else None,
    )
    loader = DataLoader(dataset, batch_size=data.batch_size, num_workers=0, drop_last=True)
    return lambda: (batch["latent"] for batch in loader)


if __name__ == "__main__":
    main("mosaicml-streaming", write, read)
