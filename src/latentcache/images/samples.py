"""What sources are read as: shards as they were listed, and the samples in them.

Tars, Parquet files and folders have the rules for keys and fields in common, which are
WebDataset's, and the reasons for which a sample is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from webdataset.tariterators import base_plus_ext

from latentcache.dataset.contract import MAX_SAMPLE_BYTES
from latentcache.errors import ObjectNotFound, Reject, SourceChanged, SourceError
from latentcache.storage import ObjectInfo, Store

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_METADATA = re.compile(r"__[^/]*__($|/)")  # as in webdataset.tariterators.tar_file_iterator

OnRead = Callable[[int], None]
"""Called with the number of bytes of each read."""

ReserveSample = Callable[[int], None]
"""Called before a field is read, with the bytes that the sample under construction then holds."""


@dataclass(frozen=True, slots=True)
class SourceShard:
    """What one unit reads, as it was listed: canonical absolute URL, size and version.

    The version is an ETag or the like. `range` is `k/n` for the k-th of n parts of a Parquet file,
    counted from 0. `files` are those of a folder's slot (`images/folder_source.py`), below the
    folder and in the order of their keys; size and version are those of all. `identity` is the URL
    that the dataset knows the source by, where that is another (`images/moved.py`).
    """

    url: str
    size_bytes: int
    version: str
    range: str | None = None
    files: tuple[ObjectInfo, ...] = ()
    identity: str | None = None

    @property
    def source(self) -> str:
        """The URL that units and records name."""
        return self.identity or self.url

    def require_unchanged(self, store: Store, name: str) -> None:
        """See that the file behind the shard is still the one that was listed.

        Raises:
            SourceChanged: it is another, or gone.
        """
        require_version(store, ObjectInfo(name, self.size_bytes, self.version, None))


# Endings by which a file or a field counts as an image, whether or not `source.image` names it.
IMAGE_ENDINGS = frozenset(
    [
        *("avif", "bmp", "gif", "heic", "heif", "jfif", "j2k", "jp2", "jpe", "jpeg", "jpg"),
        *("apng", "dib", "jxl", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    ]
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is read of a sample: the first of the fields `image` that it has, and `keep`.

    Attributes:
        image: fields that may hold the image, in order of preference; lower case for tars and
            folders.
        keep: further fields.
        key: the column of Parquet files that holds the key; None derives the key.
        max_sample_bytes: a sample whose wanted fields together hold more bytes is a reject.
        caption_index: the element that is taken where a text column of Parquet holds lists.
    """

    image: Sequence[str]
    keep: Sequence[str]
    key: str | None = None
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    caption_index: int = 0

    def is_image(self, name: str) -> bool:
        """Return whether a field holds an image: by `image`, or by its ending."""
        return name in self.image or name.rpartition(".")[2] in IMAGE_ENDINGS

    def is_relevant(self, name: str) -> bool:
        """Return whether a field is read, or is an image that must be accounted for."""
        return name in self.keep or self.is_image(name)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: the bytes of its image, and those of the fields asked for that it has.

    Attributes:
        key: unique within the shard.
        image: the encoded image.
        fields: kept fields by name; a field that the sample lacks is absent.
        extra_images: names of its further image fields, such as masks, which are not read.
        names: all fields that it has; those of a Parquet file's row are the file's columns.
    """

    key: str
    image: bytes
    fields: dict[str, bytes]
    extra_images: tuple[str, ...] = ()
    names: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def num_images(self) -> int:
        """Image files or members of the sample."""
        return 1 + len(self.extra_images)

    @property
    def num_bytes(self) -> int:
        """Bytes of all fields together."""
        return len(self.image) + sum(map(len, self.fields.values()))


@dataclass(frozen=True, slots=True)
class RejectedSample:
    """A sample left out (stage `read`), or, without a key, what is wrong with the whole shard.

    `num_images` counts the image files or members that the reject stands for. The first is the
    reject's own, and the others count as extra images. `names` are all fields that the sample has,
    as in `Sample`.
    """

    key: str | None
    reject: Reject
    num_images: int = 0
    names: frozenset[str] = field(default=frozenset(), compare=False)


class NotGrouped(SourceError):
    """A tar must be read in gather mode: its samples are scattered, or it holds links.

    Raised after samples were yielded: discard them and read again with `gather=True`.
    """


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
    """The fields of one sample while they are read; `names` are all fields that it has."""

    key: str
    names: set[str] = field(default_factory=set)
    fields: dict[str, bytes] = field(default_factory=dict)
    num_bytes: int = 0
    fault: Reject | None = None

    def add(self, name: str, size_bytes: int, wanted: Wanted) -> bool:
        """Record a field of the sample, and return whether to read it."""
        self.names.add(name)
        if self.fault or (name not in wanted.image and name not in wanted.keep):
            return False
        if name in wanted.image and name not in wanted.keep:
            # Of several images only the first in order of preference is read.
            rank = wanted.image.index
            read = [other for other in self.fields if other in wanted.image]
            if any(rank(other) < rank(name) for other in read):
                return False
            for other in set(read).difference(wanted.keep):
                self.num_bytes -= len(self.fields.pop(other))
        self.num_bytes += size_bytes
        if self.num_bytes > wanted.max_sample_bytes:
            self.fields.clear()
            self.fault = oversized(self.num_bytes, wanted)
        return self.fault is None

    def refuse(self, fault: Reject) -> None:
        """Make the sample a reject, and free what was read of it."""
        self.fields.clear()
        self.fault = self.fault or fault


def oversized(num_bytes: int, wanted: Wanted) -> Reject:
    """Return the reject of a sample that is too large to read."""
    message = (
        f"its fields hold {num_bytes} bytes or more, above source.max_sample_bytes "
        f"({wanted.max_sample_bytes})"
    )
    return Reject("read", "oversized_sample", message)


def is_hidden(path: str) -> bool:
    """Return whether a file, or a folder above it, has a name with a leading dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def key_and_field(path: str) -> tuple[str | None, str]:
    """Split a path as WebDataset does: up to the first dot of the file name, and the rest.

    The field is in lower case. The key is None for what is no part of any sample: names without a
    dot, hidden files and folders at any depth, and `__metadata__`.
    """
    if _METADATA.match(path) or is_hidden(path):
        return None, ""
    key, name = base_plus_ext(path)
    if key is None:
        # The pattern of `base_plus_ext` ends at a line break; such a name must not be lost.
        return (path, path.rpartition(".")[2].lower()) if "\n" in path else (None, "")
    return key, name.lower()


