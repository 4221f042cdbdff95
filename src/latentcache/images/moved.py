"""Moved sources: the URL that the dataset records, and the URL that is read now.

A unit is identified by its source's URL, so the dataset would have the rows of a renamed or copied
folder twice. `source.moved_from` names the old folder, whose URLs units and records then keep.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import takewhile

from latentcache.config_source import Images, Source
from latentcache.images.braces import named_urls
from latentcache.storage import Store

_SLOT = re.compile(r"#\d+/\d+$")


@dataclass(frozen=True, slots=True)
class Moved:
    """Canonical URLs of the folder that the dataset records, if it moved, and that is read now."""

    before: str | None = None
    now: str = ""

    def identity(self, url: str) -> str:
        """Return the URL that the dataset records for a file or a folder's slot at `url`."""
        return _rebased(url, self.now, self.before) if self.before else url

    def location(self, source: str) -> str:
        """Return the present URL of a source that the dataset records as `source`."""
        return _rebased(source, self.before, self.now) if self.before else source


NOT_MOVED = Moved()


def _rebased(url: str, old: str, new: str) -> str:
    rest = url.removeprefix(old)
    return new + rest if rest != url and rest.startswith(("/", "#")) else url


def moved_of(source: Images) -> Moved:
    """Return the move that a config's `source` section describes."""
    before = source.moved_from if isinstance(source, Source) else None
    if before is None:
        return NOT_MOVED
    return Moved(Store(before, source.storage).url, root_of(source))


def root_of(source: Images) -> str:
    """Return the URL of the common folder of all files of a source."""
    options = source.storage
    if source.folder is not None:
        return Store(source.folder, options).url
    assert source.shards is not None
    folders = {url.rpartition("/")[0] for url in named_urls(source.shards, options)}
    parts = [Store(folder or ".", options).url.split("/") for folder in folders]
    common = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return "/".join(names[0] for names in common)


def old_folder(pairs: Iterable[tuple[str, str]], root: str) -> str | None:
    """Return the folder from which sources moved; None if they did not move together.

    Args:
        pairs, root: (present URL, recorded URL) of equal sources; and their present common folder.
    """
    folders = set()
    for now, before in pairs:
        rest = now.removeprefix(root)
        folders.add(before.removesuffix(rest) if before.endswith(rest) else None)
    return folders.pop() if len(folders) == 1 else None


def same_names(names: Collection[str]) -> dict[str, list[str]]:
    """Group sources by the last part of their names, which a move does not change."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(last_part(name), []).append(name)
    return groups


def last_part(source: str) -> str:
    """Return the name of a source's file, or the `#k/n` of a folder's slot."""
    slot = _SLOT.search(source)
    return slot[0] if slot else source.rpartition("/")[2]
