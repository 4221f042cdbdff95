"""Columns from elsewhere, joined to a dataset's rows by (unit, key)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import makers
from latentcache import Join, LatentDataset, LatentLoader
from latentcache.errors import ConfigError, DatasetError, LatentCacheError
from reference import identities, read_rows
from servers import S3Server
from synthetic import make_contract, write_dataset

SMALL, TALL = (64, 64), (64, 96)
IDENTITY = ("unit", "key")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("join") / "dataset"
    units = [{SMALL: 9, TALL: 5}, {SMALL: 3}, {TALL: 4}]
    write_dataset(str(folder), make_contract([SMALL, TALL]), units)
    return folder


def table_of(folder: Path, **columns: Any) -> pa.Table:
    """A row for each of the dataset's, in an order of its own."""
    rows = sorted(read_rows(folder))
    table = pa.table(
        {
            "unit": [unit for unit, _ in rows],
            "key": [key for _, key in rows],
            "caption": [f"said anew of {unit[:4]} {key}" for unit, key in rows],
            **columns,
        }
    )
    return table.take(pa.array(np.random.default_rng(0).permutation(len(rows))))


def write(table: pa.Table, path: Path) -> str:
    pq.write_table(table, path)
    return str(path)


def load(folder: Path, join: Any, **options: Any) -> LatentLoader:
    chosen = {"batch_size": 4, "tail": "short", "columns": IDENTITY, "join": join} | options
    return LatentLoader(str(folder), **chosen)


def columns_of(loader: LatentLoader) -> dict[tuple[str, str], dict[str, Any]]:
    actual = {}
    for batch in loader:
        for position, identity in enumerate(identities(batch)):
            actual[identity] = {name: values[position] for name, values in batch.columns.items()}
    return actual


def test_joined_columns_equal_a_database_join(folder: Path, tmp_path: Path) -> None:
    number = range(len(read_rows(folder)))
    vectors = [[n + 0.5, -n, n * n] for n in number]
    path = write(
        table_of(
            folder,
            score=pa.array(number, pa.int32()),
            weight=pa.array(number, pa.float32()),
            ragged=pa.array([None if n % 3 else f"é {n}" for n in number]),
            halves=pa.array([np.array(v, np.float16) for v in vectors], pa.list_(pa.float16())),
            singles=pa.array(vectors, pa.list_(pa.float32(), 3)),
        ),
        tmp_path / "new.parquet",
    )
    asked = f"""
        SELECT theirs.unit, mine.key, theirs.* EXCLUDE (unit, key)
        FROM read_parquet('{folder}/data/*/*.parquet', filename = true) AS mine
        JOIN '{path}' AS theirs
        ON theirs.unit = split_part(mine.filename, '/', -2) AND theirs.key = mine.key
    """
    query = duckdb.sql(asked)
    expected = {(row[0], row[1]): row[2:] for row in query.fetchall()}
    actual = columns_of(load(folder, path))
    assert len(expected) == 21
    assert actual.keys() == expected.keys()
    for identity, (caption, score, weight, ragged, halves, singles) in expected.items():
        columns = actual[identity]
        assert (columns["caption"], columns["ragged"]) == (caption, ragged)
        assert (columns["score"].item(), columns["weight"].item()) == (score, weight)
        assert columns["halves"].dtype == torch.float16
        assert columns["halves"].tolist() == [float(v) for v in halves]
        assert columns["singles"].tolist() == list(singles)


