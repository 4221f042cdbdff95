"""The order of training: the same for any number of ranks, each row in its turn, well shuffled."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache import open_dataset
from latentcache.errors import ConfigError
from latentcache.loader.order import BatchRows, Order, OrderOptions, Stream
from latentcache.loader.permutation import apportion, make_key, permute
from synthetic import make_contract, write_dataset
from together import WORLD_SIZES, Identity, Step, open_ranks, steps_of

SMALL, WIDE, LARGE = BUCKETS = (8, 8), (16, 8), (32, 16)
TAILS = ("drop", "pad", "short")

MIXES: dict[str, Sequence[Mapping[tuple[int, int], int]]] = {
    "one bucket": [{SMALL: 37}, {SMALL: 64}, {SMALL: 1}, {SMALL: 50}],
    "skewed": [{SMALL: 90, WIDE: 4}, {WIDE: 1}, {SMALL: 30, LARGE: 17}, {LARGE: 2, WIDE: 44}],
    "many files": [{BUCKETS[n % 3]: 1 + n * 7 % 11} for n in range(40)],
}

# A unit's id hashes the contract: it tells datasets apart where they are mixed.
CONTRACTS: dict[str, dict[str, Any]] = {
    "one bucket": {"format": "parquet"},
    "skewed": {"format": "safetensors"},
    "many files": {"format": "parquet", "key_column": "id"},
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mixes")
    for name, units in MIXES.items():
        write_dataset(str(folder / name), make_contract(BUCKETS, **CONTRACTS[name]), units)
    return {name: str(folder / name) for name in MIXES}


def rows_by_bucket(url: str) -> dict[tuple[int, int], list[Identity]]:
    """What another reader finds, in its order."""
    actual: dict[tuple[int, int], list[Identity]] = {}
    for row in open_dataset(url):
        _, height, width = row.latent.shape
        actual.setdefault((8 * width, 8 * height), []).append((row.unit, row.key))
    return actual


def read_epochs(url: Any, world_size: int, num_epochs: int, **options: Any) -> list[list[Step]]:
    ranks = open_ranks(url, world_size, **options)
    epochs = [list(steps_of(ranks)) for _ in range(num_epochs)]
    for steps in epochs:
        assert {len(rank) for rank in ranks} == {len(steps)}
        assert ranks[0].buckets | Counter(step.bucket for step in steps) == ranks[0].buckets
    return epochs


def assert_each_in_its_turn(steps: list[Step], url: str, batch_size: int, tail: str) -> None:
    """Each row once, with `drop` but for those left over, with `pad` and those that fill up."""
    for bucket, expected in rows_by_bucket(url).items():
        batches = [step.rows for step in steps if step.bucket == bucket]
        actual = [identity for rows in batches for identity in rows]
        whole, rest = divmod(len(expected), batch_size)
        sizes = [batch_size] * whole
        if rest and tail != "drop":
            sizes.append(rest if tail == "short" else batch_size)
        assert [len(rows) for rows in batches] == sizes
        counts = Counter(actual)
        assert counts.keys() <= set(expected)
        if tail == "drop":
            assert len(counts) == len(actual)
        else:
            assert counts.keys() == set(expected)
            assert max(counts.values()) == math.ceil(len(actual) / len(expected))
            assert min(counts.values()) == len(actual) // len(expected)


any_options = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**64),
        "shuffle": st.sampled_from([True, True, True, False]),
        "window_rows": st.integers(1, 200),
        "block_rows": st.none() | st.integers(1, 40),
        "tail": st.sampled_from(TAILS),
        "batch_size": st.sampled_from([24, 48]),  # each world size divides them
    }
)


@pytest.mark.slow
@settings(max_examples=12)
@given(st.sampled_from(list(MIXES)), st.sampled_from(WORLD_SIZES[1:]), any_options)
def test_any_number_of_ranks_makes_the_same_batches(
    urls: dict[str, str], mix: str, world_size: int, options: dict[str, Any]
):
    alone = read_epochs(urls[mix], 1, 2, **options)
    assert read_epochs(urls[mix], world_size, 2, **options) == alone
    for steps in alone:
        assert_each_in_its_turn(steps, urls[mix], options["batch_size"], options["tail"])


@pytest.mark.parametrize("tail", TAILS)
def test_every_number_of_ranks_makes_the_same_batches(urls: dict[str, str], tail: str):
    actual = [
        read_epochs(urls["skewed"], world_size, 2, batch_size=24, tail=tail)
        for world_size in WORLD_SIZES
    ]
    assert all(epochs == actual[0] for epochs in actual)
    first, second = actual[0]
    assert [step.rows for step in first] != [step.rows for step in second]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tail", TAILS)
def test_without_shuffling_rows_are_in_file_order_bucket_by_bucket(
    urls: dict[str, str], mix: str, tail: str
):
    batch_size = 24
    expected = []
    for bucket, rows in sorted(rows_by_bucket(urls[mix]).items()):
        if tail == "pad":
            rows = [*rows, *itertools.islice(itertools.cycle(rows), -len(rows) % batch_size)]
        if tail == "drop":
            rows = rows[: len(rows) // batch_size * batch_size]
        for first in range(0, len(rows), batch_size):
            expected.append((bucket, rows[first : first + batch_size]))
    options = {"batch_size": batch_size, "tail": tail, "shuffle": False}
    for steps in read_epochs(urls[mix], 3, 2, **options):
        assert [(step.bucket, step.rows) for step in steps] == expected


def test_epochs_and_seeds_differ_in_order_and_in_dropped_rows(urls: dict[str, str]):
    orders = [
        [step.rows for step in steps]
        for seed in (0, 1, 2)
        for steps in read_epochs(urls["one bucket"], 1, 3, batch_size=60, seed=seed)
    ]
    for one, other in itertools.combinations(orders, 2):
        assert one != other
        # Not the same batches in another order, nor the same rows in other places of a batch.
        assert all(set(left) != set(right) for left in one for right in other)
    seen = [frozenset(identity for rows in order for identity in rows) for order in orders]
    assert len(set(seen)) == len(orders)
    assert {len(rows) for rows in seen} == {120}
    assert len(frozenset.union(*seen)) == 152, "what one epoch leaves out another has"


def digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def keys_of(epochs: Sequence[Sequence[Step]]) -> list[Any]:
    return [[[step.bucket, [key for _, key in step.rows]] for step in steps] for steps in epochs]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "be6e1d3bcdd61a5c"),
        ({"seed": 7, "window_rows": 40, "block_rows": 6, "tail": "short"}, "a671e319775c2b14"),
        ({"seed": 2**63, "tail": "pad"}, "9f9f722fdcd28dca"),
    ],
)
def test_the_order_equals_recorded_values(urls: dict[str, str], options: Any, expected: str):
    """If this fails, every run that is under way loses its place: raise the state's version."""
    epochs = read_epochs(urls["skewed"], 1, 2, batch_size=12, **options)
    assert digest(keys_of(epochs)) == expected


