"""Object stores and local folders behind one small class: read, list, and put exactly once.

Everything the package reads or writes goes through a `Store`, so that retries, error messages and
the put-if-absent protocol have one home. fsspec does the transport.
"""

from __future__ import annotations

import io
import math
import os
import random
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, cast

import fsspec

from latentcache import clock
from latentcache.errors import ConfigError, DeadlinePassed, ObjectNotFound, StorageError
from latentcache.storage_errors import (
    is_final,
    is_foreign,
    is_precondition_failure,
    named_local,
    translate,
)
from latentcache.storage_local import (
    TEMP_PREFIX,
    can_create_exclusively,
    create_file,
    replace_file,
)
from latentcache.urls import check_endpoint, check_url

if TYPE_CHECKING:  # to read a dataset takes no pydantic
    from latentcache.config import Storage

T = TypeVar("T")

# Pauses between tries, each of which is up to three of botocore's own, about 1.5 s together. A
# store that never answered is probably a mistyped endpoint, which should be told within ten
# seconds; one that did is down for a while, and hours of work may hang on waiting two minutes.
_NUM_PAUSES_AT_FIRST = 2
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)

_READ_BLOCK_BYTES = 8 * 2**20

_THREADS = 16

# S3 lists and deletes so many objects in one request.
_PAGE = 1000

# What tells versions of an object apart, by what fsspec's clients call it: S3; Google, whose ETag
# changes with the metadata too; Azure; the two kinds of repositories on the Hugging Face Hub.
_VERSIONS = ("ETag", "generation", "etag", "blob_id", "xet_hash")

# The Hub's client else answers from its last listing, and a fresh answer has no version in it.
_INFO_OPTIONS = {"hf": {"refresh": True, "expand_info": True}}

# Extras of this package that bring a protocol's client.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How to reach a store. Credentials come from the environment or from the named profile."""

    endpoint_url: str | None = None
    profile: str | None = None
    anon: bool = False
    requester_pays: bool = False


def storage_options(storage: Storage) -> StorageOptions:
    """Turn a config's `storage` section into options of a `Store`."""
    return StorageOptions(**storage.model_dump())


DANGLING = "dangling"
"""The version of a local link whose target does not exist."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: `path` below the store's root, and what tells its versions apart.

    `version` is the ETag or what the store has in its place, else the time of change.
    `modified_at` is in seconds since 1970 by the store's own clock, None where it does not say.
    """

    path: str
    size_bytes: int
    version: str
    modified_at: float | None


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that was begun and not ended; `started_at` as `ObjectInfo.modified_at`."""

    path: str
    id: str
    started_at: float


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into its folder and its name: `s3://b/d/x.tar` into `s3://b/d` and `x.tar`.

    Raises:
        ConfigError: as `urls.check_url`.
    """
    check_url(url)
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name


