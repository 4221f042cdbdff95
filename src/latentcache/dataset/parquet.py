"""Read Parquet files of a dataset, after a check of their footers.

Without it, pyarrow aborts the process for some damaged footers; see `parquet_footer.py`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentcache.errors import DatasetError
from latentcache.parquet_footer import DamagedFooter, Footer, footer_size, read_footer
from latentcache.storage import Store


def checked_footer(file: BinaryIO | pa.NativeFile) -> Footer:
    """Return the checked footer of an open Parquet file, and seek to the start of the file."""
    try:
        if (file_size := file.seek(0, os.SEEK_END)) < 12:
            raise DamagedFooter("the file is too short")
        file.seek(file_size - 8)
        num_bytes = footer_size(file.read(8), file_size)
        file.seek(file_size - 8 - num_bytes)
        return read_footer(file.read(num_bytes), file_size)
    except DamagedFooter as error:
        raise DatasetError(f"damaged Parquet footer: {error}") from error
    finally:
        file.seek(0)


@contextmanager
def naming_damage(store: Store, path: str) -> Iterator[None]:
    """Turn errors of code that decodes an object into a `DatasetError` that names the object.

    Errors of the store pass through unchanged: reading from it raises no `OSError`.

    Args:
        store, path: the store, and the path of the object in it.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, RuntimeError, DatasetError) as error:
        problem = f"{store.url_of(path)} is damaged: {error}"
        raise DatasetError(f"{problem}; run `latentcache verify`") from error


def open_parquet(source: Any) -> pq.ParquetFile:
    """Open a Parquet file: a path, an open file or an Arrow buffer.

    Callers must read with `use_threads=False`; for the same reason, `pre_buffer` is off. Arrow's
    threads that hold a Python file or buffer may outlive the interpreter. They then sometimes abort
    the process at exit (apache/arrow#34314, #50482).
    """
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        checked_footer(file)
    return pq.ParquetFile(source, pre_buffer=False)


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table in a Parquet file; Arrow's function of this name would scan on threads.

    Args:
        source: see `open_parquet`.
        columns: names of the columns to read; None reads all.
    """
    with open_parquet(source) as file:
        return file.read(columns=columns, use_threads=False)


def read_rows(source: Any, column: str, values: Collection[str]) -> pa.Table:
    """Return the rows in which a text column has one of some values.

    Of row groups without such a row, only this column is read.

    Args:
        source: see `open_parquet`.
        column, values: the name of the text column, and the values to select.
    """
    value_set = pa.array(values, pa.string())
    with open_parquet(source) as file:
        groups = []
        for number in range(file.num_row_groups):
            texts = file.read_row_group(number, columns=[column], use_threads=False)[column]
            if pc.any(pc.is_in(texts, value_set=value_set), min_count=0).as_py():
                groups.append(number)
        table = file.read_row_groups(groups, use_threads=False)
    return table.filter(pc.is_in(table[column], value_set=value_set))
