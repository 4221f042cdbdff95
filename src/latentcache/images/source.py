"""List image shards in any store, and stream their samples: tars, Parquet files and folders.

A problem of the content becomes a `RejectedSample`, and the other samples are kept. A problem of
the transport, or a source that is not the listed version, raises an exception. All data that was
read before must then be discarded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from latentcache.config_source import Images
from latentcache.dataset.contract import MAX_SAMPLE_BYTES, SourceContract
from latentcache.dataset.receipts import Unit
from latentcache.errors import (
    ConfigError,
    ObjectNotFound,
    Reject,
    SourceChanged,
    SourceError,
    StorageError,
)
from latentcache.images.braces import expand_urls, named_urls, require_distinct
from latentcache.images.folder_source import is_slot, list_folder, list_slot, read_slot, slots_of
from latentcache.images.moved import NOT_MOVED, Moved, moved_of
from latentcache.images.parquet_source import is_parquet, read_parquet, split_file
from latentcache.images.samples import (
    FieldSelection,
    NotGrouped,
    ReadRequest,
    RejectedSample,
    Sample,
    SourceShard,
    escaped,
    file_key_and_field,
    is_utf8,
    require_version,
)
from latentcache.images.tar_source import read_tar
from latentcache.storage import ObjectInfo, Store, split_url
from latentcache.storage_options import StorageOptions
from latentcache.urls import shown

# What other packages import from here, beside the functions below.
__all__ = ["NotGrouped", "RejectedSample", "Sample", "SourceShard", "expand_urls"]

# For this many shards in one folder or more, one listing is cheaper than a request for each.
_LIST_FROM = 16

_GLOB = re.compile(r"[*?\[]")

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


def source_contract(source: Images) -> SourceContract:
    """Return the contract for reading samples in a config's `source` section."""
    return SourceContract(
        tuple(source.image), source.key, source.max_sample_bytes, source.caption_index
    )


def list_source(
    source: Images, num_units: int | None = None, known: Collection[str] = ()
) -> list[SourceShard]:
    """List the shards that a config's `source` section names, sorted by URL. Each becomes a unit.

    Args:
        source, num_units: the section of the config, and the number of units of a folder if set.
        known: the sources of units that the output has already.

    Raises:
        ConfigError: see `list_shards` and `slots_of`; or `key` is set without a Parquet file.
        SourceError: a shard is missing, a glob matches nothing, or a folder has no image.
    """
    options, moved = source.storage, moved_of(source)
    if source.folder is not None:
        url = Store(source.folder, options).url
        shards = list_folder(url, slots_of(moved.identity(url), num_units, known), options)
        files = (file for slot in shards for file in slot.files)
        endings = _lower(source.image)
        if not any(file_key_and_field(file.path)[1] in endings for file in files):
            # If only captions were left in the folder, a run would remove all rows.
            raise SourceError(
                f"{url} holds no image files with an extension of source.image "
                f"({', '.join(source.image)}): check source.folder"
            )
    else:
        assert source.shards is not None
        shards = list_shards(source.shards, options)
        if source.key and not any(is_parquet(shard.url) for shard in shards):
            raise ConfigError(
                f"source.key names the column {source.key!r} of Parquet files, and source.shards "
                "has none: remove it; the keys of a tar's samples are the names of its files"
            )
    return _identified(shards, moved)


def _identified(shards: list[SourceShard], moved: Moved) -> list[SourceShard]:
    """Return shards with the URLs that the dataset records as their identity."""
    if moved.before is None:
        return shards
    identified = [replace(shard, identity=moved.identity(shard.url)) for shard in shards]
    names = {(shard.source, shard.range) for shard in identified}
    if len(names) < len(identified):
        raise ConfigError(
            f"source.moved_from is {moved.before}, and source.shards names files in it as well as "
            f"in {moved.now}: name each file once"
        )
    return sorted(identified, key=lambda shard: shard.source)


