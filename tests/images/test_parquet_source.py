"""Parquet files of images, cut into parts: every row once, and each fault reported."""

from __future__ import annotations

import datetime as dt
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache.errors import SourceChanged, SourceError, StorageError
from latentcache.images import parquet_source as parquet_module
from latentcache.images.source import (
    RejectedSample,
    Sample,
    SourceShard,
    list_shards,
    read_shard,
)
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

OPTIONS = StorageOptions()
IMAGE = ("jpg", "image")

Row = dict[str, Any]

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def rows_of(num_rows: int, *, num_bytes: int = 20, first: int = 0) -> list[Row]:
    return [
        {
            "image": {"bytes": bytes([index % 251]) * num_bytes, "path": f"{index:04d}.jpg"},
            "caption": f"picture {index} — ü",
        }
        for index in range(first, first + num_rows)
    ]


def write(path: Path, rows: Sequence[Row], group_rows: int = 10, **options: Any) -> Path:
    fields: list[tuple[str, pa.DataType]] = [("image", HUGGING_FACE), ("caption", pa.string())]
    table = pa.Table.from_pylist(list(rows), pa.schema(fields))
    pq.write_table(table, path, row_group_size=group_rows, **options)
    return path


def read(
    shard: SourceShard, keep: Sequence[str] = (), key: str | None = None
) -> list[Sample | RejectedSample]:
    return list(read_shard(shard, image=IMAGE, keep=keep, key=key, options=OPTIONS))


def read_file(
    path: Path, keep: Sequence[str] = (), key: str | None = None
) -> list[Sample | RejectedSample]:
    (shard,) = list_shards(str(path), OPTIONS)
    return read(shard, keep, key)


def read_table(
    folder: Path, table: pa.Table, keep: Sequence[str] = (), key: str | None = None
) -> list[Sample | RejectedSample]:
    path = folder / "x.parquet"
    pq.write_table(table, path)
    return read_file(path, keep, key)


def summary(results: Sequence[Sample | RejectedSample]) -> list[tuple[str | None, str]]:
    return [(r.key, "ok" if isinstance(r, Sample) else r.reject.reason) for r in results]


def test_rows_become_samples_in_order(tmp_path: Path):
    path = write(tmp_path / "x.parquet", rows_of(25))
    assert read_file(path, ["caption"]) == [
        Sample(f"{index:04d}", bytes([index]) * 20, {"caption": f"picture {index} — ü".encode()})
        for index in range(25)
    ]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3000)), min_size=1, max_size=8),
    part_bytes=st.integers(200, 20_000),
    compression=st.sampled_from(["NONE", "SNAPPY"]),
)
def test_the_parts_of_a_file_contain_each_row_once(
    tmp_path_factory: pytest.TempPathFactory,
    groups: list[tuple[int, int]],
    part_bytes: int,
    compression: str,
):
    path = tmp_path_factory.mktemp("parts") / "x.parquet"
    schema = pa.schema([("image", HUGGING_FACE), ("caption", pa.string())])
    first = 0
    with pq.ParquetWriter(path, schema, compression=compression) as writer:
        for num_rows, num_bytes in groups:
            rows = rows_of(num_rows, num_bytes=num_bytes, first=first)
            writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=num_rows)
            first += num_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_module, "PART_BYTES", part_bytes)
        shards = list_shards(str(path), OPTIONS)
    size = path.stat().st_size
    assert len(shards) == max(1, round(size / part_bytes))
    assert {(shard.size_bytes, shard.version) for shard in shards} == {
        (shards[0].size_bytes, shards[0].version)
    }
    results = [read(shard, ["caption"]) for shard in shards]
    expected = duckdb.sql(
        f"SELECT image.path, image.bytes, caption FROM read_parquet('{path}')"
    ).fetchall()
    assert [
        (sample.key + ".jpg", sample.image, sample.fields["caption"].decode())
        for part in results
        for sample in part
        if isinstance(sample, Sample)
    ] == expected
    # As Hadoop splits: a row group belongs to the part in which its first byte lies.
    metadata = pq.read_metadata(path)
    starts = [
        min(
            offset
            for column in range(metadata.num_columns)
            for chunk in [metadata.row_group(number).column(column)]
            for offset in (chunk.dictionary_page_offset, chunk.data_page_offset)
            if offset
        )
        for number in range(metadata.num_row_groups)
    ]
    for index, part in enumerate(results):
        low, high = index * size / len(shards), (index + 1) * size / len(shards)
        mine = [n for (n, _), start in zip(groups, starts, strict=True) if low <= start < high]
        assert len(part) == sum(mine)


