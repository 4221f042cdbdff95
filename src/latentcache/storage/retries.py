"""Access to a folder of a store: failed operations are retried, and errors name the URL."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any, TypeVar, cast

from latentcache.errors import ObjectNotFound, StorageError
from latentcache.storage.azure import AzureBackend
from latentcache.storage.backend import Backend
from latentcache.storage.failures import is_final
from latentcache.storage.gcs import GcsBackend
from latentcache.storage.hub import HubBackend
from latentcache.storage.local import LocalBackend
from latentcache.storage.s3 import S3Backend
from latentcache.storage_options import StorageOptions
from latentcache.urls import check_endpoint, check_url

T = TypeVar("T")

# Pauses between tries. Each try is up to three tries of botocore, about 1.5 s in total. A store
# that never answered is probably a mistyped endpoint, which should be reported within ten seconds.
# A store that has answered before is down for a while, and a wait of two minutes may save hours of
# work.
_NUM_PAUSES_AT_FIRST = 2
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)

_BACKENDS: dict[str, type[Backend]] = {
    "file": LocalBackend,
    **dict.fromkeys(("s3", "s3a"), S3Backend),
    **dict.fromkeys(("gs", "gcs"), GcsBackend),
    **dict.fromkeys(("az", "abfs", "abfss"), AzureBackend),
    "hf": HubBackend,
}


class Access:
    """A folder of a store, with retries and with URLs in errors; `Store` adds the operations."""

    def __init__(self, url: str | os.PathLike[str], options: StorageOptions) -> None:
        self.options, url = options, os.fspath(url)
        protocol = check_url(url)
        if options.endpoint_url is not None:
            check_endpoint(options.endpoint_url)
        if protocol == "file":
            root = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
            self.url = f"file://{root}"
        else:
            self.url = url.rstrip("/")
        self._backend = _BACKENDS.get(protocol, Backend)(self.url, options)
        self._has_answered = False

    def url_of(self, path: str) -> str:
        """Return the absolute URL of a path."""
        return f"{self.url}/{path}" if path else self.url

    @contextmanager
    def named(self, path: str) -> Iterator[None]:
        """Raise an exception of fsspec or its transports as a `StorageError` with the URL."""
        try:
            yield
        except Exception as error:
            if not self._backend.is_foreign(error):
                raise
            raise self._backend.explain(error, self.url_of(path)) from error

    def _pauses_s(self) -> Iterator[float]:
        """Yield the pauses between tries; end when no further try should be made."""
        for index, pause_s in enumerate(_PAUSES_S):
            if index >= _NUM_PAUSES_AT_FIRST and not self._has_answered:
                return
            yield pause_s * random.uniform(0.5, 1.5)

    def _retry(self, path: str, action: Callable[[], T], given_up: Event | None = None) -> T:
        given_up = given_up or Event()
        pauses_s = self._pauses_s()
        while True:
            try:
                with self.named(path):
                    result = action()
                self._has_answered = True
                return result
            except StorageError as error:
                self._has_answered |= isinstance(error, ObjectNotFound)
                pause_s = None if is_final(error) else next(pauses_s, None)
                if pause_s is None or given_up.wait(pause_s):
                    raise


class StoreFile(io.RawIOBase):
    """An open object. Its reads raise `StorageError`."""

    def __init__(self, store: Access, path: str, file: Any) -> None:
        self._store, self._path, self._file = store, path, file

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase`."""
        with self._store.named(self._path):
            return cast(bytes, self._file.read(size))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`.

        Args:
            offset: bytes.
            whence: what the offset counts from.
        """
        with self._store.named(self._path):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return int(self._file.tell())

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def close(self) -> None:
        """See `io.RawIOBase`."""
        self._file.close()
        super().close()
