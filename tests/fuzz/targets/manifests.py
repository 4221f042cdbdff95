"""Manifests: a dataset with as many rows as its units have, or a `DatasetError`."""

from __future__ import annotations

from pathlib import Path

from fuzz import Target
from latentcache import LatentLoader, open_dataset
from latentcache.errors import DatasetError
from tiny import mutate_json, only, write_tiny


def _seeds(folder: Path) -> list[bytes]:
    return [only(write_tiny(folder / "out") / "manifests").read_bytes()]


def _check(data: bytes, folder: Path) -> str:
    output = folder / "out"
    (output / "manifests" / "00000001.json").write_bytes(data)
    try:
        dataset = open_dataset(output)
        assert len(dataset) == sum(unit.num_rows for unit in dataset.units)
        assert len(dataset.stats.std) == dataset.contract.stored_channels
        if len(dataset):
            LatentLoader(output, batch_size=1)
    except DatasetError as error:
        if str(output) not in str(error):
            raise
        return "DatasetError"
    return "dataset"


TARGET = Target(_seeds, _check, max_growth_mib=60, mutate=mutate_json)
