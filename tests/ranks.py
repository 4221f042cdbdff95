"""What the processes of the loader's tests do: ranks of a training job."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from latentcache import LatentLoader
from servers import DEADLINE_S

T = TypeVar("T")

# Ranks are forked from a process that has imported all but started no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["s3fs", "torch", "latentcache.loader.loader"])


def run_ranks(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    """Run a process for each tuple of arguments, all at once; they must end, threads and all."""
    with ProcessPoolExecutor(len(arguments), mp_context=CONTEXT) as pool:
        tasks = [pool.submit(function, *each) for each in arguments]
        return [task.result(DEADLINE_S) for task in tasks]


def keys_of_rank(url: str, meeting: str, rank: int, world_size: int) -> list[list[str]]:
    """Join a process group, and give an epoch's keys without being told which rank one is."""
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size
    )
    try:
        loader = LatentLoader(url, batch_size=8, columns=["key"])
        assert (loader.rank, loader.world_size) == (rank, world_size)
        return [batch.columns["key"] for batch in loader]
    finally:
        torch.distributed.destroy_process_group()
