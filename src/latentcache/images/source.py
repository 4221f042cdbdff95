"""Source shards: find WebDataset tars in any store, and stream their samples.

A shard is read once, front to back, and never held in memory. Whatever is wrong with it comes out
in one of two ways. What is wrong with the shard's content becomes a `RejectedSample`, so that its
other samples are kept and nothing is lost in silence. What is wrong with the transport, or a shard
that is not the listed version, is an exception, after which all that was read must be discarded.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import BinaryIO

from webdataset.shardlists import expand_urls as expand_braces
from webdataset.tariterators import base_plus_ext

from latentcache.errors import (
    ConfigError,
    ObjectNotFound,
    Reject,
    SourceChanged,
    SourceError,
    StorageError,
)
from latentcache.images.tarstream import MAX_MEMBER_BYTES, TarEnds, TarStream
from latentcache.storage import ObjectInfo, StorageOptions, Store, split_url

# From so many shards in one folder on, one listing of it is cheaper than asking for each.
_LIST_FROM = 16

_MAX_BRACE_RANGE = 10_000_000

_GLOB = re.compile(r"[*?\[]")
_COMMAND = re.compile(r"^pipe:|^-$|[|`<>\n]|\$[({]|&&")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_METADATA = re.compile(r"__[^/]*__($|/)")  # as in webdataset.tariterators.tar_file_iterator

_OTHER_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


@dataclass(frozen=True, slots=True)
class SourceShard:
    """One tar as it was listed: its canonical absolute URL, size and version (ETag or the like)."""

    url: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: the bytes of its image, and those of the fields asked for that it has."""

    key: str
    image: bytes
    fields: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class RejectedSample:
    """A sample left out (stage `read`), or, without a key, what is wrong with the whole shard."""

    key: str | None
    reject: Reject


def expand_urls(shards: str | Sequence[str]) -> list[str]:
    """Expand brace ranges and lists (`{000000..000099}`, `{a,b}`); globs stay as they are.

    Raises:
        ConfigError: a shell command or standard input, which WebDataset would run or read; a
            chained URL (`::`); unbalanced braces; a URL named twice; no URL at all.
    """
    urls: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if _COMMAND.search(pattern):
            raise ConfigError(f"source.shards: {pattern!r} is a command; name files or URLs")
        if "::" in pattern:
            raise ConfigError(f"source.shards: {pattern!r} chains URLs with '::'; name each alone")
        for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
            if abs(int(last) - int(first)) >= _MAX_BRACE_RANGE:
                raise ConfigError(f"source.shards: {pattern!r} has a range of too many shards")
        try:
            urls += expand_braces(pattern)
        except ValueError as error:
            raise ConfigError(f"source.shards: {pattern!r}: {error}") from error
    if not all(urls) or not urls:
        raise ConfigError("source.shards: names no shard; give at least one URL")
    _refuse_twice(urls)
    return urls


def list_shards(shards: str | Sequence[str], options: StorageOptions) -> list[SourceShard]:
    """Find the shards that a config names, sorted by URL, each once.

    A glob (`*`, `?`, `[...]`) may stand in the last part of a URL and costs one listing of its
    folder, as do many URLs in one folder; a few URLs are asked for one by one.

    Raises:
        ConfigError: as `expand_urls`; or a glob in a folder's name.
        SourceError: a shard is missing, or a glob matches nothing.
        StorageError: a store cannot be reached or refuses access.
    """
    by_folder: dict[str, list[str]] = {}
    for url in expand_urls(shards):
        folder, name = split_url(url)
        if _GLOB.search(folder):
            raise ConfigError(f"source.shards: {url!r} has a glob before its last '/'; use braces")
        if folder.endswith(":/") or name.endswith(":"):
            raise ConfigError(f"source.shards: {url!r} names no file; add one, or '/*.tar'")
        by_folder.setdefault(folder, []).append(name)

    named: list[SourceShard] = []
    matched: list[SourceShard] = []
    missing: list[str] = []
    for folder, names in by_folder.items():
        store = Store(folder, options)
        is_listed = len(names) >= _LIST_FROM or any(map(_GLOB.search, names))
        listing = {info.path: info for info in store.list()} if is_listed else {}
        for name in names:
            if _GLOB.search(name):
                hits = [info for path, info in listing.items() if fnmatchcase(path, name)]
                if not hits:
                    raise SourceError(f"{store.url_of(name)} matches nothing: check its folder")
                matched += [_shard(store, info) for info in hits]
            elif (info := listing.get(name) if is_listed else _ask(store, name)) is not None:
                named.append(_shard(store, info))
            else:
                missing.append(store.url_of(name))
    if missing:
        more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise SourceError(f"{missing[0]} does not exist{more}: check source.shards")
    _refuse_twice([shard.url for shard in named])
    return sorted({shard.url: shard for shard in (*named, *matched)}.values(), key=lambda s: s.url)


