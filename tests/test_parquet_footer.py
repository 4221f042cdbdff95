"""Footers and page headers of Parquet files, compared with what pyarrow reads in them."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache.parquet_footer import (
    DamagedFooter,
    Footer,
    footer_size,
    read_footer,
    read_page_header,
)

NESTED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parse(data: bytes) -> Footer:
    size = footer_size(data[-8:], len(data))
    return read_footer(data[-8 - size : -8], len(data))


def write(num_rows: int, **options: Any) -> bytes:
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": b"x" * i, "path": f"{i}"} for i in range(num_rows)], NESTED
            ),
            "list": pa.array([["a", "b"][: i % 3] for i in range(num_rows)], pa.list_(pa.string())),
            "map": pa.array(
                [[("a", i)] for i in range(num_rows)], pa.map_(pa.string(), pa.int64())
            ),
            "null": pa.nulls(num_rows),
            "float": pa.array([1.5] * num_rows, pa.float64()),
            "decimal": pa.array(list(range(num_rows)), pa.decimal128(9, 2)),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 60),
    row_group_size=st.none() | st.integers(1, 70),
    compression=st.sampled_from(["NONE", "SNAPPY", "ZSTD", "GZIP", "BROTLI", "LZ4"]),
    version=st.sampled_from(["1.0", "2.4", "2.6"]),
    data_page_version=st.sampled_from(["1.0", "2.0"]),
    use_dictionary=st.booleans(),
    write_page_index=st.booleans(),
)
def test_footers_equal_pyarrows_metadata(num_rows: int, **options: Any):
    data = write(num_rows, **options)
    footer, expected = parse(data), pq.read_metadata(io.BytesIO(data))
    assert footer.num_rows == expected.num_rows
    assert len(footer.row_groups) == expected.num_row_groups
    for number, group in enumerate(footer.row_groups):
        theirs = expected.row_group(number)
        assert group.num_rows == theirs.num_rows
        assert group.total_byte_size == theirs.total_byte_size
        assert len(group.columns) == theirs.num_columns
        for index, column in enumerate(group.columns):
            other = theirs.column(index)
            assert ".".join(column.path) == other.path_in_schema
            assert column.num_values == other.num_values
            assert column.data_page_offset == other.data_page_offset
            assert column.total_compressed_size == other.total_compressed_size
            assert column.total_uncompressed_size == other.total_uncompressed_size
            if other.has_dictionary_page:
                assert column.dictionary_page_offset == other.dictionary_page_offset
            # The pages of a column follow each other to its end.
            position, num_uncompressed = column.start, 0
            while position < column.end:
                header = read_page_header(data[position : position + 1000])
                assert header is not None
                position += header.header_size + header.compressed_size
                num_uncompressed += header.header_size + header.uncompressed_size
            assert position == column.end
            assert num_uncompressed == column.total_uncompressed_size


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:-4] + b"PARE",
        lambda data: data[:-8] + b"\xff\xff\xff\x7f" + data[-4:],
        lambda data: data[:-8] + b"\0\0\0\0" + data[-4:],
        lambda data: data[:-30] + data[-29:],
        lambda data: b"PAR1" + data[-8 - footer_size(data[-8:], len(data)) :],  # offsets beyond it
    ],
)
def test_a_damaged_footer_raises_damaged_footer(damage: Any):
    with pytest.raises(DamagedFooter):
        parse(damage(write(10)))


def test_a_truncated_page_header_is_none():
    data = write(10)
    start = parse(data).row_groups[0].columns[0].start
    whole = read_page_header(data[start : start + 200])
    assert whole is not None
    assert read_page_header(data[start : start + whole.header_size - 1]) is None


def test_a_dictionary_outside_its_column_is_an_error():
    data = write(3, use_dictionary=True)
    footer = data[-8 - footer_size(data[-8:], len(data)) : -8]
    num_named = 0
    for position in range(len(footer)):
        changed = bytearray(footer)
        changed[position] ^= 64
        try:
            groups = read_footer(bytes(changed), len(data)).row_groups
        except DamagedFooter as error:
            num_named += "dictionary" in str(error)
            continue
        for chunk in (chunk for group in groups for chunk in group.columns):
            assert (chunk.dictionary_page_offset or chunk.start) < chunk.end
    assert num_named
