"""Kept columns: fields that no sample has, and other columns around the latents that are stored."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import latentcache
from latentcache import Config, Dataset, LatentDataset, LatentLoader, RunSummary
from latentcache.dataset.columns import columns_of
from latentcache.dataset.publish import publish
from latentcache.dataset.receipts import Receipt
from latentcache.dataset.shards import tensor_bytes
from latentcache.dataset.verify import verify
from latentcache.engine import kept_fields as fields_module
from latentcache.engine import run as run_module
from latentcache.engine import worker as worker_module
from latentcache.engine.gc import collect_unreferenced
from latentcache.engine.job import UnitFailure, UnitTask
from latentcache.engine.status import read_status
from latentcache.engine.worker import ActorRunner
from latentcache.errors import CheckFailed, ConfigError
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions
from makers import config_tree, flip_byte, png, write_tar
from thread_cluster import ThreadCluster

pytestmark = pytest.mark.slow

KINDS = ["tar", "folder", "parquet"]


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Cluster", ThreadCluster)


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on nothing can load an encoder."""

    def forbid() -> None:
        def load(*_: object) -> None:
            raise AssertionError("an encoder was loaded")

        monkeypatch.setattr(worker_module, "load_runner", load)

    return forbid


Sample = dict[str, bytes]


def make_samples(first: int, num: int) -> dict[str, Sample]:
    """Samples of two shapes, with captions, JSON and class numbers; the second one is damaged."""
    samples = {}
    for index in range(first, first + num):
        sides = (70, 64) if index % 3 else (64, 110)
        image = png(*sides, index) if index % 5 != 1 else b"\x89PNG\r\n\x1a\nno image"
        caption, tree = f"caption {index} ü".encode(), json.dumps({"n": index}).encode()
        fields = {"png": image, "txt": caption, "json": tree, "cls": b"%d" % index}
        if index % 4 == 3:
            del fields["txt"]
        samples[f"k{index:03d}"] = fields
    return samples


def write_source(folder: Path, kind: str, num_shards: int, num_samples: int) -> dict[str, Any]:
    """Write a source of a kind; return the config's section `source`."""
    source = folder / "src"
    source.mkdir(exist_ok=True)
    for number in range(num_shards):
        samples = make_samples(number * num_samples, num_samples)
        files = [
            (f"{key}.{name}", d) for key, fields in samples.items() for name, d in fields.items()
        ]
        if kind == "tar":
            write_tar(source / f"{number:03d}.tar", files)
        elif kind == "folder":
            for name, data in files:
                (source / name).write_bytes(data)
        else:
            _write_parquet(source / f"{number:03d}.parquet", samples)
    if kind == "folder":
        return {"folder": str(source), "num_units": num_shards}
    return {"shards": f"{source}/*.{kind}"} | ({"image": ["image"]} if kind == "parquet" else {})


