"""Checkpoint files: a VAE or a `CheckpointError`, nothing executed, memory bounded.

The first byte of an input says what the rest is: the name of the file, or the config beside one.
Mutations of an archive are packed again, so that its checksums and sizes agree and the pickle is
reached; those of a pickle are made opcode by opcode, those of a header as JSON.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import random
import re
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch._utils

from fuzz import Target, mutate_bytes
from latentcache.errors import CheckpointError
from latentcache.vae.architecture import Architecture
from latentcache.vae.model import KLAutoencoder
from latentcache.vae.weights import load_vae

_NAMES = ("vae.safetensors", "vae.ckpt", "vae.zip", "config.json")
_SAFETENSORS, _CKPT, _ZIP, _CONFIG = range(4)
_WEIGHTS = "diffusion_pytorch_model.safetensors"

_FIELDS = {"block_out_channels": [32], "layers_per_block": 1, "latent_channels": 4}

_COMPVIS = (
    (r"\.(down|up)_blocks\.0\.resnets\.", r".\1.0.block."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"conv_norm_out", "norm_out"),
)

_NUMBERS = (-1, 0, 1, 3, 32, 255, 2**15, 2**31 - 1, 2**40, 2**63, 10**400)
_VALUES: tuple[Any, ...] = (*_NUMBERS, None, True, "x", 1e999, float("nan"), [], [0], [32] * 9, {})

# Opcodes with their arguments, to stand anywhere in a pickle.
_SNIPPETS = (
    b"cos\nsystem\n(U\x08echo hi>xtR",
    b"cbuiltins\neval\n(U\x031/0tR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(N}(U\x0c__defaults__)tutb",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nload\n",
    b"ccollections\nOrderedDict\n)R",
    b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x96\x00\x00\x00\x00\x01\x00\x00\x00",
    b")\x85\x85\x85\x85\x85\x85",
    b"(", b"t", b"u", b"s", b"e", b"a", b"}", b"]", b")", b"R", b"b", b"\x81", b"Q", b"0", b"1",
    b".", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"N", b"K\x00", b"K\x05",
)  # fmt: skip

_HARMFUL_EVENTS = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|startfile|remove|rename|truncate|putenv)|subprocess\."
    r"|socket\.|pickle\.find_class|code\.__new__|builtins\.input|urllib\.|shutil\.|webbrowser\."
)
_harm: list[str] = []
_is_checking = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not _is_checking:
        return
    if event == "open":
        path, mode, flags = args
        is_ours = str(path).startswith(tempfile.gettempdir())
        if not is_ours and flags and flags & (os.O_WRONLY | os.O_RDWR):
            _harm.append(f"open {path} {mode}")
    elif event == "import" and args[0].partition(".")[0] in ("os", "subprocess", "ctypes", "pty"):
        _harm.append(f"import {args[0]}")
    elif _HARMFUL_EVENTS.match(event) and not _is_temporary(event, args):
        _harm.append(f"{event} {args}")


def _is_temporary(event: str, args: tuple[Any, ...]) -> bool:
    """Whether a temporary folder is deleted, as it should be."""
    return event.startswith(("os.remove", "shutil.rmtree")) and "latentcache-" in str(
        [*args, *os.listdir(tempfile.gettempdir())]
    )


_FUNCTIONS = (
    torch._utils._rebuild_tensor,
    torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_parameter,
)


def _state_of_torch() -> list[tuple[Any, ...]]:
    return [(f.__code__, f.__defaults__, f.__kwdefaults__, dict(f.__dict__)) for f in _FUNCTIONS]


_BEFORE = _state_of_torch()


def _state() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One small VAE by the names of diffusers and of CompVis."""
    torch.manual_seed(0)
    ours = dict(KLAutoencoder(Architecture.from_config(_FIELDS)).state_dict())
    theirs = {}
    for name, tensor in ours.items():
        for pattern, replacement in _COMPVIS:
            name = re.sub(pattern, replacement, name)
        is_matrix = ".attn_1." in name and tensor.ndim == 2
        theirs[name] = tensor[:, :, None, None].half() if is_matrix else tensor.half()
    return {name: tensor.half() for name, tensor in ours.items()}, theirs


