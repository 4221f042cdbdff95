"""Brace ranges and lists in URLs of shards, `{000000..000099}` and `{a,b}`, expanded in bounds."""

from __future__ import annotations

import re
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
_BRACES = re.compile(r"[{}\\]")
# As braceexpand reads them.
_INTEGERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
_MAX_DIGITS = 18


def named_urls(shards: str | Sequence[str], options: StorageOptions) -> list[str]:
    """Expand `shards` as `expand_urls` does, except where a file has the name as it is written.

    Raises:
        ConfigError: as `expand_urls`.
        StorageError: a store cannot be reached.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    literal = {url for url in patterns if _BRACES.search(url) and _is_file(url, options)}
    rest = [url for url in patterns if url not in literal]
    return [*sorted(literal), *(expand_urls(rest) if rest or not literal else ())]


def _is_file(url: str, options: StorageOptions) -> bool:
    _check_pattern(url)
    if url.startswith("http"):  # whose servers answer anything for a name that is not there
        return False
    folder, name = split_url(url)
    try:
        Store(folder, options).info(name)
    except StorageError as error:
        if is_final(error):  # not there, or no right to know
            return False
        raise
    return True


def expand_urls(shards: str | Sequence[str]) -> list[str]:
    """Expand brace ranges and lists; globs stay as they are.

    Raises:
        ConfigError: a shell command or standard input, which WebDataset would run or read; a URL
            that `urls.check_url` refuses; unbalanced braces; more than two million names; a URL
            named twice; no URL at all.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    num_names = num_characters = 0
    for pattern in patterns:
        _check_pattern(pattern)
        num_names += (num_here := count_names(pattern))
        num_characters += num_here * len(pattern)
        if num_names > _MAX_NAMES or num_characters > _MAX_CHARACTERS:
            raise ConfigError(
                f"source.shards: {shown(pattern)} comes to more than {_MAX_NAMES} names: split the "
                "source over several datasets, or use larger shards"
            )
    try:
        urls = [url for pattern in patterns for url in expand_braces(pattern)]
    except ValueError as error:
        raise ConfigError(f"source.shards: {error}") from error
    if not all(urls) or not urls:
        raise ConfigError("source.shards: names no shard; give at least one URL")
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
    """Refuse a URL that is named twice.

    Raises:
        ConfigError: one is.
    """
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ConfigError(f"source.shards: {url} is named twice")
        seen.add(url)


def count_names(pattern: str) -> int:
    """Return into how many names braces expand, at least, without making them.

    Counting stops above two million.

    Raises:
        ConfigError: braces are unbalanced or nested too deep, or the pattern is too long.
    """
    if len(pattern) > _MAX_PATTERN and "{" in pattern:
        raise ConfigError(
            f"source.shards: a URL with braces is longer than {_MAX_PATTERN} characters"
        )
    # Of each open brace: names of the alternatives before, of the current one, where it began.
    opened = [(0, 1, 0)]
    index = 0
    while index < len(pattern):
        total, current, start = opened[-1]
        match pattern[index]:
            case "\\":
                index += 1
            case "{":
                opened.append((0, 1, index + 1))
            case "," if len(opened) > 1:
                opened[-1] = (min(total + current, _MAX_NAMES + 1), 1, start)
            case "}" if len(opened) > 1:
                opened.pop()
                num_names = _range_size(pattern[start:index]) or total + current
                outer, before, outer_start = opened[-1]
                opened[-1] = (outer, min(before * num_names, _MAX_NAMES + 1), outer_start)
            case "}":
                break
        if len(opened) > _MAX_DEPTH:
            raise ConfigError(f"source.shards: {shown(pattern)} nests braces too deep")
        index += 1
    if len(opened) > 1 or index < len(pattern):
        raise ConfigError(f"source.shards: {shown(pattern)} has unbalanced braces")
    return opened[0][1]


def _range_size(text: str) -> int:
    """Count a range's names; 0 where the text is no range."""
    if match := _INTEGERS.fullmatch(text):
        if max(len(part or "") for part in match.groups()) > _MAX_DIGITS:
            return _MAX_NAMES + 1
        step = int(match[3] or 1) or 1
        return abs(int(match[2]) - int(match[1])) // step + 1
    return 26 * 2 if _LETTERS.fullmatch(text) else 0
