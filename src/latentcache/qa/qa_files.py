"""QA files: a sample of a unit's rows with their crops, latents, reconstructions and measures.

The crops allow another evaluation after the source images are deleted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.parquet import read_rows, read_table
from latentcache.dataset.receipts import QaFile, UnitRecord
from latentcache.dataset.shards import describe_file
from latentcache.errors import DatasetError, ObjectNotFound, one_line
from latentcache.storage import Store

_READ_THREADS = 16
_GROUP_ROWS = 16

MEASURES = ("psnr_db", "ssim", "lpips", "drift_db", "psnr_cost_db")

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("psnr_db", pa.float64(), nullable=False),
        pa.field("ssim", pa.float64(), nullable=False),
        pa.field("lpips", pa.float64()),
        pa.field("drift_db", pa.float64(), nullable=False),
        pa.field("psnr_cost_db", pa.float64()),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("reconstruction", pa.binary(), nullable=False),
        pa.field("latent", pa.binary(), nullable=False),
        pa.field("latent_shape", pa.list_(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class QaRow:
    """One evaluated row. Decibels are in [`metrics.MIN_DB`, `metrics.MAX_DB`].

    `psnr_db`, `ssim` and `lpips` (None without its network) compare the decoded latent with the
    crop. `drift_db` compares the stored latent with an fp32 encode of the crop. `psnr_cost_db` is
    the cost of quantisation: the PSNR of that fp32 encode minus `psnr_db`; None without
    quantisation. `image` and `reconstruction` are PNG files of the bucket's size. `latent` is the
    stored mean or sample, unscaled: float32 [C, h, w] as little-endian C-order bytes.
    """

    key: str
    bucket: str
    psnr_db: float
    ssim: float
    lpips: float | None
    drift_db: float
    psnr_cost_db: float | None
    image: bytes
    reconstruction: bytes
    latent: bytes
    latent_shape: Sequence[int]


class QaFiles(NamedTuple):
    """Units to report on, and the store of their QA files."""

    store: Store
    records: Sequence[UnitRecord]


def write_qa(local: Path, path: str, rows: Iterable[QaRow], decoder: str) -> QaFile | None:
    """Write QA rows to a Parquet file as they arrive; without rows, write no file and return None.

    Args:
        local, path: the file to write, and its later path in the dataset.
        rows, decoder: the rows, and the checkpoint that decoded them.
    """
    num_rows: Counter[str] = Counter()
    psnrs_db: list[float] = []
    drifts_db: list[float] = []
    remaining = iter(rows)
    with pq.ParquetWriter(local, _SCHEMA, compression="NONE") as writer:  # pictures are compressed
        # Row groups are small, so that a report reads few pictures that it does not show.
        while group := list(islice(remaining, _GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist([asdict(row) for row in group], _SCHEMA))
            num_rows.update(row.bucket for row in group)
            psnrs_db += [row.psnr_db for row in group]
            drifts_db += [row.drift_db for row in group]
        writer.add_key_value_metadata({"latentcache.decoder": decoder})
    if not psnrs_db:
        local.unlink()
        return None
    return QaFile(
        file=describe_file(local, path, len(psnrs_db), ""),
        num_rows=dict(sorted(num_rows.items())),
        mean_psnr_db=math.fsum(psnrs_db) / len(psnrs_db),
        min_drift_db=min(drifts_db),
    )


def read_measures(files: QaFiles, contract: Contract) -> pa.Table:
    """Return a table of the `unit`, `key`, `bucket` and `MEASURES` of all QA rows.

    Args:
        files, contract: a missing or damaged file, or another bucket, raises `DatasetError`.
    """
    schema = pa.schema([_SCHEMA.field(name) for name in ("key", "bucket", *MEASURES)])
    buckets = {Bucket(*size).name for size in contract.transform.buckets}

    def read(record: UnitRecord) -> pa.Table:
        table = _read(files.store, record, schema)
        if others := set(table["bucket"].unique().to_pylist()) - buckets:
            raise DatasetError(
                f"{files.store.url} has a QA row of {one_line(min(others))[:100]}, which is not "
                "one of its buckets; run `latentcache verify`"
            )
        return table.add_column(0, "unit", pa.array([record.unit.id] * len(table), pa.string()))

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        tables = list(pool.map(read, (record for record in files.records if record.qa)))
    empty = schema.insert(0, pa.field("unit", pa.string())).empty_table()
    return pa.concat_tables([empty, *tables])


def read_qa_rows(store: Store, record: UnitRecord, keys: Collection[str]) -> list[QaRow]:
    """Read the QA rows of a unit that have some keys, with their pictures.

    Args:
        store, record, keys: a missing or damaged QA file raises `DatasetError`.
    """
    return [QaRow(**row) for row in _read(store, record, _SCHEMA, keys).to_pylist()]


def _read(
    store: Store, record: UnitRecord, schema: pa.Schema, keys: Collection[str] | None = None
) -> pa.Table:
    """Read the columns of a schema, or all columns of the rows with some keys."""
    assert record.qa
    path = record.qa.file.path
    try:
        with store.open(path) as file:
            if keys is None:
                table = read_table(file, schema.names)
            else:
                table = read_rows(file, "key", keys)
        if not table.schema.equals(schema):
            raise DatasetError("it has another schema")
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError, ValueError, ObjectNotFound, DatasetError) as error:
        raise DatasetError(f"{store.url_of(path)} is gone or damaged: {error}") from error