Frame = Callable[[dict[str, list[str]], Path], object]
WRITERS: dict[str, Frame] = {
    "pandas": lambda columns, path: pd.DataFrame(columns).to_parquet(path),
    "pandas categories": lambda columns, path: (
        pd.DataFrame(columns).astype("category").to_parquet(path)
    ),
    "polars": lambda columns, path: pl.DataFrame(columns).write_parquet(path),
    "polars categories": lambda columns, path: (
        pl.DataFrame(columns).cast(pl.Categorical).write_parquet(path)
    ),
    "duckdb": lambda columns, path: duckdb.from_arrow(pa.table(columns)).write_parquet(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_join_accepts_text_types_of_all_writers_and_keys_repeated_across_units(
    tmp_path: Path, writer: str
) -> None:
    """Each has its own type for text. Both units have keys k0000 and on."""
    contract = makers.make_contract(buckets=(SMALL,))
    latents = {SMALL: makers.make_latents(contract, SMALL, 6)}
    makers.write_dataset(tmp_path, contract, {"a.tar": latents, "b.tar": latents})
    rows = sorted(read_rows(tmp_path / "out"), reverse=True)
    assert len({key for _, key in rows}) == 6
    assert len(rows) == 12
    columns = {
        "caption": [f"{unit}/{key}" for unit, key in rows],
        "unit": [unit for unit, _ in rows],
        "key": [key for _, key in rows],
    }
    WRITERS[writer](columns, tmp_path / "new.parquet")
    actual = columns_of(load(tmp_path / "out", tmp_path / "new.parquet"))
    assert actual.keys() == set(rows)
    for (unit, key), values in actual.items():
        assert values["caption"] == f"{unit}/{key}"


def test_a_joined_column_replaces_a_column_of_the_dataset(folder: Path, tmp_path: Path) -> None:
    path = write(table_of(folder, extra=["x"] * 21), tmp_path / "new.parquet")
    rows = read_rows(folder)
    batch = next(iter(load(folder, path, columns=None, batch_size=21, tail="pad")))
    assert batch.columns.keys() == {"caption", "extra"}
    assert all(caption.startswith("said anew") for caption in batch.columns["caption"])
    chosen = load(folder, Join(path, columns=["extra"]), columns=[*IDENTITY, "caption"])
    for identity, columns in columns_of(chosen).items():
        assert columns["caption"] == rows[identity].columns["caption"]
        assert columns["extra"] == "x"


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 20)), st.integers(0, 3))
def test_join_missing_drop_leaves_out_rows_without_a_partner(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, kept: set[int], seed: int
) -> None:
    """The order is then over the partners: each once an epoch, at any place resumed exactly."""
    table = table_of(folder)
    kept_rows = table.take(pa.array(sorted(kept), pa.int64()))
    path = write(kept_rows, tmp_path_factory.mktemp("kept") / "new.parquet")
    join = Join(path, missing="drop")
    if not kept:
        with pytest.raises(DatasetError, match="has no rows"):
            load(folder, join)
        return
    loader = load(folder, join, seed=seed)
    assert loader.num_rows == len(kept)
    batches = [identities(batch) for batch in loader]
    requested = zip(kept_rows["unit"].to_pylist(), kept_rows["key"].to_pylist(), strict=True)
    assert sorted(itertools.chain(*batches)) == sorted(requested)
    again = load(folder, join, seed=seed)
    state = again.state_dict()
    for expected in batches:
        again.load_state_dict(state)
        assert identities(next(iter(again))) == expected
        state = again.state_dict()


def test_a_state_of_other_rows_is_rejected(folder: Path, tmp_path: Path) -> None:
    table = table_of(folder)
    whole = load(folder, write(table, tmp_path / "whole.parquet"))
    dropped = load(folder, Join(write(table[3:], tmp_path / "part.parquet"), missing="drop"))
    with pytest.raises(ConfigError, match="dataset"):
        dropped.load_state_dict(whole.state_dict())
    # Other captions for the same rows, or none, are the same order.
    renamed = table.set_column(2, "caption", pa.array(["other"] * len(table)))
    load(folder, write(renamed, tmp_path / "b.parquet")).load_state_dict(whole.state_dict())
    load(folder, None).load_state_dict(whole.state_dict())


