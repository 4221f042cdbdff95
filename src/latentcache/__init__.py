"""latentcache: encode image datasets to KL-f8 latents once, and train from the result.

Everything public is imported on first use, so that `import latentcache`, the command line's help
and a training process never load what they do not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latentcache.config import Config, load_config, parse_config
    from latentcache.dataset.diff import ManifestDiff, diff_manifests
    from latentcache.dataset.publish import Published, publish
    from latentcache.dataset.reader import Dataset, RejectedRow, Row, open_dataset
    from latentcache.dataset.verify import Verification, verify
    from latentcache.engine.gc import Unreferenced, collect_unreferenced
    from latentcache.engine.plan import Plan, make_plan
    from latentcache.engine.run import run
    from latentcache.engine.summary import RunSummary
    from latentcache.errors import LatentCacheError
    from latentcache.loader.batch import Batch
    from latentcache.loader.join import Join
    from latentcache.loader.loader import LatentLoader
    from latentcache.loader.mapped import LatentDataset
    from latentcache.storage_options import StorageOptions
    from latentcache.vae.model import KLAutoencoder, to_uint8
    from latentcache.vae.weights import load_vae

_HOMES = {
    "Batch": "loader.batch",
    "Config": "config",
    "Dataset": "dataset.reader",
    "Join": "loader.join",
    "KLAutoencoder": "vae.model",
    "LatentCacheError": "errors",
    "LatentDataset": "loader.mapped",
    "LatentLoader": "loader.loader",
    "ManifestDiff": "dataset.diff",
    "Plan": "engine.plan",
    "Published": "dataset.publish",
    "RejectedRow": "dataset.reader",
    "Row": "dataset.reader",
    "RunSummary": "engine.summary",
    "StorageOptions": "storage_options",
    "Unreferenced": "engine.gc",
    "Verification": "dataset.verify",
    "collect_unreferenced": "engine.gc",
    "diff_manifests": "dataset.diff",
    "load_config": "config",
    "load_vae": "vae.weights",
    "make_plan": "engine.plan",
    "open_dataset": "dataset.reader",
    "parse_config": "config",
    "publish": "dataset.publish",
    "run": "engine.run",
    "to_uint8": "vae.model",
    "verify": "dataset.verify",
}

__all__ = [
    "Batch",
    "Config",
    "Dataset",
    "Join",
    "KLAutoencoder",
    "LatentCacheError",
    "LatentDataset",
    "LatentLoader",
    "ManifestDiff",
    "Plan",
    "Published",
    "RejectedRow",
    "Row",
    "RunSummary",
    "StorageOptions",
    "Unreferenced",
    "Verification",
    "collect_unreferenced",
    "diff_manifests",
    "load_config",
    "load_vae",
    "make_plan",
    "open_dataset",
    "parse_config",
    "publish",
    "run",
    "to_uint8",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
