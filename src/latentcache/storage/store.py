"""`Store`: all reads and writes of this package, with the put-if-absent protocol."""

from __future__ import annotations

import io
import math
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
from latentcache.storage.retries import Access
from latentcache.storage.s3 import S3Backend
from latentcache.urls import check_url

_THREADS = 16


def split_url(url: str) -> tuple[str, str]:
    """Split a URL, after `urls.check_url`: `s3://b/d/x.tar` into `s3://b/d` and `x.tar`."""
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
        full = self._backend.full(path)
        return cast(bytes, self._retry(path, lambda: self._backend.client.cat_file(full)))

    def open(self, path: str, *, readahead: bool = True) -> BinaryIO:
        """Open an object for reading. Reads raise `StorageError`; an `OSError` is damaged data.

        Args:
            path, readahead: the path, and whether a read may fetch more than the requested bytes.
        """
        file = self._retry(path, lambda: self._open(path, readahead))
        return cast(BinaryIO, _StoreFile(self, path, file))

    def _open(self, path: str, readahead: bool = True) -> Any:
        options = {} if readahead else {"cache_type": "none"}
        size, full = self._backend.read_block_bytes, self._backend.full(path)
        return self._backend.client.open(full, "rb", block_size=size, **options)

    def get_file(self, path: str, local: Path, size_bytes: int, stop: Event | None = None) -> None:
        """Download a whole object to a local path, overwriting an existing file in place.

        Args:
            path, local: the path in the store, and the file, which errors of the local disk name.
            size_bytes, stop: the object's size (`ObjectNotFound` if it has another), and an event
                after which a failure is not retried.
        """
        self._retry(path, lambda: self._get_file(path, local, size_bytes), stop)

    def _get_file(self, path: str, local: Path, size_bytes: int) -> None:
        url, num_bytes = self.url_of(path), 0
        with self._open(path) as source:
            if source.size is not None and source.size != size_bytes:
                raise ObjectNotFound(f"{url} has {source.size} bytes, not {size_bytes}")
            file = _StoreFile(self, path, source)
            with named_local(local), local.open("wb") as target:
                while chunk := file.read(Backend.read_block_bytes):
                    num_bytes += target.write(chunk)
        if num_bytes != size_bytes:
            raise StorageError(f"{url}: the connection gave {num_bytes} of {size_bytes} bytes")

    def info(self, path: str) -> ObjectInfo:
        """Return an object's size and version."""
        info = self._retry(path, lambda: self._backend.info(path))
        if info is None:
            raise ObjectNotFound(f"{self.url_of(path)} is a folder, not a file")
        return info

    def exists(self, path: str) -> bool:
        """Return whether there is an object at a path."""
        with suppress(ObjectNotFound):
            self.info(path)
            return True
        return False

    def list(self, folder: str = "") -> list[ObjectInfo]:
        """List the objects directly in a folder, sorted by path; none if it does not exist."""
        return sorted(self._entries(folder)[0], key=lambda info: info.path)

    def _entries(self, folder: str) -> Entries:
        with suppress(ObjectNotFound):
            return self._retry(folder, lambda: self._backend.entries(folder))
        return [], []

    def iterate(self, folder: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects below a folder, at any depth and in any order, page by page.

        S3 lists all folders at once. On a local disk, links to folders are not followed.
        """
        if isinstance(self._backend, S3Backend):
            token: str | None = ""
            while token is not None:
                page = partial(self._backend.page, folder, token)
                infos, token = self._retry(folder, page)
                yield from infos
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
        with suppress(ObjectNotFound):  # rclone's answer if there are none
            while after is not None:
                page, after = self._retry("", partial(self._backend.uploads, after))
                uploads += page
        return uploads

    def temp_files(self) -> Iterator[ObjectInfo]:
        """Yield the temporary files on a local disk: active ones, and those of killed writers."""
        return self._backend.temp_files()

    def now(self) -> float:
        """Return the time in seconds since 1970: of S3's clock, otherwise of this host's."""
        return self._retry("", self._backend.now)


class Store(_Reading):
    """One local or remote folder and the objects below it, by relative paths with `/`.

    Methods raise `ObjectNotFound` if there is no object at a path, `DiskFull` if the store is full,
    and `StorageError` for all other errors, after retries. The constructor raises `ConfigError` if
    `urls.py` refuses the URL or the endpoint, or if the client of the protocol is not installed.
    """

    # Whether the store itself refuses a second put; set by `probe_conditional`.
    conditional: Literal["yes", "no", "unknown"] = "yes"

    def put_file(self, local: Path, path: str) -> None:
        """Upload a whole, closed local file.

        Args:
            local, path: the file, and its path, which no other process writes.
        """
        full = self._backend.full(path)
        self._retry(path, lambda: self._backend.client.put_file(str(local), full))

    def put(self, path: str, data: bytes) -> None:
        """Write a small object, replacing any object at its path.

        Args:
            path, data: the path of a lease, pointer or report, and the content.
        """
        full = self._backend.full(path)
        self._retry(path, lambda: self._backend.client.pipe_file(full, data))

    def delete(self, path: str) -> None:
        """Delete an object. A missing object is not an error."""
        with suppress(ObjectNotFound):
            self._retry(path, lambda: self._backend.client.rm_file(self._backend.full(path)))

    def delete_many(
        self, paths: Sequence[str], progress: Callable[[int], object] = lambda num_deleted: None
    ) -> None:
        """Delete objects as `delete` does, many at a time.

        Args:
            paths, progress: the objects, and a function that gets the size of each deleted batch.
        """
        size = S3Backend.page_size if isinstance(self._backend, S3Backend) else _THREADS
        batches = [paths[first : first + size] for first in range(0, len(paths), size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for num_deleted in pool.map(self._delete_batch, batches):
                progress(num_deleted)

    def _delete_batch(self, paths: Sequence[str]) -> int:
        num_deleted = len(paths)
        if isinstance(self._backend, S3Backend):
            # If the store is busy or does not support this request, delete one by one.
            with suppress(StorageError), self.named(paths[0]):
                paths = self._backend.delete_page(paths)
        for path in paths:
            self.delete(path)
        return num_deleted

    def abort_upload(self, upload: Upload) -> None:
        """Abort a multipart upload and free its parts. A finished upload is not an error."""
        if isinstance(self._backend, S3Backend):
            with suppress(ObjectNotFound):
                self._retry(upload.path, partial(self._backend.abort_upload, upload))

    def put_if_absent(self, path: str, data: bytes, *, valid_until: float = math.inf) -> bool:
        """Put a small object with one PUT, only if the path is free; return whether it has `data`.

        After any error, it is unknown whether the bytes were stored. Even "exists already" may be
        the answer to a retry whose first try succeeded. The object is therefore read back: the same
        bytes are a win, other bytes are a loss, and no object means another try.

        Args:
            path, data: the path, and the content, which must differ between writers.
            valid_until: the time of `clock.boot_time_s` after which no try begins, not even in a
                process that was frozen between two tries; later calls raise `DeadlinePassed`.
        """
        # This read decides nothing on a store with conditional writes. A store without them would
        # replace the object.
        if not self.is_local and (current := self._read_or_none(path)) is not None:
            return current == data
        return self._retry(path, lambda: self._create(path, data, valid_until))

    def _create(self, path: str, data: bytes, valid_until: float) -> bool:
        if clock.boot_time_s() > valid_until:
            raise DeadlinePassed(f"{self.url_of(path)} was not put in time")
        try:
            self._put_new(path, data)
        except StorageError:
            if (current := self._read_or_none(path)) is None:
                raise
            return current == data
        return True

    def _put_new(self, path: str, data: bytes) -> None:
        with self.named(path):
            self._backend.client.pipe_file(self._backend.full(path), data, mode="create")

    def probe_conditional(self, path: str, data: bytes) -> bool:
        """Return whether the store provably refuses a second put, and set `conditional`.

        Args:
            path, data: an object that exists, and its content, so that a second put does no harm.
        """
        can_create = self._retry("", self._backend.can_create) if self.is_local else None
        self.conditional = "yes" if can_create else "no"
        if can_create is None:
            try:
                self._put_new(path, data)
            except StorageError as error:
                is_refused = self._backend.is_precondition_failure(error)
                self.conditional = "yes" if is_refused else "unknown"
        return self.conditional == "yes"

    def _read_or_none(self, path: str) -> bytes | None:
        with suppress(ObjectNotFound):
            return self.read_bytes(path)
        return None


class _StoreFile(io.RawIOBase):
    """An open object. Its reads raise `StorageError`."""

    def __init__(self, store: Access, path: str, file: Any) -> None:
        self._store, self._path, self._file = store, path, file

    def read(self, size: int = -1) -> bytes:
        with self._store.named(self._path):
            return cast(bytes, self._file.read(size))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._store.named(self._path):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
