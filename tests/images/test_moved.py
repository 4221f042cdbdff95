"""A source that moved: reported by `plan` and `run`, and known again by `source.moved_from`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from latentcache import open_dataset, parse_config, run
from latentcache.dataset.reader import Dataset
from latentcache.engine import run as run_module
from latentcache.engine.plan import make_plan
from latentcache.images.moved import moved_of
from latentcache.images.source import shard_of
from latentcache.qa import reevaluate as qa_module
from latentcache.qa.qa_files import QaFiles
from makers import config_tree, png, write_tar
from servers import S3Server
from thread_cluster import ThreadCluster


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Cluster", ThreadCluster)


def keys(dataset: Dataset) -> list[str]:
    return sorted(row.key for row in dataset)


def tree_of(home: Path, **source: Any) -> dict[str, Any]:
    tree = config_tree(home)
    tree["source"] = source
    return tree


def write(folder: Path, name: str, *, as_tar: bool) -> None:
    if as_tar:
        write_tar(folder / f"{name}.tar", [(f"{name}.png", png(64, 64))])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(png(64, 64))


@pytest.mark.parametrize("as_tar", [True, False], ids=["shards", "folder"])
def test_plan_reports_a_renamed_folder_and_moved_from_keeps_its_rows(
    tmp_path: Path, as_tar: bool, capfd: pytest.CaptureFixture[str]
):
    old, new = tmp_path / "old", tmp_path / "deep" / "new"
    for name in ("a", "b"):
        write(old, name, as_tar=as_tar)

    def source(folder: Path, **more: Any) -> dict[str, Any]:
        kind = {"shards": f"{folder}/*.tar"} if as_tar else {"folder": f"{folder}", "num_units": 4}
        return tree_of(tmp_path, **kind, **more)

    first = run(parse_config(source(old)), quiet=True)
    assert (first.num_rows, first.status) == (2, "complete")
    new.parent.mkdir()
    old.rename(new)
    plan = make_plan(parse_config(source(new)))
    assert plan.duplicates is not None
    assert plan.duplicates.num_duplicates == plan.duplicates.num_new == len(plan.pending)
    assert plan.duplicates.moved_from == f"file://{old}"
    assert f"set source.moved_from: file://{old}" in plan.duplicates.to_text()

    moved = parse_config(source(new, moved_from=plan.duplicates.moved_from))
    plan = make_plan(moved)
    assert (plan.pending, plan.duplicates, plan.sources.num_vanished) == ([], None, 0)
    assert run(moved, quiet=True).num_committed == 0

    write(new, "c", as_tar=as_tar)
    second = run(moved, quiet=True)
    dataset = open_dataset(str(tmp_path / "out"))
    assert keys(dataset) == ["a", "b", "c"]
    assert second.num_committed == 1
    assert all(record.unit.source.startswith(f"file://{old}") for record in dataset.units)
    for record in dataset.units:
        shard = shard_of(record.unit, moved.source.storage, moved_of(moved.source))
        assert shard.url.startswith(f"file://{new}")

    shutil.rmtree(tmp_path / "out")
    run(moved, quiet=True)  # an output that knows neither has all of them once
    assert keys(open_dataset(str(tmp_path / "out"))) == ["a", "b", "c"]


def test_run_warns_about_sources_that_the_output_has_under_another_url(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    write(tmp_path / "old", "a", as_tar=True)
    run(parse_config(tree_of(tmp_path, shards=f"{tmp_path}/old/*.tar")), quiet=True)
    (tmp_path / "link").symlink_to("old")
    capfd.readouterr()
    run(parse_config(tree_of(tmp_path, shards=f"{tmp_path}/link/*.tar")))
    said = " ".join(capfd.readouterr().err.split())
    assert "1 of 1 new sources look like sources that the output has already" in said
    assert f"source.moved_from: file://{tmp_path}/old" in said


def test_a_moved_shard_that_changed_replaces_its_rows(tmp_path: Path):
    write(tmp_path / "old", "a", as_tar=True)
    run(parse_config(tree_of(tmp_path, shards=f"{tmp_path}/old/*.tar")), quiet=True)
    write_tar(tmp_path / "new" / "a.tar", [("x.png", png(64, 64)), ("y.png", png(64, 64))])
    source = {"shards": f"{tmp_path}/new/*.tar", "moved_from": str(tmp_path / "old")}
    plan = make_plan(parse_config(tree_of(tmp_path, **source)))
    assert [planned.reason for planned in plan.pending] == ["changed"]
    run(parse_config(tree_of(tmp_path, **source)), quiet=True)
    assert keys(open_dataset(str(tmp_path / "out"))) == ["x", "y"]


def test_a_new_shard_with_a_known_name_is_not_reported_as_moved(tmp_path: Path):
    write(tmp_path / "old", "a", as_tar=True)
    run(parse_config(tree_of(tmp_path, shards=f"{tmp_path}/old/*.tar")), quiet=True)
    write_tar(tmp_path / "new" / "a.tar", [("x.png", png(64, 64)), ("y.png", png(64, 64))])
    assert (
        make_plan(parse_config(tree_of(tmp_path, shards=f"{tmp_path}/new/*.tar"))).duplicates
        is None
    )


def test_a_copied_bucket_is_recognized_by_etags(tmp_path: Path, moto: S3Server):
    write(tmp_path / "src", "a", as_tar=True)
    data = (tmp_path / "src" / "a.tar").read_bytes()
    old = moto.make_bucket("moved-old", {"x/a.tar": data})
    new = moto.make_bucket("moved-new")
    storage = {"endpoint_url": moto.endpoint_url}
    run(parse_config(tree_of(tmp_path, shards=f"{old}/x/*.tar", storage=storage)), quiet=True)
    moto.client.copy_object(Bucket="moved-new", Key="y/a.tar", CopySource="moved-old/x/a.tar")
    moto.client.delete_object(Bucket="moved-old", Key="x/a.tar")
    plan = make_plan(parse_config(tree_of(tmp_path, shards=f"{new}/y/*.tar", storage=storage)))
    assert plan.duplicates is not None
    assert plan.duplicates.moved_from == f"{old}/x"
    moved = tree_of(
        tmp_path, shards=f"{new}/y/*.tar", storage=storage, moved_from=plan.duplicates.moved_from
    )
    assert not make_plan(parse_config(moved)).pending
    moto.client.put_object(Bucket="moved-new", Key="y/b.tar", Body=data)
    assert run(parse_config(moved), quiet=True).num_committed == 1


def test_qa_reads_a_moved_source_at_its_new_url(tmp_path: Path):
    write(tmp_path / "old", "a", as_tar=True)
    run(parse_config(tree_of(tmp_path, shards=f"{tmp_path}/old/*.tar")), quiet=True)
    (tmp_path / "old").rename(tmp_path / "new")
    source = {"shards": f"{tmp_path}/new/*.tar", "moved_from": str(tmp_path / "old")}
    config = parse_config(tree_of(tmp_path, **source))
    dataset = open_dataset(str(tmp_path / "out"))
    selection = qa_module.Selection(8, 1, moved=moved_of(config.source))
    (record,) = dataset.units
    result = qa_module.QaResult("demo", QaFiles(dataset.store, ()))
    crops = qa_module._fetch(dataset, record, selection, result)
    assert [key for results in crops.values() for key in results] == ["a"]
    assert not result.breaches
