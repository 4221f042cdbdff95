"""Expand brace ranges and lists in shard URLs, `{000000..000099}` and `{a,b}`, within limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from webdataset.shardlists import expand_urls as expand_braces

from latentcache.errors import ConfigError, StorageError
from latentcache.storage import Store, split_url
from latentcache.storage.failures import is_final
from latentcache.storage_options import StorageOptions
from latentcache.urls import check_url, shown

# Two billion images are 200,000 shards.
_MAX_NAMES = 2_000_000
_MAX_CHARACTERS = 2**28
_MAX_PATTERN = 4096
_MAX_DEPTH = 8

_COMMAND = re.compile(r"^pipe:|^-$|[|`<>\n]|\$[({]|&&")
# An escaped character, a range of integers or letters that braceexpand recognises, or one of `{},`.
_TOKEN = re.compile(
    r"\\.|\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}|(\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\})|[{},]"
)


def named_urls(shards: str | Sequence[str], options: StorageOptions) -> list[str]:
    """Expand `shards` as `expand_urls` does, but keep a URL with braces if a file has that name.

    Args:
        shards, options: one URL or several, and how to reach the stores.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    literal = {url for url in patterns if re.search(r"[{}\\]", url) and _is_file(url, options)}
    rest = [url for url in patterns if url not in literal]
    return [*sorted(literal), *(expand_urls(rest) if rest or not literal else ())]


def _is_file(url: str, options: StorageOptions) -> bool:
    _check_pattern(url)
    if url.startswith("http"):  # HTTP servers may answer for a name that does not exist
        return False
    folder, name = split_url(url)
    try:
        return bool(Store(folder, options).info(name))
    except StorageError as error:
        if is_final(error):  # the file does not exist, or access is denied
            return False
        raise


def expand_urls(shards: str | Sequence[str]) -> list[str]:
    """Expand brace ranges and lists. Globs are kept.

    Raises:
        ConfigError: a pattern is a shell command or standard input, which WebDataset would run or
            read; `urls.check_url` refuses a URL; braces are unbalanced; there are more than two
            million names; a URL is named twice; or there is no URL.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    num_names = num_characters = 0
    for pattern in patterns:
        _check_pattern(pattern)
        count = count_names(pattern)
        num_names, num_characters = num_names + count, num_characters + count * len(pattern)
        if num_names > _MAX_NAMES or num_characters > _MAX_CHARACTERS:
            raise ConfigError(
                f"source.shards: {shown(pattern)} expands to more than {_MAX_NAMES} names: split "
                "the source into several datasets, or use larger shards"
            )
    try:
        urls = [url for pattern in patterns for url in expand_braces(pattern)]
    except ValueError as error:
        raise ConfigError(f"source.shards: {error}") from error
    if not all(urls) or not urls:
        raise ConfigError("source.shards: no shard is named: give at least one URL")
    require_distinct(urls)
    return urls


def _check_pattern(pattern: str) -> None:
    if _COMMAND.search(pattern):
        raise ConfigError(f"source.shards: {shown(pattern)!r} is a command; name files or URLs")
    try:
        check_url(pattern)
    except ConfigError as error:
        raise ConfigError(f"source.shards: {error}") from None


def require_distinct(urls: Sequence[str]) -> None:
    """Raise `ConfigError` if a URL is named twice."""
    if len(set(urls)) < len(urls):
        url = next(url for url, count in Counter(urls).items() if count > 1)
        raise ConfigError(f"source.shards: {url} is named twice: name it once")


def count_names(pattern: str) -> int:
    """Return an upper bound of the names that braces expand to; it stops above two million.

    Raises:
        ConfigError: braces are unbalanced or nested too deep, or the pattern is too long.
    """
    if len(pattern) > _MAX_PATTERN and "{" in pattern:
        raise ConfigError(
            f"source.shards: a URL with braces is longer than {_MAX_PATTERN} characters"
        )
    # For each open brace: the numbers of names of its earlier and of its current alternative.
    opened = [(0, 1)]
    for token in _TOKEN.finditer(pattern):
        total, current = opened[-1]
        factor = 1
        if token[1]:
            factor = abs(int(token[2]) - int(token[1])) // (int(token[3] or 1) or 1) + 1
        elif token[4]:
            factor = 2 * 26
        elif token[0] == "{":
            opened.append((0, 1))
            if len(opened) > _MAX_DEPTH:
                raise ConfigError(f"source.shards: {shown(pattern)} nests braces too deeply")
            continue
        elif token[0] == "," and len(opened) > 1:
            total, current = total + current, 1
        elif token[0] == "}":
            opened.pop()
            if not opened:
                break
            factor = total + current
            total, current = opened[-1]
        opened[-1] = (min(total, _MAX_NAMES + 1), min(current * factor, _MAX_NAMES + 1))
    if len(opened) != 1:
        raise ConfigError(f"source.shards: {shown(pattern)} has unbalanced braces")
    return opened[0][1]
