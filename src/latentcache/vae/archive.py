"""Read the directory of a zip file with one strict interpretation of its bytes.

Zip readers differ in which central directory they use, so one file can show different members to
different readers. Here the end record, the central directory and every local header must agree, and
they must fill the file in the order of a writer: members, directory, end records. Every other file
is refused. The layout and the field names are from PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from latentcache.errors import one_line

# PyTorch writes one member for each storage. The largest checkpoints have a few thousand.
MAX_MEMBERS = 50_000

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_MEMBER = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")

_IS_ENCRYPTED, _HAS_DESCRIPTOR = 0x0001, 0x0008
_STORED, _DEFLATED = 0, 8
_ZIP64_EXTRA = 1
_SATURATED_16, _SATURATED_32 = 0xFFFF, 0xFFFFFFFF


class Malformed(ValueError):
    """A checkpoint's container or pickle violates its format; the message describes the problem."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a zip. Its `packed_size` bytes are at `start` of the zip file."""

    name: str
    start: int
    packed_size: int
    size: int
    crc32: int
    is_stored: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record of the central directory."""

    raw_name: bytes
    flags: int
    method: int
    crc32: int
    packed_size: int
    size: int
    header_at: int


def read_directory(data: memoryview) -> dict[str, Member]:
    """Return the members of a zip file by name, without folders.

    Args:
        data: the whole file.

    Raises:
        Malformed: the parts of the archive do not agree, members overlap or share a name, or a
            member is encrypted or packed with a method other than deflate.
    """
    num_entries, directory_at, directory_size = _read_end(data)
    entries = list(_read_entries(data[directory_at : directory_at + directory_size]))
    if len(entries) != num_entries:
        raise Malformed(
            f"its zip directory has {len(entries)} members, but its count is {num_entries}"
        )
    members: dict[str, Member] = {}
    names: set[bytes] = set()
    previous_end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_at):
        if entry.raw_name in names:
            raise Malformed(f"two members have the name {_shown(entry.raw_name)}")
        names.add(entry.raw_name)
        member = _locate(data[:directory_at], entry)
        if entry.header_at < previous_end:
            raise Malformed(f"the member {_shown(entry.raw_name)} overlaps another")
        previous_end = member.start + member.packed_size
        if not member.name.endswith("/"):
            members[member.name] = member
    if len(members) != sum(not name.endswith(b"/") for name in names):
        raise Malformed("two members have the same name")
    return members


def _read_end(data: memoryview) -> tuple[int, int, int]:
    """Return the number of entries, and the offset and size of the central directory."""
    end_at = bytes(data[-(_END.size + _SATURATED_16) :]).rfind(b"PK\x05\x06")
    end_at += max(0, len(data) - (_END.size + _SATURATED_16))
    if end_at < 0 or len(data) - end_at < _END.size:
        raise Malformed("it is a zip file without an end record")
    magic, disk, first_disk, here, total, size, offset, comment_size = _END.unpack_from(
        data, end_at
    )
    if magic != b"PK\x05\x06" or end_at + _END.size + comment_size != len(data):
        raise Malformed("its zip end record does not end the file")
    stop = end_at
    locator_at = end_at - _LOCATOR_64.size
    if locator_at >= _END_64.size and bytes(data[locator_at : locator_at + 4]) == b"PK\x06\x07":
        _, _, end_64_at, num_disks = _LOCATOR_64.unpack_from(data, locator_at)
        stop = locator_at - _END_64.size
        if end_64_at != stop or num_disks > 1:
            raise Malformed("its zip64 end record is not where its locator says")
        magic, record_size, _, _, disk_64, first_64, here_64, total_64, size_64, offset_64 = (
            _END_64.unpack_from(data, stop)
        )
        if magic != b"PK\x06\x06" or record_size != _END_64.size - 12:
            raise Malformed("its zip64 end record is damaged")
        for short, long, saturated in (
            (disk, disk_64, _SATURATED_16),
            (first_disk, first_64, _SATURATED_16),
            (here, here_64, _SATURATED_16),
            (total, total_64, _SATURATED_16),
            (size, size_64, _SATURATED_32),
            (offset, offset_64, _SATURATED_32),
        ):
            if short not in (long, saturated):
                raise Malformed("its zip end records disagree")
        disk, first_disk, here, total = disk_64, first_64, here_64, total_64
        size, offset = size_64, offset_64
    if disk or first_disk or here != total or offset + size != stop:
        raise Malformed("its zip end record does not fit its directory")
    if total > MAX_MEMBERS:
        raise Malformed(f"it has {total} members, more than {MAX_MEMBERS}")
    return total, offset, size


def _read_entries(directory: memoryview) -> Iterator[_Entry]:
    at = 0
    while at < len(directory):
        magic = bytes(directory[at : at + 4])
        if len(directory) - at < _MEMBER.size or magic != b"PK\x01\x02":
            raise Malformed("its zip directory is damaged")
        fields = _MEMBER.unpack_from(directory, at)
        _, _, _, flags, method, _, _, crc32, packed, size, name_size, extra_size, note_size = (
            fields[:13]
        )
        disk, _, _, header_at = fields[13:]
        name_at = at + _MEMBER.size
        extra_at = name_at + name_size
        at = extra_at + extra_size + note_size
        if at > len(directory):
            raise Malformed("its zip directory is cut off")
        name = bytes(directory[name_at:extra_at])
        extra = directory[extra_at : extra_at + extra_size]
        size, packed, header_at = _widen(extra, size, packed, header_at)
        if flags & _IS_ENCRYPTED or method not in (_STORED, _DEFLATED) or disk:
            raise Malformed(f"the member {_shown(name)} is encrypted, or packed unusually")
        if method == _STORED and packed != size:
            raise Malformed(f"the member {_shown(name)} is not compressed, but has two sizes")
        yield _Entry(name, flags, method, crc32, packed, size, header_at)


def _widen(extra: memoryview, *values: int) -> list[int]:
    """Replace saturated 32-bit fields with the 64-bit ones of the extra field, in their order."""
    widened = list(values)
    saturated = [index for index, value in enumerate(values) if value == _SATURATED_32]
    at = 0
    while saturated and at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64_EXTRA:
            if size < 8 * len(saturated) or at + 4 + size > len(extra):
                break
            for index, value in zip(
                saturated, struct.unpack_from(f"<{len(saturated)}Q", extra, at + 4), strict=True
            ):
                widened[index] = value
            return widened
        at += 4 + size
    if saturated:
        raise Malformed("a member's zip64 sizes are missing")
    return widened


def _locate(members: memoryview, entry: _Entry) -> Member:
    """Check a local header against the directory's entry, and locate the member's bytes."""
    shown = _shown(entry.raw_name)
    at = entry.header_at
    if at + _LOCAL.size > len(members) or bytes(members[at : at + 4]) != b"PK\x03\x04":
        raise Malformed(f"the member {shown} is not where the zip directory says")
    _, _, flags, method, _, _, crc32, packed, size, name_size, extra_size = _LOCAL.unpack_from(
        members, at
    )
    name_at = at + _LOCAL.size
    start = name_at + name_size + extra_size
    extra = members[name_at + name_size : start]
    if start + entry.packed_size > len(members):
        raise Malformed(f"the member {shown} does not fit into the file")
    # If a descriptor follows the bytes, size and checksum may be zero in the local header.
    is_empty = flags & _HAS_DESCRIPTOR and not (crc32 or packed or size)
    if not is_empty:
        size, packed = _widen(extra, size, packed)
    same = (entry.crc32, entry.packed_size, entry.size)
    if (
        members[name_at : name_at + name_size] != entry.raw_name
        or (flags, method) != (entry.flags, entry.method)
        or not (is_empty or (crc32, packed, size) == same)
    ):
        raise Malformed(f"the member {shown} and the zip directory disagree")
    return Member(
        name=entry.raw_name.decode("utf-8", "backslashreplace"),
        start=start,
        packed_size=entry.packed_size,
        size=entry.size,
        crc32=entry.crc32,
        is_stored=entry.method == _STORED,
    )


def _shown(name: bytes) -> str:
    return repr(one_line(name[:200].decode("utf-8", "backslashreplace")))
