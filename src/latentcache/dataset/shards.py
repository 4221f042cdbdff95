"""Write and read the data files of a unit: the rows of one bucket.

They are one Parquet file, or a safetensors file of latents and a Parquet file of the rest. A file
is written to local disk, closed, and read back before it is uploaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.columns import Columns
from latentcache.dataset.contract import Contract
from latentcache.dataset.layout import (
    ROW_GROUP_BYTES,
    ROW_GROUP_ROWS,
    SAFETENSORS_DTYPES,
    SafetensorsRows,
    latent_offsets,
    row_bytes,
    row_group_rows,
    tensor_from_bytes,
)
from latentcache.dataset.parquet import open_parquet, read_table
from latentcache.dataset.receipts import DataFile
from latentcache.errors import DatasetError

# Space for the safetensors header, which is written last because it contains the row count.
_SAFETENSORS_HEADER_BYTES = 248

# What pyarrow and torch raise for values that do not match the schema.
_UNREADABLE = (ValueError, RuntimeError, KeyError, TypeError)

SIZES = ("original_width", "original_height", "crop_top", "crop_left")
"""The columns of sizes and crop offsets, in pixels."""

_SHAPE_LEAF = "latent_shape.list.element"

REJECT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),  # null if the reject stands for a whole shard
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("thumbnail", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class RowMeta:
    """The fields of a row other than its latent. Sizes and crop offsets are in pixels."""

    key: str
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int
    columns: dict[str, str | int | None]


@dataclass(frozen=True, slots=True)
class RejectRow:
    """A reject. `key` is None if the reject stands for a whole shard.

    `thumbnail` is a small JPEG for the first few rejects of a reason that could be decoded, else
    None. `has_image` says whether the reject stands for an image; it is not stored.
    """

    key: str | None
    stage: str
    reason: str
    message: str
    thumbnail: bytes | None = None
    has_image: bool = True


def column_type(name: str) -> pa.DataType:
    """Return the Arrow type of a kept column: `cls` is a class index, all others are text."""
    return pa.int64() if name == "cls" else pa.string()


def _fixed_fields(contract: Contract) -> list[pa.Field]:
    """Return the fields of every row; `latent` is absent if latents are in a safetensors file."""
    kinds = {
        "key": pa.string(),
        "latent": pa.binary(),
        "latent_shape": pa.list_(pa.int32()),
        "latent_dtype": pa.string(),
        **dict.fromkeys(SIZES, pa.int32()),
    }
    if contract.latents.format == "safetensors":
        del kinds["latent"]
    return [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]


def check_schema(schema: pa.Schema, contract: Contract) -> None:
    """Raise `DatasetError` unless a data file has the columns that a contract implies.

    Args:
        schema, contract: the schema of the file, and the contract of the dataset.
    """
    fixed = _fixed_fields(contract)
    if [*schema][: len(fixed)] != fixed:
        raise DatasetError(f"its columns do not begin with {', '.join(f.name for f in fixed)}")
    if len(set(schema.names)) < len(schema.names):
        raise DatasetError("it has two columns of the same name")
    for field in [*schema][len(fixed) :]:
        if field.type != (kind := column_type(field.name)):
            raise DatasetError(f"column {field.name!r} is {field.type}, not {kind}")


class BucketWriter:
    """A writer of the rows of one bucket (width, height) of one unit to local disk.

    `stem` is the path of the files without their suffixes; the folder exists.
    """

    def __init__(
        self,
        stem: Path,
        contract: Contract,
        columns: Columns,
        unit_id: str,
        bucket: tuple[int, int],
    ) -> None:
        self.bucket = Bucket(*bucket)
        self.num_rows = 0
        self._contract = contract
        self._shape = contract.latent_shape(bucket)
        self._pending: list[tuple[bytes, RowMeta]] = []
        self._latent_bytes = row_bytes(contract, bucket)
        self._group_rows = row_group_rows(contract, bucket)
        self._kept = [column.name for column in columns]
        kept = [pa.field(name, column_type(name)) for name in self._kept]
        metadata = {"latentcache.unit": unit_id, "latentcache.contract": contract.fingerprint}
        self._schema = pa.schema([*_fixed_fields(contract), *kept], metadata=metadata)
        names = [name for name in self._schema.names if name != "latent"]
        is_safetensors = contract.latents.format == "safetensors"
        suffixes = [".safetensors", ".rows.parquet"] if is_safetensors else [".parquet"]
        self.paths = [Path(f"{stem}{suffix}") for suffix in suffixes]
        self._parquet = pq.ParquetWriter(
            self.paths[-1],
            self._schema,
            # By the path of the leaf column.
            compression=dict.fromkeys([*names, _SHAPE_LEAF], "ZSTD") | {"latent": "NONE"},
            use_dictionary=[_SHAPE_LEAF, "latent_dtype"],
            write_statistics=names,
            # Each row group has one page of latents, so that latents lie at a constant stride, as
            # docs/format.md promises.
            data_page_size=2 * ROW_GROUP_BYTES,
            write_batch_size=ROW_GROUP_ROWS,
        )
        self._tensor_file: BinaryIO | None = None
        if is_safetensors:
            self._tensor_file = self.paths[0].open("wb")
            self._tensor_file.write(bytes(8 + _SAFETENSORS_HEADER_BYTES))

    def append(self, latents: torch.Tensor, rows: Sequence[RowMeta]) -> None:
        """Append rows.

        Args:
            latents, rows: [N, C, H, W] in the stored dtype, and the other fields of the N rows.
        """
        assert tuple(latents.shape) == (len(rows), *self._shape), latents.shape
        data, size = tensor_bytes(latents), self._latent_bytes
        for index, row in enumerate(rows):
            self._pending.append((data[index * size : (index + 1) * size], row))
            if len(self._pending) == self._group_rows:
                self._flush()

    def _flush(self) -> None:
        rows, num = [row for _, row in self._pending], len(self._pending)
        latents = [latent for latent, _ in self._pending]
        columns: dict[str, Any] = {
            "latent": latents,
            "latent_shape": [list(self._shape)] * num,
            "latent_dtype": [self._contract.latents.dtype] * num,
            **{name: [getattr(row, name) for row in rows] for name in ("key", *SIZES)},
            **{name: [row.columns.get(name) for row in rows] for name in self._kept},
        }
        if self._tensor_file:
            self._tensor_file.writelines(columns.pop("latent"))
        self._parquet.write_table(pa.table(columns, self._schema), row_group_size=num)
        self.num_rows += num
        self._pending.clear()

    def close(self) -> None:
        """Write the pending rows and close the files."""
        if self._pending:
            self._flush()
        self._parquet.close()
        if self._tensor_file:
            entry = {
                "dtype": SAFETENSORS_DTYPES[self._contract.latents.dtype],
                "shape": [self.num_rows, *self._shape],
                "data_offsets": [0, self.num_rows * self._latent_bytes],
            }
            header = json.dumps({"__metadata__": {"format": "pt"}, "latents": entry})
            text = header.encode().ljust(_SAFETENSORS_HEADER_BYTES)
            self._tensor_file.seek(0)
            self._tensor_file.write(len(text).to_bytes(8, "little") + text)
            self._tensor_file.close()

    def abandon(self) -> None:
        """Close the files unfinished."""
        self._parquet.is_open = False  # closing would write, and the disk may be full
        if self._tensor_file:
            self._tensor_file.close()

    def check(self) -> None:
        """Read the closed files back; raise `DatasetError` if the disk lost or changed bytes."""
        with open_parquet(self.paths[-1]) as file:
            is_same = file.schema_arrow.equals(self._schema)
            if file.metadata.num_rows != self.num_rows or not is_same:
                raise DatasetError(f"{self.paths[-1]} does not read back as written")
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self.paths]
            latent_offsets(files, self._contract, self.bucket, self.num_rows)


def write_rejects(path: Path, rejects: Sequence[RejectRow]) -> None:
    """Write the rejects file of a unit to local disk.

    Args:
        path, rejects: the file, and the rejects of the unit.
    """
    columns = {name: [getattr(reject, name) for reject in rejects] for name in REJECT_SCHEMA.names}
    pq.write_table(pa.table(columns, REJECT_SCHEMA), path, compression="ZSTD")


def read_rejects(source: Any) -> pa.Table:
    """Return the rejects in a file (see `read_table`); raise `DatasetError` for other columns."""
    table = read_table(source)
    if not table.schema.equals(REJECT_SCHEMA):
        raise DatasetError("it has another schema")
    table.validate(full=True)
    return table


def describe_file(local: Path, path: str, num_rows: int, bucket: str) -> DataFile:
    """Return a receipt's entry for a closed local file, with its size and SHA-256.

    Args:
        local, path: the local file, and its path in the output.
        num_rows, bucket: as in `DataFile`.
    """
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DataFile(path, local.stat().st_size, digest, num_rows, bucket)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor: little-endian, as on every platform of torch, in C order."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def read_latents(files: Sequence[BinaryIO], keys: Collection[str]) -> dict[str, torch.Tensor]:
    """Return latents of open files by key, without the keys that the files lack.

    Args:
        files, keys: see `iterate_latents`; the files are open.
    """
    return dict(iterate_latents(files, keys))


def iterate_latents(
    files: Sequence[Path | BinaryIO], keys: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, latent [C, H, W] in the stored dtype) of rows of one bucket, in order.

    Args:
        files, keys: the Parquet file, after a safetensors file if any; None yields all rows.
    """
    fields = ["latent", "latent_dtype", "latent_shape"]
    try:
        with ExitStack() as stack:
            rows = stack.enter_context(open_parquet(files[-1]))
            tensors: SafetensorsRows | None = None
            if len(files) > 1:
                raw = files[0]
                raw = stack.enter_context(raw.open("rb")) if isinstance(raw, Path) else raw
                tensors = SafetensorsRows(raw)
            first = 0
            for number in range(rows.num_row_groups):
                names = rows.read_row_group(number, ["key"], use_threads=False)["key"].to_pylist()
                chosen = [i for i, name in enumerate(names) if keys is None or name in keys]
                if tensors:
                    for index in chosen:
                        yield names[index], tensors[first + index]
                elif chosen:
                    group = rows.read_row_group(number, fields, use_threads=False).take(chosen)
                    for index, row in zip(chosen, group.to_pylist(), strict=True):
                        yield names[index], tensor_from_bytes(*(row[name] for name in fields))
                first += len(names)
    except (DatasetError, pa.ArrowException, OSError, *_UNREADABLE) as error:
        where = f" of {files[-1]}" if isinstance(files[-1], Path) else ""
        raise DatasetError(f"cannot read latents{where}: {error}") from error
