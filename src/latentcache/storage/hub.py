"""Repositories on the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

from latentcache.storage.backend import Backend


class HubBackend(Backend):
    """A folder of a repository."""

    transports = Backend.transports | {"huggingface_hub"}
    denied = frozenset({"GatedRepoError", "LocalTokenNotFoundError"})
    invalid = frozenset({"HFValidationError", "RepositoryNotFoundError"})
    # One for each of the two kinds of repositories.
    versions = ("blob_id", "xet_hash")
    # Without `refresh` the client answers from its last listing. Without `expand_info` a fresh
    # answer has no version.
    info_options = {"refresh": True, "expand_info": True}  # noqa: RUF012  (never changed)
