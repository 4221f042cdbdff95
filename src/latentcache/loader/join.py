"""Add columns to a dataset's rows from a Parquet file keyed by (unit, key).

So new captions or embeddings do not require encoding again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from latentcache.dataset.parquet import naming_damage, open_parquet, read_table
from latentcache.errors import ConfigError, DatasetError
from latentcache.loader.files import Files
from latentcache.loader.permutation import Ints
from latentcache.storage import Store, split_url
from latentcache.storage_options import StorageOptions

_READ_THREADS = 8

_IDENTITY = ("unit", "key")


@dataclass(frozen=True, slots=True)
class Join:
    """The rows of a Parquet file, joined to a dataset's rows with the same `unit` and `key`.

    Args:
        url: URL of a Parquet file, or of a folder of them. Each rank holds the rows in memory.
        columns: names of the columns to read; None takes all but `unit` and `key`. A joined column
            replaces a column of the dataset with the same name.
        missing: what happens to a row of the dataset without a partner: it is an `error`, or the
            row is left out (`drop`).
        storage: options of the store.
    """

    url: str
    columns: Sequence[str] | None = None
    missing: Literal["error", "drop"] = "error"
    storage: StorageOptions | None = None

    def __post_init__(self) -> None:
        if self.missing not in ("error", "drop"):
            raise ConfigError(f"missing is {self.missing!r}: it must be 'error' or 'drop'")


class Joined:
    """The rows of the files that count, and their joined columns; takes options of `LatentLoader`.

    `num_rows` is int64 [F], the number of rows of each file that count. `columns` lists the names
    of the columns to read from the files. `fingerprint` is a hash of the rows that count.

    Raises:
        ConfigError: a dataset or the join lacks a column.
        DatasetError: a row has no partner, or several.
    """

    def __init__(
        self, files: Files, join: Join | str | Path | None, columns: Sequence[str] | None
    ) -> None:
        kept = [[column.name for column in source.manifest.columns] for source in files.sources]
        if columns is None:
            columns = [name for name in kept[0] if all(name in names for names in kept)]
        for source, names in zip(files.sources, kept, strict=True):
            known = [*_IDENTITY, *names]
            if unknown := [name for name in columns if name not in known]:
                raise ConfigError(
                    f"{source.store.url} has no column {unknown[0]!r}; it has {known}"
                )
        self.num_rows: Ints = files.num_rows
        self.columns = list(columns)
        self.fingerprint = files.fingerprint()
        self._partners: Ints | None = None
        self._values: dict[str, pa.Array | torch.Tensor] = {}
        if join is not None:
            self._join(files, join if isinstance(join, Join) else Join(str(join)))

    def _join(self, files: Files, join: Join) -> None:
        table = _read_table(join)
        partners = _find_partners(files, table, join)
        counts = np.add.reduceat(partners >= 0, files.first_row) if len(files) else files.num_rows
        self.num_rows = counts.astype(np.int64)
        self._first_row: Ints = np.cumsum(self.num_rows) - self.num_rows
        within = np.arange(len(partners)) - np.repeat(files.first_row, files.num_rows)
        self._rows = within[partners >= 0]
        self._partners = partners[partners >= 0]
        if len(self._partners) < len(partners):  # otherwise the order is the same as without a join
            self.fingerprint = hashlib.sha256(
                self.fingerprint.encode() + self._rows.tobytes() + self.num_rows.tobytes()
            ).hexdigest()
        self._values = {
            name: _values(table[name], f"column {name!r} of {join.url}")
            for name in table.column_names
            if name not in _IDENTITY
        }
        self.columns = [name for name in self.columns if name not in self._values]

    def find(self, files: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """Return the indices of rows in their files, and of their partners in the join, int64 [m].

        Args:
            files, rows: int64 [m], the file, and the index among its rows that count.
        """
        if self._partners is None:
            return rows, rows
        numbers = self._first_row[files] + rows
        return self._rows[numbers], self._partners[numbers]

    def read(self, partners: Ints) -> dict[str, Any]:
        """Return the joined columns of rows: lists of text, tensors of numbers or vectors."""
        return {
            name: values[torch.from_numpy(partners)]
            if isinstance(values, torch.Tensor)
            else values.take(pa.array(partners)).to_pylist()
            for name, values in self._values.items()
        }


def _read_table(join: Join) -> pa.Table:
    """Return all rows of a join: `unit` and `key` as text, then its columns."""
    options = join.storage or StorageOptions()
    if join.url.endswith(".parquet"):
        folder, name = split_url(join.url)
        store, paths = Store(folder, options), [name]
    else:
        store = Store(join.url, options)
        paths = [info.path for info in store.list() if info.path.endswith(".parquet")]
        if not paths:
            raise ConfigError(f"join: {store.url} has no .parquet files")
    tables: list[pa.Table] = []
    for path in paths:
        tables.append(_read_file(store, path, join.columns))
        if set(tables[-1].column_names) != set(tables[0].column_names):
            raise ConfigError(
                f"join: {store.url_of(path)} has columns {tables[-1].column_names}, but another "
                f"file has {tables[0].column_names}: select columns with Join(…, columns=[…])"
            )
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigError(f"join: the files of {store.url} differ: {error}") from error


def _read_file(store: Store, path: str, columns: Sequence[str] | None) -> pa.Table:
    url = store.url_of(path)
    try:
        file = open_parquet(pa.BufferReader(store.read_bytes(path)))
        known = file.schema_arrow.names
        names = [name for name in (known if columns is None else columns) if name not in _IDENTITY]
        for name in (*_IDENTITY, *names):
            if name not in known:
                raise ConfigError(f"join: {url} has no column {name!r}; it has {known}")
        table = file.read([*_IDENTITY, *names], use_threads=False)
    except (pa.ArrowException, OSError, DatasetError) as error:
        raise ConfigError(f"join: {url} is not Parquet: {error}") from error
    for index, name in enumerate(_IDENTITY):
        text = _as_text(table[name], f"column {name!r} of {url}")
        table = table.set_column(index, name, text)
    return table


def _as_text(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return units or keys as large strings; pandas and Polars write other types of text."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ConfigError(f"join: {name} is {kind}, not text")
    if column.null_count:
        raise ConfigError(f"join: {name} has rows without a value")
    return column.cast(pa.large_string())


def _find_partners(files: Files, table: pa.Table, join: Join) -> Ints:
    """Return the index in the table of the partner of each row of all files, -1 if it has none."""
    units = table["unit"].dictionary_encode().combine_chunks()
    by_unit = np.argsort(units.indices.to_numpy(), kind="stable")
    counts = np.bincount(units.indices.to_numpy(), minlength=len(units.dictionary))
    parts = np.split(by_unit, np.cumsum(counts)[:-1])
    positions_of = dict(zip(units.dictionary.to_pylist(), parts, strict=False))
    table_keys = table["key"].combine_chunks()

    def find(file: int) -> Ints:
        unit = files.unit(file)
        store, path = files.source(file).store, files.rows_file(file).path
        with naming_damage(store, path), store.open(path) as data:
            keys = read_table(data, ["key"])["key"].combine_chunks()
        positions = positions_of.get(unit, by_unit[:0])
        candidates = table_keys.take(pa.array(positions))
        if pc.count_distinct(candidates).as_py() < len(positions):
            raise DatasetError(
                f"join: {join.url} has several rows with the same key in unit {unit}: remove the "
                "duplicates"
            )
        matches = pc.index_in(keys, value_set=candidates)
        if matches.null_count and join.missing == "error":
            key = keys.filter(pc.is_null(matches))[0].as_py()
            raise DatasetError(
                f"join: {join.url} has no row for unit {unit}, key {key!r}: add it, or leave out "
                "rows without a partner with Join(…, missing='drop')"
            )
        partners: Ints = np.append(positions, -1)[matches.fill_null(-1).to_numpy()]
        return partners

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return np.concatenate([np.zeros(0, np.int64), *pool.map(find, range(len(files)))])


def _values(column: pa.ChunkedArray, name: str) -> pa.Array | torch.Tensor:
    """Return numbers as a tensor, vectors of one length as a tensor [N, length], else an array."""
    kind, width = column.type, None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = set(pc.list_value_length(column).unique().to_pylist())
        if len(lengths) > 1:
            raise ConfigError(f"{name} holds lists of several lengths, or nulls: use one length")
        width = lengths.pop() if lengths else 0
    elif pa.types.is_fixed_size_list(kind):
        width = kind.list_size
    numbers = column if width is None else pc.list_flatten(column)
    if not (pa.types.is_integer(numbers.type) or pa.types.is_floating(numbers.type)):
        # The texts of all rows together may exceed the 2 GiB of the small string type.
        texts = column.cast(pa.large_string()) if pa.types.is_string(kind) else column
        return texts.combine_chunks()
    if column.null_count or numbers.null_count:
        raise ConfigError(f"{name} has rows without a value, which a tensor cannot hold: fill them")
    tensor = torch.from_numpy(np.require(numbers.to_numpy(), requirements="W"))
    return tensor if width is None else tensor.reshape(len(column), width)
