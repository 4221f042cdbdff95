"""Stopping and going on, at any step, at any number of ranks, with the same posterior draws."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import makers
from latentcache import LatentLoader, open_dataset
from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import read_contract
from latentcache.dataset.receipts import Unit
from latentcache.dataset.state import State, write_next
from latentcache.errors import ConfigError
from latentcache.loader.latents import normal
from latentcache.storage import Store
from synthetic import make_contract, write_dataset
from together import WORLD_SIZES, Step, open_ranks, steps_of

SMALL, WIDE = BUCKETS = (8, 8), (32, 16)
UNITS: Sequence[Mapping[tuple[int, int], int]] = [
    {SMALL: 70, WIDE: 20},
    {SMALL: 3},
    {WIDE: 38, SMALL: 80},
    {SMALL: 1, WIDE: 2},
]

Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """154 rows of one bucket and 60 of another, with moments."""
    url = str(tmp_path_factory.mktemp("moments") / "data")
    write_dataset(url, make_contract(BUCKETS, posterior="moments", dtype="float32"), UNITS)
    return url


@pytest.fixture(scope="module")
def noise_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As many rows, of mean 0 and variance 1: what is drawn is the noise itself."""
    url = str(tmp_path_factory.mktemp("noise") / "data")
    contract = make_contract(BUCKETS, posterior="moments", dtype="float32")

    def zeros(number: int, bucket: tuple[int, int], num_rows: int) -> torch.Tensor:
        return torch.zeros(num_rows, *contract.latent_shape(bucket))

    write_dataset(url, contract, UNITS, latents=zeros)
    return url


# Each world size divides the batch.
OPTIONS: dict[str, Any] = {"batch_size": 24, "seed": 4, "window_rows": 50, "block_rows": 4}


def run(ranks: Sequence[LatentLoader], num_steps: int) -> tuple[list[Step], dict[str, Any]]:
    """Train for some steps, epoch after epoch, and save the state inside the loop."""
    done: list[Step] = []
    while len(done) < num_steps:
        for step in steps_of(ranks):
            done.append(step)
            if len(done) == num_steps:
                break
    return done, state_of(ranks)


def state_of(ranks: Sequence[LatentLoader]) -> dict[str, Any]:
    """The state, as a checkpoint would keep it; the same on all ranks."""
    texts = {json.dumps(rank.state_dict()) for rank in ranks}
    (text,) = texts
    state: dict[str, Any] = json.loads(text)
    return state


def resume(
    url: Any, world_size: int, state: Mapping[str, Any], **options: Any
) -> list[LatentLoader]:
    ranks = open_ranks(url, world_size, **options)
    for rank in ranks:
        rank.load_state_dict(state)
    return ranks


@pytest.mark.parametrize("tail", ["drop", "pad", "short"])
def test_any_step_of_an_epoch_is_resumed(url: str, tail: str):
    options = OPTIONS | {"tail": tail}
    ranks = open_ranks(url, **options)
    num_steps = len(ranks[0])
    expected, _ = run(open_ranks(url, **options), 2 * num_steps)
    states = [state_of(ranks)]
    for _ in steps_of(ranks):
        states.append(state_of(ranks))
    assert num_steps >= len(WORLD_SIZES)
    assert len(states) == num_steps + 1
    for done, state in enumerate(states):
        world_size = WORLD_SIZES[done % len(WORLD_SIZES)]
        again = resume(url, world_size, state, **options)
        assert state_of(again) == state
        rest = list(steps_of(again))
        if done == num_steps:  # the epoch was over
            assert rest == expected[num_steps:]
        else:
            assert rest == expected[done:num_steps]
            assert next(steps_of(again)) == expected[num_steps]


@pytest.mark.slow
@settings(max_examples=15)
@given(st.data())
def test_a_run_of_many_resumes_is_one_run(url: str, data: st.DataObject):
    tail = data.draw(st.sampled_from(["drop", "pad", "short"]), "tail")
    options = OPTIONS | {"tail": tail}
    num_steps = 3 * len(open_ranks(url, **options)[0])
    expected, end = run(open_ranks(url, **options), num_steps)

    points = st.lists(st.integers(0, num_steps), min_size=3, max_size=5).map(sorted)
    stops = [*data.draw(points, "stops"), num_steps]
    world_sizes = data.draw(
        st.permutations(WORLD_SIZES).map(lambda sizes: sizes[: len(stops)]), "world_sizes"
    )
    done: list[Step] = []
    state = state_of(open_ranks(url, **options))
    for stop, world_size in zip(stops, world_sizes, strict=True):
        steps, state = run(resume(url, world_size, state, **options), stop - len(done))
        done += steps
    assert done == expected
    assert state == end


