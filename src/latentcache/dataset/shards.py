"""The data files of a unit: rows of one bucket, as Parquet or as safetensors beside Parquet.

A file is written on local disk, closed, opened again and checked before it is uploaded, so that
what a receipt names has been read back once.
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

# Room for the safetensors header, which is written last: its row count is not known before.
_SAFETENSORS_HEADER_BYTES = 248

# What pyarrow and torch raise for values that are not as the schema says.
_UNREADABLE = (ValueError, RuntimeError, KeyError, TypeError)

REJECT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),  # null where no sample could be named
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("thumbnail", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class RowMeta:
    """All of a row but its latent. Sizes and crop offsets are in pixels."""

    key: str
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int
    columns: dict[str, str | int | None]


@dataclass(frozen=True, slots=True)
class RejectRow:
    """A sample left out: `key` is None where no sample could be named.

    `thumbnail` is a small JPEG of the first few of a reason that could be decoded, else None.
    `has_image` says whether the reject stands for an image; it is not stored.
    """

    key: str | None
    stage: str
    reason: str
    message: str
    thumbnail: bytes | None = None
    has_image: bool = True


def column_type(name: str) -> pa.DataType:
    """Arrow type of a kept column: `cls` is a class number, all others are text."""
    return pa.int64() if name == "cls" else pa.string()


def row_schema(contract: Contract, columns: Columns, unit_id: str) -> pa.Schema:
    """Schema of a data file; `latent` stands second, and is absent beside safetensors."""
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

    Raises:
        DatasetError: one that every data file has is missing, one has another type, or two have one
            name.
    """
    fixed = _fixed_fields(contract)
    if [*schema][: len(fixed)] != fixed:
        raise DatasetError(f"its columns do not begin with {', '.join(f.name for f in fixed)}")
    if len(set(schema.names)) < len(schema.names):
        raise DatasetError("it has two columns of one name")
    for field in [*schema][len(fixed) :]:
        if field.type != column_type(field.name):
            raise DatasetError(f"column {field.name!r} is {field.type}")


class BucketWriter:
    """Writes the rows of one bucket of one unit to local disk.

    Args:
        stem: the path without its ending; the folder exists.
        contract: names dtype and format.
        columns: the kept columns.
        unit_id: recorded in the file.
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
            # One page a row group, so that latents lie at one stride: docs/format.md promises it.
            data_page_size=2 * ROW_GROUP_BYTES,
            write_batch_size=ROW_GROUP_ROWS,
        )
        self._tensor_file: BinaryIO | None = None
        if contract.latents.format == "safetensors":
            self._tensor_file = self.paths[0].open("wb")
            self._tensor_file.write(bytes(8 + _SAFETENSORS_HEADER_BYTES))

    def append(self, latents: torch.Tensor, rows: Sequence[RowMeta]) -> None:
        """Append latents [N, C, H, W] in the stored dtype, and their N rows."""
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
        """Write what is pending and close the files."""
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
        self._parquet.is_open = False  # closing would write, and there may be no room
        if self._tensor_file:
            self._tensor_file.close()

    def check(self) -> None:
        """Open the closed files again and hold them against what was appended.

        Raises:
            DatasetError: a file is not what was written: the disk lost or changed bytes.
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
    """Write the rejects file of a unit."""
    columns = {name: [getattr(reject, name) for reject in rejects] for name in REJECT_SCHEMA.names}
    pq.write_table(pa.table(columns, REJECT_SCHEMA), path, compression="ZSTD")


def describe_file(local: Path, path: str, num_rows: int, bucket: str) -> DataFile:
    """Hash a closed local file: the entry that a receipt has of it."""
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DataFile(path, local.stat().st_size, digest, num_rows, bucket)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Little-endian C-order bytes of a tensor (every platform torch runs on is little-endian)."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def iterate_latents(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read (key, latent) of all rows of one bucket's local files, in order.

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
    """Read the latents of some rows of one bucket's files; a key that is not there is left out.

    Args:
        files: the open Parquet file, or safetensors and its rows.
        keys: of the rows.

    Raises:
        DatasetError: the files are damaged.
    """
    found: dict[str, torch.Tensor] = {}
    try:
        with open_parquet(files[-1]) as rows:
            tensors = SafetensorsRows(files[0]) if len(files) > 1 else None
            first = 0
            for number in range(rows.num_row_groups):
                there = rows.read_row_group(number, ["key"], use_threads=False)["key"].to_pylist()
                wanted = [index for index, key in enumerate(there) if key in keys]
                if tensors:
                    found |= {there[index]: tensors[first + index] for index in wanted}
                elif wanted:
                    columns = ["latent", "latent_dtype", "latent_shape"]
                    group = rows.read_row_group(number, columns, use_threads=False)
                    group = group.take(wanted)
                    for index, row in zip(wanted, group.to_pylist(), strict=True):
                        found[there[index]] = tensor_from_bytes(*(row[name] for name in columns))
                first += len(there)
    except (DatasetError, pa.ArrowException, OSError, *_UNREADABLE) as error:
        raise DatasetError(f"cannot read latents: {error}") from error
    return found
