"""Google Cloud Storage, by gcsfs."""

from __future__ import annotations

from typing import Any

from latentcache.errors import AccessDenied, StorageError, first_line
from latentcache.storage.backend import Backend
from latentcache.storage.failures import chain_of, http_status
from latentcache.storage_options import StorageOptions


class GcsBackend(Backend):
    """A folder of a bucket."""

    extra = "gcs"
    transports = Backend.transports | {"gcsfs", "google"}
    denied = frozenset({"DefaultCredentialsError", "RefreshError"})
    # The ETag changes with an object's metadata too.
    versions = ("generation",)

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        """Return the arguments of fsspec's client."""
        return {
            "endpoint_url": options.endpoint_url,
            "requester_pays": options.requester_pays,
            "use_listings_cache": False,
        } | ({"token": "anon"} if options.anon else {})

    def explain(self, error: BaseException, url: str) -> StorageError:
        """Say what a foreign exception means; gcsfs words a refusal in an `OSError`."""
        if str(error).startswith("Forbidden: "):
            return AccessDenied(
                f"access to {url} denied: {first_line(error)}; check the credentials"
            )
        return super().explain(error, url)

    def is_precondition_failure(self, error: BaseException) -> bool:
        """Whether a conditional put was refused: of a 412 alone gcsfs raises `FileExistsError`."""
        chain = chain_of(error)
        if all(http_status(found) is None for found in chain):
            return any(isinstance(found, FileExistsError) for found in chain)
        return super().is_precondition_failure(error)
