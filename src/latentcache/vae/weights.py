"""Load a `KLAutoencoder` from a checkpoint's URL, and compute the fingerprint of its encoder.

The layouts are diffusers' and the original CompVis layout, alone or inside a whole Stable Diffusion
checkpoint. The tensors of both are renamed to the names of `model.py`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentcache.dataset.contract import canonical_json
from latentcache.errors import CheckpointError, ConfigError, ObjectNotFound, first_line
from latentcache.storage import Store, split_url
from latentcache.storage_options import StorageOptions
from latentcache.vae.architecture import FAMILY, Architecture
from latentcache.vae.model import KLAutoencoder
from latentcache.vae.tensorfile import SUFFIXES, read_tensors

DEMO = "demo"
"""The URL of the small VAE in this package. Its latents are not Stable Diffusion's."""

_CONFIG = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

_FIRST_STAGE = "first_stage_model."  # the prefix of the VAE in a whole Stable Diffusion checkpoint
_SD_LATENT_CHANNELS = 4
# The configs of CompVis's Stable Diffusion 1 and 2, and of Stability's SDXL.
_SD, _SDXL = 0.18215, 0.13025
_NOT_WEIGHTS = ("loss.", "model_ema.")  # CompVis's trainer saves these beside the weights
_DECODER = ("decoder.", "post_quant_conv.")

# CompVis checkpoints do not have this number. It is in `Normalize` of CompVis's code.
_COMPVIS_NUM_GROUPS = 32

_MAX_CONFIG_BYTES = 2**20

_FLOAT_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

