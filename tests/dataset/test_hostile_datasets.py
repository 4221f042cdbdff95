"""Datasets that lie, with hashes that agree: a `DatasetError` that names the file, or the rows."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentcache import LatentDataset, LatentLoader, open_dataset, verify
from latentcache.dataset.receipts import read_failures
from latentcache.engine.lease import active_runs
from latentcache.errors import ConfigError, DatasetError
from latentcache.storage import Store
from synthetic import make_contract, write_dataset

BUCKET = (64, 64)


def write(folder: Path, format: str = "parquet", num_rows: int = 7) -> Path:
    contract = make_contract([BUCKET], format=format)
    write_dataset(str(folder), contract, [{BUCKET: num_rows}, {BUCKET: 3}])
    return folder


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    (path,) = (folder / "manifests").iterdir()
    tree = json.loads(path.read_bytes())
    edit(tree)
    path.write_text(json.dumps(tree))


def edit_part(folder: Path, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change a manifest part's rows, and make path, hash and count of the manifest agree."""
    (path,) = (folder / "parts").iterdir()
    table = pq.read_table(path)
    rows = table.to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(path.with_name(f"{digest}.parquet"))
    named = {"path": f"parts/{digest}.parquet", "sha256": digest, "num_units": len(rows)}
    edit_manifest(folder, lambda tree: tree["parts"][0].update(named))


PARTS = {
    "a path outside": lambda rows: rows[0]["files"][0].update(path="../x.parquet"),
    "an absolute path": lambda rows: rows[0]["files"][0].update(path="/etc/passwd"),
    "a file of another unit": lambda rows: rows[0]["files"][0].update(rows[1]["files"][0]),
    "a hash that is a path": lambda rows: rows[0]["files"][0].update(sha256="/tmp/victim"),
    "a negative count": lambda rows: rows[0].update(num_rows=-1),
    "rows beyond the file": lambda rows: rows[0]["files"][0].update(num_rows=2**50),
    "an unknown bucket": lambda rows: rows[0]["files"][0].update(bucket="8x8"),
    "no bucket": lambda rows: rows[0]["files"][0].update(bucket=""),
    "a unit twice": lambda rows: rows.append(rows[0]),
    "no files": lambda rows: rows[0].update(files=None),
    "QA that is no JSON": lambda rows: rows[0].update(qa="{"),
}


@pytest.mark.parametrize("edit", PARTS.values(), ids=PARTS.keys())
def test_part_with_invalid_values_is_a_dataset_error(
    tmp_path: Path, edit: Callable[[list[dict[str, Any]]], None]
) -> None:
    edit_part(write(tmp_path), edit)

    def read() -> None:
        verify(str(tmp_path))
        list(LatentLoader(str(tmp_path), batch_size=1))

    with pytest.raises(DatasetError):
        read()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", 7),
        ("num_rows", "1"),
        ("num_rows", -1),
        ("num_rows", 10**30),
        ("complete", 1),
        ("removed", ["../x-0"]),
        ("buckets", {"64x64": None}),
        ("statistics", {"mean": 3}),
        ("parts", [{"path": "../s.parquet", "sha256": "0" * 64, "num_units": 1}]),
        ("created_at", "\ud800"),
        ("stale", [[[]]]),
        ("unknown", 1),
    ],
)
def test_manifest_with_invalid_values_is_a_named_error(
    tmp_path: Path, name: str, value: object
) -> None:
    edit_manifest(write(tmp_path), lambda tree: tree.update({name: value}))
    with pytest.raises(DatasetError, match=r"manifests/00000001\.json"):
        open_dataset(tmp_path)


def test_verify_reports_totals_that_differ_from_the_units(tmp_path: Path) -> None:
    edit_manifest(write(tmp_path), lambda tree: tree.update(num_rows=11))
    (problem,) = verify(str(tmp_path), quick=True).problems
    assert (problem.path, "totals" in problem.message) == ("manifests/00000001.json", True)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a": NaN}', b"\xff", b"3", b'"\\ud800"'])
