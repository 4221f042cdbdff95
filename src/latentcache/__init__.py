"""latentcache: encode image datasets to KL-f8 latents once, and train from the result.

Everything public is imported on first use, so that a process loads only what it needs.
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

# The module of each public name.
_MODULES = {
    "config": ("Config", "load_config", "parse_config"),
    "dataset.diff": ("ManifestDiff", "diff_manifests"),
    "dataset.publish": ("Published", "publish"),
    "dataset.reader": ("Dataset", "RejectedRow", "Row", "open_dataset"),
    "dataset.verify": ("Verification", "verify"),
    "engine.gc": ("Unreferenced", "collect_unreferenced"),
    "engine.plan": ("Plan", "make_plan"),
    "engine.run": ("run",),
    "engine.summary": ("RunSummary",),
    "errors": ("LatentCacheError",),
    "loader.batch": ("Batch",),
    "loader.join": ("Join",),
    "loader.loader": ("LatentLoader",),
    "loader.mapped": ("LatentDataset",),
    "storage_options": ("StorageOptions",),
    "vae.model": ("KLAutoencoder", "to_uint8"),
    "vae.weights": ("load_vae",),
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
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
