"""How many CPUs an actor asks for, so that all actors fit: arithmetic over the nodes' shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentcache.errors import ClusterError

# What `decode_threads: auto` asks for at most.
_MAX_CPUS = 16


@dataclass(frozen=True, slots=True)
class NodeShape:
    """What a node has."""

    num_cpus: int
    num_gpus: int

    def num_places(self, num_cpus: int, *, with_gpu: bool) -> int:
        """Count the actors that it holds if each asks for so many CPUs, or a GPU too."""
        on_cpus = self.num_cpus // num_cpus
        return min(on_cpus, self.num_gpus) if with_gpu else on_cpus


def cpus_per_actor(
    shapes: Sequence[NodeShape], num_actors: int, *, with_gpu: bool, decode_threads: int | None
) -> int:
    """Give the number of CPUs that each actor asks for.

    An actor that no node can hold would pend without a word, so that is refused; and one that asks
    for more than its share of a node would keep others off it. Hence the most CPUs, 16 at most,
    with which as many actors have room as with one CPU each.

    Args:
        shapes: of the nodes that there are.
        num_actors: how many are wanted; fewer may have room by now.
        with_gpu: whether each has a GPU; then nodes without one do not count.
        decode_threads: what the config says; None leaves it to this function.

    Raises:
        ClusterError: no node can hold an actor.
    """

    def num_places(num_cpus: int) -> int:
        return sum(shape.num_places(num_cpus, with_gpu=with_gpu) for shape in shapes)

    kind = "node with a GPU" if with_gpu else "node"
    if not num_places(1):
        raise ClusterError(f"no {kind} of the Ray cluster has a CPU for an actor to decode on")
    if decode_threads is None:
        wanted = min(num_actors, num_places(1))
        return max(n for n in range(1, _MAX_CPUS + 1) if num_places(n) >= wanted)
    if not num_places(decode_threads):
        largest = max(s.num_cpus for s in shapes if s.num_gpus or not with_gpu)
        raise ClusterError(
            f"compute.decode_threads is {decode_threads}, but the largest {kind} has {largest} "
            "CPUs; lower it, or leave it at auto"
        )
    return decode_threads
