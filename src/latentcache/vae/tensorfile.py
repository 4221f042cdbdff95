"""Read the named tensors of a checkpoint file, without executing anything in the file.

PyTorch never opens a file: it would choose a reader by its own rules, and one of them runs
TorchScript. Zip readers differ in which directory they use. So the end records, the directory and
the local headers must agree. Their layout is in PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import io
import mmap
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from latentcache.errors import CheckpointError, first_line, one_line
from latentcache.vae.tensorpickle import (
    MAX_NAME_CHARS,
    Malformed,
    StoredStorage,
    StoredTensor,
    load_pickle,
)

SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".zip")

# The first two values of a bare pickle; see `torch/serialization.py`.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

# The pickle of a whole Stable Diffusion checkpoint takes less than 1 MiB.
_MAX_PICKLE_BYTES = 32 * 2**20

# A tensor's entry in the header takes about 100 bytes. The largest networks have 5,000 tensors.
_MAX_HEADER_BYTES = 8 * 2**20

# PyTorch writes one member for each storage. The largest checkpoints have a few thousand.
_MAX_MEMBERS, _MAX_DIRECTORY_BYTES = 50_000, 8 * 2**20

# A zip reduces weights by a tenth, and weights that were widened from half precision to a third.
_MAX_INFLATION = 20

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q4sIQI")  # the zip64 end record and its locator
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SATURATED_16, _SATURATED_32 = 0xFFFF, 0xFFFFFFFF
_IS_ENCRYPTED, _HAS_DESCRIPTOR, _IS_UTF_8 = 0x0001, 0x0008, 0x0800

# The exceptions of the libraries for a file that is damaged, or accepted by one but not by another.
_REFUSED = (
    Malformed,
    SafetensorError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_tensors(path: Path, name: str, *, is_inner: bool = False) -> dict[str, Tensor]:
    """Return every named tensor of a checkpoint file. Most are mapped from disk and not read yet.

    Args:
        path: the file. Its content determines the container, unless it is a `.safetensors`.
        name, is_inner: its name in errors, and whether it was itself in a zip file.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, or has no tensors.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(64)
        _refuse_stand_ins(head, name)
        try:
            if path.suffix == ".safetensors" or head[8:9] == b"{":
                tensors = _read_safetensors(path, head)
            elif head.startswith(b"PK"):
                tensors = _read_zip(file, name, is_inner=is_inner)
            elif head.startswith(b"\x80"):
                tensors = _read_bare_pickle(_map(file))
            else:
                raise CheckpointError(
                    f"{name} is not a checkpoint, neither safetensors nor a PyTorch file: "
                    "download it again"
                )
        except _REFUSED as error:
            reason = one_line(first_line(error)[:300])
            fix = "download it again"
            if path.suffix != ".safetensors":
                fix += ", or save its weights as .safetensors"
            raise CheckpointError(
                f"{name} is not a checkpoint, cut off or damaged ({reason}): {fix}"
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
        raise Malformed(f"its header takes {size} bytes, more than {_MAX_HEADER_BYTES}")
    tensors = safetensors.torch.load_file(path)
    for key in tensors:
        _check_name(key)
    return tensors


def _read_zip(file: BinaryIO, name: str, *, is_inner: bool) -> dict[str, Tensor]:
    data = _map(file)
    directory_at, num_members = _find_directory(data)
    with zipfile.ZipFile(file) as archive:
        if len(archive.infolist()) != num_members:
            raise Malformed("its zip directory has another number of members than its end record")
        members = _locate_members(data[:directory_at], archive)
        names = archive.namelist()
        if any(member.endswith("/constants.pkl") for member in names):
            raise Malformed("it is a TorchScript archive: only weights can be read")
        if any(member.endswith("/data.pkl") for member in names):
            return _read_archive(archive, members, len(data))
        if is_inner:
            raise Malformed("it is a zip file in a zip file")
        return _read_inner(archive, name)


def _find_directory(data: memoryview) -> tuple[int, int]:
    """Return the offset and the number of entries of the only directory that the file can have."""
    tail_at = max(0, len(data) - _END.size - _SATURATED_16)
    end_at = tail_at + bytes(data[tail_at:]).rfind(b"PK\x05\x06")
    if end_at < tail_at or len(data) - end_at < _END.size:
        raise Malformed("it is a zip file without an end record")
    _, *numbers, comment_size = _END.unpack_from(data, end_at)
    if end_at + _END.size + comment_size != len(data):
        raise Malformed("its zip end record does not end the file")
    end_64_at = end_at - _END_64.size
    if end_64_at >= 0 and bytes(data[end_at - 20 : end_at - 16]) == b"PK\x06\x07":
        magic, size, _, _, *wide, _, _, located_at, num_disks = _END_64.unpack_from(data, end_64_at)
        saturated = [_SATURATED_16] * 4 + [_SATURATED_32] * 2
        if (
            (magic, size, located_at) != (b"PK\x06\x06", 44, end_64_at)
            or num_disks > 1
            or any(n not in (w, s) for n, w, s in zip(numbers, wide, saturated, strict=True))
        ):
            raise Malformed("its zip end records disagree")
        numbers, end_at = wide, end_64_at
    disk, first_disk, num_here, num_members, size, offset = numbers
    if disk or first_disk or num_here != num_members or offset + size != end_at:
        raise Malformed("its zip end record does not fit its directory")
    if num_members > _MAX_MEMBERS or size > _MAX_DIRECTORY_BYTES:
        raise Malformed(f"its zip directory is too large: {num_members} members in {size} bytes")
    return offset, num_members


def _locate_members(data: memoryview, archive: zipfile.ZipFile) -> dict[str, memoryview]:
    """Check the local headers against the directory; return the bytes of uncompressed members."""
    members: dict[str, memoryview] = {}
    names: set[str] = set()
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        shown = repr(one_line(info.filename[:200]))
        at, utf_8 = info.header_offset, info.flag_bits & _IS_UTF_8
        if info.filename in names:
            raise Malformed(f"two members have the name {shown}")
        if at < end:
            raise Malformed(f"the member {shown} overlaps another")
        magic, _, flags, method, _, _, *sizes, name_size, extra_size = _LOCAL_HEADER.unpack_from(
            data, at
        )
        name_end = at + _LOCAL_HEADER.size + name_size
        name = bytes(data[name_end - name_size : name_end]).decode("utf-8" if utf_8 else "cp437")
        start = name_end + extra_size
        end = start + info.compress_size
        # If a descriptor follows the bytes, sizes and checksum may be zero in the local header. If
        # zip64 fields follow the name, they may be saturated.
        pairs = zip(sizes, (info.CRC, info.compress_size, info.file_size), strict=True)
        has_sizes = not flags & _HAS_DESCRIPTOR or any(sizes)
        if (
            (magic, flags, method) != (b"PK\x03\x04", info.flag_bits, info.compress_type)
            or name != info.orig_filename
            or end > len(data)
            or (has_sizes and any(a not in (b, _SATURATED_32) for a, b in pairs))
            or (method == zipfile.ZIP_STORED and info.compress_size != info.file_size)
        ):
            raise Malformed(f"the member {shown} and the zip directory disagree")
        is_usual = method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if flags & _IS_ENCRYPTED or info.volume or not is_usual:
            raise Malformed(f"the member {shown} is encrypted, or packed unusually")
        names.add(info.filename)
        if method == zipfile.ZIP_STORED:
            members[info.filename] = data[start:end]
    return members


def _read_inner(archive: zipfile.ZipFile, name: str) -> dict[str, Tensor]:
    """Unpack the only checkpoint of a plain zip into a temporary file, and read that."""
    suffixes = SUFFIXES[:-1]
    inside = [info for info in archive.infolist() if info.filename.endswith(suffixes)]
    if len(inside) != 1:
        raise Malformed(f"it holds {len(inside)} checkpoints; it must hold one")
    member = inside[0]
    if member.file_size > _MAX_INFLATION * member.compress_size:
        raise Malformed(
            f"a member of {member.compress_size} bytes unpacks to {member.file_size}, too many for "
            "weights"
        )
    with tempfile.TemporaryDirectory(prefix="latentcache-") as folder:
        unpacked = Path(folder, "checkpoint" + Path(member.filename).suffix)
        try:
            with archive.open(member) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Malformed("a member and the zip directory disagree") from error
        if unpacked.stat().st_size != member.file_size:
            raise Malformed("a member and the zip directory disagree")
        inner_name = f"{name} ({one_line(member.filename[:200])})"
        return read_tensors(unpacked, inner_name, is_inner=True)


def _read_archive(
    archive: zipfile.ZipFile, members: Mapping[str, memoryview], num_bytes: int
) -> dict[str, Tensor]:
    """Read a PyTorch zip: a pickle, and one member for each storage that it names."""
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise Malformed(f"it has {len(names)} members named data.pkl")
    pickled = members.get(names[0])
    if pickled is None:
        raise Malformed("its data.pkl is compressed, which PyTorch does not do")
    folder = names[0].removesuffix("data.pkl")
    if members.get(f"{folder}byteorder", b"little")[:8] != b"little":
        raise Malformed("it was saved on a machine of another byte order")
    # PyTorch has an option to leave checksums out. They are then 0.
    if archive.getinfo(names[0]).CRC not in (0, zlib.crc32(pickled)):
        raise Malformed("its data.pkl does not match its checksum")
    storages: dict[str, StoredStorage] = {}
    loaded = load_pickle(io.BytesIO(pickled[:_MAX_PICKLE_BYTES]), storages)
    contents = {key: members.get(f"{folder}data/{key}") for key in storages}
    return _view_tensors(loaded, contents, num_bytes)


def _read_bare_pickle(data: memoryview) -> dict[str, Tensor]:
    """Read PyTorch's older format: five pickles, then the length and the bytes of each storage."""
    file = io.BytesIO(data[:_MAX_PICKLE_BYTES])
    storages: dict[str, StoredStorage] = {}
    pickles = (load_pickle(file, storages) for _ in range(5))
    if next(pickles) != _MAGIC or next(pickles) != _PROTOCOL:
        raise Malformed("it is a pickle, but not from PyTorch")
    # The third describes the writing system. Big-endian lengths fail the checks.
    _, loaded, keys = pickles
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Malformed("its storages have no names")
    contents: dict[str, memoryview | None] = {}
    position = file.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in contents or position + 8 > len(data):
            raise Malformed("its storages and its pickle disagree")
        (num_elements,) = struct.unpack_from("<q", data, position)
        contents[key] = data[position + 8 : position + 8 + storage.num_bytes]
        position += 8 + storage.num_bytes
        if num_elements != storage.num_elements or position > len(data):
            raise Malformed("a storage is cut off, or its size and its pickle disagree")
    return _view_tensors(loaded, contents, len(data))


def _view_tensors(
    loaded: object, contents: Mapping[str, memoryview | None], num_bytes: int
) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of a trainer's checkpoint around one.

    Tensors may share a storage, but all of them together may take at most twice the size of the
    file, which bounds the memory of their copies.
    """
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        return {}
    named = {key: value for key, value in loaded.items() if isinstance(value, StoredTensor)}
    if sum(tensor.num_bytes for tensor in named.values()) > 2 * num_bytes:
        raise Malformed("its tensors together are larger than the file")
    tensors = {}
    for name, tensor in named.items():
        _check_name(name)
        storage = tensor.storage
        content = contents.get(storage.key)
        if content is None or len(content) != storage.num_bytes:
            raise Malformed(
                f"the storage {one_line(storage.key[:100])!r} is missing, compressed or has "
                "another size"
            )
        if not storage.num_elements:
            tensors[name] = torch.empty(tensor.size, dtype=storage.dtype)
            continue
        flat = torch.frombuffer(content, dtype=storage.dtype)
        tensors[name] = flat.as_strided(tensor.size, tensor.stride, tensor.offset)
    return tensors


def _check_name(key: str) -> None:
    if len(key) > MAX_NAME_CHARS or not key.isprintable():
        raise Malformed(f"a tensor has the name {one_line(key[:100])!r}")
