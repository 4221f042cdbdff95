"""Small source shards with planted faults, and what must become of every sample in them."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

Member = tuple[str, bytes]

# One image of each turns the three buckets of the tests' config up.
SIZES = ((64, 64), (100, 70), (70, 110), (128, 128), (97, 65), (64, 90))


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar; `rows` maps the keys that must become rows to (width, height, caption)."""

    name: str
    data: bytes
    rows: dict[str, tuple[int, int, str | None]]
    rejects: list[tuple[str | None, str]] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return len(self.rows) + len(self.rejects)


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A smooth picture, as JPEG."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tar(members: list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def good(name: str, *, seed: int = 0, num_samples: int = 6, ballast_bytes: int = 0) -> Shard:
    """A shard of which every sample becomes a row; every third has no caption.

    The ballast is a field in the middle that no code reads, to make the shard as large as wanted.
    """
    members, rows = _samples(num_samples, seed)
    if ballast_bytes:
        middle = len(members) // 2
        key = members[middle - 1][0].partition(".")[0]
        members.insert(middle, (f"{key}.bin", bytes(ballast_bytes)))
    return Shard(name, tar(members), rows)


def _samples(
    num_samples: int, seed: int
) -> tuple[list[Member], dict[str, tuple[int, int, str | None]]]:
    members: list[Member] = []
    rows: dict[str, tuple[int, int, str | None]] = {}
    for index in range(num_samples):
        key, (width, height) = f"{index:04d}", SIZES[index % len(SIZES)]
        caption = None if index % 3 == 2 else f"picture {index} of seed {seed} — with a dash"
        members.append((f"{key}.jpg", jpeg(width, height, seed * 100 + index)))
        if caption is not None:
            members.append((f"{key}.txt", caption.encode()))
        rows[key] = (width, height, caption)
    return members, rows


def make_corpus() -> list[Shard]:
    """Ten shards, most with something wrong; all have the same keys, which may repeat across."""
    picture = jpeg(80, 80, 7)
    faults: list[tuple[list[Member], str | None, str]] = [
        ([("9000.jpg", picture[: len(picture) // 2])], "9000", "truncated_image"),
        ([("9000.jpg", b"this is no picture")], "9000", "not_an_image"),
        ([("9000.txt", b"words without a picture")], "9000", "no_image"),
        ([("0000.jpg", picture)], "0000", "duplicate_key"),
        ([("../9000.jpg", picture)], "../9000", "unsafe_key"),
        ([("9000.jpg", b"%PDF-1.7" + bytes(20))], "9000", "unsupported_format"),
    ]
    shards = [good("00.tar", seed=0), good("01.tar", seed=1)]
    for number, (bad, key, reason) in enumerate(faults, start=2):
        members, rows = _samples(4, number)
        shards.append(Shard(f"{number:02d}.tar", tar(members + bad), rows, [(key, reason)]))
    # Cut in the middle of its last picture, whose sample is lost into the reject of the shard.
    members, rows = _samples(4, 8)
    cut = tar([*members, ("9000.jpg", picture)]).index(picture) + len(picture) // 2
    data = tar([*members, ("9000.jpg", picture)])[:cut]
    shards.append(Shard("08.tar", data, rows, [(None, "truncated_shard")]))
    shards.append(Shard("09.tar", b"", {}, [(None, "empty_shard")]))
    return shards


def objects(shards: list[Shard]) -> dict[str, bytes]:
    """The shards as a bucket holds them."""
    return {shard.name: shard.data for shard in shards}
