"""Data files whose size and hash agree: every reader gives the same rows, or a `DatasetError`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fuzz import Target, mutate_bytes
from latentcache import LatentLoader, open_dataset, verify
from latentcache.errors import DatasetError
from tiny import edit_part, mutate_parquet, only, replace_part, write_tiny

_FORMATS = ("parquet", "safetensors")
_RAW: dict[str, Any] = {"dtype": torch.float16, "normalize": False}


def _seeds(folder: Path) -> list[bytes]:
    """Return the data files; the first byte of each says which file of which dataset it is."""
    for name in _FORMATS:
        write_tiny(folder / name, format=name)
    return [bytes([i]) + path.read_bytes() for i, path in enumerate(_files(folder))]


def _files(folder: Path) -> list[Path]:
    return [path for name in _FORMATS for path in sorted((folder / name / "data").rglob("*.*"))]


def _mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    tag, data = data[:1], data[1:]
    if data.endswith(b"PAR1"):
        return tag + mutate_parquet(rng, data, [seed[1:] for seed in seeds])
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.7:  # the header, whose length fits again half the time
        header = mutate_bytes(rng, data[8:end], [data[8:end]])
        size = len(header) if rng.random() < 0.5 else end - 8
        return tag + size.to_bytes(8, "little") + header + data[end:]
    return tag + mutate_bytes(rng, data, [data])


def _check(data: bytes, folder: Path) -> str:
    path, data = _files(folder)[data[0]], data[1:]
    output = folder / path.relative_to(folder).parts[0]
    name = path.relative_to(output).as_posix()
    original, part = path.read_bytes(), only(output / "parts").read_bytes()

    def agree(rows: list[dict[str, Any]]) -> None:
        (file,) = (file for row in rows for file in row["files"] if file["path"] == name)
        file.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    path.unlink()  # a loader may still map the file; truncating it in place would end the process
    path.write_bytes(data)
    replace_part(output, edit_part(part, agree))
    try:
        return _compare(output)
    finally:
        path.unlink()
        path.write_bytes(original)
        replace_part(output, part)


def _compare(output: Path) -> str:
    readers: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "open_dataset": lambda: {row.key: row.latent for row in open_dataset(output)},
        "LatentLoader": lambda: {
            key: latent
            for batch in LatentLoader(output, batch_size=4, tail="short", columns=["key"], **_RAW)
            for key, latent in zip(batch.columns["key"], batch.latents, strict=True)
        },
    }
    verdict = "good" if verify(str(output)).ok else "problems"
    results: dict[str, dict[str, torch.Tensor]] = {}
    for name, read in readers.items():
        try:
            results[name] = read()
        except DatasetError:
            verdict += f" {name}"
    assert verdict in ("good", f"problems{verdict[8:]}"), "verify finds nothing, a reader fails"
    first = next(iter(results.values()), {})
    for rows in results.values():
        assert rows.keys() == first.keys(), f"{' and '.join(results)} give other rows"
        for key, latent in rows.items():
            assert torch.equal(latent.view(torch.int16), first[key].view(torch.int16)), key
    return verdict


TARGET = Target(_seeds, _check, max_growth_mib=100, mutate=_mutate)
