"""Write and read the data files of a unit: the rows of one bucket.

They are one Parquet file, or a safetensors file of latents and a Parquet file of the rest. A file
is written to local disk, closed, opened again and checked before it is uploaded. So every file that
a receipt lists has been read back once.
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
from latentcache.dataset.parquet import open_parquet
from latentcache.dataset.receipts import DataFile
from latentcache.errors import DatasetError

# Space for the safetensors header, which is written last because it contains the row count.
_SAFETENSORS_HEADER_BYTES = 248

# What pyarrow and torch raise for values that do not match the schema.
_UNREADABLE = (ValueError, RuntimeError, KeyError, TypeError)

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


def row_schema(contract: Contract, columns: Columns, unit_id: str) -> pa.Schema:
    """Return the schema of a Parquet data file.

    The column `latent` comes second; it is absent if latents are in a safetensors file.

    Args:
        contract: the contract of the dataset.
        columns: the kept columns.
        unit_id: id of the unit, for the metadata.
    """
    kept = (pa.field(column.name, column_type(column.name)) for column in columns)
    metadata = {"latentcache.unit": unit_id, "latentcache.contract": contract.fingerprint}
    return pa.schema([*_fixed_fields(contract), *kept], metadata=metadata)


def _fixed_fields(contract: Contract) -> list[pa.Field]:
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("latent", pa.binary(), nullable=False),
        pa.field("latent_shape", pa.list_(pa.int32()), nullable=False),
        pa.field("latent_dtype", pa.string(), nullable=False),
        *(
            pa.field(name, pa.int32(), nullable=False)
            for name in ("original_width", "original_height", "crop_top", "crop_left")
        ),
    ]
    if contract.latents.format == "safetensors":
        del fields[1]
    return fields


def check_schema(schema: pa.Schema, contract: Contract) -> None:
    """Check the columns of a data file.

    Args:
        schema: the schema of the file.
        contract: the contract of the dataset.

    Raises:
        DatasetError: a mandatory column is missing, a column has another type, or two columns have
            the same name.
    """
    fixed = _fixed_fields(contract)
    if [*schema][: len(fixed)] != fixed:
        raise DatasetError(f"its columns do not begin with {', '.join(f.name for f in fixed)}")
    if len(set(schema.names)) < len(schema.names):
        raise DatasetError("it has two columns of the same name")
    for field in [*schema][len(fixed) :]:
        if field.type != column_type(field.name):
            raise DatasetError(
                f"column {field.name!r} is {field.type}, not {column_type(field.name)}"
            )


class BucketWriter:
    """A writer of the rows of one bucket of one unit to local disk.

    Args:
        stem: path of the files without their suffixes; the folder exists.
        contract: the contract of the dataset, which decides dtype and format.
        columns: the kept columns.
        unit_id: id of the unit, for the metadata of the file.
        bucket: (width, height) in pixels.
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
        self._columns = columns
        self._shape = contract.latent_shape(bucket)
        self._schema = row_schema(contract, columns, unit_id)
        self._pending: list[tuple[bytes, RowMeta]] = []
        self._latent_bytes = row_bytes(contract, bucket)
        self._group_rows = row_group_rows(contract, bucket)
        if contract.latents.format == "safetensors":
            self.paths = [Path(f"{stem}.safetensors"), Path(f"{stem}.rows.parquet")]
        else:
            self.paths = [Path(f"{stem}.parquet")]
        plain = [name for name in self._schema.names if name != "latent"]
        self._parquet = pq.ParquetWriter(
            self.paths[-1],
            self._schema,
            compression={  # by the path of the leaf column
                "latent_shape.list.element": "ZSTD",
                **{name: "NONE" if name == "latent" else "ZSTD" for name in self._schema.names},
            },
            use_dictionary=["latent_shape.list.element", "latent_dtype"],
            write_statistics=plain,
            # Each row group has one page of latents, so that latents lie at a constant stride, as
            # docs/format.md promises.
            data_page_size=2 * ROW_GROUP_BYTES,
            write_batch_size=ROW_GROUP_ROWS,
        )
        self._tensor_file: BinaryIO | None = None
        if contract.latents.format == "safetensors":
            self._tensor_file = self.paths[0].open("wb")
            self._tensor_file.write(bytes(8 + _SAFETENSORS_HEADER_BYTES))

    def append(self, latents: torch.Tensor, rows: Sequence[RowMeta]) -> None:
        """Append rows.

        Args:
            latents: [N, C, H, W] in the stored dtype.
            rows: the other fields of the N rows.
        """
        assert tuple(latents.shape) == (len(rows), *self._shape), latents.shape
        data = tensor_bytes(latents)
        size = self._latent_bytes
        for index, row in enumerate(rows):
            self._pending.append((data[index * size : (index + 1) * size], row))
            if len(self._pending) == self._group_rows:
                self._flush()

    def _flush(self) -> None:
        latents = [latent for latent, _ in self._pending]
        rows = [row for _, row in self._pending]
        num = len(rows)
        columns: dict[str, Any] = {
            "key": [row.key for row in rows],
            "latent": latents,
            "latent_shape": [list(self._shape)] * num,
            "latent_dtype": [self._contract.latents.dtype] * num,
        }
        for name in ("original_width", "original_height", "crop_top", "crop_left"):
            columns[name] = [getattr(row, name) for row in rows]
        for column in self._columns:
            columns[column.name] = [row.columns.get(column.name) for row in rows]
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
            header = {
                "__metadata__": {"format": "pt"},
                "latents": {
                    "dtype": SAFETENSORS_DTYPES[self._contract.latents.dtype],
                    "shape": [self.num_rows, *self._shape],
                    "data_offsets": [0, self.num_rows * self._latent_bytes],
                },
            }
            text = json.dumps(header).encode().ljust(_SAFETENSORS_HEADER_BYTES)
            self._tensor_file.seek(0)
            self._tensor_file.write(len(text).to_bytes(8, "little") + text)
            self._tensor_file.close()

    def abandon(self) -> None:
        """Close the files without finishing them; they are never uploaded."""
        self._parquet.is_open = False  # closing would write, and the disk may be full
        if self._tensor_file:
            self._tensor_file.close()

    def check(self) -> None:
        """Open the closed files again and compare them with the rows that were appended.

        Raises:
            DatasetError: a file differs from what was written: the disk lost or changed bytes.
        """
        with open_parquet(self.paths[-1]) as file:
            if file.metadata.num_rows != self.num_rows or not file.schema_arrow.equals(
                self._schema
            ):
                raise DatasetError(f"{self.paths[-1]} does not read back as written")
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self.paths]
            latent_offsets(files, self._contract, self.bucket, self.num_rows)


