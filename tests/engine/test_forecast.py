"""`plan --calibrate`: what it foretells of a run, compared with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from makers import config_tree, png, tree_digest, write_tar
from runs import Cli

pytestmark = pytest.mark.slow

SAMPLES_PER_SHARD = 30


def write_config(folder: Path, **sections: Any) -> Path:
    for number in range(6):
        names = [f"{number}-{index}" for index in range(SAMPLES_PER_SHARD)]
        members = [(f"{name}.png", png(70, 90, seed)) for seed, name in enumerate(names)]
        write_tar(folder / "src" / f"{number}.tar", members)
    tree = config_tree(folder, transform={"resolution_px": 64}, source={"keep": []}, **sections)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_forecast_matches_the_run(tmp_path: Path, cli: Cli) -> None:
    config = write_config(tmp_path)
    before = tree_digest(tmp_path)
    prices = ["--usd-per-cpu-hour", "3600", "--usd-per-gb-month", "1e9"]
    plan = cli.ok("plan", config, "--calibrate", "20", *prices)
    assert tree_digest(tmp_path) == before, "a plan writes nothing"
    forecast = plan["forecast"]
    assert forecast["num_tried"] == 20, "the rest of the shards is not read"
    assert forecast["num_images"] == pytest.approx(6 * SAMPLES_PER_SHARD, rel=0.1)
    # At a dollar for each second of a CPU and each byte.
    cpu_s = forecast["cpu_hours"] * 3600
    assert forecast["compute_usd"] == pytest.approx(cpu_s)
    num_actors, rate = forecast["num_actors"], forecast["images_per_s"]
    assert forecast["elapsed_s"] == pytest.approx(forecast["num_images"] / rate / num_actors)
    per_billion = cpu_s / forecast["num_images"] * 1e9
    assert forecast["compute_usd_per_billion_images"] == pytest.approx(per_billion)
    assert forecast["storage_usd_per_month"] == pytest.approx(forecast["output_bytes"])
    assert forecast["gpu_hours"] == 0
    assert forecast["bottleneck"].startswith("bottleneck: ")

    cli.ok("run", config)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("data/*/*"))
    assert forecast["output_bytes"] == pytest.approx(written, rel=0.25)  # a file has a footer
    done = cli("plan", config, "--calibrate", "20", "--json")
    assert (done.code, done.json["forecast"]) == (0, None)


def test_forecast_calibrates_int8_and_writes_nothing(tmp_path: Path, cli: Cli) -> None:
    latents = {"dtype": "int8", "calibration": {"num_images": 8}}
    config = write_config(tmp_path, latents=latents)
    result = cli("plan", config, "--calibrate", "8")
    assert result.code == 0
    assert "8 images tried on" in result.stdout
    assert "uploading was not tried" in result.stdout
    assert not (tmp_path / "out").exists()


def test_forecast_explains_why_it_cannot_try(tmp_path: Path, cli: Cli) -> None:
    config = write_config(tmp_path)
    priced = cli("plan", config, "--usd-per-gpu-hour", "2")
    assert priced.code == 2
    assert "--calibrate" in priced.stderr
    for path in tmp_path.glob("src/*.tar"):
        path.write_bytes(b"\x28\xb5\x2f\xfd and so on")
    result = cli("plan", config, "--calibrate", "8")
    assert result.code == 1
    (line,) = result.stderr.splitlines()
    assert "compressed by zstd" in line
