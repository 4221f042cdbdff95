"""URLs: a `Store`, or a `ConfigError`; a password or signature in one is never repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from fuzz import Target, mutate_bytes
from latentcache.errors import ConfigError
from latentcache.storage import Store
from latentcache.urls import SCHEMES, check_url, expand

# What the planted credentials look like; no mutation makes this text of anything else.
SECRET = "S3CRETS3CRET"

_PARTS = [
    "s3://", "S3://", "s3:/", "file:///", "file:/", "hf://", "http://", "https://", "az://", "::",
    "memory://", "pipe:", "data:", "zip://", "[::1]", "?versionId=", "?", "#", "&", "@", ":", "/",
    "~", "~daemon/", "$HOME", "${X}", "$$", "%2f", "{a,b}", "{0..9}", "*", "..", " ", "\\", "\0",
    "\x1b[31m", "\u202e", "\x9b", "\udcff", "\n", "C:\\x", ":99999", "bucket", "host.example",
]  # fmt: skip
_PLANTED = [
    f"user:{SECRET}@", f"{SECRET}:{SECRET}@", f"?X-Amz-Signature={SECRET}", f"?sig={SECRET}",
    f"?a=b&token={SECRET}", f"?x={SECRET}", f"#access_token={SECRET}",
]  # fmt: skip


def _seeds(folder: Path) -> list[bytes]:
    urls = [f"{scheme}://bucket/folder/{{0..9}}.tar" for scheme in sorted(SCHEMES)]
    urls += [f"http://{_PLANTED[0]}host/x.tar", f"s3://bucket/x.tar{_PLANTED[2]}", "/a/b.tar"]
    return [url.encode() for url in urls]


def _mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(rng, data, seeds)
    text = data.decode()
    for _ in range(rng.randrange(1, 4)):
        position = rng.randrange(len(text) + 1)
        part = rng.choice(_PARTS if rng.random() < 0.8 else _PLANTED)
        text = text[:position] + part + text[position + rng.choice([0, 0, 1, 5]) :]
    return text.encode("utf-8", "surrogateescape")


def _check(data: bytes, folder: Path) -> str:
    url = data.decode("utf-8", "surrogateescape")
    try:
        url = expand(url, {"HOME": "/home", "X": "x"})
        scheme = check_url(url)
    except ConfigError as error:
        message = str(error)
        if SECRET in message and url.count(SECRET) == 1 and any(p in url for p in _PLANTED[2:-2]):
            raise AssertionError(f"repeats a credential: {message}") from error
        if not message.isprintable():
            raise AssertionError(f"holds what a terminal acts on: {message!r}") from error
        return "refused"
    if scheme in ("http", "https") and SECRET in url:
        assert "@" not in url.partition("://")[2].partition("/")[0], f"accepts {url}"
        assert "?" not in url, f"accepts {url}"
    if scheme == "file":
        Store(url)
    return "local" if scheme == "file" else "remote"


TARGET = Target(_seeds, _check, max_growth_mib=30, mutate=_mutate)
