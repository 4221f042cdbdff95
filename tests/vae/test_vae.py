"""The autoencoder against diffusers' own, and the demo VAE against its pictures."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import KL_F8, TINY_KL_F8, write_diffusers_folder
from latentcache.demo.draw import draw_image
from latentcache.errors import CheckpointError, ConfigError
from latentcache.vae.architecture import Architecture
from latentcache.vae.model import KLAutoencoder, to_uint8
from latentcache.vae.weights import load_vae

# The shapes of the published relatives, at a fraction of their widths.
SDXL_LIKE = TINY_KL_F8 | {"layers_per_block": 2, "scaling_factor": 0.13025}
SD3_LIKE = TINY_KL_F8 | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
}
FLUX_LIKE = SD3_LIKE | {"norm_num_groups": 8, "scaling_factor": 0.3611, "shift_factor": 0.1159}
NO_ATTENTION = TINY_KL_F8 | {"mid_block_add_attention": False, "norm_num_groups": 16}
FOUR_TIMES = {"block_out_channels": [32, 64, 64], "layers_per_block": 2}


def random_images(batch_size: int, height_px: int, width_px: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (batch_size, 3, height_px, width_px)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def assert_agree(vae: KLAutoencoder, reference: diffusers.AutoencoderKL, images: Tensor) -> None:
    """Moments and decoded images within 1e-4 of diffusers'."""
    with torch.inference_mode():
        posterior = reference.encode(images.float() / 127.5 - 1.0).latent_dist
        moments = vae.encode(images)
        expected = torch.cat([posterior.mean, posterior.logvar], dim=1)
        torch.testing.assert_close(moments, expected, atol=1e-4, rtol=0)
        decoded = vae.decode(posterior.mean)
        expected = reference.decode(posterior.mean).sample.clamp(-1, 1)
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
    assert moments.std() > 0.05
    assert decoded.std() > 0.05


@pytest.mark.parametrize(
    "fields",
    [KL_F8, SDXL_LIKE, SD3_LIKE, FLUX_LIKE, NO_ATTENTION, FOUR_TIMES],
    ids=["kl-f8", "sdxl", "sd3", "flux", "no-attention", "f4"],
)
def test_agrees_with_diffusers(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = write_diffusers_folder(tmp_path, fields)
    vae = load_vae(str(folder))
    assert_agree(vae, diffusers.AutoencoderKL.from_pretrained(folder), random_images(2, 64, 48))
    assert vae.architecture.scaling_factor == fields.get("scaling_factor", 0.18215)
    assert vae.architecture.shift_factor == fields.get("shift_factor")
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert not vae.training


def test_kl_f8_has_the_published_number_of_parameters() -> None:
    architecture = Architecture.from_config(KL_F8)
    with torch.device("meta"):
        vae = KLAutoencoder(architecture)
    count = sum(p.numel() for m in (vae.encoder, vae.quant_conv) for p in m.parameters())
    assert count == 34_163_664
    assert architecture.downsample_factor == 8


def test_logvar_is_clamped_as_in_diffusers(tmp_path: Path) -> None:
    vae = load_vae(str(write_diffusers_folder(tmp_path)))
    vae.encoder.conv_out.weight.mul_(1e4)
    logvar = vae.encode(random_images(1, 32, 32)).chunk(2, dim=1)[1]
    assert logvar.min() == -30
    assert logvar.max() == 20


def test_computes_in_its_dtype_and_returns_float32(tmp_path: Path) -> None:
    folder = str(write_diffusers_folder(tmp_path))
    vae, narrow = load_vae(folder), load_vae(folder, dtype=torch.bfloat16)
    images = random_images(1, 32, 32)
    moments = narrow.encode(images)
    assert moments.dtype == narrow.decode(moments[:, :4]).dtype == torch.float32
    assert 0 < (moments - vae.encode(images)).abs().max() < 0.2


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 36, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32),
    ],
    ids=["odd-size", "empty", "no-batch", "gray", "float"],
)
def test_refuses_other_images(images: Tensor) -> None:
    with pytest.raises(ConfigError, match="encode needs"):
        load_vae("demo", decoder=False).encode(images)


def test_decode_refuses_wrong_shapes_and_a_missing_decoder() -> None:
    with pytest.raises(ConfigError, match="without its decoder"):
        load_vae("demo", decoder=False).decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ConfigError, match="decode needs"):
        load_vae("demo").decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "_class_name = 'AutoencoderDC' is not supported"),
        ({"_class_name": "VQModel"}, "_class_name = 'VQModel' is not supported"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"in_channels": 4}, "in_channels = 4"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [32, "64"]}, "block_out_channels"),
        ({"block_out_channels": [48]}, r"block_out_channels = \[48\] has no 32 equal norm groups"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"layers_per_block": 0}, "layers_per_block = 0 is not a positive integer"),
        ({"use_quant_conv": 1}, "use_quant_conv = 1 is neither true nor false"),
        ({"scaling_factor": None}, "scaling_factor = None is not a number"),
        ({"latents_mean": [0.0]}, "latents_mean = .* needs one value per latent channel"),
    ],
)
def test_config_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_config(fields)


def test_to_uint8_inverts_the_normalisation() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1.0), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@torch.inference_mode()
def test_the_demo_vae_reconstructs_new_pictures() -> None:
    vae = load_vae("demo")
    rng = np.random.default_rng(2**32)  # no seed of the trainer's
    pictures = np.stack([draw_image(rng, 128, 128)[0] for _ in range(32)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    mean = vae.encode(images)[:, :16]
    difference = to_uint8(vae.decode(mean)).double() - images.double()
    psnr_db = 10 * torch.log10(255**2 / difference.square().mean((1, 2, 3)))
    assert psnr_db.mean() > 21
    assert 0.8 < mean.std() * vae.architecture.scaling_factor < 1.25


def test_demo_is_a_diffusers_folder() -> None:
    folder = str(importlib.resources.files("latentcache.demo") / "weights")
    reference, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    vae = load_vae("demo")
    assert_agree(vae, reference, random_images(1, 64, 64))
    assert reference.config.scaling_factor == vae.architecture.scaling_factor
