"""The example learns, and goes on after anything; the code in docs/training.md runs."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from PIL import Image

import train_dit
from latentcache import LatentDataset, load_vae, to_uint8
from runs import Running
from synthetic import make_contract, write_dataset

ROOT = Path(__file__).parents[2]
SMALL, WIDE, ODD = (64, 64), (96, 64), (72, 64)  # latents of the last one are 9 wide
UNIT = {SMALL: 8, WIDE: 6, ODD: 4}
STEPS = 30  # of 9 an epoch
TRAIN = str(ROOT / "examples/train_dit.py")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # As in the processes below: another number of threads sums in another order.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("latents")
    write_dataset(str(folder), make_contract(list(UNIT)), [UNIT, UNIT])
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(url: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The log of a training that nothing happened to."""
    return train(url, tmp_path_factory.mktemp("undisturbed"), STEPS)


def options(url: str, out: Path, steps: int) -> list[str]:
    return [url, f"--out={out}", f"--steps={steps}", "--batch-size=4", "--save-every=4"]


def train(url: str, out: Path, steps: int) -> list[dict[str, Any]]:
    """Train in this process; gives the log."""
    train_dit.main(options(url, out, steps))
    return read_log(out)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def start(command: list[str]) -> Running:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("examples", "tests"))
    return Running(command, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})


def test_the_training_loss_decreases(undisturbed: list[dict[str, Any]]):
    losses = [line["loss"] for line in undisturbed]
    assert fmean(losses[-9:]) < 0.7 * fmean(losses[:9])


def test_each_step_is_logged_with_its_own_rows(undisturbed: list[dict[str, Any]]):
    assert [line["step"] for line in undisturbed] == list(range(1, STEPS + 1))
    assert len({line["keys"] for line in undisturbed}) == STEPS
    assert {tuple(line["bucket"]) for line in undisturbed} == set(UNIT)


KILLED_IN = {
    # At the third checkpoint, when a part of it is written; in step 11, with 10 in the log.
    "save": ("train_dit.os.fsync", 3, 12, ["checkpoint.part"]),
    "step": ("train_dit.Training.update", 11, 10, []),
}


@pytest.mark.parametrize("where", KILLED_IN)
def test_a_killed_and_resumed_training_has_the_same_losses(
    url: str, undisturbed: list[dict[str, Any]], tmp_path: Path, where: str
):
    name, calls, num_logged, left = KILLED_IN[where]
    code = (
        "import itertools, os, signal, sys, train_dit\n"
        f"count, real = itertools.count(1), {name}\n"
        "def killed(*args):\n"
        f"    if next(count) == {calls}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        f"{name} = killed\n"
        "train_dit.main(sys.argv[1:])"
    )
    result = start([sys.executable, "-c", code, *options(url, tmp_path, STEPS)]).result()
    assert result.code == -signal.SIGKILL
    assert len(read_log(tmp_path)) == num_logged
    parts = ["step-00000004.pt", "step-00000008.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "log.jsonl", *parts]

    assert train(url, tmp_path, STEPS) == undisturbed


def test_the_batches_do_not_depend_on_the_number_of_processes(
    url: str, undisturbed: list[dict[str, Any]], tmp_path: Path
):
    train(url, tmp_path, 7)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = start([*torchrun, TRAIN, *options(url, tmp_path, 20)]).result()
    assert result.code == 0, result.stderr
    log = train(url, tmp_path, STEPS)
    for line, expected in zip(log, undisturbed, strict=True):
        assert line == expected | {"loss": pytest.approx(expected["loss"], rel=1e-3)}
    assert [line["loss"] for line in log[:7]] == [line["loss"] for line in undisturbed[:7]]


def test_a_resume_uses_the_manifest_of_its_start(undisturbed: list[dict[str, Any]], tmp_path: Path):
    url, out = str(tmp_path / "latents"), tmp_path / "out"
    contract = make_contract(list(UNIT))
    write_dataset(url, contract, [UNIT, UNIT])
    train(url, out, 5)
    write_dataset(url, contract, [UNIT, UNIT, UNIT])
    assert len(LatentDataset(url)) == 3 * sum(UNIT.values())
    assert [line["keys"] for line in train(url, out, 12)] == [
        line["keys"] for line in undisturbed[:12]
    ]


def test_a_resume_refuses_another_batch_size(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(url, tmp_path, 1)
    monkeypatch.setattr(sys, "argv", ["", *options(url, tmp_path, 2), "--batch-size=2"])
    with pytest.raises(SystemExit, match=r"^error: .* batch_size 4, .* batch_size 2"):
        runpy.run_path(TRAIN, run_name="__main__")


def test_the_sample_sheet_shows_dataset_rows_above_generated_ones(tmp_path: Path):
    contract = make_contract([SMALL])
    contract = replace(contract, vae=replace(contract.vae, latent_channels=16))
    url = str(tmp_path / "latents")
    write_dataset(url, contract, [{SMALL: 5}])
    train_dit.main([*options(url, tmp_path / "out", 1), "--vae=demo"])

    with Image.open(tmp_path / "out/samples.png") as picture:
        assert picture.size == (64 * train_dit.NUM_PICTURES, 64 * 3)
        above = {picture.crop((x, 0, x + 64, 64)).tobytes() for x in range(0, picture.width, 64)}
    latents = torch.stack([row["latents"] for row in LatentDataset(url, normalize=False)])
    decoded = to_uint8(load_vae("demo").decode(latents)).permute(0, 2, 3, 1)
    assert above == {pixels.numpy().tobytes() for pixels in decoded}


def test_the_code_of_the_training_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("demo/latents", "demo/more"):
        write_dataset(str(tmp_path / name), make_contract(list(UNIT)), [UNIT, UNIT])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in code_blocks(ROOT / "docs/training.md"):
        if all(find_spec(library) for library in imported_by(code)):
            exec(compile(code, "docs/training.md", "exec"), names)
    assert names["mixed"].num_rows == 4 * sum(UNIT.values())


def code_blocks(path: Path) -> list[ast.Module]:
    """The Python of a document; a block may use what those before it have made."""
    return [
        ast.parse(block)
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)
    ]


def imported_by(code: ast.Module) -> set[str]:
    """The libraries that a block needs; accelerate and Lightning are not among what we install."""
    nodes = list(ast.walk(code))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}
