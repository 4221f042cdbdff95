"""Read tars with links or scattered samples, in three passes and bounded memory.

The usual reader (`images.tar_source`) reads each member once. It cannot join a caption to an image
that came 10,000 members earlier, and it cannot read a hard link, whose data is in an earlier
member. Here the first pass lists the members, the second collects the kept fields, which are small,
and the third streams the images. Samples have the order of their images.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from latentcache.errors import Reject
from latentcache.images.samples import (
    FieldSelection,
    Group,
    ReadRequest,
    RejectedSample,
    ReserveSample,
    Sample,
    SampleStream,
    escaped,
    key_and_field,
    sample_of,
)
from latentcache.images.tarstream import TarStream

# The maximum number of listed members, which take about 300 bytes each.
MAX_MEMBERS = 250_000

# The maximum size of the kept fields in memory between the second and the third pass.
WINDOW_BYTES = 64 * 2**20

_REPACK = "repack it with the files of each sample next to each other"


def member_fault(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return reason and message if a member that is not a link cannot be read."""
    name = escaped(member.name)
    if not member.isreg():
        return "not_a_file", f"{name} is a device or a pipe, not a file"
    if member.issparse():
        return "sparse_member", f"{name} is stored as a sparse file: repack the tar without -S"
    return None


@dataclass(slots=True)
class _Sample(Group):
    """A sample that the first pass finds."""

    members: dict[str, int] = field(default_factory=dict)  # field -> number of its member
    image: str | None = None  # the field that becomes the row
    duplicates: list[str] = field(default_factory=list)  # paths of further images of one field


def gather_samples(
    open_pass: Callable[[], AbstractContextManager[TarStream]], request: ReadRequest
) -> SampleStream:
    """Yield the samples of a tar in three passes; return the problem of the tar as a whole.

    The rejects are `link_target` (the target of a link is not a readable member) and `not_grouped`
    (the kept fields of the sample do not fit into `WINDOW_BYTES` with those of the others).
    """
    index = _Index(request.selection)
    with open_pass() as tar:
        problem = index.list_members(tar)
    if problem is not None and problem.reject.reason == "not_grouped":
        return problem
    index.resolve_links()
    with open_pass() as tar:
        index.collect_fields(tar)
    with open_pass() as tar:
        yield from index.stream_images(tar, request.reserve)
    for sample in index.samples.values():  # samples without a readable image
        yield from index.finish(sample)
    return problem


class _Index:
    """The samples of a tar and their members, which are numbered in their order."""

    def __init__(self, selection: FieldSelection) -> None:
        self._selection = selection
        self.samples: dict[str, _Sample] = {}
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
                fault = None
                is_link = member.islnk() or member.issym()
                if not is_link and not (fault := member_fault(member)):
                    path = posixpath.normpath(member.name)
                    self._numbers[path], self._sizes[number] = number, member.size
                key, name = key_and_field(member.name)
                if key is None or member.isdir() or not selection.is_relevant(name):
                    continue
                if not (member.isreg() or is_link or selection.is_image(name)):
                    continue
                sample = self.samples.setdefault(key, _Sample(key))
                if name in sample.names:
                    if selection.is_image(name):
                        sample.duplicates.append(member.name)
                    continue
                sample.names.add(name)
                last = sample if member.isreg() else None
                if is_link:
                    self._links.append((sample, name, member))
                elif fault:
                    sample.refuse(*fault)
                else:
                    sample.members[name] = number
        except Reject as end:
            message, num_images = end.message, 0
            if tar.is_in_member:
                self._numbers.pop(path, None)
            if last is not None and tar.is_in_member:
                self.samples.pop(last.key)
                message += f"; the sample {escaped(last.key)} is lost with it"
                num_images = sum(map(selection.is_image, last.names)) + len(last.duplicates)
            reject = Reject("read", end.reason, message)
            return RejectedSample(None, reject, num_images)
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
                    sample.refuse("link_target", message + "is not a plain file in the archive")
                    break
                seen.add(path)
                target = links[path]
        for sample in self.samples.values():
            images = (name for name in self._selection.image if name in sample.names)
            sample.image = next(images, None)
            for name, number in sample.members.items():
                if name in self._selection.keep or name == sample.image:
                    sample.add(name, self._sizes[number], self._selection)

    def collect_fields(self, tar: TarStream) -> None:
        """Read the kept fields that are not images, as far as they fit into `WINDOW_BYTES`."""
        keep = self._selection.keep
        users = self._users(lambda sample, name: name in keep and name != sample.image)
        num_bytes = 0
        for number in sorted(users):
            num_bytes += self._sizes[number]
            if num_bytes > WINDOW_BYTES:
                num_bytes -= self._sizes[number]
                for sample, name in users.pop(number):
                    message = f"the shard is not grouped by key, and its {escaped(name)} does not "
                    message += f"fit beside the {WINDOW_BYTES} bytes of fields that are held: "
                    sample.refuse("not_grouped", message + _REPACK)
        for samples, data in self._read(tar, users, lambda num_bytes: None):
            for sample, name in samples:
                if not sample.fault:
                    sample.fields[name] = data

    def stream_images(
        self, tar: TarStream, reserve: ReserveSample
    ) -> Iterator[Sample | RejectedSample]:
        """Yield each sample at its image, and remove it from the index."""
        users = self._users(lambda sample, name: name == sample.image)
        for samples, data in self._read(tar, users, reserve):
            for sample, name in samples:
                sample.fields[name] = data
                yield from self.finish(sample)
                del self.samples[sample.key]

    def finish(self, sample: _Sample) -> Iterator[Sample | RejectedSample]:
        """Yield a sample and the rejects of its duplicate images."""
        yield sample_of(sample, self._selection)
        for path in sample.duplicates:
            message = f"{escaped(path)} is a second image of the sample in the same field"
            reject = Reject("read", "duplicate_key", message)
            yield RejectedSample(escaped(sample.key), reject, 1)

    def _users(self, is_used: Callable[[_Sample, str], bool]) -> dict[int, list[_Use]]:
        """Return for each member the samples that read it, with the name of the field."""
        users: dict[int, list[_Use]] = {}
        for sample in self.samples.values():
            for name, number in sample.members.items():
                if not sample.fault and is_used(sample, name):
                    users.setdefault(number, []).append((sample, name))
        return users

    def _read(
        self, tar: TarStream, users: dict[int, list[_Use]], reserve: ReserveSample
    ) -> Iterator[tuple[list[_Use], bytes]]:
        """Yield the data of the members in `users`, with their users."""
        try:
            for number, member in enumerate(tar):
                if number in users:
                    reserve(max(sample.num_bytes for sample, _ in users[number]))
                    yield users[number], tar.read(member)
        except Reject:
            return  # the first pass reported it


_Use = tuple[_Sample, str]
