"""This project, with the same call as `latentcache run`.

Its settings are those of the section `compute`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from contenders import RESOLUTION_PX, Asked, free_moments, tell
from latentcache import parse_config, run
from latentcache.dataset.receipts import list_receipt_names, read_receipts
from latentcache.engine.cluster import Cluster, _EncoderActor
from latentcache.errors import LatentCacheError
from latentcache.storage import Store
from latentcache.vae.encoder import Encoded


class FreeActor(_EncoderActor):
    """The actor of a run, without the encoder's arithmetic."""

    def setup(self) -> str | LatentCacheError:
        """Set up as usual, then replace the arithmetic."""
        ready = super().setup()
        assert self._runner
        self._runner.load().encoder.start = _start_free  # type: ignore[method-assign]
        return ready


def _start_free(images: torch.Tensor) -> Callable[[], Encoded]:
    return lambda: Encoded(free_moments(images), 0, ())


if __name__ == "__main__":
    asked = Asked.of_command_line()
    if asked.encoder == "free":
        Cluster.actor_class = FreeActor
    config = parse_config(
        {
            "name": "bench",
            "source": {"shards": f"{asked.shards}/*.tar"},
            "transform": {"resolution_px": RESOLUTION_PX},
            "vae": {"checkpoint": "demo"},
            "output": {"url": str(asked.out)},
            "compute": {"num_gpus": 0, **asked.settings},
        }
    )
    summary = run(config, quiet=True)
    store = Store(summary.output)
    put_at = {info.path: info.modified_at or 0.0 for info in store.list("commits")}
    began = [
        put_at[receipt.path] - (receipt.elapsed_s or 0.0)
        for receipt in read_receipts(store, list_receipt_names(store))
    ]
    tell(summary.num_rows, min(began), max(put_at.values()))
