"""Folders of image files and accompanying files: `0001.jpg`, `0001.txt`, `0001.json`.

Samples are spread over a fixed number of slots by the hash of their keys, so that a new, replaced
or deleted file affects one slot. A slot is a unit and a source, `<folder>#<slot>/<slots>`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

from latentcache.dataset.contract import canonical_json
from latentcache.errors import ConfigError, Reject, SourceError, StorageError
from latentcache.images.samples import (
    FieldSelection,
    Group,
    ReadRequest,
    RejectedSample,
    Sample,
    SourceShard,
    escaped,
    file_key_and_field,
    require_version,
    sample_of,
)
from latentcache.storage import DANGLING, ObjectInfo, Store
from latentcache.storage_options import StorageOptions

# The number of slots of a folder if neither the config nor the output sets it.
_NUM_SLOTS = 64

_SLOT = re.compile(r"(?P<folder>.*)#\d+/(?P<num_slots>\d+)", re.DOTALL)

# Limits of the files that are fetched ahead of the next sample.
_THREADS = 8
_MAX_FILES = 32
_MAX_BYTES = 64 * 2**20


def is_slot(source: str) -> bool:
    """Return whether the source of a unit is a folder's slot."""
    return _SLOT.fullmatch(source) is not None


def slots_of(url: str, num_units: int | None, known: Collection[str]) -> int:
    """Return the number of slots of a folder, which never changes for one output.

    Args:
        url, num_units, known: the folder, the config's number, and the output's sources.
    """
    matches = (_SLOT.fullmatch(source) for source in known if source.startswith(f"{url}#"))
    existing = {int(match["num_slots"]) for match in matches if match and match["folder"] == url}
    others = existing - {num_units}
    if num_units and others:
        raise ConfigError(
            f"source.num_units is {num_units}, but the output holds {url} in {min(others)} units: "
            "leave it out, or give this config another output.url"
        )
    return num_units or max(existing, default=_NUM_SLOTS)


def list_folder(url: str, num_slots: int, options: StorageOptions) -> list[SourceShard]:
    """List the slots of a folder that have files, in order; raise `SourceError` if none has.

    Args:
        url, num_slots, options: the folder, the number of its slots, and how to reach the store.
    """
    store = Store(url, options)
    slots: dict[int, list[tuple[str, str, ObjectInfo]]] = {}
    for info in store.walk():
        key, _ = file_key_and_field(info.path)
        if key is not None:
            digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
            slot = int.from_bytes(digest[:8], "big") % num_slots
            slots.setdefault(slot, []).append((key, info.path, info))
    if not slots:
        raise SourceError(f"{store.url} holds no image files: check source.folder")
    shards = []
    for slot in sorted(slots):
        # Sorted by key first, because a folder's name may sort between the files of one sample.
        files = tuple(info for _, _, info in sorted(slots[slot]))
        # JSON cannot hold bytes that are not UTF-8.
        contents = sorted(
            (info.path.encode("utf-8", "backslashreplace").decode(), info.size_bytes, info.version)
            for info in files
        )
        version = hashlib.sha256(canonical_json(contents)).hexdigest()
        size_bytes = sum(info.size_bytes for info in files)
        source = f"{store.url}#{slot}/{num_slots}"
        shards.append(SourceShard(source, size_bytes, version, files=files))
    return shards


def list_slot(source: str, options: StorageOptions) -> SourceShard:
    """List one slot again; raise `SourceError` if it no longer has files.

    Args:
        source, options: the slot, and how to reach the store.
    """
    match = _SLOT.fullmatch(source)
    assert match
    for shard in list_folder(match["folder"], int(match["num_slots"]), options):
        if shard.url == source:
            return shard
    raise SourceError(f"{source} no longer has files: check source.folder")


def read_slot(request: ReadRequest) -> Iterator[Sample | RejectedSample]:
    """Stream the samples of a folder's slot, sorted by key; see `images.source.read_shard`.

    Of several images, the first in order of preference is used, and each other one is a reject
    `duplicate_key`. An image that is a link to a missing file is a reject `broken_link`.

    Threads fetch files ahead. A larger sample than `_MAX_BYTES` is fetched alone.
    """
    fetching: deque[tuple[Group, dict[str, Future[bytes]], list[RejectedSample]]] = deque()
    num_files = num_bytes = 0
    pool = ThreadPoolExecutor(_THREADS, "fetch")

    def finish_first() -> Iterator[Sample | RejectedSample]:
        nonlocal num_files, num_bytes
        group, reads, rejects = fetching.popleft()
        request.reserve(group.num_bytes)
        num_files -= len(reads)
        num_bytes -= group.num_bytes
        for name, read in reads.items():
            group.fields[name] = read.result()
            request.on_read(len(group.fields[name]))
        if group.names:
            yield sample_of(group, request.selection)
        yield from rejects

    try:
        for key, members in groupby(request.shard.files, lambda f: file_key_and_field(f.path)[0]):
            assert key is not None
            group, files, rejects = _choose_files(key, members, request.selection)
            size = group.num_bytes
            while fetching and (num_files >= _MAX_FILES or num_bytes + size > _MAX_BYTES):
                yield from finish_first()
            if size > _MAX_BYTES:
                request.reserve(size)
            reads = {name: pool.submit(_read, request.store, files[name]) for name in files}
            fetching.append((group, reads, rejects))
            num_files += len(reads)
            num_bytes += size
        while fetching:
            yield from finish_first()
    finally:
        pool.shutdown(cancel_futures=True)


def _choose_files(
    key: str, members: Iterator[ObjectInfo], selection: FieldSelection
) -> tuple[Group, dict[str, ObjectInfo], list[RejectedSample]]:
    """Return a sample, its files to read by field, and the rejects of its other images."""
    group, files = Group(key), dict[str, ObjectInfo]()
    rejects: list[RejectedSample] = []
    ranks = {name: rank for rank, name in enumerate(selection.image)}
    fields = [(file_key_and_field(file.path)[1], file) for file in members]
    fields.sort(key=lambda item: (ranks.get(item[0], len(ranks)), item[1].path))
    first = None
    for name, file in fields:
        path, reject = escaped(file.path), None
        if selection.is_image(name):
            if file.version == DANGLING:
                message = f"{path} is a link to a file that does not exist"
                reject = Reject("read", "broken_link", message)
            elif first is not None:
                message = f"{path} is a second image of its sample, beside {first}: rename one of"
                reject = Reject("read", "duplicate_key", f"{message} them")
            else:
                first = path
        elif name in group.names:
            continue
        if reject is not None:
            rejects.append(RejectedSample(escaped(key), reject, 1))
        elif group.add(name, file.size_bytes, selection):
            files[name] = file
    return group, ({} if group.fault else files), rejects


def _read(store: Store, listed: ObjectInfo) -> bytes:
    """Read a file, and check that it is the listed version."""
    try:
        data = store.read_bytes(listed.path)
    finally:
        require_version(store, listed)
    if len(data) != listed.size_bytes:
        message = f"the connection gave {len(data)} of {listed.size_bytes} bytes"
        raise StorageError(f"{store.url_of(listed.path)}: {message}")
    return data