def _refuse_twice(urls: Sequence[str]) -> None:
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ConfigError(f"source.shards: {url} is named twice")
        seen.add(url)


def _shard(store: Store, info: ObjectInfo) -> SourceShard:
    return SourceShard(store.url_of(info.path), info.size_bytes, info.version)


def _ask(store: Store, name: str) -> ObjectInfo | None:
    try:
        return store.info(name)
    except ObjectNotFound:
        return None


def read_shard(
    shard: SourceShard,
    *,
    image: Sequence[str],
    keep: Sequence[str],
    options: StorageOptions,
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Sample | RejectedSample]:
    """Stream a shard's samples in the order of the tar, which may be gzipped.

    Members are grouped as WebDataset does it: neighbours with the same path up to the first dot of
    the file name are one sample, and the lower-cased rest is the field. As there, directories,
    links and devices, `__metadata__` files and files without a dot, or with a leading one, are no
    part of any sample.

    Reasons of the rejects, all of stage `read`. With a key: `no_image` (none of the fields in
    `image`), `duplicate_key` (a sample of this key came earlier), `unsafe_key` (an absolute path, a
    `..`, a control character), `key_not_utf8`, `oversized_field` (above `MAX_MEMBER_BYTES`); bytes
    that cannot stand in a key are escaped with a backslash. Without a key, and at most once:
    `empty_shard`, `not_a_tar`, `truncated_shard` (its bytes end too soon), `corrupt_shard` (a
    damaged header or gzip stream: what follows it cannot be read), `trailing_data` (bytes after the
    end mark, such as a second tar).

    Where a shard ends too soon, a sample counts with the members that came whole. Only if the cut
    falls within one of its members is it lost, into the keyless reject, which names it either way.

    Args:
        shard: what `list_shards` gave.
        image: fields that may hold the image, in lower case; of several the first named is taken.
        keep: further fields to return, in lower case.
        options: how to reach the store.
        on_read: told of every read how many bytes it gave.

    Raises:
        SourceChanged: the shard is no longer the listed version. This and the next may come after
            samples were yielded: discard them all.
        StorageError: the store cannot be read, or cut the connection.
        SourceError: the shard is compressed in a way that is not read.
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
                trouble = yield from _read_samples(tar, image, keep)
                if trouble is not None and trouble.reject.reason == "not_a_tar":
                    _refuse_compression(shard, head)
                if counted.at_end and counted.num_bytes < shard.size_bytes:
                    raise StorageError(
                        f"{shard.url}: the connection was cut after {counted.num_bytes} of "
                        f"{shard.size_bytes} bytes"
                    )
        except StorageError:
            # An object replaced or deleted may show as fewer bytes or as a failed read.
            _check_version(store, name, shard)
            raise
    _check_version(store, name, shard)
    if trouble is not None:
        yield trouble


def _check_version(store: Store, name: str, shard: SourceShard) -> None:
    try:
        info = store.info(name)
    except ObjectNotFound as error:
        raise SourceChanged(f"{shard.url} was deleted after it was listed: run again") from error
    if (info.size_bytes, info.version) != (shard.size_bytes, shard.version):
        raise SourceChanged(f"{shard.url} changed after it was listed: run again")


class _CountedFile:
    """A shard's bytes as they come from the store, counted."""

    def __init__(
        self, store: Store, name: str, file: BinaryIO, on_read: Callable[[int], None]
    ) -> None:
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


