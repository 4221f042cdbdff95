"""int8 from the command line to training: how close, how small, and what a rerun compares."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
import yaml

from latentcache import (
    Dataset,
    LatentDataset,
    LatentLoader,
    load_config,
    make_plan,
    open_dataset,
    run,
    verify,
)
from latentcache.dataset.contract import establish_contract, read_contract
from latentcache.dataset.inspect import describe, render
from latentcache.demo.demo_data import write_demo_data
from latentcache.errors import ContractMismatch
from latentcache.storage import Store
from makers import config_tree, tree_digest, write_tar
from reference import read_rows, same_bits
from runs import Cli, Running

MIN_SNR_DB = 38.0

LATENTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "parquet": {"dtype": "int8"},
    "safetensors": {"dtype": "int8", "format": "safetensors"},
}
INT8 = ("parquet", "safetensors")

Key = tuple[str, str]


@dataclass(frozen=True)
class Made:
    """Three runs over the same drawn pictures, by the demo's autoencoder."""

    cli: Cli
    folder: Path

    def config(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def out(self, name: str) -> Path:
        return self.folder / name

    def dataset(self, name: str) -> Dataset:
        return open_dataset(str(self.out(name)))

    def latents(self, name: str) -> dict[Key, torch.Tensor]:
        """Latents by shard and key, as `open_dataset` gives them."""
        dataset = self.dataset(name)
        sources = {record.unit.id: record.unit.source for record in dataset.units}
        return {(sources[row.unit], row.key): row.latent for row in dataset}


@pytest.fixture(scope="module")
def made(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("int8")
    write_demo_data(folder / "src", num_shards=4, samples_per_shard=8, seed=0, broken=True)
    made = Made(cli, folder)
    for name, latents in LATENTS.items():
        tree = config_tree(
            folder,
            transform={"resolution_px": 128, "buckets": {"max_ratio": 1.5, "step_px": 32}},
            latents=latents,
            output={"url": str(folder / name)},
            rejects={"max_rate": 0.5},
            compute={"num_gpus": 0, "decode_threads": 1},  # so that sums are in one order
        )
        made.config(name).write_text(yaml.safe_dump(tree))
        plan = make_plan(load_config(made.config(name)))
        assert len(plan.pending) == 4
        assert plan.contract.is_resolved == (name not in INT8)
        assert not made.out(name).exists(), "planning writes nothing"
        result = cli("run", made.config(name), "--json")
        assert result.code == 0, result.stderr
        assert ("calibrating int8 on 512 images" in result.stderr) == (name in INT8)
    return made


@pytest.mark.parametrize("name", INT8)
def test_int8_latents_are_close_to_the_encoder_output(made: Made, name: str):
    exact, actual = made.latents("float32"), made.latents(name)
    assert actual.keys() == exact.keys()
    assert len(actual) > 20
    squares = sum(float((actual[key].double() - exact[key]).square().sum()) for key in exact)
    channels = torch.cat([latent.double().flatten(1) for latent in exact.values()], dim=1)
    variance = float(channels.var(dim=1, correction=0).mean())
    assert 10 * math.log10(variance * channels.numel() / squares) >= MIN_SNR_DB


@pytest.mark.parametrize("name", INT8)
def test_an_int8_value_takes_one_byte(made: Made, name: str):
    num_values = sum(latent.numel() for latent in made.latents("float32").values())
    assert num_latent_bytes(made.out("float32")) == 4 * num_values
    assert num_latent_bytes(made.out(name)) == num_values


def num_latent_bytes(folder: Path) -> int:
    tensors = [safetensors.numpy.load_file(path) for path in folder.glob("data/*/*.safetensors")]
    if tensors:
        return sum(tensor["latents"].nbytes for tensor in tensors)
    tables = [pq.read_table(path, columns=["latent"]) for path in folder.glob("data/*/*.parquet")]
    return sum(len(latent) for table in tables for latent in table["latent"].to_pylist())


def test_int8_grows_no_other_column(made: Made):
    sizes = [
        sum(path.stat().st_size for path in made.out(name).glob("data/*/*"))
        for name in ("float32", "parquet")
    ]
    saved = 3 * num_latent_bytes(made.out("parquet"))
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("name", INT8)
def test_all_readers_of_int8_agree(made: Made, name: str):
    url = str(made.out(name))
    by_the_format = read_rows(made.out(name))
    rows = {(row.unit, row.key): row.latent for row in open_dataset(url)}
    assert rows.keys() == by_the_format.keys()
    for key, latent in rows.items():
        assert same_bits(latent, by_the_format[key].latent)
    loader = LatentLoader(url, batch_size=4, tail="short", columns=["unit", "key"], normalize=False)
    seen = []
    for batch in loader:
        keys = list(zip(batch.columns["unit"], batch.columns["key"], strict=True))
        for key, latent in zip(keys, batch.latents, strict=True):
            assert same_bits(latent, rows[key])
        seen += keys
    assert sorted(seen) == sorted(rows)
    mapped = LatentDataset(url, columns=["unit", "key"], normalize=False)
    for index in range(len(mapped)):
        assert same_bits(
            mapped[index]["latents"], rows[mapped[index]["unit"], mapped[index]["key"]]
        )


def test_int8_calibration_is_reproducible(made: Made):
    one, other = (made.dataset(name).contract.latents.quantization for name in INT8)
    assert one == other
    first, second = (made.latents(name) for name in INT8)
    assert all(same_bits(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", LATENTS)
def test_int8_statistics_normalise_the_latents(made: Made, name: str):
    """As docs/training.md has it, over all rows."""
    stats = made.dataset(name).stats
    mean, std = (torch.from_numpy(v).float()[:, None, None] for v in (stats.mean, stats.std))
    loader = LatentLoader(
        str(made.out(name)), batch_size=4, tail="short", normalize=False, dtype=torch.float32
    )
    white = torch.cat(
        [((b.latents - mean) / std).double().transpose(0, 1).flatten(1) for b in loader], dim=1
    )
    assert white.shape[1] == stats.count
    torch.testing.assert_close(white.mean(dim=1), torch.zeros(len(std)).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        white.std(dim=1, correction=0), torch.ones(len(std)).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", INT8)
def test_verify_and_inspect_accept_int8(made: Made, name: str):
    assert verify(str(made.out(name))).ok
    dataset = made.dataset(name)
    described = describe(dataset, 5)
    assert described["contract"]["latents"]["quantization"]["num_images"] == 512
    assert [channel["std"] for channel in described["channels"]] == dataset.stats.std.tolist()
    text = render(described)
    assert "up to 512 images, seed 0" in text
    assert f"{dataset.stats.std[0]:.4f}" in text
    receipts = [json.loads(path.read_bytes()) for path in made.out(name).glob("commits/*")]
    num_clamped = sum(receipt["notes"]["clamped_values"] for receipt in receipts)
    assert num_clamped < 1e-3 * num_latent_bytes(made.out(name))


def test_a_second_int8_run_encodes_nothing(made: Made):
    before = tree_digest(made.out("parquet"))
    config = load_config(made.config("parquet"))
    again = run(config, quiet=True)
    assert (again.num_committed, again.num_skipped, again.exit_code) == (0, 4, 0)
    assert tree_digest(made.out("parquet")) == before


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("latents.calibration.seed=1", "latents.quantization.seed: dataset has 0, config has 1"),
        (
            "latents.calibration.num_images=9",
            "latents.quantization.num_images: dataset has 512, config has 9",
        ),
        ("latents.dtype=float16", 'latents.dtype: dataset has "int8", config has "float16"'),
    ],
)
def test_another_calibration_is_refused_by_its_field(made: Made, setting: str, expected: str):
    before = tree_digest(made.out("parquet"))
    config = load_config(made.config("parquet"), [setting])
    assert make_plan(config).diff == [expected]
    with pytest.raises(ContractMismatch) as caught:
        run(config, quiet=True)
    assert caught.value.exit_code == 2
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [expected]
    assert tree_digest(made.out("parquet")) == before


def test_a_source_without_images_to_calibrate_on_is_an_error(cli: Cli, tmp_path: Path):
    write_tar(tmp_path / "src" / "0.tar", [("a.png", b"text")])
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(config_tree(tmp_path, latents={"dtype": "int8"})))
    result = cli("run", config)
    assert result.code == 1
    assert "error: int8 is calibrated on images, and no source shard has one" in result.stderr
    assert not (tmp_path / "out" / "contract.json").exists()


# What another driver does between this one's look at the output and its put.
SECOND = """
import pathlib, shutil, sys
import latentcache

config = latentcache.load_config(sys.argv[1])
plan = latentcache.make_plan(config)
assert plan.existing_contract is None and not plan.contract.is_resolved
output = pathlib.Path(sys.argv[2])
output.mkdir()
shutil.copy(sys.argv[3], output / "contract.json")
sys.exit(latentcache.run(config, plan=plan).exit_code)
"""


def test_the_loser_of_a_contract_race_adopts_the_contract(
    made: Made, ray_address: str, tmp_path: Path
):
    """Its own would be those of the run that made `parquet`, over the same images."""
    mine = made.dataset("parquet").contract
    terms = mine.latents
    assert terms.quantization
    assert terms.quantization.scale
    theirs = replace(
        terms.quantization,
        scale=tuple(1.0625 * scale for scale in terms.quantization.scale),
        zero_point=tuple(range(len(terms.quantization.scale))),
    )
    theirs_contract = replace(mine, latents=replace(terms, quantization=theirs))
    establish_contract(Store(str(tmp_path / "theirs")), theirs_contract, {"by": "the other"})

    output, config = tmp_path / "out", tmp_path / "c.yaml"
    tree = yaml.safe_load(made.config("parquet").read_text())
    config.write_text(yaml.safe_dump(tree | {"output": {"url": str(output)}}))
    arguments = [str(config), str(output), str(tmp_path / "theirs/contract.json")]
    environment = dict(os.environ) | {"RAY_ADDRESS": ray_address}
    result = Running([sys.executable, "-c", SECOND, *arguments], environment).result()
    assert result.code == 0, result.stderr

    assert read_contract(Store(str(output))) == theirs_contract
    for path in output.glob("commits/*"):
        assert json.loads(path.read_bytes())["contract_fingerprint"] == theirs_contract.fingerprint
    dataset = open_dataset(str(output))
    assert len(dataset) == len(made.latents("parquet"))
    assert verify(str(output)).ok
    rerun = run(load_config(config), quiet=True)
    assert (rerun.num_committed, rerun.num_skipped) == (0, 4)
    stored = read_rows(output)
    assert all(same_bits(row.latent, stored[row.unit, row.key].latent) for row in dataset)
