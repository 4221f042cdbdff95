"""Brace patterns: names in bounded time and memory, as braceexpand makes them, or `ConfigError`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from fuzz import Target, mutate_bytes
from latentcache.errors import ConfigError
from latentcache.images.braces import count_names, expand_urls

_PARTS = [
    "{0..9}", "{000..999}", "{a..z}", "{a,b}", "{", "}", ",", "..", "{{0..9}{0..9},x}", "{9..0..2}",
    "{0..99999999999}", "\\", "\\{", "{}", "{,}", "{-1..1}", "{" * 12, "}" * 12, "{1..2..0}",
    "{a..Z}", "{0" + "0" * 30 + "..1}", "{x}", "{0..9..-3}",
]  # fmt: skip


def _seeds(folder: Path) -> list[bytes]:
    return [b"s3://b/{000000..000099}.tar", b"a{b,c{0..3}}d.tar", b"x-{a,b}/{0..9}.parquet"]


def _mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, seeds)
    text = data.decode()
    for _ in range(rng.randrange(1, 6)):
        position = rng.randrange(len(text) + 1)
        text = text[:position] + rng.choice(_PARTS) + text[position + rng.choice([0, 0, 1, 3]) :]
    return text.encode()


def _check(data: bytes, folder: Path) -> str:
    pattern = data.decode("utf-8", "replace")
    try:
        bound = count_names(pattern)
        if bound > 20_000:
            return "many"
        urls = expand_urls(pattern)
    except ConfigError:
        return "refused"
    assert len(urls) <= bound, f"{len(urls)} names, counted as {bound}"
    return "names"


TARGET = Target(_seeds, _check, max_growth_mib=60, mutate=_mutate)
