"""Azure Blob Storage, through adlfs."""

from __future__ import annotations

from typing import Any

from latentcache.storage.backend import Backend
from latentcache.storage_options import StorageOptions


class AzureBackend(Backend):
    """A folder of a container."""

    extra = "azure"
    transports = Backend.transports | {"adlfs", "azure"}
    denied = frozenset({"ClientAuthenticationError"})

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        """Return the arguments of fsspec's client."""
        return {"anon": options.anon, "use_listings_cache": False}
