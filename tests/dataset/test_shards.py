"""Data files: what stands in them, and that nothing needs latentcache to read them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import Contract
from latentcache.dataset.layout import TORCH_DTYPES, SafetensorsRows, tensor_from_bytes
from latentcache.dataset.shards import (
    REJECT_SCHEMA,
    BucketWriter,
    RejectRow,
    describe_file,
    iterate_latents,
    tensor_bytes,
    write_rejects,
)
from latentcache.errors import DatasetError
from makers import flip_byte, make_contract, make_latents, make_rows

DTYPES = list(TORCH_DTYPES)
KEEP = ("txt", "json", "cls")
COLUMNS = columns_of(KEEP)
NAMES = [column.name for column in COLUMNS]


def write(
    folder: Path, contract: Contract, latents: torch.Tensor, bucket: tuple[int, int]
) -> list[Path]:
    """Write the rows in batches of 1, 2, 3, … as an encoder with tails would bring them."""
    writer = BucketWriter(folder / "0-a", contract, COLUMNS, "unit", bucket)
    rows = make_rows(len(latents), NAMES)
    first, size = 0, 1
    while first < len(rows):
        writer.append(latents[first : first + size], rows[first : first + size])
        first, size = first + size, size + 1
    writer.close()
    writer.check()
    assert writer.num_rows == len(rows)
    return writer.paths


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert tensor_bytes(one) == tensor_bytes(other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parquet_file_has_the_documented_schema_and_values(tmp_path: Path, dtype: str):
    contract = make_contract(dtype=dtype, buckets=((64, 96),))
    latents = make_latents(contract, (64, 96), 7)
    (path,) = write(tmp_path, contract, latents, (64, 96))
    assert path.name == "0-a.parquet"
    table = pq.read_table(path)
    assert [(field.name, field.type, field.nullable) for field in table.schema] == [
        ("key", pa.string(), False),
        ("latent", pa.binary(), False),
        ("latent_shape", pa.list_(pa.int32()), False),
        ("latent_dtype", pa.string(), False),
        ("original_width", pa.int32(), False),
        ("original_height", pa.int32(), False),
        ("crop_top", pa.int32(), False),
        ("crop_left", pa.int32(), False),
        ("caption", pa.string(), True),
        ("cls", pa.int64(), True),
        ("json", pa.string(), True),
    ]
    metadata = table.schema.metadata
    assert metadata[b"latentcache.contract"].decode() == contract.fingerprint
    assert metadata[b"latentcache.unit"] == b"unit"
    for index, row in enumerate(table.to_pylist()):
        assert row["key"] == f"k{index:04d}"
        assert row["latent_shape"] == [4, 12, 8]
        assert row["latent_dtype"] == dtype
        has_columns = index % 5 > 0
        assert row["caption"] == (f"caption {index} ü" if has_columns else None)
        assert row["cls"] == (index if has_columns else None)
        data = torch.frombuffer(bytearray(row["latent"]), dtype=TORCH_DTYPES[dtype])
        assert_same_bits(data.reshape(4, 12, 8), latents[index])


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_latents_are_stored_plain_and_other_columns_are_compressed(tmp_path: Path, format: str):
    contract = make_contract(format=format)
    latents = make_latents(contract, (64, 64), 50)
    path = write(tmp_path, contract, latents, (64, 64))[-1]
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        columns = [group.column(index) for index in range(group.num_columns)]
    by_name = {column.path_in_schema: column for column in columns}
    assert ("latent" in by_name) == (format == "parquet")
    for name, column in by_name.items():
        if name == "latent":
            assert column.compression == "UNCOMPRESSED"
            assert not column.has_dictionary_page
            assert column.statistics is None
            # RLE is what the levels of every column are written in.
            assert set(column.encodings) <= {"PLAIN", "RLE"}
            assert column.total_compressed_size < latents.nbytes * 1.02 + 1000
        elif not name.startswith("latent_"):
            assert column.compression == "ZSTD", name
            assert column.statistics is not None, name


@pytest.mark.parametrize(
    ("num_rows", "side_px", "dtype", "posterior", "groups"),
    [
        (2500, 64, "float16", "mean", [1024, 1024, 452]),  # 512 B a row: the row limit
        (1024, 64, "float16", "mean", [1024]),
        (70, 1024, "float32", "moments", [32, 32, 6]),  # 512 KiB a row: 16 MiB
        (3, 2048, "float32", "moments", [3]),
    ],
)
@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_row_groups_have_at_most_1024_rows_and_16_mib(
    tmp_path: Path,
    num_rows: int,
    side_px: int,
    dtype: str,
    posterior: str,
    groups: list[int],
    format: str,
):
    bucket = (side_px, side_px)
    contract = make_contract(buckets=[bucket], dtype=dtype, posterior=posterior, format=format)
    writer = BucketWriter(tmp_path / "0-a", contract, COLUMNS, "unit", bucket)
    latent = make_latents(contract, bucket, 1)
    for row in make_rows(num_rows, NAMES):
        writer.append(latent, [row])
    writer.close()
    writer.check()
    with pq.ParquetFile(writer.paths[-1]) as file:
        result = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    assert [group.num_rows for group in result] == groups
    assert max(groups) <= 1024
    if format == "parquet":
        assert all(group.total_byte_size < 32 * 2**20 for group in result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_safetensors_file_is_one_stacked_tensor(tmp_path: Path, dtype: str, posterior: str):
    contract = make_contract(dtype=dtype, format="safetensors", posterior=posterior)
    latents = make_latents(contract, (64, 64), 11)
    tensors, rows = write(tmp_path, contract, latents, (64, 64))
    assert (tensors.name, rows.name) == ("0-a.safetensors", "0-a.rows.parquet")
    # A strict reader: bytes that no tensor names are an error to it.
    loaded = safetensors.torch.load_file(tensors)
    assert loaded.keys() == {"latents"}
    assert_same_bits(loaded["latents"], latents)
    assert "latent" not in pq.read_schema(rows).names
    assert pq.read_table(rows)["key"].to_pylist() == [f"k{index:04d}" for index in range(11)]
    # The tensor begins on an 8-byte boundary, so that it can be mapped.
    assert int.from_bytes(tensors.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_iterate_latents_returns_latents_in_order(tmp_path: Path, dtype: str, format: str):
    contract = make_contract(dtype=dtype, format=format)
    latents = make_latents(contract, (64, 64), 9)
    paths = write(tmp_path, contract, latents, (64, 64))
    result = list(iterate_latents(paths))
    assert [key for key, _ in result] == [f"k{index:04d}" for index in range(9)]
    for (_, latent), expected in zip(result, latents, strict=True):
        assert_same_bits(latent, expected)


@given(st.binary(min_size=8, max_size=8).map(lambda data: np.frombuffer(data, np.uint8).copy()))
def test_tensor_bytes_round_trip_every_bit_pattern(raw: np.ndarray):
    for name, dtype in TORCH_DTYPES.items():
        tensor = torch.from_numpy(raw).view(dtype)
        assert_same_bits(tensor_from_bytes(tensor_bytes(tensor), name, tensor.shape), tensor)


def test_tensor_bytes_of_a_transposed_tensor_are_in_c_order():
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).T
    assert tensor_bytes(tensor) == np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_damaged_data_files_are_a_named_error(tmp_path: Path, format: str):
    contract = make_contract(format=format)
    paths = write(tmp_path, contract, make_latents(contract, (64, 64), 9), (64, 64))
    for path in paths:
        good = path.read_bytes()
        for cut in (0, 7, 100, len(good) - 1):
            path.write_bytes(good[:cut])
            with pytest.raises(DatasetError, match=r"0-a\.|safetensors"):
                list(iterate_latents(paths))
        path.write_bytes(good)
    flip_byte(paths[0], 9)  # in the header of safetensors, in Parquet unseen here
    if format == "safetensors":
        with pytest.raises(DatasetError):
            list(iterate_latents(paths))


@pytest.mark.parametrize(
    "header", [b"[]", b"{}", b'{"latents": 3}', b'{"latents": {"dtype": "U8"}}', b"\xff"]
)
def test_invalid_safetensors_header_is_an_error(tmp_path: Path, header: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with path.open("rb") as file, pytest.raises(DatasetError, match="header"):
        SafetensorsRows(file)


def test_writer_check_detects_a_changed_file(tmp_path: Path):
    contract = make_contract()
    writer = BucketWriter(tmp_path / "0-a", contract, COLUMNS, "unit", (64, 64))
    writer.append(make_latents(contract, (64, 64), 5), make_rows(5, NAMES))
    writer.close()
    other = BucketWriter(tmp_path / "0-b", contract, COLUMNS, "unit", (64, 64))
    other.append(make_latents(contract, (64, 64), 4), make_rows(4, NAMES))
    other.close()
    os.replace(tmp_path / "0-b.parquet", tmp_path / "0-a.parquet")
    with pytest.raises(DatasetError, match="does not read back"):
        writer.check()


@pytest.mark.parametrize("file", ["0-a.parquet", "0-a.safetensors", "0-a.rows.parquet"])
def test_full_disk_is_an_os_error_and_abandon_raises_none(tmp_path: Path, file: str):
    (tmp_path / file).symlink_to("/dev/full")
    contract = make_contract(format="parquet" if file == "0-a.parquet" else "safetensors")

    def write() -> None:
        writer = BucketWriter(tmp_path / "0-a", contract, COLUMNS, "unit", (64, 64))
        try:
            writer.append(make_latents(contract, (64, 64), 3), make_rows(3, NAMES))
            writer.close()
        except OSError:
            writer.abandon()
            raise

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC


def test_describe_file_returns_size_and_hash(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    entry = describe_file(path, "data/u/x", 3, "64x64")
    assert (entry.size_bytes, entry.num_rows, entry.bucket) == (3, 3, "64x64")
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_rejects_file_round_trips(tmp_path: Path):
    rejects = [
        RejectRow("a", "decode", "truncated_image", "ends early"),
        RejectRow(None, "read", "truncated_shard", "müde"),
    ]
    write_rejects(tmp_path / "r.parquet", rejects)
    table = pq.read_table(tmp_path / "r.parquet")
    assert table.schema.equals(REJECT_SCHEMA)
    assert [RejectRow(**row) for row in table.to_pylist()] == rejects


def test_safetensors_header_fits_the_reserved_248_bytes():
    """The header is written last into reserved space: the largest numbers must fit."""
    entry = {
        "__metadata__": {"format": "pt"},
        "latents": {
            "dtype": "BF16",
            "shape": [10**9, 32, 2048, 2048],
            "data_offsets": [0, 10**9 * 32 * 2048 * 2048 * 4],
        },
    }
    assert len(json.dumps(entry)) <= 248
