"""The versions that must be the same on the driver and on every worker."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from latentcache import __version__
from latentcache.errors import ClusterError


@dataclass(frozen=True, slots=True)
class Versions:
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
        """Check that this process has the versions of the driver.

        Raises:
            ClusterError: a version differs; names the node, both versions and the fix.
        """
        here = Versions.here()
        for name, expected, actual in (
            ("latentcache", self.latentcache, here.latentcache),
            ("torch", _release(self.torch), _release(here.torch)),
        ):
            if expected != actual:
                raise ClusterError(
                    f"node {socket.gethostname()} has {name} {getattr(here, name)}, but the driver "
                    f"has {getattr(self, name)}: install the same version on every node"
                )


def _release(version: str) -> str:
    """Return the major and minor version, such as `2.13` of `2.13.1+cu130`."""
    return ".".join(version.split(".")[:2])
