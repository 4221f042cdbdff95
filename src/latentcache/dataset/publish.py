"""`published.json`: a pointer to the manifest that training should read.

It is replaced as a whole, so that a reader sees either the old or the new content.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated

from latentcache.dataset.contract import FORMAT_VERSION, require_contract, require_format
from latentcache.dataset.manifest import (
    MAX_MANIFEST,
    Manifest,
    ManifestName,
    list_manifests,
    read_manifest,
)
from latentcache.dataset.parse import Range, Sha256, build, load_json
from latentcache.errors import CheckFailed, ConfigError, DatasetError, ObjectNotFound
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

PUBLISHED_PATH = "published.json"


@dataclass(frozen=True, slots=True)
class Published:
    """The content of `published.json`: a manifest's number, and the contract's fingerprint."""

    manifest: Annotated[int, Range(0, MAX_MANIFEST)]
    published_at: str
    contract: Sha256
    format_version: int = FORMAT_VERSION


def publish(
    url: str | os.PathLike[str],
    number: int | None = None,
    *,
    force: bool = False,
    storage: StorageOptions | None = None,
) -> Published:
    """Point `published.json` to a manifest, and return its content; run one publisher at a time.

    Args:
        url, storage: see `open_dataset`.
        number: number of the manifest; None takes the newest complete one.
        force: allow a manifest that is older than the published one.

    Raises:
        CheckFailed: the manifest is not complete, or has no rows.
        ConfigError: the manifest is older than the published one.
        DatasetError: there is no dataset or no such manifest.
    """
    store = Store(url, storage or StorageOptions())
    require_contract(store)
    manifest = find_manifest(store, number)
    title = f"manifest {manifest.number} of {store.url}"
    if not manifest.complete:
        raise CheckFailed(f"{title} is not complete: finish the run, then publish")
    if not manifest.num_rows:
        raise CheckFailed(f"{title} has no rows to publish")
    now = read_published(store)
    if now and now.manifest == manifest.number:
        return now
    if now and now.manifest > manifest.number and not force:
        raise ConfigError(
            f"{store.url} has manifest {now.manifest} published, which is newer than "
            f"{manifest.number}: use --force to publish the older one"
        )
    published = Published(manifest.number, datetime.now(UTC).isoformat(), manifest.contract)
    _put(store, published)
    try:
        read_manifest(store, manifest.number)
    except DatasetError:  # `gc` deleted the manifest before it saw the new pointer
        if now:
            _put(store, now)
        raise
    return published


def _put(store: Store, published: Published) -> None:
    store.put(PUBLISHED_PATH, json.dumps(asdict(published), indent=1).encode())


def read_published(store: Store) -> Published | None:
    """Return the content of `published.json`, or None if nothing is published."""
    try:
        tree = load_json(store.read_bytes(PUBLISHED_PATH))
        require_format(tree, store.url_of(PUBLISHED_PATH))
        return build(Published, tree)
    except ObjectNotFound:
        return None
    except ValueError as error:
        raise DatasetError(f"{store.url_of(PUBLISHED_PATH)} is damaged: {error}") from error


def find_manifest(store: Store, name: ManifestName | None) -> Manifest:
    """Return a manifest by its name.

    Args:
        store: the output.
        name: a number, or "published"; None takes the newest complete manifest.

    Raises:
        ConfigError, DatasetError: `name` is something else, or there is no such manifest.
    """
    if name is None:
        return _newest_complete(store)
    if isinstance(name, int):
        return read_manifest(store, name)
    if name != "published":
        raise ConfigError(f"manifest is {name!r}: give its number, or 'published'")
    published = read_published(store)
    while published:
        try:
            return read_manifest(store, published.manifest)
        except DatasetError:
            # Between the two reads, another manifest may be published and the old one deleted.
            before, published = published, read_published(store)
            if published in (None, before):
                raise
    raise DatasetError(f"{store.url} has nothing published: run `latentcache publish`")


def _newest_complete(store: Store) -> Manifest:
    numbers = list_manifests(store)
    for number in reversed(numbers):
        if (manifest := read_manifest(store, number)).complete:
            return manifest
    if not numbers:
        raise DatasetError(f"{store.url} has no manifest yet: wait for a run to write one")
    raise DatasetError(
        f"{store.url} has no complete manifest yet: finish the run, or name manifest "
        f"{numbers[-1]} to read the rows that it has"
    )
