"""Verification: each kind of damage is reported with its object and unit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentcache import open_dataset, verify
from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import Contract, establish_contract
from latentcache.dataset.manifest import read_manifest, read_records
from latentcache.dataset.receipts import list_receipt_names, read_receipts
from latentcache.dataset.shards import RejectRow, describe_file
from latentcache.dataset.state import State, write_next
from latentcache.errors import DatasetError
from latentcache.storage import Store
from makers import commit_unit, flip_byte, make_contract, make_latents, tree_digest, write_dataset

BUCKETS = ((64, 64), (64, 96))
REJECTS = {"a.tar": [RejectRow("bad", "decode", "truncated_image", "ends early")]}


@pytest.fixture(params=["parquet", "safetensors"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    contract = make_contract(buckets=BUCKETS, format=request.param)
    latents = {bucket: make_latents(contract, bucket, 4) for bucket in BUCKETS}
    write_dataset(tmp_path, contract, {"a.tar": latents, "b.tar": latents}, REJECTS)
    return tmp_path / "out"


def test_verify_passes_an_undamaged_dataset(output: Path):
    before, steps = tree_digest(output), []
    result = verify(str(output), progress=lambda done, total: steps.append((done, total)))
    assert (result.ok, result.problems, result.repaired) == (True, [], [])
    assert (result.num_units, result.num_rows, result.num_rejects) == (2, 16, 1)
    assert result.num_files == len(list(output.glob("data/*/*"))) + 1
    assert steps == [(1, 2), (2, 2)]
    assert verify(str(output), repair=True).repaired == []
    assert tree_digest(output) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    # name: the damage, the message, whether `quick` detects it
    "deleted": (Path.unlink, "is gone", True),
    "truncated": (cut, "bytes, not", True),
    "lengthened": (lengthen, "bytes, not", True),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes, not", True),
    "flipped": (flip_byte, "its SHA-256 differs", False),
}


@pytest.mark.parametrize("kind", ["data", "rejects"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_reports_damage_once_with_its_object_and_unit(output: Path, kind: str, damage: str):
    act, expected, is_quick = DAMAGE[damage]
    path = sorted(output.glob(f"{kind}/*/*"))[-1]
    act(path)
    result = verify(str(output))
    (problem,) = result.problems
    assert not result.ok
    assert problem.path == path.relative_to(output).as_posix()
    assert problem.unit == path.parent.name
    sources = {record.unit.id: record.unit.source for record in open_dataset(str(output)).units}
    assert problem.source == sources[problem.unit]
    assert expected in problem.message
    assert verify(str(output), quick=True).ok != is_quick


def test_verify_reports_all_damage_at_once(output: Path):
    for path in output.glob("data/*/*"):
        flip_byte(path)
    result = verify(str(output))
    named = sorted(problem.path for problem in result.problems)
    assert named == sorted(p.relative_to(output).as_posix() for p in output.glob("data/*/*"))


def test_repair_removes_only_the_bad_units_and_only_once(output: Path):
    path = sorted(output.glob("data/*/*"))[0]
    path.unlink()
    before = tree_digest(output)
    repaired = verify(str(output), quick=True, repair=True)
    assert repaired.repaired == [path.parent.name]
    assert not repaired.ok
    after = tree_digest(output)
    assert after.items() > before.items()
    (name,) = after.keys() - before.keys()
    assert name == "manifests/00000002.json"
    store = Store(str(output))
    old, new = read_manifest(store, 1), read_manifest(store, 2)
    assert (new.complete, new.removed) == (False, (f"{path.parent.name}-0",))
    (left,) = read_records(store, new)
    assert left.unit.id != path.parent.name
    assert (new.num_units, new.num_rows, new.num_rejects) == (1, left.num_rows, left.num_rejects)
    assert new.statistics.count == old.statistics.count / 2
    assert verify(str(output), 2, quick=True).ok
    assert verify(str(output), quick=True, repair=True).repaired == []
    assert tree_digest(output) == after
    assert len(open_dataset(str(output))) == 16, "the complete manifest stands until the next one"
    state = State(store)
    assert state.current(path.parent.name) is None
    assert state.generation(path.parent.name) == 0


# What only a fault of ours could make: the receipt agrees with the object, but its rows are wrong.


def committed(folder: Path, contract: Contract, latents: torch.Tensor) -> Store:
    store = Store(str(folder / "out"))
    establish_contract(store, contract, {})
    commit_unit(store, contract, folder / "staging", "a.tar", {(64, 64): latents})
    return store


def publish(store: Store, contract: Contract) -> str:
    (receipt,) = read_receipts(store, list_receipt_names(store))
    snapshot = {receipt.record.unit.source: [receipt.record.unit]}
    write_next(
        State(store),
        contract.fingerprint,
        4,
        lambda: snapshot,
        on_missing="keep",
        columns=columns_of(["txt"]),
    )
    return store.url


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_reports_a_latent_that_is_not_finite(tmp_path: Path, format: str, value: float):
    contract = make_contract(format=format)
    latents = make_latents(contract, (64, 64), 3)
    latents[1, 2, 3, 4] = value
    (problem,) = verify(publish(committed(tmp_path, contract, latents), contract)).problems
    assert problem.message == "row 'k0001' is not finite"


def rewrite(store: Store, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a unit's Parquet file, and make its receipt agree in size and hash."""
    (receipt,) = read_receipts(store, list_receipt_names(store))
    (file,) = receipt.record.files
    path = Path(store.url.removeprefix("file://")) / file.path
    table = change(pq.read_table(path))
    compression = {name: "NONE" if name == "latent" else "ZSTD" for name in table.schema.names}
    pq.write_table(  # laid out as docs/format.md says
        table,
        path,
        compression=compression | {"latent_shape.list.element": "ZSTD"},
        use_dictionary=["latent_dtype"],
        write_statistics=[name for name in table.schema.names if name != "latent"],
    )
    entry = describe_file(path, file.path, file.num_rows, file.bucket)
    changed = replace(receipt, record=replace(receipt.record, files=(entry,)))
    shutil.rmtree(path.parents[2] / "commits")
    assert store.put_if_absent(changed.path, changed.to_bytes())


