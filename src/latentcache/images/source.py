"""Sources: find image shards in any store, and stream their samples.

Three kinds of source have one shape: WebDataset tars (`tar.py`), Parquet files (`parquet.py`) and
folders of images (`folder.py`). Whatever is wrong with one comes out in one of two ways. What is
wrong with its content becomes a `RejectedSample`, so that its other samples are kept and nothing is
lost in silence. What is wrong with the transport, or a source that is not the listed version, is an
exception, after which all that was read must be discarded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatchcase

from webdataset.shardlists import expand_urls as expand_braces

from latentcache.config import Images
from latentcache.dataset.contract import MAX_SAMPLE_BYTES, SourceContract
from latentcache.dataset.receipts import Unit
from latentcache.errors import ConfigError, ObjectNotFound, SourceChanged, SourceError
from latentcache.images.folder import is_slot, list_folder, list_slot, read_slot, slots_of
from latentcache.images.parquet import is_parquet, read_parquet, split_file
from latentcache.images.samples import (
    NotGrouped,
    RejectedSample,
    Sample,
    SourceShard,
    Wanted,
    escaped,
    file_key_and_field,
    is_utf8,
)
from latentcache.images.tar import read_tar
from latentcache.storage import ObjectInfo, StorageOptions, Store, split_url, storage_options

__all__ = [
    "NotGrouped",
    "RejectedSample",
    "Sample",
    "SourceShard",
    "expand_urls",
    "list_again",
    "list_shards",
    "list_source",
    "read_images",
    "read_samples",
    "read_shard",
    "shard_of",
    "source_contract",
]

# From so many shards in one folder on, one listing of it is cheaper than asking for each.
_LIST_FROM = 16

_MAX_BRACE_RANGE = 10_000_000

_GLOB = re.compile(r"[*?\[]")
_COMMAND = re.compile(r"^pipe:|^-$|[|`<>\n]|\$[({]|&&")


def source_contract(source: Images) -> SourceContract:
    """Return how a config's `source` section says that samples are read."""
    return SourceContract(
        tuple(source.image), source.key, source.max_sample_bytes, source.caption_index
    )


def list_source(
    source: Images, num_units: int | None = None, known: Collection[str] = ()
) -> list[SourceShard]:
    """Find what a config's `source` names, sorted by URL; what comes of each is a unit.

    Args:
        source: the section of the config.
        num_units: into how many units it wants a folder to be cut, if it says so.
        known: the sources of units that the output has already.

    Raises:
        ConfigError: as `list_shards` and `folder.slots_of`; `key` without a Parquet file.
        SourceError: a shard is missing, or a glob or a folder holds nothing.
        StorageError: a store cannot be reached or refuses access.
    """
    options = storage_options(source.storage)
    if source.folder is not None:
        url = Store(source.folder, options).url
        slots = list_folder(url, slots_of(url, num_units, known), options)
        files = (file for slot in slots for file in slot.files)
        if not any(file_key_and_field(file.path)[1] in _lower(source.image) for file in files):
            # Captions that were left without their images would take the place of all rows.
            raise SourceError(
                f"{url} holds no image files, which source.image says end in "
                f"{', '.join(source.image)}: check source.folder"
            )
        return slots
    assert source.shards is not None
    shards = list_shards(source.shards, options)
    if source.key and not any(is_parquet(shard.url) for shard in shards):
        raise ConfigError(
            f"source.key names the column {source.key!r} of Parquet files, and source.shards has "
            "none; a tar's samples have the names of its files as keys"
        )
    return shards


def list_again(source: str, options: StorageOptions) -> list[SourceShard]:
    """List the shards of one source (the URL of a file, or a folder's slot) as they are now.

    Raises:
        SourceError: it is gone.
        StorageError: the store cannot be reached.
    """
    if is_slot(source):
        return [list_slot(source, options)]
    folder, name = split_url(source)
    store = Store(folder, options)
    info = _ask(store, name)
    if info is None:
        raise SourceError(f"{source} does not exist any more: check source.shards")
    return _shards_of(_shard(store, info))


