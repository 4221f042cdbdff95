"""`LatentDataset`: rows by index, under PyTorch's own `DataLoader` and its workers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

from latentcache import LatentDataset, LatentLoader, open_dataset
from latentcache.errors import ConfigError, DatasetError
from servers import S3Server
from synthetic import make_contract, write_dataset

pytestmark = pytest.mark.slow

SMALL, TALL = (64, 64), (64, 96)
UNITS = [{SMALL: 9, TALL: 5}, {SMALL: 3}, {TALL: 4}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped") / "dataset"
    write_dataset(str(folder), make_contract([SMALL, TALL]), UNITS, keep=["txt", "cls"])
    return folder


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_rows_are_those_of_open_dataset(tmp_path: Path, format: str) -> None:
    contract = make_contract([SMALL, TALL], format=format)
    write_dataset(str(tmp_path), contract, UNITS, keep=["txt", "cls"])
    dataset = LatentDataset(str(tmp_path), columns=["unit", "key", "caption", "cls"])
    expected = open_dataset(str(tmp_path))
    assert len(dataset) == len(expected) == 21
    for index, row in enumerate(expected):
        actual = dataset[index]
        scaled = row.latent.numpy().astype(np.float64) * contract.vae.scaling_factor
        np.testing.assert_allclose(actual["latents"].numpy(), scaled, rtol=1e-6)
        assert (actual["unit"], actual["key"]) == (row.unit, row.key)
        assert (actual["caption"], actual["cls"]) == (row.caption, row.columns["cls"])
        assert actual["original_size"].tolist() == [row.original_height, row.original_width]
        assert actual["crop_top_left"].tolist() == [row.crop_top, row.crop_left]
        width, height = dataset.buckets[int(dataset.bucket_of[index])]
        assert actual["target_size"].tolist() == [height, width]
        assert actual["latents"].shape == (4, height // 8, width // 8)
    assert torch.equal(dataset[-1]["latents"], dataset[20]["latents"])
    for outside in (21, -22, 10**12):
        with pytest.raises(IndexError, match=f"row {outside} of 21"):
            dataset[outside]
        with pytest.raises(IndexError, match=f"row {outside} of 21"):
            dataset.__getitems__([20, outside, 0])


def test_getitems_returns_rows_in_the_requested_order(folder: Path) -> None:
    dataset = LatentDataset(str(folder), normalize=False, dtype=torch.float16)
    asked = [20, 0, 7, 7, 13, -1, -21, 2]
    for index, row in zip(asked, dataset.__getitems__(asked), strict=True):
        assert torch.equal(row["latents"], dataset[index]["latents"])
        assert row["caption"] == dataset[index]["caption"]


def test_missing_columns_datasets_and_manifests_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'nope'"):
        LatentDataset(str(folder), columns=["nope"])
    with pytest.raises(DatasetError, match="not a latent dataset"):
        LatentDataset(str(tmp_path))
    with pytest.raises(DatasetError, match="no manifest 7"):
        LatentDataset(str(folder), manifest=7)


def test_a_missing_file_is_named_and_read_once_it_is_restored(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), make_contract([SMALL]), [{SMALL: 2}, {SMALL: 2}])
    dataset = LatentDataset(str(tmp_path))
    path = tmp_path / open_dataset(str(tmp_path)).units[1].files[0].path
    path.rename(tmp_path / "away")
    assert dataset[1]
    for _ in range(2):
        with pytest.raises(DatasetError, match=f"{path}, which the manifest lists, is gone"):
            dataset.__getitems__([0, 2])
    (tmp_path / "away").rename(path)
    assert len(dataset.__getitems__([0, 2])) == 2


class ByBucket(Sampler[list[int]]):
    """What a user writes to have batches of one bucket."""

    def __init__(self, dataset: LatentDataset, batch_size: int) -> None:
        self._dataset = dataset
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for bucket in range(len(self._dataset.buckets)):
            rows = torch.nonzero(self._dataset.bucket_of == bucket).flatten()
            yield from (part.tolist() for part in rows.split(self._batch_size))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_with_spawned_workers(folder: Path, num_workers: int) -> None:
    dataset = LatentDataset(str(folder), columns=["caption"])
    assert dataset[0]["caption"]  # what is open here is not sent to workers
    loader = DataLoader(
        dataset,
        batch_sampler=ByBucket(dataset, 4),
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    batches = list(loader)
    captions = [caption for batch in batches for caption in batch["caption"]]
    assert sorted(captions) == sorted(row.caption for row in open_dataset(str(folder)))
    by_caption = {dataset[i]["caption"]: dataset[i]["latents"] for i in range(21)}
    for batch in batches:
        for caption, latents in zip(batch["caption"], batch["latents"], strict=True):
            assert torch.equal(latents, by_caption[caption])


# A process of its own: what pytest has imported has threads, with which one should not fork.
FORKING = """
import json, sys, warnings
import torch
from torch.utils.data import DataLoader
from latentcache import LatentDataset, StorageOptions

