"""WebDataset tars, plain or gzipped: read once, front to back, and never held in memory."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import BinaryIO

from latentcache.errors import Reject, SourceError, StorageError
from latentcache.images.samples import (
    Group,
    OnRead,
    RejectedSample,
    Sample,
    SourceShard,
    Wanted,
    escaped,
    key_and_field,
    sample_of,
)
from latentcache.images.tarstream import TarEnds, TarStream
from latentcache.storage import StorageOptions, Store, split_url

_OTHER_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


def read_tar(
    shard: SourceShard, wanted: Wanted, options: StorageOptions, on_read: OnRead
) -> Iterator[Sample | RejectedSample]:
    """Stream a tar's samples in its order; see `images.source.read_shard`.

    Members are grouped as WebDataset does it: neighbours with the same path up to the first dot of
    the file name are one sample, and the lower-cased rest is the field. As there, directories,
    links and devices, `__metadata__` files and files without a dot, or with a leading one, are no
    part of any sample.

    Rejects without a key: `empty_shard`, `not_a_tar`, `truncated_shard` (its bytes end too soon),
    `corrupt_shard` (a damaged header or gzip stream: what follows it cannot be read),
    `trailing_data` (bytes after the end mark, such as a second tar).

    Where a shard ends too soon, a sample counts with the members that came whole. Only if the cut
    falls within one of its members is it lost, into the keyless reject, which names it either way.
    """
    folder, name = split_url(shard.url)
    store = Store(folder, options)
    trouble: RejectedSample | None = None
    if shard.size_bytes == 0:
        trouble = RejectedSample(None, Reject("read", "empty_shard", "the shard holds no bytes"))
    else:
        try:
            with store.open(name) as file:
                counted = _CountedFile(store, name, file, on_read)
                head = counted.peek(8)
                tar = TarStream(counted, is_gzip=head.startswith(b"\x1f\x8b"))
                trouble = yield from _read_samples(tar, wanted)
                if trouble is not None and trouble.reject.reason == "not_a_tar":
                    _refuse_compression(shard, head)
                if counted.at_end and counted.num_bytes < shard.size_bytes:
                    raise StorageError(
                        f"{shard.url}: the connection was cut after {counted.num_bytes} of "
                        f"{shard.size_bytes} bytes"
                    )
        except StorageError:
            # An object replaced or deleted may show as fewer bytes or as a failed read.
            shard.require_unchanged(store, name)
            raise
    shard.require_unchanged(store, name)
    if trouble is not None:
        yield trouble


class _CountedFile:
    """A shard's bytes as they come from the store, counted."""

    def __init__(self, store: Store, name: str, file: BinaryIO, on_read: OnRead) -> None:
        self._store, self._name, self._file = store, name, file
        self._on_read = on_read
        self.num_bytes = 0
        self.at_end = False

    def read(self, size: int) -> bytes:
        with self._store.named(self._name):
            data = self._file.read(size)
        self.num_bytes += len(data)
        self._on_read(len(data))
        self.at_end = not data
        return data

    def peek(self, size: int) -> bytes:
        with self._store.named(self._name):
            data = self._file.read(size)
            self._file.seek(0)
        return data


def _refuse_compression(shard: SourceShard, head: bytes) -> None:
    for magic, compression in _OTHER_COMPRESSION.items():
        if head.startswith(magic):
            raise SourceError(
                f"{shard.url} is compressed by {compression}: repack it as .tar or .tar.gz"
            )


def _read_samples(
    tar: TarStream, wanted: Wanted
) -> Generator[Sample | RejectedSample, None, RejectedSample | None]:
    """Yield the samples; return what is wrong with the shard as a whole."""
    seen: set[str] = set()
    group: Group | None = None
    is_of_group = False  # the member last met
    trouble: RejectedSample | None = None
    try:
        for member in tar:
            key, name = key_and_field(member.name) if member.isreg() else (None, "")
            is_of_group = key is not None
            if key is None:
                continue
            if group is None or key != group.key or name in group.names:
                if group is not None:
                    yield sample_of(group, wanted, seen)
                group = Group(key)
            if group.is_wanted(name, member.size, wanted):
                group.fields[name] = tar.read(member)
    except TarEnds as end:
        message = end.message
        if group is not None and is_of_group and tar.is_in_member:
            message += f"; the sample {escaped(group.key)} is lost with it"
            group = None
        elif group is not None and end.reason != "trailing_data":
            message += f"; its last sample, {escaped(group.key)}, may lack fields"
        trouble = RejectedSample(None, Reject("read", end.reason, message))
    if group is not None:
        yield sample_of(group, wanted, seen)
    return trouble
