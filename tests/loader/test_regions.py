"""Rows are copied only from within their mapped file, which stays mapped while rows are planned."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from latentcache import LatentLoader
from latentcache.errors import DatasetError
from latentcache.loader import loader as loader_module
from latentcache.loader import rows as rows_module
from latentcache.loader.regions import Regions, Selection
from reference import assert_stored, read_rows
from synthetic import make_contract, write_dataset

SIZE = 1000


def add_file(regions: Regions[None], folder: Path, number: int) -> bytes:
    """Map a file of random bytes as a region, and delete it."""
    path, data = folder / str(number), os.urandom(SIZE)
    path.write_bytes(data)
    region = torch.from_file(str(path), shared=False, size=SIZE, dtype=torch.uint8)
    regions.add(number, region, None, SIZE)
    path.unlink()
    return data


def gather(selection: Selection, num_rows: int, size: int) -> list[bytes]:
    out = selection.gather(torch.empty((num_rows, size), dtype=torch.uint8))
    return [row.numpy().tobytes() for row in out]


def test_rows_of_many_regions_are_gathered(tmp_path: Path) -> None:
    regions = Regions[None](5, 10**9, 5)
    files = [add_file(regions, tmp_path, number) for number in range(5)]
    rng = np.random.default_rng(0)
    for size in (1, 32, SIZE):
        numbers = rng.integers(0, 5, 40)
        offsets = rng.integers(0, SIZE - size + 1, 40)
        rows = gather(regions.select(numbers, offsets, size), 40, size)
        expected = [files[n][o : o + size] for n, o in zip(numbers, offsets, strict=True)]
        assert rows == expected
    nothing = np.zeros(0, np.int64)
    assert gather(regions.select(nothing, nothing, 8), 0, 8) == []


@pytest.mark.parametrize(
    ("number", "offset"),
    [(1, SIZE - 7), (1, -1), (1, SIZE), (1, 2**40), (1, -(2**40)), (0, 0), (0, SIZE)],
)
def test_a_row_outside_of_its_region_is_an_error(tmp_path: Path, number: int, offset: int) -> None:
    regions = Regions[None](3, 10**9, 3)
    for present in (1, 2):
        add_file(regions, tmp_path, present)
    numbers, offsets = np.array([1, number, 2]), np.array([0, offset, 0])
    with pytest.raises(DatasetError, match=f"offset {offset} .*mapped file {number}"):
        regions.select(numbers, offsets, 8)


def test_a_selection_stays_readable_after_its_regions_are_dropped(tmp_path: Path) -> None:
    def num_mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f" {tmp_path}/")

    regions = Regions[None](2, 10**9, 1)
    data = add_file(regions, tmp_path, 0)
    selection = regions.select(np.array([0, 0]), np.array([0, 500]), 500)
    add_file(regions, tmp_path, 1)
    assert regions.drop(1) == [0]
    assert num_mapped() == 2
    assert b"".join(gather(selection, 2, 500)) == data
    with pytest.raises(DatasetError, match="mapped file 0"):
        regions.select(np.array([0]), np.array([0]), 1)
    del selection
    assert num_mapped() == 1


def test_the_least_recently_used_regions_are_dropped_but_none_in_use(tmp_path: Path) -> None:
    regions = Regions[None](6, 3 * SIZE, 6)
    for number in range(4):
        add_file(regions, tmp_path, number)
    assert regions.use(np.array([0, 4, 5])) == [4, 5]
    for number in (4, 5):
        add_file(regions, tmp_path, number)
    assert regions.drop(5) == [1]
    assert regions.drop(3) == [2, 3]
    assert regions.drop(0) == []


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_files_may_be_closed_and_deleted_while_batches_of_them_are_planned(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_MAX_OPEN_FILES", 1)
    monkeypatch.setattr(loader_module, "_MAX_GROUP", 2)
    write_dataset(str(tmp_path), make_contract([(64, 64)], format=format), [{(64, 64): 8}] * 8)
    rows = read_rows(tmp_path)
    stored = {"normalize": False, "dtype": torch.float16, "columns": ["unit", "key"]}
    loader = LatentLoader(str(tmp_path), batch_size=4, prefetch_bytes="1gb", **stored)
    batches = iter(loader)
    kept = [next(batches)]
    for path in tmp_path.glob("data/*/*"):
        path.unlink()

    def read_two_epochs() -> None:
        kept.extend(batches)
        kept.extend(loader)

    with pytest.raises(DatasetError, match="which the manifest lists, is gone"):
        read_two_epochs()
    for batch in kept:
        assert_stored(batch, rows)
