"""Folders of image files and accompanying files: `0001.jpg`, `0001.txt`, `0001.json`.

Samples are spread over a fixed number of slots by the hash of their keys. A slot is a unit. A new,
replaced or deleted file therefore affects one slot, whatever the number of files. Each slot is its
own source, `<folder>#<slot>/<slots>`, so slots change independently of each other.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from latentcache.dataset.contract import canonical_json
from latentcache.errors import ConfigError, Reject, SourceError, StorageError
from latentcache.images.samples import (
    Group,
    OnRead,
    RejectedSample,
    ReserveSample,
    Sample,
    SourceShard,
    Wanted,
    escaped,
    file_key_and_field,
    require_version,
    sample_of,
)
from latentcache.storage import DANGLING, ObjectInfo, Store
from latentcache.storage_options import StorageOptions

# The number of slots of a folder if neither the config nor the output sets it.
NUM_SLOTS = 64

_SLOT = re.compile(r"(?P<folder>.*)#(?P<slot>\d+)/(?P<num_slots>\d+)", re.DOTALL)

# Limits of the files that are fetched ahead of the next sample.
_THREADS = 8
_FILES_AHEAD = 32
_BYTES_AHEAD = 64 * 2**20


def is_slot(source: str) -> bool:
    """Return whether the source of a unit is a folder's slot."""
    return _SLOT.fullmatch(source) is not None


def slots_of(url: str, wanted: int | None, known: Collection[str]) -> int:
    """Return the number of slots of a folder, which never changes for one output.

    Args:
        url: the canonical URL of the folder.
        wanted: the number in the config; None if it sets none.
        known: the sources of the output's units.

    Raises:
        ConfigError: the config and the output have different numbers.
    """
    matches = (_SLOT.fullmatch(source) for source in known if source.startswith(f"{url}#"))
    existing = {int(match["num_slots"]) for match in matches if match and match["folder"] == url}
    others = existing - {wanted}
    if wanted and others:
        raise ConfigError(
            f"source.num_units is {wanted}, but the output holds {url} in {min(others)} units: "
            "leave it out, or give this config another output.url"
        )
    return wanted or max(existing, default=NUM_SLOTS)


def list_folder(url: str, num_slots: int, options: StorageOptions) -> list[SourceShard]:
    """List the slots of a folder that have files, in order, with one recursive listing.

    Files and folders with a leading dot, and files without a dot in their name, are ignored.

    Args:
        url: the folder.
        num_slots: the number of its slots.
        options: how to reach the store.

    Raises:
        SourceError: the folder has no file that can belong to a sample.
        StorageError: the store cannot be reached.
    """
    store = Store(url, options)
    slots: dict[int, list[tuple[str, ObjectInfo]]] = {}
    for info in store.walk():
        key, _ = file_key_and_field(info.path)
        if key is not None:
            slots.setdefault(_slot_of(key, num_slots), []).append((key, info))
    if not slots:
        raise SourceError(f"{store.url} holds no image files: check source.folder")
    return [_shard(f"{store.url}#{slot}/{num_slots}", slots[slot]) for slot in sorted(slots)]


def list_slot(source: str, options: StorageOptions) -> SourceShard:
    """List one slot again.

    Args:
        source: the slot, `<folder>#<slot>/<slots>`.
        options: how to reach the store.

    Raises:
        SourceError: the slot no longer has files.
        StorageError: the store cannot be reached.
    """
    match = _SLOT.fullmatch(source)
    assert match
    for shard in list_folder(match["folder"], int(match["num_slots"]), options):
        if shard.url == source:
            return shard
    raise SourceError(f"{source} no longer has files: check source.folder")


def _slot_of(key: str, num_slots: int) -> int:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % num_slots


def _shard(source: str, files: list[tuple[str, ObjectInfo]]) -> SourceShard:
    # Sorted by key first, because a folder's name may sort between the files of one sample.
    files.sort(key=lambda file: (file[0], file[1].path))
    infos = tuple(info for _, info in files)
    listing = sorted((_utf8(info.path), info.size_bytes, info.version) for info in infos)
    version = hashlib.sha256(canonical_json(listing)).hexdigest()
    return SourceShard(source, sum(info.size_bytes for info in infos), version, files=infos)


def _utf8(path: str) -> str:
    """Return a name with escapes in place of bytes that are not UTF-8, so that JSON can hold it."""
    return path.encode("utf-8", "backslashreplace").decode()


