"""pipelines/nightly.py: what is published moves only when the gates pass."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import latentcache
from corpus import good
from runs import Configs, Result, Running

NIGHTLY = Path(__file__).parents[2] / "pipelines" / "nightly.py"


class Nights:
    """A bucket that grows, and the program that a scheduler calls each night."""

    def __init__(self, folder: Path, configs: Configs, ray_address: str) -> None:
        self.source, self.output = folder / "photos", folder / "latents"
        self.source.mkdir()
        self.config = configs.write(str(self.source), str(self.output))
        self._env = os.environ | {"RAY_ADDRESS": ray_address}

    def add(self, name: str, seed: int) -> None:
        (self.source / name).write_bytes(good(name, seed=seed).data)

    def set(self, **sections: Any) -> None:
        tree = yaml.safe_load(self.config.read_text()) | sections
        self.config.write_text(yaml.safe_dump(tree))

    def run(self) -> Result:
        return Running([sys.executable, str(NIGHTLY), str(self.config)], self._env).result()

    def ok(self) -> dict[str, Any]:
        result = self.run()
        assert result.code == 0, result.stderr
        return result.json

    @property
    def objects(self) -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in self.output.rglob("*") if p.is_file()}

    @property
    def published(self) -> int:
        return latentcache.open_dataset(str(self.output), "published").manifest.number


@pytest.fixture
def nights(tmp_path: Path, configs: Configs, ray_address: str) -> Nights:
    nights = Nights(tmp_path, configs, ray_address)
    for number in range(2):
        nights.add(f"{number}.tar", seed=number)
    return nights


def test_nightly_publishes_each_night(nights: Nights) -> None:
    summary = nights.ok()
    assert (summary["status"], summary["num_committed"], summary["published"]) == ("complete", 2, 1)
    assert nights.published == 1

    before = nights.objects
    summary = nights.ok()
    assert (summary["num_committed"], summary["published"]) == (0, 1)
    assert nights.objects == before  # nothing new, nothing written

    nights.add("2.tar", seed=2)
    summary = nights.ok()
    assert (summary["num_committed"], summary["published"], nights.published) == (1, 2, 2)


def test_a_run_that_fails_a_gate_is_not_published(nights: Nights) -> None:
    nights.ok()
    nights.add("2.tar", seed=2)
    # Random weights decode to noise.
    nights.set(qa={"fraction": 1.0, "min_rows_per_bucket": 1, "min_psnr_db": 90})
    result = nights.run()
    assert (result.code, result.json["status"]) == (3, "failed_qa")
    assert (result.json["published"], nights.published) == (1, 1)

    nights.set(qa=None)
    assert nights.ok()["published"] == nights.published == 3, "2 was not complete"


def test_an_incomplete_run_is_not_published(nights: Nights) -> None:
    nights.ok()
    shutil.rmtree(next((nights.output / "data").iterdir()))
    nights.add("2.tar", seed=2)
    result = nights.run()
    assert (result.code, result.json["status"]) == (3, "failed_verification")
    assert (result.json["published"], nights.published) == (1, 1)
    assert len(result.json["problems"]) >= 1


def test_a_wrong_config_is_one_json_object(nights: Nights) -> None:
    nights.set(outputs={})
    result = nights.run()
    assert (result.code, result.json["exit_code"]) == (2, 2)
    assert "outputs" in result.json["error"]
