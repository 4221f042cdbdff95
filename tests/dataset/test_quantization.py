"""int8 latents: the arithmetic, the contract, and every reader by docs/format.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from latentcache import LatentDataset, LatentLoader, open_dataset, verify
from latentcache.dataset.contract import (
    Contract,
    LatentContract,
    QuantizationContract,
    contract_diff,
    establish_contract,
    read_contract,
)
from latentcache.dataset.quantization import fit, is_finite, to_stored, to_values
from latentcache.errors import ContractMismatch
from latentcache.metrics import drift_db
from latentcache.storage import Store
from makers import make_contract, make_latents, make_quantization, write_dataset
from reference import same_bits

BUCKETS = ((64, 64), (64, 96))
FORMAT = Path(__file__).parents[2] / "docs/format.md"

Floats = npt.NDArray[np.float32]


def terms_of(quantization: QuantizationContract) -> LatentContract:
    return LatentContract("mean", "int8", "parquet", "fp32", quantization)


def numbers(scale: Sequence[float], zero_point: Sequence[int]) -> LatentContract:
    return terms_of(QuantizationContract(1, 0, tuple(scale), tuple(zero_point)))


def fit_to(values: torch.Tensor) -> LatentContract:
    """Numbers for latents [N, C, H, W]."""
    return terms_of(fit(QuantizationContract(1, 0), values.transpose(0, 1).flatten(1)))


def snr_db(values: torch.Tensor, terms: LatentContract) -> float:
    return drift_db(to_values(to_stored(values, terms)[0], terms), values)


# The arithmetic.

latents = st.integers(1, 5).flatmap(
    lambda n: hnp.arrays(np.float32, (n, 3, 2, 2), elements=st.floats(-1e4, 1e4, width=32))
)


@given(latents)
def test_int8_conversion_is_as_docs_format_describes(values: Floats):
    """Against numpy, with the formulas of docs/format.md written out."""
    terms = fit_to(torch.from_numpy(values))
    assert terms.quantization
    scale, zero_point = np.array(terms.quantization.scale), np.array(terms.quantization.zero_point)
    assert (scale == scale.astype(np.float32)).all()
    assert (scale > 0).all()
    assert np.abs(zero_point).max() <= 2**22
    scale, zero_point = scale[:, None, None], zero_point[:, None, None]
    unclamped = np.rint(values.astype(np.float64) / scale) + zero_point
    stored, num_clamped = to_stored(torch.from_numpy(values), terms)
    np.testing.assert_array_equal(stored.numpy(), unclamped.clip(-127, 127).astype(np.int8))
    is_clamped = np.abs(unclamped) > 127
    assert num_clamped.tolist() == is_clamped.sum(axis=(1, 2, 3)).tolist()

    back = to_values(stored, terms).numpy()
    assert back.dtype == np.float32
    exact = (stored.numpy() - zero_point) * scale
    np.testing.assert_array_equal(back, exact.astype(np.float32))
    error = np.abs(back.astype(np.float64) - values)[~is_clamped]
    half_step = np.broadcast_to(scale / 2, values.shape)[~is_clamped]
    assert (error <= half_step + np.spacing(np.abs(back[~is_clamped]))).all()


@given(st.data())
def test_int8_error_within_the_range_is_at_most_half_a_step(data: st.DataObject):
    scale = data.draw(st.floats(2**-20, 2**10, width=32))
    zero_point = data.draw(st.integers(-(2**22), 2**22))
    steps = data.draw(hnp.arrays(np.float64, (1, 1, 4, 4), elements=st.floats(-127, 127)))
    values = ((steps - zero_point) * scale).astype(np.float32)
    terms = numbers([scale], [zero_point])
    stored, _ = to_stored(torch.from_numpy(values), terms)
    error = np.abs(to_values(stored, terms).numpy().astype(np.float64) - values)
    assert (error <= scale / 2 + np.spacing(np.abs(values))).all()
    again, num_clamped = to_stored(to_values(stored, terms), terms)
    assert torch.equal(again, stored), "what was stored is stored again as the same"
    assert num_clamped.tolist() == [0]


def test_int8_rounds_ties_to_even_and_clamps_at_127():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, -127.4, -127.6, -1e30])
    stored, num_clamped = to_stored(values[None, None, None], numbers([1.0], [0]))
    assert stored.flatten().tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127, -127, -127]
    assert num_clamped.tolist() == [4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_keeps_values_that_are_not_finite_recognizable(value: float):
    values = torch.zeros(3, 1, 2, 2)
    values[1, 0, 1, 0] = value
    stored, num_clamped = to_stored(values, numbers([0.1], [3]))
    assert torch.equal(is_finite(stored), values.isfinite())
    assert num_clamped.tolist() == [0, 0, 0]


def test_float_dtypes_are_cast_without_quantization():
    values = torch.tensor([1e5, 1.0, float("nan")])[:, None, None, None]
    stored, num_clamped = to_stored(values, LatentContract("mean", "float16", "parquet", "fp32"))
    assert stored.dtype == torch.float16
    assert is_finite(stored).flatten().tolist() == [False, True, False]
    assert num_clamped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("constant", [0.0, 3.7, -1e30, 1e-30, 1e-42])
def test_fit_of_a_constant_channel_does_not_divide_by_zero(constant: float):
    values = torch.randn(4, 2, 8, 8)
    values[:, 1] = constant
    terms = fit_to(values)
    stored, _ = to_stored(values, terms)
    back = to_values(stored, terms)[:, 1]
    assert (back - values[:, 1]).abs().max() <= max(abs(values[0, 1, 0, 0].item()) * 2**-22, 1e-37)


def spread(name: str) -> torch.Tensor:
    """Values [64, 1, 32, 32] of a distribution."""
    torch.manual_seed(0)
    shape = (64, 1, 32, 32)
    return {
        "normal": lambda: torch.randn(shape) * 5 - 2,
        "long tails": lambda: torch.distributions.Laplace(1.0, 0.3).sample(shape),
        "one long tail": lambda: torch.distributions.Exponential(1.0).sample(shape),
        "uniform": lambda: torch.rand(shape),
        "outliers": lambda: torch.randn(shape) + 50 * (torch.rand(shape) < 1e-4),
    }[name]()


@pytest.mark.parametrize(
    ("name", "least_db"),
    # 254 steps across a uniform distribution are 20 log10(254) = 48.1 dB.
    [
        ("normal", 40.3),
        ("long tails", 35.5),
        ("one long tail", 37),
        ("uniform", 48),
        ("outliers", 20),
    ],
)
def test_fit_has_nearly_the_lowest_error_of_all_ranges(name: str, least_db: float):
    values = spread(name)
    found_db = snr_db(values, fit_to(values))
    assert found_db > least_db
    low, high, middle = values.min().item(), values.max().item(), values.median().item()
    for part_low in np.linspace(0.1, 1, 7):
        for part_high in np.linspace(0.1, 1, 7):
            ends = middle + part_low * (low - middle), middle + part_high * (high - middle)
            scale = (ends[1] - ends[0]) / 254
            other = numbers([scale], [round(-sum(ends) / 2 / scale)])
            assert snr_db(values, other) < found_db + 0.05


# The contract.


def int8_contract(**changes: Any) -> Contract:
    contract = make_contract(dtype="int8", buckets=BUCKETS)
    terms = contract.latents
    assert terms.quantization
    quantization = replace(terms.quantization, **changes)
    return replace(contract, latents=replace(terms, quantization=quantization))


OPEN = {"scale": None, "zero_point": None}


def test_scale_and_zero_point_round_trip_exactly(tmp_path: Path):
    contract = int8_contract()
    assert contract.is_resolved
    establish_contract(Store(str(tmp_path)), contract, {})
    back = read_contract(Store(str(tmp_path)))
    assert back == contract
    assert back.fingerprint == contract.fingerprint != int8_contract(**OPEN).fingerprint


def test_resolved_as_copies_open_fields_from_the_other_contract():
    stored, open_ = int8_contract(), int8_contract(**OPEN)
    assert not open_.is_resolved
    assert open_.resolved_as(stored) == stored
    assert stored.resolved_as(int8_contract(scale=(1.0,) * 4)) == stored, "nothing was open"
    auto = replace(open_, latents=replace(open_.latents, precision="auto"))
    assert auto.resolved_as(stored) == stored
    assert not open_.resolved_as(make_contract()).is_resolved


def test_contract_diff_names_calibration_settings_but_not_their_result():
    other = int8_contract(**OPEN, seed=1, num_images=64)
    assert contract_diff(int8_contract(), other.resolved_as(int8_contract())) == [
        "latents.quantization.num_images: dataset has 512, config has 64",
        "latents.quantization.seed: dataset has 0, config has 1",
    ]
    floats = make_contract(buckets=BUCKETS)
    assert contract_diff(int8_contract(), floats) == [
        'latents.dtype: dataset has "int8", config has "float16"'
    ]
    assert contract_diff(floats, other) == [
        'latents.dtype: dataset has "float16", config has "int8"'
    ]


def test_other_quantization_is_another_contract(tmp_path: Path):
    store = Store(str(tmp_path))
    establish_contract(store, int8_contract(), {})
    with pytest.raises(ContractMismatch, match=r"latents\.quantization\.scale: dataset has \["):
        establish_contract(store, int8_contract(scale=(1.0,) * 4), {})


# Reading.


@pytest.fixture(params=["parquet", "safetensors"])
def format(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def write(folder: Path, format: str, posterior: str = "mean") -> str:
    contract = make_contract(dtype="int8", buckets=BUCKETS, format=format, posterior=posterior)
    units = {
        source: {b: make_latents(contract, b, 6, seed=seed + b[1]) for b in BUCKETS}
        for seed, source in enumerate(("a.tar", "b.tar"))
    }
    write_dataset(folder, contract, units)
    return str(folder / "out")


def by_the_document(folder: Path, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Floats:
    """Run what docs/format.md has in Python on a row."""
    (code,) = re.findall(r"^```python\n(.*?)^```", FORMAT.read_text(), re.M | re.S)
    monkeypatch.chdir(folder)
    names = {"row": row}
    exec(compile(code, str(FORMAT), "exec"), names)
    value: Floats = names["value"]
    return value


def stored_rows(url: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Every row with its bytes, as DuckDB and safetensors.numpy find them."""
    result = {}
    for path in Path(url).glob("data/*/*.parquet"):
        query = duckdb.sql(f"SELECT * FROM read_parquet('{path}')")
        rows = [dict(zip(query.columns, values, strict=True)) for values in query.fetchall()]
        if path.name.endswith(".rows.parquet"):
            tensors = path.with_name(path.name.replace(".rows.parquet", ".safetensors"))
            stacked = safetensors.numpy.load_file(tensors)["latents"]
            assert stacked.dtype == np.int8
            rows = [row | {"latent": q.tobytes()} for row, q in zip(rows, stacked, strict=True)]
        else:
            assert pq.read_table(path)["latent"].to_pylist() == [row["latent"] for row in rows]
        assert {row["latent_dtype"] for row in rows} == {"int8"}
        result |= {(path.parent.name, row["key"]): row for row in rows}
    return result


