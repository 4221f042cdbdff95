"""Reading small Parquet files whole, or a few rows of larger ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file: a path, a file object or an Arrow buffer; all columns, or some.

    Arrow's function of this name scans on threads that outlive it: a process that ends soon after
    aborts now and then, or hangs (apache/arrow#34314, #50482).
    """
    with pq.ParquetFile(source) as file:
        return file.read(columns=columns, use_threads=False)


def read_rows(source: Any, column: str, values: Collection[str]) -> pa.Table:
    """Read the rows in which a text column has one of some values, and no other row groups."""
    with pq.ParquetFile(source) as file:
        index = file.metadata.schema.names.index(column)
        groups = [
            number
            for number in range(file.num_row_groups)
            if _may_hold(file.metadata.row_group(number).column(index).statistics, values)
        ]
        table = file.read_row_groups(groups, use_threads=False)
    return table.filter(pc.is_in(table[column], value_set=pa.array(values, pa.string())))


def _may_hold(statistics: Any, values: Collection[str]) -> bool:
    if statistics is None or not statistics.has_min_max:
        return True
    return any(statistics.min <= value <= statistics.max for value in values)
