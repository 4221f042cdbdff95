"""Prefetch results on threads, and reuse memory for them."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from math import prod
from typing import TypeVar

import numpy as np
import torch

from latentcache.errors import ConfigError

P = TypeVar("P")
T = TypeVar("T")

_NUM_THREADS = 2

_FIRST_PID = os.getpid()


def prefetch(
    plans: Generator[P, None, None],
    work: Callable[[P], T],
    depth: int,
    cancel: Callable[[], None],
) -> Generator[T, None, None]:
    """Yield the results of `work` in order, at most `depth` items prefetched on threads.

    Two threads alternate: while one makes the next plan, the other does the work of the previous
    one, mostly copying without the interpreter lock. Errors are raised here, in order. Closing this
    iterator calls `cancel`, and then closes `plans`.

    Args:
        plans, work, depth: the plans, which one thread at a time advances; see above.
        cancel: makes work that waits end early.

    Raises:
        ConfigError: a forked process continues the parent's iterator, whose threads it lacks.
    """
    pid = os.getpid()
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="latentcache-prefetch")
    turn = threading.Condition()
    tickets, next_ticket = count(), 0

    def run(ticket: int) -> T | None:
        nonlocal next_ticket
        with turn:
            turn.wait_for(lambda: next_ticket == ticket)
            try:
                plan = next(plans, None)
            finally:
                next_ticket += 1
                turn.notify_all()
        return None if plan is None else work(plan)

    futures: deque[Future[T | None]] = deque()
    # The finalizer also runs at the interpreter's exit, after which modules are missing.
    stop = weakref.finalize(futures, _shut_down, pool, pid)
    try:
        # Inside `try`, because after a Ctrl-C while a thread starts, the pool does not know it.
        futures.extend(pool.submit(run, next(tickets)) for _ in range(depth))
        while (item := futures.popleft().result()) is not None:
            futures.append(pool.submit(run, next(tickets)))
            yield item
            if os.getpid() != pid:
                raise ConfigError(
                    "this iterator of a LatentLoader belongs to the parent process: in the forked "
                    "process, iterate over the loader again"
                )
    finally:
        if os.getpid() == pid:  # in a forked process, the parent's locks may stay locked forever
            cancel()
            stop()
            with turn:
                plans.close()


def _shut_down(pool: ThreadPoolExecutor, pid: int) -> None:
    if os.getpid() == pid:
        pool.shutdown(cancel_futures=True)


class Memory:
    """A pool of memory for tensors on the CPU; new pages for each batch would halve the speed.

    A buffer is reused once no tensor or view of it is alive, which the reference count of its array
    shows. With a GPU, torch's allocator of pinned memory does the same, and also waits for copies
    in progress.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self._lock = threading.Lock()
        # CUDA cannot be used in a forked process.
        self._is_pinned = torch.cuda.is_available() and os.getpid() == _FIRST_PID

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor that shares no memory with any other live tensor.

        Args:
            shape, dtype: of the tensor.
        """
        if self._is_pinned:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            for index in range(len(self._buffers)):
                is_free = sys.getrefcount(self._buffers[index]) == _FREE
                if is_free and self._buffers[index].nbytes >= size:
                    break
            else:
                index = len(self._buffers)
                self._buffers.append(np.empty(size, np.uint8))
            return torch.from_numpy(self._buffers[index][:size]).view(dtype).view(tuple(shape))


_probe = [np.empty(1, np.uint8)]
_FREE = sys.getrefcount(_probe[0])
