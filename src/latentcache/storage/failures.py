"""The errors of stores and disks that every protocol has in common."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentcache.errors import AccessDenied, DiskFull, ObjectNotFound, StorageError, first_line

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FinalStorageError(StorageError):
    """A `StorageError` that trying again cannot fix."""


def is_final(error: StorageError) -> bool:
    """Whether trying again is in vain."""
    return isinstance(error, FinalStorageError | AccessDenied | ObjectNotFound | DiskFull)


@contextmanager
def named_local(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside into a `StorageError` that names a local file or folder."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"no room left to write {path}: free some space") from error
        raise FinalStorageError(f"cannot use {path}: {first_line(error)}") from error


def chain_of(error: BaseException) -> list[BaseException]:
    """Return an error and what caused it, the error first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def http_status(error: BaseException) -> int | None:
    """Read the HTTP status off an exception of botocore, gcsfs, aiohttp or azure-core."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(status) if status is not None else None
    for name in ("status_code", "status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()):
            return int(status)
    return None