def test_a_mixture_of_datasets_is_resumed(url: str, noise_url: str):
    options = OPTIONS | {"tail": "short"}
    mixed = {url: 3.0, noise_url: 0.5}
    num_steps = len(open_ranks(mixed, **options)[0])
    expected, _ = run(open_ranks(mixed, **options), 3 * num_steps)
    done, state = run(open_ranks(mixed, 4, **options), 5)
    for world_size, stop in [(1, num_steps - 1), (6, num_steps), (2, 2 * num_steps + 3)]:
        steps, state = run(resume(mixed, world_size, state, **options), stop - len(done))
        done += steps
    done += run(resume(mixed, 3, state, **options), 3 * num_steps - len(done))[0]
    assert done == expected


def test_state_consists_of_a_few_json_values(url: str):
    (loader,) = open_ranks(url, **OPTIONS)
    begin = loader.state_dict()
    assert (begin["epoch"], begin["step"], loader.epoch) == (0, 0, 0)
    for batch in loader:
        state = loader.state_dict()
        assert json.loads(json.dumps(state)) == state
        assert all(isinstance(value, str | int | bool | None) for value in state.values())
        assert len(json.dumps(state)) < 400
        assert state.keys() == begin.keys()
        is_last = batch.step == len(loader) - 1
        assert (state["epoch"], state["step"]) == ((1, 0) if is_last else (0, batch.step + 1))
        assert loader.epoch == state["epoch"]


def test_an_interrupted_epoch_continues_only_after_load_state_dict(url: str):
    expected, _ = run(open_ranks(url, **OPTIONS), 4 * len(open_ranks(url, **OPTIONS)[0]))
    ranks = open_ranks(url, **OPTIONS)
    num_steps = len(ranks[0])
    epochs = [expected[first : first + num_steps] for first in range(0, 4 * num_steps, num_steps)]

    assert list(itertools.islice(steps_of(ranks), 2)) == epochs[0][:2]
    state = state_of(ranks)
    assert next(steps_of(ranks)) == epochs[1][0]
    assert list(steps_of(ranks)) == epochs[2]
    assert list(steps_of(ranks)) == epochs[3]

    for rank in ranks:  # back again, in the same loader
        rank.load_state_dict(state)
    assert state_of(ranks) == state
    assert list(steps_of(ranks)) == epochs[0][2:]
    assert list(steps_of(ranks)) == epochs[1]


def test_an_unused_iterator_does_not_change_the_state(url: str):
    ranks = open_ranks(url, **OPTIONS)
    _, state = run(ranks, 3)
    rest = list(steps_of(resume(url, 1, state, **OPTIONS)))
    (loader,) = resume(url, 1, state, **OPTIONS)
    unused = [iter(loader), iter(loader)]
    assert loader.state_dict() == state
    assert list(steps_of([loader])) == rest
    assert next(unused[0]).step == 3


def test_options_that_do_not_change_the_order_may_differ_on_resume(url: str):
    (loader,) = open_ranks(url, **OPTIONS)
    _, state = run([loader], 3)
    rest = [[key for _, key in step.rows] for step in steps_of(resume(url, 1, state, **OPTIONS))]
    other = LatentLoader(
        url,
        **OPTIONS,
        columns=["key", "caption"],
        dtype=torch.float16,
        normalize=False,
        prefetch_bytes=0,
    )
    other.load_state_dict(state)
    assert [batch.columns["key"] for batch in other] == rest


def add_unit(url: str, folder: Path) -> None:
    """Write another unit and the next manifest."""
    store = Store(url)
    contract = read_contract(store)
    assert contract
    latents = makers.make_latents(contract, SMALL, 12)
    makers.commit_unit(store, contract, folder, "made/more.tar", {SMALL: latents})
    unit = Unit.of("made/more.tar", 1000, "v1", contract.fingerprint)
    write_next(
        State(store),
        contract.fingerprint,
        contract.stored_channels,
        lambda: {unit.source: [unit]},
        on_missing="keep",
        columns=columns_of(["txt"]),
    )


