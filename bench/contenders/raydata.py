"""Ray Data: `read_webdataset`, a map of PIL transforms, actors with diffusers, `write_parquet`.

Its settings are `num_actors`, `num_cpus_per_actor` and `batch_size`.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from contenders import Asked, load_peer, tell
from contenders.dataloader import transform


def decode(row: dict[str, Any]) -> dict[str, Any]:
    """Bring one photograph to its size; `began` is the time of the start."""
    began = time.time()
    return {"key": row["__key__"], "image": transform(row["jpg"]).numpy(), "began": began}


class Encode:
    """An actor of `map_batches`."""

    def __init__(self, encoder: str) -> None:
        self._encode = load_peer(encoder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode a batch."""
        images = torch.from_numpy(np.stack(list(batch["image"])))
        latents = self._encode(images).half().numpy()
        return {"key": batch["key"], "latent": latents, "began": batch["began"]}


if __name__ == "__main__":
    asked = Asked.of_command_line()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shards = [str(path) for path in sorted(Path(asked.shards).glob("*.tar"))]
    photos = ray.data.read_webdataset(shards, decoder=None).map(decode)
    latents = photos.map_batches(
        Encode,
        fn_constructor_args=(asked.encoder,),
        batch_size=asked.settings["batch_size"],
        num_cpus=asked.settings["num_cpus_per_actor"],
        concurrency=asked.settings["num_actors"],
    )
    latents.write_parquet(str(asked.out))
    ended = time.time()
    written = pq.read_table(asked.out, columns=["began"])
    tell(written.num_rows, pc.min(written["began"]).as_py(), ended)
