"""The operations that `Store` needs, on fsspec. The file of a protocol overrides what differs.

A backend tries an operation once and does not retry it. It raises the exceptions of its client,
which `explain` converts into errors of this package.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import fsspec

from latentcache.errors import (
    AccessDenied,
    ConfigError,
    DiskFull,
    ObjectNotFound,
    StorageError,
    first_line,
)
from latentcache.storage.failures import NO_ROOM, FinalStorageError, chain_of, http_status
from latentcache.storage_options import StorageOptions

# The HTTP statuses of a conditional put if the object exists or if another request is writing it.
_PRECONDITION_FAILED = (409, 412)

DANGLING = "dangling"
"""The version of a local link whose target does not exist."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: its `path` below the store's root, its size and its version.

    `version` is the ETag or the store's equivalent, otherwise the time of the last change.
    `modified_at` is that time in seconds since 1970 by the store's clock; None if unknown.
    """

    path: str
    size_bytes: int
    version: str
    modified_at: float | None


@dataclass(frozen=True, slots=True)
class Upload:
    """An unfinished multipart upload; `started_at` has the unit of `ObjectInfo.modified_at`."""

    path: str
    id: str
    started_at: float


Entries = tuple[Sequence[ObjectInfo], Sequence[str]]
"""The objects and the folders directly in a folder."""


class Backend:
    """A folder of a remote store, through the fsspec client of its protocol.

    Args:
        url: the URL of the folder, without a `/` at its end.
        options: how to reach the store.

    Raises:
        ConfigError: the client of the protocol is not installed.
    """

    is_local: ClassVar[bool] = False
    read_block_bytes: ClassVar[int] = 8 * 2**20
    # The extra of this package that installs the client, if the client is optional.
    extra: ClassVar[str | None] = None
    # Packages whose exceptions come from the store. Not all of them are an OSError.
    transports: ClassVar[frozenset[str]] = frozenset(
        {
            *("aiohttp", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2"),
            *("requests", "urllib3"),
        }
    )
    # Names of the exceptions for missing credentials or permissions, and for invalid names.
    denied: ClassVar[frozenset[str]] = frozenset()
    invalid: ClassVar[frozenset[str]] = frozenset()
    # The client's names of the fields that identify the version of an object.
    versions: ClassVar[tuple[str, ...]] = ("ETag", "etag")
    info_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.url, self.options = url, options
        self._protocol = url.split("://")[0]
        _ = self.client  # raises now if the client cannot be used

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        """Return the arguments of the fsspec client."""
        return {}

    @property
    def client(self) -> Any:
        """The client of the current process, so that a store made before a fork works after it."""
        kind: Any = type(self)  # mypy considers a class with class variables not hashable
        return _client(kind, self._protocol, self.options, os.getpid())

    def full(self, path: str) -> str:
        """Return the client's name for a path."""
        return f"{self.url}/{path}" if path else self.url

    def read(self, path: str) -> bytes:
        """Read a whole object."""
        return cast(bytes, self.client.cat_file(self.full(path)))

    def open(self, path: str, *, readahead: bool = True) -> Any:
        """Open an object for reading.

        Args:
            path: the path in the store.
            readahead: whether a read fetches a block of `read_block_bytes`.
        """
        options = {} if readahead else {"cache_type": "none"}
        return self.client.open(self.full(path), "rb", block_size=self.read_block_bytes, **options)

    def info(self, path: str) -> ObjectInfo | None:
        """Return an object's size and version; None if the path is a folder."""
        details = self.client.info(self.full(path), **self.info_options)
        return None if details["type"] == "directory" else self.info_of(path, details)

    def info_of(self, path: str, details: dict[str, Any]) -> ObjectInfo:
        """Return the client's description of an object as an `ObjectInfo`.

        Args:
            path: the path in the store.
            details: the client's description.
        """
        version = next((details[name] for name in self.versions if details.get(name)), None)
        changed = details.get("LastModified") or details.get("last_modified")
        changed = changed or details.get("mtime") or details.get("updated")
        if isinstance(changed, datetime):
            changed = changed.timestamp()
        return ObjectInfo(
            path=path,
            size_bytes=int(details["size"] or 0),
            version=str(version or changed or "").strip('"'),
            modified_at=float(changed) if isinstance(changed, int | float) else None,
        )

    def entries(self, folder: str) -> Entries:
        """List the objects and folders directly in a folder."""
        prefix = f"{folder}/" if folder else ""
        entries = self.client.ls(self.full(folder), detail=True, refresh=True)
        names = [(prefix + e["name"].rstrip("/").rpartition("/")[2], e) for e in entries]
        # A client lists a file as itself if `folder` is a file. Such an entry is not in the folder.
        infos = [
            self.info_of(path, entry)
            for path, entry in names
            if entry["type"] == "file" and entry["size"] is not None
        ]
        return infos, [path for path, entry in names if entry["type"] == "directory"]

    def now(self) -> float:
        """Return the store's time in seconds since 1970; the host's time if it is unknown."""
        return time.time()

    def put_file(self, local: Path, path: str) -> None:
        """Upload a local file.

        Args:
            local: the file to upload.
            path: its path in the store.
        """
        self.client.put_file(str(local), self.full(path))

    def put(self, path: str, data: bytes) -> None:
        """Write a small object, replacing any object at its path.

        Args:
            path: the path in the store.
            data: the content.
        """
        self.client.pipe_file(self.full(path), data)

    def create(self, path: str, data: bytes) -> None:
        """Write a small object with one conditional PUT.

        After any error, it is unknown whether the object was written.

        Args:
            path: the path in the store.
            data: the content.
        """
        self.client.pipe_file(self.full(path), data, mode="create")

    def delete(self, path: str) -> None:
        """Delete an object."""
        self.client.rm_file(self.full(path))

    def is_foreign(self, error: Exception) -> bool:
        """Return whether an exception comes from the store and not from a bug of this package."""
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        return isinstance(error, OSError) or not modules.isdisjoint(self.transports)

    def explain(self, error: BaseException, url: str) -> StorageError:
        """Return the error of this package for an exception of the client, with how to fix it.

        Args:
            error: what the client raised.
            url: the object's URL.
        """
        if isinstance(error, StorageError):
            return error
        kind, where = type(error).__name__, self.where
        if isinstance(error, OSError):
            if error.errno in NO_ROOM:
                return self.full_error(url)
            if error.errno in (errno.ENOSYS, errno.ENAMETOOLONG):
                return FinalStorageError(f"{url}{where} cannot do that: {first_line(error)}")
        if isinstance(error, IsADirectoryError):
            return ObjectNotFound(f"{url} is a folder, not a file")
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return ObjectNotFound(f"{url}: no such file")
        if kind in self.denied or isinstance(error, PermissionError):
            return AccessDenied(
                f"access to {url} denied: {first_line(error)}; check the credentials"
            )
        if kind in self.invalid:
            return FinalStorageError(f"{url}: {first_line(error)}")
        return StorageError(f"cannot reach or use {url}{where}: {first_line(error)}")

    def full_error(self, url: str) -> DiskFull:
        """Return the error of a full store."""
        return DiskFull(f"no room left to write {url}: free some space and run again")

    @property
    def where(self) -> str:
        """The endpoint as text that follows a URL; empty if there is none."""
        return f" (endpoint {self.options.endpoint_url})" if self.options.endpoint_url else ""

    def is_precondition_failure(self, error: BaseException) -> bool:
        """Return whether an error means that a conditional put failed because the object exists.

        Clients raise it in several forms (s3fs: `FileExistsError`, or an `OSError` with errno 5, 16
        or 22), so the HTTP status of the cause decides.
        """
        statuses = [http_status(link) for link in chain_of(error)]
        known = [status for status in statuses if status is not None]
        return bool(known) and all(status in _PRECONDITION_FAILED for status in known)


@lru_cache(maxsize=64)
def _client(kind: Any, protocol: str, options: StorageOptions, pid: int) -> Any:
    """Make the client of a protocol, once in a process because it takes a tenth of a second.

    fsspec's own cache is not used: it holds one client for each thread. `pid` is part of the key
    because no client survives a fork.
    """
    try:
        return fsspec.filesystem(protocol, skip_instance_cache=True, **kind.arguments(options))
    except ImportError as error:
        fix = f": pip install 'latentcache[{kind.extra}]'" if kind.extra else ""
        raise ConfigError(f"cannot use {protocol}:// URLs: {error}{fix}") from error
    except ValueError as error:
        raise ConfigError(f"cannot use {protocol}:// URLs: {error}") from error


def forget_clients() -> None:
    """Clear the cache of clients, so that the next store of each kind makes a new one."""
    _client.cache_clear()
