"""Receipts: one that gives back its text, or a `DatasetError` that names it."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz import Target
from latentcache.dataset.receipts import Receipt, UnitSummary, read_receipts
from latentcache.errors import DatasetError
from latentcache.storage import Store
from tiny import mutate_json, write_tiny


def _seeds(folder: Path) -> list[bytes]:
    texts = []
    for name in ("parquet", "safetensors"):
        output = write_tiny(folder / name, format=name)
        for path in sorted((output / "commits").iterdir()):
            texts.append(path.read_bytes())
    return texts


def _check(data: bytes, folder: Path) -> str:
    try:  # under the name that it gives itself, where it gives one that a store takes
        record = json.loads(data)["record"]
        name = f"{record['unit']['id']}-{record['generation']}"
    except (ValueError, KeyError, TypeError):
        name = ""
    if len(name) > 80 or not name.replace("-", "").isalnum() or not name.isascii():
        name = f"{'a' * 32}-0"
    store = Store(str(folder))
    store.put(f"commits/{name}.json", data)
    try:
        (receipt,) = read_receipts(store, [name])
    except DatasetError as error:
        if f"commits/{name}.json" not in str(error):
            raise
        return "DatasetError"
    finally:
        store.delete(f"commits/{name}.json")
    assert Receipt.from_bytes(receipt.to_bytes()).to_bytes() == receipt.to_bytes()
    assert UnitSummary.of(receipt.record).name == name
    return "receipt"


TARGET = Target(_seeds, _check, max_growth_mib=60, mutate=mutate_json)
