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
from dataclasses import replace
from fnmatch import fnmatchcase

from latentcache.config_source import Images
from latentcache.dataset.contract import MAX_SAMPLE_BYTES, SourceContract
from latentcache.dataset.receipts import Unit
from latentcache.errors import ConfigError, ObjectNotFound, SourceChanged, SourceError
from latentcache.images.braces import expand_urls, named_urls, require_distinct
from latentcache.images.folder_source import is_slot, list_folder, list_slot, read_slot, slots_of
from latentcache.images.moved import NOT_MOVED, Moved, moved_of
from latentcache.images.parquet_source import is_parquet, read_parquet, split_file
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
from latentcache.images.tar_source import read_tar
from latentcache.storage import ObjectInfo, Store, split_url
from latentcache.storage_options import StorageOptions
from latentcache.urls import shown

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

_GLOB = re.compile(r"[*?\[]")

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


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
    options, moved = source.storage, moved_of(source)
    if source.folder is not None:
        url = Store(source.folder, options).url
        num_slots = slots_of(moved.identity(url), num_units, known)
        slots = list_folder(url, num_slots, options)
        files = (file for slot in slots for file in slot.files)
        endings = _lower(source.image)
        if not any(file_key_and_field(file.path)[1] in endings for file in files):
            # Captions that were left without their images would take the place of all rows.
            raise SourceError(
                f"{url} holds no image files, which source.image says end in "
                f"{', '.join(source.image)}: check source.folder"
            )
        return _identified(slots, moved)
    assert source.shards is not None
    shards = list_shards(source.shards, options)
    if source.key and not any(is_parquet(shard.url) for shard in shards):
        raise ConfigError(
            f"source.key names the column {source.key!r} of Parquet files, and source.shards has "
            "none; a tar's samples have the names of its files as keys"
        )
    return _identified(shards, moved)


def _identified(shards: list[SourceShard], moved: Moved) -> list[SourceShard]:
    """Let shards that moved keep the URLs that the dataset knows."""
    if moved.before is None:
        return shards
    found = [replace(shard, identity=moved.identity(shard.url)) for shard in shards]
    names = {(shard.source, shard.range) for shard in found}
    if len(names) < len(found):
        raise ConfigError(
            f"source.moved_from is {moved.before}, and source.shards names files in it as well as "
            f"in {moved.now}: name each file once"
        )
    return sorted(found, key=lambda shard: shard.source)


def list_again(source: str, options: StorageOptions, moved: Moved = NOT_MOVED) -> list[SourceShard]:
    """List the shards of one source (the URL of a file, or a folder's slot) as they are now.

    Raises:
        SourceError: it is gone.
        StorageError: the store cannot be reached.
    """
    url = moved.location(source)
    if is_slot(url):
        return _identified([list_slot(url, options)], moved)
    folder, name = split_url(url)
    store = Store(folder, options)
    info = _ask(store, name)
    if info is None:
        raise SourceError(f"{url} does not exist any more: check source.shards")
    return _identified(_shards_of(_shard(store, info)), moved)


def shard_of(unit: Unit, options: StorageOptions, moved: Moved = NOT_MOVED) -> SourceShard:
    """Make of a unit the shard that it was made from; a folder's slot is listed again for it.

    Raises:
        SourceChanged: the slot has other files by now.
        SourceError: it has none.
    """
    url = moved.location(unit.source)
    if not is_slot(url):
        return SourceShard(url, unit.size_bytes, unit.version, unit.range, identity=unit.source)
    shard = list_slot(url, options)
    if (shard.size_bytes, shard.version) != (unit.size_bytes, unit.version):
        raise SourceChanged(f"{url} has other files than when it was encoded")
    return shard