def _write_parquet(path: Path, samples: dict[str, Sample]) -> None:
    rows = [
        {
            "image": {"bytes": fields["png"], "path": f"{key}.png"},
            "txt": fields["txt"].decode() if "txt" in fields else None,
            "json": fields["json"].decode(),
            "cls": int(fields["cls"]),
        }
        for key, fields in samples.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def make_config(
    folder: Path, source: dict[str, Any], keep: list[str], **sections: dict[str, Any]
) -> Config:
    fixed: dict[str, dict[str, Any]] = {
        "transform": {"resolution_px": 64, "buckets": [[64, 64], [64, 96]]},
        "rejects": {"max_rate": 1},
        "compute": {"decode_threads": 1},
    }
    tree = config_tree(folder, **fixed | sections)
    tree["source"] = source | {"keep": keep}
    return latentcache.parse_config(tree)


def run(config: Config, **options: Any) -> RunSummary:
    return latentcache.run(config, quiet=True, **options)


Rows = dict[str, tuple[Any, ...]]


def rows_of(dataset: Dataset) -> Rows:
    """Key to everything but the columns; the bits of the latents included."""
    return {
        row.key: (
            row.unit,
            tensor_bytes(row.latent),
            row.original_width,
            row.original_height,
            row.crop_top,
            row.crop_left,
        )
        for row in dataset
    }


def columns_in(dataset: Dataset) -> dict[str, dict[str, Any]]:
    return {row.key: row.columns for row in dataset}


def rejects_in(dataset: Dataset) -> list[tuple[Any, ...]]:
    return [(r.unit, r.key, r.stage, r.reason, r.message, r.thumbnail) for r in dataset.rejects()]


def expected_columns(samples: dict[str, Sample], keep: list[str]) -> dict[str, dict[str, Any]]:
    actual = {}
    for key, fields in samples.items():
        texts = {name: fields[name].decode() if name in fields else None for name in keep}
        actual[key] = {
            "caption" if name == "txt" else name: int(text) if name == "cls" and text else text
            for name, text in texts.items()
        }
    return actual


@pytest.mark.parametrize(
    ("kind", "format", "dtype"),
    [
        ("tar", "parquet", "float16"),
        ("tar", "safetensors", "int8"),
        ("folder", "safetensors", "bfloat16"),
        ("parquet", "parquet", "int8"),
    ],
)
def test_changed_kept_columns_are_rewritten_without_encoding(
    tmp_path: Path, no_encoder: Callable[[], None], kind: str, format: str, dtype: str
):
    source = write_source(tmp_path, kind, 2, 10)
    latents = {"format": format, "dtype": dtype}
    qa = {"fraction": 0.2, "min_psnr_db": 0}
    before = make_config(tmp_path, source, ["txt"], latents=latents, qa=qa)
    assert run(before).status == "complete"
    first = latentcache.open_dataset(before.output.url)
    rows, rejects = rows_of(first), rejects_in(first)
    assert rejects

    after = make_config(tmp_path, source, ["cls", "json"], latents=latents, qa=qa)
    plan = latentcache.make_plan(after)
    assert not plan.diff
    assert {(p.kind, p.generation, p.reason) for p in plan.pending} == {
        ("rewrite", 1, "kept columns changed: [txt] -> [cls, json]")
    }
    stored = sum(f.size_bytes for unit in first.units for f in unit.files)
    assert plan.num_bytes_rewritten == stored

    no_encoder()
    summary = run(after)
    assert (summary.status, summary.num_committed) == ("complete", len(plan.units))
    second = latentcache.open_dataset(before.output.url)
    assert second.columns == ["cls", "json"]
    assert rows_of(second) == rows
    assert rejects_in(second) == rejects
    samples = make_samples(0, 20)
    expected = expected_columns(samples, ["cls", "json"])
    assert columns_in(second) == {key: expected[key] for key in rows}
    assert [unit.generation for unit in second.units] == [1] * len(second.units)
    assert second.stats.to_json() == first.stats.to_json()
    assert [u.qa and u.qa.num_rows for u in second.units] == [
        u.qa and u.qa.num_rows for u in first.units
    ]
    assert verify(before.output.url).ok
    assert run(after).num_committed == 0, "a second run has nothing to do"

    old = latentcache.open_dataset(before.output.url, 1)
    assert columns_in(old) == {k: expected_columns(samples, ["txt"])[k] for k in rows}
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (time.time() - 8 * 86400,) * 2)
    collect_unreferenced(before.output.url, delete=True, keep_last=1)
    named = {f.path for u in second.units for f in (*u.files, u.rejects, u.qa and u.qa.file) if f}
    out = tmp_path / "out"
    left = {
        str(path.relative_to(out))
        for name in ("data", "rejects", "qa")
        for path in out.glob(f"{name}/*/*")
    }
    assert left == named
    assert rows_of(latentcache.open_dataset(before.output.url)) == rows


def test_rewrite_rejects_a_sample_whose_new_field_is_bad(
    tmp_path: Path, no_encoder: Callable[[], None]
):
    files = [
        (f"{i}.{name}", data)
        for i in range(4)
        for name, data in make_samples(i, 1)[f"k00{i}"].items()
    ]
    files = [(name, b"many" if name == "2.cls" else data) for name, data in files]
    write_tar(tmp_path / "src" / "0.tar", files)
    source = {"shards": f"{tmp_path}/src/*.tar"}
    run(make_config(tmp_path, source, ["txt"]))
    url = str(tmp_path / "out")
    before = rows_of(latentcache.open_dataset(url))
    assert before.keys() == {"0", "2", "3"}
    no_encoder()
    summary = run(make_config(tmp_path, source, ["txt", "cls"]))
    assert (summary.num_rows, summary.num_rejects) == (2, 2)
    dataset = latentcache.open_dataset(url)
    assert rows_of(dataset) == {key: row for key, row in before.items() if key != "2"}
    assert [(r.key, r.stage, r.reason) for r in dataset.rejects()] == [
        ("1", "decode", "truncated_image"),
        ("2", "read", "bad_field"),
    ]
    latents = torch.stack([row.latent.float() for row in dataset]).double()
    torch.testing.assert_close(
        torch.from_numpy(dataset.stats.mean), latents.mean((0, 2, 3)), atol=1e-3, rtol=0
    )
    assert verify(url).ok


