"""What sources are read as: shards as they were listed, and the samples in them.

Tars, Parquet files and folders have the rules for keys and fields in common, which are
WebDataset's, and the reasons for which a sample is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from webdataset.tariterators import base_plus_ext

from latentcache.errors import ObjectNotFound, Reject, SourceChanged
from latentcache.images.tarstream import MAX_MEMBER_BYTES
from latentcache.storage import ObjectInfo, Store

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_METADATA = re.compile(r"__[^/]*__($|/)")  # as in webdataset.tariterators.tar_file_iterator

OnRead = Callable[[int], None]
"""Told of everything that is read how many bytes it has."""


@dataclass(frozen=True, slots=True)
class SourceShard:
    """What one unit reads, as it was listed: canonical absolute URL, size and version.

    The version is an ETag or the like. `range` is `k/n` for the k-th of n parts of a Parquet file,
    counted from 0. Of a folder's slot (`images/folder.py`) `files` are what lies in it, below the
    folder and in the order of their keys; size and version are those of all of them.
    """

    url: str
    size_bytes: int
    version: str
    range: str | None = None
    files: tuple[ObjectInfo, ...] = ()

    def require_unchanged(self, store: Store, name: str) -> None:
        """See that the file behind the shard is still the one that was listed.

        Raises:
            SourceChanged: it is another, or gone.
        """
        require_version(store, ObjectInfo(name, self.size_bytes, self.version, None))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is read of a sample: the first of the fields `image` that it has, and `keep`.

    `key` names the column of Parquet files that holds the key; None leaves it to the image's path.
    """

    image: Sequence[str]
    keep: Sequence[str]
    key: str | None = None


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


def require_version(store: Store, listed: ObjectInfo) -> None:
    """See that an object still has the size and the version that were listed.

    Raises:
        SourceChanged: it has others, or is gone.
    """
    url = store.url_of(listed.path)
    try:
        info = store.info(listed.path)
    except ObjectNotFound as error:
        raise SourceChanged(f"{url} was deleted after it was listed: run again") from error
    if (info.size_bytes, info.version) != (listed.size_bytes, listed.version):
        raise SourceChanged(f"{url} changed after it was listed: run again")


@dataclass(slots=True)
class Group:
    """The fields of one sample, while they come in; `names` are all that it has."""

    key: str
    names: set[str] = field(default_factory=set)
    fields: dict[str, bytes] = field(default_factory=dict)
    oversized: str | None = None

    def is_wanted(self, name: str, size_bytes: int, wanted: Wanted) -> bool:
        """Take down a field that the sample has, and say whether it is to be read."""
        self.names.add(name)
        if name not in wanted.image and name not in wanted.keep:
            return False
        if size_bytes > MAX_MEMBER_BYTES:
            self.oversized = f"{name} holds {size_bytes} bytes"
        return size_bytes <= MAX_MEMBER_BYTES


def key_and_field(path: str) -> tuple[str | None, str]:
    """Split a path as WebDataset does: up to the first dot of the file name, and the rest.

    The field is in lower case. The key is None for what is no part of any sample: names without a
    dot, or with a leading one, and `__metadata__`.
    """
    if _METADATA.match(path):
        return None, ""
    key, name = base_plus_ext(path)
    if key is None:
        # Its pattern does not see past a line break; such a name must not be lost.
        return (path, "") if "\n" in path else (None, "")
    return key, name.lower()


def sample_of(group: Group, wanted: Wanted, seen: set[str]) -> Sample | RejectedSample:
    """Make a sample of what came in, or say why it is none; `seen` are the keys before it."""
    fault = _key_fault(group.key)
    if fault is None and group.key in seen:
        fault = Reject("read", "duplicate_key", "a sample of this key came earlier in the shard")
    seen.add(group.key)
    if fault is None and group.oversized:
        fault = Reject("read", "oversized_field", f"{group.oversized}, above {MAX_MEMBER_BYTES}")
    images = [group.fields[name] for name in wanted.image if name in group.fields]
    if fault is None and not images:
        has = ", ".join(sorted(group.names)) or "nothing"
        fault = Reject("read", "no_image", f"has {has}, but none of {', '.join(wanted.image)}")
    if fault is not None:
        return RejectedSample(escaped(group.key), fault)
    fields = {name: group.fields[name] for name in wanted.keep if name in group.fields}
    return Sample(group.key, images[0], fields)


def _key_fault(key: str) -> Reject | None:
    if not is_utf8(key):
        return Reject("read", "key_not_utf8", "the key is not UTF-8")
    if key.startswith("/"):
        return Reject("read", "unsafe_key", "the key is an absolute path")
    if ".." in key.split("/"):
        return Reject("read", "unsafe_key", "the key has a '..'")
    if _CONTROL.search(key):
        return Reject("read", "unsafe_key", "the key has a control character")
    return None


def is_utf8(name: str) -> bool:
    """Whether a name's bytes were UTF-8, in which stores and Parquet hold names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(key: str) -> str:
    """Write bytes that are not UTF-8, and control characters, as `\\xNN`."""
    text = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
