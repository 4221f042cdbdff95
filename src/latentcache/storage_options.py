"""The options for reaching a store, as a dataclass, so that readers do not need Pydantic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """The options for reaching a store.

    Credentials come from the environment or from the named profile.

    Args:
        endpoint_url: an S3-compatible server other than AWS, with http:// or https://.
        profile: a profile of the AWS config files.
        anon: read a public bucket without credentials.
        requester_pays: accept the charges of a requester-pays bucket.
    """

    # Pydantic reads this when the class is a section of a config.
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "hide_input_in_errors": True,
    }

    endpoint_url: str | None = None
    profile: str | None = None
    anon: bool = False
    requester_pays: bool = False