def list_shards(shards: str | Sequence[str], options: StorageOptions) -> list[SourceShard]:
    """Find tars and Parquet files, sorted by URL, each once; a large Parquet file in its parts.

    A glob (`*`, `?`, `[...]`) may stand in the last part of a URL and costs one listing of its
    folder, as do many URLs in one folder; a few URLs are asked for one by one. A file whose name is
    what is written comes before what the glob or the braces in it would match.

    Raises:
        ConfigError: as `expand_urls`; a glob in a folder's name; a file that is neither a tar nor
            a Parquet file by its ending.
        SourceError: a shard is missing, or a glob matches nothing.
        StorageError: a store cannot be reached or refuses access.
    """
    by_folder: dict[str, list[str]] = {}
    for url in named_urls(shards, options):
        folder, name = split_url(url)
        if folder.endswith(":/") or name.endswith(":"):
            raise ConfigError(f"source.shards: {shown(url)!r} names no file; add one, or '/*.tar'")
        by_folder.setdefault(folder, []).append(name)

    named: list[SourceShard] = []
    matched: list[SourceShard] = []
    for folder, names in by_folder.items():
        found, globbed = _find(Store(folder, options), names)
        named += found
        matched += globbed
    require_distinct([shard.url for shard in named])
    by_url = {shard.url: shard for shard in (*named, *matched)}
    return [shard for url in sorted(by_url) for shard in _shards_of(by_url[url])]


def _find(store: Store, names: Sequence[str]) -> tuple[list[SourceShard], list[SourceShard]]:
    """Find the files of those names in one folder, and what globs among the names match."""
    named: list[SourceShard] = []
    matched: list[SourceShard] = []
    missing: list[str] = []
    is_listed = len(names) >= _LIST_FROM or any(map(_GLOB.search, names))
    listing = {info.path: info for info in store.list()} if is_listed else {}
    for name in names:
        info = listing.get(name) if is_listed else _ask(store, name)
        if info is not None:
            named.append(_shard(store, info))
        elif not _GLOB.search(name):
            missing.append(store.url_of(name))
        elif hits := [info for path, info in listing.items() if fnmatchcase(path, name)]:
            matched += [_shard(store, info, name) for info in hits]
        else:
            _refuse_glob(store.url)
            raise SourceError(f"{store.url_of(name)} matches nothing: check its folder")
    if missing:
        _refuse_glob(store.url)
        more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise SourceError(f"{missing[0]} does not exist{more}: check source.shards")
    return named, matched


def _refuse_glob(folder: str) -> None:
    """Explain a folder in which nothing was found by the glob in its name."""
    if _GLOB.search(folder):
        raise ConfigError(
            f"source.shards: {folder!r} has a glob before its last '/', and no folder of that name "
            "has the files; use braces"
        )


def _shard(store: Store, info: ObjectInfo, glob: str | None = None) -> SourceShard:
    """Make a shard of a file that was found, by the glob if there is one.

    Raises:
        ConfigError: its ending says that it is neither a tar nor a Parquet file.
        SourceError: no unit could be named by it.
    """
    url = store.url_of(info.path)
    if not is_utf8(url):
        raise SourceError(f"{escaped(url)} has a name that is not UTF-8: rename it")
    if escaped(url) != url:
        raise SourceError(f"{escaped(url)} has a control character in its name: rename it")
    if not (is_parquet(url) or url.lower().endswith(_TAR_ENDINGS)):
        by_glob = f"{store.url_of(glob)} matches " if glob else ""
        raise ConfigError(
            f"source.shards: {by_glob}{url}, which is neither a tar ({', '.join(_TAR_ENDINGS)}) "
            "nor a .parquet file by its ending; name only such files, and a folder of images in "
            "source.folder"
        )
    return SourceShard(url, info.size_bytes, info.version)


def _shards_of(file: SourceShard) -> list[SourceShard]:
    return split_file(file) if is_parquet(file.url) else [file]


def _ask(store: Store, name: str) -> ObjectInfo | None:
    try:
        return store.info(name)
    except ObjectNotFound as error:
        if "is a folder" in str(error):
            raise ConfigError(
                f"source.shards: {store.url_of(name)} is a folder: name its shards by adding "
                "'/*.tar' or '/*.parquet', or name a folder of images in source.folder"
            ) from error
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