def test_the_order_of_mixed_datasets_equals_recorded_values(urls: dict[str, str]):
    """As above."""
    url = {urls["one bucket"]: 0.3, urls["skewed"]: 0.5, urls["many files"]: 0.2}
    epochs = read_epochs(url, 1, 3, batch_size=12, window_rows=50)
    assert digest(keys_of(epochs)) == "5922df4c3181e971"


def test_the_order_of_many_row_groups_equals_recorded_values():
    """As above, with windows, blocks and sections that small datasets have not."""
    order = Order(many_streams(), OrderOptions(16, seed=3, window_rows=5000))
    actual = [
        [batch.bucket, batch.files.tolist(), batch.rows.tolist()]
        for epoch in (0, 1)
        for batch in order.batches(epoch, 100)
    ]
    assert digest(actual) == "d429127201f1b7b7"


def many_streams() -> list[Stream]:
    """A hundred files of two buckets: 99,000 rows."""
    counts = np.arange(100) * 20
    return [
        Stream(0, SMALL, np.arange(50) * 2, counts[50:], 64),
        Stream(0, WIDE, np.arange(50) * 2 + 1, counts[:50] + 1, 48),
    ]


def test_global_random_generators_are_neither_used_nor_changed(urls: dict[str, str]):
    actual = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        actual.append(read_epochs(urls["skewed"], 2, 2, batch_size=24))
        after = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        assert before == after
    assert actual[0] == actual[1]


# The same on the arithmetic alone, which takes thousands of examples.


