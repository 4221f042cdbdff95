"""What differs between stores, on fsspec. The file of a protocol overrides it.

A backend does not retry. It raises its client's exceptions, and `explain` converts them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

import fsspec

from latentcache.errors import AccessDenied, ConfigError, ObjectNotFound, StorageError, first_line
from latentcache.storage.failures import FinalStorageError, disk_full, http_statuses, is_full
from latentcache.storage_options import StorageOptions

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

    `url` has no `/` at its end. `ConfigError` is raised if the client is not installed.
    """

    is_local: ClassVar[bool] = False
    read_block_bytes: ClassVar[int] = 8 * 2**20
    # The extra of this package that installs the client, if the client is optional.
    extra: ClassVar[str | None] = None
    # Packages whose exceptions come from the store. Not all of them are an OSError.
    transports: ClassVar[frozenset[str]] = frozenset(
        {"aiohttp", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
    )
    # Names of the exceptions for missing credentials or permissions, and for invalid names.
    denied: ClassVar[frozenset[str]] = frozenset()
    invalid: ClassVar[frozenset[str]] = frozenset()
    # The client's names of the fields that identify the version of an object.
    versions: ClassVar[tuple[str, ...]] = ("ETag", "etag")
    info_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.url, self.options = url, options
        _ = self.client  # raises now if the client cannot be used

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        """Return the arguments of the fsspec client."""
        return {}

    @property
    def client(self) -> Any:
        """The client of the current process, so that a store made before a fork works after it."""
        kind: Any = type(self)  # mypy considers a class with class variables not hashable
        return _client(kind, self.url.partition("://")[0], self.options, os.getpid())

    def full(self, path: str) -> str:
        """Return the client's name for a path."""
        return f"{self.url}/{path}" if path else self.url

    def info(self, path: str) -> ObjectInfo | None:
        """Return an object's size and version; None if the path is a folder."""
        details = self.client.info(self.full(path), **self.info_options)
        return None if details["type"] == "directory" else self._info_of(path, details)

    def _info_of(self, path: str, details: dict[str, Any]) -> ObjectInfo:
        version = next((details[name] for name in self.versions if details.get(name)), None)
        names = ("LastModified", "last_modified", "mtime", "updated")
        changed = next((details[name] for name in names if details.get(name)), None)
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
        infos: list[ObjectInfo] = []
        folders: list[str] = []
        for entry in self.client.ls(self.full(folder), detail=True, refresh=True):
            path = prefix + entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] == "directory":
                folders.append(path)
            elif entry["type"] == "file" and entry["size"] is not None:
                infos.append(self._info_of(path, entry))
        return infos, folders

    def temp_files(self) -> Iterator[ObjectInfo]:
        """Yield the temporary files: active ones, and those of killed writers."""
        return iter(())

    def now(self) -> float:
        """Return the store's time in seconds since 1970; the host's time if it is unknown."""
        return time.time()

    def can_create(self) -> bool | None:
        """Return whether the client's mode `create` is exclusive; None if only a put shows it."""
        return None

    def is_foreign(self, error: Exception) -> bool:
        """Return whether an exception comes from the store and not from a bug of this package."""
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        return isinstance(error, OSError) or not modules.isdisjoint(self.transports)

    def explain(self, error: BaseException, url: str) -> StorageError:
        """Return the error of this package for an exception of the client.

        Args:
            error, url: what the client raised, and the object's URL.
        """
        if is_full(error):
            return disk_full(url)
        reason, kind = first_line(error), type(error).__name__
        if isinstance(error, OSError) and error.errno in (errno.ENOSYS, errno.ENAMETOOLONG):
            return FinalStorageError(f"{url}{self.where} cannot do that: {reason}")
        if isinstance(error, IsADirectoryError):
            return ObjectNotFound(f"{url} is a folder, not a file")
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return ObjectNotFound(f"{url}: no such file")
        if kind in self.denied or isinstance(error, PermissionError):
            return AccessDenied(f"access to {url} denied: {reason}; check the credentials")
        if kind in self.invalid:
            return FinalStorageError(f"{url}: {reason}")
        return StorageError(f"cannot reach or use {url}{self.where}: {reason}")

    @property
    def where(self) -> str:
        """The endpoint as text that follows a URL; empty if there is none."""
        return f" (endpoint {self.options.endpoint_url})" if self.options.endpoint_url else ""

    def is_precondition_failure(self, error: BaseException) -> bool:
        """Return whether an error means that a conditional put failed because the object exists."""
        # Clients raise it in several forms (s3fs: `FileExistsError`, or an `OSError` with errno 5,
        # 16 or 22), so the HTTP status decides. 409: another request is writing the object.
        statuses = set(http_statuses(error))
        return bool(statuses) and statuses <= {409, 412}


@lru_cache(maxsize=64)
def _client(kind: Any, protocol: str, options: StorageOptions, pid: int) -> Any:
    """Make the client of a protocol, once in a process because it takes a tenth of a second.

    fsspec's own cache holds one client for each thread. `pid` is a key because of forks.
    """
    try:
        return fsspec.filesystem(protocol, skip_instance_cache=True, **kind.arguments(options))
    except (ImportError, ValueError) as error:
        needs_extra = kind.extra and isinstance(error, ImportError)
        fix = f": pip install 'latentcache[{kind.extra}]'" if needs_extra else ""
        raise ConfigError(f"cannot use {protocol}:// URLs: {error}{fix}") from error
