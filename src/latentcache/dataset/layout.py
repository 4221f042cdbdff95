"""Find and check the position of latents in data files without reading the latents.

A loader copies latents from memory-mapped files by address. So everything that decides an address
is checked here first: the footer, the row groups, and the header of each page of latents.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import BinaryIO, TypeAlias

import torch

from latentcache.dataset.contract import Contract
from latentcache.dataset.parquet import checked_footer
from latentcache.dataset.parse import Count, check, load_json
from latentcache.errors import DatasetError
from latentcache.parquet_footer import ColumnChunk, DamagedFooter, read_page_header

# Row groups of 8 to 32 MiB stream well and are read whole. At most 1,024 rows keep a shuffle
# window small.
ROW_GROUP_BYTES = 16 * 2**20
ROW_GROUP_ROWS = 1024

# A page header without statistics is much shorter than this.
_PAGE_HEADER_BYTES = 256

# From parquet.thrift: a codec, a physical type, and the encodings PLAIN and RLE (for levels).
_UNCOMPRESSED, _BYTE_ARRAY = 0, 6
_PLAIN_ENCODINGS = {0, 3}

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}


File: TypeAlias = BinaryIO  # or a pyarrow file, which has no type annotations


def row_bytes(contract: Contract, bucket: tuple[int, int]) -> int:
    """Return the size in bytes of one stored latent of a bucket.

    Args:
        contract, bucket: the contract, and (width, height) in pixels.
    """
    return math.prod(contract.latent_shape(bucket)) * TORCH_DTYPES[contract.latents.dtype].itemsize


def row_group_rows(contract: Contract, bucket: tuple[int, int]) -> int:
    """Return the number of rows of a row group; the last one of a file may have fewer.

    Args:
        contract, bucket: the contract, and (width, height) in pixels.
    """
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes(contract, bucket)))


def latent_offsets(
    files: Sequence[File], contract: Contract, bucket: tuple[int, int], num_rows: int
) -> list[int]:
    """Return the byte offset of each row group's first latent in the first of a bucket's files.

    A row group has `row_group_rows` rows; the last one may have fewer. The next latents follow at a
    stride of `row_bytes`. In Parquet it is 4 bytes longer, because a length precedes each latent.
    All latents lie within the file.

    Args:
        files: the open Parquet file, or the safetensors file and its Parquet file of rows.
        contract, bucket: the contract, and (width, height) in pixels.
        num_rows: number of rows according to the receipt.

    Raises:
        DatasetError: a file is damaged, has another number of rows, or has another layout.
    """
    size, group_rows = row_bytes(contract, bucket), row_group_rows(contract, bucket)
    footer = checked_footer(files[-1])
    if footer.num_rows != num_rows:
        raise DatasetError(f"it holds {footer.num_rows} rows, but the receipt says {num_rows}")
    expected = [min(group_rows, num_rows - first) for first in range(0, num_rows, group_rows)]
    if [group.num_rows for group in footer.row_groups] != expected:
        raise DatasetError(
            f"it has {footer.num_rows} rows in {len(footer.row_groups)} row groups; expected "
            f"{num_rows} rows in groups of {group_rows}"
        )
    if contract.latents.format == "safetensors":
        tensor = SafetensorsRows(files[0])
        kind = (tensor.num_rows, *tensor.shape, tensor.dtype)
        if kind != (num_rows, *contract.latent_shape(bucket), contract.latents.dtype):
            raise DatasetError(f"latents are {tensor.num_rows} {tensor.dtype} of {tensor.shape}")
        return [tensor.start + first * size for first in range(0, num_rows, group_rows)]
    offsets, end = [], 0
    for number, rows in enumerate(expected):
        chunks = [c for c in footer.row_groups[number].columns if c.path == ("latent",)]
        if len(chunks) != 1:
            raise DatasetError(f"row group {number} has {len(chunks)} columns `latent`, not one")
        if chunks[0].start < end:
            raise DatasetError(f"row group {number} overlaps the one before it")
        offsets.append(_first_latent(files[0], chunks[0], rows, size, number))
        end = chunks[0].end
    return offsets


def _first_latent(file: File, chunk: ColumnChunk, rows: int, size: int, number: int) -> int:
    """Check that a chunk is one plain page of latents; return the offset of the first in bytes."""
    file.seek(chunk.data_page_offset)
    try:
        header = read_page_header(file.read(_PAGE_HEADER_BYTES))
    except DamagedFooter as error:
        raise DatasetError(f"row group {number}: damaged page header: {error}") from error
    num_bytes = rows * (4 + size)
    if header is not None:
        first = chunk.data_page_offset + header.header_size
        file.seek(first)
        if (
            not header.is_dictionary
            and header.uncompressed_size == header.compressed_size == num_bytes
            and header.header_size + num_bytes == chunk.total_compressed_size
            and chunk.num_values == rows
            and chunk.codec == _UNCOMPRESSED
            and chunk.physical_type == _BYTE_ARRAY
            and chunk.dictionary_page_offset is None
            and set(chunk.encodings) <= _PLAIN_ENCODINGS
            and int.from_bytes(file.read(4), "little") == size
        ):
            return first + 4
    raise DatasetError(f"row group {number} does not have the layout of docs/format.md")


def tensor_from_bytes(data: bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor of one row.

    Args:
        data, dtype, shape: little-endian bytes, a key of `TORCH_DTYPES`, and the shape.
    """
    # A bytearray is writable: torch warns about memory that it must not write to.
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]).reshape(list(shape))


class SafetensorsRows:
    """The rows of the stacked tensor `latents` of a safetensors file, each read on its own."""

    def __init__(self, file: File) -> None:
        self._file = file
        file.seek(0)
        try:
            length = int.from_bytes(file.read(8), "little")
            if length > 2**20:
                raise ValueError("it is longer than 1 MiB")
            entry = load_json(file.read(length))["latents"]
            names = {code: name for name, code in SAFETENSORS_DTYPES.items()}
            self.dtype = names[entry["dtype"]]
            self.num_rows, *self.shape = check(tuple[Count, ...], entry["shape"], "shape")
            start, end = check(tuple[Count, Count], entry["data_offsets"], "data_offsets")
            self._row_bytes = math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize
            if (start, end) != (0, self.num_rows * self._row_bytes):
                raise ValueError(f"{self.num_rows} rows of {self.shape} from {start} to {end}")
            if file.seek(0, os.SEEK_END) != 8 + length + end:
                raise ValueError("the size of the file does not match it")
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"damaged safetensors header: {error}") from error
        self.start = 8 + length

    def __getitem__(self, index: int) -> torch.Tensor:
        self._file.seek(self.start + index * self._row_bytes)
        data = self._file.read(self._row_bytes)
        if len(data) < self._row_bytes:
            raise DatasetError("damaged safetensors file: it ends early")
        return tensor_from_bytes(data, self.dtype, self.shape)
