"""Repositories on the Hugging Face Hub."""

from __future__ import annotations

from latentcache.storage.backend import Backend


class HubBackend(Backend):
    """A folder of a repository."""

    transports = Backend.transports | {"huggingface_hub"}
    denied = frozenset({"GatedRepoError", "LocalTokenNotFoundError"})
    invalid = frozenset({"HFValidationError", "RepositoryNotFoundError"})
    # Of the two kinds of repositories.
    versions = ("blob_id", "xet_hash")
    # The client else answers from its last listing, and a fresh answer has no version in it.
    info_options = {"refresh": True, "expand_info": True}  # noqa: RUF012  (never changed)
