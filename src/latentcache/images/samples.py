"""Shards and samples, and what all kinds of sources share: WebDataset's keys, and rejects."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from webdataset.tariterators import base_plus_ext

from latentcache.dataset.contract import MAX_SAMPLE_BYTES
from latentcache.errors import ObjectNotFound, Reject, SourceChanged, SourceError
from latentcache.storage import ObjectInfo, Store

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
_METADATA = re.compile(r"__[^/]*__($|/)")  # as in webdataset.tariterators.tar_file_iterator

# A file or field with one of these extensions counts as an image, even without `source.image`.
_IMAGE_ENDINGS = {
    "apng",
    "avif",
    "bmp",
    "dib",
    "gif",
    "heic",
    "heif",
    "j2k",
    "jfif",
    "jp2",
    "jpe",
    "jpeg",
    "jpg",
    "jxl",
    "pbm",
    "pgm",
    "png",
    "pnm",
    "ppm",
    "tga",
    "tif",
    "tiff",
    "webp",
}


@dataclass(frozen=True, slots=True)
class SourceShard:
    """The listed source of one unit: canonical URL, size, and ETag or equivalent.

    `range` is `k/n` for the k-th of n parts of a Parquet file. `files` are those of a folder's
    slot, sorted by key. `identity` is the URL that the dataset records, if it differs.
    """

    url: str
    size_bytes: int
    version: str
    range: str | None = None
    files: tuple[ObjectInfo, ...] = ()
    identity: str | None = None

    @property
    def source(self) -> str:
        """The URL that units and records have."""
        return self.identity or self.url


@dataclass(frozen=True, slots=True)
class FieldSelection:
    """The fields to read of a sample: the first of `image` that it has, and `keep`.

    Tars and folders need lower case. Samples above `max_sample_bytes` are rejects. For Parquet,
    `key` is the column of the key (None derives it), and `caption_index` selects from lists.
    """

    image: Sequence[str]
    keep: Sequence[str]
    key: str | None = None
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    caption_index: int = 0

    def is_image(self, name: str) -> bool:
        """Return whether a field holds an image, named in `image` or not."""
        return name in self.image or name.rpartition(".")[2] in _IMAGE_ENDINGS

    def is_relevant(self, name: str) -> bool:
        """Return whether a field is read, or is an image that must be accounted for."""
        return name in self.keep or self.is_image(name)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: its image, and those of the kept fields that it has.

    `extra_images` names further image fields, such as masks, which are not read. `names` are all
    fields of the sample; for a row of a Parquet file, the file's columns.
    """

    key: str
    image: bytes
    fields: dict[str, bytes]
    extra_images: tuple[str, ...] = ()
    names: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def num_images(self) -> int:
        """The number of image files or members of the sample."""
        return 1 + len(self.extra_images)

    @property
    def num_bytes(self) -> int:
        """The bytes of all fields together."""
        return len(self.image) + sum(map(len, self.fields.values()))


@dataclass(frozen=True, slots=True)
class RejectedSample:
    """A rejected sample, or, without a key, a problem of the whole shard.

    It stands for `num_images` image files or members. `names` is as in `Sample`.
    """

    key: str | None
    reject: Reject
    num_images: int = 0
    names: frozenset[str] = field(default=frozenset(), compare=False)


SampleStream: TypeAlias = Generator[Sample | RejectedSample, None, RejectedSample | None]
"""Yields the samples of a file, and returns the problem of the file as a whole."""


class NotGrouped(SourceError):
    """A tar must be read with `gather=True`: its samples are scattered, or it holds links."""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """The arguments of `images.source.read_shard`; a file is `name` in `store`."""

    shard: SourceShard
    store: Store
    name: str
    selection: FieldSelection
    on_read: Callable[[int], None]
    reserve: Callable[[int], None]
    gather: bool


