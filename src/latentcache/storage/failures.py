"""The errors of stores and disks that all protocols share."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentcache.errors import AccessDenied, DiskFull, ObjectNotFound, StorageError, first_line

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FinalStorageError(StorageError):
    """A `StorageError` that a retry cannot fix."""


def is_final(error: StorageError) -> bool:
    """Return whether a retry cannot fix an error."""
    return isinstance(error, FinalStorageError | AccessDenied | ObjectNotFound | DiskFull)


@contextmanager
def named_local(path: Path) -> Iterator[None]:
    """Raise an `OSError` of the block as a `StorageError` that names a local file or folder."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"no room left to write {path}: free some space") from error
        raise FinalStorageError(f"cannot use {path}: {first_line(error)}") from error


def chain_of(error: BaseException) -> list[BaseException]:
    """Return an error followed by its causes."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an exception of botocore, gcsfs, aiohttp or azure-core.

    Returns:
        None if the exception has no status.
    """
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(status) if status is not None else None
    for name in ("status_code", "status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()):
            return int(status)
    return None