def assert_refused(loader: LatentLoader, state: Any, message: str) -> None:
    before = loader.state_dict()
    with pytest.raises(ConfigError, match=message) as caught:
        loader.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert loader.state_dict() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 5),
        ("batch_size", 12),
        ("tail", "short"),
        ("window_rows", 51),
        ("block_rows", None),
        ("shuffle", False),
    ],
)
def test_a_state_of_another_order_is_rejected_with_the_field(url: str, field: str, value: Any):
    _, state = run(open_ranks(url, **OPTIONS), 3)
    (loader,) = open_ranks(url, **OPTIONS | {field: value})
    assert_refused(loader, state, f"the state has {field} .* this loader has {field} {value}")


def test_a_state_of_other_rows_is_rejected(url: str, tmp_path: Path):
    contract = make_contract(BUCKETS, posterior="moments", dtype="float32")
    other = str(tmp_path / "other")
    write_dataset(other, contract, UNITS)
    _, state = run(open_ranks(url, **OPTIONS), 3)
    (loader,) = open_ranks(other, **OPTIONS)
    assert_refused(loader, state, f"the state has dataset {state['dataset']}, this .* cannot")

    _, state = run(open_ranks(other, **OPTIONS), 3)
    add_unit(other, tmp_path / "staging")
    (newer,) = open_ranks(other, **OPTIONS)
    assert newer.num_rows == loader.num_rows + 12
    assert_refused(newer, state, "the state has manifest 1, this loader has manifest 2: set")
    (as_before,) = open_ranks(other, manifest=1, **OPTIONS)
    as_before.load_state_dict(state)
    assert next(iter(as_before)).step == 3


def test_a_state_of_another_mixture_is_rejected(url: str, noise_url: str):
    (mixed,) = open_ranks({url: 1, noise_url: 2}, **OPTIONS)
    (alone,) = open_ranks(url, **OPTIONS)
    for other, field in [
        ({url: 1, noise_url: 3}, "weights"),
        ({noise_url: 1, url: 2}, "dataset"),
        ({url: 1}, "manifest"),
    ]:
        (loader,) = open_ranks(other, **OPTIONS)
        assert_refused(loader, mixed.state_dict(), f"the state has {field} ")
    assert_refused(mixed, alone.state_dict(), "the state has manifest ")


def test_load_state_dict_rejects_values_that_are_not_states(url: str):
    (loader,) = open_ranks(url, **OPTIONS)
    state = loader.state_dict()
    assert_refused(loader, {}, "not a state of a LatentLoader")
    assert_refused(loader, torch.nn.Linear(2, 2).state_dict(), "not a state of a LatentLoader")
    for name in state:
        without = {key: value for key, value in state.items() if key != name}
        assert_refused(loader, without, "not a state of a LatentLoader: it has no .*" + name)
    for name in ("epoch", "step"):
        for value in (None, "1", 1.0):
            assert_refused(loader, state | {name: value}, "not a state of a LatentLoader")
    for name, value in [("step", len(loader)), ("step", 10**9), ("step", -1), ("epoch", -1)]:
        assert_refused(loader, state | {name: value}, f"{name} {value}.* have {len(loader)} steps")
    loader.load_state_dict(state | {"epoch": 10**6, "step": len(loader) - 1})
    (batch,) = loader
    assert (batch.epoch, batch.step) == (10**6, len(loader) - 1)


# Draws from the posterior.


def epochs_in_order(url: str, num_epochs: int, **options: Any) -> Floats:
    """What each epoch draws for the rows of one bucket, in their order: [epochs, rows, numbers]."""
    options = {"batch_size": 30, "tail": "short", "shuffle": False, **options}
    (loader,) = open_ranks(url, **{"normalize": False, **options})
    epochs = []
    for _ in range(num_epochs):
        latents = [batch.latents for batch in loader if batch.bucket == WIDE]
        epochs.append(torch.cat(latents).flatten(1).double().numpy())
    return np.stack(epochs)


def moments_of(url: str) -> tuple[Floats, Floats]:
    """What is stored of the rows of one bucket, in their order: mean and variance."""
    rows = [row.latent.double().numpy() for row in open_dataset(url)]
    latents = np.stack([row for row in rows if row.shape[1:] == (2, 4)])
    mean, logvar = latents.reshape(len(latents), 2, -1).swapaxes(0, 1)
    return mean, np.exp(logvar)


def test_draws_are_mean_plus_deviation_times_noise(url: str, noise_url: str):
    noise, drawn = epochs_in_order(noise_url, 2), epochs_in_order(url, 2)
    mean, variance = moments_of(url)
    np.testing.assert_allclose(drawn, mean + np.sqrt(variance) * noise, rtol=1e-5, atol=1e-5)
    normalized = epochs_in_order(url, 2, normalize=True)
    np.testing.assert_allclose(normalized, drawn * 0.18215, rtol=1e-6)