def test_rewrite_reads_ungrouped_tars_with_masks(tmp_path: Path, no_encoder: Callable[[], None]):
    members = [
        *((f"{i}.png", png(64, 64, i)) for i in range(3)),
        *((f"{i}.mask.png", png(64, 64, 9)) for i in range(3)),
        *((f"{i}.txt", f"text {i}".encode()) for i in range(3)),
        *((f"{i}.json", b"{}") for i in range(2)),
    ]
    write_tar(tmp_path / "src" / "0.tar", members)
    source = {"shards": f"{tmp_path}/src/*.tar"}
    run(make_config(tmp_path, source, ["txt"]))
    url = str(tmp_path / "out")
    first = latentcache.open_dataset(url)
    no_encoder()
    assert run(make_config(tmp_path, source, ["json"])).status == "complete"
    second = latentcache.open_dataset(url)
    assert rows_of(second) == rows_of(first)
    assert len(second) == 3
    assert [columns["json"] for _, columns in sorted(columns_in(second).items())] == [
        "{}",
        "{}",
        None,
    ]
    for one, other in zip(first.units, second.units, strict=True):
        assert one.num_extra_images == other.num_extra_images == 3
        assert one.num_images == other.num_images


def test_sample_rejected_for_a_dropped_field_is_encoded(tmp_path: Path):
    write_tar(
        tmp_path / "src" / "0.tar",
        [("a.png", png(64, 64, 1)), ("a.cls", b"7"), ("b.png", png(64, 64, 2)), ("b.cls", b"x")],
    )
    source = {"shards": f"{tmp_path}/src/*.tar"}
    assert run(make_config(tmp_path, source, ["cls"])).num_rows == 1
    config = make_config(tmp_path, source, [])
    assert [p.kind for p in latentcache.make_plan(config).pending] == ["rewrite"]
    summary = run(config)
    assert (summary.status, summary.num_rows, summary.num_rejects) == ("complete", 2, 0)
    fresh = make_config(tmp_path, source, [], output={"url": f"{tmp_path}/fresh"})
    run(fresh)
    actual, expected = (latentcache.open_dataset(c.output.url) for c in (config, fresh))
    assert rows_of(actual) == rows_of(expected)


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_unit_with_damaged_stored_rows_is_encoded(tmp_path: Path, damage: str):
    source = write_source(tmp_path, "tar", 1, 6)
    config = make_config(tmp_path, source, ["txt"])
    run(config)
    rows = rows_of(latentcache.open_dataset(config.output.url))
    path = min((tmp_path / "out" / "data").glob("*/*"))
    if damage == "gone":
        path.unlink()
    else:
        flip_byte(path)
    config = make_config(tmp_path, source, ["json"])
    assert run(config).status == "complete"
    assert rows_of(latentcache.open_dataset(config.output.url)) == rows
    assert verify(config.output.url).ok


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rewrite_killed_at_any_put_is_resumed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("killed")
    source = write_source(folder, "tar", 3, 3)
    first = make_config(folder, source, ["txt"])
    run(first)
    rows = rows_of(latentcache.open_dataset(first.output.url))
    after = make_config(folder, source, ["txt", "json"])
    puts = data.draw(st.integers(0, 12), "puts before it is killed")
    with pytest.MonkeyPatch.context() as patch:
        _kill_after(patch, puts)
        with pytest.raises(Killed):
            run(after)
    # Whatever was put by then, the old manifest reads as before.
    assert rows_of(latentcache.open_dataset(after.output.url, 1)) == rows
    assert run(after).status == "complete"
    dataset = latentcache.open_dataset(after.output.url)
    assert rows_of(dataset) == rows
    assert columns_in(dataset) == {
        key: columns
        for key, columns in expected_columns(make_samples(0, 9), ["txt", "json"]).items()
        if key in rows
    }
    assert {unit.generation for unit in dataset.units} == {1}
    assert len(list((folder / "out" / "commits").iterdir())) == 6, "each unit twice, none thrice"
    assert verify(after.output.url).ok


