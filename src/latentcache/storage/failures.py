"""The errors of stores and disks that all protocols share."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from latentcache.errors import AccessDenied, DiskFull, ObjectNotFound, StorageError, first_line


class FinalStorageError(StorageError):
    """A `StorageError` that a retry cannot fix."""


def is_final(error: StorageError) -> bool:
    """Return whether a retry cannot fix an error."""
    return isinstance(error, FinalStorageError | AccessDenied | ObjectNotFound | DiskFull)


def is_full(error: BaseException) -> bool:
    """Return whether an error of the operating system means a full disk or an exceeded quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(name: object) -> DiskFull:
    """Return the error of a full store or disk."""
    return DiskFull(f"no room left to write {name}: free some space and run again")


@contextmanager
def named_local(path: object) -> Iterator[None]:
    """Raise an `OSError` of the block as a `StorageError` that names a local file or folder."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(path) from error
        raise FinalStorageError(f"cannot use {path}: {first_line(error)}") from error


def http_statuses(error: BaseException | None) -> list[int]:
    """Return the HTTP statuses of an error and of its causes."""
    statuses: list[int] = []
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):  # of botocore
            values = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:  # gcsfs, aiohttp and azure-core
            values = [getattr(error, name, None) for name in ("status_code", "status", "code")]
        statuses += [int(value) for value in values if str(value).isdecimal()][:1]
        error = error.__cause__ or error.__context__
    return statuses
