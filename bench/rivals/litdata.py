"""litdata: chunks through StreamingDataset. The sections named here are those of its README."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata  # type: ignore[import-not-found]
import numpy as np
import numpy.typing as npt
import torch
from litdata.streaming import downloader  # type: ignore[import-not-found]
from torch import Tensor

from rivals.program import Dataset, main

CHUNK_BYTES = 64_000_000  # "FAQ: chunk size": 64MB for small and medium samples


def rows(latents: npt.NDArray[np.float16], _: object, tuned: bool) -> Iterator[Any]:
    # "Modality" has arrays and tensors. With the defaults arrays are read ten times faster: tensors
    # are decoded in windows of 32 rows, but shuffled in blocks of 256. `read` has the remedy.
    for latent in latents:
        yield torch.from_numpy(np.array(latent)) if tuned else np.array(latent)


def write(latents: npt.NDArray[np.float16], folder: Path, row_bytes: int, tuned: bool) -> None:
    litdata.optimize(
        fn=partial(rows, latents, tuned=tuned),
        inputs=[0],  # one call that yields every row ("Reduce memory use for large files")
        output_dir=str(folder),
        chunk_size=CHUNK_BYTES // row_bytes,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


def read(data: Dataset) -> Callable[[], Iterable[Tensor]]:
    # "Shuffle, seed, and drop_last": on a local disk chunks are mapped in place. All chunks are
    # shuffled, within a chunk its blocks of 256 rows, and the rows within a block.
    options: dict[str, Any] = {"shuffle": True, "drop_last": True}
    if data.tuned:
        # Decode in windows as large as the blocks (StreamingDataset's reference; the README does
        # not say so). It is also what keeps large rows from being decoded again for each batch.
        options["batch_decode"] = 256
    if data.remote:
        # The client that fetches chunks accepts only https, and no option changes that.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        # "Stream large cloud datasets": a custom endpoint and a cache directory.
        options["cache_dir"] = str(data.remote.cache)
        options["storage_options"] = {
            "endpoint_url": data.remote.endpoint_url,
            "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        }
    url = data.remote.url if data.remote else str(data.folder)
    dataset = litdata.StreamingDataset(url, **options)
    # "StreamingDataset & StreamingDataLoader knobs": its own loader rather than torch's.
    loader: Iterable[Tensor] = litdata.StreamingDataLoader(
        dataset, batch_size=data.batch_size, num_workers=0
    )
    return lambda: loader


if __name__ == "__main__":
    main("litdata", write, read)
