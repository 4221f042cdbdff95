"""Google Cloud Storage (gcsfs), Azure Blob Storage (adlfs) and the Hub (huggingface_hub)."""

from __future__ import annotations

from typing import Any

from latentcache.errors import AccessDenied, StorageError, first_line
from latentcache.storage.backend import Backend
from latentcache.storage.failures import http_statuses
from latentcache.storage_options import StorageOptions


class _GcsBackend(Backend):
    extra = "gcs"
    transports = Backend.transports | {"gcsfs", "google"}
    denied = frozenset({"DefaultCredentialsError", "RefreshError"})
    # The ETag also changes with an object's metadata.
    versions = ("generation",)

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        return {
            "endpoint_url": options.endpoint_url,
            "requester_pays": options.requester_pays,
            "use_listings_cache": False,
        } | ({"token": "anon"} if options.anon else {})

    def explain(self, error: BaseException, url: str) -> StorageError:
        if str(error).startswith("Forbidden: "):  # an `OSError`
            return AccessDenied(
                f"access to {url} denied: {first_line(error)}; check the credentials"
            )
        return super().explain(error, url)

    def is_precondition_failure(self, error: BaseException) -> bool:
        # gcsfs raises `FileExistsError` for status 412 only, and drops the response.
        if not http_statuses(error):
            return isinstance(error.__cause__, FileExistsError)
        return super().is_precondition_failure(error)


class _AzureBackend(Backend):
    extra = "azure"
    transports = Backend.transports | {"adlfs", "azure"}
    denied = frozenset({"ClientAuthenticationError"})

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        return {"anon": options.anon, "use_listings_cache": False}


class _HubBackend(Backend):
    transports = Backend.transports | {"huggingface_hub"}
    denied = frozenset({"GatedRepoError", "LocalTokenNotFoundError"})
    invalid = frozenset({"HFValidationError", "RepositoryNotFoundError"})
    # One for each of the two kinds of repositories.
    versions = ("blob_id", "xet_hash")
    # Without `refresh` the client answers from its last listing. Without `expand_info` a fresh
    # answer has no version.
    info_options = {"refresh": True, "expand_info": True}  # noqa: RUF012  (never changed)


BACKENDS: dict[str, type[Backend]] = {
    **dict.fromkeys(("gs", "gcs"), _GcsBackend),
    **dict.fromkeys(("az", "abfs", "abfss"), _AzureBackend),
    "hf": _HubBackend,
}
