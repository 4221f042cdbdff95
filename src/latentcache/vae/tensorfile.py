"""Read the named tensors of a checkpoint file, without executing anything in the file.

The containers are safetensors, PyTorch's zip (1.6 and later), the older bare pickle, and a zip with
one of those, such as `kl-f8.zip`. PyTorch never opens a file: it would choose a reader by its own
rules, and one of its readers runs TorchScript. `archive.py` reads the zip, `tensorpickle.py` reads
the pickle, and the tensors are views of the file's bytes.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from latentcache.errors import CheckpointError, first_line, one_line
from latentcache.vae.archive import Malformed, Member, read_directory
from latentcache.vae.tensorpickle import (
    MAX_NAME_CHARS,
    StoredStorage,
    StoredTensor,
    TensorPickle,
)

SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".zip")

# The first two values of a bare pickle; see `torch/serialization.py`.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

# A tensor's entry in the header takes about 100 bytes. The largest networks have 5,000 tensors.
_MAX_HEADER_BYTES = 8 * 2**20

# A zip reduces weights by a tenth, and weights that were widened from half precision to a third.
_MAX_INFLATION = 20

_CHUNK_BYTES = 2**20

# The exceptions of the safetensors library for a header that it accepts and torch does not.
_REFUSED = (
    SafetensorError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Return every named tensor of a checkpoint file. Most are mapped from disk and not read yet.

    Args:
        path: the file. Its content determines the container, unless its name ends with
            `.safetensors`.
        name: the name of the file in errors.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, or has no tensors.
        OSError: the file cannot be read.
    """
    return _read(path, name, may_hold_another=True)


def _read(path: Path, name: str, *, may_hold_another: bool) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(64)
        _refuse_stand_ins(head, name)
        try:
            if path.suffix == ".safetensors" or head[8:9] == b"{":
                tensors = _read_safetensors(path, head)
            elif head.startswith(b"PK"):
                data = _map(file)
                members = read_directory(data)
                if inner := _find_checkpoint(members):
                    if not may_hold_another:
                        raise Malformed("it is a zip file in a zip file")
                    return _read_inner(data, inner, name)
                tensors = _read_archive(data, members)
            elif head.startswith(b"\x80"):
                tensors = _read_bare_pickle(_map(file))
            else:
                raise CheckpointError(
                    f"{name} is not a checkpoint, neither safetensors nor a PyTorch file: "
                    "download it again"
                )
        except Malformed as error:
            raise CheckpointError(
                f"{name} is not a PyTorch checkpoint, cut off or damaged ({error}): "
                "download it again, or save its weights as .safetensors"
            ) from error
        except _REFUSED as error:
            if isinstance(error, CheckpointError):
                raise
            reason = one_line(first_line(error))[:300]
            raise CheckpointError(
                f"{name} is cut off or damaged ({reason}): download it again"
            ) from error
    if not tensors:
        raise CheckpointError(f"{name} holds no named tensors: it is not a VAE checkpoint")
    return tensors


def _refuse_stand_ins(head: bytes, name: str) -> None:
    """Raise an error for files that often replace a checkpoint by mistake."""
    if not head:
        raise CheckpointError(f"{name} is empty: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{name} is a Git LFS pointer, not the file: run `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(
            f"{name} is a web page, not a checkpoint: use the address of the file itself"
        )


def _map(file: BinaryIO) -> memoryview:
    """Map a whole file into memory, copy-on-write, so that no write can reach the file."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _read_safetensors(path: Path, head: bytes) -> dict[str, Tensor]:
    """Read the file with the library, which checks that the tensors fill it without overlap."""
    if len(head) >= 8 and (size := int.from_bytes(head[:8], "little")) > _MAX_HEADER_BYTES:
        raise ValueError(f"its header takes {size} bytes, more than {_MAX_HEADER_BYTES}")
    tensors = safetensors.torch.load_file(path)
    for key in tensors:
        _check_name(key)
    return tensors


def _find_checkpoint(members: Mapping[str, Member]) -> Member | None:
    """Return the only checkpoint in a plain zip; None for a PyTorch zip, which is a checkpoint."""
    if any(name.endswith("/constants.pkl") for name in members):
        raise Malformed("it is a TorchScript archive: only weights can be read")
    if any(name.endswith("/data.pkl") for name in members):
        return None
    inside = [name for name in members if name.endswith(SUFFIXES) and not name.endswith(".zip")]
    if len(inside) != 1:
        raise Malformed(f"it holds {len(inside)} checkpoints; it must hold one")
    return members[inside[0]]


def _read_inner(data: memoryview, member: Member, name: str) -> dict[str, Tensor]:
    """Unpack a checkpoint into a temporary file, and read that."""
    if member.size > _MAX_INFLATION * member.packed_size:
        raise Malformed(
            f"a member of {member.packed_size} bytes unpacks to {member.size}, too many for weights"
        )
    inner_name = one_line(member.name[:200])
    with tempfile.TemporaryDirectory(prefix="latentcache-") as folder:
        unpacked = Path(folder, "checkpoint" + Path(member.name).suffix)
        with unpacked.open("wb") as target:
            _unpack(data[member.start : member.start + member.packed_size], member, target)
        return _read(unpacked, f"{name} ({inner_name})", may_hold_another=False)


def _unpack(packed: memoryview, member: Member, target: BinaryIO) -> None:
    """Write a member's unpacked bytes, at most its size in the directory, and check them."""
    inflater = None if member.is_stored else zlib.decompressobj(-zlib.MAX_WBITS)
    num_bytes = crc32 = 0
    for start in range(0, len(packed), _CHUNK_BYTES):
        rest = bytes(packed[start : start + _CHUNK_BYTES])
        while rest:
            try:
                chunk = inflater.decompress(rest, _CHUNK_BYTES) if inflater else rest
            except zlib.error as error:
                raise Malformed(first_line(error)) from error
            rest = inflater.unconsumed_tail if inflater else b""
            num_bytes += len(chunk)
            if num_bytes > member.size:
                break
            crc32 = zlib.crc32(chunk, crc32)
            target.write(chunk)
    if num_bytes != member.size or crc32 != member.crc32:
        raise Malformed("a member and the zip directory disagree")


