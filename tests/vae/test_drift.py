"""How far 16-bit encoding is from fp32, with trained weights and with the published size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import KL_F8, write_diffusers_folder
from latentcache import KLAutoencoder, load_vae
from latentcache.demo.draw import draw_image
from latentcache.metrics import drift_db
from latentcache.vae.encoder import LatentEncoder


@pytest.fixture(scope="module")
def images() -> Tensor:
    rng = np.random.default_rng(3)
    drawn = [torch.from_numpy(draw_image(rng, 128, 128)[0].copy()) for _ in range(4)]
    return torch.stack(drawn).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KLAutoencoder]:
    folder = write_diffusers_folder(tmp_path_factory.mktemp("kl-f8") / "vae", KL_F8)
    return {"demo": load_vae("demo"), "kl-f8": load_vae(str(folder), decoder=False)}


@pytest.mark.parametrize(
    ("name", "precision", "least_db"),
    # float16 has three bits more than bfloat16, at 6 dB each. Random weights, as that of published
    # size has here, are harder than trained ones. bench/encoder.py writes the figures down.
    [("demo", "fp16", 55), ("demo", "bf16", 35), ("kl-f8", "fp16", 45), ("kl-f8", "bf16", 27)],
)
def test_16_bit_drift_stays_above_its_minimum(
    name: str,
    precision: str,
    least_db: float,
    vaes: dict[str, KLAutoencoder],
    images: Tensor,
) -> None:
    vae = vaes[name]
    channels = vae.architecture.latent_channels
    exact = LatentEncoder(vae, "fp32").encode(images).moments[:, :channels]
    narrow = LatentEncoder(vae, precision).encode(images).moments[:, :channels]
    actual_db = drift_db(narrow, exact)
    assert least_db < actual_db < 90