def with_column(name: str, index: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[index] = value
        number, field = table.schema.get_field_index(name), table.schema.field(name)
        return table.set_column(number, field, pa.array(values, field.type))

    return change


WRONG_ROWS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "one is missing": (lambda table: table.slice(1), "holds 2 rows, but the receipt says 3"),
    "a duplicate key": (with_column("key", 2, "k0000"), "row 'k0000' occurs twice"),
    "another dtype": (with_column("latent_dtype", 0, "bfloat16"), "row 'k0000' is torch.bfloat16"),
    "another shape": (with_column("latent_shape", 0, [4, 4, 16]), "[4, 4, 16]"),
    "too few bytes": (with_column("latent", 0, b"xx"), "cannot be read"),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_verify_reports_wrong_rows(tmp_path: Path, wrong: str):
    change, expected = WRONG_ROWS[wrong]
    contract = make_contract()
    store = committed(tmp_path, contract, make_latents(contract, (64, 64), 3))
    rewrite(store, change)
    result = verify(publish(store, contract))
    assert not result.ok
    assert expected in result.problems[0].message
    assert {problem.path for problem in result.problems} == {
        file.path for record in open_dataset(store.url).units for file in record.files
    }


def test_verify_raises_an_error_for_an_unreadable_manifest(output: Path):
    (part,) = (output / "parts").iterdir()
    flip_byte(part)
    with pytest.raises(DatasetError, match=part.name):
        verify(str(output))
    with pytest.raises(DatasetError, match="no manifest 7"):
        verify(str(output), 7)
