"""WebDataset tars, plain or gzipped, streamed from front to back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from latentcache.errors import Reject, SourceError, StorageError
from latentcache.images.gather import gather_samples, member_fault
from latentcache.images.samples import (
    Group,
    NotGrouped,
    ReadRequest,
    RejectedSample,
    SampleStream,
    escaped,
    key_and_field,
    sample_of,
)
from latentcache.images.tarstream import TarStream

_OTHER_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


def read_tar(request: ReadRequest) -> SampleStream:
    """Stream a tar's samples; see `images.source.read_shard`.

    Members are grouped as in WebDataset: adjacent members with the same path up to the first dot of
    the file name are one sample, and the rest of the name in lower case is the field. Directories,
    devices, `__metadata__` files, hidden files and files without a dot belong to no sample.

    A tar that holds links, or whose samples are scattered, raises `NotGrouped` as soon as this is
    detected. With `gather` it is read in three passes; see `images.gather`.

    Tars have these reject reasons in addition to those of all sources. With a key: `sparse_member`.
    Without a key: `not_a_tar`, `truncated_shard` (the bytes end too soon), `corrupt_shard` (a
    damaged header or gzip stream: the rest cannot be read), and `trailing_data` (bytes after the
    end mark, such as a second tar).

    If a shard ends too soon, its last sample keeps its complete members. If the cut is within a
    member of that sample, the sample is lost and counted in the keyless reject. The keyless reject
    names the sample in both cases.
    """
    if request.gather:
        problem = yield from gather_samples(partial(_open_pass, request), request)
    else:
        with _open_pass(request) as tar:
            problem = yield from _read_samples(tar, request)
    if problem is not None and problem.reject.reason == "not_a_tar":
        with request.store.open(request.name) as file:
            head = file.read(8)
        for magic, compression in _OTHER_COMPRESSION.items():
            if head.startswith(magic):
                raise SourceError(
                    f"{request.shard.url} is compressed by {compression}: repack it as .tar or "
                    ".tar.gz"
                )
    return problem


@contextmanager
def _open_pass(request: ReadRequest) -> Iterator[TarStream]:
    """Open the shard for one pass from its first byte to its last.

    Raises:
        StorageError: the connection was cut.
    """
    size_bytes = request.shard.size_bytes
    with request.store.open(request.name) as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        num_bytes, at_end = 0, False

        class CountedFile:
            def read(self, size: int) -> bytes:
                nonlocal num_bytes, at_end
                data = file.read(size)
                num_bytes += len(data)
                at_end = not data
                request.on_read(len(data))
                return data

        yield TarStream(CountedFile(), is_gzip=is_gzip)
        if at_end and num_bytes < size_bytes:
            raise StorageError(
                f"{request.shard.url}: the connection was cut after {num_bytes} of {size_bytes} "
                "bytes"
            )


def _read_samples(tar: TarStream, request: ReadRequest) -> SampleStream:
    """Yield the samples of a tar whose samples are not scattered; return the tar's problem."""
    selection, url = request.selection, request.shard.url
    seen: dict[str, frozenset[str]] = {}  # the fields of each earlier sample
    shared: dict[frozenset[str], frozenset[str]] = {}  # most samples have the same fields
    group: Group | None = None
    is_of_group = False  # whether the last member belongs to the group
    problem = None
    try:
        for member in tar:
            key, name = key_and_field(member.name)
            is_of_group = key is not None and member.isreg()
            if key is None or member.isdir():
                continue
            if member.islnk() or member.issym():
                if selection.is_relevant(name):
                    raise NotGrouped(f"{url}: {escaped(member.name)} is a link")
                continue
            if not member.isreg() and not selection.is_image(name):
                continue
            if group is None or key != group.key or name in group.names:
                if group is not None:
                    sample = sample_of(group, selection, seen)
                    seen.setdefault(group.key, shared.setdefault(sample.names, sample.names))
                    yield sample
                group = Group(key)
            if key in seen and name not in seen[key] and selection.is_relevant(name):
                raise NotGrouped(f"{url}: the sample {escaped(key)} is scattered")
            if fault := member_fault(member):
                group.names.add(name)
                group.refuse(*fault)
            elif group.add(name, member.size, selection):
                request.reserve(group.num_bytes)
                group.fields[name] = tar.read(member)
    except Reject as end:
        message, num_images_lost = end.message, 0
        if group is not None and is_of_group and tar.is_in_member:
            message += f"; the sample {escaped(group.key)} is lost with it"
            num_images_lost = sum(map(selection.is_image, group.names))
            group = None
        elif group is not None and end.reason != "trailing_data":
            message += f"; its last sample, {escaped(group.key)}, may lack fields"
        problem = RejectedSample(None, Reject("read", end.reason, message), num_images_lost)
    if group is not None:
        yield sample_of(group, selection, seen)
    return problem
