"""The training loader reads what other readers read, scaled as a model wants it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import makers
from latentcache import Batch, LatentLoader
from latentcache.dataset.contract import Contract
from latentcache.dataset.shards import RowMeta
from latentcache.errors import ConfigError
from latentcache.loader import loader as loader_module
from latentcache.loader import rows as rows_module
from ranks import keys_of_rank, run_ranks
from reference import assert_stored, identities, normalized, read_rows, same_bits
from synthetic import make_contract, write_dataset

SMALL, TALL = (64, 64), (64, 96)
IDENTITY = ("unit", "key")
UNITS: Sequence[Mapping[tuple[int, int], int]] = ({SMALL: 9, TALL: 5}, {SMALL: 1}, {TALL: 4})
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STORED = (*DTYPES, "int8")


def write(
    folder: Path,
    units: Sequence[Mapping[tuple[int, int], int]] = UNITS,
    contract: Contract | None = None,
    keep: Sequence[str] = ("txt",),
    **options: Any,
) -> str:
    contract = contract or make_contract([SMALL, TALL], **options)
    write_dataset(str(folder), contract, units, keep=keep)
    return str(folder)


def read_epoch(url: str, **options: Any) -> list[Batch]:
    """All rows, in batches that may be short, which name them."""
    chosen = {"batch_size": 4, "tail": "short", "columns": [*IDENTITY]} | options
    return list(LatentLoader(url, **chosen))


def all_identities(batches: Sequence[Batch]) -> list[tuple[str, str]]:
    return [identity for batch in batches for identity in identities(batch)]


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_equal_the_rows_of_other_readers(
    tmp_path: Path, format: str, dtype: str, shuffle: bool
) -> None:
    columns = ("caption", "cls", "license")
    url = write(tmp_path, format=format, dtype=dtype, keep=("txt", "cls", "license"))
    requested = DTYPES.get(dtype, torch.float32)
    options = {"normalize": False, "dtype": requested, "shuffle": shuffle}
    batches = read_epoch(url, columns=[*IDENTITY, *columns], **options)
    rows = read_rows(tmp_path)
    for batch in batches:
        assert batch.latents.dtype == requested
        assert_stored(batch, rows)
    assert sorted(all_identities(batches)) == sorted(rows)
    assert len(rows) == 19
    assert [len(batch) for batch in batches].count(4) == 4  # 10 rows of one bucket, 9 of the other


def test_files_of_several_row_groups_and_of_one_row(tmp_path: Path) -> None:
    units = [{SMALL: 2500}, *({SMALL: 1} for _ in range(40))]
    rows: dict[tuple[str, str], Any] = {}
    for format in ("parquet", "safetensors"):
        url = write(tmp_path / format, units, format=format)
        options = {"normalize": False, "dtype": torch.float16, "window_rows": 700}
        batches = read_epoch(url, batch_size=64, **options)
        rows = read_rows(tmp_path / format)
        for batch in batches:
            assert_stored(batch, rows)
        assert sorted(all_identities(batches)) == sorted(rows)
    files = [pq.read_metadata(path) for path in tmp_path.glob("parquet/data/*/*.parquet")]
    assert sorted(file.num_row_groups for file in files) == [1] * 40 + [3]


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_rows_of_small_row_groups(tmp_path: Path, format: str) -> None:
    contract = make_contract([(1024, 1024)], format=format, dtype="float32")
    url = write(tmp_path, [{(1024, 1024): 67}], contract)
    rows = read_rows(tmp_path)
    for batch in read_epoch(url, batch_size=8, normalize=False):
        assert_stored(batch, rows)
    (path,) = tmp_path.glob("data/*/*.parquet")
    assert pq.read_metadata(path).num_row_groups == 2


VAES = {
    "scaled": {"scaling_factor": 0.18215},
    "shifted": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "by channel": {
        "scaling_factor": 0.5,
        "latents_mean": (-1.6574, 1.886, -1.383, 2.5155),
        "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
    },
}


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("stored", STORED)
def test_latents_are_normalised_and_rounded_once(tmp_path: Path, stored: str, vae: str) -> None:
    contract = make_contract([SMALL, TALL], dtype=stored)
    url = write(tmp_path, contract=replace(contract, vae=replace(contract.vae, **VAES[vae])))
    rows = read_rows(tmp_path)
    for dtype in DTYPES.values():
        for batch in read_epoch(url, dtype=dtype):
            assert batch.latents.dtype == dtype
            for identity, latent in zip(identities(batch), batch.latents, strict=True):
                assert_rounded(latent, normalized(tmp_path, rows[identity].latent))


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("normalize", [True, False])
def test_denormalize_returns_the_stored_latents(tmp_path: Path, vae: str, normalize: bool) -> None:
    contract = make_contract([SMALL, TALL], dtype="float32")
    url = write(tmp_path, contract=replace(contract, vae=replace(contract.vae, **VAES[vae])))
    rows = read_rows(tmp_path)
    loader = LatentLoader(url, batch_size=4, columns=IDENTITY, normalize=normalize)
    for batch in loader:
        actual = loader.denormalize(batch.latents)
        for identity, latent in zip(identities(batch), actual, strict=True):
            assert torch.allclose(latent, rows[identity].latent, rtol=1e-5, atol=1e-5)


def assert_rounded(actual: torch.Tensor, exact: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Within half a step of the dtype, and what arithmetic in float32 adds to that."""
    magnitude = np.where(exact == 0, 1, np.abs(exact))  # int8 has an exact 0
    step = torch.finfo(actual.dtype).eps * 2.0 ** np.floor(np.log2(magnitude))
    excess = np.abs(actual.double().numpy() - exact) - 0.5 * step
    assert excess.max() < 3e-7


