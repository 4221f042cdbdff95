"""Statistics that merge: any split, in any order, against numpy over everything at once."""

from __future__ import annotations

import json
from functools import reduce
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from latentcache.dataset.statistics import HISTOGRAM_EDGES, Statistics

finite = st.floats(-1e4, 1e4, width=32)
edges = st.sampled_from([float(edge) for edge in HISTOGRAM_EDGES])
latents = st.integers(1, 12).flatmap(
    lambda n: hnp.arrays(np.float32, (n, 3, 2, 2), elements=st.one_of(finite, edges))
)


def assert_describes(stats: Statistics, values: npt.NDArray[np.float32]) -> None:
    channels = values.transpose(1, 0, 2, 3).reshape(values.shape[1], -1).astype(np.float64)
    scale = np.abs(channels).max() + 1.0
    assert stats.count == channels.shape[1]
    np.testing.assert_allclose(stats.mean, channels.mean(axis=1), rtol=1e-12, atol=1e-12 * scale)
    variance = channels.var(axis=1)
    np.testing.assert_allclose(
        stats.m2, variance * stats.count, rtol=1e-9, atol=1e-11 * scale**2 * stats.count
    )
    np.testing.assert_allclose(stats.std, np.sqrt(variance), rtol=1e-6, atol=1e-5 * scale)
    np.testing.assert_array_equal(stats.minimum, channels.min(axis=1))
    np.testing.assert_array_equal(stats.maximum, channels.max(axis=1))
    inner = [-np.inf, *HISTOGRAM_EDGES, np.inf]
    for counts, channel in zip(stats.histogram, channels, strict=True):
        expected = [
            np.count_nonzero((low <= channel) & (channel < high)) for low, high in pairwise(inner)
        ]
        assert counts.tolist() == expected


def assert_equal(one: Statistics, other: Statistics) -> None:
    assert one.count == other.count
    for name in ("mean", "m2", "minimum", "maximum", "histogram"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@given(latents)
def test_statistics_of_a_batch_equal_numpy(values: npt.NDArray[np.float32]):
    assert_describes(Statistics.of(values), values)


@given(latents, st.data())
def test_merged_statistics_equal_numpy_for_any_split_and_order(
    values: npt.NDArray[np.float32], data: st.DataObject
):
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=4).map(sorted))
    parts = [
        Statistics.of(part) if len(part) else Statistics.empty(3) for part in np.split(values, cuts)
    ]
    shuffled = data.draw(st.permutations(parts))
    assert_describes(reduce(Statistics.merge, shuffled, Statistics.empty(3)), values)
    # And as a tree: pairs first, then the pairs.
    while len(shuffled) > 1:
        pairs = [shuffled[i : i + 2] for i in range(0, len(shuffled), 2)]
        shuffled = [pair[0].merge(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
    assert_describes(shuffled[0], values)


@given(latents)
def test_statistics_round_trip_exactly_through_json(values: npt.NDArray[np.float32]):
    stats = Statistics.of(values)
    text = json.dumps(stats.to_json(), allow_nan=False)
    assert_equal(Statistics.from_json(json.loads(text)), stats)


def test_empty_statistics_merge_and_round_trip():
    empty = Statistics.empty(2).merge(Statistics.empty(2))
    assert empty.count == 0
    np.testing.assert_array_equal(empty.std, [0.0, 0.0])
    text = json.dumps(empty.to_json(), allow_nan=False)
    assert_equal(Statistics.from_json(json.loads(text)), empty)
    some = Statistics.of(np.ones((1, 2, 1, 1), np.float32))
    assert_equal(empty.merge(some), some)
    assert_equal(some.merge(empty), some)


def test_merging_keeps_a_small_deviation_around_a_large_mean():
    rng = np.random.default_rng(0)
    values = (1000.0 + 1e-2 * rng.standard_normal((512, 1, 4, 4))).astype(np.float32)
    merged = reduce(Statistics.merge, (Statistics.of(values[i : i + 1]) for i in range(512)))
    assert merged.std[0] == pytest.approx(values.astype(np.float64).std(), rel=1e-9)
