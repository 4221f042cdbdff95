"""Files on local and mounted disks: written whole, and put only where nothing lies.

A reader never sees a half-written file: data is written to a file with a temporary name, synced,
and then given its name. Each step may be cut off by a kill, which leaves a temporary file at most.
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

# What link(2) and renameat2(2) answer where the file system or the kernel does not have them:
# exFAT, FUSE mounts (gcsfuse, Drive, s3fs), 9p, SMB, and file systems that limit links.
_UNSUPPORTED = {
    errno.EACCES, errno.EINVAL, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY,
    errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV,
}  # fmt: skip

# renameat2(2), linux/fs.h and linux/fcntl.h.
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def replace_file(target: str, source: BinaryIO) -> None:
    """Write a file, replacing what lies at its name."""
    with _temp_file(target, source) as temp:
        os.replace(temp, target)


def create_file(target: str, source: BinaryIO) -> bool:
    """Write a file where none lies yet.

    Returns:
        Whether the file lies there now with the bytes of `source`: False if another was first.
    """
    with _temp_file(target, source) as temp:
        try:
            _name_if_free(temp, target)
        except OSError:
            # An NFS server may have done it although the answer was lost, and any other client may
            # have been first. What lies there decides.
            if not os.path.isfile(target):
                raise
            source.seek(0)
            with open(target, "rb") as file:
                return file.read() == source.read()
    return True


def can_create_exclusively(folder: str) -> bool:
    """Find out whether `create_file` decides between writers on different hosts.

    It does where the file system has hard links or `RENAME_NOREPLACE`. Elsewhere a lock decides,
    which on most FUSE mounts only the processes of one host see.
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


def _name_if_free(temp: str, target: str) -> None:
    """Give a finished file its name; `FileExistsError` if the name is taken."""
    if _link(temp, target) or _rename(temp, target):
        return
    with _locked(os.path.dirname(target)):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(temp, target)


def _link(temp: str, target: str) -> bool:
    """Link a file to a free name. link(2) decides between hosts, on NFS too."""
    try:
        os.link(temp, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _rename(temp: str, target: str) -> bool:
    """Move a file to a free name, as one step of the kernel."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # macOS, and C libraries without it
        return False
    if not renameat2(
        _AT_FDCWD, os.fsencode(temp), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
    ):
        return True
    number = ctypes.get_errno()
    if number not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), target)
    return False


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, which the kernel releases when its holder dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Where there are no locks either, a run's lease keeps others away.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _temp_file(target: str, source: BinaryIO) -> Iterator[str]:
    """Write all of `source` to a synced file beside the target; delete what is left of it."""
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
    # Its mode follows the umask. A later chmod is refused on mounts whose files belong to another.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