def test_contract_file_with_invalid_json_is_a_named_error(tmp_path: Path, data: bytes) -> None:
    write(tmp_path)
    (tmp_path / "contract.json").write_bytes(data)
    with pytest.raises(DatasetError, match=r"contract\.json"):
        open_dataset(tmp_path)


def test_row_groups_beside_safetensors_must_have_the_size_of_the_format(tmp_path: Path) -> None:
    write(tmp_path, "safetensors", num_rows=1100)
    path = max((tmp_path / "data").rglob("*.rows.parquet"), key=lambda p: p.stat().st_size)
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table.slice(0, 1))
        writer.write_table(table.slice(1), row_group_size=2000)
    data = path.read_bytes()
    name = path.relative_to(tmp_path).as_posix()

    def agree(rows: list[dict[str, Any]]) -> None:
        (file,) = (file for row in rows for file in row["files"] if file["path"] == name)
        file.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_part(tmp_path, agree)
    with pytest.raises(DatasetError, match="row groups"):
        list(LatentLoader(str(tmp_path), batch_size=100))
    assert any("row groups" in problem.message for problem in verify(str(tmp_path)).problems)


def test_unreadable_leases_and_failure_hints_raise_no_error(tmp_path: Path) -> None:
    store = Store(write(tmp_path))
    for number, data in enumerate((b"{", b"[]", b'{"pid": "x"}', b"\xff", b"")):
        store.put(f"runs/{number}.json", data)
    runs = active_runs(store)
    assert [run.run for run in runs] == ["0", "1", "2", "3", "4"], (
        "an unreadable lease counts as active"
    )
    for info in (tmp_path / "runs").iterdir():
        os.utime(info, (1e9, 1e9))
    assert active_runs(store) == []
    hint = f"failures/{'a' * 32}-{'b' * 32}.json"
    for data in (b"{", b'{"unit": 3}', b""):
        store.put(hint, data)
        assert read_failures(store, [hint]) == {}


def test_readers_accept_paths_slices_tensor_indices_and_pickling(tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(write(tmp_path))))
    assert [row.key for row in dataset[-2:]] == [dataset[8].key, dataset[torch.tensor(-1)].key]
    with pytest.raises(TypeError, match="an integer or a slice"):
        dataset["0"]
    mapped = LatentDataset(tmp_path, columns=["key", "caption"])
    assert [row["key"] for row in mapped[1:3]] == [row.key for row in dataset[1:3]]
    loader = pickle.loads(pickle.dumps(LatentLoader(tmp_path, batch_size=2)))
    assert sum(map(len, loader)) == 10


def test_forked_process_reads_after_its_parent(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path))
    loader, mapped = LatentLoader(tmp_path, batch_size=2), LatentDataset(tmp_path)
    batches = iter(loader)
    next(batches), mapped[0], dataset[0]
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        result = [sum(map(len, loader)), len(mapped[:]), len(dataset[:])]
        try:
            next(batches)
        except ConfigError:
            result.append(1)
        os.write(write_end, json.dumps(result).encode())
        os._exit(0)
    os.close(write_end)
    assert json.loads(os.read(read_end, 1000)) == [10, 10, 10, 1]
    os.close(read_end)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(batches)) == 4, "the parent goes on"


def test_rank_and_world_size_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = LatentLoader(tmp_path, batch_size=2)
    assert (loader.rank, loader.world_size) == (1, 2)
    for rank in ("2", "x", "-1", ""):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ConfigError, match="RANK"):
            LatentLoader(tmp_path, batch_size=2)


def test_missing_gpu_is_a_config_error(tmp_path: Path) -> None:
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ConfigError, match="device"):
            LatentLoader(write(tmp_path / device[:4]), batch_size=2, device=device)
