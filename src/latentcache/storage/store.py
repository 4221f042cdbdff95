"""Everything the package reads or writes goes through a `Store`.

So retries, the names in error messages and the put-if-absent protocol have one home. A backend for
each protocol does the rest; see `backend.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Literal, cast

from latentcache import clock
from latentcache.errors import DeadlinePassed, ObjectNotFound, StorageError
from latentcache.storage.backend import Backend, Entries, ObjectInfo, Upload
from latentcache.storage.failures import named_local
from latentcache.storage.local import LocalBackend
from latentcache.storage.retries import Access, StoreFile
from latentcache.storage.s3 import S3Backend
from latentcache.storage_options import StorageOptions
from latentcache.urls import check_url

_THREADS = 16


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into its folder and its name: `s3://b/d/x.tar` into `s3://b/d` and `x.tar`.

    Raises:
        ConfigError: as `urls.check_url`.
    """
    check_url(url)
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name


class _Reading(Access):
    """What is read of a folder, and listed."""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on a disk."""
        return self._backend.is_local

    def local_path(self, path: str) -> Path | None:
        """Give the file that holds a path, or None where the store is remote."""
        return Path(self._backend.full(path)) if self.is_local else None

    def read_bytes(self, path: str) -> bytes:
        """Read a whole object."""
        return self._retry(path, lambda: self._backend.read(path))

    def open(self, path: str, *, readahead: bool = True) -> BinaryIO:
        """Open an object for reading; opening and every read raise `StorageError`, no `OSError`.

        So an `OSError` of what decodes the bytes, such as Arrow, is damage and not the store's
        doing. Without `readahead`, each read asks a remote store for just those bytes.
        """
        file = self._retry(path, lambda: self._open(path, readahead))
        return cast(BinaryIO, StoreFile(self, path, file))

    def _open(self, path: str, readahead: bool = True) -> Any:
        return self._backend.open(path, readahead=readahead)

    def get_file(
        self, path: str, local: Path, size_bytes: int, given_up: Event | None = None
    ) -> None:
        """Download an object, whole, to a local path; what lies there is written over, in place.

        An object of another size is not the one that is meant: `ObjectNotFound`. Fewer or more
        bytes than `size_bytes` for one that has the size are a cut connection, and tried again.
        What is wrong with the local disk is told with the local path. Once `given_up` is set, a
        failure is not waited out any more.
        """
        self._retry(path, lambda: self._get_file(path, local, size_bytes), given_up)

    def _get_file(self, path: str, local: Path, size_bytes: int) -> None:
        num_bytes = 0
        with self._open(path) as source:
            if source.size is not None and source.size != size_bytes:
                raise ObjectNotFound(
                    f"{self.url_of(path)} has {source.size} bytes, not {size_bytes}"
                )
            with named_local(local), local.open("wb") as target:
                while True:
                    with self.named(path):
                        chunk = source.read(Backend.read_block_bytes)
                    if not chunk:
                        break
                    num_bytes += target.write(chunk)
        if num_bytes != size_bytes:
            raise StorageError(
                f"{self.url_of(path)}: the connection gave {num_bytes} of {size_bytes} bytes"
            )

    def info(self, path: str) -> ObjectInfo:
        """Ask for an object's size and version."""
        info = self._retry(path, lambda: self._backend.info(path))
        if info is None:
            raise ObjectNotFound(f"{self.url_of(path)} is a folder, not a file")
        return info

    def exists(self, path: str) -> bool:
        """Whether an object lies at that path."""
        try:
            self.info(path)
        except ObjectNotFound:
            return False
        return True

    def list(self, folder: str = "") -> list[ObjectInfo]:
        """List the objects directly in a folder, by path; an empty list where there is none."""
        infos, _ = self._entries(folder)
        return sorted(infos, key=lambda info: info.path)

    def _entries(self, folder: str) -> Entries:
        try:
            return self._retry(folder, lambda: self._backend.entries(folder))
        except ObjectNotFound:
            return [], []

    def iterate(self, folder: str = "") -> Iterator[ObjectInfo]:
        """Give the objects below a folder, at any depth and in any order, as pages of them come.

        S3 lists a thousand objects a request; elsewhere each folder takes one. On a local disk,
        links to files count as files, and links to folders are not followed.
        """
        if isinstance(self._backend, S3Backend):
            token: str | None = None
            list_page = partial(self._backend.page, folder)
            while True:
                infos, token = self._retry(folder, partial(list_page, token))
                yield from infos
                if token is None:
                    return
        with ThreadPoolExecutor(_THREADS) as pool:
            left = [folder]
            while left:
                some, left = left[-_THREADS:], left[:-_THREADS]
                for infos, folders in pool.map(self._entries, some):
                    yield from infos
                    left += folders

    def walk(self, folder: str = "") -> Sequence[ObjectInfo]:
        """List the objects below a folder, at any depth, by path; none where there is none."""
        return sorted(self.iterate(folder), key=lambda info: info.path)

    def list_uploads(self) -> Sequence[Upload]:
        """List the multipart uploads that are under way or were left; only S3 has such."""
        if not isinstance(self._backend, S3Backend):
            return []
        uploads: list[Upload] = []
        after: dict[str, str] | None = {}
        while after is not None:
            try:
                found, after = self._retry("", partial(self._backend.uploads, after))
            except ObjectNotFound:  # rclone's way of saying that there are none
                break
            uploads += found
        return uploads

    def temp_files(self) -> Iterator[ObjectInfo]:
        """Give the files on a local disk that are half written, or were when a writer died."""
        if isinstance(self._backend, LocalBackend):
            yield from self._backend.temp_files()

    def now(self) -> float:
        """Tell the time by the store's own clock, in seconds since 1970.

        S3 tells it; of disks and other stores this host's clock has to do.
        """
        return self._retry("", self._backend.now)