def require_version(store: Store, listed: ObjectInfo) -> None:
    """Raise `SourceChanged` if an object is gone, or has another size or version than listed.

    Args:
        store, listed: the object.
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
    """The fields of one sample while it is read; `names` are those of all its fields."""

    key: str
    names: set[str] = field(default_factory=set)
    fields: dict[str, bytes] = field(default_factory=dict)
    num_bytes: int = 0
    fault: Reject | None = None

    def add(self, name: str, size_bytes: int, selection: FieldSelection) -> bool:
        """Record a field of the sample, and return whether to read it.

        Args:
            name, size_bytes, selection: the field, and the fields to read.
        """
        self.names.add(name)
        is_kept = name in selection.keep
        if self.fault or not (is_kept or name in selection.image):
            return False
        if not is_kept:
            # If there are several images, only the first in order of preference is read.
            rank = selection.image.index
            read = [other for other in self.fields if other in selection.image]
            if any(rank(other) < rank(name) for other in read):
                return False
            for other in set(read).difference(selection.keep):
                self.num_bytes -= len(self.fields.pop(other))
        self.num_bytes += size_bytes
        if self.num_bytes > selection.max_sample_bytes:
            message = (
                f"its fields hold {self.num_bytes} bytes or more, above source.max_sample_bytes "
                f"({selection.max_sample_bytes})"
            )
            self.refuse(Reject("read", "oversized_sample", message))
        return self.fault is None

    def refuse(self, fault: Reject) -> None:
        """Make the sample a reject, and free its fields."""
        self.fields.clear()
        self.fault = self.fault or fault


def sample_of(
    group: Group, selection: FieldSelection, seen: Container[str] = ()
) -> Sample | RejectedSample:
    """Return a sample with the fields that were read, or a reject with the reason.

    Args:
        group, selection, seen: the fields, and the keys of earlier samples of the shard.
    """
    images = [name for name in selection.image if name in group.names]
    extra = [name for name in group.names if selection.is_image(name) and name not in images[:1]]
    names = frozenset(group.names)
    fault = key_fault(group.key)
    if fault is None and group.key in seen:
        fault = Reject("read", "duplicate_key", "an earlier sample of the shard has the same key")
    fault = fault or group.fault
    if fault is None and (not images or images[0] not in group.fields):
        has = ", ".join(sorted(map(escaped, names))) or "nothing"
        fault = Reject("read", "no_image", f"has {has}, but none of {', '.join(selection.image)}")
    if fault is not None:
        return RejectedSample(escaped(group.key), fault, len(images[:1]) + len(extra), names)
    fields = {name: group.fields[name] for name in selection.keep if name in group.fields}
    extra_images = tuple(sorted(map(escaped, extra)))
    return Sample(group.key, group.fields[images[0]], fields, extra_images, names)


def key_and_field(path: str) -> tuple[str | None, str]:
    """Split a path at the file name's first dot into key and lower-case field, as WebDataset does.

    The key is None for files that belong to no sample: names without a dot, hidden files and
    folders at any depth, and `__metadata__`.
    """
    if _is_of_no_sample(path):
        return None, ""
    key, name = base_plus_ext(path)
    if key is None:
        # The pattern of `base_plus_ext` stops at a line break, and such a file must not be lost.
        return (path, path.rpartition(".")[2].lower()) if "\n" in path else (None, "")
    return key, name.lower()


def file_key_and_field(path: str) -> tuple[str | None, str]:
    """Split a path at the last dot: names such as `Screenshot 10.30.15.jpg` are common."""
    stem, dot, ending = path.rpartition(".")
    if not dot or "/" in ending or _is_of_no_sample(path):
        return None, ""
    return stem, ending.lower()


def _is_of_no_sample(path: str) -> bool:
    if _METADATA.match(path):
        return True
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def key_fault(key: str) -> Reject | None:
    """Return the reject of a key that cannot name a row."""
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
    """Return whether the bytes of a name were UTF-8, the encoding of stores and Parquet."""
    return not _NOT_UTF8.search(name)


def escaped(key: str) -> str:
    r"""Return a key with `\xNN` in place of control characters and bytes that are not UTF-8."""
    text = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
