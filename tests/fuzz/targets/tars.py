"""Tars: samples and rejects that account for every image, or a `SourceError`."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

from fuzz import Target, mutate_bytes
from latentcache.errors import SourceError
from latentcache.images.source import NotGrouped, Sample, SourceShard, read_shard
from latentcache.storage_options import StorageOptions

_BLOCK = tarfile.BLOCKSIZE
_TYPES = b"0\0123456789SLKxgX"
_FIELDS = [(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
_SIZES = [0, 1, 511, 2**20, 2**30, 2**33 - 1]


def _tar(form: int, members: Sequence[tuple[str, bytes | str]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, (name, data) in enumerate(members):
            header = tarfile.TarInfo(name)
            if form == tarfile.PAX_FORMAT and number == 1:
                header.pax_headers = {"comment": "ü" * 50}
            if isinstance(data, str):
                header.type, header.linkname = tarfile.LNKTYPE, data
                tar.addfile(header)
            else:
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def _seeds(folder: Path) -> list[bytes]:
    grouped: list[tuple[str, bytes | str]] = []
    for key in ("a", "d/b", "c" * 90 + "/" + "e" * 60):
        grouped += [(f"{key}.jpg", bytes(700)), (f"{key}.txt", b"caption"), (f"{key}.json", b"{}")]
    scattered = sorted(grouped, key=lambda member: member[0].rpartition(".")[2])
    linked = [*grouped, ("l.jpg", "a.jpg"), ("d/._b.jpg", b"junk"), ("b.mask.png", bytes(40))]
    tars = [
        _tar(form, members)
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        for members in (grouped, scattered, linked)
    ]
    return [*tars, *(gzip.compress(tar, mtime=0) for tar in tars[::4])]


def _mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change bytes; half the time only within headers, whose checksums are made right again."""
    if data[:2] == b"\x1f\x8b":
        if rng.random() < 0.5:
            return mutate_bytes(rng, data, seeds)
        return gzip.compress(_mutate(rng, gzip.decompress(data), seeds[:9]), mtime=0)
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, seeds)
    edited = bytearray(data)
    headers = [
        at for at in range(0, len(edited), _BLOCK) if edited[at + 257 : at + 262] == b"ustar"
    ]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.choice(headers)
        field = rng.choice(
            [(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
        )
        start, size = at + field[0], field[1]
        kind = rng.randrange(4)
        if field[0] == 156:
            edited[start] = rng.choice(_TYPES)
        elif field[0] == 124 and kind == 0:
            edited[start : start + 12] = b"%011o\0" % rng.choice(
                [0, 1, 511, 2**20, 2**30, 2**33 - 1]
            )
        elif field[0] == 124 and kind == 1:
            edited[start : start + 12] = rng.choice([b"\x80", b"\xff"]) + rng.randbytes(11)
        elif kind == 2:
            edited[start : start + size] = rng.choice(
                [b"../x.jpg", b"/abs.png", b"a.jpg", b".h/x.jpg", b"\xff.jpg", b"a\nb.jpg"]
            ).ljust(size, b"\0")[:size]
        else:
            edited[start + rng.randrange(size)] = rng.randrange(256)
        edited[at + 148 : at + 156] = b" " * 8
        edited[at + 148 : at + 156] = b"%06o\0 " % (sum(edited[at : at + _BLOCK]) & 0o777777)
    return bytes(edited)


def _check(data: bytes, folder: Path) -> str:
    path = folder / "x.tar"
    path.write_bytes(data)
    status = path.stat()
    shard = SourceShard(f"file://{path}", status.st_size, f"{status.st_mtime_ns}")

    def read(gather: bool) -> list[str]:
        outcomes, keys = [], set()
        for sample in read_shard(
            shard,
            image=("jpg", "png"),
            keep=("txt",),
            options=StorageOptions(),
            max_sample_bytes=2**22,
            gather=gather,
        ):
            if isinstance(sample, Sample):
                assert sample.key not in keys, "a key is there twice"
                assert sample.num_bytes <= 2**22
                keys.add(sample.key)
                sample.key.encode()
            outcomes.append("row" if isinstance(sample, Sample) else sample.reject.reason)
        return outcomes

    try:
        try:
            outcomes = read(gather=False)
        except NotGrouped:
            outcomes = ["gathered", *read(gather=True)]
    except SourceError as error:
        return type(error).__name__
    return " ".join(sorted(set(outcomes))) or "nothing"


TARGET = Target(_seeds, _check, max_growth_mib=60, mutate=_mutate)
