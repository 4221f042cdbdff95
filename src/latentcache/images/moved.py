"""Sources that moved: the URL that a dataset knows one by, and the URL at which it lies now.

A unit is named by its source's URL. So a folder that was renamed, mounted elsewhere or copied to
another store would be encoded again, and all its rows would be in the dataset twice. The config's
`source.moved_from` names the old folder: then units and records keep the old URLs, and only what
reads takes the new ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import takewhile

from latentcache.config_source import Images, Source
from latentcache.images.braces import named_urls
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions


@dataclass(frozen=True, slots=True)
class Moved:
    """The folder that a dataset knows, and the one that is read in its place; canonical URLs.

    Without `before` nothing moved.
    """

    before: str | None = None
    now: str = ""

    def identity(self, url: str) -> str:
        """Return by which URL the dataset knows what lies at `url` (a file, or a folder's slot)."""
        return _rebased(url, self.now, self.before) if self.before else url

    def location(self, source: str) -> str:
        """Return where the source lies that the dataset knows as `source`."""
        return _rebased(source, self.before, self.now) if self.before else source


_SLOT = re.compile(r"#\d+/\d+$")

NOT_MOVED = Moved()


def _rebased(url: str, old: str, new: str) -> str:
    rest = url.removeprefix(old)
    return new + rest if rest != url and rest.startswith(("/", "#")) else url


def moved_of(source: Images) -> Moved:
    """Read off a config what moved where; for files, from the folder that all of them are below."""
    before = source.moved_from if isinstance(source, Source) else None
    if before is None:
        return NOT_MOVED
    options = source.storage
    return Moved(Store(before, options).url, root_of(source, options))


def root_of(source: Images, options: StorageOptions) -> str:
    """Return the URL of the folder that all of a source is below."""
    if source.folder is not None:
        return Store(source.folder, options).url
    assert source.shards is not None
    folders = {url.rpartition("/")[0] for url in named_urls(source.shards, options)}
    parts = [Store(folder or ".", options).url.split("/") for folder in folders]
    common = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return "/".join(names[0] for names in common)


def old_folder(pairs: Iterable[tuple[str, str]], root: str) -> str | None:
    """Return the folder that, named in `source.moved_from`, would explain where sources lie now.

    Args:
        pairs: (URL now, URL that the dataset knows) of sources that look the same.
        root: the folder that all sources are below now.

    Returns:
        Its URL; None where the sources did not move together.
    """
    folders = set()
    for now, before in pairs:
        rest = now.removeprefix(root)
        folders.add(before.removesuffix(rest) if before.endswith(rest) else None)
    return folders.pop() if len(folders) == 1 else None


def same_names(names: Collection[str]) -> dict[str, list[str]]:
    """Group sources by the last part of their names, which a move keeps."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(last_part(name), []).append(name)
    return groups


def last_part(source: str) -> str:
    """Return the name of a source's file, or of a folder's slot."""
    slot = _SLOT.search(source)
    return slot[0] if slot else source.rpartition("/")[2]
