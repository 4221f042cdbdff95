"""Manifest parts whose hash agrees: units that can be read, or a `DatasetError`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fuzz import Target
from latentcache import LatentLoader, open_dataset, verify
from latentcache.dataset.manifest import read_files
from latentcache.errors import DatasetError
from tiny import edit_part, mutate_json, mutate_parquet, only, replace_part, write_tiny

_NUMBERS = [0, 1, -1, 2, 7, 2**31 - 1, 2**53, 2**62, 2**63 - 1, -(2**63)]
_TEXTS = ["", "x", "..", "../x", "/etc/passwd", "null", "{", "[]", "\x00", "8x8", "64x64", "a" * 64]


def _seeds(folder: Path) -> list[bytes]:
    return [only(write_tiny(folder / "out") / "parts").read_bytes()]


def _mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change the file's bytes, or values of its rows."""
    if rng.random() < 0.4:
        return mutate_parquet(rng, data, seeds)

    def edit(rows: list[dict[str, Any]]) -> None:
        for _ in range(rng.choice([1, 1, 2, 3])):
            if rng.random() < 0.1:
                rows.append(dict(rng.choice(rows)))
            tree: Any = rng.choice(rows)
            while True:
                name = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
                value = tree[name]
                if not value or not isinstance(value, dict | list) or rng.random() < 0.1:
                    break
                tree = value
            tree[name] = _replacement(rng, value)

    try:
        return edit_part(data, edit)
    except (pa.ArrowException, TypeError, ValueError):  # of another type than the schema's
        return mutate_parquet(rng, data, seeds)


def _replacement(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.15:
        return None
    if isinstance(value, str):
        is_json = value[:1] in ("{", "[")
        if is_json and rng.random() < 0.7:
            return mutate_json(rng, value.encode(), [value.encode()]).decode("utf-8", "replace")
        return rng.choice(_TEXTS)
    if isinstance(value, list):
        return rng.choice([[], value + value[:1], value[1:]])
    return rng.choice(_NUMBERS)


def _check(data: bytes, folder: Path) -> str:
    output = folder / "out"
    replace_part(output, data)
    try:
        dataset = open_dataset(output)
        records = list(dataset.units)
        assert len(records) == len(dataset.units)
        num_files = read_files(dataset.store, dataset.manifest).num_rows
        assert num_files == sum(len(record.files) for record in records)
        is_good = verify(str(output), quick=True).ok
        if len(dataset):
            next(iter(LatentLoader(output, batch_size=1)))
    except DatasetError:
        return "DatasetError"
    return "good" if is_good else "problems"


TARGET = Target(_seeds, _check, max_growth_mib=80, mutate=_mutate)
