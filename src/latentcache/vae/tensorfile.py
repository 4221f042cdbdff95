"""A checkpoint file on disk -> its named tensors, running nothing that the file says.

Three containers: safetensors; PyTorch's zip (1.6 and later) and the older bare pickle; and a zip
that holds one of those, as `kl-f8.zip` does. PyTorch's are pickles, which may name any function to
be called. Ours may name the few that rebuild tensors; every other name becomes `_Inert`, which
takes whatever it is given and does nothing. So a Lightning checkpoint with its optimizer and
callbacks opens, and a malicious one is as harmless as it.
"""

from __future__ import annotations

import collections
import pickle
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from latentcache.errors import CheckpointError

SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".zip")

_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}

# What a damaged pickle or archive makes the unpickler, zipfile and torch's reader raise.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read every named tensor of a checkpoint file; most are mapped from disk, not yet read.

    Args:
        path: the file; its content decides how it is read, but for `.safetensors`.
        name: how errors call it.

    Raises:
        CheckpointError: not a checkpoint, damaged, or without tensors.
    """
    with path.open("rb") as file:
        head = file.read(64)
    _refuse_stand_ins(head, name)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path, name)
    if head.startswith(b"PK"):
        return _read_zip(path, name)
    if head.startswith(b"\x80"):
        # From memory: given a file, torch would first try to unpack it as a tar archive.
        return _read_pickle(BytesIO(path.read_bytes()), name)
    raise CheckpointError(
        f"{name} is not a checkpoint: neither safetensors nor a PyTorch file; download it again"
    )


def _refuse_stand_ins(head: bytes, name: str) -> None:
    """Name the things that are often found where a checkpoint should be."""
    if not head:
        raise CheckpointError(f"{name} is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{name} is a Git LFS pointer, not the file: run `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(
            f"{name} is a web page, not a checkpoint: use the address of the file itself"
        )


def _read_safetensors(path: Path, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise _damaged(name, error) from error


def _read_zip(path: Path, name: str) -> dict[str, Tensor]:
    """A PyTorch zip, or a plain zip around one checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
            if any(member.endswith("/constants.pkl") for member in members):
                raise CheckpointError(f"{name} is a TorchScript archive: only weights can be read")
            if any(member.endswith("/data.pkl") for member in members):
                return _read_pickle(path, name)
            inside = [m for m in members if m.endswith(SUFFIXES) and not m.endswith(".zip")]
            if len(inside) != 1:
                raise CheckpointError(f"{name} holds {len(inside)} checkpoints; it must hold one")
            with tempfile.TemporaryDirectory(prefix="latentcache-") as folder:
                unpacked = Path(folder, "checkpoint" + Path(inside[0]).suffix)
                with archive.open(inside[0]) as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
                return read_tensors(unpacked, f"{name} ({inside[0]})")
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _read_pickle(source: Path | BytesIO, name: str) -> dict[str, Tensor]:
    try:
        loaded = torch.load(
            source,
            map_location="cpu",
            pickle_module=_tensor_pickle,
            weights_only=False,  # torch's own restricted reader refuses Lightning checkpoints
            mmap=isinstance(source, Path),
        )
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    tensors = {
        key: value
        for key, value in (loaded.items() if isinstance(loaded, Mapping) else ())
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{name} holds no named tensors: it is not a VAE checkpoint")
    return tensors


def _damaged(name: str, error: BaseException) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{name} is cut off or damaged ({reason}); download it again")


class _Inert:
    """Stands for everything a pickle names that is not a tensor: accepts all, does nothing.

    Classes keyed by it, its instances, their state, items and calls are what a pickle can ask for.
    """

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _accept(self, *args: object, **kwargs: object) -> None:
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = _accept


class _TensorUnpickler(pickle.Unpickler):
    """Resolves only what rebuilds tensors; torch adds the storage types by itself."""

    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED_GLOBALS.get((module, name), _Inert)


def _load(file: Any, **options: Any) -> Any:
    return _TensorUnpickler(file, **options).load()


# What torch.load asks of its `pickle_module`.
_tensor_pickle = ModuleType("latentcache_tensor_pickle")
_tensor_pickle.Unpickler = _TensorUnpickler  # type: ignore[attr-defined]
_tensor_pickle.load = _load  # type: ignore[attr-defined]
