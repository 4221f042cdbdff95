"""Reading small Parquet files whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(file: BinaryIO | pa.NativeFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file that Python holds open, all columns or some.

    Not by `pq.read_table`: its scanner lets go of the file on threads of its own, some time after
    it has returned. Where the interpreter ends just then, the process aborts.
    """
    return pq.ParquetFile(file).read(columns, use_threads=False)
