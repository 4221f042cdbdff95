"""The same images from tars, Parquet files and folders: the same rows, and the same guarantees."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import latentcache
from corpus import jpeg
from latentcache import Dataset, open_dataset
from latentcache.config_eval import EvalConfig
from latentcache.engine import run as run_module
from latentcache.errors import ConfigError
from latentcache.evaluation.evaluate import evaluate, plan_evaluation
from latentcache.images import parquet_source as parquet_module
from latentcache.storage_options import StorageOptions
from makers import config_tree, tree_digest, write_tar
from runs import Cli, Result, Running, receipts_at
from servers import FaultyProxy, S3Server, cut_halfway, overwrite
from thread_cluster import ThreadCluster

KINDS = ("tar", "parquet", "folder")

SIZES = ((64, 64), (100, 70), (70, 110))

Files = dict[str, bytes]


def draw_files(num_images: int, *, first: int = 0, seed: int = 0) -> Files:
    """Images and captions, as files in the order of their names; every third has no caption."""
    files: Files = {}
    for index in range(first, first + num_images):
        files[f"{index:04d}.jpg"] = jpeg(*SIZES[index % 3], 1000 * seed + index)
        if index % 3 != 2:
            files[f"{index:04d}.txt"] = f"picture {index} of {seed} — ü".encode()
    return files


def keys_of(files: Mapping[str, bytes]) -> list[str]:
    return sorted({name.partition(".")[0] for name in files})


def parquet_bytes(files: Mapping[str, bytes], group_rows: int = 3) -> bytes:
    """The files as Hugging Face lays them out."""
    rows = []
    for key in keys_of(files):
        image = {"bytes": files[f"{key}.jpg"], "path": f"{key}.jpg"}
        caption = files.get(f"{key}.txt")
        rows.append({"image": image, "txt": caption.decode() if caption else None})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("txt", pa.string())])
    buffer = io.BytesIO()
    # Statistics would hold two images of each row group again, which of three rows is much.
    options = {"row_group_size": group_rows, "write_statistics": False}
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, **options)
    return buffer.getvalue()


def write_source(folder: Path, kind: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Write files as a source of some kind; gives the section of the config."""
    if kind == "tar":
        write_tar(folder / "x.tar", files.items())
        return {"shards": f"{folder}/*.tar"}
    if kind == "parquet":
        folder.mkdir(parents=True)
        (folder / "x.parquet").write_bytes(parquet_bytes(files))
        return {"shards": f"{folder}/*.parquet"}
    for name, data in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {"folder": str(folder), "num_units": 4}


def write_config(folder: Path, source: dict[str, Any], **sections: Any) -> Path:
    tree = config_tree(folder, **sections)
    tree["source"] = {"keep": ["txt"], **source}
    tree["transform"] = {"resolution_px": 64, "buckets": {"max_ratio": 1.7, "step_px": 16}}
    # One thread and an image at a time, so that every run adds up in the same order.
    tree["compute"] = {"num_gpus": 0, "decode_threads": 1, "batch_size": 1}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rows_of(dataset: Dataset) -> dict[str, tuple[Any, ...]]:
    """Every row by its key: caption, size, crop, and the latent to the bit."""
    rows = {
        row.key: (
            row.caption,
            (row.original_width, row.original_height, row.crop_top, row.crop_left),
            row.latent.numpy().tobytes(),
        )
        for row in dataset
    }
    assert len(rows) == len(dataset)
    return rows


