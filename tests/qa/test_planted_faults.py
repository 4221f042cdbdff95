"""Mistakes that went unnoticed in published caches, planted one by one: QA must see each."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import write_folder
from latentcache import KLAutoencoder, load_vae, make_plan, parse_config
from latentcache.dataset.contract import establish_contract
from latentcache.dataset.receipts import Receipt, UnitSummary, new_attempt
from latentcache.dataset.state import State, write_next
from latentcache.demo.draw import draw_image
from latentcache.engine import attempt as attempt_module
from latentcache.engine.job import Job, QaJob, UnitTask
from latentcache.engine.unit import UnitRunner
from latentcache.qa.evaluator import QaEvaluator, QaModels
from latentcache.qa.gates import Gates, QaTotals
from latentcache.storage_options import StorageOptions
from latentcache.vae.encoder import Encoded, LatentEncoder
from makers import config_tree, encode_image, write_tar
from runs import Cli

pytestmark = pytest.mark.slow

SIDE = 128
GATES = Gates(min_psnr_db=15, min_drift_db=30)  # the defaults

Fault = Callable[[LatentEncoder, Tensor], Encoded]


def on_images(change: Callable[[Tensor], Tensor]) -> Fault:
    """A fault in what the encoder is given: uint8 [B, 3, H, W]."""
    return lambda encoder, images: encoder.encode(change(images))


def on_latents(change: Callable[[Tensor], Tensor]) -> Fault:
    """A fault in what it gives: the mean, [B, C, h, w]."""

    def encode(encoder: LatentEncoder, images: Tensor) -> Encoded:
        encoded = encoder.encode(images)
        mean, logvar = encoded.moments.chunk(2, dim=1)
        return replace(encoded, moments=torch.cat([change(mean), logvar], dim=1))

    return encode


def sample_for_mean(encoder: LatentEncoder, images: Tensor) -> Encoded:
    encoded = encoder.encode(images)
    mean, logvar = encoded.moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = mean + (0.5 * logvar).exp() * noise
    return replace(encoded, moments=torch.cat([drawn, logvar], dim=1))


def zero_one_channel(mean: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(mean[:, :1]), mean[:, 1:]], dim=1)


FAULTS: dict[str, Fault] = {
    # [0, 1] in place of [-1, 1]: 0 is given as what stands for a half.
    "input in [0, 1]": on_images(lambda images: images // 2 + 128),
    "BGR": on_images(lambda images: images.flip(1)),
    "stored scaled": on_latents(lambda mean: mean * 0.18215),
    "crop shifted by 8 px": on_images(lambda images: images.roll(8, dims=3)),
    "one channel zeroed": on_latents(zero_one_channel),
    "latents of the neighbouring row": on_latents(lambda mean: mean.roll(1, dims=0)),
    "a sample in place of the mean": sample_for_mean,
}


class FaultyEncoder(LatentEncoder):
    """An encoder with a fault; counts how often it came to bear."""

    def __init__(self, vae: KLAutoencoder, fault: Fault | None) -> None:
        super().__init__(vae, "fp32", batch_size=8)
        self._sound = LatentEncoder(vae, "fp32", batch_size=8)
        self._fault = fault
        self.num_fired = 0

    def start(self, images: Tensor) -> Callable[[], Encoded]:
        sound = self._sound.encode(images)
        if self._fault is None:
            return lambda: sound
        faulty = self._fault(self._sound, images)
        self.num_fired += not torch.equal(faulty.moments, sound.moments)
        return lambda: faulty


@pytest.fixture(scope="module")
def spread_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo VAE with its log-variance raised to about zero, where a draw is not its mean."""
    demo = importlib.resources.files("latentcache.demo") / "weights"
    config = json.loads((demo / "config.json").read_text())
    with importlib.resources.as_file(demo / "diffusion_pytorch_model.safetensors") as path:
        state = load_file(path)
    channels = config["latent_channels"]
    state["quant_conv.weight"][channels:] *= 0.01
    state["quant_conv.bias"][channels:] = 0.0
    return write_folder(tmp_path_factory.mktemp("spread"), config, state)


