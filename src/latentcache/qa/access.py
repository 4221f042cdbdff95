"""The rules for opening the checkpoints and sources that a dataset names.

A dataset may come from an untrusted party. Its writer chose the checkpoint in its `contract.json`
and the sources in its receipts. If QA opened them without asking, they could make it read any file
or URL with the user's credentials. So they are used only if the user names them too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase

from latentcache.config_source import Images
from latentcache.dataset.contract import read_provenance
from latentcache.dataset.reader import Dataset
from latentcache.errors import ConfigError, one_line
from latentcache.images.folder_source import is_slot
from latentcache.images.source import expand_urls
from latentcache.storage import Store, split_url
from latentcache.vae.weights import DEMO

_GLOB = re.compile(r"[*?\[]")
_MAX_SHOWN_CHARS = 300


def find_checkpoint(dataset: Dataset, decoder: str | None = None) -> str:
    """Return the checkpoint of a dataset's VAE if the user named no VAE.

    Args:
        dataset: the dataset. The checkpoint that it names is used only if it is `demo`.
        decoder: the checkpoint that the user named as decoder; it may hold the same encoder.

    Returns:
        `demo` if the dataset names it, otherwise `decoder`.

    Raises:
        ConfigError: the dataset does not name `demo`, and the user named no decoder.
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
    """Return a URL of a dataset for a message: one line, without credentials, cut to a length.

    The text before `@` or after `?` may be a password or a signature, so it is left out.
    """
    text = re.sub(r"(?<=://)[^/@]*@", "", url)
    text = one_line(text.partition("?")[0] + ("?…" if "?" in text else ""))
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def source_urls(source: Images) -> tuple[str, ...]:
    """Return the URLs in a config's `source` section: its shards, or its folder."""
    if source.folder is not None:
        return (source.folder,)
    assert source.shards is not None
    return (source.shards,) if isinstance(source.shards, str) else tuple(source.shards)


class NamedSources:
    """The sources that the user names: shards, globs, and folders with everything in them.

    Args:
        urls: values as in `source.shards` or `source.folder` of a config.

    Raises:
        ConfigError: a URL is not accepted; see `expand_urls`.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls: set[str] = set()
        self._globs: set[tuple[str, str]] = set()
        for url in expand_urls(urls) if urls else ():
            folder, name = split_url(url)
            if _GLOB.search(name):
                self._globs.add((Store(folder).url, name))
            else:
                self._urls.add(Store(url).url)

    def __contains__(self, source: str) -> bool:
        """Return whether the user named a unit's source."""
        if is_slot(source):
            source = source.rpartition("#")[0]
        if source in self._urls:
            return True
        scheme, _, path = source.partition("://")
        # fsspec would read another URL from such a name, or leave the folder.
        parts = path.lstrip("/").split("/")
        if "::" in source or "://" in path or "%" in path or {"", ".", ".."} & set(parts):
            return False
        folder, _, name = source.rpartition("/")
        if any(folder == parent and fnmatchcase(name, glob) for parent, glob in self._globs):
            return True
        while len(folder) > len(scheme) + len("://"):
            if folder in self._urls:
                return True
            folder = folder.rpartition("/")[0]
        return False