def noise_of(batches: Sequence[Batch], folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """By how many standard deviations each latent is off its row's mean."""
    rows, actual = read_rows(folder), {}
    for batch in batches:
        for identity, latent in zip(identities(batch), batch.latents, strict=True):
            mean, logvar = rows[identity].latent.double().chunk(2)
            actual[identity] = (latent.double() - mean) / (logvar / 2).exp()
    return actual


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_draws_from_moments_depend_only_on_row_epoch_and_seed(tmp_path: Path, format: str) -> None:
    url = write(tmp_path, posterior="moments", dtype="float32", format=format)
    loader = LatentLoader(
        url, batch_size=4, tail="short", columns=IDENTITY, normalize=False, seed=5
    )
    first, second = (noise_of(list(loader), tmp_path) for _ in range(2))
    assert first.keys() == second.keys() == read_rows(tmp_path).keys()
    drawn = torch.stack([torch.cat([n.flatten() for n in e.values()]) for e in (first, second)])
    assert abs(torch.corrcoef(drawn)[0, 1]) < 0.03, "epochs, about 6,000 numbers each"
    assert largest_gap_to_normal(drawn.flatten()) < 1.6 / math.sqrt(drawn.numel())
    assert len(drawn.unique()) > 0.99 * drawn.numel(), "rows share their noise"

    other_batches = read_epoch(url, batch_size=6, shuffle=False, normalize=False, seed=5)
    for identity, noise in noise_of(other_batches, tmp_path).items():
        assert torch.equal(noise, first[identity])
    other_seed = noise_of(read_epoch(url, normalize=False, seed=6), tmp_path)
    assert not any(torch.equal(noise, first[identity]) for identity, noise in other_seed.items())

    scaled = read_epoch(url, seed=5)
    for one, other in zip(read_epoch(url, normalize=False, seed=5), scaled, strict=True):
        for latent, requested in zip(other.latents, one.latents, strict=True):
            assert_rounded(latent, normalized(tmp_path, requested))


def largest_gap_to_normal(values: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's statistic: 1.6 / √n is exceeded once in a hundred times."""
    expected = torch.special.ndtr(values.sort().values)
    return float((expected - torch.linspace(0, 1, len(values)).double()).abs().max())


def test_a_posterior_without_variance_gives_its_mean(tmp_path: Path) -> None:
    contract = make_contract([SMALL], posterior="moments")
    mean = torch.randn(6, 4, 8, 8).half()
    moments = torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
    write_dataset(str(tmp_path), contract, [{SMALL: 6}], latents=lambda *_: moments)
    (batch,) = read_epoch(
        str(tmp_path), batch_size=6, shuffle=False, normalize=False, dtype=torch.float16
    )
    for identity, latent in zip(identities(batch), batch.latents, strict=True):
        stored = read_rows(tmp_path)[identity].latent[:4]
        torch.testing.assert_close(latent, stored, rtol=1e-3, atol=1e-5)


CAPTIONS = ["", None, "plain", "Grüße, 世界 🎨", " spaces\n\tand lines ", '{"json": 1}', "x" * 9999]


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_columns_equal_the_kept_values(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_rows(num_rows: int, columns: Sequence[str], first: int) -> list[RowMeta]:
        rows = []
        for index in range(first, first + num_rows):
            kept = {"caption": CAPTIONS[index % 7], "cls": [index, None, 0][index % 3]}
            rows.append(RowMeta(f"schlüssel/{index}", 1, 2, 3, 4, kept))
        return rows

    monkeypatch.setattr(makers, "make_rows", make_rows)
    contract = makers.make_contract(format=format)
    latents = makers.make_latents(contract, SMALL, 21)
    makers.write_dataset(
        tmp_path, contract, {"a.tar": {SMALL: latents}}, keep=("txt", "cls", "none")
    )
    url, rows = str(tmp_path / "out"), read_rows(tmp_path / "out")
    options = {"normalize": False, "dtype": torch.float16}
    for batch in read_epoch(url, columns=[*IDENTITY, "cls", "caption", "none"], **options):
        assert_stored(batch, rows)
        assert batch.columns["cls"].dtype == torch.int64
        assert batch.columns["none"] == [None] * len(batch)
    assert {row.columns["caption"] for row in rows.values()} == set(CAPTIONS)
    assert -1 in {row.columns["cls"] for row in rows.values()}


def test_columns_option_selects_columns(tmp_path: Path) -> None:
    url = write(tmp_path, keep=("txt", "cls"))
    for columns, names in [
        (None, ["caption", "cls"]),
        ([], []),
        (["cls"], ["cls"]),
        (["key", "caption"], ["key", "caption"]),
    ]:
        batch = next(iter(LatentLoader(url, batch_size=4, columns=columns)))
        assert list(batch.columns) == names


def test_batches_are_not_overwritten_while_they_are_referenced(tmp_path: Path) -> None:
    """A batch, a view of one and an array of one: each keeps its memory to itself."""
    url, rows = write(tmp_path), read_rows(tmp_path)
    for dtype in (torch.float16, torch.float32):  # one is finished where it was read
        options = {"batch_size": 4, "tail": "pad", "columns": IDENTITY, "normalize": False}
        loader = LatentLoader(url, dtype=dtype, prefetch_bytes=0, **options)
        batches = [batch for _ in range(3) for batch in loader]
        assert len({batch.latents.data_ptr() for batch in batches}) == len(batches)
        for batch in batches:
            for identity, latent in zip(identities(batch), batch.latents, strict=True):
                assert torch.equal(latent, rows[identity].latent.to(dtype))

        views, arrays = [], []
        for batch in loader:
            views.append((identities(batch)[1], batch.latents[1, 2:]))
            arrays.append((identities(batch)[3], batch.latents.numpy()[3].T))
            del batch
        for _ in range(3):
            list(loader)
        for identity, view in views:
            assert torch.equal(view, rows[identity].latent[2:].to(dtype))
        for identity, array in arrays:
            assert (array == rows[identity].latent.numpy().T).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_of_freed_batches_is_reused(tmp_path: Path, dtype: torch.dtype) -> None:
    row_bytes = 4 * 8 * 8 * dtype.itemsize
    url = write(tmp_path, [{SMALL: 400}])
    loader = LatentLoader(url, batch_size=4, dtype=dtype, prefetch_bytes=4 * 4 * row_bytes)
    places = {batch.latents.data_ptr() for _ in range(3) for batch in loader}
    assert len(loader) == 100
    assert 2 <= len(places) <= 4 + 4, "four ahead, one yielded, some in progress"


def test_a_batch_outlives_its_loader(tmp_path: Path) -> None:
    url, rows = write(tmp_path), read_rows(tmp_path)
    batches = read_epoch(url, normalize=False, dtype=torch.float16)
    for batch in batches:
        assert_stored(batch, rows)


def num_mapped(folder: Path) -> int:
    """How many files below a folder this process has mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split(maxsplit=5)[5] for line in maps if f" {folder}/" in line})


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_the_least_recently_used_files_are_closed(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_MAX_OPEN_FILES", 8)
    monkeypatch.setattr(loader_module, "_MAX_GROUP", 1)
    url = write(tmp_path, [{SMALL: 2}] * 60, format=format)
    loader = LatentLoader(
        *(url,), batch_size=2, columns=IDENTITY, normalize=False, dtype=torch.float16
    )
    rows, files_each = read_rows(tmp_path), 1 if format == "parquet" else 2
    seen, most = [], 0
    for _ in range(2):
        for batch in loader:
            assert_stored(batch, rows)
            seen += identities(batch)
            most = max(most, num_mapped(tmp_path))
    assert sorted(seen) == sorted([*rows, *rows])
    assert 8 * files_each <= most < 30 * files_each


def test_the_least_recently_used_columns_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_MAX_COLUMNS_BYTES", 30_000)
    monkeypatch.setattr(loader_module, "_MAX_GROUP", 1)
    num_loads = 0
    read_row_group = pq.ParquetFile.read_row_group

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_loads
        num_loads += 1
        return read_row_group(*args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    url = write(tmp_path, [{SMALL: 40}] * 20)
    batches = read_epoch(url, columns=[*IDENTITY, "caption"], normalize=False, dtype=torch.float16)
    rows = read_rows(tmp_path)
    for batch in batches:
        assert_stored(batch, rows)
    assert sorted(all_identities(batches)) == sorted(rows)
    assert num_loads > 60, "of 20 row groups, most were read again"


def test_prefetch_bytes_does_not_change_the_batches(tmp_path: Path) -> None:
    url = write(tmp_path, [{SMALL: 200}])
    expected = read_epoch(url)
    for prefetch_bytes in (0, "4kb", "1gb"):
        actual = read_epoch(url, prefetch_bytes=prefetch_bytes)
        for one, other in zip(actual, expected, strict=True):
            assert same_bits(one.latents, other.latents)
            assert identities(one) == identities(other)


def test_two_iterators_are_independent(tmp_path: Path) -> None:
    url, rows = write(tmp_path, [{SMALL: 40}]), read_rows(tmp_path)
    loader = LatentLoader(url, batch_size=4, columns=IDENTITY, normalize=False, dtype=torch.float16)
    for pair in zip(loader, loader, strict=True):
        for batch in pair:
            assert_stored(batch, rows)


def test_device_may_be_cpu(tmp_path: Path) -> None:
    url = write(tmp_path)
    for device in ("cpu", torch.device("cpu")):
        for batch in read_epoch(url, device=device):
            assert batch.latents.device.type == batch.time_ids.device.type == "cpu"


def test_rank_and_world_size_come_from_torch_distributed(tmp_path: Path) -> None:
    url = write(tmp_path / "data", [{SMALL: 40}])
    meeting = f"file://{tmp_path}/meeting"
    actual = run_ranks(keys_of_rank, [(url, meeting, rank, 2) for rank in range(2)])
    alone = [batch.columns["key"] for batch in read_epoch(url, batch_size=8)]
    assert [first + second for first, second in zip(*actual, strict=True)] == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "give both, or neither"),
        ({"world_size": 2}, "give both, or neither"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
        ({"rank": -1, "world_size": 2}, "rank -1 is not one of 2"),
        ({"rank": 0, "world_size": 0}, "rank 0 is not one of 0"),
        ({"rank": 0, "world_size": 3}, "batch_size is 4, for all ranks together, but 3 ranks"),
    ],
)
def test_invalid_ranks_are_rejected(tmp_path: Path, options: dict[str, int], message: str) -> None:
    url = write(tmp_path)
    with pytest.raises(ConfigError, match=message):
        LatentLoader(url, batch_size=4, **options)


def test_ranks_without_a_row_get_an_empty_batch(tmp_path: Path) -> None:
    url = write(tmp_path, [{SMALL: 5}], keep=("txt", "cls"))
    steps = [
        list(LatentLoader(url, batch_size=4, tail="short", rank=rank, world_size=4))
        for rank in range(4)
    ]
    assert [[len(batch) for batch in batches] for batches in steps] == [[1, 0]] * 3 + [[1, 1]]
    empty = steps[0][1]
    assert empty.latents.shape == (0, 4, 8, 8)
    assert empty.time_ids.shape == (0, 6)
    assert empty.columns["caption"] == []
    assert empty.columns["cls"].dtype == torch.int64

    url = write(tmp_path / "one", [{SMALL: 1}], posterior="moments")
    (alone,) = LatentLoader(url, batch_size=4, tail="short", rank=0, world_size=4)
    assert alone.latents.shape == (0, 4, 8, 8)