def read_slot(
    shard: SourceShard,
    wanted: Wanted,
    options: StorageOptions,
    on_read: OnRead,
    reserve: ReserveSample,
) -> Iterator[Sample | RejectedSample]:
    """Stream the samples of a folder's slot, sorted by key; see `images.source.read_shard`.

    Files with the same path up to the last dot of the file name are one sample. The rest of the
    name, in lower case, is the field. If a sample has several images, the first in order of
    preference is used, and each other one is a reject `duplicate_key`. An image that is a link to a
    missing file is a reject `broken_link`.

    Args:
        shard: the listed slot.
        wanted: the fields to read.
        options: how to reach the store.
        on_read: called with the number of bytes of each file.
        reserve: called before a sample's files are read, with their bytes.
    """
    match = _SLOT.fullmatch(shard.url)
    assert match
    store = Store(match["folder"], options)
    fetches = _fetch(store, _groups(shard.files, wanted), reserve)
    try:
        for files, contents in fetches:
            for name, content in contents.items():
                files.group.fields[name] = content
                on_read(len(content))
            if files.group.names:
                yield sample_of(files.group, wanted, ())
            yield from files.rejects
    finally:
        fetches.close()


@dataclass(slots=True)
class _Files:
    """The files of one sample: those to read, by field, and the rejects of its other images."""

    group: Group
    found: dict[str, ObjectInfo]
    rejects: list[RejectedSample]


def _groups(files: Sequence[ObjectInfo], wanted: Wanted) -> Iterator[_Files]:
    """Group the files of a slot, which are sorted by key."""
    for key, members in groupby(files, lambda file: file_key_and_field(file.path)[0]):
        assert key is not None
        yield _files_of(key, list(members), wanted)


def _files_of(key: str, members: Sequence[ObjectInfo], wanted: Wanted) -> _Files:
    files = _Files(Group(key), {}, [])
    images: list[tuple[int, str, ObjectInfo]] = []
    for file in members:
        name = file_key_and_field(file.path)[1]
        if wanted.is_image(name):
            rank = wanted.image.index(name) if name in wanted.image else len(wanted.image)
            images.append((rank, name, file))
        elif name not in files.group.names and files.group.add(name, file.size_bytes, wanted):
            files.found[name] = file
    whole = []
    for image in sorted(images, key=lambda image: (image[0], image[2].path)):
        if image[2].version == DANGLING:
            message = f"{escaped(image[2].path)} is a link to a file that does not exist"
            reject = Reject("read", "broken_link", message)
            files.rejects.append(RejectedSample(escaped(key), reject, 1))
        else:
            whole.append(image)
    for _, name, file in whole[:1]:
        if files.group.add(name, file.size_bytes, wanted):
            files.found[name] = file
    for _, _, file in whole[1:]:
        message = (
            f"{escaped(file.path)} is a second image of its sample, beside "
            f"{escaped(whole[0][2].path)}: rename one of them"
        )
        reject = Reject("read", "duplicate_key", message)
        files.rejects.append(RejectedSample(escaped(key), reject, 1))
    return files


def _fetch(
    store: Store, groups: Iterable[_Files], reserve: ReserveSample
) -> Generator[tuple[_Files, dict[str, bytes]], None, None]:
    """Yield groups with the contents of their files, in order. Threads fetch files ahead.

    A sample that is larger than `_BYTES_AHEAD` is fetched while no other sample is in memory.
    """
    ahead: deque[tuple[_Files, dict[str, Future[bytes]]]] = deque()
    num_files = num_bytes = 0

    def pop() -> tuple[_Files, dict[str, bytes]]:
        nonlocal num_files, num_bytes
        files, reads = ahead.popleft()
        reserve(files.group.num_bytes)
        num_files -= len(reads)
        num_bytes -= files.group.num_bytes
        return files, {name: read.result() for name, read in reads.items()}

    with ThreadPoolExecutor(_THREADS, "fetch") as pool:
        try:
            for files in groups:
                size = files.group.num_bytes
                while ahead and num_bytes + size > _BYTES_AHEAD:
                    yield pop()
                if size > _BYTES_AHEAD:
                    reserve(size)
                reads = {n: pool.submit(_read, store, file) for n, file in files.found.items()}
                ahead.append((files, reads))
                num_files += len(reads)
                num_bytes += size
                while num_files > _FILES_AHEAD or (ahead and num_bytes > _BYTES_AHEAD):
                    yield pop()
            while ahead:
                yield pop()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(store: Store, listed: ObjectInfo) -> bytes:
    """Read a file, and check that it is the listed version.

    Raises:
        SourceChanged: the file is another version, or is gone.
        StorageError: the file cannot be read.
    """
    try:
        data = store.read_bytes(listed.path)
    except StorageError:
        require_version(store, listed)
        raise
    require_version(store, listed)
    if len(data) != listed.size_bytes:
        raise StorageError(
            f"{store.url_of(listed.path)}: the connection gave {len(data)} of "
            f"{listed.size_bytes} bytes"
        )
    return data
