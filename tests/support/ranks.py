"""What the processes of the loader's tests do: ranks of a training job."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest
import s3fs
import torch
from botocore.retries.standard import ExponentialBackoff

from latentcache import LatentLoader, StorageOptions
from latentcache.errors import StorageError
from latentcache.storage import retries
from reference import IDENTITY, Identity, identities
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
    """Join a process group, and return an epoch's keys; the loader finds the rank itself."""
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size
    )
    try:
        loader = LatentLoader(url, batch_size=8, columns=["key"])
        assert (loader.rank, loader.world_size) == (rank, world_size)
        return [batch.columns["key"] for batch in loader]
    finally:
        torch.distributed.destroy_process_group()


def load_remote(url: str, cache: Path, endpoint: str, **options: Any) -> LatentLoader:
    chosen = {"batch_size": 4, "tail": "short", "columns": IDENTITY, "cache_dir": cache} | options
    return LatentLoader(url, storage=StorageOptions(endpoint_url=endpoint), **chosen)


def be_impatient(patch: pytest.MonkeyPatch) -> None:
    """Try again only a few times when a store fails, and at once."""
    patch.setattr(retries, "_PAUSES_S", (0.01, 0.01))
    patch.setattr(s3fs.S3FileSystem, "retries", 1)
    patch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)


def identities_or_error(
    url: str, cache: Path, endpoint: str, rank: int
) -> tuple[list[list[Identity]], str]:
    """What a rank of two, which is not patient, gets of an epoch, and what went wrong."""
    with pytest.MonkeyPatch.context() as patch:
        be_impatient(patch)
        return _identities_or_error(url, cache, endpoint, rank)


def _identities_or_error(
    url: str, cache: Path, endpoint: str, rank: int
) -> tuple[list[list[Identity]], str]:
    options = {"rank": rank, "world_size": 2, "batch_size": 8, "tail": "drop"}
    loader = load_remote(url, cache, endpoint, **options)
    actual: list[list[Identity]] = []
    try:
        actual.extend(identities(batch) for batch in loader)
    except StorageError as error:
        return actual, str(error)
    return actual, ""


def send_steps(url: str, cache: Path, endpoint: str, to: Connection) -> None:
    """Go through an epoch, say at each step that it is reached, and wait to be killed."""
    for batch in load_remote(url, cache, endpoint, prefetch_bytes=0):
        to.send(batch.step)
    signal.pause()
