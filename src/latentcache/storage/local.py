"""Folders on local and mounted disks."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from latentcache.errors import AccessDenied, StorageError, first_line
from latentcache.storage.backend import DANGLING, Backend, Entries, ObjectInfo
from latentcache.storage.failures import FinalStorageError, named_local
from latentcache.storage.local_files import (
    TEMP_PREFIX,
    can_create_exclusively,
    create_file,
    replace_file,
)
from latentcache.storage_options import StorageOptions

# The error numbers of local and mounted disks that a retry cannot fix.
_FINAL = {
    errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMLINK, errno.ENAMETOOLONG,
    errno.ENODEV, errno.ENOTEMPTY, errno.ENOTSUP, errno.ENXIO, errno.EOPNOTSUPP, errno.EROFS,
    errno.EXDEV,
}  # fmt: skip


class LocalBackend(Backend):
    """A local folder; `url` begins with `file://`."""

    is_local = True

    def __init__(self, url: str, options: StorageOptions) -> None:
        super().__init__(url, options)
        self.root = url.removeprefix("file://")

    def full(self, path: str) -> str:
        """Return the absolute path of a file."""
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def info(self, path: str) -> ObjectInfo | None:
        """Return a file's size and version; None if the path is a folder."""
        status = os.stat(self.full(path))
        return None if stat.S_ISDIR(status.st_mode) else _info(path, status)

    def entries(self, folder: str) -> Entries:
        """List the files and folders directly in a folder."""
        prefix = f"{folder}/" if folder else ""
        infos: list[ObjectInfo] = []
        folders: list[str] = []
        with os.scandir(self.full(prefix)) as entries:
            for entry in entries:
                # Other processes write here. Half-written files and files deleted since the scan
                # are not listed.
                with suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(prefix + entry.name)
                    elif entry.name.startswith(TEMP_PREFIX):
                        continue
                    elif _is_dangling(entry):
                        infos.append(ObjectInfo(prefix + entry.name, 0, DANGLING, None))
                    elif entry.is_file():
                        infos.append(_info(prefix + entry.name, entry.stat()))
        return infos, folders

    def put_file(self, local: Path, path: str) -> None:
        """Copy a local file into the store.

        Args:
            local: the file to copy.
            path: its path in the store.
        """
        with named_local(local):
            source = local.open("rb")
        with source:
            replace_file(self.full(path), source)

    def put(self, path: str, data: bytes) -> None:
        """Write a small file, replacing any file at its path.

        Args:
            path: the path in the store.
            data: the content.
        """
        replace_file(self.full(path), io.BytesIO(data))

    def create_exclusively(self, path: str, data: bytes) -> bool:
        """Write a small file if its path is free.

        Args:
            path: the path in the store.
            data: the content.

        Returns:
            Whether the file at the path now holds `data`.
        """
        return create_file(self.full(path), io.BytesIO(data))

    def can_create_exclusively(self) -> bool:
        """Return whether `create_exclusively` decides between writers on different hosts."""
        return can_create_exclusively(self.root)

    def temp_files(self) -> Iterator[ObjectInfo]:
        """Yield the temporary files: those being written, and those left by a killed writer."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith(TEMP_PREFIX):
                    with suppress(FileNotFoundError):  # its writer has finished by now
                        yield _info(os.path.relpath(path, self.root), os.stat(path))

    def explain(self, error: BaseException, url: str) -> StorageError:
        """Return the error of this package for an `OSError`, with how to fix it.

        Args:
            error: what the operating system raised.
            url: the file's URL.
        """
        if isinstance(error, PermissionError):
            who = f"user {os.geteuid()}" if hasattr(os, "geteuid") else "this user"
            return AccessDenied(
                f"{os.strerror(error.errno or errno.EACCES)}: {url.removeprefix('file://')}; check "
                f"the permissions of this file and its folders for {who}"
            )
        is_final = isinstance(error, OSError) and error.errno in _FINAL
        if is_final and not isinstance(error, IsADirectoryError):
            return FinalStorageError(f"cannot use {url}: {first_line(error)}")
        return super().explain(error, url)


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link to itself or to a path that does not exist."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _info(path: str, status: os.stat_result) -> ObjectInfo:
    # The version has nanoseconds, so that two writes within a second have different versions.
    return ObjectInfo(path, status.st_size, f"{status.st_mtime_ns}", status.st_mtime)