def file_key_and_field(path: str) -> tuple[str | None, str]:
    """Split the path of a file in a folder: up to the last dot of the file name, and the rest.

    Names with further dots, such as `Screenshot 10.30.15.jpg`, are common among files. The field
    is in lower case. The key is None for the same names as in `key_and_field`.
    """
    folder, slash, name = path.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    if not dot or is_hidden(path) or _METADATA.match(path):
        return None, ""
    return f"{folder}{slash}{stem}", ending.lower()


def sample_of(group: Group, wanted: Wanted, seen: Container[str]) -> Sample | RejectedSample:
    """Make a sample of the fields that were read, or a reject that says why there is none.

    Args:
        group: the fields.
        wanted: what was to be read.
        seen: keys of earlier samples of the shard.
    """
    images = [name for name in wanted.image if name in group.names]
    extra = [name for name in group.names if wanted.is_image(name) and name not in images[:1]]
    fault = _key_fault(group.key)
    if fault is None and group.key in seen:
        fault = Reject("read", "duplicate_key", "an earlier sample of the shard has the same key")
    fault = fault or group.fault
    if fault is None and (not images or images[0] not in group.fields):
        has = ", ".join(sorted(map(escaped, group.names))) or "nothing"
        fault = Reject("read", "no_image", f"has {has}, but none of {', '.join(wanted.image)}")
    if fault is not None:
        num_images = len(images[:1]) + len(extra)
        return RejectedSample(escaped(group.key), fault, num_images, frozenset(group.names))
    fields = {name: group.fields[name] for name in wanted.keep if name in group.fields}
    return Sample(
        group.key,
        group.fields[images[0]],
        fields,
        tuple(sorted(map(escaped, extra))),
        frozenset(group.names),
    )


def is_safe_key(key: str) -> bool:
    """Return whether a key can name a row."""
    return _key_fault(key) is None


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
    """Return whether a name's bytes were UTF-8, in which stores and Parquet hold names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(key: str) -> str:
    """Write bytes that are not UTF-8, and control characters, as `\\xNN`."""
    text = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
