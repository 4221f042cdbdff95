"""WebDataset tars, plain or gzipped, streamed from front to back.

Tars whose samples are scattered, or that hold links, are read in three passes and bounded memory:
the first lists the members, the second collects the kept fields, and the third streams the images.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from latentcache.errors import Reject, SourceError, StorageError
from latentcache.images.samples import (
    Group,
    NotGrouped,
    ReadRequest,
    RejectedSample,
    Sample,
    SampleStream,
    escaped,
    key_and_field,
    sample_of,
)
from latentcache.images.tarstream import TarStream

# The maximum number of members that are listed in three passes. They take about 300 bytes each.
MAX_MEMBERS = 250_000

# The maximum size of the kept fields in memory between the second and the third pass.
WINDOW_BYTES = 64 * 2**20

_REPACK = "repack it with the files of each sample next to each other"

_OTHER_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


def read_tar(request: ReadRequest) -> SampleStream:
    """Stream a tar's samples; see `images.source.read_shard`.

    As in WebDataset, adjacent members with the same path up to the first dot of the file name are
    one sample, and the rest of the name in lower case is the field. Directories, devices,
    `__metadata__` files, hidden files and files without a dot belong to no sample.

    A tar that holds links, or whose samples are scattered, raises `NotGrouped` as soon as this is
    detected. With `gather`, samples have the order of their images.

    Further reject reasons with a key: `not_a_file`, `sparse_member`; with `gather` also
    `link_target` (the target of a link is not a readable member) and `not_grouped` (its fields do
    not fit into `WINDOW_BYTES`). Without a key: those of `TarStream`, and `not_grouped`.

    If a shard ends too soon, its last sample keeps its complete members. If the cut is within a
    member of that sample, the sample is lost and counted in the keyless reject, which names it.
    """
    if request.gather:
        problem = yield from _gather_samples(request)
    else:
        with _open_pass(request) as tar:
            problem = yield from _read_samples(tar, request)
    if problem is not None and problem.reject.reason == "not_a_tar":
        with request.store.open(request.name) as file:
            head = file.read(8)
        for magic, compression in _OTHER_COMPRESSION.items():
            if head.startswith(magic):
                fix = f"is compressed by {compression}: repack it as .tar or .tar.gz"
                raise SourceError(f"{request.shard.url} {fix}")
    return problem


@contextmanager
def _open_pass(request: ReadRequest) -> Iterator[TarStream]:
    """Open the shard for one pass; raise `StorageError` if the connection was cut."""
    url, size_bytes = request.shard.url, request.shard.size_bytes
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
            message = f"the connection was cut after {num_bytes} of {size_bytes} bytes"
            raise StorageError(f"{url}: {message}")


def _member_fault(member: tarfile.TarInfo) -> Reject | None:
    """Return the reject of a member that is not a link and cannot be read."""
    name = escaped(member.name)
    if not member.isreg():
        return Reject("read", "not_a_file", f"{name} is a device or a pipe, not a file")
    if member.issparse():
        message = f"{name} is stored as a sparse file: repack the tar without -S"
        return Reject("read", "sparse_member", message)
    return None


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
            if fault := _member_fault(member):
                group.names.add(name)
                group.refuse(fault)
            elif group.add(name, member.size, selection):
                request.reserve(group.num_bytes)
                group.fields[name] = tar.read_member(member)
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


@dataclass(slots=True)
class _Sample(Group):
    """A sample that the first pass finds."""

    members: dict[str, int] = field(default_factory=dict)  # field -> number of its member
    image: str | None = None  # the field that becomes the row
    duplicates: list[str] = field(default_factory=list)  # paths of further images of one field


_Use = tuple[_Sample, str]  # and the name of the field


def _gather_samples(request: ReadRequest) -> SampleStream:
    """Yield the samples of a tar in three passes; return the problem of the tar as a whole."""
    index = _Index(request)
    with _open_pass(request) as tar:
        problem = index.list_members(tar)
    if problem is None or problem.reject.reason != "not_grouped":
        index.resolve_links()
        index.collect_fields()
        yield from index.stream_samples()
    return problem


class _Index:
    """The samples of a tar and their members, which are numbered in their order."""

    def __init__(self, request: ReadRequest) -> None:
        self._request, self._selection = request, request.selection
        self._samples: dict[str, _Sample] = {}
        self._links: list[tuple[_Sample, str, tarfile.TarInfo]] = []
        self._numbers: dict[str, int] = {}  # path -> number of its last member
        self._sizes: dict[int, int] = {}

    def list_members(self, tar: TarStream) -> RejectedSample | None:
        """List the members; return the problem of the tar."""
        selection, path = self._selection, ""
        last: _Sample | None = None  # the sample of the last member
        try:
            for number, member in enumerate(tar):
                last, path = None, ""
                if len(self._numbers) + len(self._links) >= MAX_MEMBERS:
                    message = "it is not grouped by key, or holds links, and has more than "
                    message += f"{MAX_MEMBERS} members: {_REPACK}"
                    return RejectedSample(None, Reject("read", "not_grouped", message))
                is_link = member.islnk() or member.issym()
                fault = None if is_link else _member_fault(member)
                if not is_link and not fault:
                    path = posixpath.normpath(member.name)
                    self._numbers[path], self._sizes[number] = number, member.size
                key, name = key_and_field(member.name)
                if key is None or member.isdir() or not selection.is_relevant(name):
                    continue
                if not (member.isreg() or is_link or selection.is_image(name)):
                    continue
                sample = self._samples.setdefault(key, _Sample(key))
                if name in sample.names:
                    if selection.is_image(name):
                        sample.duplicates.append(member.name)
                    continue
                sample.names.add(name)
                last = sample if member.isreg() else None
                if is_link:
                    self._links.append((sample, name, member))
                elif fault:
                    sample.refuse(fault)
                else:
                    sample.members[name] = number
        except Reject as end:
            message, num_images = end.message, 0
            if tar.is_in_member:
                self._numbers.pop(path, None)
                if last is not None:
                    self._samples.pop(last.key)
                    message += f"; the sample {escaped(last.key)} is lost with it"
                    num_images = sum(map(selection.is_image, last.names)) + len(last.duplicates)
            return RejectedSample(None, Reject("read", end.reason, message), num_images)
        return None

    def resolve_links(self) -> None:
        """Find the member behind each link, and choose the image of each sample."""
        links = {posixpath.normpath(member.name): member for _, _, member in self._links}
        for sample, name, member in self._links:
            target, seen = member, set[str]()
            while True:
                base = "" if target.islnk() else posixpath.dirname(target.name)
                path = posixpath.normpath(posixpath.join(base, target.linkname))
                if path in self._numbers:
                    sample.members[name] = self._numbers[path]
                    break
                if path in seen or path not in links:
                    message = f"{escaped(member.name)} links to {escaped(member.linkname)}, which "
                    message += "is not a plain file in the archive"
                    sample.refuse(Reject("read", "link_target", message))
                    break
                seen.add(path)
                target = links[path]
        for sample in self._samples.values():
            images = (name for name in self._selection.image if name in sample.names)
            sample.image = next(images, None)
            for name, number in sample.members.items():
                if name in self._selection.keep or name == sample.image:
                    sample.add(name, self._sizes[number], self._selection)

    def collect_fields(self) -> None:
        """Read the kept fields that are not images, as far as they fit into `WINDOW_BYTES`."""
        keep = self._selection.keep
        users = self._users(lambda sample, name: name in keep and name != sample.image)
        num_bytes = 0
        for number in sorted(users):
            if num_bytes + self._sizes[number] <= WINDOW_BYTES:
                num_bytes += self._sizes[number]
                continue
            for sample, name in users.pop(number):
                message = f"the shard is not grouped by key, and its {escaped(name)} does not fit "
                message += f"beside the {WINDOW_BYTES} bytes of fields that are held: {_REPACK}"
                sample.refuse(Reject("read", "not_grouped", message))
        for samples, data in self._read(users, lambda num_bytes: None):
            for sample, name in samples:
                if not sample.fault:
                    sample.fields[name] = data

    def stream_samples(self) -> Iterator[Sample | RejectedSample]:
        """Yield each sample at its image, then those without a readable image."""
        users = self._users(lambda sample, name: name == sample.image)
        for samples, data in self._read(users, self._request.reserve):
            for sample, name in samples:
                sample.fields[name] = data
                yield from self._finish(sample)
                del self._samples[sample.key]
        for sample in self._samples.values():
            yield from self._finish(sample)

    def _finish(self, sample: _Sample) -> Iterator[Sample | RejectedSample]:
        yield sample_of(sample, self._selection)
        for path in sample.duplicates:
            message = f"{escaped(path)} is a second image of the sample in the same field"
            reject = Reject("read", "duplicate_key", message)
            yield RejectedSample(escaped(sample.key), reject, 1)

    def _users(self, is_used: Callable[[_Sample, str], bool]) -> dict[int, list[_Use]]:
        """Return for each member the samples that read it, with the name of the field."""
        users: dict[int, list[_Use]] = {}
        for sample in self._samples.values():
            for name, number in sample.members.items():
                if not sample.fault and is_used(sample, name):
                    users.setdefault(number, []).append((sample, name))
        return users

    def _read(
        self, users: dict[int, list[_Use]], reserve: Callable[[int], None]
    ) -> Iterator[tuple[list[_Use], bytes]]:
        """Read the tar, and yield the data of the members in `users`, with their users."""
        with _open_pass(self._request) as tar:
            try:
                for number, member in enumerate(tar):
                    if number in users:
                        reserve(max(sample.num_bytes for sample, _ in users[number]))
                        yield users[number], tar.read_member(member)
            except Reject:
                return  # the first pass reported it