class Killed(BaseException):
    """Stands in for the end of the process."""


def _kill_after(patch: pytest.MonkeyPatch, num_puts: int) -> None:
    """Let so many objects be written to the output, then nothing any more."""
    left = num_puts

    def counted(put: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return put(*args, **options)

        return counting

    for name in ("put", "put_file", "put_if_absent"):
        patch.setattr(Store, name, counted(getattr(Store, name)))


def test_unfinished_rewrite_reads_null_for_missing_columns(tmp_path: Path):
    source = write_source(tmp_path, "tar", 2, 4)
    run(make_config(tmp_path, source, ["txt"]))
    url, after = str(tmp_path / "out"), make_config(tmp_path, source, ["json", "cls"])
    with pytest.MonkeyPatch.context() as patch:
        _fail_units(patch, lambda task: task.unit.source.endswith("001.tar"))
        summary = run(after)
    assert (summary.status, summary.exit_code, summary.num_other_columns) == ("incomplete", 1, 1)
    assert latentcache.open_dataset(url).manifest.number == 1, "the newest is not complete"
    assert summary.manifest
    dataset = latentcache.open_dataset(url, summary.manifest)
    actual = columns_in(dataset)
    assert actual["k000"] == {"cls": 0, "json": '{"n": 0}'}
    assert actual["k004"] == {"cls": None, "json": None}
    options: dict[str, Any] = {"manifest": summary.manifest, "normalize": False}
    batches = LatentLoader(url, batch_size=1, columns=["key", "cls", "json"], **options)
    by_key = {
        b.columns["key"][0]: (int(b.columns["cls"][0]), b.columns["json"][0]) for b in batches
    }
    assert (by_key["k000"], by_key["k004"]) == ((0, '{"n": 0}'), (-1, None))
    mapped = LatentDataset(url, columns=["key", "json"], **options)
    assert {row["key"]: row["json"] for row in mapped}["k004"] == ""
    assert run(after).status == "complete"
    assert columns_in(latentcache.open_dataset(url))["k004"] == {"cls": 4, "json": '{"n": 4}'}


def _fail_units(patch: pytest.MonkeyPatch, fails: Callable[[UnitTask], bool]) -> None:
    run_unit = ActorRunner.run

    def failing(runner: ActorRunner, task: UnitTask) -> Receipt | UnitFailure:
        return UnitFailure("as the test wants it") if fails(task) else run_unit(runner, task)

    patch.setattr(ActorRunner, "run", failing)


def test_training_resumes_on_its_manifest_after_a_rewrite(tmp_path: Path):
    source = write_source(tmp_path, "tar", 2, 5)
    run(make_config(tmp_path, source, ["txt"]))
    url = str(tmp_path / "out")
    options: dict[str, Any] = {"batch_size": 2, "seed": 1, "columns": ["key", "caption"]}
    loader = LatentLoader(url, manifest=1, **options)
    steps = iter(loader)
    next(steps)
    state = loader.state_dict()
    rest = [batch.columns for batch in steps]
    run(make_config(tmp_path, source, ["json"]))
    again = LatentLoader(url, manifest=1, **options)
    again.load_state_dict(state)
    assert [batch.columns for batch in again] == rest


def test_two_runs_with_different_kept_columns_both_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_source(tmp_path, "tar", 3, 3)
    one, other = (make_config(tmp_path, source, keep) for keep in (["txt"], ["json"]))
    others: list[RunSummary] = []
    run_unit, lock = ActorRunner.run, Lock()

    def run_beside(runner: ActorRunner, task: UnitTask) -> Receipt | UnitFailure:
        if runner.job.columns == columns_of(["txt"]):
            with lock:  # two units at once: both wait for the other run
                if not others:
                    others.append(run(other))
        return run_unit(runner, task)

    monkeypatch.setattr(ActorRunner, "run", run_beside)
    summary = run(one)
    assert [summary.status for summary in others] == ["complete"]
    assert (summary.status, summary.exit_code) == ("incomplete", 1)
    assert (summary.num_committed, summary.num_other_columns) == (0, 3)
    assert len(list((tmp_path / "out" / "commits").iterdir())) == 3
    assert run(one).status == "complete"
    dataset = latentcache.open_dataset(one.output.url)
    assert dataset.columns == ["caption"]
    assert [unit.generation for unit in dataset.units] == [1, 1, 1]


# Fields that no sample has.


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_kept_field_that_no_sample_has_commits_nothing(tmp_path: Path, kind: str):
    source = write_source(tmp_path, kind, 3, 4)
    with pytest.raises(ConfigError) as error:
        run(make_config(tmp_path, source, ["txt", "text", "label"]))
    assert "source.keep names label, text, which no sample of the source has (12 samples)" in str(
        error.value
    )
    assert "they have cls, json, png, txt" in str(error.value)
    assert not list((tmp_path / "out").glob("commits/*"))
    assert not list((tmp_path / "out").glob("manifests/*"))
    summary = run(make_config(tmp_path, source, ["txt"]))
    assert summary.status == "complete"
    with pytest.raises(ConfigError, match=r"source\.keep names text"):
        run(make_config(tmp_path, source, ["text"]))
    assert latentcache.open_dataset(str(tmp_path / "out")).columns == ["caption"]


def test_samples_with_only_images_are_encoded_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    members = [("a.png", png(64, 64)), ("b.png", png(64, 64, 1)), ("b.mask.png", png(64, 64))]
    source = {"shards": str(write_tar(tmp_path / "src" / "0.tar", members))}
    summary = latentcache.run(make_config(tmp_path, source, ["txt"]))
    assert (summary.status, summary.num_rows) == ("complete", 2)
    rows = list(latentcache.open_dataset(str(tmp_path / "out")))
    assert [row.caption for row in rows] == [None, None]
    assert "source.keep names txt, but the samples of the source have only images" in (
        capsys.readouterr().err
    )


def test_field_of_a_single_sample_is_kept(tmp_path: Path):
    source = write_source(tmp_path, "tar", 3, 4)
    members = [("z.png", png(64, 64)), ("z.license", b"CC0")]
    write_tar(tmp_path / "src" / "zzz.tar", members)
    config = make_config(tmp_path, source, ["license"])
    assert run(config).status == "complete"
    actual = columns_in(latentcache.open_dataset(config.output.url))
    assert [key for key, columns in actual.items() if columns["license"]] == ["z"]
    write_tar(tmp_path / "src" / "zzzz.tar", [("y.png", png(64, 64))])
    assert run(config).status == "complete", "it occurred in an earlier run"


def test_large_source_is_judged_by_units_spread_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fields_module, "MIN_UNITS", 3)
    monkeypatch.setattr(fields_module, "MIN_SAMPLES", 3)
    for number in range(12):
        members = [("a.png", png(64, 64, number)), ("a.json", b"{}")]
        write_tar(tmp_path / "src" / f"{number:02d}.tar", members)
    source = {"shards": f"{tmp_path}/src/*.tar"}
    with pytest.raises(ConfigError, match="no sample of the first 3 units has"):
        run(make_config(tmp_path, source, ["txt"]))
    assert not list((tmp_path / "out").glob("commits/*"))
    for number in range(4, 12):  # two of the three units have it, in any order of their ends
        members = [("a.png", png(64, 64, number)), ("a.txt", b"text")]
        write_tar(tmp_path / "src" / f"{number:02d}.tar", members)
    assert run(make_config(tmp_path, source, ["txt"])).status == "complete"


