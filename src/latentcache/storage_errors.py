"""What stores, their clients and disks raise, in the words of this package.

fsspec's clients have no errors in common: some raise `OSError`, some what their own transport does.
What trying again cannot mend is told apart here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentcache.errors import AccessDenied, DiskFull, ObjectNotFound, StorageError, first_line

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

# A store answers so to a conditional put of an object that exists, or that another request writes.
_PRECONDITION_FAILED = (409, 412)

# What a mounted or local disk answers that another try does not change.
_FINAL_ON_DISK = {
    errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMLINK, errno.ENAMETOOLONG,
    errno.ENODEV, errno.ENOTEMPTY, errno.ENOTSUP, errno.ENXIO, errno.EOPNOTSUPP, errno.EROFS,
    errno.EXDEV,
}  # fmt: skip

# What S3 stores say when they are full: Ceph, MinIO, and those that pass on what their disk said.
_SAYS_FULL = ("(QuotaExceeded)", "StorageFull)", "no space left on device", "disk quota exceeded")

# Packages whose exceptions are a store's doing; not all of them are an OSError.
_TRANSPORTS = {
    "adlfs", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpcore2",
    "httpx", "httpx2", "huggingface_hub", "requests", "s3fs", "urllib3",
}  # fmt: skip

# What clients other than S3's raise for want of credentials, or of rights; gcsfs words it alone.
_DENIED = {
    "ClientAuthenticationError", "DefaultCredentialsError", "GatedRepoError",
    "LocalTokenNotFoundError", "RefreshError",
}  # fmt: skip
_SAYS_DENIED = "Forbidden: "


@contextmanager
def named_local(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside into a `StorageError` that names a local file or folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(f"no room left to write {path}: free some space") from error
        raise _Final(f"cannot use {path}: {first_line(error)}") from error


def is_foreign(error: Exception) -> bool:
    """Whether an exception is a store's doing, and not a mistake of ours."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return (
        isinstance(error, OSError) or _is_bad_endpoint(error) or not modules.isdisjoint(_TRANSPORTS)
    )


def _is_bad_endpoint(error: BaseException) -> bool:
    # botocore raises a plain ValueError for an endpoint that AWS_ENDPOINT_URL or a profile names.
    return isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")


def translate(error: BaseException, url: str, endpoint_url: str | None) -> StorageError:
    """Say what an exception means for a URL, and what the mend is."""
    kind = type(error).__name__
    if isinstance(error, StorageError):
        return error
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or _says_full(error):
        return DiskFull(f"no room left to write {url}: free some space and run again")
    if url.startswith("file://") and isinstance(error, OSError):
        if isinstance(error, PermissionError):
            said = os.strerror(error.errno or errno.EACCES)
            return AccessDenied(
                f"{said}: {url.removeprefix('file://')}; check the permissions of this file and "
                f"its folders for {_who()}"
            )
        if error.errno in _FINAL_ON_DISK and not isinstance(error, IsADirectoryError):
            return _Final(f"cannot use {url}: {first_line(error)}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSYS, errno.ENAMETOOLONG):
        return _Final(f"{url}{_where(endpoint_url)} cannot do that: {first_line(error)}")
    if "NoSuchBucket" in str(error.__cause__):
        return _Final(f"cannot use {url}: there is no such bucket{_where(endpoint_url)}")
    if isinstance(error, IsADirectoryError):
        return ObjectNotFound(f"{url} is a folder, not a file")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ObjectNotFound(f"{url}: no such file")
    if _is_bad_endpoint(error):
        return _Final(
            f"cannot use {url}: {first_line(error)}; correct AWS_ENDPOINT_URL or `endpoint_url` of "
            "the AWS profile, which begin with http:// or https://"
        )
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return AccessDenied(
            f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a "
            "profile in `storage.profile`, or set `storage.anon: true` for a public bucket"
        )
    if kind == "ProfileNotFound":
        return AccessDenied(f"cannot open {url}: {first_line(error)}")
    if "RequestTimeTooSkewed" in str(error.__cause__):
        return AccessDenied(f"{url} refuses the time of this machine: set its clock")
    is_denied = kind in _DENIED or str(error).startswith(_SAYS_DENIED)
    if is_denied or isinstance(error, PermissionError):
        return AccessDenied(f"access to {url} denied: {first_line(error)}; check the credentials")
    if kind in ("ParamValidationError", "HFValidationError", "RepositoryNotFoundError"):
        return _Final(f"{url}: {first_line(error)}")
    return StorageError(f"cannot reach or use {url}{_where(endpoint_url)}: {first_line(error)}")


def _who() -> str:
    return f"user {os.geteuid()}" if hasattr(os, "geteuid") else "this user"


def is_precondition_failure(error: BaseException, protocol: str) -> bool:
    """Whether an error means that a conditional request was refused because its object exists.

    Clients raise it in several forms (s3fs: `FileExistsError`, or an `OSError` with errno 5, 16 or
    22), so the HTTP status of the cause decides. gcsfs alone raises a bare `FileExistsError`, and
    only for a 412.
    """
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    statuses = [status for found in chain if (status := _http_status(found)) is not None]
    if statuses:
        return all(status in _PRECONDITION_FAILED for status in statuses)
    return protocol in ("gs", "gcs") and any(isinstance(e, FileExistsError) for e in chain)


def _http_status(error: BaseException) -> int | None:
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


def _says_full(error: BaseException) -> bool:
    said = f"{error} {error.__cause__}"
    return any(words in said for words in _SAYS_FULL)


def _where(endpoint_url: str | None) -> str:
    return f" (endpoint {endpoint_url})" if endpoint_url else ""


class _Final(StorageError):
    """A `StorageError` that trying again cannot mend."""


def is_final(error: StorageError) -> bool:
    """Whether trying again is in vain."""
    return isinstance(error, _Final | AccessDenied | ObjectNotFound | DiskFull)
