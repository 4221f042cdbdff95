"""Checkpoints made to do harm: nothing runs, nothing grows, one named error."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch._utils
from torch import Tensor

from checkpoints import TINY_KL_F8, make_reference, to_compvis, write_folder
from latentcache.errors import CheckpointError
from latentcache.vae.tensorfile import read_tensors
from latentcache.vae.tensorpickle import MAX_OPCODES
from latentcache.vae.weights import load_vae

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes, name: str = "model.ckpt") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def saved(value: object, *, modern: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=modern)
    return buffer.getvalue()


def bare(body: bytes, keys: tuple[str, ...] = (), storages: bytes = b"") -> bytes:
    """A file of the older format around a pickle of our own."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    head = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    return head + b"\x80\x02" + body + b"." + pickle.dumps(list(keys), protocol=2) + storages


def refused(path: Path, match: str = ".") -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_vae(str(path))
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


# What is read is what PyTorch itself reads.


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_tensors_equal_those_that_torch_loads(write: Write, modern: bool) -> None:
    torch.manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    state: dict[str, Tensor] = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in dtypes}
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        state[str(dtype)] = torch.randint(0, 2, (7,)).to(dtype)
    whole = torch.randn(6, 8)
    state |= {"whole": whole, "part": whole[2:4, ::2], "turned": whole.T}
    state |= {"empty": torch.zeros(0, 3), "one": torch.tensor(4.5)}
    state["parameter"] = torch.nn.Parameter(torch.ones(4))
    data = saved({"state_dict": state, "epoch": 3, "lr": 1e-4, "flags": {1, 2}}, modern=modern)
    expected = torch.load(io.BytesIO(data), weights_only=True)["state_dict"]
    actual = read_tensors(write(data), "model")
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.stride() == expected[name].stride() or not tensor.numel()
        assert torch.equal(tensor, expected[name])


# Containers.