# Runs that yield nothing.


@pytest.mark.parametrize("keep", [[], ["txt"]])
def test_run_without_rows_exits_3_and_cannot_be_published(tmp_path: Path, keep: list[str]):
    write_tar(tmp_path / "src" / "0.tar", [(f"{i}.JPG.bak", b"x") for i in range(4)])
    config = make_config(tmp_path, {"shards": f"{tmp_path}/src/*.tar"}, keep)
    for _ in range(2):
        summary = run(config)
        assert (summary.status, summary.exit_code, summary.num_rejects) == ("no_rows", 3, 4)
        assert summary.bottleneck is None
        (reason,) = summary.reject_reasons
        assert (reason.reason, reason.num_rejects, reason.key) == ("read/no_image", 4, "0")
        assert reason.source
        assert reason.source.endswith("/src/0.tar")
        assert "jpg.bak" in (reason.message or "")
    url = config.output.url
    assert summary.manifest
    assert not latentcache.open_dataset(url, summary.manifest).manifest.complete
    with pytest.raises(CheckFailed):
        publish(url, summary.manifest)
    status = read_status(url, StorageOptions())
    assert status.reject_reasons == summary.reject_reasons
    assert status.bottleneck is None
    write_tar(tmp_path / "src" / "1.tar", [("a.png", png(64, 64)), ("a.txt", b"text")])
    assert run(config).status == "complete"