@dataclass(frozen=True)
class Made:
    """A finished run over each kind of source, of the same images."""

    folder: Path
    files: Files
    summaries: dict[str, dict[str, Any]]

    def config(self, kind: str) -> Path:
        return self.folder / kind / "config.yaml"

    def dataset(self, kind: str) -> Dataset:
        return open_dataset(str(self.folder / kind / "out"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cli: Cli, checkpoint: Path) -> Made:
    folder = tmp_path_factory.mktemp("kinds")
    files = draw_files(14)
    summaries = {}
    for kind in KINDS:
        source = write_source(folder / kind / "src", kind, files)
        config = write_config(folder / kind, source, vae={"checkpoint": str(checkpoint)})
        summaries[kind] = cli.ok("run", config)
    return Made(folder, files, summaries)


def test_all_source_kinds_give_the_same_rows(made: Made):
    rows = {kind: rows_of(made.dataset(kind)) for kind in KINDS}
    assert sorted(rows["tar"]) == keys_of(made.files)
    captions = {key: row[0] for key, row in rows["tar"].items()}
    assert captions == {
        key: text.decode() if (text := made.files.get(f"{key}.txt")) else None for key in captions
    }
    assert rows["parquet"] == rows["tar"]
    assert rows["folder"] == rows["tar"]
    assert len({made.dataset(kind).contract.fingerprint for kind in KINDS}) == 1
    for kind in KINDS:
        summary = made.summaries[kind]
        assert (summary["num_rows"], summary["num_rejects"]) == (14, 0)
        assert summary["num_units"] == (4 if kind == "folder" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_without_pending_units_writes_nothing(made: Made, cli: Cli, kind: str):
    before = tree_digest(made.folder / kind)
    again = cli.ok("run", made.config(kind))
    assert (again["num_committed"], again["manifest"]) == (0, 1)
    assert tree_digest(made.folder / kind) == before


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_qa_rereads_a_unit_of_each_source_kind(made: Made, cli: Cli, kind: str):
    seen = cli.ok(
        "qa", made.config(kind), "--units", "1", "--rows", "2", "--set", "qa={min_psnr_db: 0}"
    )
    assert seen["totals"]["num_qa_rows"] >= 1
    assert not any("cannot be read again" in note for note in seen.get("notes", []))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_each_source_kind_can_be_calibrated_and_forecast(
    tmp_path: Path, cli: Cli, checkpoint: Path, kind: str
):
    source = write_source(tmp_path / "src", kind, draw_files(12))
    sections = {"vae": {"checkpoint": str(checkpoint)}, "latents": {"dtype": "int8"}}
    config = write_config(tmp_path, source, **sections)
    plan = cli.ok("plan", config, "--calibrate", "12")
    assert plan["num_pending"] == plan["num_units"]
    assert plan["forecast"]["num_tried"] >= 3
    assert plan["forecast"]["num_images"] == pytest.approx(12, rel=0.3)
    summary = cli.ok("run", config)
    assert summary["num_rows"] == 12
    assert open_dataset(summary["output"]).contract.latents.quantization


def test_an_evaluation_reads_all_source_kinds_alike(tmp_path: Path, checkpoint: Path):
    files, actual = draw_files(6), []
    for kind in KINDS:
        source = write_source(tmp_path / kind, kind, files)
        source.pop("num_units", None)
        config = EvalConfig.model_validate(
            {
                "name": "test",
                "source": source,
                "resolution_px": 64,
                "vae": {"checkpoint": str(checkpoint)},
                "models": [{"name": "it", "checkpoint": str(checkpoint)}],
                "picture_rows": 0,
                "output": {"url": str(tmp_path / "out")},
                "compute": {"num_gpus": 0, "batch_size": 1},
            }
        )
        result = evaluate(plan_evaluation(config))
        (model,) = result.models
        actual.append((result.num_images, model.psnr_db.mean, model.ssim.mean))
    assert actual[0][0] == 6
    assert actual[1] == pytest.approx(actual[0])
    assert actual[2] == pytest.approx(actual[0])


def test_nightly_runs_follow_a_changing_folder(tmp_path: Path, cli: Cli, checkpoint: Path):
    """A file that is new, replaced or deleted touches one unit, and nothing else is encoded."""
    files = draw_files(12)
    source = write_source(tmp_path / "src", "folder", files)
    config = write_config(tmp_path, source, vae={"checkpoint": str(checkpoint)})

    def night(*args: str) -> tuple[int, dict[str, tuple[Any, ...]]]:
        summary = cli.ok("run", config, *args)
        return summary["num_committed"], rows_of(open_dataset(summary["output"]))

    num_committed, rows = night()
    assert (num_committed, sorted(rows)) == (4, keys_of(files))

    new = draw_files(1, first=12)
    write_source(tmp_path / "src", "folder", new)
    num_committed, more = night()
    assert (num_committed, sorted(more)) == (1, keys_of(files | new))
    assert {key: more[key] for key in rows} == rows

    (tmp_path / "src" / "0005.jpg").write_bytes(jpeg(64, 64, 77))
    num_committed, replaced = night()
    assert num_committed == 1
    assert {key for key in more if more[key] != replaced[key]} == {"0005"}

    for name in ("0005.jpg", "0005.txt"):
        (tmp_path / "src" / name).unlink(missing_ok=True)
    before = tree_digest(tmp_path / "out" / "data")
    # What the output says of the number of units holds without the config.
    tree = yaml.safe_load(config.read_text())
    del tree["source"]["num_units"]
    config.write_text(yaml.safe_dump(tree))
    num_committed, fewer = night()
    assert num_committed == 1
    assert fewer == {key: row for key, row in replaced.items() if key != "0005"}
    after = tree_digest(tmp_path / "out" / "data")
    assert after.items() > before.items(), "nothing is rewritten"

    refused = cli("run", config, "--set", "source.num_units=5", "--json")
    assert refused.code == 2
    assert "num_units is 5, but the output holds" in refused.json["error"]
    assert "in 4 units" in refused.json["error"]
    nights = [len(open_dataset(str(tmp_path / "out"), number)) for number in (1, 2, 3, 4)]
    assert nights == [12, 13, 13, 12]


def test_a_folder_of_damaged_images_keeps_its_number_of_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_module, "Cluster", ThreadCluster)
    write_source(tmp_path / "src", "folder", draw_files(3))
    tree = config_tree(tmp_path)
    tree["source"] = {"folder": f"{tmp_path}/src", "num_units": 1}
    summary = latentcache.run(latentcache.parse_config(tree), quiet=True)
    for path in (tmp_path / "out" / "data").glob("*/*"):
        path.unlink()
    assert len(latentcache.verify(summary.output, repair=True).repaired) == 1
    del tree["source"]["num_units"]
    again = latentcache.run(latentcache.parse_config(tree), quiet=True)
    assert (again.num_units, again.num_committed, again.num_rows) == (1, 1, 3)


@pytest.mark.parametrize("output", ["", "/", "/latents", "/deep/latents"])
def test_a_folder_that_holds_the_output_is_refused(tmp_path: Path, output: str):
    write_source(tmp_path / "src", "folder", draw_files(1))
    tree = config_tree(tmp_path, output={"url": f"{tmp_path}/src{output}"})
    tree["source"] = {"folder": f"{tmp_path}/src/"}
    with pytest.raises(ConfigError, match=r"output\.url, .*, is inside source\.folder"):
        latentcache.make_plan(latentcache.parse_config(tree))
    tree["output"] = {"url": f"{tmp_path}/src-latents"}
    assert len(latentcache.make_plan(latentcache.parse_config(tree)).pending) == 1


# The command line with Parquet files cut into parts of a few row groups each.
CUT = """
import sys
import latentcache.images.parquet_source as parquet
from latentcache.cli import main

parquet.PART_BYTES = int(sys.argv.pop(1))
main()
"""


def run_cut(part_bytes: int, ray_address: str, *args: str | Path) -> Result:
    command = [sys.executable, "-c", CUT, str(part_bytes), *map(str, args)]
    return Running(command, dict(os.environ) | {"RAY_ADDRESS": ray_address}).result()


@pytest.fixture
def s3(moto: S3Server, tmp_path: Path, checkpoint: Path) -> Iterator[OnS3]:
    with FaultyProxy(moto.endpoint_url) as proxy:
        yield OnS3(moto, proxy, tmp_path, checkpoint)


@dataclass(frozen=True)
class OnS3:
    server: S3Server
    proxy: FaultyProxy
    folder: Path
    checkpoint: Path

    def config(self, name: str, objects: Files, source: dict[str, Any]) -> tuple[Path, str]:
        """Fill a bucket; gives a config over it, through the proxy, and its output's URL."""
        self.server.make_bucket(name, objects)
        output = self.server.make_bucket(f"{name}-latents")
        storage = {"endpoint_url": self.proxy.endpoint_url}
        config = write_config(
            self.folder,
            {"storage": storage, **source},
            vae={"checkpoint": str(self.checkpoint)},
            output={"url": output, "storage": storage},
        )
        return config, output

    def open(self, output: str) -> Dataset:
        return open_dataset(output, storage=StorageOptions(endpoint_url=self.server.endpoint_url))


def test_a_large_parquet_file_on_s3_becomes_several_units(s3: OnS3, made: Made, ray_address: str):
    data = parquet_bytes(made.files)
    source = {"shards": "s3://whole-parquet/x.parquet"}
    config, output = s3.config("whole-parquet", {"x.parquet": data}, source)
    faults = [
        s3.proxy.on("GET", r"whole-parquet/x\.parquet", cut_halfway, times=3),
    ]
    result = run_cut(len(data) // 3, ray_address, "run", config, "--json")
    assert result.code == 0, result.stderr
    assert [fault.num_fired for fault in faults] == [3]
    units = [receipt["record"]["unit"] for receipt in receipts_at(s3.server, output)]
    assert sorted(unit["range"] for unit in units) == ["0/3", "1/3", "2/3"]
    assert {unit["size_bytes"] for unit in units} == {len(data)}
    assert rows_of(s3.open(output)) == rows_of(made.dataset("tar"))
    assert latentcache.verify(output, storage=s3.server.options).ok
    planned = run_cut(len(data) // 3, ray_address, "plan", config, "--json")
    assert (planned.json["num_units"], planned.json["num_pending"]) == (3, 0)


def test_a_parquet_file_overwritten_during_a_read_gives_one_version(s3: OnS3, ray_address: str):
    old, new = draw_files(14, seed=1), draw_files(11, seed=2)
    data, other = parquet_bytes(old), parquet_bytes(new)
    source = {"shards": "s3://torn-parquet/x.parquet"}
    config, output = s3.config("torn-parquet", {"x.parquet": data}, source)
    fault = overwrite(s3.server, "torn-parquet", "x.parquet", other)
    rule = s3.proxy.on("GET", r"torn-parquet/x\.parquet", fault)
    result = run_cut(len(data) // 3, ray_address, "run", config, "--json")
    assert rule.num_fired == 1
    assert result.code == 0, result.stderr
    assert result.stderr.count("changed while it was read") == 1, "planned anew once, as a whole"
    rows = rows_of(s3.open(output))
    assert sorted(rows) == keys_of(new)
    captions = {key: row[0] for key, row in rows.items()}
    assert captions["0000"] == "picture 0 of 2 — ü"
    assert result.json["num_rows"] == 11


def test_cut_and_changed_files_of_a_folder_on_s3_are_handled(s3: OnS3, made: Made, cli: Cli):
    objects = {f"deep/{name}": data for name, data in made.files.items()}
    objects["deep/0013.jpg"] = jpeg(64, 64, 99)
    source = {"folder": "s3://loose-photos/deep", "num_units": 3}
    config, output = s3.config("loose-photos", objects, source)
    right = made.files["0013.jpg"]
    faults = [
        s3.proxy.on("GET", r"deep/0004\.jpg", cut_halfway, times=2),
        s3.proxy.on(
            "GET",
            r"deep/0013\.jpg",
            overwrite(s3.server, "loose-photos", "deep/0013.jpg", right),
        ),
    ]
    result = cli("run", config, "--json")
    assert result.code == 0, result.stderr
    assert [fault.num_fired for fault in faults] == [2, 1]
    assert result.stderr.count("changed while it was read") == 1
    assert rows_of(s3.open(output)) == rows_of(made.dataset("tar"))
    assert cli.ok("run", config)["num_committed"] == 0


def test_a_source_without_the_columns_fails_alone(
    made: Made, tmp_path: Path, cli: Cli, checkpoint: Path
):
    source = write_source(tmp_path / "src", "parquet", made.files)
    pq.write_table(pa.table({"picture": [b"x"], "txt": ["y"]}), tmp_path / "src" / "y.parquet")
    config = write_config(tmp_path, source, vae={"checkpoint": str(checkpoint)})
    result = cli("run", config, "--json", "--set", "compute.unit_retries=0")
    assert result.code == 1
    assert result.json["num_rows"] == 14
    (failed,) = result.json["failed"]
    assert failed["source"].endswith("y.parquet")
    assert "no column holds the image" in failed["message"]


def test_a_key_column_requires_parquet_files(made: Made, cli: Cli):
    refused = cli("plan", made.config("tar"), "--set", "source.key=id", "--json")
    assert refused.code == 2
    assert "source.key names the column 'id' of Parquet files" in refused.json["error"]
    planned = cli("plan", made.config("parquet"), "--set", "source.key=id", "--json")
    assert planned.code == 2
    assert planned.json["contract_diff"] == ['source.key_column: dataset has null, config has "id"']


def test_a_unit_of_a_parquet_file_has_about_256_mib():
    # docs/format.md says so: another size gives other units, and all is encoded again.
    assert parquet_module.PART_BYTES == 256 * 2**20
