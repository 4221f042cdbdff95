"""What a first run finds out on real images: int8's scale and zero point, and then its units."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentcache import KLAutoencoder, load_vae, make_plan, parse_config
from latentcache.dataset.contract import Contract, QuantizationContract
from latentcache.dataset.quantization import fit, to_stored, to_values
from latentcache.dataset.receipts import Receipt, new_attempt
from latentcache.dataset.shards import iterate_latents
from latentcache.engine import unit as unit_module
from latentcache.engine import worker as worker_module
from latentcache.engine.job import Job, UnitTask
from latentcache.engine.plan import units_of
from latentcache.engine.unit import UnitRunner
from latentcache.engine.worker import calibrate
from latentcache.errors import SourceError
from latentcache.images.source import SourceShard, list_shards
from latentcache.metrics import drift_db
from latentcache.storage_options import StorageOptions
from latentcache.vae.encoder import LatentEncoder
from makers import config_tree, draw, png, write_tar


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> KLAutoencoder:
    return load_vae(str(checkpoint), decoder=False)


def write_shards(folder: Path, num_shards: int, num_images: int) -> None:
    for number in range(num_shards):
        images = [
            (f"{index}.png", png(64, 64, 100 * number + index)) for index in range(num_images)
        ]
        write_tar(folder / "src" / f"{number:04d}.tar", images)


def plan_job(folder: Path, checkpoint: Path, **latents: Any) -> tuple[Job, list[SourceShard]]:
    """What the driver of a first run over `<folder>/src/*.tar` asks a worker to calibrate."""
    tree = config_tree(
        folder, vae={"checkpoint": str(checkpoint)}, latents={"dtype": "int8"} | latents
    )
    config = parse_config(tree)
    plan = make_plan(config)
    assert not plan.contract.is_resolved
    job = Job(
        contract=plan.contract,
        checkpoint=config.vae.checkpoint,
        checkpoint_storage=StorageOptions(),
        source_storage=StorageOptions(),
        output_url=plan.output.url,
        output_storage=StorageOptions(),
        batch_size=4,
        decode_threads=2,
    )
    return job, plan.shards


def numbers(contract: Contract) -> QuantizationContract:
    assert contract.is_resolved
    assert contract.latents.quantization
    return contract.latents.quantization


def test_int8_range_covers_all_images_by_channel(
    tmp_path: Path, checkpoint: Path, vae: KLAutoencoder
):
    write_shards(tmp_path, 3, 5)
    calibrated = calibrate(vae, *plan_job(tmp_path, checkpoint, calibration={"num_images": 99}))
    measured = numbers(calibrated)
    assert (measured.num_images, measured.seed) == (99, 0)
    pictures = [
        np.asarray(draw(64, 64, 100 * shard + index)) for shard in range(3) for index in range(5)
    ]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    latents = vae.encode(pixels)[:, :4]
    expected = fit(measured, latents.transpose(0, 1).flatten(1))
    np.testing.assert_allclose(measured.scale, expected.scale, rtol=1e-4)
    np.testing.assert_allclose(measured.zero_point, expected.zero_point, atol=1)
    stored, _ = to_stored(latents, calibrated.latents)
    assert drift_db(to_values(stored, calibrated.latents), latents) > 40


@pytest.mark.parametrize("posterior", ["moments", "sample"])
def test_calibration_measures_the_stored_posterior(
    tmp_path: Path, checkpoint: Path, vae: KLAutoencoder, posterior: str
):
    write_shards(tmp_path, 1, 4)
    mean = numbers(calibrate(vae, *plan_job(tmp_path, checkpoint)))
    measured = numbers(calibrate(vae, *plan_job(tmp_path, checkpoint, posterior=posterior)))
    assert mean.scale
    assert measured.scale
    if posterior == "moments":
        assert len(measured.scale) == 8
        np.testing.assert_allclose(measured.scale[:4], mean.scale, rtol=1e-5)
    else:  # random weights have a wide posterior
        assert sum(measured.scale) > 1.05 * sum(mean.scale)


def test_calibration_is_deterministic_by_seed(tmp_path: Path, checkpoint: Path, vae: KLAutoencoder):
    write_shards(tmp_path, 20, 2)
    few = {"num_images": 4}
    first, second = (
        calibrate(vae, *plan_job(tmp_path, checkpoint, calibration=few)) for _ in range(2)
    )
    assert first == second
    other = calibrate(vae, *plan_job(tmp_path, checkpoint, calibration=few | {"seed": 1}))
    assert numbers(other).scale != numbers(first).scale


def test_calibration_skips_unreadable_images_and_shards(
    tmp_path: Path, checkpoint: Path, vae: KLAutoencoder
):
    write_shards(tmp_path, 2, 3)
    expected = calibrate(vae, *plan_job(tmp_path, checkpoint))
    good = png(64, 64)
    bad = [("a.png", b"text"), ("b.png", good[:50]), ("c.txt", b"no image")]
    write_tar(tmp_path / "src" / "0000b.tar", bad)
    (tmp_path / "src" / "0000c.tar").write_bytes(b"no tar")
    gone = write_tar(tmp_path / "src" / "0000d.tar", [("a.png", good)])
    job, shards = plan_job(tmp_path, checkpoint)
    gone.unlink()
    assert len(shards) == 5
    np.testing.assert_allclose(
        numbers(calibrate(vae, job, shards)).scale, numbers(expected).scale, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("num_shards", "in_each", "num_opened"), [(20, 3, 16), (3, 12, 3), (36, 1, 32)]
)
def test_calibration_reads_few_images_of_few_shards(
    tmp_path: Path,
    checkpoint: Path,
    vae: KLAutoencoder,
    monkeypatch: pytest.MonkeyPatch,
    num_shards: int,
    in_each: int,
    num_opened: int,
):
    write_shards(tmp_path, num_shards, in_each)
    job, shards = plan_job(tmp_path, checkpoint, calibration={"num_images": 32})
    read: Counter[str] = Counter()
    read_shard = worker_module.read_images

    def count(shard: SourceShard, *args: Any, **options: Any) -> Iterator[Any]:
        for sample in read_shard(shard, *args, **options):
            read[shard.url] += 1
            yield sample

    monkeypatch.setattr(worker_module, "read_images", count)
    calibrate(vae, job, shards)
    assert len(read) == num_opened
    assert read.total() == 32


def test_calibration_without_an_image_is_an_error(
    tmp_path: Path, checkpoint: Path, vae: KLAutoencoder
):
    write_tar(tmp_path / "src" / "0.tar", [("a.png", b"text")])
    job, shards = plan_job(tmp_path, checkpoint)
    with pytest.raises(SourceError, match=r"no source shard .*0\.tar, or choose another"):
        calibrate(vae, job, shards)


# Units.


@pytest.fixture
def runner(tmp_path: Path, checkpoint: Path, vae: KLAutoencoder) -> Iterator[UnitRunner]:
    """Of a run over one shard of seven pictures, with a range too narrow for them."""
    write_tar(tmp_path / "src" / "0.tar", [(f"{i}.png", png(64, 64, i)) for i in range(7)])
    job, shards = plan_job(tmp_path, checkpoint)
    contract = calibrate(vae, job, shards)
    scale = tuple(0.4 * scale for scale in numbers(contract).scale or ())
    narrow = replace(contract.latents, quantization=replace(numbers(contract), scale=scale))
    job = replace(job, contract=replace(contract, latents=narrow))
    runner = UnitRunner(job, LatentEncoder(vae, "fp32", 4))
    yield runner
    runner.decode_pool.close()
    runner.encode_pool.close()


def receipt_of(runner: UnitRunner, folder: Path) -> Receipt:
    shards = list_shards(f"{folder}/src/*.tar", StorageOptions())
    (unit,) = units_of(shards, runner.job.contract)
    receipt = runner.run(UnitTask(unit, 0, new_attempt()))
    assert isinstance(receipt, Receipt), receipt
    return receipt


def stored_in(receipt: Receipt, folder: Path) -> torch.Tensor:
    (file,) = receipt.record.files
    return torch.stack([latent for _, latent in iterate_latents([folder / "out" / file.path])])


def test_unit_counts_values_outside_the_int8_range(tmp_path: Path, runner: UnitRunner):
    receipt = receipt_of(runner, tmp_path)
    stored, terms = stored_in(receipt, tmp_path), runner.job.contract.latents
    assert stored.dtype == torch.int8
    assert (stored.min().item(), stored.max().item()) == (-127, 127)
    pixels = [np.asarray(draw(64, 64, index)) for index in range(7)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    expected, num_clamped = to_stored(runner.encoder.encode(images).moments[:, :4], terms)
    assert (stored.int() - expected.int()).abs().max() <= 1
    assert receipt.notes
    assert receipt.notes["clamped_values"] == pytest.approx(num_clamped.sum().item(), abs=3)
    assert receipt.notes["clamped_values"] > 20, "the case is about nothing"
    values = to_values(stored, terms).double().transpose(0, 1).flatten(1)
    np.testing.assert_allclose(receipt.statistics.mean, values.mean(dim=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(receipt.statistics.std, values.std(dim=1, correction=0), rtol=1e-6)
    np.testing.assert_allclose(receipt.statistics.maximum, values.amax(dim=1), rtol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latent_that_is_not_finite_is_a_reject_in_int8(
    tmp_path: Path, runner: UnitRunner, monkeypatch: pytest.MonkeyPatch, value: float
):
    draw_latents = unit_module.draw_latents

    def spoil(moments: torch.Tensor, posterior: str, unit: str, keys: list[str]) -> torch.Tensor:
        latents = draw_latents(moments, posterior, unit, keys).clone()
        if "5" in keys:
            latents[keys.index("5"), 1, 2, 3] = value
        return latents

    monkeypatch.setattr(unit_module, "draw_latents", spoil)
    receipt = receipt_of(runner, tmp_path)
    assert (receipt.record.num_rows, receipt.record.num_rejects) == (6, 1)
    assert (stored_in(receipt, tmp_path) != -128).all()
    assert json.loads(receipt.to_bytes())["notes"].keys() == {
        "encoded_again_in_fp32",
        "clamped_values",
    }
