"""Parquet files: samples and rejects that account for every row, or a `SourceError`."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fuzz import Target
from latentcache.errors import SourceError
from latentcache.images.source import Sample, SourceShard, read_shard
from latentcache.storage_options import StorageOptions
from tiny import mutate_parquet

NUM_ROWS = 12


def _seeds(folder: Path) -> list[bytes]:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = [{"bytes": bytes([i]) * 300, "path": f"p{i}.jpg"} for i in range(NUM_ROWS)]
    table = pa.table(
        {
            "image": pa.array(image, kind),
            "txt": [f"caption {i % 3}" for i in range(NUM_ROWS)],
            "list": [["a", "b"]] * NUM_ROWS,
        }
    )
    seeds = []
    for compression in ("NONE", "ZSTD", "SNAPPY", "GZIP", "BROTLI", "LZ4"):
        for use_dictionary in (True, False):
            for version in ("1.0", "2.0"):
                buffer = io.BytesIO()
                pq.write_table(
                    table,
                    buffer,
                    row_group_size=5,
                    compression=compression,
                    use_dictionary=use_dictionary,
                    data_page_version=version,
                )
                seeds.append(buffer.getvalue())
    buffer = io.BytesIO()
    encodings = {"txt": "DELTA_BYTE_ARRAY", "image.path": "DELTA_LENGTH_BYTE_ARRAY"}
    pq.write_table(table, buffer, use_dictionary=False, column_encoding=encodings)
    return [*seeds, buffer.getvalue()]


def _check(data: bytes, folder: Path) -> str:
    path = folder / "x.parquet"
    path.write_bytes(data)
    status = path.stat()
    shard = SourceShard(f"file://{path}", status.st_size, f"{status.st_mtime_ns}")
    outcomes = []
    try:
        for sample in read_shard(
            shard,
            image=("image",),
            keep=("txt", "list"),
            options=StorageOptions(),
            max_sample_bytes=2**22,
        ):
            outcomes.append("row" if isinstance(sample, Sample) else sample.reject.reason)
    except SourceError as error:
        return type(error).__name__
    lost = {"corrupt_shard", "not_parquet", "empty_shard"}.intersection(outcomes)
    # No row of the seeds lacks an image: one that is missing must be named, or the footer says so.
    if not lost and len(outcomes) != NUM_ROWS:
        return "fewer rows in the footer"
    return " ".join(sorted(set(outcomes))) or "nothing"


TARGET = Target(_seeds, _check, max_growth_mib=120, mutate=mutate_parquet)
