"""What is said to hold a run up: it follows from busy seconds and threads, live and afterwards."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentcache.bottleneck import STAGES, PipelineLoad
from latentcache.engine.progress import _bottleneck

THREADS = {"fetch": 2, "decode": 4, "encode": 1, "write": 2, "qa": 1, "upload": 2}


def loads_of(**busy_s: float) -> PipelineLoad:
    loads = PipelineLoad()
    for stage, seconds in busy_s.items():
        loads.add(stage, seconds, 0.0, THREADS[stage])
    return loads


@pytest.mark.parametrize(
    ("busy_s", "prefix"),
    [
        ({"fetch": 1, "decode": 20, "encode": 6}, "bottleneck: encoder (expected)"),
        (
            {"fetch": 1, "decode": 28, "encode": 4},
            "bottleneck: decoding; add 3 threads to each actor",
        ),
        (
            {"decode": 17, "encode": 4, "write": 2},
            "bottleneck: decoding; add 1 thread to each actor",
        ),
        ({"fetch": 20, "decode": 8, "encode": 4}, "bottleneck: reading the source"),
        ({"decode": 20, "encode": 4, "qa": 2}, "bottleneck: encoder"),  # one thread for both
        ({"decode": 20, "encode": 2, "qa": 4}, "bottleneck: QA; lower qa.fraction"),
        ({"encode": 4, "upload": 9}, "bottleneck: writing to the output"),
        ({"encode": 4, "write": 9}, "bottleneck: writing to the local disk"),
        ({"decode": 4.0}, "bottleneck: decoding; add 1 thread"),
    ],
)
def test_bottleneck_is_the_stage_that_takes_longest_with_its_threads(
    busy_s: dict[str, float], prefix: str
):
    assert str(loads_of(**busy_s).bottleneck).startswith(prefix)


def test_no_work_has_no_bottleneck():
    assert PipelineLoad().bottleneck is None
    assert loads_of(decode=0.0, encode=0.0).bottleneck is None


def test_a_run_whose_stages_worked_less_than_ten_seconds_gets_no_advice():
    assert loads_of(encode=4.0, write=5.9).bottleneck_text is None
    text = loads_of(encode=4.0, write=6.0).bottleneck_text
    assert text is not None
    assert text.startswith("bottleneck: encoder")
    assert PipelineLoad().bottleneck_text is None


@given(st.floats(0.1, 1e4), st.floats(0.1, 1e4), st.floats(0.1, 1e4))
def test_with_the_suggested_threads_decoding_is_not_the_slowest_stage(
    decode_s: float, encode_s: float, fetch_s: float
):
    actual = loads_of(decode=decode_s, encode=encode_s, fetch=fetch_s).bottleneck
    assert actual
    if actual.stage == "decode":
        others_s = max(encode_s, fetch_s / 2)
        assert decode_s / actual.num_threads_needed <= others_s
        assert decode_s / (actual.num_threads_needed - 1) > others_s
        short = actual.num_threads_needed - 4
        assert f"add {short} thread" in str(actual)
        assert f"compute.decode_threads: {math.ceil(decode_s / others_s)}" in str(actual)


def test_receipts_of_actors_with_different_threads_add_up():
    loads = PipelineLoad()
    for num_threads, busy_s in ((4, 40.0), (8, 80.0)):  # ten seconds each
        loads.add_receipt(
            {
                "decode": {"busy_s": busy_s, "wait_s": 1.0, "num_threads": num_threads},
                "encode": {"busy_s": 5.0, "wait_s": 0.0, "num_threads": 1},
            }
        )
    loads.add_receipt(None)  # of a receipt that says nothing
    assert loads.stages["decode"].alone_s == 20.0
    assert loads.stages["decode"].wait_s == 2.0
    assert "add 6 threads to each actor (compute.decode_threads: 12)" in str(loads.bottleneck)


def stats(**busy_s: float) -> dict[str, float]:
    actual = {f"{stage}_num_threads": float(THREADS[stage]) for stage in STAGES}
    return actual | {f"{stage}_busy_s": busy_s.get(stage, 0.0) for stage in STAGES}


def test_live_bottleneck_counts_only_work_between_two_polls():
    before = [stats(decode=1000.0), stats(encode=3.0)]
    after = [stats(decode=1004.0, encode=8.0), stats(encode=12.0)]
    assert _bottleneck(before, after, 10.0) == "bottleneck: encoder (expected)"
    after = [stats(decode=1040.0, encode=5.0), stats(encode=8.0, decode=30.0)]
    assert _bottleneck(before, after, 10.0).startswith("bottleneck: decoding; add 3 threads")


def test_idle_actors_have_no_bottleneck():
    assert _bottleneck([stats()], [stats(encode=1.0)], 10.0) == ""
    assert _bottleneck([stats()], [stats()], 10.0) == ""
