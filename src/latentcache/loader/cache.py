"""Cache remote files on a node's local disk, for all processes and datasets of a user.

    <folder>/<sha256>                   a complete file with this hash
    <folder>/<sha256>.<size>.part       a file that is downloading, or the rest of a killed download

Files are locked with flock, which ends with its process: a part exclusively while it is fetched, a
file shared while it is mapped. A process that needs space deletes only files that are not locked.
Only a lock on a part is held for long, and a process that fetches never waits for one, so there is
no deadlock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

from latentcache.dataset.parse import SHA256
from latentcache.dataset.receipts import DataFile
from latentcache.errors import ConfigError, DatasetError, DiskFull, ObjectNotFound, StorageError
from latentcache.storage import Store
from latentcache.storage.failures import named_local

_OURS = re.compile(r"[0-9a-f]{64}(\.(?P<size_bytes>\d+)(\.[0-9a-f]+)?\.part)?")

# The modification time of a checked file; with another time, it was changed since. It is a whole,
# even second, which every file system can store.
_CHECKED_NS = 1_000_000_000 * 10**9

# Another process may delete a needed file, or fail to fetch it, but hardly this many times.
_MAX_TRIES = 10

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(?:([kmgt])(i?))?b)?", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes from text such as `"100gb"` or `"1.5 MiB"`; kb to tb are decimal."""
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        raise ConfigError(f"{size!r} is not a size: write 100gb, 512mib or a number of bytes")
    number, prefix, binary = match.groups()
    power = " kmgt".index((prefix or " ").lower())
    return int(float(number) * (1024 if binary else 1000) ** power)


def default_cache_dir() -> Path:
    """Create `latentcache-<uid>` in the temporary folder, mostly a local disk; return its path.

    A folder of another user, whose files cannot be trusted, raises `ConfigError`.
    """
    folder = Path(tempfile.gettempdir()) / f"latentcache-{os.getuid()}"
    with named_local(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.lstat().st_uid
    if owner != os.getuid():
        raise ConfigError(f"{folder} belongs to another user: set cache_dir")
    return folder


@dataclass(frozen=True, slots=True)
class FileCache:
    """A folder of cached files, from which the least recently used files are evicted.

    The files stay within `max_bytes` in total; a download counts in full from its start. Files in
    use may exceed it. The disk space of an evicted file is freed when its last mapping ends.
    """

    folder: Path
    max_bytes: int

    @contextmanager
    def open(self, store: Store, file: DataFile, cancelled: Event | None = None) -> Iterator[Path]:
        """Provide the path of a local copy, which exists inside the context: map it there.

        If several processes need a file, one downloads it and the others wait. A copy that was
        changed or truncated since it was cached is fetched again.

        Args:
            store, file: the file and its store.
            cancelled: once it is set, a failing store is not tried again.

        Raises:
            DatasetError: the object does not exist, or differs from its receipt, twice.
            StorageError: the store cannot be read, or the folder cannot be used.
            DiskFull: there is not enough disk space.
        """
        if not re.fullmatch(SHA256, file.sha256):  # it becomes the name of a local file
            raise DatasetError(f"{store.url_of(file.path)} has the hash {file.sha256!a:.80}")
        path = self.folder / file.sha256
        with self._hold(partial(_fetch, store, file, cancelled), file, path):
            yield path

    def _hold(self, fetch: Callable[[Path], None], file: DataFile, path: Path) -> ExitStack:
        stem = f"{path.name}.{file.size_bytes}"
        part = path.with_name(f"{stem}.part")
        try:
            with named_local(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for _ in range(_MAX_TRIES):
                    held = _hold_cached(path, file) or self._hold_fetched(fetch, file, path, part)
                    if held:
                        return held
                    # Another process failed to fetch the file. From here on each process fetches
                    # it itself. Otherwise, if a store is down, the processes would fail one after
                    # the other, minutes apart.
                    part = path.with_name(f"{stem}.{secrets.token_hex(8)}.part")
        except DiskFull as error:
            raise DiskFull(f"{error}, lower cache_bytes, or set cache_dir") from error
        raise StorageError(f"{path} is deleted as soon as it is cached: set cache_dir")

    def _hold_fetched(
        self, fetch: Callable[[Path], None], file: DataFile, path: Path, part: Path
    ) -> ExitStack | None:
        """Fetch the file, or wait for the process that does; return None if that failed."""
        with ExitStack() as stack:
            part_fd = stack.enter_context(_opened(part, os.O_RDWR | os.O_CREAT))
            if _try_lock(part_fd) and _is_at(part_fd, part):
                try:
                    if held := _hold_cached(path, file):  # cached since the last check
                        return held
                    self._free_space()
                    fetch(part)
                    os.utime(part_fd, ns=(time.time_ns(), _CHECKED_NS))
                    os.fsync(part_fd)
                    self._commit(file, part, path)
                finally:
                    if _is_at(part_fd, part):
                        part.unlink()
            fcntl.flock(part_fd, fcntl.LOCK_SH)
            return stack.pop_all() if _is_at(part_fd, path) else None

    def _commit(self, file: DataFile, part: Path, path: Path) -> None:
        """Rename the part, but not over a correct copy, which another process may be mapping."""
        with _opened(self.folder, os.O_RDONLY) as folder_fd:
            fcntl.flock(folder_fd, fcntl.LOCK_EX)
            if held := _hold_cached(path, file):
                held.close()
            else:
                part.rename(path)

    def _free_space(self) -> None:
        """Delete unlocked files until the limit is met: parts first, then by time of last use."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if (match := _OURS.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        status, part_size = entry.stat(follow_symlinks=False), match["size_bytes"]
                        size_bytes = int(part_size or status.st_size)
                        files.append((not part_size, status.st_atime_ns, size_bytes, entry.path))
        excess_bytes = sum(size_bytes for _, _, size_bytes, _ in files) - self.max_bytes
        for _, _, size_bytes, name in sorted(files):
            if excess_bytes <= 0:
                break
            if _evict(Path(name)):
                excess_bytes -= size_bytes


def _fetch(store: Store, file: DataFile, cancelled: Event | None, part: Path) -> None:
    url = store.url_of(file.path)
    fix = "run `latentcache verify --repair`, then the run again"
    for _ in range(2):
        try:
            store.get_file(file.path, part, file.size_bytes, cancelled)
        except ObjectNotFound as error:
            raise DatasetError(f"{error}, but the manifest lists it: {fix}") from error
        with part.open("rb") as copy:
            if hashlib.file_digest(copy, "sha256").hexdigest() == file.sha256:
                return
    raise DatasetError(f"{url} is damaged: its SHA-256 differs from its receipt's: {fix}")


def _hold_cached(path: Path, file: DataFile) -> ExitStack | None:
    """Lock the cached copy against eviction; return None if there is none, or it was changed."""
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(_opened(path))
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (file.size_bytes, _CHECKED_NS):
            return None
        if not _is_at(fd, path):
            return None
        # Set explicitly, because file systems are often mounted without access times.
        os.utime(fd, ns=(time.time_ns(), _CHECKED_NS))
        return stack.pop_all()


def _evict(path: Path) -> bool:
    """Delete a file unless it is locked; return whether it is deleted."""
    with suppress(FileNotFoundError), _opened(path) as fd:
        if not _try_lock(fd):
            return False
        if _is_at(fd, path):
            path.unlink()
    return True


@contextmanager
def _opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        # Closing is not enough: a process that was forked in between has the file open, too.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Return whether the open file still is the one at the path, not renamed or deleted."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
