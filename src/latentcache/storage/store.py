"""`Store`: all reads and writes of this package.

The store adds retries, URLs in error messages and the put-if-absent protocol. A backend for each
protocol does the rest; see `backend.py`.
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
        ConfigError: the URL is not accepted; see `urls.check_url`.
    """
    check_url(url)
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name


class _Reading(Access):
    """The operations that read and list a folder."""

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder on a disk."""
        return self._backend.is_local

    def local_path(self, path: str) -> Path | None:
        """Return the local file of a path; None if the store is remote."""
        return Path(self._backend.full(path)) if self.is_local else None

    def read_bytes(self, path: str) -> bytes:
        """Read a whole object."""
        return self._retry(path, lambda: self._backend.read(path))

    def open(self, path: str, *, readahead: bool = True) -> BinaryIO:
        """Open an object for reading.

        Opening and every read raise `StorageError` and never `OSError`. An `OSError` of the code
        that decodes the bytes, such as Arrow, therefore means damaged data.

        Args:
            path: the path in the store.
            readahead: whether a read from a remote store may fetch more than the requested bytes.
        """
        file = self._retry(path, lambda: self._open(path, readahead))
        return cast(BinaryIO, StoreFile(self, path, file))

    def _open(self, path: str, readahead: bool = True) -> Any:
        return self._backend.open(path, readahead=readahead)

    def get_file(
        self, path: str, local: Path, size_bytes: int, given_up: Event | None = None
    ) -> None:
        """Download a whole object to a local path, overwriting an existing file in place.

        Errors of the local disk name the local path.

        Args:
            path: the path in the store.
            local: the file to write.
            size_bytes: the object's size. If the object has this size and the store sends another
                number of bytes, the connection was cut, and the download is retried.
            given_up: once this event is set, a failure is not retried.

        Raises:
            ObjectNotFound: there is no such object, or it has another size.
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
        """Return an object's size and version."""
        info = self._retry(path, lambda: self._backend.info(path))
        if info is None:
            raise ObjectNotFound(f"{self.url_of(path)} is a folder, not a file")
        return info

    def exists(self, path: str) -> bool:
        """Return whether there is an object at a path."""
        try:
            self.info(path)
        except ObjectNotFound:
            return False
        return True

    def list(self, folder: str = "") -> list[ObjectInfo]:
        """List the objects directly in a folder, sorted by path; none if it does not exist."""
        infos, _ = self._entries(folder)
        return sorted(infos, key=lambda info: info.path)

    def _entries(self, folder: str) -> Entries:
        try:
            return self._retry(folder, lambda: self._backend.entries(folder))
        except ObjectNotFound:
            return [], []

    def iterate(self, folder: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects below a folder, at any depth and in any order, page by page.

        S3 lists a thousand objects in one request. Other stores need one request for each folder.
        On a local disk, links to files count as files, and links to folders are not followed.
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
        """List the objects below a folder, at any depth, sorted by path; none if it is missing."""
        return sorted(self.iterate(folder), key=lambda info: info.path)

    def list_uploads(self) -> Sequence[Upload]:
        """List the unfinished multipart uploads, active or abandoned; only S3 has them."""
        if not isinstance(self._backend, S3Backend):
            return []
        uploads: list[Upload] = []
        after: dict[str, str] | None = {}
        while after is not None:
            try:
                page, after = self._retry("", partial(self._backend.uploads, after))
            except ObjectNotFound:  # rclone's answer if there are none
                break
            uploads += page
        return uploads

    def temp_files(self) -> Iterator[ObjectInfo]:
        """Yield the temporary files on a local disk: active ones, and those of killed writers."""
        if isinstance(self._backend, LocalBackend):
            yield from self._backend.temp_files()

    def now(self) -> float:
        """Return the time of the store's clock, in seconds since 1970.

        S3 sends its time. For disks and other stores, the clock of this host is used.
        """
        return self._retry("", self._backend.now)


class Store(_Reading):
    """One local or remote folder and the objects below it.

    Paths are relative to that folder and use `/`. Methods raise `ObjectNotFound` if there is no
    object at a path, `DiskFull` if the store is full, and `StorageError` for all other errors,
    after retries.

    Args:
        url: a local path or a URL (`s3://bucket/folder`, `hf://org/repo`, …).
        options: how to reach the store; ignored for local folders.

    Raises:
        ConfigError: the URL or the endpoint is not accepted (see `urls.check_url` and
            `urls.check_endpoint`), or the client of the protocol is not installed.
    """

    def __init__(
        self, url: str | os.PathLike[str], options: StorageOptions = StorageOptions()
    ) -> None:
        super().__init__(url, options)
        self.conditional: Literal["yes", "no", "unknown"] = "yes"
        """Whether the store itself refuses a second put; set by `probe_conditional`."""

    def put_file(self, local: Path, path: str) -> None:
        """Upload a whole, closed local file.

        Args:
            local: the file to upload.
            path: its path in the store, which no other process writes.
        """
        self._retry(path, lambda: self._backend.put_file(local, path))

    def put(self, path: str, data: bytes) -> None:
        """Write a small object, replacing any object at its path (leases and pointers only).

        Args:
            path: the path in the store.
            data: the content.
        """
        self._retry(path, lambda: self._backend.put(path, data))

    def delete(self, path: str) -> None:
        """Delete an object. A missing object is not an error."""
        try:
            self._retry(path, lambda: self._backend.delete(path))
        except ObjectNotFound:
            return

    def delete_many(
        self, paths: Sequence[str], progress: Callable[[int], object] = lambda num_deleted: None
    ) -> None:
        """Delete objects as `delete` does, many at a time.

        Args:
            paths: the objects.
            progress: called after each batch with the number of objects in it.
        """
        is_paged = isinstance(self._backend, S3Backend)
        size = S3Backend.page_size if is_paged else _THREADS
        batches = [paths[first : first + size] for first in range(0, len(paths), size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for num_deleted in pool.map(self._delete_batch, batches):
                progress(num_deleted)

    def _delete_batch(self, paths: Sequence[str]) -> int:
        left: Sequence[str] = paths
        if isinstance(self._backend, S3Backend):
            # If the store is busy or does not support this request, delete one by one.
            with suppress(StorageError), self.named(paths[0]):
                left = self._backend.delete_page(paths)
        for path in left:
            self.delete(path)
        return len(paths)

    def abort_upload(self, upload: Upload) -> None:
        """Abort a multipart upload and free its parts. A finished upload is not an error."""
        if isinstance(self._backend, S3Backend):
            with suppress(ObjectNotFound):
                self._retry(upload.path, partial(self._backend.abort_upload, upload))

    def put_if_absent(self, path: str, data: bytes, *, valid_until: float = math.inf) -> bool:
        """Put a small object only if there is no object at the path yet.

        This is one PUT, never a multipart upload. After any error, it is unknown whether the bytes
        were stored. Even "exists already" may be the answer to a retry whose first try succeeded.
        The object is therefore read back: the same bytes are a win, other bytes are a loss, and no
        object means another try. `data` must differ between writers of which only one may win.

        Args:
            path: the path in the store.
            data: the content.
            valid_until: the time of `clock.boot_time_s` after which no try begins. It is checked
                before each try, so that a process that was frozen between two tries puts nothing.

        Returns:
            Whether the object at the path now holds `data`.

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

        # This read decides nothing on a store with conditional writes. A store without them would
        # replace the object.
        if not self.is_local and (current := self._read_or_none(path)) is not None:
            return current == data
        return self._retry(path, create)

    def _create(self, path: str, data: bytes) -> bool:
        try:
            with self.named(path):
                self._backend.create(path, data)
        except StorageError:
            current = self._read_or_none(path)
            if current is None:
                raise
            return current == data
        return True

    @property
    def is_conditional(self) -> bool:
        """Whether the store itself is known to enforce put-if-absent."""
        return self.conditional == "yes"

    def probe_conditional(self, path: str, data: bytes) -> bool:
        """Test whether the store refuses a second put, and keep the answer in `conditional`.

        Only the answer "precondition failed" proves it. After any other error `conditional` is
        `unknown`, which callers must treat as a no.

        Args:
            path: an object that already holds `data`. A store without conditional writes replaces
                it with the same bytes, which does no harm.
            data: the content of the object.

        Returns:
            Whether the store refuses a second put.
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
