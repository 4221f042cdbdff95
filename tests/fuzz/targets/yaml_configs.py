"""YAML configs: a config, or a `ConfigError`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from fuzz import Target, mutate_bytes
from latentcache.config import load_config
from latentcache.errors import ConfigError

_CONFIGS = Path(__file__).parents[3] / "configs"
_TOKENS = [
    b"&a", b"*a", b"<<: *a", b"!!python/object/apply:os.system", b"2001-99-99", b"0x_", b"0b_",
    b"? [a]", b"? {a: b}", b"- ", b": ", b"|", b">", b"{", b"}", b"[", b"]", b"\t", b"!!binary x",
    b"!!int x", b"!!float x", b"!!set {a}", b"!!timestamp x", b"1e999", b"9" * 5000, b"---\n",
    b"\x00", b"\xff", b"190:20:30", b"!!omap [a]", b"!!bool x", b"=", b"!!pairs x", b".nan",
]  # fmt: skip


def _seeds(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(_CONFIGS.glob("*.yaml"))]


def _mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    lines = data.split(b"\n")
    index, kind = rng.randrange(len(lines)), rng.random()
    if kind < 0.5:
        name, colon, _ = lines[index].partition(b": ")
        token = rng.choice(_TOKENS)
        lines[index] = name + b": " + token if colon else token + lines[index]
    elif kind < 0.7:
        lines.insert(index, rng.choice(_TOKENS))
    else:
        return mutate_bytes(rng, data, seeds)
    return b"\n".join(lines)


def _check(data: bytes, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_bytes(data)
    try:
        load_config(path)
    except ConfigError:
        return "ConfigError"
    return "config"


TARGET = Target(_seeds, _check, max_growth_mib=100, mutate=_mutate)