def write_rejects(path: Path, rejects: Sequence[RejectRow]) -> None:
    """Write the rejects file of a unit to local disk.

    Args:
        path: path of the file.
        rejects: the rejects of the unit.
    """
    columns = {name: [getattr(reject, name) for reject in rejects] for name in REJECT_SCHEMA.names}
    pq.write_table(pa.table(columns, REJECT_SCHEMA), path, compression="ZSTD")


def describe_file(local: Path, path: str, num_rows: int, bucket: str) -> DataFile:
    """Return a receipt's entry for a closed local file, with its size and SHA-256.

    Args:
        local: the local file.
        path: path of the file in the output.
        num_rows: number of rows in the file.
        bucket: name of the bucket; empty for rejects.
    """
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DataFile(path, local.stat().st_size, digest, num_rows, bucket)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor: little-endian, as on every platform of torch, in C order."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def iterate_latents(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, latent [C, H, W] in the stored dtype) of all rows of one bucket, in order.

    Args:
        files: the local Parquet file, or the safetensors file and its Parquet file of rows.

    Raises:
        DatasetError: the files are damaged.
    """
    try:
        with open_parquet(files[-1]) as file:
            if len(files) == 1:
                columns = ["key", "latent", "latent_dtype", "latent_shape"]
                for batch in file.iter_batches(columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        data, dtype, shape = row["latent"], row["latent_dtype"], row["latent_shape"]
                        yield row["key"], tensor_from_bytes(data, dtype, shape)
                return
            keys = file.read(columns=["key"], use_threads=False)["key"].to_pylist()
        with files[0].open("rb") as raw:
            latents = SafetensorsRows(raw)
            for index, key in enumerate(keys):
                yield key, latents[index]
    except (DatasetError, pa.ArrowException, OSError, *_UNREADABLE) as error:
        raise DatasetError(f"{files[-1]}: {error}") from error


def read_latents(files: Sequence[BinaryIO], keys: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the latents of some rows of one bucket's files.

    Args:
        files: the open Parquet file, or the safetensors file and its Parquet file of rows.
        keys: keys of the rows.

    Returns:
        Latents [C, H, W] in the stored dtype by key, without the keys that the files do not have.

    Raises:
        DatasetError: the files are damaged.
    """
    latents: dict[str, torch.Tensor] = {}
    try:
        with open_parquet(files[-1]) as rows:
            tensors = SafetensorsRows(files[0]) if len(files) > 1 else None
            first = 0
            for number in range(rows.num_row_groups):
                names = rows.read_row_group(number, ["key"], use_threads=False)["key"].to_pylist()
                indices = [index for index, key in enumerate(names) if key in keys]
                if tensors:
                    latents |= {names[index]: tensors[first + index] for index in indices}
                elif indices:
                    columns = ["latent", "latent_dtype", "latent_shape"]
                    group = rows.read_row_group(number, columns, use_threads=False)
                    group = group.take(indices)
                    for index, row in zip(indices, group.to_pylist(), strict=True):
                        latents[names[index]] = tensor_from_bytes(*(row[name] for name in columns))
                first += len(names)
    except (DatasetError, pa.ArrowException, OSError, *_UNREADABLE) as error:
        raise DatasetError(f"cannot read latents: {error}") from error
    return latents