@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_int8_rows_equal_the_values_of_the_documented_formula(
    tmp_path: Path, format: str, posterior: str, monkeypatch: pytest.MonkeyPatch
):
    url = write(tmp_path, format, posterior)
    dataset, rows = open_dataset(url), stored_rows(url)
    assert len(dataset) == len(rows) == 24
    for row in dataset:
        stored = rows[row.unit, row.key]
        assert len(stored["latent"]) == row.latent.numel(), "one byte a value"
        value = by_the_document(Path(url), stored, monkeypatch)
        assert same_bits(row.latent, torch.from_numpy(value))


def test_all_readers_return_equal_int8_values(tmp_path: Path, format: str):
    url = write(tmp_path, format)
    rows = {(row.unit, row.key): row.latent for row in open_dataset(url)}
    loader = LatentLoader(url, batch_size=5, tail="short", columns=["unit", "key"], normalize=False)
    num_rows = 0
    for batch in loader:
        names = zip(batch.columns["unit"], batch.columns["key"], strict=True)
        for name, latent in zip(names, batch.latents, strict=True):
            assert same_bits(latent, rows[name])
            num_rows += 1
        assert torch.equal(loader.denormalize(batch.latents), batch.latents)
    assert num_rows == len(rows)
    for normalize, factor in ((False, 1.0), (True, 0.18215)):
        mapped = LatentDataset(url, columns=["unit", "key"], normalize=normalize)
        for index in range(len(mapped)):
            result = mapped[index]
            expected = factor * rows[result["unit"], result["key"]]
            torch.testing.assert_close(result["latents"], expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loader_dtypes_are_rounded_from_the_dequantized_values(tmp_path: Path, dtype: torch.dtype):
    url = write(tmp_path, "parquet")
    exact = {(row.unit, row.key): 0.18215 * row.latent.double() for row in open_dataset(url)}
    for batch in LatentLoader(url, batch_size=4, dtype=dtype, columns=["unit", "key"]):
        assert batch.latents.dtype == dtype
        names = zip(batch.columns["unit"], batch.columns["key"], strict=True)
        for name, latent in zip(names, batch.latents.double(), strict=True):
            step = max(torch.finfo(dtype).eps, 2**-23)
            assert ((latent - exact[name]).abs() <= step * exact[name].abs()).all()


def test_moments_are_dequantized_before_sampling(tmp_path: Path, format: str):
    """Against the same draws from a dataset that holds the values themselves, as float32."""
    url = write(tmp_path / "int8", format, "moments")
    values: dict[str, dict[tuple[int, int], list[torch.Tensor]]] = {}
    dataset = open_dataset(url)
    sources = {record.unit.id: record.unit.source for record in dataset.units}
    for row in dataset:
        bucket = (8 * row.latent.shape[2], 8 * row.latent.shape[1])
        values.setdefault(sources[row.unit], {}).setdefault(bucket, []).append(row.latent)
    units = {
        source: {bucket: torch.stack(rows) for bucket, rows in result.items()}
        for source, result in values.items()
    }
    contract = make_contract(dtype="float32", buckets=BUCKETS, format=format, posterior="moments")
    write_dataset(tmp_path / "float32", contract, units)
    drawn = [
        [
            batch.latents
            for batch in LatentLoader(str(tmp_path / name / "out"), batch_size=4, shuffle=False)
        ]
        for name in ("int8", "float32")
    ]
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)
    mapped = LatentDataset(url)
    torch.manual_seed(0)
    first = mapped[0]["latents"]
    torch.manual_seed(0)
    assert torch.equal(first, LatentDataset(str(tmp_path / "float32/out"))[0]["latents"])


def test_verify_reports_the_value_minus_128(tmp_path: Path, format: str):
    contract = make_contract(dtype="int8", format=format)
    latents = make_latents(contract, (64, 64), 3)
    write_dataset(tmp_path / "good", contract, {"a.tar": {(64, 64): latents}})
    assert verify(str(tmp_path / "good/out")).ok
    latents[1, 2, 3, 4] = -128
    write_dataset(tmp_path / "bad", contract, {"a.tar": {(64, 64): latents}})
    (problem,) = verify(str(tmp_path / "bad/out")).problems
    assert problem.message == "row 'k0001' is not finite"


def test_quantization_of_the_test_contracts_covers_their_latents():
    """Else the tests above would be about clamped values alone."""
    contract = replace(make_contract(dtype="int8"))
    assert contract.latents.quantization == make_quantization(4)
    stored = make_latents(contract, (64, 64), 50)
    assert (stored.abs() < 127).double().mean() > 0.99
    assert len(stored.unique()) > 150