def _read_archive(data: memoryview, members: Mapping[str, Member]) -> dict[str, Tensor]:
    """Read a PyTorch zip: a pickle, and one member for each storage that it names."""
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Malformed(f"it has {len(pickles)} members named data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    byte_order = members.get(f"{folder}byteorder")
    if byte_order and bytes(_bytes_of(data, byte_order)[:8]) != b"little":
        raise Malformed("it was saved on a machine of another byte order")
    pickled = members[pickles[0]]
    # PyTorch has an option to leave checksums out. They are then 0.
    if pickled.crc32 not in (0, zlib.crc32(_bytes_of(data, pickled))):
        raise Malformed("its data.pkl does not match its checksum")
    reader = TensorPickle(data[: pickled.start + pickled.packed_size], pickled.start)
    tensors = _named_tensors(reader.load(), len(data))

    def start_of(storage: StoredStorage) -> int:
        member = members.get(f"{folder}data/{storage.key}")
        if member is None or not member.is_stored or member.size != storage.num_bytes:
            raise Malformed(
                f"the storage {one_line(storage.key[:100])!r} is missing, compressed or has "
                "another size"
            )
        return member.start

    return {key: _view(data, tensor, start_of(tensor.storage)) for key, tensor in tensors.items()}


def _bytes_of(data: memoryview, member: Member) -> memoryview:
    content = data[member.start : member.start + member.packed_size]
    if not member.is_stored:
        raise Malformed("a member is compressed, which PyTorch does not do")
    return content


def _read_bare_pickle(data: memoryview) -> dict[str, Tensor]:
    """Read PyTorch's older format: five pickles, then the length and the bytes of each storage."""
    reader = TensorPickle(data)
    if reader.load() != _MAGIC or reader.load() != _PROTOCOL:
        raise Malformed("it is a pickle, but not from PyTorch")
    reader.load()  # describes the writing system; big-endian storages fail the checks of lengths
    tensors = _named_tensors(reader.load(), len(data))
    keys = reader.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Malformed("its storages have no names")
    starts: dict[str, int] = {}
    position = reader.position
    for key in keys:
        storage = reader.storages.get(key)
        if storage is None or key in starts or position + 8 > len(data):
            raise Malformed("its storages and its pickle disagree")
        (num_elements,) = struct.unpack_from("<q", data, position)
        starts[key] = position + 8
        position += 8 + storage.num_bytes
        if num_elements != storage.num_elements or position > len(data):
            raise Malformed("a storage is cut off, or its size and its pickle disagree")
    if any(tensor.storage.key not in starts for tensor in tensors.values()):
        raise Malformed("a storage is missing")
    return {key: _view(data, tensor, starts[tensor.storage.key]) for key, tensor in tensors.items()}


def _named_tensors(loaded: object, num_bytes: int) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict, or of a trainer's checkpoint around one.

    Tensors may share a storage, but all of them together may take at most twice the size of the
    file. The memory of their copies is then bounded by the size of the file.
    """
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        return {}
    tensors = {key: value for key, value in loaded.items() if isinstance(value, StoredTensor)}
    for key in tensors:
        _check_name(key)
    if sum(tensor.num_bytes for tensor in tensors.values()) > 2 * num_bytes:
        raise Malformed("its tensors together are larger than the file")
    return tensors


def _check_name(key: str) -> None:
    if len(key) > MAX_NAME_CHARS or not key.isprintable():
        raise Malformed(f"a tensor has the name {one_line(key[:100])!r}")


def _view(data: memoryview, tensor: StoredTensor, start: int) -> Tensor:
    """Return a tensor that is a view of the file's bytes; no bytes are read yet."""
    storage = tensor.storage
    if not storage.num_elements:
        return torch.empty(tensor.size, dtype=storage.dtype)
    flat = torch.frombuffer(data, dtype=storage.dtype, count=storage.num_elements, offset=start)
    return flat.as_strided(tensor.size, tensor.stride, tensor.offset)
