"""The versions that must be the same on the driver and on every worker."""

from __future__ import annotations

import socket
from typing import NamedTuple

import torch

from latentcache import __version__
from latentcache.errors import ClusterError


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