def test_draws_have_the_mean_and_the_variance_that_are_stored(url: str):
    num_epochs = 150
    drawn = epochs_in_order(url, num_epochs)
    mean, variance = moments_of(url)
    off = (drawn.mean(axis=0) - mean) / np.sqrt(variance / num_epochs)
    assert np.abs(off).max() < 5
    assert off.std() == pytest.approx(1, abs=0.1)
    ratio = drawn.var(axis=0, ddof=1) / variance
    assert np.abs(ratio - 1).max() < 6 * math.sqrt(2 / num_epochs)
    assert ratio.mean() == pytest.approx(1, abs=0.02)


def correlations(values: Floats) -> Floats:
    """Between the rows of [n, numbers], in units of what chance gives."""
    actual = np.corrcoef(values) * math.sqrt(values.shape[1])
    return np.abs(actual[np.triu_indices(len(actual), 1)])


def test_noise_of_rows_epochs_and_numbers_is_independent(noise_url: str):
    noise = epochs_in_order(noise_url, 60)
    num_epochs, num_rows, num_numbers = noise.shape
    assert (num_rows, num_numbers) == (60, 32)
    assert len(np.unique(noise)) > 0.99 * noise.size
    by_row = noise.swapaxes(0, 1).reshape(num_rows, -1)
    by_epoch = noise.reshape(num_epochs, -1)
    by_number = noise.reshape(-1, num_numbers).T
    for values in (by_row, by_epoch, by_number):
        # Squares as well: a pair of numbers comes of one angle and one radius.
        for each in (values, values**2):
            assert correlations(each).max() < 5


def test_a_row_repeated_in_an_epoch_gets_new_noise(url: str, noise_url: str):
    mixed = {noise_url: 9, url: 1}
    (loader,) = open_ranks(mixed, batch_size=12, tail="short", normalize=False)
    rows: dict[Any, list[bytes]] = {}
    for _ in range(2):
        for step in steps_of([loader]):
            for (unit, key), latent in zip(step.rows, step.latents, strict=True):
                rows.setdefault((step.bucket, unit, key), []).append(latent)
    assert max(len(draws) for draws in rows.values()) > 3
    assert all(len(set(draws)) == len(draws) for draws in rows.values())


def test_the_noise_equals_recorded_values(noise_url: str):
    """If this fails, runs that are under way get other draws: raise the state's version."""
    noise = epochs_in_order(noise_url, 2)
    first_row = [[0.631213, -0.702223, 0.126773], [0.215643, -0.425103, -1.113959]]
    np.testing.assert_allclose(noise[:, 0, :3], first_row, atol=1e-5)
    np.testing.assert_allclose(noise[:, -1, -1], [-0.248299, 0.439273], atol=1e-5)
    seeded = epochs_in_order(noise_url, 1, seed=2**40)
    np.testing.assert_allclose(seeded[0, 0, :3], [0.46189, 1.244207, -1.768708], atol=1e-5)


@pytest.mark.parametrize(
    "make_keys",
    [
        lambda: torch.arange(2000),
        lambda: torch.arange(-1000, 1000) << 40,
        lambda: torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1]),
    ],
)
def test_noise_is_standard_normal(make_keys: Callable[[], torch.Tensor]):
    keys = make_keys()
    values = normal(keys, 1_000_000 // len(keys)).double()
    assert values.isfinite().all()
    num = values.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        mean = (values**power).mean().item()
        assert mean == pytest.approx(moment, abs=5 * math.sqrt(variance / num)), power
    expected = torch.special.ndtr(values.flatten().sort().values)
    gap = (expected - torch.linspace(0, 1, num, dtype=torch.float64)).abs().max()
    assert gap < 2 / math.sqrt(num), "Kolmogorov and Smirnov: one in a thousand is above"
    assert values.abs().max() > 4.5


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 4097])
def test_normal_returns_count_numbers(count: int):
    keys = torch.arange(10)
    values = normal(keys, count)
    assert values.shape == (10, count)
    assert values.dtype == torch.float32
    assert len(values.unique()) > 9.9 * count
    for key, row in zip(keys, values, strict=True):
        assert torch.equal(normal(key[None], count)[0], row), (
            "independent of the other keys of the batch"
        )
