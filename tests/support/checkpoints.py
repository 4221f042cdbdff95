"""Random VAE checkpoints in every layout the package reads, for the tests to load.

diffusers makes the weights and names them; the CompVis layout is written by a converter of its own
here, in the opposite direction of the package's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

# 32 groups everywhere, as the CompVis layout takes for granted.
KL_F8: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
TINY_KL_F8: dict[str, Any] = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}


def make_reference(fields: dict[str, Any], seed: int = 0) -> diffusers.AutoencoderKL:
    """Make an autoencoder of diffusers with random weights; no norm is the identity."""
    torch.manual_seed(seed)
    num_blocks = len(fields["block_out_channels"])
    reference = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * num_blocks,
        up_block_types=["UpDecoderBlock2D"] * num_blocks,
        **fields,
    )
    for name, parameter in reference.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
            parameter.data += 1.0 if name.endswith("weight") else 0.0
    return reference.eval().requires_grad_(False)


def write_diffusers_folder(
    folder: Path,
    fields: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    suffix: str = ".safetensors",
) -> Path:
    """Write a random VAE as diffusers does; returns the folder."""
    reference = make_reference(fields or TINY_KL_F8, seed)
    return write_folder(folder, dict(reference.config), dict(reference.state_dict()), suffix=suffix)


def write_folder(
    folder: Path, config: dict[str, Any], state: State, *, suffix: str = ".safetensors"
) -> Path:
    """Write any config and tensors in the diffusers layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKL"} | {k: v for k, v in config.items() if k[0] != "_"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / f"diffusion_pytorch_model{suffix}"
    if suffix == ".safetensors":
        save_file(state, weights)
    else:
        torch.save(state, weights)
    return folder


def write_compvis_checkpoint(
    path: Path, fields: dict[str, Any] | None = None, *, seed: int = 0
) -> Path:
    """Write the same random VAE as `write_diffusers_folder` as CompVis' trainer does."""
    state = to_compvis(dict(make_reference(fields or TINY_KL_F8, seed).state_dict()))
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3, "global_step": 840_000}, path)
    return path


def to_compvis(state: State) -> State:
    """Rename diffusers' tensors to CompVis' names; attention becomes 1×1 convolutions."""
    num_blocks = 1 + max(
        int(actual[1])
        for name in state
        if (actual := re.match(r"encoder\.down_blocks\.(\d+)", name))
    )
    return {_compvis_name(name, num_blocks): _compvis_tensor(name, state[name]) for name in state}


def _compvis_tensor(name: str, tensor: Tensor) -> Tensor:
    is_projection = "attentions" in name and tensor.ndim == 2
    return tensor[:, :, None, None].contiguous() if is_projection else tensor


def _compvis_name(name: str, num_blocks: int) -> str:
    parts = name.split(".")
    if parts[0] not in ("encoder", "decoder"):
        return name
    half, part, rest = parts[0], parts[1], parts[2:]
    if part in ("conv_in", "conv_out"):
        return name
    if part == "conv_norm_out":
        return ".".join([half, "norm_out", *rest])
    if part == "mid_block" and rest[0] == "resnets":
        return ".".join([half, "mid", f"block_{int(rest[1]) + 1}", *rest[2:]])
    if part == "mid_block":
        spelling = {
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out": "proj_out",
        }
        return ".".join([half, "mid", "attn_1", spelling[rest[2]], rest[-1]])
    block = int(rest[0])
    if part == "down_blocks":
        levels = [half, "down", str(block)]
    else:
        levels = [half, "up", str(num_blocks - 1 - block)]
    if rest[1] == "resnets":
        leaf = [p.replace("conv_shortcut", "nin_shortcut") for p in rest[3:]]
        return ".".join([*levels, "block", rest[2], *leaf])
    return ".".join([*levels, rest[1].removesuffix("rs"), "conv", rest[-1]])


def spell_attention(state: State, spelling: str) -> State:
    """Respell diffusers' attention: `old` (query, key, value, proj_attn) and/or `conv` (1×1)."""
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    respelt = {}
    for name, tensor in state.items():
        if "attentions" in name and "conv" in spelling and tensor.ndim == 2:
            tensor = tensor[:, :, None, None].contiguous()
        if "attentions" in name and "old" in spelling:
            for new, old in renames.items():
                name = name.replace(new, old)
        respelt[name] = tensor
    return respelt
