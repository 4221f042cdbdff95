"""The options for reaching a store, as a dataclass, so that readers do not need Pydantic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """The way to reach a store. Credentials come from the environment or from the profile."""

    # Pydantic reads this, and the strings below the fields, for a section of a config.
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "hide_input_in_errors": True,
        "use_attribute_docstrings": True,
    }

    endpoint_url: str | None = field(
        default=None, metadata={"examples": ["https://minio.example.com"]}
    )
    """URL of an S3-compatible server other than AWS, with http:// or https://."""
    profile: str | None = field(default=None, metadata={"examples": ["research"]})
    """Profile of the AWS config files that holds the credentials."""
    anon: bool = False
    """Read a public bucket without credentials."""
    requester_pays: bool = False
    """Accept the charges of a requester-pays bucket."""
