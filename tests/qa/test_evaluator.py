"""The measures of single rows: the drift of moments, and a GPU that runs out of memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from latentcache import KLAutoencoder, load_vae
from latentcache.dataset.contract import Contract
from latentcache.demo.draw import draw_image
from latentcache.errors import ConfigError
from latentcache.image_files import write_png
from latentcache.qa.evaluator import QaEvaluator
from latentcache.vae.weights import encoder_fingerprint
from makers import make_contract

SIDE = 64


@pytest.fixture(scope="module")
def vae() -> KLAutoencoder:
    return load_vae("demo")


def contract_of(vae: KLAutoencoder, posterior: str) -> Contract:
    contract = make_contract(
        posterior=posterior, dtype="float32", latent_channels=vae.architecture.latent_channels
    )
    fingerprint = encoder_fingerprint(vae)
    return dataclasses.replace(
        contract, vae=dataclasses.replace(contract.vae, encoder_fingerprint=fingerprint)
    )


def pictures(number: int) -> Tensor:
    rng = np.random.default_rng(5)
    drawn = [torch.from_numpy(draw_image(rng, SIDE, SIDE)[0].copy()) for _ in range(number)]
    return torch.stack(drawn).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def test_drift_of_moments_is_the_error_of_training_samples(
    vae: KLAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition: the mean squared distance of many draws with the same noise."""
    images = pictures(1)
    moments = vae.encode(images)[0]
    channels = vae.architecture.latent_channels
    moments[channels:] = -1.0
    generator = torch.Generator().manual_seed(0)
    stored = moments + 0.05 * torch.randn(moments.shape, generator=generator)
    evaluator = QaEvaluator(contract_of(vae, "moments"), vae)
    # The demo's own log-variance is so low that it would not show.
    monkeypatch.setattr(vae, "encode", lambda pixels: moments[None])
    signal = 2.0
    crops = {"a": write_png(images[0])}
    (row,) = evaluator.evaluate("unit", f"{SIDE}x{SIDE}", crops, {"a": stored}, signal)
    noise = torch.randn((4000, *moments[:channels].shape), generator=generator)

    def draw(m: Tensor) -> Tensor:
        return m[:channels] + (0.5 * m[channels:]).exp() * noise

    error = (draw(stored) - draw(moments)).square().mean()
    assert row.drift_db == pytest.approx(10 * np.log10(signal / float(error)), abs=0.05)


def test_rows_are_measured_one_by_one_when_gpu_memory_runs_out(
    vae: KLAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(3)
    with torch.inference_mode():
        latents = vae.encode(images)[:, : vae.architecture.latent_channels]
    crops = {f"k{index}": write_png(image) for index, image in enumerate(images)}
    stored = {f"k{index}": latent for index, latent in enumerate(latents)}
    evaluator = QaEvaluator(contract_of(vae, "mean"), vae)
    expected = evaluator.evaluate("unit", f"{SIDE}x{SIDE}", crops, stored, 1.0)
    decode, max_rows, num_fired = vae.decode, 1, 0

    def decode_in(latents: Tensor) -> Tensor:
        nonlocal num_fired
        if len(latents) > max_rows:
            num_fired += 1
            raise torch.OutOfMemoryError("planted")
        return decode(latents)

    monkeypatch.setattr(vae, "decode", decode_in)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = evaluator.evaluate("unit", f"{SIDE}x{SIDE}", crops, stored, 1.0)
    assert num_fired == 1
    assert [row.key for row in rows] == [row.key for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.psnr_db == pytest.approx(other.psnr_db, abs=0.01)
    max_rows = 0
    with pytest.raises(ConfigError, match=r"64x64 for QA does not fit"):
        evaluator.evaluate("unit", f"{SIDE}x{SIDE}", crops, stored, 1.0)
