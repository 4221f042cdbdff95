"""QA files: a sample of a unit's rows with their source crops, stored beside the latents.

A QA file is self-contained. Each row has the encoded crop, the stored latent, its reconstruction
and its measures. Reports need only these files and no model. The crops allow another evaluation
after the source images are deleted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentcache.dataset.parquet import read_rows, read_table
from latentcache.dataset.receipts import QaFile, UnitRecord
from latentcache.dataset.shards import describe_file
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.metrics import MAX_DB
from latentcache.storage import Store

_READ_THREADS = 16
_GROUP_ROWS = 16

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
MEASURES = ("psnr_db", "ssim", "lpips", "drift_db", "psnr_cost_db")


@dataclass(frozen=True, slots=True)
class Measured:
    """The measures of one row; decibels are in [`metrics.MIN_DB`, `metrics.MAX_DB`].

    `psnr_db`, `ssim` and `lpips` (None without its network) compare the decoded latent with the
    crop. `drift_db` compares the stored latent with an fp32 encode of the crop. `psnr_cost_db` is
    the cost of quantisation: the PSNR of that fp32 encode minus `psnr_db`; None without
    quantisation.
    """

    psnr_db: float
    ssim: float
    lpips: float | None
    drift_db: float
    psnr_cost_db: float | None


@dataclass(frozen=True, slots=True)
class QaRow:
    """One evaluated row.

    `image` and `reconstruction` are PNG files of the bucket's size. `latent` is the stored mean or
    sample, unscaled: float32 [C, h, w] as little-endian C-order bytes.
    """

    key: str
    bucket: str
    measured: Measured
    image: bytes
    reconstruction: bytes
    latent: bytes
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class QaFiles:
    """A dataset's units with the QA files to report on, and the store of these files."""

    store: Store
    records: Sequence[UnitRecord]


def write_qa(local: Path, path: str, rows: Iterable[QaRow], decoder: str) -> QaFile | None:
    """Write QA rows to a Parquet file as they arrive.

    Args:
        local: the file to write.
        path: the file's later path in the dataset.
        rows: any number of rows; memory holds a few at a time.
        decoder: the checkpoint that decoded the rows.

    Returns:
        The description of the file for a receipt. None if there are no rows; then no file is
        written.
    """
    num_rows: Counter[str] = Counter()
    psnrs_db: list[float] = []
    min_drift_db = MAX_DB
    left = iter(rows)
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        # Row groups are small, so that a report reads few pictures that it does not show.
        while group := list(islice(left, _GROUP_ROWS)):
            if writer is None:  # no compression, because pictures are compressed already
                writer = stack.enter_context(pq.ParquetWriter(local, _SCHEMA, compression="NONE"))
            writer.write_table(_table(group))
            num_rows.update(row.bucket for row in group)
            psnrs_db += [row.measured.psnr_db for row in group]
            min_drift_db = min(min_drift_db, *(row.measured.drift_db for row in group))
        if writer is None:
            return None
        writer.add_key_value_metadata({"latentcache.decoder": decoder})
    return QaFile(
        file=describe_file(local, path, len(psnrs_db), ""),
        num_rows=dict(sorted(num_rows.items())),
        mean_psnr_db=math.fsum(psnrs_db) / len(psnrs_db),
        min_drift_db=min_drift_db,
    )


def _table(rows: Sequence[QaRow]) -> pa.Table:
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in rows]
        for name in ("key", "bucket", "image", "reconstruction", "latent", "latent_shape")
    }
    columns |= {name: [getattr(row.measured, name) for row in rows] for name in MEASURES}
    return pa.table(columns, _SCHEMA)


def read_measures(store: Store, records: Iterable[UnitRecord]) -> pa.Table:
    """Read the measures of all QA rows, without their pictures.

    Args:
        store: the store of the QA files.
        records: the units.

    Returns:
        A table of `unit`, `key`, `bucket` and `MEASURES`, in the order of the units.

    Raises:
        DatasetError: a QA file is missing or damaged.
    """
    columns = ["key", "bucket", *MEASURES]

    def read(record: UnitRecord) -> pa.Table:
        with _open(store, record) as file:
            table = read_table(file, columns)
            _check_schema(table, columns)
        return table.add_column(0, "unit", pa.array([record.unit.id] * len(table), pa.string()))

    empty = pa.schema([pa.field("unit", pa.string()), *(_SCHEMA.field(name) for name in columns)])
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        tables = list(pool.map(read, (record for record in records if record.qa)))
    return pa.concat_tables([*(t.replace_schema_metadata() for t in tables), empty.empty_table()])


def read_qa_rows(
    store: Store, record: UnitRecord, keys: Iterable[str] | None = None
) -> list[QaRow]:
    """Read a unit's QA rows with their pictures.

    Args:
        store: the store of the QA file.
        record: the unit.
        keys: the keys of the rows to read; None reads all.

    Raises:
        DatasetError: the QA file is missing or damaged.
    """
    with _open(store, record) as file:
        table = read_table(file) if keys is None else read_rows(file, "key", list(keys))
        _check_schema(table, _SCHEMA.names)
    rows = table.to_pylist()
    return [
        QaRow(
            measured=Measured(**{name: row.pop(name) for name in MEASURES}),
            latent_shape=tuple(row.pop("latent_shape")),
            **row,
        )
        for row in rows
    ]


def _check_schema(table: pa.Table, columns: Sequence[str]) -> None:
    expected = pa.schema([_SCHEMA.field(name) for name in columns])
    if not table.schema.equals(expected):
        raise DatasetError("it has another schema")
    table.validate(full=True)


@contextmanager
def _open(store: Store, record: UnitRecord) -> Iterator[BinaryIO]:
    assert record.qa
    path = record.qa.file.path
    try:
        with store.open(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, ObjectNotFound, DatasetError) as error:
        raise DatasetError(f"{store.url_of(path)} is gone or damaged: {error}") from error
