"""Folders of image files, with files beside them: `0001.jpg`, `0001.txt`, `0001.json`.

Samples are spread over a fixed number of slots by the hash of their keys, and a slot is a unit. So
a file that is new, replaced or deleted touches one slot, however many files there are. A slot is a
source of its own, `<folder>#<slot>/<slots>`: it changes by itself, and none waits for another.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from latentcache.dataset.contract import canonical_json
from latentcache.errors import ConfigError, SourceError, StorageError
from latentcache.images.samples import (
    Group,
    OnRead,
    RejectedSample,
    Sample,
    SourceShard,
    Wanted,
    key_and_field,
    require_version,
    sample_of,
)
from latentcache.storage import ObjectInfo, StorageOptions, Store

# Slots of a folder, where neither the config nor the output says otherwise.
NUM_SLOTS = 64

_SLOT = re.compile(r"(?P<folder>.*)#(?P<slot>\d+)/(?P<num_slots>\d+)", re.DOTALL)

# Files are fetched ahead of the one that is wanted next: so many at once, and as many bytes.
_THREADS = 8
_FILES_AHEAD = 32
_BYTES_AHEAD = 64 * 2**20


def is_slot(source: str) -> bool:
    """Whether the source of a unit is a folder's slot."""
    return _SLOT.fullmatch(source) is not None


def slots_of(url: str, wanted: int | None, known: Collection[str]) -> int:
    """Decide into how many slots a folder is cut: once cut, it stays so.

    Args:
        url: the folder's, canonical.
        wanted: what the config says, None where it says nothing.
        known: the sources that the output has units of.

    Raises:
        ConfigError: the config wants another number than the output has.
    """
    found = (_SLOT.fullmatch(source) for source in known if source.startswith(f"{url}#"))
    there = {int(match["num_slots"]) for match in found if match and match["folder"] == url}
    others = there - {wanted}
    if wanted and others:
        raise ConfigError(
            f"source.num_units is {wanted}, but the output holds {url} in {min(others)} units: "
            "leave it out, or give this config another output.url"
        )
    return wanted or max(there, default=NUM_SLOTS)


def list_folder(url: str, num_slots: int, options: StorageOptions) -> list[SourceShard]:
    """List the slots of a folder that have files, in order; one recursive listing of the store.

    Files and folders with a leading dot are passed over, and files that no sample could have.

    Raises:
        SourceError: it has no file that a sample could have.
        StorageError: the store cannot be reached.
    """
    store = Store(url, options)
    slots: dict[int, list[tuple[str, ObjectInfo]]] = {}
    for info in store.walk():
        key, _ = key_and_field(info.path)
        if key is not None and not _is_hidden(info.path):
            slots.setdefault(_slot_of(key, num_slots), []).append((key, info))
    if not slots:
        raise SourceError(f"{store.url} holds no image files: check source.folder")
    return [_shard(f"{store.url}#{slot}/{num_slots}", slots[slot]) for slot in sorted(slots)]


def list_slot(source: str, options: StorageOptions) -> SourceShard:
    """List one slot again, by the name of its source.

    Raises:
        SourceError: it has no files any more.
        StorageError: the store cannot be reached.
    """
    match = _SLOT.fullmatch(source)
    assert match
    for shard in list_folder(match["folder"], int(match["num_slots"]), options):
        if shard.url == source:
            return shard
    raise SourceError(f"{source} has no files any more: check source.folder")


def _is_hidden(path: str) -> bool:
    return any(name.startswith(".") and name != ".." for name in path.split("/"))


def _slot_of(key: str, num_slots: int) -> int:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % num_slots


def _shard(source: str, files: list[tuple[str, ObjectInfo]]) -> SourceShard:
    # By key first: a folder's name may sort between the files of one sample.
    files.sort(key=lambda file: (file[0], file[1].path))
    infos = tuple(info for _, info in files)
    listing = sorted((_utf8(info.path), info.size_bytes, info.version) for info in infos)
    version = hashlib.sha256(canonical_json(listing)).hexdigest()
    return SourceShard(source, sum(info.size_bytes for info in infos), version, files=infos)


def _utf8(path: str) -> str:
    """Write a name that is not UTF-8 as JSON can hold it."""
    return path.encode("utf-8", "backslashreplace").decode()


def read_slot(
    shard: SourceShard, wanted: Wanted, options: StorageOptions, on_read: OnRead
) -> Iterator[Sample | RejectedSample]:
    """Stream the samples of a folder's slot, by key; see `images.source.read_shard`.

    Files are grouped as WebDataset does it with members of a tar: the same path up to the first dot
    of the file name is one sample, and the lower-cased rest is the field.
    """
    match = _SLOT.fullmatch(shard.url)
    assert match
    store = Store(match["folder"], options)
    groups = list(_groups(shard.files, wanted))
    files = [file for _, found in groups for _, file in found]
    seen: set[str] = set()
    contents = _fetch(store, files)
    try:
        for group, found in groups:
            for name, _ in found:
                group.fields[name] = next(contents)
                on_read(len(group.fields[name]))
            yield sample_of(group, wanted, seen)
    finally:
        contents.close()


_Fields = list[tuple[str, ObjectInfo]]


def _groups(files: Sequence[ObjectInfo], wanted: Wanted) -> Iterator[tuple[Group, _Fields]]:
    """Give the samples of a slot, each with the fields of it that are to be read."""
    group: Group | None = None
    found: _Fields = []
    for file in files:
        key, name = key_and_field(file.path)
        assert key is not None
        if group is None or key != group.key or name in group.names:
            if group is not None:
                yield group, found
            group, found = Group(key), []
        if group.is_wanted(name, file.size_bytes, wanted):
            found.append((name, file))
    if group is not None:
        yield group, found


def _fetch(store: Store, files: Sequence[ObjectInfo]) -> Generator[bytes, None, None]:
    """Give the files' contents in order, fetched ahead by some threads."""
    ahead: deque[Future[bytes]] = deque()
    num_bytes = 0
    with ThreadPoolExecutor(_THREADS, "fetch") as pool:
        try:
            for file in files:
                ahead.append(pool.submit(_read, store, file))
                num_bytes += file.size_bytes
                while len(ahead) > _FILES_AHEAD or num_bytes > _BYTES_AHEAD:
                    content = ahead.popleft().result()
                    num_bytes -= len(content)
                    yield content
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(store: Store, listed: ObjectInfo) -> bytes:
    """Read a file, and see that it is the one that was listed.

    Raises:
        SourceChanged: it is another, or gone.
        StorageError: it cannot be read.
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
