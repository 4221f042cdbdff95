"""Reading a dataset back: `open_dataset`, and everybody else's readers on the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from latentcache import open_dataset
from latentcache.dataset.columns import columns_of
from latentcache.dataset.layout import TORCH_DTYPES
from latentcache.dataset.reader import Dataset, RejectedRow
from latentcache.dataset.receipts import Unit
from latentcache.dataset.shards import RejectRow, tensor_bytes
from latentcache.dataset.state import State, write_next
from latentcache.errors import DatasetError, ObjectNotFound, StorageError
from latentcache.storage import Store
from makers import commit_unit, make_contract, make_latents, write_dataset

# Rows of these are given as they are stored; for int8 see test_quantization.py.
DTYPES = ("float16", "bfloat16", "float32")
BUCKETS = ((64, 64), (64, 96))
REJECTS = [
    RejectRow("bad", "decode", "truncated_image", "ends early"),
    RejectRow(None, "read", "truncated_shard", "the shard is cut"),
]
NUM_ROWS = {"a.tar": {(64, 64): 5, (64, 96): 3}, "b.tar": {}, "c.tar": {(64, 96): 2}}


def write(
    folder: Path, dtype: str = "float16", format: str = "parquet", posterior: str = "mean"
) -> Dataset:
    """Three units: two buckets; nothing but rejects; one bucket."""
    contract = make_contract(buckets=BUCKETS, dtype=dtype, format=format, posterior=posterior)
    latents = {
        source: {b: make_latents(contract, b, n, seed=n) for b, n in rows.items()}
        for source, rows in NUM_ROWS.items()
    }
    write_dataset(folder, contract, latents, {"b.tar": REJECTS})
    return open_dataset(str(folder / "out"))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write(tmp_path)


def data_files(dataset: Dataset, ending: str) -> list[str]:
    """Local paths of the dataset's files, in the order of its rows."""
    root = dataset.url.removeprefix("file://")
    files = [file for unit in dataset.units for file in unit.files]
    return [f"{root}/{file.path}" for file in files if file.path.endswith(ending)]


def bits(dataset: Dataset) -> list[tuple[str, bytes]]:
    return [(row.key, tensor_bytes(row.latent)) for row in dataset]


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_dataset_returns_the_rows_that_were_written(
    tmp_path: Path, dtype: str, format: str, posterior: str
):
    dataset = write(tmp_path, dtype, format, posterior)
    assert len(dataset) == 10
    expected = [
        (source, bucket, latent)
        for source, rows in NUM_ROWS.items()
        for bucket, n in rows.items()
        for latent in make_latents(dataset.contract, bucket, n, seed=n)
    ]
    sources = {record.unit.id: record.unit.source for record in dataset.units}
    for row, (source, bucket, latent) in zip(dataset, expected, strict=True):
        assert sources[row.unit] == source
        assert row.latent.shape == dataset.contract.latent_shape(bucket)
        assert row.latent.dtype == TORCH_DTYPES[dtype]
        assert torch.equal(row.latent, latent)
    first = dataset[1]
    assert (first.key, first.caption) == ("k0001", "caption 1 ü")
    assert (first.original_width, first.original_height) == (640, 481)
    assert (first.crop_top, first.crop_left) == (0, 7)
    assert first.columns == {"caption": "caption 1 ü"}
    assert dataset[0].caption is None


def test_dataset_is_a_sequence(dataset: Dataset):
    assert [row.key for row in dataset] == [dataset[index].key for index in range(10)]
    assert dataset[-1].key == dataset[9].key
    assert dataset[-10].key == dataset[0].key
    for index in (10, -11, 10**9):
        with pytest.raises(IndexError, match=f"row {index} of 10"):
            dataset[index]
    # Any order of asking gives the same rows.
    order = np.random.default_rng(0).permutation(10).tolist()
    assert [tensor_bytes(dataset[i].latent) for i in order] == [bits(dataset)[i][1] for i in order]


def test_latents_are_writable(dataset: Dataset):
    before = dataset[3].latent.clone()
    dataset[3].latent.zero_()
    assert torch.equal(dataset[3].latent, before)