def test_only_large_files_are_split_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "x.parquet", rows_of(40, num_bytes=1000), compression="NONE")
    (whole,) = list_shards(str(path), OPTIONS)
    assert whole.range is None
    monkeypatch.setattr(parquet_module, "PART_BYTES", path.stat().st_size // 3)
    parts = list_shards(f"{tmp_path}/*.parquet", OPTIONS)
    assert [(part.url, part.range) for part in parts] == [
        (whole.url, f"{index}/3") for index in range(3)
    ]


def test_the_key_of_a_row_without_path_is_its_number_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = pa.table({"image": pa.array([bytes([i]) * 3000 for i in range(30)], pa.binary())})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=4, compression="NONE")
    monkeypatch.setattr(parquet_module, "PART_BYTES", 20_000)
    shards = list_shards(str(path), OPTIONS)
    assert len(shards) > 2
    results = [sample for shard in shards for sample in read(shard)]
    assert results == [Sample(f"{i:09d}", bytes([i]) * 3000, {}) for i in range(30)]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (pa.string(), ["one", "two", "three"]),
        (pa.large_string(), ["one", "two", "three"]),
        (pa.string_view(), ["one", "two", "three"]),
        (pa.dictionary(pa.int32(), pa.string()), ["one", "two", "three"]),
        (pa.int64(), [3, -1, 2**40]),
    ],
)
def test_a_column_may_hold_the_key(tmp_path: Path, kind: pa.DataType, keys: list[Any]):
    images = [{"bytes": b"x", "path": f"{index}.jpg"} for index in range(3)]
    table = pa.table({"image": pa.array(images, HUGGING_FACE), "id": pa.array(keys, kind)})
    results = read_table(tmp_path, table, ["id"], key="id")
    assert [sample.key for sample in results] == list(map(str, keys))
    assert [
        sample.fields["id"].decode() for sample in results if isinstance(sample, Sample)
    ] == list(map(str, keys))


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())],
)
def test_an_image_may_be_any_kind_of_binary(tmp_path: Path, kind: pa.DataType):
    table = pa.table({"jpg": pa.array([b"a", b"b"]).cast(pa.binary())})
    array = table["jpg"].combine_chunks()
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
    results = read_table(tmp_path, pa.table({"jpg": array}))
    assert [sample.image for sample in results if isinstance(sample, Sample)] == [b"a", b"b"]


def test_the_first_image_column_that_is_not_null_is_used(tmp_path: Path):
    table = pa.table(
        {"image": pa.array([b"1", b"2"], pa.binary()), "jpg": pa.array([None, b"j"], pa.binary())}
    )
    results = read_table(tmp_path, table)
    assert [sample.image for sample in results if isinstance(sample, Sample)] == [b"1", b"j"]


def test_rows_without_image_bytes_are_rejects(tmp_path: Path):
    image = [
        {"bytes": b"x", "path": "a.jpg"},
        {"bytes": None, "path": "elsewhere/b.jpg"},
        {"bytes": b"z", "path": "v1.0/e.final.jpg"},
    ]
    results = read_table(tmp_path, pa.table({"image": pa.array(image, HUGGING_FACE)}))
    assert summary(results) == [("a", "ok"), ("elsewhere/b", "no_image"), ("v1.0/e.final", "ok")]
    assert isinstance(results[1], RejectedSample)
    assert "image elsewhere" in results[1].reject.message
    assert [sample.num_images for sample in results] == [1, 0, 1]


@pytest.mark.parametrize(
    "paths",
    [
        ["0.png", "1.png", "0.png"],
        ["a.jpg", "a.png", "b.jpg"],
        ["/data/0.png", "1.png", "2.png"],
        ["../0.png", "1.png", "2.png"],
        ["0.png", None, "2.png"],
        ["0.png", "", "2.png"],
        ["0.png", "a\nb.png", "2.png"],
    ],
)
def test_keys_are_row_numbers_when_paths_repeat_or_are_unsafe(
    tmp_path: Path, paths: list[str | None]
):
    image = [{"bytes": b"%d" % i, "path": path} for i, path in enumerate(paths)]
    results = read_table(tmp_path, pa.table({"image": pa.array(image, HUGGING_FACE)}))
    assert results == [Sample(f"{i:09d}", b"%d" % i, {}) for i in range(len(paths))]