if __name__ == "__main__":
    url, endpoint, cache = sys.argv[1:]
    storage = StorageOptions(endpoint_url=endpoint or None)
    dataset = LatentDataset(url, columns=["caption"], storage=storage, cache_dir=cache)
    first = dataset[0]["caption"]  # opened before the fork: threads, maps, a client
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    loader = DataLoader(
        dataset, batch_size=3, collate_fn=list, num_workers=2, multiprocessing_context="fork"
    )
    rows = [row for batch in loader for row in batch]
    print(json.dumps([[row["caption"], row["latents"].sum().item()] for row in rows]))
"""


def read_forking(url: str, endpoint: str, cache: Path) -> list[tuple[str, float]]:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, url, endpoint, str(cache)],
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    return [(caption, total) for caption, total in json.loads(done.stdout)]


def expected_sums(folder: Path) -> list[tuple[str, float]]:
    dataset = LatentDataset(str(folder))
    return [
        (row["caption"], row["latents"].sum().item()) for row in (dataset[i] for i in range(21))
    ]


def test_a_data_loader_with_forked_workers(folder: Path, tmp_path: Path) -> None:
    assert read_forking(str(folder), "", tmp_path) == expected_sums(folder)


def test_forked_workers_read_from_a_store(folder: Path, tmp_path: Path, moto: S3Server) -> None:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    objects = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    url = moto.make_bucket("mapped", objects)
    assert read_forking(url, moto.endpoint_url, tmp_path) == expected_sums(folder)
    assert (
        len(list(tmp_path.iterdir())) == 4
    )  # one for each data file, whichever process fetched it


def test_a_pickled_dataset_reads_the_same_rows(folder: Path) -> None:
    dataset = LatentDataset(str(folder))
    dataset[3]
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["latents"], dataset[3]["latents"])
    assert again[3]["caption"] == dataset[3]["caption"]


def test_draws_from_moments_use_torchs_generator(tmp_path: Path) -> None:
    def moments(number: int, bucket: tuple[int, int], num_rows: int) -> torch.Tensor:
        mean = torch.full((num_rows, 4, 8, 8), 2.0)
        return torch.cat([mean, torch.full_like(mean, 2 * np.log(0.5))], dim=1)

    contract = make_contract([SMALL], posterior="moments", dtype="float32")
    write_dataset(str(tmp_path), contract, [{SMALL: 40}], latents=moments)
    dataset = LatentDataset(str(tmp_path), normalize=False)
    torch.manual_seed(0)
    first = torch.stack([row["latents"] for row in dataset.__getitems__(range(40))])
    second = torch.stack([row["latents"] for row in dataset.__getitems__(range(40))])
    torch.manual_seed(0)
    again = torch.stack([row["latents"] for row in dataset.__getitems__(range(40))])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert first.shape == (40, 4, 8, 8)
    assert abs(first.mean() - 2) < 0.02
    assert abs(first.std() - 0.5) < 0.02


def test_the_loader_reads_the_same_rows(folder: Path) -> None:
    dataset = LatentDataset(str(folder), columns=["caption"])
    rows = {row["caption"]: row for row in dataset.__getitems__(range(21))}
    for batch in LatentLoader(str(folder), batch_size=4, columns=["caption"]):
        for caption, latents in zip(batch.columns["caption"], batch.latents, strict=True):
            assert torch.equal(latents, rows[caption]["latents"])
