"""Read tars with links or scattered samples, in three passes and bounded memory.

The usual reader (`images.tar_source`) reads each member once. It cannot join a caption to an image
that came 10,000 members earlier, and it cannot read a hard link, whose data is in an earlier
member. Here the first pass lists the members, the second collects the kept fields, which are small,
and the third streams the images. Samples have the order of their images.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from latentcache.errors import Reject
from latentcache.images.samples import (
    Group,
    RejectedSample,
    ReserveSample,
    Sample,
    Wanted,
    escaped,
    key_and_field,
    sample_of,
)
from latentcache.images.tarstream import TarEnds, TarStream

# The maximum number of listed members, which take about 300 bytes each.
MAX_MEMBERS = 250_000

# The maximum size of the kept fields in memory between the second and the third pass.
WINDOW_BYTES = 64 * 2**20

OpenPass = Callable[[], AbstractContextManager[TarStream]]


def member_fault(member: tarfile.TarInfo) -> Reject | None:
    """Return the reject of a member that is not a link and cannot be read; None if it can."""
    if not member.isreg():
        message = f"{escaped(member.name)} is a device or a pipe, not a file"
        return Reject("read", "not_a_file", message)
    if member.issparse():
        message = f"{escaped(member.name)} is stored as a sparse file: repack the tar without -S"
        return Reject("read", "sparse_member", message)
    return None


@dataclass(slots=True)
class _Sample:
    """A sample that the first pass finds."""

    group: Group
    sources: dict[str, int] = field(default_factory=dict)  # field -> number of its member
    image: str | None = None  # the field that becomes the row
    duplicates: list[str] = field(default_factory=list)  # paths of further images of one field


@dataclass
class _Index:
    """The result of the first pass; members are numbered in their order."""

    samples: dict[str, _Sample] = field(default_factory=dict)
    links: list[tuple[_Sample, str, tarfile.TarInfo, int]] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # path -> number of its last member
    trouble: RejectedSample | None = None


def gather_samples(
    open_pass: OpenPass, wanted: Wanted, reserve: ReserveSample
) -> Generator[Sample | RejectedSample, None, RejectedSample | None]:
    """Yield the samples of a tar in three passes; return the problem of the tar as a whole.

    The rejects are `link_target` (the target of a link is not a readable member) and `not_grouped`
    (the kept fields of the sample do not fit into `WINDOW_BYTES` with those of the others).

    Args:
        open_pass: opens the tar at its first byte.
        wanted: the fields to read.
        reserve: called before an image is read, with the bytes that its sample then holds.

    Returns:
        The keyless reject of the tar, or None.
    """
    index = _Index()
    with open_pass() as tar:
        if not _list_members(tar, wanted, index):
            message = (
                f"it is not grouped by key, or holds links, and has more than {MAX_MEMBERS} "
                "members: repack it with the files of each sample next to each other"
            )
            return RejectedSample(None, Reject("read", "not_grouped", message))
    _resolve_links(index, wanted)
    with open_pass() as tar:
        _collect_fields(tar, wanted, index)
    with open_pass() as tar:
        yield from _stream_images(tar, wanted, index, reserve)
    for sample in index.samples.values():  # samples without a readable image
        yield sample_of(sample.group, wanted, ())
        yield from _duplicates(sample)
    return index.trouble


def _list_members(tar: TarStream, wanted: Wanted, index: _Index) -> bool:
    """List the members; return False if there are too many."""
    last: tuple[_Sample, str] | None = None
    try:
        for number, member in enumerate(tar):
            last = None
            if len(index.numbers) >= MAX_MEMBERS:
                return False
            if member.isreg():
                index.numbers[posixpath.normpath(member.name)] = number
                index.sizes[number] = member.size
            key, name = key_and_field(member.name)
            if key is None or member.isdir() or not wanted.is_relevant(name):
                continue
            is_link = member.islnk() or member.issym()
            if not (member.isreg() or is_link or wanted.is_image(name)):
                continue
            sample = index.samples.get(key)
            if sample is None:
                sample = index.samples[key] = _Sample(Group(key))
            if name in sample.group.names:
                if wanted.is_image(name):
                    sample.duplicates.append(member.name)
                continue
            sample.group.names.add(name)
            last = (sample, name) if member.isreg() else None
            if is_link:
                index.links.append((sample, name, member, number))
            elif fault := member_fault(member):
                sample.group.refuse(fault)
            else:
                sample.sources[name] = number
    except TarEnds as end:
        message, num_images = end.message, 0
        if last is not None and tar.is_in_member:
            sample = index.samples.pop(last[0].group.key)
            message += f"; the sample {escaped(sample.group.key)} is lost with it"
            num_images = sum(map(wanted.is_image, sample.group.names)) + len(sample.duplicates)
        index.trouble = RejectedSample(None, Reject("read", end.reason, message), num_images)
    return True


def _resolve_links(index: _Index, wanted: Wanted) -> None:
    """Find the member behind each link, and choose the image of each sample."""
    links = {posixpath.normpath(member.name): member for _, _, member, _ in index.links}
    for sample, name, member, _ in index.links:
        target, seen = member, set[str]()
        while True:
            base = "" if target.islnk() else posixpath.dirname(target.name)
            path = posixpath.normpath(posixpath.join(base, target.linkname))
            if path in index.numbers:
                sample.sources[name] = index.numbers[path]
                break
            if path in seen or path not in links:
                message = f"{escaped(member.name)} links to {escaped(member.linkname)}, which "
                message += "is not a file in the archive"
                sample.group.refuse(Reject("read", "link_target", message))
                break
            seen.add(path)
            target = links[path]
    for sample in index.samples.values():
        sample.image = next((name for name in wanted.image if name in sample.group.names), None)
        for name, number in sample.sources.items():
            if name in wanted.keep or name == sample.image:
                sample.group.add(name, index.sizes[number], wanted)


def _users(index: _Index, is_used: Callable[[_Sample, str], bool]) -> dict[int, list[_Use]]:
    """Return for each member the samples that read it, with the name of the field."""
    users: dict[int, list[_Use]] = {}
    for sample in index.samples.values():
        for name, number in sample.sources.items():
            if not sample.group.fault and is_used(sample, name):
                users.setdefault(number, []).append((sample, name))
    return users


_Use = tuple[_Sample, str]


def _collect_fields(tar: TarStream, wanted: Wanted, index: _Index) -> None:
    """Read the kept fields that are not images, as far as they fit into `WINDOW_BYTES`."""
    users = _users(index, lambda sample, name: name in wanted.keep and name != sample.image)
    num_bytes = 0
    for number, member in _members(tar, users):
        num_bytes += member.size
        if num_bytes <= WINDOW_BYTES and not member_fault(member):
            data = tar.read(member)
            for sample, name in users[number]:
                sample.group.fields[name] = data
            continue
        num_bytes -= member.size
        message = (
            f"the shard is not grouped by key, and {escaped(member.name)} does not fit beside the "
            f"{WINDOW_BYTES} bytes of fields that are held: repack it with the files of each "
            "sample next to each other"
        )
        for sample, _ in users[number]:
            sample.group.refuse(member_fault(member) or Reject("read", "not_grouped", message))


def _stream_images(
    tar: TarStream, wanted: Wanted, index: _Index, reserve: ReserveSample
) -> Generator[Sample | RejectedSample, None, None]:
    """Yield each sample at its image, and remove it from the index."""
    users = _users(index, lambda sample, name: name == sample.image)
    for number, member in _members(tar, users):
        reserve(max(sample.group.num_bytes for sample, _ in users[number]))
        fault = member_fault(member)
        data = b"" if fault else tar.read(member)
        for sample, name in users[number]:
            sample.group.fields[name] = data
            if fault:
                sample.group.refuse(fault)
            yield sample_of(sample.group, wanted, ())
            del index.samples[sample.group.key]
            yield from _duplicates(sample)


def _duplicates(sample: _Sample) -> Generator[RejectedSample, None, None]:
    for path in sample.duplicates:
        message = f"{escaped(path)} is a second image of the sample in the same field"
        yield RejectedSample(escaped(sample.group.key), Reject("read", "duplicate_key", message), 1)


def _members(
    tar: TarStream, users: dict[int, list[_Use]]
) -> Generator[tuple[int, tarfile.TarInfo], None, None]:
    """Yield the members in `users`, with their numbers."""
    try:
        for number, member in enumerate(tar):
            if number in users:
                yield number, member
    except TarEnds:
        return  # the first pass reported it
