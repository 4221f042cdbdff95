"""What the driver requires of the nodes: CPUs for its actors, and its own versions."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch

from latentcache import __version__
from latentcache.errors import ClusterError

# The most CPUs that `decode_threads: auto` requests.
_MAX_CPUS = 16


class NodeShape(NamedTuple):
    """The resources of a node."""

    num_cpus: int
    num_gpus: int


def cpus_per_actor(
    shapes: Sequence[NodeShape], num_actors: int, *, with_gpu: bool, decode_threads: int | None
) -> int:
    """Return the number of CPUs that each actor requests.

    By default this is the largest number, up to 16, with which as many actors fit as with one CPU
    each: an actor that requests more than its share of a node keeps others off that node. An actor
    that fits on no node would stay pending silently, so that is a `ClusterError`.

    Args:
        shapes, num_actors: the present nodes, and the requested actors, of which fewer may fit.
        with_gpu, decode_threads: as in the config; None computes the default.
    """

    def num_fitting(num_cpus: int) -> int:
        return sum(
            min(shape.num_cpus // num_cpus, shape.num_gpus if with_gpu else shape.num_cpus)
            for shape in shapes
        )

    kind = "node with a GPU" if with_gpu else "node"
    if not num_fitting(1):
        raise ClusterError(
            f"no {kind} of the Ray cluster has a CPU, which an actor needs to decode: add CPUs"
        )
    if decode_threads is None:
        required = min(num_actors, num_fitting(1))
        return max(n for n in range(1, _MAX_CPUS + 1) if num_fitting(n) >= required)
    if not num_fitting(decode_threads):
        largest = max(s.num_cpus for s in shapes if s.num_gpus or not with_gpu)
        raise ClusterError(
            f"compute.decode_threads is {decode_threads}, but the largest {kind} has {largest} "
            "CPUs; lower it, or leave it at auto"
        )
    return decode_threads


class Versions(NamedTuple):
    """The versions of this package, which determines every stored byte, and of torch.

    The patch release and the build of torch may differ: a driver without a GPU has `2.13.0+cpu`,
    and its workers have `2.13.1+cu130`. Ray itself checks its own version and that of Python.
    """

    latentcache: str
    torch: str

    @classmethod
    def here(cls) -> Versions:
        """Return the versions of this process."""
        return cls(__version__, str(torch.__version__))

    def require_here(self) -> None:
        """Raise `ClusterError` if this process has other versions than the driver."""
        for name, driver, node in zip(self._fields, self, Versions.here(), strict=True):
            if _significant(name, driver) != _significant(name, node):
                raise ClusterError(
                    f"node {socket.gethostname()} has {name} {node}, but the driver has {driver}: "
                    "install the same version on every node"
                )


def _significant(name: str, version: str) -> str:
    """Return the part of a version that must match: `2.13` of torch `2.13.1+cu130`."""
    return ".".join(version.split(".")[:2]) if name == "torch" else version
