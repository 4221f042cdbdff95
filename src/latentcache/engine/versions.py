"""What must be the same on the driver and on every worker."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from latentcache import __version__
from latentcache.errors import ClusterError


@dataclass(frozen=True, slots=True)
class Versions:
    """Of this package, which decides every byte, and of torch.

    Of torch a release's repairs may differ, and so may its build: a driver without a GPU has
    `2.13.0+cpu` where its workers have `2.13.1+cu130`. Ray itself sees to its own and Python's.
    """

    latentcache: str
    torch: str

    @classmethod
    def here(cls) -> Versions:
        """Those of this process."""
        return cls(__version__, str(torch.__version__))

    def require_here(self) -> None:
        """Refuse to work for a driver of other versions than this process's.

        Raises:
            ClusterError: names the node, both versions and the mend.
        """
        here = Versions.here()
        for name, wanted, found in (
            ("latentcache", self.latentcache, here.latentcache),
            ("torch", _release(self.torch), _release(here.torch)),
        ):
            if wanted != found:
                raise ClusterError(
                    f"node {socket.gethostname()} has {name} {getattr(here, name)}, but the driver "
                    f"{getattr(self, name)}: install the same on every node"
                )


def _release(version: str) -> str:
    """Major and minor: `2.13` of `2.13.1+cu130`."""
    return ".".join(version.split(".")[:2])