_COMPVIS_RENAMES = (
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.conv\.", r".\1_blocks.\2.\3samplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)
_DIFFUSERS_RENAMES = (  # the names of attention in diffusers before 0.17
    (r"\.attentions\.0\.(?:(q)uery|(k)ey|(v)alue)\.", r".attentions.0.to_\1\2\3."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", re.ASCII)  # organisation/model
_UP_BLOCK = re.compile(r"^decoder\.up_blocks\.(\d+)\.")
_ATTENTION_MATRIX = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def load_vae(
    url: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder: bool = True,
    options: StorageOptions = StorageOptions(),
) -> KLAutoencoder:
    """Load a frozen VAE, ready to encode and decode.

    Args:
        url: a local path or any accepted URL (`hf://org/repo`, `hf://org/repo@revision/vae`,
            `s3://…`) of a diffusers folder, a pipeline folder with `vae/`, or one checkpoint file
            (`.safetensors`, `.bin`, `.ckpt`, `.pt`, `.pth`, or a `.zip` of one); or `demo`. A
            `config.json` beside a file determines its architecture. A CompVis file needs no config,
            but then `architecture.scaling_factor` may be None; see `_recognise_factor`.
        device, dtype: of the modules; weights of any float dtype are accepted.
        decoder: whether to load the decoder; without it the VAE needs less memory.
        options: how to reach the store.

    Raises:
        CheckpointError: there is no usable checkpoint at the URL.
        StorageError: the store cannot be reached.
    """
    try:
        config, name, tensors = _read(url, options)
    except ObjectNotFound as error:
        raise CheckpointError(f"no VAE checkpoint: {error}; check vae.checkpoint") from error
    architecture, tensors = _recognise(config, tensors, name)
    with torch.device("meta"):
        vae = KLAutoencoder(architecture, decoder=decoder)
    if not decoder:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(_DECODER)}
    vae.load_state_dict(_fit(tensors, vae.state_dict(), name), assign=True)
    return vae.to(device=device, dtype=dtype).eval().requires_grad_(False)


def absolute_url(url: str) -> str:
    """Return a checkpoint's URL in a form that does not depend on the working directory."""
    return url if url == DEMO else Store(url).url


def encoder_fingerprint(vae: KLAutoencoder) -> str:
    """Return the SHA-256 of the encoder and `quant_conv`, in hexadecimal.

    The hash covers the architecture fields that determine the encoder, as canonical JSON, then each
    tensor's name, shape and little-endian float32 values in C order, sorted by name. The layout of
    the checkpoint and the decoder do not affect it.

    Raises:
        ConfigError: the VAE was loaded in a narrower dtype, which has rounded its weights.
    """
    if vae.dtype != torch.float32:
        raise ConfigError(f"the fingerprint needs a float32 VAE, not {vae.dtype}")
    fields = {"family": FAMILY, **vae.architecture.encoder_fields}
    digest = hashlib.sha256(canonical_json(fields) + b"\n")
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith(_DECODER):
            digest.update(canonical_json([name, list(tensor.shape)]) + b"\n")
            digest.update(tensor.cpu().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _read(
    url: str, options: StorageOptions
) -> tuple[dict[str, Any] | None, str, dict[str, Tensor]]:
    """Read a checkpoint; return the config if there is one, the weights' URL, and the tensors."""
    config: dict[str, Any] | None = None
    if url == DEMO:
        demo = importlib.resources.files("latentcache.demo") / "weights"
        config = _parse_config((demo / _CONFIG).read_bytes(), f"demo/{_CONFIG}")
        with importlib.resources.as_file(demo / _WEIGHTS[0]) as path:
            return config, DEMO, read_tensors(path, DEMO)
    if url.endswith(SUFFIXES):
        root, name = split_url(url)
        store, folder = Store(root, options), ""
    else:
        store = Store(url, options)
        folder, name = _find_weights(store, url)
    if store.exists(folder + _CONFIG):
        config_url = store.url_of(folder + _CONFIG)
        if store.info(folder + _CONFIG).size_bytes > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{config_url} is too large for a config: download it again")
        config = _parse_config(store.read_bytes(folder + _CONFIG), config_url)
    with store.named(name), _local_file(store, name) as path:
        return config, store.url_of(name), read_tensors(path, store.url_of(name))


def _find_weights(store: Store, url: str) -> tuple[str, str]:
    """Return (folder, weights) of a diffusers VAE in a folder, or in the `vae/` of a pipeline."""
    for folder in ("vae/", ""):
        if store.exists(folder + _CONFIG):
            break
    else:
        if _HUB_NAME.fullmatch(url) and not Path(url).exists():
            raise CheckpointError(f"there is no folder {url}: did you mean hf://{url}?")
        raise CheckpointError(
            f"{store.url_of(_CONFIG)} does not exist, nor vae/{_CONFIG}: "
            f"give a diffusers folder, or a checkpoint file ({', '.join(SUFFIXES)})"
        )
    for weights in _WEIGHTS:
        if store.exists(folder + weights):
            return folder, folder + weights
    raise CheckpointError(
        f"{store.url_of(folder + _WEIGHTS[0])} does not exist, nor {_WEIGHTS[1]}: "
        "download the weights, or name the checkpoint file itself"
    )


@contextmanager
def _local_file(store: Store, name: str) -> Iterator[Path]:
    """Yield the path of a local object, or of a temporary download of a remote one."""
    size_bytes = store.info(name).size_bytes  # raises ObjectNotFound if the object is missing
    if local := store.local_path(name):
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="latentcache-") as folder:
        path = Path(folder, "checkpoint" + Path(name).suffix)
        store.get_file(name, path, size_bytes)
        yield path


def _parse_config(data: bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{name} is not JSON ({reason}): download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{name} holds no JSON object: download it again")
    return config


def _recognise(
    config: Mapping[str, Any] | None, tensors: dict[str, Tensor], name: str
) -> tuple[Architecture, dict[str, Tensor]]:
    """Detect the layout by the names; return the architecture and the canonically named tensors."""
    scaling_factor = _recognise_factor(tensors)
    inner = {
        key.removeprefix(_FIRST_STAGE): tensor
        for key, tensor in tensors.items()
        if key.startswith(_FIRST_STAGE)
    }
    tensors = inner or tensors
    if not any(key.startswith("encoder.down.") for key in tensors):
        if config is None:
            raise CheckpointError(
                f"{name} is not a CompVis checkpoint and has no config.json: put its config.json "
                "beside it"
            )
        tensors = _rename(tensors, _DIFFUSERS_RENAMES)
        return Architecture.from_config(config, name=f"the config.json of {name}"), tensors
    tensors = {k: t for k, t in tensors.items() if not k.startswith(_NOT_WEIGHTS)}
    tensors = _rename(tensors, _COMPVIS_RENAMES)
    # CompVis numbers the decoder's blocks from the image's side, diffusers from the latent's.
    last = max((int(match[1]) for match in map(_UP_BLOCK.match, tensors) if match), default=0)
    tensors = {
        _UP_BLOCK.sub(lambda match: f"decoder.up_blocks.{last - int(match[1])}.", key): tensor
        for key, tensor in tensors.items()
    }
    if config is not None and config.get("_class_name") == FAMILY:
        return Architecture.from_config(config, name=f"the config.json beside {name}"), tensors
    architecture = _infer_architecture(tensors, name)
    return replace(architecture, scaling_factor=scaling_factor), tensors


def _recognise_factor(tensors: Mapping[str, Tensor]) -> float | None:
    """Return the scaling factor that the tensors of a CompVis checkpoint determine, or None.

    CompVis's `ddpm.py` stores a measured factor as the buffer `scale_factor`. Otherwise
    `conditioner` means SDXL, unless `edm_mean` shows that it is Playground's, which scales by
    channel. A U-Net alone means Stable Diffusion 1 or 2.
    """
    if (buffer := tensors.get("scale_factor")) is not None and buffer.numel() == 1:
        factor = float(buffer)
        return factor if math.isfinite(factor) and factor > 0 else None
    last = tensors.get(f"{_FIRST_STAGE}encoder.conv_out.weight")
    if last is None or not last.ndim or last.shape[0] != 2 * _SD_LATENT_CHANNELS:
        return None
    if "edm_mean" in tensors:
        return None
    if any(key.startswith("conditioner.") for key in tensors):
        return _SDXL
    return _SD if any(key.startswith("model.diffusion_model.") for key in tensors) else None


def _rename(tensors: Mapping[str, Tensor], renames: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _infer_architecture(tensors: Mapping[str, Tensor], name: str) -> Architecture:
    """Return the architecture that the shapes of a CompVis checkpoint's tensors determine."""

    def out_channels(tensor: str) -> int:
        if tensor not in tensors or tensors[tensor].ndim != 4:
            raise CheckpointError(f"{name} is not a whole KL autoencoder: it lacks {tensor}")
        return int(tensors[tensor].shape[0])

    def count(pattern: str) -> int:
        return len({match[1] for key in tensors if (match := re.match(pattern, key))})

    widths = tuple(
        out_channels(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")
        for i in range(max(1, count(r"encoder\.down_blocks\.(\d+)\.")))
    )
    fields = {
        "block_out_channels": widths,
        "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": out_channels("encoder.conv_out.weight") // 2,
        "norm_num_groups": _COMPVIS_NUM_GROUPS,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
    }
    return Architecture.from_config(fields, name=f"the tensors of {name}")


def _fit(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Check the tensors against the model's; return float32 copies with attention as matrices."""
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(f"{name} lacks {_some(missing)}: the VAE is incomplete")
    if surplus := tensors.keys() - expected.keys():
        raise CheckpointError(f"{name} has {_some(surplus)} that its architecture does not have")
    fitted, misshapen, broken = {}, [], []
    for key, target in expected.items():
        tensor = tensors[key]
        if _ATTENTION_MATRIX.search(key) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if tensor.shape != target.shape or tensor.dtype not in _FLOAT_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            misshapen.append(f"{key} ({kind} {list(tensor.shape)}, not {list(target.shape)})")
            continue
        fitted[key] = tensor.to(torch.float32, copy=True).contiguous()
        if not fitted[key].isfinite().all():
            broken.append(key)
    if misshapen:
        raise CheckpointError(f"{name} does not fit its architecture: {_some(misshapen)}")
    if broken:
        raise CheckpointError(f"{name} has NaN or infinite values in {_some(broken)}")
    return fitted


def _some(names: Iterable[str]) -> str:
    """Return up to three names and the number of the others, as text."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more tensors" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