@dataclass(slots=True)
class _Group:
    """The members of one sample, while they come in."""

    key: str
    names: set[str] = field(default_factory=set)
    fields: dict[str, bytes] = field(default_factory=dict)
    oversized: str | None = None


def _read_samples(
    tar: TarStream, image: Sequence[str], keep: Sequence[str]
) -> Generator[Sample | RejectedSample, None, RejectedSample | None]:
    """Yield the samples; return what is wrong with the shard as a whole."""
    wanted = {*image, *keep}
    seen: set[str] = set()
    group: _Group | None = None
    is_of_group = False  # the member last met
    trouble: RejectedSample | None = None
    try:
        for member in tar:
            key, name = _key_and_field(member)
            is_of_group = key is not None
            if key is None:
                continue
            if group is None or key != group.key or name in group.names:
                if group is not None:
                    yield _sample_of(group, image, keep, seen)
                group = _Group(key)
            group.names.add(name)
            if name in wanted and member.size > MAX_MEMBER_BYTES:
                group.oversized = f"{name} holds {member.size} bytes"
            elif name in wanted:
                group.fields[name] = tar.read(member)
    except TarEnds as end:
        message = end.message
        if group is not None and is_of_group and tar.is_in_member:
            message += f"; the sample {_escaped(group.key)} is lost with it"
            group = None
        elif group is not None and end.reason != "trailing_data":
            message += f"; its last sample, {_escaped(group.key)}, may lack fields"
        trouble = RejectedSample(None, Reject("read", end.reason, message))
    if group is not None:
        yield _sample_of(group, image, keep, seen)
    return trouble


def _key_and_field(member: tarfile.TarInfo) -> tuple[str | None, str]:
    if not member.isreg() or _METADATA.match(member.name):
        return None, ""
    key, name = base_plus_ext(member.name)
    if key is None:
        # Its pattern does not see past a line break; such a name must not be lost.
        return (member.name, "") if "\n" in member.name else (None, "")
    return key, name.lower()


def _sample_of(
    group: _Group, image: Sequence[str], keep: Sequence[str], seen: set[str]
) -> Sample | RejectedSample:
    fault = _key_fault(group.key)
    if fault is None and group.key in seen:
        fault = Reject("read", "duplicate_key", "a sample of this key came earlier in the shard")
    seen.add(group.key)
    if fault is None and group.oversized:
        fault = Reject("read", "oversized_field", f"{group.oversized}, above {MAX_MEMBER_BYTES}")
    images = [group.fields[name] for name in image if name in group.fields]
    if fault is None and not images:
        has = ", ".join(sorted(group.names))
        fault = Reject("read", "no_image", f"has {has}, but none of {', '.join(image)}")
    if fault is not None:
        return RejectedSample(_escaped(group.key), fault)
    fields = {name: group.fields[name] for name in keep if name in group.fields}
    return Sample(group.key, images[0], fields)


def _key_fault(key: str) -> Reject | None:
    try:
        key.encode()
    except UnicodeEncodeError:
        return Reject("read", "key_not_utf8", "the name in the tar is not UTF-8")
    if key.startswith("/"):
        return Reject("read", "unsafe_key", "the name in the tar is an absolute path")
    if ".." in key.split("/"):
        return Reject("read", "unsafe_key", "the name in the tar has a '..'")
    if _CONTROL.search(key):
        return Reject("read", "unsafe_key", "the name in the tar has a control character")
    return None


def _escaped(key: str) -> str:
    """Write bytes that are not UTF-8, and control characters, as `\\xNN`."""
    text = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
