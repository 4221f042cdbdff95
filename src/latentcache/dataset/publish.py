"""`published.json`: the one pointer that moves, to the manifest that training is to read.

It is replaced whole, so that a reader sees the old one or the new one.
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
    """What `published.json` says: the number of a manifest, and when it was published (ISO 8601).

    `contract` is the fingerprint of the dataset's contract.
    """

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
    """Let `published.json` name a manifest. If it does already, nothing is written.

    One publisher at a time: of two, the later write stands.

    Args:
        url: the dataset.
        number: of the manifest; None takes the newest complete one.
        force: publish a manifest that is older than the one published now.
        storage: how to reach the store.

    Raises:
        CheckFailed: the manifest is not complete, or has no rows.
        ConfigError: it is older than the published one.
        DatasetError: there is no dataset, no such manifest, or no complete one.
    """
    store = Store(url, storage or StorageOptions())
    require_contract(store)
    manifest = newest_complete(store) if number is None else read_manifest(store, number)
    if not manifest.complete:
        raise CheckFailed(
            f"manifest {manifest.number} of {store.url} is not complete: finish the run first"
        )
    if not manifest.num_rows:
        raise CheckFailed(f"manifest {manifest.number} of {store.url} has no rows to publish")
    now = read_published(store)
    if now and now.manifest == manifest.number:
        return now
    if now and now.manifest > manifest.number and not force:
        raise ConfigError(
            f"{store.url} has manifest {now.manifest} published, which is newer than "
            f"{manifest.number}; --force goes back"
        )
    published = Published(manifest.number, datetime.now(UTC).isoformat(), manifest.contract)
    _put(store, published)
    try:
        read_manifest(store, manifest.number)
    except DatasetError:  # `gc` deleted it before it could see this
        if now:
            _put(store, now)
        raise
    return published


def _put(store: Store, published: Published) -> None:
    store.put(PUBLISHED_PATH, json.dumps(asdict(published), indent=1).encode())


def read_published(store: Store) -> Published | None:
    """Read what is published; None where nothing is.

    Raises:
        DatasetError: `published.json` is damaged or of another format version.
    """
    try:
        data = store.read_bytes(PUBLISHED_PATH)
    except ObjectNotFound:
        return None
    try:
        tree = load_json(data)
        require_format(tree, store.url_of(PUBLISHED_PATH))
        return build(Published, tree)
    except ValueError as error:
        raise DatasetError(f"{store.url_of(PUBLISHED_PATH)} is damaged: {error}") from error


def find_manifest(store: Store, name: ManifestName | None) -> Manifest:
    """Read the manifest of a number, the published one, or (None) the newest complete one.

    Raises:
        ConfigError: that is not what a manifest is called.
        DatasetError: there is no such manifest, or it is damaged.
    """
    if name is None:
        return newest_complete(store)
    if isinstance(name, int):
        return read_manifest(store, name)
    if name != "published":
        raise ConfigError(f"manifest is {name!r}; give its number, or 'published'")
    return _read_published(store)


def _read_published(store: Store) -> Manifest:
    published = read_published(store)
    if published is None:
        raise DatasetError(f"{store.url} has nothing published: run `latentcache publish`")
    while True:
        try:
            return read_manifest(store, published.manifest)
        except DatasetError:
            # It may have moved on, and the old one be deleted, between the two reads.
            before, published = published, read_published(store)
            if published is None or published == before:
                raise


def newest_complete(store: Store) -> Manifest:
    """Read the newest complete manifest.

    Raises:
        DatasetError: there is none.
    """
    numbers = list_manifests(store)
    for number in reversed(numbers):
        found = read_manifest(store, number)
        if found.complete:
            return found
    if not numbers:
        raise DatasetError(f"{store.url} has no manifest yet: no run has got that far")
    raise DatasetError(
        f"{store.url} has no complete manifest yet; finish the run, or ask for manifest "
        f"{numbers[-1]} to read what is there"
    )