class Store(_Reading):
    """One folder, local or remote, and what lies below it.

    Paths are relative to that folder and use `/`. Methods raise `ObjectNotFound` where nothing lies
    at a path, `DiskFull` where there is no room, and `StorageError` for all else, after retries.

    Args:
        url: a local path or a URL (`s3://bucket/folder`, `hf://org/repo`, …).
        options: how to reach it; ignored by local folders.

    Raises:
        ConfigError: as `urls.check_url` and `urls.check_endpoint`; or the package that reaches such
            a store is not installed.
    """

    def __init__(
        self, url: str | os.PathLike[str], options: StorageOptions = StorageOptions()
    ) -> None:
        super().__init__(url, options)
        self.conditional: Literal["yes", "no", "unknown"] = "yes"
        """Whether the store itself refuses a second put; `probe_conditional` finds out."""

    def put_file(self, local: Path, path: str) -> None:
        """Upload a closed local file, whole, under a path that nobody else writes."""
        self._retry(path, lambda: self._backend.put_file(local, path))

    def put(self, path: str, data: bytes) -> None:
        """Write a small object, replacing what is there (leases and pointers only)."""
        self._retry(path, lambda: self._backend.put(path, data))

    def delete(self, path: str) -> None:
        """Delete an object; it is no error if it is gone already."""
        try:
            self._retry(path, lambda: self._backend.delete(path))
        except ObjectNotFound:
            return

    def delete_many(
        self, paths: Sequence[str], progress: Callable[[int], object] = lambda num_deleted: None
    ) -> None:
        """Delete objects as `delete` does, many at a time; `progress` is told how many more."""
        is_paged = isinstance(self._backend, S3Backend)
        size = S3Backend.page_size if is_paged else _THREADS
        batches = [paths[first : first + size] for first in range(0, len(paths), size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for num_deleted in pool.map(self._delete_batch, batches):
                progress(num_deleted)

    def _delete_batch(self, paths: Sequence[str]) -> int:
        left: Sequence[str] = paths
        if isinstance(self._backend, S3Backend):
            # A store that cannot, or is busy: then one by one.
            with suppress(StorageError), self.named(paths[0]):
                left = self._backend.delete_page(paths)
        for path in left:
            self.delete(path)
        return len(paths)

    def abort_upload(self, upload: Upload) -> None:
        """Give up a multipart upload and free its parts; it is no error if it has ended."""
        if isinstance(self._backend, S3Backend):
            with suppress(ObjectNotFound):
                self._retry(upload.path, partial(self._backend.abort_upload, upload))

    def put_if_absent(self, path: str, data: bytes, *, valid_until: float = math.inf) -> bool:
        """Put a small object only if nothing lies at the path yet. True if `data` lies there now.

        One PUT, never multipart. Any error of it leaves open whether the bytes were stored, even
        "exists already", which a retried request gets for its own first try. So the object is read
        back: these bytes are a win, others a loss, and none means trying again. `data` must
        therefore differ between writers that may not both win.

        Args:
            path: where.
            data: the bytes.
            valid_until: the time of `clock.boot_time_s` after which no try begins. It is checked
                before each try, so that a process that was frozen between two of them puts nothing.

        Raises:
            DeadlinePassed: it is later than `valid_until`.
        """
        backend = self._backend

        def create() -> bool:
            if clock.boot_time_s() > valid_until:
                raise DeadlinePassed(f"{self.url_of(path)} was not put in time")
            if isinstance(backend, LocalBackend):
                return backend.create_exclusively(path, data)
            return self._create(path, data)

        # Looking first decides nothing, but a store without conditional writes would replace it.
        if not self.is_local and (found := self._read_or_none(path)) is not None:
            return found == data
        return self._retry(path, create)

    def _create(self, path: str, data: bytes) -> bool:
        try:
            with self.named(path):
                self._backend.create(path, data)
        except StorageError:
            found = self._read_or_none(path)
            if found is None:
                raise
            return found == data
        return True

    @property
    def is_conditional(self) -> bool:
        """Whether put-if-absent is the store's own doing, as far as is known."""
        return self.conditional == "yes"

    def probe_conditional(self, path: str, data: bytes) -> bool:
        """Find out whether the store refuses a second put, and remember the answer.

        Only an answer that means "precondition failed" shows it. After any other error the answer
        is `unknown`, which callers must take for a no.

        Args:
            path: an object that holds `data` already: a store without conditional writes replaces
                it by itself, which does no harm.
            data: its bytes.
        """
        if isinstance(self._backend, LocalBackend):
            is_exclusive = self._retry("", self._backend.can_create_exclusively)
            self.conditional = "yes" if is_exclusive else "no"
            return self.is_conditional
        try:
            with self.named(path):
                self._backend.create(path, data)
            self.conditional = "no"
        except StorageError as error:
            is_refused = self._backend.is_precondition_failure(error)
            self.conditional = "yes" if is_refused else "unknown"
        return self.is_conditional

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read_bytes(path)
        except ObjectNotFound:
            return None