class Harmful(torch.nn.Module):
    """Its TorchScript writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.path: str = path

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return (self.w, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):  # type: ignore[no-untyped-def]
        written = torch.from_file(state[1], True, 5, dtype=torch.uint8)
        written.fill_(65)
        self.w = state[0] + written.sum() * 0
        self.path = state[1]
        self.training = state[2]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_zip_that_torch_reads_as_torchscript_runs_nothing(write: Write, tmp_path: Path) -> None:
    """Two directories in one file: `zipfile` takes the second, PyTorch the first."""
    harmed = tmp_path / "harmed"
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Harmful(str(harmed))), buffer)
    data = buffer.getvalue()
    end = data.rfind(b"PK\x05\x06")
    size, offset = struct.unpack("<2I", data[end + 12 : end + 20])
    directory = data[offset : offset + size]
    decoy = directory.replace(b"/constants.pkl", b"/constants.pkX")
    path = write(data[: offset + size] + decoy + data[end:])
    seen = zipfile.ZipFile(path).namelist()
    assert not any(name.endswith("constants.pkl") for name in seen)
    refused(path, "directory")
    refused(write(data, "script.pt"), "TorchScript")
    assert not harmed.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(path))
    assert harmed.read_bytes() == b"AAAAA"  # so the file was a working one


def patched(data: bytes, old: bytes, new: bytes, *, last: bool = False) -> bytes:
    at = data.rfind(old) if last else data.find(old)
    assert at >= 0
    return data[:at] + new + data[at + len(old) :]


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def test_a_zip_whose_headers_disagree_is_refused(write: Write) -> None:
    data = saved({"a": torch.ones(3)})
    assert read_tensors(write(data), "model")
    end = data.rfind(b"PK\x05\x06")
    directory = data.find(b"PK\x01\x02")
    broken = {
        "local name": patched(data, b"archive/data/0", b"archive/data/1"),
        "directory name": patched(data, b"archive/data/0", b"archive/data/1", last=True),
        "count": data[: end + 8] + struct.pack("<2H", 3, 3) + data[end + 12 :],
        "offset": data[: end + 16] + struct.pack("<I", directory - 1) + data[end + 20 :],
        "prefix": b"PK\x03\x04" + bytes(60) + data,
        "suffix": data + b"x",
        "cut": data[:-1],
        "sizes": data.replace(struct.pack("<2I", 12, 12), struct.pack("<2I", 12, 11)),
    }
    for content in broken.values():
        refused(write(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's, of the two names
        duplicate = zipped(("m/data.pkl", b"\x80\x02}."), ("m/data.pkl", b"\x80\x02}."))
    refused(write(duplicate), "two members have the name 'm/data.pkl'")


def test_a_zip_bomb_is_not_unpacked(write: Write) -> None:
    bomb = zipped(("kl.ckpt", b"\x80\x02" + bytes(2**24)), method=zipfile.ZIP_DEFLATED)
    refused(write(bomb, "k.zip"), "too many for weights")
    # One that understates its size is cut at what it says.
    liar = bomb.replace(struct.pack("<I", 2**24 + 2), struct.pack("<I", 4096))
    refused(write(liar, "k.zip"), "a member and the zip directory disagree")
    packed = zipped(("m/data.pkl", bytes(10_000)), method=zipfile.ZIP_DEFLATED)
    refused(write(packed), "compressed")
    nested = zipped(("b.ckpt", zipped(("a.ckpt", saved({"a": torch.ones(1)})))))
    refused(write(nested, "k.zip"), "a zip file in a zip file")


def test_a_tar_is_refused(write: Write) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("tensors")
        tar.addfile(info, io.BytesIO())
    refused(write(buffer.getvalue()), "is not a checkpoint")


# Pickles.


GLOBALS = {
    "_rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "_rebuild_tensor": torch._utils._rebuild_tensor,
    "_rebuild_parameter": torch._utils._rebuild_parameter,
}


@pytest.mark.parametrize("name", GLOBALS)
def test_a_pickle_cannot_set_attributes_of_torch_functions(write: Write, name: str) -> None:
    """BUILD sets attributes; on a function of torch, for the whole process."""
    function = GLOBALS[name]
    before = dict(vars(function)), getattr(function, "__defaults__", None)
    state = pickle.dumps((None, {"__defaults__": (1, 2), "harmed": 1}), protocol=2)[2:-1]
    refused(write(bare(f"ctorch._utils\n{name}\n".encode() + state + b"b")), "no named tensors")
    assert (dict(vars(function)), getattr(function, "__defaults__", None)) == before


def with_storage(size: bytes, stride: bytes, offset: bytes = b"K\x00", numel: int = 4) -> bytes:
    """A file of the older format with one tensor over a storage of four float32 that is there."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    storage += b"J" + struct.pack("<i", numel) + b"tQ"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89NtR"
    return bare(b"}X\x01\x00\x00\x00a" + view + b"s", ("0",), struct.pack("<q4f", 4, 1, 2, 3, 4))


