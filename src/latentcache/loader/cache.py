"""Copies of remote files on a node's own disk, for all of a user's processes and datasets.

    <folder>/<sha256>                   a whole file that had this hash
    <folder>/<sha256>.<size>.part       one on its way, or what a killed process left of one

The folder is all there is: no daemon, no index, no shared memory. Files are locked with flock, and
such a lock dies with its process. Who fetches a file has its part locked exclusively; who is about
to map a file has it locked shared; who needs room deletes only what nobody has locked. Parts alone
are waited for longer than a moment, and never by one who fetches: nobody waits in a circle.
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

# The time of change that a file gets once it has been checked: with another one, somebody has
# changed it since. (A whole, even second, which every file system can store.)
_CHECKED_NS = 1_000_000_000 * 10**9

# Another may delete or fail to fetch a file just when we want it, but hardly this many times.
_MAX_TRIES = 10

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(?:([kmgt])(i?))?b)?", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Read a size in bytes: `65536`, `"100gb"`, `"1.5 MiB"`; kb to tb are decimal.

    Raises:
        ConfigError: it is not a size.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        raise ConfigError(f"{size!r} is not a size: write 100gb, 512mib or a number of bytes")
    number, prefix, binary = match.groups()
    power = " kmgt".index((prefix or " ").lower())
    return int(float(number) * (1024 if binary else 1000) ** power)


def default_cache_dir() -> Path:
    """Make `latentcache-<uid>` in the temporary folder.

    TMPDIR is what clusters point at a node's own disk; homes are often on the network.

    Raises:
        ConfigError: the name is taken by another user, whose files are not to be trusted.
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
    """A folder of cached files, the least recently used of which make room for new ones.

    All that lies in it stays within `max_bytes`, downloads counted in full from their start, unless
    what is in use alone exceeds that: a file larger than `max_bytes` is served all the same. Disk
    space of a deleted file comes free when its last mapping ends.
    """

    folder: Path
    max_bytes: int

    @contextmanager
    def open(self, store: Store, file: DataFile, given_up: Event | None = None) -> Iterator[Path]:
        """Give the path of a local copy, which stays there inside the context: map it there.

        Of those who want a file at the same time one downloads it, the others wait for it. A copy
        that was changed or cut since it was cached is fetched again. Once `given_up` is set, a
        store that fails is not tried again.

        Raises:
            DatasetError: the object is gone, or differs from its receipt, twice.
            StorageError: the store cannot be read, or the folder cannot be used.
            DiskFull: there is no room.
        """
        if not re.fullmatch(SHA256, file.sha256):  # it becomes the name of a local file
            raise DatasetError(f"{store.url_of(file.path)} has the hash {file.sha256!a:.80}")
        path = self.folder / file.sha256
        with self._hold(partial(_fetch, store, file, given_up), file, path):
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
                    # Who fetched it has failed. From here on each tries for itself, or all would
                    # learn one after the other, minutes apart, that a store is down.
                    part = path.with_name(f"{stem}.{secrets.token_hex(8)}.part")
        except DiskFull as error:
            raise DiskFull(f"{error}, lower cache_bytes, or set cache_dir") from error
        raise StorageError(f"{path} is deleted as soon as it is there: set cache_dir")

    def _hold_fetched(
        self, fetch: Callable[[Path], None], file: DataFile, path: Path, part: Path
    ) -> ExitStack | None:
        """Fetch the file, or wait for who does; None if that did not bring it."""
        with ExitStack() as stack:
            part_fd = stack.enter_context(_opened(part, os.O_RDWR | os.O_CREAT))
            if _try_lock(part_fd) and _is_at(part_fd, part):
                try:
                    if held := _hold_cached(path, file):  # it has come since we looked
                        return held
                    self._make_room()
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
        """Rename the part, but not over a copy that is right: another may be about to map that."""
        with _opened(self.folder, os.O_RDONLY) as folder_fd:
            fcntl.flock(folder_fd, fcntl.LOCK_EX)
            if held := _hold_cached(path, file):
                held.close()
            else:
                part.rename(path)

    def _make_room(self) -> None:
        """Delete what nobody holds until all is within bounds: parts first, then by last use."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if (match := _OURS.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        status, promised = entry.stat(follow_symlinks=False), match["size_bytes"]
                        size_bytes = int(promised or status.st_size)
                        files.append((not promised, status.st_atime_ns, size_bytes, entry.path))
        excess_bytes = sum(size_bytes for _, _, size_bytes, _ in files) - self.max_bytes
        for _, _, size_bytes, name in sorted(files):
            if excess_bytes <= 0:
                break
            if _evict(Path(name)):
                excess_bytes -= size_bytes


def _fetch(store: Store, file: DataFile, given_up: Event | None, part: Path) -> None:
    url = store.url_of(file.path)
    mend = "run `latentcache verify --repair`, then the run again"
    for _ in range(2):
        try:
            store.get_file(file.path, part, file.size_bytes, given_up)
        except ObjectNotFound as error:
            raise DatasetError(f"{error}, but the manifest names it: {mend}") from error
        with part.open("rb") as copy:
            if hashlib.file_digest(copy, "sha256").hexdigest() == file.sha256:
                return
    raise DatasetError(f"{url} is damaged: its SHA-256 is not its receipt's: {mend}")


def _hold_cached(path: Path, file: DataFile) -> ExitStack | None:
    """Lock the cached copy against eviction; None if there is none, or not as it was cached."""
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
        # Set by hand, because file systems are often mounted without times of access.
        os.utime(fd, ns=(time.time_ns(), _CHECKED_NS))
        return stack.pop_all()


def _evict(path: Path) -> bool:
    """Delete a file unless somebody holds it; True if it is gone."""
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
        # To close it is not enough: a process forked in between has it open too.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file still is the one at the path: it may be renamed or deleted by now."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