def test_all_parts_of_a_file_use_the_same_key_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = [{"bytes": bytes([i]) * 3000, "path": f"{i % 39}.png"} for i in range(40)]
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"image": pa.array(image, HUGGING_FACE)}), path, row_group_size=4, compression=None
    )
    monkeypatch.setattr("latentcache.images.parquet_source.PART_BYTES", path.stat().st_size // 4)
    shards = list_shards(str(path), OPTIONS)
    assert len(shards) == 4  # the repeated path is in the first part and in the last
    keys = [sample.key for shard in shards for sample in read(shard)]
    assert keys == [f"{i:09d}" for i in range(40)]


def test_columns_of_any_readable_type_become_text(tmp_path: Path):
    day = dt.date(2026, 1, 2)
    columns: dict[str, Any] = {
        "image": [b"x", b"y", None],
        "nothing": pa.nulls(3),
        "binary": [b"\xff\xfe", b"", None],
        "number": [1.5, -2.0, None],
        "yes": [True, False, None],
        "decimal": [Decimal("1.50"), None, None],
        "day": [day, None, None],
        "list": [["a", "b"], [], None],
        "large": pa.array([["a", None], ["c", "d"], None], pa.large_list(pa.large_string())),
        "fixed": pa.array([["a", "b"], None, ["e", "f"]], pa.list_(pa.string(), 2)),
        "big": pa.array([2**64 - 1, 0, None], pa.uint64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    keep = [name for name in columns if name != "image"]
    (shard,) = list_shards(str(tmp_path / "x.parquet"), OPTIONS)
    results = list(read_shard(shard, image=IMAGE, keep=keep, options=OPTIONS, caption_index=1))
    assert summary(results) == [
        ("000000000", "ok"),
        ("000000001", "ok"),
        ("000000002", "no_image"),
    ]
    assert isinstance(results[0], Sample)
    assert isinstance(results[1], Sample)
    assert results[0].fields == {
        "binary": b"\xff\xfe",
        "number": b"1.5",
        "yes": b"true",
        "decimal": b"1.50",
        "day": b"2026-01-02",
        "list": b"b",
        "fixed": b"b",
        "big": b"18446744073709551615",
    }
    assert results[1].fields == {
        "binary": b"",
        "number": b"-2.0",
        "yes": b"false",
        "large": b"d",
        "big": b"0",
    }


@pytest.mark.parametrize(
    "kind", [pa.null(), pa.struct([("bytes", pa.null()), ("path", pa.string())])]
)
def test_an_image_column_without_any_image_gives_rejects(tmp_path: Path, kind: pa.DataType):
    values = [None, None] if kind == pa.null() else [{"bytes": None, "path": "a"}, None]
    results = read_table(tmp_path, pa.table({"image": pa.array(values, kind)}))
    assert [reason for _, reason in summary(results)] == ["no_image", "no_image"]
    assert sum(sample.num_images for sample in results) == 0


def test_an_oversized_value_is_a_reject_and_an_oversized_page_loses_its_row_group(
    tmp_path: Path,
):
    path = tmp_path / "x.parquet"
    table = pa.table(
        {
            "image": [b"a" * 100, b"b" * 1000, b"c" * 100, b"d" * 100, b"e" * 2000, b"f" * 100],
            "txt": ["t", "t" * 600, "t", "t", "t", "t"],
        }
    )
    pq.write_table(
        table,
        path,
        row_group_size=3,
        data_page_size=1,
        write_batch_size=1,
        use_dictionary=False,
        compression="ZSTD",
    )
    (shard,) = list_shards(str(path), OPTIONS)
    reading = read_shard(shard, image=IMAGE, keep=["txt"], options=OPTIONS, max_sample_bytes=1500)
    results = list(reading)
    assert summary(results)[:3] == [
        ("000000000", "ok"),
        ("000000001", "oversized_sample"),
        ("000000002", "ok"),
    ]
    assert isinstance(results[-1], RejectedSample)
    assert results[-1].reject.reason == "corrupt_shard"
    assert "rows of row group 1 are lost: a page takes" in results[-1].reject.message


def peak_mib(path: Path, keep: Sequence[str]) -> tuple[list[str], int]:
    """Read a file in a process of its own; return the outcomes and the peak growth in MiB."""
    program = f"""
import json, resource
from latentcache.images.source import Sample, list_shards, read_shard
from latentcache.storage_options import StorageOptions
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
(shard,) = list_shards({str(path)!r}, StorageOptions())
before, results = peak(), []
reading = read_shard(shard, image=["image"], keep={list(keep)!r}, options=StorageOptions())
for sample in reading:
    results.append("ok" if isinstance(sample, Sample) else sample.reject.reason)
print(json.dumps([results, peak() - before]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    results, growth = json.loads(done.stdout)
    return results, growth


@pytest.mark.slow
def test_small_files_that_expand_to_gigabytes_use_little_memory(tmp_path: Path):
    path = tmp_path / "x.parquet"
    options = {"compression": "ZSTD", "write_statistics": False, "store_schema": False}
    pq.write_table(pa.table({"image": [bytes(2**29)]}), path, use_dictionary=False, **options)
    assert path.stat().st_size < 2**17
    results, growth = peak_mib(path, [])
    assert results == ["corrupt_shard"]
    assert growth < 100
    repeated = pa.DictionaryArray.from_arrays(
        pa.array([0] * 64, pa.int32()), pa.array([" " * 2**24])
    )
    table = pa.table({"image": [b"x"] * 64, "txt": repeated})
    pq.write_table(table, path, dictionary_pagesize_limit=2**30, **options)
    assert path.stat().st_size < 2**17
    results, growth = peak_mib(path, ["txt"])
    assert results == ["ok"] * 64
    assert growth < 300


def test_a_key_that_is_null_is_a_reject(tmp_path: Path):
    table = pa.table({"image": pa.array([b"1", b"2"], pa.binary()), "id": ["a", None]})
    assert summary(read_table(tmp_path, table, key="id")) == [
        ("a", "ok"),
        ("000000001", "no_key"),
    ]


def test_null_values_are_missing_fields(tmp_path: Path):
    table = pa.table({"image": pa.array([b"1", b"2"], pa.binary()), "cls": [None, 7]})
    assert read_table(tmp_path, table, ["cls"]) == [
        Sample("000000000", b"1", {}),
        Sample("000000001", b"2", {"cls": b"7"}),
    ]


@pytest.mark.parametrize(
    ("columns", "keep", "key", "problem"),
    [
        ({"picture": [b"x"]}, [], None, "source.image names jpg, image, the file has picture"),
        ({"image": ["x"]}, [], None, "column 'image' is string and not an image"),
        ({"image": [[b"x"]]}, [], None, "column 'image' is list.* and not an image"),
        ({"image": [{"data": b"x"}]}, [], None, "column 'image' is struct.* and not an image"),
        ({"image": [b"x"]}, ["txt"], None, "no column 'txt', which source.keep names; it has im"),
        (
            {"image": [b"x"], "txt": [{"a": 1}]},
            ["txt"],
            None,
            "'txt', which source.keep names, is",
        ),
        (
            {"image": [b"x"], "txt": [[["a"]]]},
            ["txt"],
            None,
            "'txt', which source.keep names, is",
        ),
        ({"image": [b"x"]}, [], "id", "no column 'id', which source.key names"),
        ({"image": [b"x"], "id": [b"y"]}, [], "id", "'id', which source.key names, is binary"),
    ],
)
def test_an_unusable_column_is_an_error_that_names_it(
    tmp_path: Path, columns: dict[str, list[Any]], keep: list[str], key: str | None, problem: str
):
    with pytest.raises(SourceError, match=rf"x\.parquet.*{problem}"):
        read_table(tmp_path, pa.table(columns), keep, key)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty_shard"), (b"PAR1", "not_parquet"), (b"no Parquet " * 999, "not_parquet")],
)
def test_a_file_that_is_not_parquet_is_one_reject(tmp_path: Path, data: bytes, reason: str):
    path = tmp_path / "x.parquet"
    path.write_bytes(data)
    assert summary(read_file(path)) == [(None, reason)]


def test_a_truncated_file_is_one_reject(tmp_path: Path):
    data = write(tmp_path / "x.parquet", rows_of(30)).read_bytes()
    for end in range(1, len(data), 97):
        path = tmp_path / "cut.parquet"
        path.write_bytes(data[:end])
        assert summary(read_file(path)) == [(None, "not_parquet")], end


def test_damage_loses_only_the_rows_of_its_row_group(tmp_path: Path):
    path = write(tmp_path / "x.parquet", rows_of(40), write_page_checksum=True)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    results = read_file(path)
    good = [f"{index:04d}" for index in range(40) if not 10 <= index < 20]
    assert summary(results) == [*((key, "ok") for key in good), (None, "corrupt_shard")]
    assert isinstance(results[-1], RejectedSample)
    assert "10 rows of row group 1 are lost" in results[-1].reject.message


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4))
def test_damage_never_raises_and_leaves_at_most_one_keyless_reject(
    tmp_path_factory: pytest.TempPathFactory, patches: list[tuple[float, bytes]]
):
    path = write(tmp_path_factory.mktemp("damage") / "x.parquet", rows_of(20), 7)
    data = bytearray(path.read_bytes())
    # A damaged footer may say anything at all, such as other names for the columns.
    footer_bytes = 8 + int.from_bytes(data[-8:-4], "little")
    for where, patch in patches:
        start = int(where * (len(data) - footer_bytes - len(patch)))
        data[start : start + len(patch)] = patch
    path.write_bytes(data)
    assert [result.key for result in read_file(path)].count(None) <= 1


class Faulty:
    """A file whose reads fail, or end too soon, from some byte on."""

    def __init__(self, data: bytes, start: int, fault: str) -> None:
        self._file, self._start, self._fault = io.BytesIO(data), start, fault
        self.num_faults = 0

    def close(self) -> None:
        return

    def seek(self, position: int, whence: int) -> int:
        return self._file.seek(position, whence)

    def read(self, size: int) -> bytes:
        position = self._file.tell()
        if not position <= self._start < position + size:
            return self._file.read(size)
        self.num_faults += 1
        if self._fault == "breaks":
            raise ConnectionResetError("gone")
        return self._file.read(size)[: self._start - position]


@pytest.mark.parametrize("fault", ["breaks", "is cut"])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.9999])
def test_a_failing_connection_is_a_storage_error_and_never_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, where: float
):
    path = write(tmp_path / "x.parquet", rows_of(40, num_bytes=3000), compression="NONE")
    data = path.read_bytes()
    faulty = Faulty(data, int(where * len(data)), fault)
    monkeypatch.setattr(Store, "_open", lambda self, path, readahead: faulty)
    with pytest.raises(StorageError, match=r"x\.parquet.*(gone|gave)"):
        read_file(path)
    assert faulty.num_faults == 1


def test_a_file_replaced_or_deleted_while_it_is_read_raises_source_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path / "x.parquet", rows_of(40))
    (shard,) = list_shards(str(path), OPTIONS)

    def begin() -> Iterator[Sample | RejectedSample]:
        reading = read_shard(shard, image=IMAGE, keep=(), options=OPTIONS)
        next(reading)
        return reading

    reading = begin()
    write(path, rows_of(40, num_bytes=30))
    with pytest.raises(SourceChanged, match="changed"):
        list(reading)
    for data in (b"other", b""):  # though it looks damaged, or cut
        path.write_bytes(data)
        with pytest.raises(SourceChanged, match="changed"):
            read(shard)
    pq.write_table(pa.table({"other": [1]}), path)  # nor can it be used
    with pytest.raises(SourceChanged, match="changed"):
        read(shard)
    path.unlink()
    with pytest.raises(SourceChanged, match="deleted"):
        read(shard)


def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path):
    """Of 96 MiB in one row group, a page and a batch."""
    path = tmp_path / "x.parquet"
    schema = pa.schema([("image", HUGGING_FACE)])
    rows = [{"image": {"bytes": bytes(2**20), "path": f"{i}.jpg"}} for i in range(96)]
    with pq.ParquetWriter(path, schema, compression="NONE", write_batch_size=4) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=96)
    del rows
    (shard,) = list_shards(str(path), OPTIONS)
    before, peak, num_rows = pa.total_allocated_bytes(), 0, 0
    for sample in read_shard(shard, image=IMAGE, keep=(), options=OPTIONS):
        assert isinstance(sample, Sample)
        num_rows += 1
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert num_rows == 96
    assert peak < 48 * 2**20


def test_on_read_counts_the_bytes_of_each_row(tmp_path: Path):
    path = write(tmp_path / "x.parquet", rows_of(12))
    (shard,) = list_shards(str(path), OPTIONS)
    counts: list[int] = []
    samples = read_shard(
        shard, image=IMAGE, keep=["caption"], options=OPTIONS, on_read=counts.append
    )
    sizes = [
        len(sample.image) + len(sample.fields["caption"])
        for sample in samples
        if isinstance(sample, Sample)
    ]
    assert counts == sizes
