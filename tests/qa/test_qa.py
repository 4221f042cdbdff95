"""QA in the run and after it: what is looked at, what is seen, and what the gates do."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import latentcache
from checkpoints import write_diffusers_folder, write_folder
from latentcache import load_vae
from latentcache.dataset.bucket import Bucket
from latentcache.demo.draw import draw_image
from latentcache.errors import DatasetError
from latentcache.qa.evaluator import QaSample
from makers import config_tree, encode_image, write_tar
from runs import Cli

pytestmark = pytest.mark.slow

SIZES = ((96, 96), (128, 64), (64, 128))  # as many buckets


def write_shards(folder: Path, num_shards: int, num_samples: int = 6) -> None:
    for shard in range(num_shards):
        rng = np.random.default_rng(shard)
        members = []
        for index in range(num_samples):
            width, height = SIZES[index % len(SIZES)]
            picture = Image.fromarray(draw_image(rng, width, height)[0])
            members.append((f"{index:04d}.png", encode_image(picture)))
        write_tar(folder / "src" / f"{shard}.tar", members)


def write_config(folder: Path, **sections: Any) -> Path:
    tree = config_tree(
        folder,
        transform={"resolution_px": 64, "buckets": {"max_ratio": 2.0, "step_px": 16}},
        source={"keep": []},
        **sections,
    )
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def demo_state() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    demo = importlib.resources.files("latentcache.demo") / "weights"
    with importlib.resources.as_file(demo / "diffusion_pytorch_model.safetensors") as path:
        return json.loads((demo / "config.json").read_text()), load_file(path)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    """A dataset whose run looked at some rows of each bucket."""
    folder = tmp_path_factory.mktemp("sampled")
    write_shards(folder, num_shards=2)
    config = write_config(folder, qa={"fraction": 0.0, "min_rows_per_bucket": 2, "min_psnr_db": 10})
    summary = cli.ok("run", config)
    assert summary["status"] == "complete"
    assert summary["report"].endswith("qa/report-00000001.html")
    return folder


def read_qa(url: Path) -> list[dict[str, Any]]:
    """All QA rows, read without the package."""
    paths = sorted(url.glob("qa/*/*.parquet"))
    return [
        {"unit": path.parent.name, **row}
        for path in paths
        for row in pq.read_table(path).to_pylist()
    ]


def open_png(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image)


def test_run_samples_every_bucket_and_stores_correct_measures(sampled: Path) -> None:
    dataset = latentcache.open_dataset(str(sampled / "out"))
    latents = {(row.unit, row.key): row.latent for row in dataset}
    rows = read_qa(sampled / "out")
    num_rows: defaultdict[str, int] = defaultdict(int)
    vae = load_vae("demo")
    for row in rows:
        num_rows[row["bucket"]] += 1
        image, decoded = open_png(row["image"]), open_png(row["reconstruction"])
        stored = latents[row["unit"], row["key"]].float()
        width, height = Bucket.parse(row["bucket"])
        assert image.shape == decoded.shape == (height, width, 3)
        kept = np.frombuffer(row["latent"], "<f4").reshape(row["latent_shape"])
        assert np.array_equal(kept, stored.numpy())
        error = np.square(image.astype(float) - decoded).mean()
        assert row["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error))
        assert 0 < row["ssim"] <= 1
        with torch.inference_mode():
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
            mean = vae.encode(pixels)[0, : vae.architecture.latent_channels]
            again = vae.decode(stored[None])[0]
        again = ((again + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert np.abs(again - decoded).max() <= 1
        signal = np.square(dataset.stats.std).mean()
        drift_db = 10 * np.log10(signal / float((stored - mean).square().mean()))
        # That of the unit's own variance, not of the dataset's.
        assert row["drift_db"] == pytest.approx(drift_db, abs=1)
    assert set(num_rows) == set(dataset.manifest.buckets)
    assert min(num_rows.values()) >= 2


def test_qa_command_reproduces_the_measures_of_the_run(sampled: Path, cli: Cli) -> None:
    seen = {(row["unit"], row["key"]): row["psnr_db"] for row in read_qa(sampled / "out")}
    for target in str(sampled / "out"), str(next(sampled.glob("*.yaml"))):
        again = cli.ok("qa", target)
        assert again["verdict"]["status"] == "passed"
        assert again["totals"]["num_qa_rows"] == len(seen)
        mean = float(np.mean(list(seen.values())))
        assert again["measures"]["psnr_db"]["mean"] == pytest.approx(mean, abs=0.01)


def test_verify_reports_a_lost_qa_file(sampled: Path, tmp_path: Path, cli: Cli) -> None:
    out = shutil.copytree(sampled / "out", tmp_path / "out")
    assert cli("verify", str(out)).code == 0
    lost = next((out / "qa").glob("*/*.parquet"))
    lost.unlink()
    for options in ([], ["--quick"]):
        actual = cli("verify", str(out), *options, "--json")
        assert actual.code == 3
        (problem,) = actual.json["problems"]
        assert problem["path"] == lost.relative_to(out).as_posix()
        assert problem["message"] == "is gone"


def test_qa_command_takes_gates_as_options(sampled: Path, cli: Cli) -> None:
    result = cli("qa", sampled / "out", "--rows", "2", "--min-psnr-db", "90")
    assert result.code == 3
    assert "below qa.min_psnr_db 90" in result.stderr
    assert "failed: 2 of 12 rows" in result.stdout


def test_qa_reads_shards_again_if_no_crops_were_kept(tmp_path: Path, cli: Cli) -> None:
    write_shards(tmp_path, num_shards=2)
    config = write_config(tmp_path)
    cli.ok("run", config)
    refused = cli("qa", tmp_path / "out")
    assert refused.code == 1
    assert "--units 2" in refused.stderr
    unnamed = cli("qa", tmp_path / "out", "--units", "1")
    assert unnamed.code == 2
    assert f"{tmp_path}/src/0.tar: pass --source" in unnamed.stderr
    seen = cli.ok("qa", config, "--units", "1", "--rows", "4")
    assert seen["totals"]["num_qa_rows"] == 4


def test_qa_uses_kept_crops_if_the_source_is_gone(sampled: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(sampled / "src", tmp_path / "src")
    config = write_config(tmp_path, qa={"min_psnr_db": 10})
    cli.ok("run", config)
    shutil.rmtree(tmp_path / "src")
    result = cli("qa", tmp_path / "out", "--units", "1", "--source", tmp_path / "src")
    assert result.code == 0, result.stderr
    assert "cannot be read again" in result.stderr
    assert "the crops that the run kept" in result.stderr


def test_row_whose_crop_differs_from_its_source_fails_qa(tmp_path: Path, cli: Cli) -> None:
    """A crop that begins elsewhere than the dataset says is no matter of decibels."""
    write_shards(tmp_path, num_shards=1)
    cli.ok("run", write_config(tmp_path, qa={"min_psnr_db": 10}))
    receipt = next((tmp_path / "out" / "commits").iterdir())
    for file in json.loads(receipt.read_text())["record"]["files"]:
        path = tmp_path / "out" / file["path"]
        table = pq.read_table(path)
        column = table.schema.get_field_index("crop_left")
        moved = pa.array([8] * len(table), pa.int32())
        table = table.set_column(column, table.schema.field(column), moved)
        pq.write_table(table, path)
    result = cli("qa", tmp_path / "out", "--units", "1", "--source", tmp_path / "src")
    assert result.code == 3
    assert "but its image gives" in result.stderr


def test_gate_stops_a_run_and_a_lower_gate_resumes_it(tmp_path: Path, cli: Cli) -> None:
    write_shards(tmp_path, num_shards=6)
    qa = {"fraction": 1.0, "min_psnr_db": 10, "min_drift_db": 149}
    stopped = cli("run", write_config(tmp_path, qa=qa), "--json")
    assert stopped.code == 3
    assert stopped.json["status"] == "failed_qa"
    assert 0 < stopped.json["num_committed"] < 6
    assert "below qa.min_drift_db 149" in stopped.stderr
    assert "worst: PSNR" in stopped.stderr
    assert "failed" in Path(stopped.json["report"]).read_text()
    with pytest.raises(DatasetError, match="no complete manifest"):
        latentcache.open_dataset(str(tmp_path / "out"))
    lower = write_config(tmp_path, qa=qa | {"min_drift_db": 40})
    summary = cli.ok("run", lower)
    assert summary["num_skipped"] == stopped.json["num_committed"]
    assert summary["num_qa_rows"] == 36
    judged_alone = cli("run", lower, "--set", "qa.min_psnr_db=70", "--json")
    assert judged_alone.code == 3
    assert judged_alone.json["num_committed"] == 0
    assert "the mean PSNR of 36 QA rows" in judged_alone.stderr


@pytest.mark.parametrize("sampling", [{}, {"fraction": 0.0, "min_rows_per_bucket": 0}])
def test_too_many_rejects_fail_the_rejects_gate(
    tmp_path: Path, cli: Cli, sampling: dict[str, float]
) -> None:
    write_shards(tmp_path, num_shards=1)
    qa = {"min_psnr_db": 10, "max_rejects": 1} | sampling
    config = write_config(tmp_path, qa=qa)
    result = cli("run", config, "--set", "transform.min_side_px=80", "--json")
    assert result.code == 3
    assert "4 samples were rejected, more than qa.max_rejects 1" in result.stderr
    (path,) = (tmp_path / "out" / "rejects").glob("*/*.parquet")
    for row in pq.read_table(path).to_pylist():
        assert max(open_png(row["thumbnail"]).shape[:2]) == 128, row["reason"]


def test_dataset_of_one_row_has_one_qa_row(tmp_path: Path, cli: Cli) -> None:
    write_shards(tmp_path, num_shards=1, num_samples=1)
    summary = cli.ok("run", write_config(tmp_path, qa={"min_psnr_db": 5}))
    assert summary["num_qa_rows"] == 1
    source = ("--source", f"{tmp_path}/src/*.tar")
    again = cli.ok("qa", tmp_path / "out", "--units", "3", *source)
    assert again["totals"]["num_qa_rows"] == 1


def other(folder: Path) -> Path:
    config, state = demo_state()
    noise = torch.Generator().manual_seed(1)
    state["encoder.conv_in.weight"] = torch.randn(
        state["encoder.conv_in.weight"].shape, generator=noise
    )
    return write_folder(folder, config, state)


def nudged(folder: Path) -> Path:
    """The demo VAE with another fingerprint, and an encoder as good as the same."""
    config, state = demo_state()
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].float() * 1.0001
    return write_folder(folder, config, state)


def other_family(folder: Path) -> Path:
    return write_diffusers_folder(folder)


@pytest.mark.parametrize(
    ("make_decoder", "code", "text"),
    [
        (nudged, 0, "agree to"),
        (other, 2, "belongs to another encoder"),
        (other_family, 2, "latent_channels is 4"),
        (lambda folder: folder / "nowhere", 2, "does not exist"),
    ],
    ids=["nudged", "other", "family", "missing"],
)
def test_decoder_is_accepted_only_if_its_encoder_agrees(
    make_decoder: Callable[[Path], Path],
    code: int,
    text: str,
    sampled: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    decoder = make_decoder(tmp_path / "decoder")
    after = cli("qa", sampled / "out", "--decoder", decoder)
    assert after.code == code, after.stderr
    assert text in after.stderr
    shutil.copytree(sampled / "src", tmp_path / "src")
    qa = {"min_psnr_db": 10, "decoder": str(decoder)}
    result = cli("run", write_config(tmp_path, qa=qa))
    assert result.code == code, result.stderr
    assert text in result.stderr


def test_network_with_another_hash_is_refused(sampled: Path, tmp_path: Path, cli: Cli) -> None:
    network = tmp_path / "vgg16.pt"
    network.write_bytes(b"not a network")
    qa = {"min_psnr_db": 10, "lpips": {"url": str(network), "sha256": "0" * 64}}
    shutil.copytree(sampled / "src", tmp_path / "src")
    config = write_config(tmp_path, qa=qa, output={"url": str(sampled / "out")})
    for verb in "qa", "run":
        args = [config, "--set", f"output.url={tmp_path / 'out'}"] if verb == "run" else [config]
        result = cli(verb, *args)
        assert result.code == 2, result.stderr
        assert hashlib.sha256(b"not a network").hexdigest() in result.stderr


def test_unwritable_report_fails_before_the_evaluation(
    sampled: Path, tmp_path: Path, cli: Cli
) -> None:
    result = cli("qa", sampled / "out", "--report", tmp_path / "missing" / "report.html")
    assert result.code in (1, 2)
    assert "missing" in result.stderr


@given(
    fraction=st.floats(0, 1),
    seed=st.integers(0, 3),
    min_rows=st.integers(0, 6),
    buckets=st.lists(st.sampled_from(["64x64", "96x64"]), max_size=20),
)
def test_sample_is_every_row_below_the_fraction_and_the_next_lowest(
    tmp_path_factory: pytest.TempPathFactory,
    fraction: float,
    seed: int,
    min_rows: int,
    buckets: list[str],
) -> None:
    folder = tmp_path_factory.mktemp("sample")
    sample = QaSample(fraction, seed, {"64x64": min_rows}, "unit", folder)
    for index, bucket in enumerate(buckets):
        sample.offer(bucket, f"k{index}", torch.full((3, 8, 8), index, dtype=torch.uint8))

    def draw(index: int) -> float:
        digest = hashlib.sha256(f"{seed}\0unit\0k{index}".encode()).digest()
        return int.from_bytes(digest[:8], "little") / 2**64

    expected = set()
    for name, least in {"64x64": min_rows, "96x64": 0}.items():
        by_draw = sorted((i for i, bucket in enumerate(buckets) if bucket == name), key=draw)
        expected |= {i for n, i in enumerate(by_draw) if n < least or draw(i) < fraction}
    assert {int(open_png(path.read_bytes())[0, 0, 0]) for path in folder.iterdir()} == expected
