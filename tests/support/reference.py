"""What lies in a local latent dataset, read without the package: DuckDB, safetensors, JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import safetensors.torch
import torch

from latentcache import Batch

IDENTITY = ("unit", "key")
Identity = tuple[str, str]

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
_NOT_COLUMNS = {"key", "latent", "latent_shape", "latent_dtype", "crop_top", "crop_left"}


@dataclass(frozen=True)
class StoredRow:
    """One row of a dataset.

    `latent` is [C, h, w] as stored; int8 latents are dequantized. `sizes` holds the six numbers of
    SDXL.
    """

    latent: torch.Tensor
    sizes: list[int]
    columns: dict[str, Any]


def read_rows(folder: Path) -> dict[Identity, StoredRow]:
    """Every row of every data file, in the order of the files' names."""
    return {
        identity: row
        for path in sorted(folder.glob("data/*/*.parquet"))
        for identity, row in _read_file(path).items()
    }


def _read_file(path: Path) -> dict[Identity, StoredRow]:
    query = duckdb.sql(f"SELECT * FROM read_parquet('{path}')")
    rows = [dict(zip(query.columns, values, strict=True)) for values in query.fetchall()]
    stacked = path.with_name(path.name.replace(".rows.parquet", ".safetensors"))
    if stacked != path:
        latents = safetensors.torch.load_file(stacked)["latents"].clone()  # it is a map
    else:
        data = b"".join(row["latent"] for row in rows)
        dtype = _DTYPES[rows[0]["latent_dtype"]]
        latents = torch.frombuffer(bytearray(data), dtype=dtype)
        latents = latents.reshape(len(rows), *rows[0]["latent_shape"])
    latents = _values(path.parents[2], latents)
    unit = path.parent.name
    return {
        (unit, row["key"]): StoredRow(latent, _sizes(row), _columns(row) | {"unit": unit})
        for row, latent in zip(rows, latents, strict=True)
    }


def _values(folder: Path, latents: torch.Tensor) -> torch.Tensor:
    """What int8 stands for, as docs/format.md has it; other dtypes stand for themselves."""
    terms = json.loads((folder / "contract.json").read_bytes())["contract"]["latents"]
    if latents.dtype != torch.int8:
        assert "quantization" not in terms
        return latents
    zero_point, scale = (
        np.array(terms["quantization"][name], np.float32)[:, None, None]
        for name in ("zero_point", "scale")
    )
    return torch.from_numpy((latents.numpy() - zero_point) * scale)


def _sizes(row: dict[str, Any]) -> list[int]:
    """Original (height, width), crop (top, left), target (height, width), as SDXL has them."""
    _, height, width = row["latent_shape"]
    original = [row["original_height"], row["original_width"]]
    return [*original, row["crop_top"], row["crop_left"], 8 * height, 8 * width]


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    columns = {name: value for name, value in row.items() if name not in _NOT_COLUMNS}
    del columns["original_width"], columns["original_height"]
    if columns.get("cls", 0) is None:
        columns["cls"] = -1
    return columns | {"key": row["key"]}


def normalized(folder: Path, latent: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`(z - shift) * scale` of a row's latent in double precision, by channel where it must be."""
    vae = json.loads((folder / "contract.json").read_bytes())["contract"]["vae"]
    shift = np.array(vae["latents_mean"] or [vae["shift_factor"]])[:, None, None]
    std = np.array(vae["latents_std"] or [1.0])[:, None, None]
    return (latent.double().numpy() - shift) * (vae["scaling_factor"] / std)


def identities(batch: Batch) -> list[Identity]:
    """Which rows a batch has; it must have the columns `unit` and `key`."""
    return list(zip(batch.columns["unit"], batch.columns["key"], strict=True))


def assert_stored(batch: Batch, rows: dict[Identity, StoredRow]) -> None:
    """Hold a batch that was not normalised against the rows: bits, sizes and columns."""
    assert batch.time_ids.dtype == torch.int64
    actual = zip(identities(batch), batch.latents, batch.time_ids.tolist(), strict=True)
    for number, (identity, latent, time_ids) in enumerate(actual):
        row = rows[identity]
        assert same_bits(latent, row.latent)
        assert time_ids == row.sizes
        assert list(batch.bucket) == row.sizes[:3:-1]
        for name, values in batch.columns.items():
            assert values[number] == row.columns[name], name


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit (NaN and -0 too)."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pair = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pair)