class Store:
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
        self.options, url = options, os.fspath(url)
        self.is_local = check_url(url) == "file"
        if options.endpoint_url is not None:
            check_endpoint(options.endpoint_url)
        if self.is_local:
            self._root = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
            self.url = f"file://{self._root}"
        else:
            self.url = url.rstrip("/")
            self._root = self.url
        _filesystem(self._protocol, options, os.getpid())  # tells at once what cannot be used
        self._has_answered = False
        self.conditional: Literal["yes", "no", "unknown"] = "yes"
        """Whether the store itself refuses a second put; `probe_conditional` finds out."""

    @property
    def _protocol(self) -> str:
        return self.url.split("://")[0]

    @property
    def _fs(self) -> Any:
        """The client of the process that asks: a store made before a fork works after it."""
        return _filesystem(self._protocol, self.options, os.getpid())

    @property
    def _is_s3(self) -> bool:
        return self._protocol in ("s3", "s3a")

    def url_of(self, path: str) -> str:
        """Give the absolute URL of a path."""
        return f"{self.url}/{path}" if path else self.url

    def local_path(self, path: str) -> Path | None:
        """Give the file that holds a path, or None where the store is remote."""
        return Path(self._full(path)) if self.is_local else None

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}" if path else self._root

    def _info_of(self, path: str, details: dict[str, Any]) -> ObjectInfo:
        version = next((details[name] for name in _VERSIONS if details.get(name)), None)
        changed = details.get("LastModified") or details.get("last_modified")
        changed = changed or details.get("mtime") or details.get("updated")
        if isinstance(changed, datetime):
            changed = changed.timestamp()
        return ObjectInfo(
            path=path,
            size_bytes=int(details["size"] or 0),
            version=str(version or changed or "").strip('"'),
            modified_at=float(changed) if isinstance(changed, int | float) else None,
        )

    @contextmanager
    def named(self, path: str) -> Iterator[None]:
        """Turn what fsspec and its transports raise inside into a `StorageError` naming the URL."""
        try:
            yield
        except Exception as error:
            if not is_foreign(error):
                raise
            raise translate(error, self.url_of(path), self.options.endpoint_url) from error

    def _pauses_s(self) -> Iterator[float]:
        """Wait between tries; ends when it is time to give up."""
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

    def read_bytes(self, path: str) -> bytes:
        """Read a whole object."""
        return self._retry(path, lambda: cast(bytes, self._fs.cat_file(self._full(path))))

    def open(self, path: str, *, readahead: bool = True) -> BinaryIO:
        """Open an object for reading; opening and every read raise `StorageError`, no `OSError`.

        So an `OSError` of what decodes the bytes, such as Arrow, is damage and not the store's
        doing. Without `readahead`, each read asks a remote store for just those bytes.
        """
        file = self._retry(path, lambda: self._open(path, readahead))
        return cast(BinaryIO, _StoreFile(self, path, file))

    def _open(self, path: str, readahead: bool = True) -> Any:
        options = {} if readahead else {"cache_type": "none"}
        return self._fs.open(self._full(path), "rb", block_size=_READ_BLOCK_BYTES, **options)

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
                        chunk = source.read(_READ_BLOCK_BYTES)
                    if not chunk:
                        break
                    num_bytes += target.write(chunk)
        if num_bytes != size_bytes:
            raise StorageError(
                f"{self.url_of(path)}: the connection gave {num_bytes} of {size_bytes} bytes"
            )

    def info(self, path: str) -> ObjectInfo:
        """Ask for an object's size and version."""
        if self.is_local:
            status = self._retry(path, lambda: os.stat(self._full(path)))
            is_folder, info = stat.S_ISDIR(status.st_mode), _local_info(path, status)
        else:
            fresh = _INFO_OPTIONS.get(self._protocol, {})
            details = self._retry(path, lambda: self._fs.info(self._full(path), **fresh))
            is_folder, info = details["type"] == "directory", self._info_of(path, details)
        if is_folder:
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

    def _entries(self, folder: str) -> tuple[Sequence[ObjectInfo], Sequence[str]]:
        """Give the objects and the folders that lie directly in a folder."""
        prefix = f"{folder}/" if folder else ""
        try:
            if self.is_local:
                return self._retry(folder, lambda: self._entries_local(prefix))
            entries = self._retry(
                folder, lambda: self._fs.ls(self._full(folder), detail=True, refresh=True)
            )
        except ObjectNotFound:
            return [], []
        names = [(prefix + e["name"].rstrip("/").rpartition("/")[2], e) for e in entries]
        # A file given as the folder lists as itself; it is not in the folder.
        infos = [
            self._info_of(path, entry)
            for path, entry in names
            if entry["type"] == "file" and entry["size"] is not None
        ]
        return infos, [path for path, entry in names if entry["type"] == "directory"]

    def _entries_local(self, prefix: str) -> tuple[Sequence[ObjectInfo], Sequence[str]]:
        infos: list[ObjectInfo] = []
        folders: list[str] = []
        with os.scandir(self._full(prefix)) as entries:
            for entry in entries:
                # Others write here: what is half written does not count, nor what is gone by now.
                with suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(prefix + entry.name)
                    elif entry.name.startswith(TEMP_PREFIX):
                        continue
                    elif _is_dangling(entry):
                        infos.append(ObjectInfo(prefix + entry.name, 0, DANGLING, None))
                    elif entry.is_file():
                        infos.append(_local_info(prefix + entry.name, entry.stat()))
        return infos, folders

    def iterate(self, folder: str = "") -> Iterator[ObjectInfo]:
        """Give the objects below a folder, at any depth and in any order, as pages of them come.

        S3 lists a thousand objects a request; elsewhere each folder takes one. On a local disk,
        links to files count as files, and links to folders are not followed.
        """
        if self._is_s3:
            yield from self._iterate_pages(folder)
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            left = [folder]
            while left:
                some, left = left[-_THREADS:], left[:-_THREADS]
                for infos, folders in pool.map(self._entries, some):
                    yield from infos
                    left += folders

    def _iterate_pages(self, folder: str) -> Iterator[ObjectInfo]:
        bucket, key, _ = self._fs.split_path(self._full(folder))
        prefix = f"{key}/" if key else ""
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE}
        while True:
            page = self._retry(folder, lambda: self._fs.call_s3("list_objects_v2", **request))
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # what consoles put to show a folder
                    below = entry["Key"].removeprefix(prefix)
                    path = f"{folder}/{below}" if folder else below
                    yield self._info_of(path, {**entry, "size": entry["Size"]})
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def now(self) -> float:
        """Tell the time by the store's own clock, in seconds since 1970.

        S3 tells it; of disks and other stores this host's clock has to do.
        """
        if not self._is_s3:
            return time.time()
        bucket, _, _ = self._fs.split_path(self._root)
        reply = self._retry("", lambda: self._fs.call_s3("head_bucket", Bucket=bucket))
        told = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(told).timestamp() if told else time.time()

    def walk(self, folder: str = "") -> Sequence[ObjectInfo]:
        """List the objects below a folder, at any depth, by path; none where there is none."""
        return sorted(self.iterate(folder), key=lambda info: info.path)

    def put_file(self, local: Path, path: str) -> None:
        """Upload a closed local file, whole, under a path that nobody else writes."""
        if self.is_local:
            with local.open("rb") as source:
                self._retry(path, lambda: replace_file(self._full(path), source))
        else:
            self._retry(path, lambda: self._fs.put_file(str(local), self._full(path)))

    def put(self, path: str, data: bytes) -> None:
        """Write a small object, replacing what is there (leases and pointers only)."""
        if self.is_local:
            self._retry(path, lambda: replace_file(self._full(path), io.BytesIO(data)))
        else:
            self._retry(path, lambda: self._fs.pipe_file(self._full(path), data))

    def delete(self, path: str) -> None:
        """Delete an object; it is no error if it is gone already."""
        try:
            self._retry(path, lambda: self._fs.rm_file(self._full(path)))
        except ObjectNotFound:
            return

    def delete_many(
        self, paths: Sequence[str], progress: Callable[[int], object] = lambda num_deleted: None
    ) -> None:
        """Delete objects as `delete` does, many at a time; `progress` is told how many more."""
        size = _PAGE if self._is_s3 else _THREADS
        batches = [paths[first : first + size] for first in range(0, len(paths), size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for num_deleted in pool.map(self._delete_batch, batches):
                progress(num_deleted)

    def _delete_batch(self, paths: Sequence[str]) -> int:
        left: Sequence[str] = paths
        if self._is_s3:
            with suppress(StorageError):  # a store that cannot, or is busy: then one by one
                left = self._delete_at_once(paths)
        for path in left:
            self.delete(path)
        return len(paths)

    def _delete_at_once(self, paths: Sequence[str]) -> Sequence[str]:
        """Delete up to a thousand objects with one request to S3; gives those that it left."""
        keys = {self._fs.split_path(self._full(path))[1]: path for path in paths}
        bucket, _, _ = self._fs.split_path(self._root)
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        with self.named(paths[0]):
            reply = self._fs.call_s3("delete_objects", Bucket=bucket, Delete=wanted)
        return [keys[error["Key"]] for error in reply.get("Errors", ())]

    def list_uploads(self) -> Sequence[Upload]:
        """List the multipart uploads that are under way or were left; only S3 has such."""
        if not self._is_s3:
            return []
        bucket, key, _ = self._fs.split_path(self._root)
        prefix = f"{key}/" if key else ""
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxUploads": _PAGE}
        uploads: list[Upload] = []
        list_page = partial(self._fs.call_s3, "list_multipart_uploads")
        while True:
            try:
                page = self._retry("", partial(list_page, **request))
            except ObjectNotFound:  # rclone's way of saying that there are none
                return uploads
            for entry in page.get("Uploads", ()):
                path, started = entry["Key"].removeprefix(prefix), entry["Initiated"]
                uploads.append(Upload(path, entry["UploadId"], started.timestamp()))
            if not page.get("IsTruncated"):
                return uploads
            request["KeyMarker"] = page["NextKeyMarker"]
            request["UploadIdMarker"] = page["NextUploadIdMarker"]

    def abort_upload(self, upload: Upload) -> None:
        """Give up a multipart upload and free its parts; it is no error if it has ended."""
        bucket, key, _ = self._fs.split_path(self._full(upload.path))
        request = {"Bucket": bucket, "Key": key, "UploadId": upload.id}
        with suppress(ObjectNotFound):
            self._retry(upload.path, lambda: self._fs.call_s3("abort_multipart_upload", **request))

    def temp_files(self) -> Iterator[ObjectInfo]:
        """Give the files on a local disk that are half written, or were when a writer died."""
        if not self.is_local:
            return
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith(TEMP_PREFIX):
                    with suppress(FileNotFoundError):  # its writer was at work, and is done
                        yield _local_info(os.path.relpath(path, self._root), os.stat(path))

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

        def create() -> bool:
            if clock.boot_time_s() > valid_until:
                raise DeadlinePassed(f"{self.url_of(path)} was not put in time")
            if self.is_local:
                return create_file(self._full(path), io.BytesIO(data))
            return self._create(path, data)

        # Looking first decides nothing, but a store without conditional writes would replace it.
        if not self.is_local and (found := self._read_or_none(path)) is not None:
            return found == data
        return self._retry(path, create)

    def _create(self, path: str, data: bytes) -> bool:
        try:
            with self.named(path):
                self._fs.pipe_file(self._full(path), data, mode="create")
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
        if self.is_local:
            is_exclusive = self._retry("", lambda: can_create_exclusively(self._root))
            self.conditional = "yes" if is_exclusive else "no"
            return self.is_conditional
        try:
            with self.named(path):
                self._fs.pipe_file(self._full(path), data, mode="create")
            self.conditional = "no"
        except StorageError as error:
            is_refused = is_precondition_failure(error, self._protocol)
            self.conditional = "yes" if is_refused else "unknown"
        return self.is_conditional

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read_bytes(path)
        except ObjectNotFound:
            return None


class _StoreFile(io.RawIOBase):
    """An open object whose reads raise `StorageError`."""

    def __init__(self, store: Store, path: str, file: Any) -> None:
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


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link to nothing, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _local_info(path: str, status: os.stat_result) -> ObjectInfo:
    # Nanoseconds: two writes within a second must not look the same.
    return ObjectInfo(path, status.st_size, f"{status.st_mtime_ns}", status.st_mtime)


@lru_cache(maxsize=64)
def _filesystem(protocol: str, options: StorageOptions, pid: int) -> Any:
    """Make the client of a protocol: once in a process, for it takes a tenth of a second.

    Not fsspec's own cache, which has one for each thread; `pid`, because none survives a fork.
    """
    arguments: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        arguments |= {
            "anon": options.anon,
            "endpoint_url": options.endpoint_url,
            "profile": options.profile,
            "requester_pays": options.requester_pays,
            # Another process writes here too: a cached listing would lie.
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": 10,
                "read_timeout": 60,
                # The default of five tries times ours times s3fs's would take a minute to fail.
                "retries": {"mode": "standard", "total_max_attempts": 3},
                # Stores that are not AWS send no checksums, or wrong ones for ranges.
                "response_checksum_validation": "when_required",
                "request_checksum_calculation": "when_required",
            },
        }
    elif protocol in ("gs", "gcs"):
        arguments |= {
            "endpoint_url": options.endpoint_url,
            "requester_pays": options.requester_pays,
            "use_listings_cache": False,
        }
        arguments |= {"token": "anon"} if options.anon else {}
    elif protocol in ("az", "abfs", "abfss"):
        arguments |= {"anon": options.anon, "use_listings_cache": False}
    try:
        return fsspec.filesystem(protocol, **arguments)
    except ImportError as error:
        mend = f": pip install 'latentcache[{extra}]'" if (extra := _EXTRAS.get(protocol)) else ""
        raise ConfigError(f"cannot use {protocol}:// URLs: {error}{mend}") from error
    except ValueError as error:
        raise ConfigError(f"cannot use {protocol}:// URLs: {error}") from error
