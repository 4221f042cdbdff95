"""A tiny dataset for targets to damage: hashes, sizes and the manifest agree with what was changed.

A reader that only compares hashes would accept all of it.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuzz import mutate_bytes

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from synthetic import make_contract, write_dataset

BUCKETS = ((64, 64), (96, 64))

_HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308,
    5e-324, "", "0", "x", "..", "../x", "/etc/passwd", "a" * 64, "A" * 64, "\x00", "\x1b[31m",
    "\u202e", "NaN", "64x64", "0x0", "-1x8", [], {}, [[]], {"": None}, [None], "s3://a:b@c/d",
]  # fmt: skip


def write_tiny(folder: Path, format: str = "parquet", **options: Any) -> Path:
    """Write a dataset of two units, eleven rows and two buckets into a new folder."""
    contract = make_contract(BUCKETS, format=format, **options)
    write_dataset(str(folder), contract, [dict(zip(BUCKETS, (5, 3), strict=True)), {BUCKETS[0]: 3}])
    return folder


def mutate_json(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change values, types and names of a JSON text; now and then its bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data, seeds)
    tree = json.loads(data)
    others = json.loads(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        tree = _edit(rng, tree, others)
    return json.dumps(tree).encode()


def _edit(rng: random.Random, tree: Any, others: Any) -> Any:
    """Return a JSON value with one value in it replaced, removed, added or renamed."""
    if not tree or not isinstance(tree, dict | list) or rng.random() < 0.15:
        kind = rng.random()
        if kind < 0.6:
            return copy.deepcopy(rng.choice(_HOSTILE))
        if kind < 0.8 and isinstance(tree, int | float):
            return tree + rng.choice([1, -1, 0.5, 2**40])
        if kind < 0.8 and isinstance(tree, str):
            return mutate_bytes(rng, tree.encode("utf-8", "replace"), [b"x"]).decode(
                "utf-8", "replace"
            )
        return copy.deepcopy(others)
    if isinstance(tree, list):
        index, kind = rng.randrange(len(tree)), rng.random()
        if kind < 0.1:
            return tree[:index] + tree[index + 1 :]
        if kind < 0.2:
            return [*tree, copy.deepcopy(tree[index])]
        return [*tree[:index], _edit(rng, tree[index], others), *tree[index + 1 :]]
    name, kind = rng.choice(list(tree)), rng.random()
    if kind < 0.1:
        return {key: value for key, value in tree.items() if key != name}
    if kind < 0.15:
        return {**tree, name + rng.choice(["_", "", "\x00"]): copy.deepcopy(tree[name])}
    return {**tree, name: _edit(rng, tree[name], others)}


def only(folder: Path) -> Path:
    """Return the one file of a folder."""
    (path,) = folder.iterdir()
    return path


def replace_part(folder: Path, data: bytes) -> None:
    """Replace the dataset's part; path and hash in the manifest agree."""
    only(folder / "parts").unlink()
    digest = hashlib.sha256(data).hexdigest()
    (folder / "parts" / f"{digest}.parquet").write_bytes(data)
    manifest = only(folder / "manifests")
    tree = json.loads(manifest.read_bytes())
    tree["parts"][0].update(path=f"parts/{digest}.parquet", sha256=digest)
    manifest.write_text(json.dumps(tree))


def edit_part(data: bytes, edit: Callable[[list[dict[str, Any]]], None]) -> bytes:
    """Return a manifest part with its rows edited."""
    table = pq.read_table(io.BytesIO(data))
    rows = table.to_pylist()
    edit(rows)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), buffer)
    return buffer.getvalue()


def mutate_parquet(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change any bytes, those of the footer, or those of the pages; the end mark fits again."""
    size = int.from_bytes(data[-8:-4], "little")
    pages, footer = data[: -8 - size], data[-8 - size : -8]
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, data, seeds)
    if kind == 1:
        edited = bytearray(footer)
        for _ in range(rng.choice([1, 1, 2, 3])):
            edited[rng.randrange(len(edited))] ^= 1 << rng.randrange(8)
        footer = bytes(edited)
    elif kind == 2:
        footer = mutate_bytes(rng, footer, [footer])
    else:
        edited = bytearray(pages)
        for _ in range(rng.choice([1, 1, 2, 4])):
            edited[rng.randrange(4, len(edited))] = rng.choice([0, 1, 2, 127, 128, 255])
        pages = bytes(edited)
    return pages + footer + len(footer).to_bytes(4, "little") + data[-4:]
