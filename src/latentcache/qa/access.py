"""Decide which of the checkpoints and sources that a dataset names may be opened.

The URLs of an untrusted dataset could make QA read any file or URL with the user's credentials. So
only those are opened that the user names too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase

from latentcache.dataset.contract import read_provenance
from latentcache.dataset.reader import Dataset
from latentcache.errors import ConfigError, one_line
from latentcache.images.folder_source import is_slot
from latentcache.images.source import expand_urls
from latentcache.storage import Store, split_url
from latentcache.vae.weights import DEMO

_MAX_SHOWN_CHARS = 300


def find_checkpoint(dataset: Dataset, decoder: str | None = None) -> str:
    """Return the checkpoint of a dataset's VAE if the user named none: `demo`, or the decoder.

    Args:
        dataset, decoder: neither `demo` in the dataset nor a decoder raises `ConfigError`.
    """
    named = read_provenance(dataset.store).get("checkpoint")
    if named == DEMO:
        return DEMO
    if decoder:
        return decoder
    if not isinstance(named, str) or not named:
        raise ConfigError(
            f"{dataset.url} does not say which VAE encoded it: name its checkpoint, "
            "--decoder CHECKPOINT"
        )
    # Quoted, because users copy it into a shell.
    raise ConfigError(
        f"{dataset.url} says that {shown(named)} encoded it, but a checkpoint that only a dataset "
        f"names is not opened: if you trust it, pass --decoder {shlex.quote(shown(named))}, or "
        "give the config of the run in place of the URL"
    )


def shown(url: str) -> str:
    """Return a URL of a dataset for a message: one line, cut to a length.

    It omits the text before `@` or after `?`, which may be a password or a signature.
    """
    text = re.sub(r"(?<=://)[^/@]*@", "", url)
    text = one_line(text.partition("?")[0] + ("?…" if "?" in text else ""))
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


class NamedSources:
    """The sources that the user names: shards, globs, and folders with everything in them.

    `urls` are values as in `source.shards` or `source.folder` of a config, see `expand_urls`.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls: set[str] = set()
        self._globs: set[tuple[str, str]] = set()
        for url in expand_urls(urls) if urls else ():
            folder, name = split_url(url)
            if re.search(r"[*?\[]", name):
                self._globs.add((Store(folder).url, name))
            else:
                self._urls.add(Store(url).url)

    def __contains__(self, source: str) -> bool:
        """Return whether the user named a unit's source."""
        if is_slot(source):
            source = source.rpartition("#")[0]
        if source in self._urls:
            return True
        path = source.partition("://")[2]
        # fsspec would read another URL from such a name, or leave the folder.
        names = path.lstrip("/").split("/")
        if "::" in source or "://" in path or "%" in path or {"", ".", ".."} & set(names):
            return False
        *parents, name = source.split("/")
        if any("/".join(parents[:num]) in self._urls for num in range(3, len(parents) + 1)):
            return True
        folder = "/".join(parents)
        return any(folder == parent and fnmatchcase(name, glob) for parent, glob in self._globs)