def seeds(folder: Path) -> list[bytes]:
    sys.addaudithook(_watch)
    ours, theirs = _state()
    safetensors.torch.save_file(ours, folder / _WEIGHTS)
    checkpoint = {"epoch": 3, "state_dict": theirs, "callbacks": [torch.Size([1]), {1, 2}]}
    modern, legacy, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(checkpoint, modern)
    torch.save(checkpoint, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("kl.ckpt", legacy.getvalue())
    return [
        bytes([_SAFETENSORS]) + safetensors.torch.save(theirs),
        bytes([_CKPT]) + modern.getvalue(),
        bytes([_CKPT]) + legacy.getvalue(),
        bytes([_ZIP]) + packed.getvalue(),
        bytes([_CONFIG]) + json.dumps({"_class_name": "AutoencoderKL", **_FIELDS}).encode(),
    ]


def mutate(rng: random.Random, seed: bytes, seeds: Sequence[bytes]) -> bytes:
    kind, data = seed[0], seed[1:]
    others = [other[1:] for other in seeds]
    if rng.random() < 0.25:
        return bytes([kind]) + mutate_bytes(rng, data, others)
    if kind == _SAFETENSORS:
        data = _mutate_header(rng, data)
    elif kind == _CONFIG:
        data = _mutate_json(rng, data)
    elif kind == _CKPT and data.startswith(b"\x80"):
        data = _mutate_legacy(rng, data)
    else:
        data = _mutate_zip(rng, data, others)
    return bytes([kind]) + data


def _mutate_json(rng: random.Random, data: bytes) -> bytes:
    tree = json.loads(data)
    for _ in range(rng.choice([1, 1, 3])):
        new = ["scaling_factor", "shift_factor", "latents_mean", "latents_std", "use_quant_conv"]
        tree[rng.choice([*tree, *new, "norm_num_groups"])] = rng.choice(_VALUES)
    return json.dumps(tree).encode()


def _mutate_header(rng: random.Random, data: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.choice([1, 1, 2, 5])):
        name = rng.choice([*header])
        entry, change = header[name], rng.randrange(6)
        if not isinstance(entry, dict) or "shape" not in entry:
            continue
        if change == 0:
            entry["dtype"] = rng.choice(["F32", "I8", "BOOL", "F8_E4M3", "F4", "C64", "x", 1, None])
        elif change == 1:
            entry["shape"] = [rng.choice(_NUMBERS) for _ in range(rng.randrange(6))]
        elif change == 2:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(_NUMBERS)
        elif change == 3:
            header[rng.choice(["\n", "x" * 2000, "encoder.down.9999.x", "../a"])] = header.pop(name)
        elif change == 4:
            del header[name]
        else:
            header[name] = rng.choice(_VALUES)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """Delete, copy, exchange and insert whole opcodes, and change numbers in them."""
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, kind = rng.randrange(len(parts)), rng.randrange(5)
        if kind == 0 and len(parts) > 1:
            del parts[at]
        elif kind == 1:
            parts[at] = rng.choice(parts)
        elif kind == 2:
            parts.insert(at, rng.choice(_SNIPPETS))
        elif kind == 3:
            numbers = [i for i, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J")]
            number = rng.choice(_NUMBERS[:-2])
            parts[rng.choice(numbers or [at])] = b"\x8a\x08" + struct.pack("<q", number)
        else:
            parts[at] = mutate_bytes(rng, parts[at], parts)
    return b"".join(parts)


def _mutate_legacy(rng: random.Random, data: bytes) -> bytes:
    """Mutate the fourth of the five pickles, which holds the tensors, or the last."""
    ends, file = [], io.BytesIO(data)
    for _ in range(5):
        for _ in pickletools.genops(file):
            pass
        ends.append(file.tell())
    first, last = (ends[2], ends[3]) if rng.random() < 0.8 else (ends[3], ends[4])
    return data[:first] + _mutate_pickle(rng, data[first:last]) + data[last:]


def _mutate_zip(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate members, and pack them again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[info.filename, archive.read(info)] for info in archive.infolist()]
        method = archive.infolist()[0].compress_type
    kind, chosen = rng.randrange(8), rng.choice(members)
    pickles = [member for member in members if str(member[0]).endswith("data.pkl")]
    if kind <= 3 and pickles:
        pickles[0][1] = _mutate_pickle(rng, bytes(pickles[0][1]))
    elif kind == 4:
        chosen[1] = mutate_bytes(rng, bytes(chosen[1]), others)
    elif kind == 5:
        chosen[0] = rng.choice(["a/constants.pkl", "x/data.pkl", "b.ckpt", "/", "a\n", "ä" * 200])
    elif kind == 6:
        members.append([chosen[0], chosen[1]])
    else:
        method = zipfile.ZIP_DEFLATED if method == zipfile.ZIP_STORED else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(str(name), bytes(content), compresslevel=1)
    return buffer.getvalue()


def check(data: bytes, folder: Path) -> str:
    global _is_checking
    kind = data[0] % len(_NAMES)
    (folder / "lone").mkdir(exist_ok=True)
    path = folder / _NAMES[kind] if kind == _CONFIG else folder / "lone" / _NAMES[kind]
    path.write_bytes(data[1:])
    _harm.clear()
    _is_checking = True
    try:
        load_vae(str(folder if kind == _CONFIG else path))
        outcome = "loaded"
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message
        assert _NAMES[kind] in message or _WEIGHTS in message
        match = re.search(r"damaged|lacks|does not fit|has NaN|that its architecture", message)
        outcome = match[0] if match else "other"
    finally:
        _is_checking = False
    assert not _harm, f"something ran: {_harm}"
    assert _state_of_torch() == _BEFORE, "a function of torch was changed"
    return f"{_NAMES[kind]} {outcome}"


TARGET = Target(seeds=seeds, check=check, mutate=mutate, max_growth_mib=96)