@st.composite
def any_order(draw: st.DrawFn) -> tuple[list[Stream], OrderOptions]:
    streams = []
    for bucket in draw(st.lists(st.sampled_from(BUCKETS), min_size=1, unique=True)):
        num_rows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
        files = np.arange(len(num_rows)) * 10 + len(streams)
        streams.append(Stream(0, bucket, files, np.array(num_rows), draw(st.integers(1, 20))))
    options = OrderOptions(
        batch_size=draw(st.integers(1, 24)),
        seed=draw(st.integers(0, 100)),
        window_rows=draw(st.integers(1, 100)),
        block_rows=draw(st.none() | st.integers(1, 30)),
        tail=draw(st.sampled_from(TAILS)),
    )
    return streams, options


def pairs(batch: BatchRows) -> list[tuple[int, int]]:
    return list(zip(batch.files.tolist(), batch.rows.tolist(), strict=True))


@given(any_order(), st.data())
def test_rank_slices_make_the_batch_and_any_step_is_computed_alone(
    made: tuple[list[Stream], OrderOptions], data: st.DataObject
):
    streams, options = made
    order = Order(streams, options)
    epoch = data.draw(st.integers(0, 5), "epoch")
    alone = list(order.batches(epoch))
    assert [batch.step for batch in alone] == list(range(len(order)))

    divisors = [n for n in range(1, options.batch_size + 1) if options.batch_size % n == 0]
    world_size = data.draw(st.sampled_from(divisors), "world_size")
    ranks = [order.batches(epoch, rank=r, world_size=world_size) for r in range(world_size)]
    for whole, slices in zip(alone, zip(*ranks, strict=True), strict=True):
        assert {(part.step, part.bucket) for part in slices} == {(whole.step, whole.bucket)}
        assert [pair for part in slices for pair in pairs(part)] == pairs(whole)

    start = data.draw(st.integers(0, len(order)), "start")
    again = list(Order(streams, options).batches(epoch, start))
    assert [(b.step, b.bucket, pairs(b)) for b in again] == [
        (b.step, b.bucket, pairs(b)) for b in alone[start:]
    ]


@given(any_order(), st.integers(0, 5))
def test_each_row_is_in_an_epoch_as_often_as_the_tail_option_says(
    made: tuple[list[Stream], OrderOptions], epoch: int
):
    streams, options = made
    order = Order(streams, options)
    batches = list(order.batches(epoch))
    for stream in streams:
        all_rows = set(rows_of(stream))
        mine = [pairs(batch) for batch in batches if batch.bucket == stream.bucket]
        counts = Counter(pair for batch in mine for pair in batch)
        whole, rest = divmod(len(all_rows), options.batch_size)
        assert counts.keys() <= all_rows
        if options.tail == "drop":
            assert len(mine) == whole
            assert counts.total() == len(counts) == whole * options.batch_size
            assert order.left_out.get(stream.bucket, 0) == rest
        else:
            assert len(mine) == whole + bool(rest)
            assert len(counts) == len(all_rows)
            assert max(counts.values()) - min(counts.values()) <= (options.tail == "pad")
            assert not order.left_out


def rows_of(stream: Stream) -> Iterator[tuple[int, int]]:
    for file, num_rows in zip(stream.files.tolist(), stream.num_rows.tolist(), strict=True):
        yield from ((file, row) for row in range(num_rows))


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permuting_is_one_to_one(size: int, key: int):
    places = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(places), np.arange(size))


@given(st.integers(10**6, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_permuting_very_many_is_one_to_one(size: int, key: int, data: st.DataObject):
    some = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=200))
    places = permute(np.array(some, np.int64), size, key)
    assert len(set(places.tolist())) == len(some)
    assert all(0 <= position < size for position in places.tolist())
    one_by_one = [int(permute(np.array([index]), size, key)[0]) for index in some[:5]]
    assert one_by_one == places.tolist()[:5]


