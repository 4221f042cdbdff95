"""The number of CPUs of an actor, computed from the nodes so that all actors fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentcache.errors import ClusterError

# The most CPUs that `decode_threads: auto` requests.
_MAX_CPUS = 16


@dataclass(frozen=True, slots=True)
class NodeShape:
    """The resources of a node."""

    num_cpus: int
    num_gpus: int

    def num_places(self, num_cpus: int, *, with_gpu: bool) -> int:
        """Return the number of actors that fit on the node.

        Args:
            num_cpus: CPUs of each actor.
            with_gpu: whether each actor also has a GPU.
        """
        on_cpus = self.num_cpus // num_cpus
        return min(on_cpus, self.num_gpus) if with_gpu else on_cpus


def cpus_per_actor(
    shapes: Sequence[NodeShape], num_actors: int, *, with_gpu: bool, decode_threads: int | None
) -> int:
    """Return the number of CPUs that each actor requests.

    By default this is the largest number, up to 16, with which as many actors fit as with one CPU
    each: an actor that requests more than its share of a node keeps others off that node. An actor
    that fits on no node would stay pending silently, so that is an error.

    Args:
        shapes: the present nodes.
        num_actors: the number of requested actors, of which fewer may fit at present.
        with_gpu: whether each actor has a GPU; nodes without a GPU then do not count.
        decode_threads: the value of the config; None computes the default.

    Raises:
        ClusterError: an actor fits on no node.
    """

    def num_places(num_cpus: int) -> int:
        return sum(shape.num_places(num_cpus, with_gpu=with_gpu) for shape in shapes)

    kind = "node with a GPU" if with_gpu else "node"
    if not num_places(1):
        raise ClusterError(
            f"no {kind} of the Ray cluster has a CPU, which an actor needs to decode: add CPUs"
        )
    if decode_threads is None:
        num_fitting = min(num_actors, num_places(1))
        return max(n for n in range(1, _MAX_CPUS + 1) if num_places(n) >= num_fitting)
    if not num_places(decode_threads):
        largest = max(s.num_cpus for s in shapes if s.num_gpus or not with_gpu)
        raise ClusterError(
            f"compute.decode_threads is {decode_threads}, but the largest {kind} has {largest} "
            "CPUs; lower it, or leave it at auto"
        )
    return decode_threads
