"""Access to a folder of a store: failed operations are retried, and errors name the URL."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

from latentcache.errors import ObjectNotFound, StorageError
from latentcache.storage import local, other_stores, s3
from latentcache.storage.backend import Backend
from latentcache.storage.failures import is_final
from latentcache.storage_options import StorageOptions
from latentcache.urls import check_endpoint, check_url

T = TypeVar("T")

# Pauses between tries. Each try is up to three tries of botocore, about 1.5 s in total. A store
# that never answered is probably a mistyped endpoint, which is reported within ten seconds. A wait
# of two minutes for a store that has answered before may save hours of work.
_NUM_PAUSES_AT_FIRST = 2
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)

_BACKENDS = local.BACKENDS | s3.BACKENDS | other_stores.BACKENDS


class Access:
    """A folder of a store, with retries and with URLs in errors; `Store` adds the operations."""

    def __init__(
        self, url: str | os.PathLike[str], options: StorageOptions = StorageOptions()
    ) -> None:
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

    def _retry(self, path: str, action: Callable[[], T], stop: Event | None = None) -> T:
        num_tries, stop = 0, stop or Event()
        while True:
            try:
                with self.named(path):
                    result = action()
                self._has_answered = True
                return result
            except StorageError as error:
                self._has_answered |= isinstance(error, ObjectNotFound)
                pauses_s = _PAUSES_S[: None if self._has_answered else _NUM_PAUSES_AT_FIRST]
                if is_final(error) or num_tries == len(pauses_s):
                    raise
                if stop.wait(pauses_s[num_tries] * random.uniform(0.5, 1.5)):
                    raise
                num_tries += 1