@dataclass
class Made:
    """A dataset made in this process, and the receipts of its units."""

    url: str
    receipts: list[Receipt]

    @property
    def breaches(self) -> list[str]:
        """What the run itself would have said."""
        units = (UnitSummary.of(receipt.record) for receipt in self.receipts)
        return QaTotals(GATES, units).breaches()


@pytest.fixture
def make(tmp_path: Path, spread_vae: Path) -> Iterator[Callable[[Fault | None], Made]]:
    """Make a dataset as a run would, two units of twelve pictures, with a fault or without."""
    for shard in range(2):
        rng = np.random.default_rng(shard)
        pictures = [Image.fromarray(draw_image(rng, 160, 144)[0]) for _ in range(12)]
        members = [(f"{i:04d}.png", encode_image(picture)) for i, picture in enumerate(pictures)]
        write_tar(tmp_path / "src" / f"{shard}.tar", members)
    config = parse_config(
        config_tree(
            tmp_path, transform={"resolution_px": SIDE}, vae={"checkpoint": str(spread_vae)}
        )
    )
    runners = []

    def run(fault: Fault | None) -> Made:
        plan = make_plan(config)
        store, contract = plan.output, plan.contract
        establish_contract(store, contract, {"checkpoint": str(spread_vae)})
        vae = load_vae(str(spread_vae))
        encoder = FaultyEncoder(vae, fault)
        options = StorageOptions()
        job = Job(
            contract=contract,
            checkpoint=str(spread_vae),
            checkpoint_storage=options,
            source_storage=options,
            output_url=store.url,
            output_storage=options,
            batch_size=8,
            decode_threads=1,
            qa=QaJob(0.1, 0, QaModels(str(spread_vae))),
        )
        runner = UnitRunner(job, encoder, QaEvaluator(contract, vae))
        runners.append(runner)
        receipts = []
        for unit in plan.units:
            receipt = runner.run(UnitTask(unit, 0, new_attempt(), {f"{SIDE}x{SIDE}": 4}))
            assert isinstance(receipt, Receipt), receipt
            assert store.put_if_absent(receipt.path, receipt.to_bytes())
            receipts.append(receipt)
        snapshot = {unit.source: [unit] for unit in plan.units}
        channels = contract.stored_channels
        write_next(
            State(store), contract.fingerprint, channels, lambda: snapshot, on_missing="keep"
        )
        assert (encoder.num_fired > 0) == (fault is not None)
        return Made(store.url, receipts)

    yield run
    for runner in runners:
        runner.decode_pool.close()
        runner.encode_pool.close()


def test_correct_dataset_passes_all_gates(
    make: Callable[[Fault | None], Made], local_cli: Cli, spread_vae: Path, tmp_path: Path
) -> None:
    made = make(None)
    assert not made.breaches
    assert all(r.record.qa and r.record.qa.num_rows[f"{SIDE}x{SIDE}"] >= 4 for r in made.receipts)
    for again in (), ("--units", "1", "--source", tmp_path / "src"):
        report = local_cli.ok("qa", made.url, "--checkpoint", spread_vae, *again)
        assert report["verdict"]["status"] == "passed"
        assert report["measures"]["psnr_db"]["mean"] > 18
        assert report["measures"]["drift_db"]["min"] > 60


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_fails_the_drift_gate(
    name: str, make: Callable[[Fault | None], Made], local_cli: Cli, spread_vae: Path
) -> None:
    made = make(FAULTS[name])
    assert made.breaches, "the run would have gone on"
    result = local_cli("qa", made.url, "--checkpoint", spread_vae)
    assert result.code == 3, result.stderr
    assert "below qa.min_drift_db" in result.stderr


def test_nan_in_a_data_file_fails_the_drift_gate(
    make: Callable[[Fault | None], Made],
    local_cli: Cli,
    spread_vae: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_fired = 0

    class Writer(attempt_module.BucketWriter):
        """Loses a value between the finite check and the disk."""

        def append(self, latents: Tensor, rows: object) -> None:
            nonlocal num_fired
            num_fired += 1
            latents = latents.clone()
            latents[:, 0, 0, 0] = torch.nan
            super().append(latents, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(attempt_module, "BucketWriter", Writer)
    made = make(None)
    assert num_fired
    assert made.breaches
    result = local_cli("qa", made.url, "--checkpoint", spread_vae)
    assert result.code == 3, result.stderr
    assert "-100.0 dB" in result.stderr
