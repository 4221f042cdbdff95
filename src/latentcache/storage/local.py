"""Folders on local and mounted disks."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from latentcache.errors import AccessDenied, StorageError, first_line
from latentcache.storage import local_files
from latentcache.storage.backend import DANGLING, Backend, Entries, ObjectInfo
from latentcache.storage.failures import FinalStorageError, named_local

# The error numbers of local and mounted disks that a retry cannot fix.
_FINAL = {
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMLINK,
    errno.ENAMETOOLONG,
    errno.ENODEV,
    errno.ENOTEMPTY,
    errno.ENOTSUP,
    errno.ENXIO,
    errno.EOPNOTSUPP,
    errno.EROFS,
    errno.EXDEV,
}


class _LocalFiles(LocalFileSystem):  # type: ignore[misc]
    """The file system of fsspec, with atomic writes."""

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        with named_local(lpath):
            source = open(lpath, "rb")  # noqa: SIM115  (closed below)
        with source:
            local_files.replace_file(rpath, source)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "overwrite":
            local_files.replace_file(path, io.BytesIO(value))
        elif not local_files.create_file(path, io.BytesIO(value)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


class _LocalBackend(Backend):
    is_local = True
    client = _LocalFiles()

    def full(self, path: str) -> str:
        root = self.url.removeprefix("file://")
        return f"{root.rstrip('/')}/{path}" if path else root

    def info(self, path: str) -> ObjectInfo | None:
        status = os.stat(self.full(path))
        return None if stat.S_ISDIR(status.st_mode) else _info(path, status)

    def entries(self, folder: str) -> Entries:
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
                    elif entry.name.startswith(local_files.TEMP_PREFIX):
                        continue
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        infos.append(ObjectInfo(prefix + entry.name, 0, DANGLING, None))
                    elif entry.is_file():
                        infos.append(_info(prefix + entry.name, entry.stat()))
        return infos, folders

    def temp_files(self) -> Iterator[ObjectInfo]:
        root = self.full("")
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith(local_files.TEMP_PREFIX):
                    with suppress(FileNotFoundError):  # its writer has finished by now
                        yield _info(os.path.relpath(path, root), os.stat(path))

    def can_create(self) -> bool:
        return local_files.can_create_exclusively(self.full(""))

    def explain(self, error: BaseException, url: str) -> StorageError:
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


def _info(path: str, status: os.stat_result) -> ObjectInfo:
    # The version has nanoseconds, so that two writes within a second have different versions.
    return ObjectInfo(path, status.st_size, f"{status.st_mtime_ns}", status.st_mtime)


BACKENDS: dict[str, type[Backend]] = {"file": _LocalBackend}