def integer(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def pair(first: int, second: int) -> bytes:
    return integer(first) + integer(second) + b"\x86"


def test_a_tensor_outside_its_storage_is_refused(write: Write) -> None:
    actual = read_tensors(write(with_storage(pair(2, 2), pair(1, 2))), "model")["a"]
    assert actual.tolist() == [[1, 3], [2, 4]]
    for content in (
        with_storage(pair(2, 2), pair(2, 2)),  # its last element lies behind the end
        with_storage(pair(2, 2), pair(2, 1), offset=b"K\x01"),
        with_storage(pair(2**40, 1), pair(0, 0)),  # one element many times
        with_storage(pair(5, 1), pair(0, 0)),
        with_storage(pair(2, 2), pair(-1, 1), offset=b"K\x01"),
        with_storage(pair(-2, -2), pair(1, 1)),
        with_storage(pair(2, 2), pair(2, 1), numel=5),  # five of the four that are there
        with_storage(pair(2, 2), pair(2, 1), numel=2**30),
        with_storage(pair(2, 2), pair(2, 1), numel=-4),
        with_storage(pair(2**63, 0), pair(1, 1)),
    ):
        refused(write(content))


def test_tensors_that_share_a_storage_are_bounded_by_the_file(write: Write) -> None:
    whole = torch.zeros(50_000)
    refused(write(saved({f"t{i}": whole.view(-1) for i in range(40)})), "larger than the file")


@pytest.mark.parametrize(
    "body",
    [
        b"}" * (MAX_OPCODES + 1),
        b"}r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff" + b"0" * 5,  # a memo of 2^32 places, and none
        b"\x8b\xff\xff\xff\x7f1",  # an integer of 2 GiB
        b"\x8d" + b"\xff" * 8,
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"c" + b"a" * 1000,
        b"\x85" * 10 + b"s",
        b"(((((" + b"u",
        b"\x82\x01",  # an extension
        b"P0\n",
        b"i__builtin__\neval\n",
        b"]" + b"(" * 100_000,
        # Many calls with 300,000 arguments, and many references to storages of as many values.
        b"("
        + b"N" * 300_000
        + b"tq\x00ccollections\nOrderedDict\nq\x01"
        + b"h\x01h\x00R0" * 50_000,
        b"(X\x07\x00\x00\x00storageN" + b"N" * 300_000 + b"tq\x00" + b"h\x00Q0" * 50_000,
    ],
)
def test_a_malformed_or_huge_pickle_is_refused(write: Write, body: bytes) -> None:
    refused(write(bare(body)))


def test_deeply_nested_dict_keys_are_ignored(write: Write) -> None:
    """Keys that take a deep or an exponential time to hash are not hashed."""
    deep = b")" + b"\x85" * 200_000
    doubled = b")" + b"q\x00h\x00\x86" * 60
    for key in (deep, doubled):
        refused(write(bare(b"}" + key + b"Ns")), "no named tensors")


# safetensors, and the config beside it.


def test_a_safetensors_header_is_bounded(write: Write) -> None:
    good = safetensors.torch.save({"a": torch.zeros(4)})
    for size in (2**62, 2**24, len(good)):
        refused(write(struct.pack("<Q", size) + good[8:], "vae.safetensors"))
    overlapping: dict[str, Any] = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")
    }
    huge = {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}
    for header in (overlapping, huge):
        text = json.dumps(header).encode()
        refused(write(struct.pack("<Q", len(text)) + text + bytes(4), "vae.safetensors"))


@pytest.mark.parametrize(
    "config",
    [
        '{"scaling_factor": NaN}',
        '{"scaling_factor": 0}',
        '{"scaling_factor": -0.18215}',
        '{"scaling_factor": 1e999}',
        '{"shift_factor": Infinity}',
        '{"scaling_factor": 1' + "0" * 400 + "}",
        '{"layers_per_block": 1000000000}',
        '{"block_out_channels": [1099511627776]}',
        '{"block_out_channels": [' + "32," * 5000 + "32]}",
        '{"latent_channels": 4, "latents_std": [1, 1, 0, 1]}',
        "[" * 100_000,
        " " * 2_000_000 + "{}",
        "\xff",
    ],
)
def test_a_config_with_unusable_or_huge_values_is_refused(tmp_path: Path, config: str) -> None:
    folder = write_folder(tmp_path, {}, {"a": torch.zeros(1)})
    (folder / "config.json").write_text(config, "latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_vae(str(folder))
    assert len(str(caught.value)) < 500


def test_an_inferred_architecture_has_the_same_limits_as_a_config(write: Write) -> None:
    state = to_compvis(dict(make_reference(TINY_KL_F8).state_dict()))
    state["encoder.down.0.block.0.conv1.weight"] = torch.zeros(2**21, 1, 1, 1, dtype=torch.int8)
    refused(write(saved(state)), "block_out_channels")
