"""Atomic writes on local and mounted disks: replace a file, or create it if its name is free.

A temporary file is written, synced and renamed. A kill leaves at most a temporary file.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

TEMP_PREFIX = ".tmp-"

# The error numbers of link(2) and renameat2(2) if the file system or the kernel does not support
# them: exFAT, FUSE mounts (gcsfuse, Drive, s3fs), 9p, SMB, and file systems that limit links.
_UNSUPPORTED = {
    errno.EACCES,
    errno.EINVAL,
    errno.EMLINK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
}

# renameat2(2), linux/fs.h and linux/fcntl.h.
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def replace_file(target: str, source: BinaryIO) -> None:
    """Write a file, replacing any file of that name.

    Args:
        target, source: the path, and the content, read from its start.
    """
    with _temp_file(target, source) as temp:
        os.replace(temp, target)


def create_file(target: str, source: BinaryIO) -> bool:
    """Write a file if its name is free; return False if another writer was first.

    Args:
        target, source: as for `replace_file`.
    """
    with _temp_file(target, source) as temp:
        try:
            if not (_link(temp, target) or _rename(temp, target)):
                _rename_locked(temp, target)
        except OSError:
            # An NFS server may have created the file although its answer was lost, or another
            # client may have been first. The content of the file decides.
            if not os.path.isfile(target):
                raise
            source.seek(0)
            with open(target, "rb") as file:
                return file.read() == source.read()
    return True


def can_create_exclusively(folder: str) -> bool:
    """Return whether `create_file` is exclusive between writers on different hosts.

    Otherwise a lock decides, which on most FUSE mounts only processes of the same host see.
    """
    os.makedirs(folder, exist_ok=True)
    temp, other = (os.path.join(folder, _temp_name()) for _ in range(2))
    try:
        os.close(_create(temp))
        return _link(temp, other) or _rename(temp, other)
    finally:
        for path in (temp, other):
            with suppress(FileNotFoundError):
                os.unlink(path)


def _link(temp: str, target: str) -> bool:
    """Link a file to a free name. link(2) is exclusive between hosts, also on NFS."""
    try:
        os.link(temp, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _rename(temp: str, target: str) -> bool:
    """Move a file to a free name in one atomic step of the kernel."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # macOS, and C libraries without it
        return False
    paths = (_AT_FDCWD, os.fsencode(temp), _AT_FDCWD, os.fsencode(target))
    if not renameat2(*paths, _RENAME_NOREPLACE):
        return True
    number = ctypes.get_errno()
    if number not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), target)
    return False


def _rename_locked(temp: str, target: str) -> None:
    """Rename a file to a free name under the lock of its folder, which ends with the process."""
    handle = os.open(os.path.dirname(target), os.O_RDONLY)
    try:
        # If the file system has no locks either, the lease of the run keeps other runs away.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(temp, target)
    finally:
        os.close(handle)


@contextmanager
def _temp_file(target: str, source: BinaryIO) -> Iterator[str]:
    """Write `source` to a synced temporary file beside the target, and delete it afterwards."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    temp = os.path.join(folder, _temp_name())
    try:
        source.seek(0)
        with os.fdopen(_create(temp), "wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        yield temp
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temp)


def _temp_name() -> str:
    return f"{TEMP_PREFIX}{secrets.token_hex(8)}"


def _create(path: str) -> int:
    # The mode follows the umask. A later chmod fails on mounts whose files another user owns.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
