"""How many CPUs an actor asks for, compared with a count of what fits by trying it out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentcache.engine.nodes import NodeShape, cpus_per_actor
from latentcache.errors import ClusterError

NODES = st.lists(st.builds(NodeShape, st.integers(0, 70), st.integers(0, 8)), max_size=8)


def num_that_fit(shapes: list[NodeShape], num_cpus: int, with_gpu: bool) -> int:
    """Put actors on nodes one by one, as a scheduler does."""
    nodes = [[s.num_cpus, s.num_gpus] for s in shapes]
    placed = 0
    for node in nodes:
        while node[0] >= num_cpus and (node[1] >= 1 or not with_gpu):
            node[0] -= num_cpus
            node[1] -= with_gpu
            placed += 1
    return placed


@given(NODES, st.integers(1, 40), st.booleans())
def test_auto_takes_the_most_cpus_with_which_all_actors_fit(
    shapes: list[NodeShape], num_actors: int, with_gpu: bool
):
    most = num_that_fit(shapes, 1, with_gpu)
    if not most:
        with pytest.raises(ClusterError, match="of the Ray cluster has a CPU, which"):
            cpus_per_actor(shapes, num_actors, with_gpu=with_gpu, decode_threads=None)
        return
    actual = cpus_per_actor(shapes, num_actors, with_gpu=with_gpu, decode_threads=None)
    assert 1 <= actual <= 16
    assert num_that_fit(shapes, actual, with_gpu) >= min(num_actors, most)
    if actual < 16:
        assert num_that_fit(shapes, actual + 1, with_gpu) < min(num_actors, most)


@pytest.mark.parametrize(
    ("shapes", "num_actors", "with_gpu", "expected"),
    [
        ([NodeShape(8, 0)], 2, False, 4),
        ([NodeShape(2, 0)] * 3, 3, False, 2),
        ([NodeShape(64, 8)], 8, True, 8),
        ([NodeShape(16, 1)], 1, True, 16),
        # The CPUs of a driver's node without GPUs serve no actor.
        ([NodeShape(96, 0), NodeShape(8, 1)], 1, True, 8),
        # More wanted than there are: those that fit get their share.
        ([NodeShape(32, 4)], 8, True, 8),
        # The first of those that an autoscaler adds.
        ([NodeShape(0, 0), NodeShape(12, 1)], 40, True, 12),
    ],
)
def test_auto_cpus_of_typical_clusters(
    shapes: list[NodeShape], num_actors: int, with_gpu: bool, expected: int
):
    actual = cpus_per_actor(shapes, num_actors, with_gpu=with_gpu, decode_threads=None)
    assert actual == expected


def test_decode_threads_that_fit_on_no_node_are_refused():
    shapes = [NodeShape(96, 0), NodeShape(8, 1)]
    assert cpus_per_actor(shapes, 1, with_gpu=True, decode_threads=8) == 8
    with pytest.raises(ClusterError, match=r"decode_threads is 9, .* node with a GPU has 8 CPUs"):
        cpus_per_actor(shapes, 1, with_gpu=True, decode_threads=9)