def excess(counts: np.ndarray[Any, Any], num_free: int) -> float:
    """By how many standard deviations chi-square is above what chance gives."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - num_free) / math.sqrt(2 * num_free))


@pytest.mark.parametrize("size", [2, 5, 8, 17, 64, 100])
def test_permutation_images_are_uniform(size: int):
    places = np.stack([permute(np.arange(size), size, make_key(9, n)) for n in range(4000)])
    counts = np.stack([np.bincount(column, minlength=size) for column in places.T])
    assert excess(counts, (size - 1) ** 2) < 6
    # Two neighbours: each distance within a few hundredths of its share, also where chance
    # cannot be distinguished from the small effect that a few rounds leave.
    distances = np.bincount((places[:, 1:] - places[:, :-1]).ravel() % size)[1:]
    assert distances.std() / distances.mean() < 0.1


def test_every_permutation_of_a_small_size_occurs():
    actual = {tuple(permute(np.arange(5), 5, make_key(1, n)).tolist()) for n in range(4000)}
    assert actual == set(itertools.permutations(range(5)))


@given(st.integers(0, 10**12), st.lists(st.fractions(0, 10**6), min_size=1, max_size=20))
def test_apportioning_is_exact(total: int, shares: list[Fraction]):
    if not any(shares):
        shares[0] = Fraction(1)
    parts = apportion(total, shares)
    assert sum(parts) == total
    for part, share in zip(parts, shares, strict=True):
        assert abs(part - total * share / sum(shares)) < 1
    for (one, its_share), (other, others) in itertools.combinations(
        zip(parts, shares, strict=True), 2
    ):
        assert (one - other) * (its_share > others) >= 0
        assert (other - one) * (others > its_share) >= 0


def test_buckets_keep_their_share_throughout_an_epoch():
    num_batches = {SMALL: 17_000, WIDE: 3_000, LARGE: 451}
    files = np.zeros(1, np.int64)
    streams = [
        Stream(0, bucket, files, np.array([2 * number]), 1024)
        for bucket, number in num_batches.items()
    ]
    order = Order(streams, OrderOptions(2, seed=1))
    assert order.buckets == num_batches
    buckets = [batch.bucket for batch in order.batches(0)]
    num_steps = len(buckets)
    num_sections = num_steps // 4096  # as order.py has it
    ends = [
        sum(number * section // num_sections for number in num_batches.values())
        for section in range(num_sections + 1)
    ]
    for bucket, number in num_batches.items():
        so_far = np.concatenate([[0], np.cumsum([each == bucket for each in buckets])])
        shares = number * np.arange(num_steps + 1) / num_steps
        assert [so_far[end] for end in ends] == [
            number * section // num_sections for section in range(num_sections + 1)
        ]
        # Between the ends, as chance would have it: at most a few standard deviations off.
        deviation = math.sqrt(4096 * number / num_steps * (1 - number / num_steps)) / 2
        assert np.abs(so_far - shares).max() < 5 * deviation
    assert buckets != [batch.bucket for batch in order.batches(1)]


def test_mixed_datasets_have_their_shares_and_use_all_rows_alike(urls: dict[str, str]):
    one, many = urls["one bucket"], urls["many files"]
    rows = {url: rows_by_bucket(url) for url in (one, many)}
    datasets = {unit: url for url in rows for actual in rows[url].values() for unit, _ in actual}
    num_rows = sum(len(actual) for url in rows for actual in rows[url].values())
    for weights, share in [((1, 3), Fraction(1, 4)), ((0.3, 0.1), Fraction(3, 4))]:
        url = dict(zip((one, many), weights, strict=True))
        alone = read_epochs(url, 1, 8, batch_size=24, tail="short", window_rows=64)
        assert read_epochs(url, 4, 2, batch_size=24, tail="short", window_rows=64) == alone[:2]
        for steps in alone:
            units = Counter(datasets[unit] for step in steps for unit, _ in step.rows)
            assert units.total() == num_rows
            assert abs(units[one] - num_rows * share) < 1
        counts = Counter(i for steps in alone for step in steps for i in step.rows)
        for actual in (actual for url in rows for actual in rows[url].values()):
            assert max(counts[i] for i in actual) - min(counts[i] for i in actual) <= 1
        # Rows of a bucket share batches, whichever dataset they are of.
        mixed = [step for step in alone[0] if len({datasets[unit] for unit, _ in step.rows}) == 2]
        assert len(mixed) > len([s for s in alone[0] if s.bucket == SMALL]) / 2


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_order_rejects_invalid_weights(urls: dict[str, str], weight: float):
    with pytest.raises(ConfigError, match=r"weights are .* above 0, and finite"):
        open_ranks({urls["one bucket"]: 1, urls["skewed"]: weight}, batch_size=12)


def mean_positions(epoch: int) -> tuple[np.ndarray[Any, Any], float]:
    """Mean place in the dataset of the rows of each batch, and its deviation if all were shuffled.

    A million rows of 8 KiB in a hundred files.
    """
    num_rows = np.full(100, 10_000)
    order = Order([Stream(0, SMALL, np.arange(100), num_rows, 1024)], OrderOptions(256))
    batches = order.batches(epoch)
    means = [(batch.files * 10_000 + batch.rows).mean() for batch in batches]
    return np.array(means), 10**6 / math.sqrt(12) / math.sqrt(256)


def test_batches_are_nearly_as_mixed_as_in_a_perfect_shuffle():
    for epoch in range(3):
        means, perfect = mean_positions(epoch)
        assert means.std() / perfect <= 2
        # What is above 1 is that of the windows; in one of them batches follow no trend.
        places = np.arange(len(means))
        windows = places * 256 // 262_144
        for window in np.unique(windows):
            means[windows == window] -= means[windows == window].mean()
        assert means.std() / perfect == pytest.approx(1, abs=0.06)
        bound = 4 / math.sqrt(len(means))
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < bound
        assert abs(np.corrcoef(means, places % 1024)[0, 1]) < bound


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_reads_its_own_part_of_a_windows_blocks(world_size: int):
    batch_size, window_rows = 1024, 32_768
    stream = Stream(0, SMALL, np.arange(20), np.full(20, 6_400), 1024)
    options = OrderOptions(batch_size, block_rows=64, window_rows=window_rows)
    order = Order([stream], options)
    num_blocks, num_steps = window_rows // 64, window_rows // batch_size
    for rank in range(world_size):
        batches = list(order.batches(0, rank=rank, world_size=world_size))
        for first in range(0, len(batches) - num_steps + 1, num_steps):
            window = batches[first : first + num_steps]
            blocks = {block for b in window for block in zip(b.files, b.rows // 64, strict=True)}
            # A slice of a batch begins where chance puts it, about the rank's part.
            assert len(blocks) < num_blocks * (1 / world_size + 4 / math.sqrt(batch_size))
            assert len(blocks) >= num_blocks / world_size


@given(any_order())
def test_a_window_reads_few_blocks(made: tuple[list[Stream], OrderOptions]):
    """As few as hold its rows, where all blocks are whole: reading then stays near them."""
    streams, options = made
    stream = streams[0]
    block_rows = options.block_rows or stream.group_rows
    whole = Stream(0, SMALL, stream.files, stream.num_rows * block_rows, stream.group_rows)
    options = OrderOptions(
        1, seed=options.seed, window_rows=options.window_rows, block_rows=options.block_rows
    )
    rows = [pairs(batch)[0] for batch in itertools.islice(Order([whole], options).batches(0), 200)]
    for first in range(0, len(rows), options.window_rows):
        window = rows[first : first + options.window_rows]
        blocks = {(file, row // block_rows) for file, row in window}
        most = math.ceil(options.window_rows / block_rows) + 1
        assert len(blocks) <= most


TWO_BILLION = """
from pathlib import Path
import numpy as np
from latentcache.loader.order import Order, OrderOptions, Stream

num_rows = np.full(200_000, 8_000)
streams = [
    Stream(0, (256, 256), np.arange(200_000), num_rows, 1024),
    Stream(0, (256, 192), np.arange(200_000), num_rows // 4, 1024),
]
order = Order(streams, OrderOptions(256))
first = next(order.batches(0))
middle = next(order.batches(3, len(order) // 2, rank=1, world_size=2))
assert len(first.files) == 256 and len(middle.files) == 128
assert (first.step, middle.step) == (0, len(order) // 2)
# Not getrusage: it counts the most that the process before exec held, which is pytest.
(line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s]
print(len(order), int(line.split()[1]) * 1024)
"""


def test_two_billion_rows_are_ordered_in_little_memory():
    command = [sys.executable, "-c", TWO_BILLION]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    num_steps, most_bytes = (int(word) for word in process.stdout.split())
    assert num_steps == 2 * 10**9 // 256
    assert most_bytes < 2**30