def test_join_reads_a_folder_of_files_with_its_own_storage_options(
    folder: Path, tmp_path: Path, rclone: S3Server
) -> None:
    table = table_of(folder)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "notes.txt").write_text("not a table")
    write(table[:7], parts / "a.parquet")
    write(table[7:], parts / "b.parquet")
    expected = columns_of(load(folder, write(table, tmp_path / "one.parquet")))
    assert columns_of(load(folder, parts)) == expected
    objects = {path.name: path.read_bytes() for path in parts.iterdir()}
    url = rclone.make_bucket("joined", objects)
    assert columns_of(load(folder, Join(url, storage=rclone.options))) == expected


def test_latent_dataset_returns_joined_columns(folder: Path, tmp_path: Path) -> None:
    table = table_of(folder)
    join = Join(write(table[5:], tmp_path / "new.parquet"), missing="drop")
    dataset = LatentDataset(str(folder), columns=IDENTITY, join=join)
    loaded = columns_of(load(folder, join))
    assert len(dataset) == len(loaded) == 16
    for row in dataset.__getitems__(range(16)):
        assert row["caption"] == loaded[row["unit"], row["key"]]["caption"]


def broken(table: pa.Table, how: str) -> pa.Table:
    if how == "missing":
        return table[1:]
    if how == "twice":
        return pa.concat_tables([table, table[:1]])
    if how == "no key":
        return table.drop_columns("key")
    if how == "number":
        return table.set_column(1, "key", pa.array(range(len(table))))
    if how == "no unit":
        return table.set_column(0, "unit", pa.array([None, *table["unit"].to_pylist()[1:]]))
    lists = [[1.0]] * (len(table) - 1)
    return table.append_column(
        "v", pa.array([*lists, [1.0, 2.0]] if how == "ragged" else [*lists, None])
    )


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("missing", DatasetError, "has no row for unit"),
        ("twice", DatasetError, "several rows with the same key"),
        ("no key", ConfigError, "no column 'key'"),
        ("number", ConfigError, "column 'key' of .* is int64, not text"),
        ("no unit", ConfigError, "column 'unit' of .* has rows without a value"),
        ("ragged", ConfigError, "lists of several lengths"),
        ("null", ConfigError, "lists of several lengths, or nulls"),
    ],
)
def test_invalid_joins_are_rejected(
    folder: Path, tmp_path: Path, how: str, kind: type[LatentCacheError], message: str
) -> None:
    path = write(broken(table_of(folder), how), tmp_path / "new.parquet")
    with pytest.raises(kind, match=message) as error:
        load(folder, path)
    assert "new.parquet" in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_join_files_are_rejected(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ConfigError, match="is not Parquet"):
        load(folder, tmp_path / "text.parquet")
    with pytest.raises(ConfigError, match=r"no \.parquet files"):
        load(folder, tmp_path / "nowhere")
    with pytest.raises(LatentCacheError, match=r"gone\.parquet"):
        load(folder, tmp_path / "gone.parquet")
    path = write(table_of(folder), tmp_path / "new.parquet")
    with pytest.raises(ConfigError, match="no column 'nope'"):
        load(folder, Join(path, columns=["nope"]))
    with pytest.raises(ConfigError, match="missing is 'ignore'"):
        Join(path, missing="ignore")  # type: ignore[arg-type]


def test_files_of_a_join_may_differ_in_columns_that_are_not_selected(
    folder: Path, tmp_path: Path
) -> None:
    table = table_of(folder)
    write(table[:7].append_column("n", pa.array(range(7), pa.int32())), tmp_path / "a.parquet")
    write(table[7:].select(["caption", "key", "unit"]), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet has columns .*select columns with Join"):
        load(folder, tmp_path)
    actual = columns_of(load(folder, Join(str(tmp_path), columns=["caption", "key"])))
    assert actual == columns_of(load(folder, write(table, tmp_path / "all.parquet")))
    write(table[7:].append_column("n", pa.array(["1"] * 14)), tmp_path / "b.parquet")
    (tmp_path / "all.parquet").unlink()
    with pytest.raises(ConfigError, match=f"the files of file://{tmp_path} differ: .*int32"):
        load(folder, tmp_path)
