"""The ranks of a training job, and how many of them share a node."""

from __future__ import annotations

import logging
import os

import torch

from latentcache.errors import ConfigError

_log = logging.getLogger(__name__)


def num_ranks_here() -> int:
    """Count the ranks on this node, which share its cache, as torchrun and its like tell it."""
    return max(1, environment_number("LOCAL_WORLD_SIZE") or 1)


def environment_number(name: str) -> int | None:
    """Read a whole number from an environment variable; None where it is not set.

    Raises:
        ConfigError: it is not a whole number of at least 0.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"the environment variable {name} is {text!r:.60}, not a whole number")
    return int(text)


def place(rank: int | None, world_size: int | None, batch_size: int) -> tuple[int, int]:
    """Say which rank of how many this process is."""
    if (rank is None) != (world_size is None):
        raise ConfigError("rank and world_size go together: give both, or neither")
    if rank is None or world_size is None:
        rank, world_size = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = _place_of_environment()
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size}")
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size {batch_size} is that of all ranks together; {world_size} ranks cannot "
            "share it evenly"
        )
    return rank, world_size


def _place_of_environment() -> tuple[int, int]:
    """Return the rank and world size that torchrun and its like set; (0, 1) where there are none.

    Raises:
        ConfigError: one is set without the other, or they are no rank and world size.
    """
    rank, world_size = environment_number("RANK"), environment_number("WORLD_SIZE")
    if rank is None and world_size is None:
        return 0, 1
    if rank is None or world_size is None or rank >= world_size:
        raise ConfigError(
            f"the environment has RANK {rank} and WORLD_SIZE {world_size}, which do not go "
            "together: correct them, or give rank and world_size"
        )
    _log.info("rank %d of %d, from RANK and WORLD_SIZE", rank, world_size)
    return rank, world_size
