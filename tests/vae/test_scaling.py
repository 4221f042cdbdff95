"""The scaling factor: of the checkpoint's config, of its contents, or of the run's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import (
    TINY_KL_F8,
    make_reference,
    to_compvis,
    write_compvis_checkpoint,
    write_diffusers_folder,
    write_folder,
)
from latentcache import load_vae, parse_config
from latentcache.engine.contract_setup import requested_contract
from latentcache.errors import ConfigError
from makers import config_tree

SIXTEEN = TINY_KL_F8 | {"latent_channels": 16, "use_quant_conv": False}


def factors(folder: Path, checkpoint: Path, **vae: Any) -> tuple[float, float]:
    """What the contract of a run says of the scaling and shift factors."""
    tree = config_tree(folder, vae={"checkpoint": str(checkpoint), **vae})
    contract = requested_contract(parse_config(tree)).vae
    return contract.scaling_factor, contract.shift_factor


def test_a_file_without_config_needs_a_scaling_factor(tmp_path: Path) -> None:
    lone = write_compvis_checkpoint(tmp_path / "sdxl_vae.safetensors")
    with pytest.raises(ConfigError, match=r"sdxl_vae\.safetensors .* set vae\.scaling_factor") as e:
        factors(tmp_path, lone)
    for usual in ("0.18215", "0.13025", "1.5305", "0.0609", "0.3611", "0.1159", "config.json"):
        assert usual in str(e.value)
    with pytest.raises(ConfigError, match=r"set vae\.scaling_factor"):
        factors(tmp_path, lone, shift_factor=0.1)
    assert factors(tmp_path, lone, scaling_factor=0.13025) == (0.13025, 0.0)
    assert load_vae(str(lone)).architecture.scaling_factor is None


def test_a_16_channel_file_without_config_takes_the_given_factors(tmp_path: Path) -> None:
    lone = write_compvis_checkpoint(tmp_path / "ae.safetensors", SIXTEEN)
    given = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    assert factors(tmp_path, lone, **given) == (0.3611, 0.1159)


def test_factors_of_a_config_beside_the_file_are_used_and_cannot_be_contradicted(
    tmp_path: Path,
) -> None:
    fields = SIXTEEN | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    lone = write_compvis_checkpoint(tmp_path / "vae.safetensors", fields)
    folder = write_diffusers_folder(tmp_path, fields)
    for checkpoint in (lone, folder):
        assert factors(tmp_path, checkpoint) == (1.5305, 0.0609)
        assert factors(tmp_path, checkpoint, scaling_factor=1.5305) == (1.5305, 0.0609)
        with pytest.raises(ConfigError, match=r"vae\.scaling_factor is 0\.3611, .* is 1\.5305"):
            factors(tmp_path, checkpoint, scaling_factor=0.3611)
        with pytest.raises(ConfigError, match=r"vae\.shift_factor is 0, .* is 0\.0609"):
            factors(tmp_path, checkpoint, shift_factor=0)


def test_a_diffusers_config_without_a_factor_has_the_diffusers_default(tmp_path: Path) -> None:
    """As the hub's sd-vae-ft-mse has it."""
    reference = make_reference(TINY_KL_F8)
    fields = {k: v for k, v in dict(reference.config).items() if k != "scaling_factor"}
    folder = write_folder(tmp_path, fields, dict(reference.state_dict()))
    assert factors(tmp_path, folder) == (0.18215, 0.0)


@pytest.mark.parametrize(
    ("beside", "factor"),
    [
        ({"model.diffusion_model.out.0.weight": torch.ones(1)}, 0.18215),
        ({"conditioner.embedders.0.weight": torch.ones(1)}, 0.13025),
        ({"scale_factor": torch.tensor(0.22765929)}, 0.22765929),
        ({"conditioner.x": torch.ones(1), "edm_mean": torch.zeros(1, 4, 1, 1)}, None),
        ({"scale_factor": torch.tensor(torch.nan)}, None),
        ({}, None),
    ],
    ids=["sd", "sdxl", "measured", "playground", "nan", "alone"],
)
def test_the_scaling_factor_of_a_whole_checkpoint_is_recognised(
    tmp_path: Path, beside: dict[str, torch.Tensor], factor: float | None
) -> None:
    state = to_compvis(dict(make_reference(TINY_KL_F8).state_dict()))
    whole = {f"first_stage_model.{name}": tensor for name, tensor in state.items()} | beside
    save_file(whole, tmp_path / "whole.safetensors")
    if factor is None:
        with pytest.raises(ConfigError, match=r"set vae\.scaling_factor"):
            factors(tmp_path, tmp_path / "whole.safetensors")
    else:
        actual, shift = factors(tmp_path, tmp_path / "whole.safetensors")
        assert actual == pytest.approx(factor)
        assert shift == 0


@pytest.mark.parametrize("value", [0, -0.18215, float("nan"), float("inf"), "x"])
def test_a_factor_that_is_not_finite_and_positive_is_refused(tmp_path: Path, value: Any) -> None:
    tree = config_tree(tmp_path, vae={"checkpoint": "demo", "scaling_factor": value})
    with pytest.raises(ConfigError, match=r"vae\.scaling_factor"):
        parse_config(tree)
    if value != 0 and value != -0.18215:
        tree["vae"] = {"checkpoint": "demo", "shift_factor": value}
        with pytest.raises(ConfigError, match=r"vae\.shift_factor"):
            parse_config(tree)
