"""Determine the rank of this process, and the number of ranks on its node."""

from __future__ import annotations

import logging
import os

import torch

from latentcache.errors import ConfigError

_log = logging.getLogger(__name__)


def num_local_ranks() -> int:
    """Return the number of ranks on this node, which share its cache, as launchers set it."""
    return max(1, _environment_number("LOCAL_WORLD_SIZE") or 1)


def rank_and_world_size(
    rank: int | None, world_size: int | None, batch_size: int
) -> tuple[int, int]:
    """Return the rank of this process and the number of ranks.

    Args:
        rank, world_size: both if the caller knows them, else None.
        batch_size: number of rows of a global batch.

    Raises:
        ConfigError: the values contradict each other, or ranks cannot share a batch evenly.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError("only one of rank and world_size is given: give both, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = _environment_number("RANK"), _environment_number("WORLD_SIZE")
            if rank is None and world_size is None:
                return 0, 1
            if rank is None or world_size is None or rank >= world_size:
                raise ConfigError(
                    f"the environment has RANK {rank} and WORLD_SIZE {world_size}, which "
                    "contradict each other: correct them, or give rank and world_size"
                )
            _log.info("rank %d of %d, from RANK and WORLD_SIZE", rank, world_size)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} ranks, which count from 0")
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size is {batch_size}, for all ranks together, but {world_size} ranks cannot "
            f"share it evenly: use a multiple of {world_size}"
        )
    return rank, world_size


def _environment_number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(
            f"the environment variable {name} is {text!r:.60}: set it to an integer of at least 0"
        )
    return int(text)