def relist_source(
    source: str, options: StorageOptions, moved: Moved = NOT_MOVED
) -> list[SourceShard]:
    """List the current shards of one source; raise `SourceError` if it no longer exists.

    Args:
        source, options, moved: the URL of a file or a slot, its store's options, and its move.
    """
    url = moved.location(source)
    if is_slot(url):
        return _identified([list_slot(url, options)], moved)
    folder, name = split_url(url)
    store = Store(folder, options)
    info = _info(store, name)
    if info is None:
        raise SourceError(f"{url} no longer exists: check source.shards")
    return _identified(split_file(_shard(store, info)), moved)


def shard_of(unit: Unit, options: StorageOptions, moved: Moved = NOT_MOVED) -> SourceShard:
    """Return the shard that a unit was made from; raise `SourceError` if its slot has other files.

    Args:
        unit, options, moved: the unit, the options of its source's store, and the source's move.
    """
    url = moved.location(unit.source)
    if not is_slot(url):
        return SourceShard(url, unit.size_bytes, unit.version, unit.range, identity=unit.source)
    shard = list_slot(url, options)
    if (shard.size_bytes, shard.version) != (unit.size_bytes, unit.version):
        raise SourceChanged(f"{url} has other files than when it was encoded: run again")
    return shard


def list_shards(shards: str | Sequence[str], options: StorageOptions) -> list[SourceShard]:
    """List tars and Parquet files, each once, sorted by URL; split large Parquet files into parts.

    The last part of a URL may have a glob (`*`, `?`, `[...]`), which costs one listing of its
    folder, as do many URLs in one folder. If a file has exactly the name of the pattern, globs and
    braces are not expanded.

    Args:
        shards, options: one URL or several, and how to reach the stores.

    Raises:
        ConfigError: a URL is not accepted (see `expand_urls`), a glob is in a folder's name, or a
            file has another extension than that of a tar or a Parquet file.
        SourceError: a shard is missing, or a glob matches nothing.
    """
    by_folder: dict[str, list[str]] = {}
    for url in named_urls(shards, options):
        folder, name = split_url(url)
        if folder.endswith(":/") or name.endswith(":"):
            raise ConfigError(f"source.shards: {shown(url)!r} names no file: add one, or '/*.tar'")
        by_folder.setdefault(folder, []).append(name)

    named, matched = list[SourceShard](), list[SourceShard]()
    for folder, names in by_folder.items():
        _find(Store(folder, options), names, named, matched)
    require_distinct([shard.url for shard in named])
    by_url = {shard.url: shard for shard in (*named, *matched)}
    return [part for url in sorted(by_url) for part in split_file(by_url[url])]


def _find(
    store: Store, names: Sequence[str], named: list[SourceShard], matched: list[SourceShard]
) -> None:
    """Add the files with these names in one folder, and the files that their globs match."""
    missing: list[str] = []
    is_listed = len(names) >= _LIST_FROM or any(map(_GLOB.search, names))
    infos = {info.path: info for info in store.list()} if is_listed else {}
    for name in names:
        info = infos.get(name) if is_listed else _info(store, name)
        if info is not None:
            named.append(_shard(store, info))
            continue
        is_glob = _GLOB.search(name)
        hits = [info for path, info in infos.items() if is_glob and fnmatchcase(path, name)]
        matched += [_shard(store, info, name) for info in hits]
        if not hits:
            missing.append(name)
    if not missing:
        return
    if _GLOB.search(store.url):
        raise ConfigError(
            f"source.shards: {store.url!r} has a glob before its last '/', and no folder of that "
            "name has the files; use braces"
        )
    url = store.url_of(missing[0])
    if _GLOB.search(missing[0]):
        raise SourceError(f"{url} matches nothing: check its folder")
    more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise SourceError(f"{url} does not exist{more}: check source.shards")