def test_stats_cover_all_latents(dataset: Dataset):
    channels = [row.latent.double().numpy().reshape(4, -1) for row in dataset]
    values = np.concatenate(channels, axis=1)
    assert dataset.stats.count == values.shape[1]
    np.testing.assert_allclose(dataset.stats.mean, values.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(dataset.stats.std, values.std(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(dataset.stats.minimum, values.min(axis=1))
    np.testing.assert_array_equal(dataset.stats.maximum, values.max(axis=1))


def test_rejects_name_their_unit_and_source(dataset: Dataset):
    (unit,) = (record.unit.id for record in dataset.units if record.unit.source == "b.tar")
    assert list(dataset.rejects()) == [
        RejectedRow(unit, "b.tar", reject.key, reject.stage, reject.reason, reject.message)
        for reject in REJECTS
    ]
    assert dataset.manifest.num_rejects == 2


def test_dataset_with_only_rejects_is_empty(tmp_path: Path):
    write_dataset(tmp_path, make_contract(), {"b.tar": {}}, {"b.tar": REJECTS})
    dataset = open_dataset(str(tmp_path / "out"))
    assert len(dataset) == 0
    assert list(dataset) == []
    assert dataset.stats.count == 0
    with pytest.raises(IndexError):
        dataset[0]


def test_file_url_opens_the_same_folder(tmp_path: Path, dataset: Dataset):
    assert bits(open_dataset(f"file://{tmp_path}/out/")) == bits(dataset)


def add_unit(folder: Path, *, complete: bool) -> None:
    """One more manifest: a new source is listed, and encoded if `complete`."""
    store = Store(str(folder / "out"))
    dataset = open_dataset(store.url)
    contract = dataset.contract
    snapshot = {record.unit.source: [record.unit] for record in dataset.units}
    if complete:
        receipt = commit_unit(
            store,
            contract,
            folder / "staging",
            "d.tar",
            {(64, 64): make_latents(contract, (64, 64), 4, seed=99)},
        )
        snapshot["d.tar"] = [receipt.record.unit]
    else:
        snapshot["e.tar"] = [Unit.of("e.tar", 1, "v1", contract.fingerprint)]
    write_next(
        State(store),
        contract.fingerprint,
        4,
        lambda: snapshot,
        on_missing="keep",
        columns=columns_of(["txt"]),
    )


def test_open_dataset_takes_the_newest_complete_manifest_or_the_given_one(
    tmp_path: Path, dataset: Dataset
):
    add_unit(tmp_path, complete=True)
    add_unit(tmp_path, complete=False)
    url = str(tmp_path / "out")
    newest = open_dataset(url)
    assert (newest.manifest.number, len(newest)) == (2, 14)
    assert bits(newest)[:10] == bits(dataset)
    assert bits(open_dataset(url, 1)) == bits(dataset)
    unfinished = open_dataset(url, 3)
    assert not unfinished.manifest.complete
    assert bits(unfinished) == bits(newest)
    with pytest.raises(DatasetError, match="no manifest 4; it has 1 to 3"):
        open_dataset(url, 4)


def test_folder_without_a_contract_is_an_error(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"is not a latent dataset: it has no contract\.json"):
        open_dataset(str(tmp_path / "nowhere"))


def test_dataset_without_a_complete_manifest_is_an_error(tmp_path: Path, dataset: Dataset):
    manifests = tmp_path / "out" / "manifests"
    (path,) = manifests.iterdir()
    tree = json.loads(path.read_text()) | {"complete": False}
    path.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match=r"no complete manifest yet: .* name manifest 1"):
        open_dataset(dataset.url)
    path.unlink()
    with pytest.raises(DatasetError, match="no manifest yet"):
        open_dataset(dataset.url)
    with pytest.raises(DatasetError, match="no manifest 1; it has none"):
        open_dataset(dataset.url, 1)


def test_damaged_or_missing_part_is_a_named_error(tmp_path: Path, dataset: Dataset):
    (part,) = (tmp_path / "out" / "parts").iterdir()
    data = part.read_bytes()
    part.write_bytes(data[:-1] + b"x")
    with pytest.raises(DatasetError, match=rf"{part.name} is damaged"):
        open_dataset(dataset.url)
    part.unlink()
    with pytest.raises(DatasetError, match=rf"manifest 1 lists .*{part.name}, which does not"):
        open_dataset(dataset.url)


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_missing_data_file_is_a_named_error_when_read(tmp_path: Path, format: str):
    dataset = write(tmp_path, format=format)
    path = data_files(dataset, f".{format}")[0]
    os.unlink(path)
    again = open_dataset(dataset.url)
    assert again[5].key == "k0005", "rows of other files can still be read"
    with pytest.raises(ObjectNotFound, match=os.path.basename(path)):
        again[0]


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("keep_bytes", [0, 40, 400])
def test_truncated_data_file_is_a_named_error_when_read(
    tmp_path: Path, format: str, keep_bytes: int
):
    dataset = write(tmp_path, format=format)
    path = Path(data_files(dataset, f".{format}")[0])
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(DatasetError, match=path.name):
        open_dataset(dataset.url)[0]


def test_overwritten_page_is_a_named_error_when_read(tmp_path: Path, dataset: Dataset):
    path = Path(data_files(dataset, ".parquet")[0])
    data = bytearray(path.read_bytes())
    data[4:24] = b"\xff" * 20  # the first page's header
    path.write_bytes(data)
    # Arrow raises an OSError here, as a store that cannot be read would.
    with pytest.raises((DatasetError, StorageError), match=path.name):
        open_dataset(dataset.url)[0]


def test_data_file_with_too_few_rows_is_an_error(tmp_path: Path, dataset: Dataset):
    """An IndexError would end the iteration."""
    many, few = (Path(path) for path in data_files(dataset, ".parquet")[:2])
    many.write_bytes(few.read_bytes())
    with pytest.raises(DatasetError, match=rf"{many.name} is damaged: 3 rows, not 5"):
        list(open_dataset(dataset.url))


def test_damaged_rejects_file_is_a_named_error(tmp_path: Path, dataset: Dataset):
    (path,) = (tmp_path / "out" / "rejects").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DatasetError, match=path.name):
        list(dataset.rejects())


def test_reading_starts_no_arrow_scanner_threads(dataset: Dataset):
    """Arrow's threads may outlive the interpreter, which then aborts the process."""
    code = (
        "import sys, latentcache\n"
        f"dataset = latentcache.open_dataset({dataset.url!r})\n"
        "assert len(list(dataset)) == 10 and len(list(dataset.rejects())) == 2\n"
        "assert 'pyarrow.parquet' in sys.modules and 'pyarrow.dataset' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Everybody else.


@pytest.fixture(params=DTYPES)
def of_dtype(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    return write(tmp_path, dtype=request.param)


def test_duckdb_reads_equal_latents(of_dtype: Dataset):
    with duckdb.connect() as connection:
        result = connection.execute(
            "SELECT key, latent FROM read_parquet($files)",
            {"files": data_files(of_dtype, ".parquet")},
        ).fetchall()
        (width,) = connection.execute(
            "SELECT sum(original_width) FROM read_parquet($files)",
            {"files": data_files(of_dtype, ".parquet")},
        ).fetchone()
    assert result == bits(of_dtype)
    assert width == 640 * 10


def test_polars_reads_equal_latents(of_dtype: Dataset):
    frame = pl.read_parquet(data_files(of_dtype, ".parquet"))
    assert list(frame.select("key", "latent").iter_rows()) == bits(of_dtype)
    assert frame["caption"].null_count() == 3


def test_pandas_reads_equal_latents(of_dtype: Dataset):
    frame = pd.concat(pd.read_parquet(path) for path in data_files(of_dtype, ".parquet"))
    assert list(zip(frame["key"], frame["latent"], strict=True)) == bits(of_dtype)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@pytest.mark.usefixtures("offline_hub")
def test_hf_datasets_reads_equal_latents(of_dtype: Dataset, tmp_path: Path):
    import datasets  # reads its environment once, when it is imported

    loaded = datasets.load_dataset(
        "parquet",
        data_files=data_files(of_dtype, ".parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert [(row["key"], row["latent"]) for row in loaded] == bits(of_dtype)
    row, expected = loaded[7], of_dtype[7]
    latent = torch.frombuffer(bytearray(row["latent"]), dtype=expected.latent.dtype)
    assert torch.equal(latent.reshape(row["latent_shape"]), expected.latent)


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_equal_latents(tmp_path: Path, dtype: str):
    dataset = write(tmp_path, dtype=dtype, format="safetensors")
    paths = data_files(dataset, ".safetensors")
    if dtype == "bfloat16":  # numpy has no such type
        loaded = [safetensors.torch.load_file(path)["latents"] for path in paths]
        result = [tensor_bytes(latent) for latents in loaded for latent in latents]
    else:
        arrays = [safetensors.numpy.load_file(path)["latents"] for path in paths]
        assert {array.dtype for array in arrays} == {np.dtype(dtype)}
        result = [latent.tobytes() for latents in arrays for latent in latents]
    keys = pl.read_parquet(data_files(dataset, ".rows.parquet"))["key"].to_list()
    assert list(zip(keys, result, strict=True)) == bits(dataset)