def shard_of(unit: Unit, options: StorageOptions) -> SourceShard:
    """Make of a unit the shard that it was made from; a folder's slot is listed again for it.

    Raises:
        SourceChanged: the slot has other files by now.
        SourceError: it has none.
    """
    if not is_slot(unit.source):
        return SourceShard(unit.source, unit.size_bytes, unit.version, unit.range)
    shard = list_slot(unit.source, options)
    if (shard.size_bytes, shard.version) != (unit.size_bytes, unit.version):
        raise SourceChanged(f"{unit.source} has other files than when it was encoded")
    return shard


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
    """Find tars and Parquet files, sorted by URL, each once; a large Parquet file in its parts.

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
    by_url = {shard.url: shard for shard in (*named, *matched)}
    return [shard for url in sorted(by_url) for shard in _shards_of(by_url[url])]


def _refuse_twice(urls: Sequence[str]) -> None:
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ConfigError(f"source.shards: {url} is named twice")
        seen.add(url)


def _shard(store: Store, info: ObjectInfo) -> SourceShard:
    url = store.url_of(info.path)
    if not is_utf8(url):  # no unit could be named by it
        raise SourceError(f"{escaped(url)} has a name that is not UTF-8: rename it")
    return SourceShard(url, info.size_bytes, info.version)


def _shards_of(file: SourceShard) -> list[SourceShard]:
    return split_file(file) if is_parquet(file.url) else [file]


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
    key: str | None = None,
    max_sample_bytes: int = MAX_SAMPLE_BYTES,
    caption_index: int = 0,
    gather: bool = False,
    on_read: Callable[[int], None] = lambda num_bytes: None,
    reserve: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Sample | RejectedSample]:
    """Stream a shard's samples: a tar's in its order, a Parquet file's by row, a folder's by key.

    Reasons of the rejects, all of stage `read`. With a key: `no_image` (none of the fields in
    `image`), `duplicate_key` (an earlier sample has the key), `unsafe_key` (an absolute path, a
    `..`, a control character), `key_not_utf8`, `oversized_sample` (above `max_sample_bytes`); bytes
    that cannot stand in a key are escaped with a backslash. Without a key, and at most once: what
    is wrong with the whole shard. The readers of tars, folders and Parquet files name further ones.

    Each image file or member of the shard is a `Sample`, or counted in its `extra_images`, or in
    the `num_images` of a reject.

    Args:
        shard: what was listed.
        image: fields that may hold the image; of several the first named is taken. Tars and folders
            compare them without case.
        keep: further fields to return.
        options: how to reach the store.
        key: the column of Parquet files that holds the key.
        max_sample_bytes: a sample whose fields together hold more bytes is a reject.
        caption_index: the element that is taken where a text column of Parquet holds lists.
        gather: read a tar whose samples are scattered, or that holds links.
        on_read: called with the number of bytes of each read: of a tar those of the archive, of the
            others those of the fields.
        reserve: called before a field is read, with the bytes that its sample then holds.

    Raises:
        NotGrouped: without `gather`, the tar needs it. This and the next two may come after samples
            were yielded: discard them all.
        SourceChanged: the shard is no longer the listed version.
        StorageError: the store cannot be read, or cut the connection.
        SourceError: the shard is compressed in a way that is not read, or lacks a column.
    """
    if is_parquet(shard.url) and not shard.files:
        wanted = Wanted(tuple(image), tuple(keep), key, max_sample_bytes, caption_index)
        return read_parquet(shard, wanted, options, on_read, reserve)
    wanted = Wanted(_lower(image), _lower(keep), None, max_sample_bytes)
    if shard.files:
        return read_slot(shard, wanted, options, on_read, reserve)
    return read_tar(shard, wanted, options, on_read, reserve, gather=gather)


def _lower(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.lower() for name in names))


def read_samples(
    shard: SourceShard,
    source: SourceContract,
    *,
    keep: Sequence[str] = (),
    options: StorageOptions,
    gather: bool = False,
    on_read: Callable[[int], None] = lambda num_bytes: None,
    reserve: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Sample | RejectedSample]:
    """Stream a shard's samples as a contract says that they are read; see `read_shard`."""
    return read_shard(
        shard,
        image=source.image_fields,
        keep=keep,
        options=options,
        key=source.key_column,
        max_sample_bytes=source.max_sample_bytes,
        caption_index=source.caption_index,
        gather=gather,
        on_read=on_read,
        reserve=reserve,
    )


def read_images(
    shard: SourceShard, source: SourceContract, options: StorageOptions
) -> Iterator[Sample | RejectedSample]:
    """Stream a shard's samples without kept fields, for callers that use each at once.

    Raises:
        SourceChanged: the shard is no longer the listed version.
        StorageError: the store cannot be read, or cut the connection.
        SourceError: the shard is compressed in a way that is not read, or lacks a column.
    """
    keys = set()
    try:
        for sample in read_samples(shard, source, options=options):
            keys.add(sample.key)
            yield sample
    except NotGrouped:
        for sample in read_samples(shard, source, options=options, gather=True):
            if sample.key not in keys:
                yield sample