def _shard(store: Store, info: ObjectInfo, glob: str | None = None) -> SourceShard:
    """Return the shard of a listed file, which `glob` matched if it is given."""
    url = store.url_of(info.path)
    if escaped(url) != url:
        problem = "a control character in its name" if is_utf8(url) else "a name that is not UTF-8"
        raise SourceError(f"{escaped(url)} has {problem}: rename it")
    if not (is_parquet(url) or url.lower().endswith(_TAR_ENDINGS)):
        by_glob = f"{store.url_of(glob)} matches " if glob else ""
        raise ConfigError(
            f"source.shards: {by_glob}{url}, which has neither the extension of a tar "
            f"({', '.join(_TAR_ENDINGS)}) nor .parquet: name only such files, and name a folder of "
            "images in source.folder"
        )
    return SourceShard(url, info.size_bytes, info.version)


def _info(store: Store, name: str) -> ObjectInfo | None:
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
    """Stream a shard's samples: a tar in its order, a Parquet file by row, a folder by key.

    Each image file or member of the shard is a `Sample`, or is counted in the `extra_images` of a
    sample or in the `num_images` of a reject. Rejects with a key have the reasons `no_image`,
    `duplicate_key`, `unsafe_key` (an absolute path, a `..`, a control character), `key_not_utf8`,
    `oversized_sample`, or one that the readers document. At most one reject has no key: a problem
    of the whole shard, such as `empty_shard`.

    Args:
        shard, options: the listed shard, and how to reach the store.
        image, keep, key, max_sample_bytes, caption_index: see `FieldSelection`; in any letter case.
        gather: read a tar whose samples are scattered, or that holds links.
        on_read: called with the bytes of each read of a tar, or of each sample's fields.
        reserve: called before a field is read, with the bytes that its sample then holds.

    Raises:
        NotGrouped: the tar needs `gather`. All of these may be raised after samples were yielded.
        SourceChanged: the shard is no longer the listed version.
        StorageError: the store cannot be read, or cut the connection.
        SourceError: the compression of the shard is not supported, or it lacks a column.
    """
    if shard.files:
        folder, name = shard.url.rpartition("#")[0], ""
    else:
        folder, name = split_url(shard.url)
    if shard.files or not is_parquet(shard.url):
        image, keep = _lower(image), _lower(keep)
    selection = FieldSelection(image, keep, key, max_sample_bytes, caption_index)
    store = Store(folder, options)
    request = ReadRequest(shard, store, name, selection, on_read, reserve, gather)
    return read_slot(request) if shard.files else _read_file(request)


def _read_file(request: ReadRequest) -> Iterator[Sample | RejectedSample]:
    shard = request.shard
    listed = ObjectInfo(request.name, shard.size_bytes, shard.version, None)
    read = read_parquet if is_parquet(shard.url) else read_tar
    try:
        if shard.size_bytes == 0:
            empty = Reject("read", "empty_shard", "the shard holds no bytes")
            problem: RejectedSample | None = RejectedSample(None, empty)
        else:
            problem = yield from read(request)
    except (StorageError, SourceError):
        # A replaced or deleted file may appear as missing bytes, or cause any of these errors.
        require_version(request.store, listed)
        raise
    require_version(request.store, listed)
    if problem is not None:
        yield problem


def _lower(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.lower() for name in names))


def read_samples(
    shard: SourceShard, source: SourceContract, **settings: Any
) -> Iterator[Sample | RejectedSample]:
    """Stream a shard's samples as `read_shard` does, with the settings of a contract.

    Args:
        shard, source, settings: the shard, the contract, and the other arguments of `read_shard`.
    """
    return read_shard(
        shard,
        image=source.image_fields,
        key=source.key_column,
        max_sample_bytes=source.max_sample_bytes,
        caption_index=source.caption_index,
        **settings,
    )


def read_images(
    shard: SourceShard, source: SourceContract, options: StorageOptions
) -> Iterator[Sample | RejectedSample]:
    """Stream a shard's samples without kept fields, for callers that process each one at once.

    Args:
        shard, source, options: see `read_samples`, also for the errors.
    """
    keys = set()
    for gather in (False, True):
        try:
            for sample in read_samples(shard, source, keep=(), options=options, gather=gather):
                if gather and sample.key in keys:
                    continue
                if not gather:
                    keys.add(sample.key)
                yield sample
            return
        except NotGrouped:
            continue