def test_new_shard_without_rows_leaves_the_dataset_complete(tmp_path: Path):
    write_tar(tmp_path / "src" / "0.tar", [("a.png", png(64, 64))])
    config = make_config(tmp_path, {"shards": f"{tmp_path}/src/*.tar"}, [])
    assert run(config).status == "complete"
    write_tar(tmp_path / "src" / "1.tar", [("b.png", b"no image")])
    assert (run(config).status, run(config).num_rejects) == ("complete", 1)


def test_reject_rate_of_a_small_run_is_judged_at_its_end(tmp_path: Path):
    members = [(f"{i}.png", png(64, 64, i) if i else b"no image") for i in range(4)]
    write_tar(tmp_path / "src" / "0.tar", members)
    source = {"shards": f"{tmp_path}/src/*.tar"}
    strict = make_config(tmp_path, source, [], rejects={"max_rate": 0.24})
    summary = run(strict)
    assert (summary.status, summary.exit_code) == ("too_many_rejects", 3)
    assert summary.manifest
    assert not latentcache.open_dataset(strict.output.url, summary.manifest).manifest.complete
    lenient = make_config(tmp_path, source, [], rejects={"max_rate": 0.25})
    assert (run(lenient).status, run(lenient).num_committed) == ("complete", 0)
    assert latentcache.open_dataset(lenient.output.url).manifest.complete


def test_reject_reasons_are_sorted_by_count_with_an_example(tmp_path: Path):
    bad = {"a.png": b"no image", "b.cls": b"1", "c.cls": b"1", "d.png": png(64, 64)}
    write_tar(tmp_path / "src" / "0.tar", bad.items())
    write_tar(tmp_path / "src" / "1.tar", {"e.cls": b"1"}.items())
    summary = run(make_config(tmp_path, {"shards": f"{tmp_path}/src/*.tar"}, []))
    actual = [(r.reason, r.num_rejects, r.key) for r in summary.reject_reasons]
    assert actual[0] == ("read/no_image", 3, "b")
    assert [(num, key) for _, num, key in actual[1:]] == [(1, "a")]


@pytest.mark.parametrize("num_files", [1, 12])
def test_kept_column_that_no_parquet_file_has_is_an_error(tmp_path: Path, num_files: int):
    for number in range(num_files):
        (tmp_path / "src").mkdir(exist_ok=True)
        _write_parquet(tmp_path / "src" / f"{number:02d}.parquet", make_samples(number, 1))
    source = {"shards": f"{tmp_path}/src/*.parquet", "image": ["image"]}
    with pytest.raises(
        ConfigError, match=r"no column 'text'.*it has image, txt, json, cls.*nothing"
    ):
        run(make_config(tmp_path, source, ["text"]))
    assert not list((tmp_path / "out").glob("commits/*"))


def test_field_names_of_any_bytes_and_length_are_bounded(tmp_path: Path):
    strange = ["\udcff", "x" * 3000, *(f"f{number:03d}" for number in range(100))]
    members = [("a.png", png(64, 64)), *((f"a.{name}", b"1") for name in [*strange, "zzz"])]
    members += [("a.\udcff.png", png(64, 64)), ("b.\udcff", b"no image")]
    write_tar(tmp_path / "src" / "0.tar", members)
    config = make_config(tmp_path, {"shards": f"{tmp_path}/src/*.tar"}, ["zzz"])
    summary = run(config)
    assert (summary.status, summary.num_rows, summary.num_rejects) == ("complete", 1, 1)
    (path,) = (tmp_path / "out" / "commits").iterdir()
    fields = json.loads(path.read_bytes())["fields"]
    assert "zzz" in fields
    assert len(fields) == 64
    assert max(map(len, fields)) <= 400
