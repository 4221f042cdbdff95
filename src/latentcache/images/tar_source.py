"""WebDataset tars, plain or gzipped, streamed from front to back."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import BinaryIO

from latentcache.errors import Reject, SourceError, StorageError
from latentcache.images.gather import gather_samples, member_fault
from latentcache.images.samples import (
    Group,
    NotGrouped,
    OnRead,
    RejectedSample,
    ReserveSample,
    Sample,
    SourceShard,
    Wanted,
    escaped,
    key_and_field,
    sample_of,
)
from latentcache.images.tarstream import TarEnds, TarStream
from latentcache.storage import Store, split_url
from latentcache.storage_options import StorageOptions

_OTHER_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


def read_tar(
    shard: SourceShard,
    wanted: Wanted,
    options: StorageOptions,
    on_read: OnRead,
    reserve: ReserveSample,
    *,
    gather: bool,
) -> Iterator[Sample | RejectedSample]:
    """Stream a tar's samples; see `images.source.read_shard`.

    Members are grouped as in WebDataset: adjacent members with the same path up to the first dot of
    the file name are one sample, and the rest of the name in lower case is the field. Directories,
    devices, `__metadata__` files, hidden files and files without a dot belong to no sample.

    A tar that holds links, or whose samples are scattered, raises `NotGrouped` as soon as this is
    detected. With `gather` it is read in three passes; see `images.gather`.

    Tars have these reject reasons in addition to those of all sources. With a key: `sparse_member`.
    Without a key: `empty_shard`, `not_a_tar`, `truncated_shard` (the bytes end too soon),
    `corrupt_shard` (a damaged header or gzip stream: the rest cannot be read), and `trailing_data`
    (bytes after the end mark, such as a second tar).

    If a shard ends too soon, its last sample keeps its complete members. If the cut is within a
    member of that sample, the sample is lost and counted in the keyless reject. The keyless reject
    names the sample in both cases.

    Args:
        shard: the listed shard.
        wanted: the fields to read.
        options: how to reach the store.
        on_read: called with the number of bytes of each read of the archive.
        reserve: called before a field is read, with the bytes that its sample then holds.
        gather: whether to read in three passes.
    """
    folder, name = split_url(shard.url)
    store = Store(folder, options)
    trouble: RejectedSample | None = None
    if shard.size_bytes == 0:
        trouble = RejectedSample(None, Reject("read", "empty_shard", "the shard holds no bytes"))
    else:
        try:
            if gather:
                passes = partial(_open_pass, store, shard, name, on_read)
                trouble = yield from gather_samples(passes, wanted, reserve)
            else:
                with _open_pass(store, shard, name, on_read) as tar:
                    trouble = yield from _read_samples(tar, wanted, reserve, shard.url)
            if trouble is not None and trouble.reject.reason == "not_a_tar":
                _refuse_compression(store, name)
        except StorageError:
            # A replaced or deleted object may appear as missing bytes or as a failed read.
            shard.require_unchanged(store, name)
            raise
    shard.require_unchanged(store, name)
    if trouble is not None:
        yield trouble


@contextmanager
def _open_pass(store: Store, shard: SourceShard, name: str, on_read: OnRead) -> Iterator[TarStream]:
    """Open the shard for one pass from its first byte to its last.

    Raises:
        StorageError: the connection was cut.
    """
    with store.open(name) as file:
        counted = _CountedFile(file, on_read)
        yield TarStream(counted, is_gzip=counted.peek(2) == b"\x1f\x8b")
        if counted.at_end and counted.num_bytes < shard.size_bytes:
            raise StorageError(
                f"{shard.url}: the connection was cut after {counted.num_bytes} of "
                f"{shard.size_bytes} bytes"
            )


class _CountedFile:
    """A file that counts the bytes read from it."""

    def __init__(self, file: BinaryIO, on_read: OnRead) -> None:
        self._file, self._on_read = file, on_read
        self.num_bytes = 0
        self.at_end = False

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.num_bytes += len(data)
        self._on_read(len(data))
        self.at_end = not data
        return data

    def peek(self, size: int) -> bytes:
        data = self._file.read(size)
        self._file.seek(0)
        return data


def _refuse_compression(store: Store, name: str) -> None:
    with store.open(name) as file:
        head = file.read(8)
    for magic, compression in _OTHER_COMPRESSION.items():
        if head.startswith(magic):
            raise SourceError(
                f"{store.url_of(name)} is compressed by {compression}: repack it as .tar or .tar.gz"
            )


def _read_samples(
    tar: TarStream, wanted: Wanted, reserve: ReserveSample, url: str
) -> Generator[Sample | RejectedSample, None, RejectedSample | None]:
    """Yield the samples of a tar whose samples are not scattered; return the tar's problem."""
    seen: dict[str, tuple[str, ...]] = {}  # the fields of each earlier sample
    group: Group | None = None
    is_of_group = False  # whether the last member belongs to the group
    num_images_lost = 0
    try:
        for member in tar:
            key, name = key_and_field(member.name)
            is_of_group = key is not None and member.isreg()
            if key is None or member.isdir():
                continue
            if not member.isreg():
                if member.islnk() or member.issym():
                    if wanted.is_relevant(name):
                        raise NotGrouped(f"{url}: {escaped(member.name)} is a link")
                    continue
                if not wanted.is_image(name):
                    continue
            if group is None or key != group.key or name in group.names:
                if group is not None:
                    yield sample_of(group, wanted, seen)
                    seen.setdefault(group.key, _shared(tuple(sorted(group.names))))
                group = Group(key)
            if key in seen and name not in seen[key] and wanted.is_relevant(name):
                raise NotGrouped(f"{url}: the sample {escaped(key)} is scattered")
            if fault := member_fault(member):
                group.names.add(name)
                group.refuse(fault)
            elif group.add(name, member.size, wanted):
                reserve(group.num_bytes)
                group.fields[name] = tar.read(member)
        trouble = None
    except TarEnds as end:
        message = end.message
        if group is not None and is_of_group and tar.is_in_member:
            message += f"; the sample {escaped(group.key)} is lost with it"
            num_images_lost = sum(map(wanted.is_image, group.names))
            group = None
        elif group is not None and end.reason != "trailing_data":
            message += f"; its last sample, {escaped(group.key)}, may lack fields"
        trouble = RejectedSample(None, Reject("read", end.reason, message), num_images_lost)
    if group is not None:
        yield sample_of(group, wanted, seen)
    return trouble


@lru_cache(maxsize=1024)
def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return one object for equal tuples, because most samples of a shard have the same fields."""
    return names
