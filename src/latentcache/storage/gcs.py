"""Google Cloud Storage, through gcsfs."""

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
    # The ETag also changes with an object's metadata.
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
        """Return the error of this package for an exception of the client.

        gcsfs raises a refusal as an `OSError` that begins with "Forbidden: ".

        Args:
            error: what the client raised.
            url: the object's URL.
        """
        if str(error).startswith("Forbidden: "):
            return AccessDenied(
                f"access to {url} denied: {first_line(error)}; check the credentials"
            )
        return super().explain(error, url)

    def is_precondition_failure(self, error: BaseException) -> bool:
        """Return whether an error means that a conditional put was refused.

        gcsfs raises `FileExistsError` for status 412 only.
        """
        chain = chain_of(error)
        if all(http_status(link) is None for link in chain):
            return any(isinstance(link, FileExistsError) for link in chain)
        return super().is_precondition_failure(error)
