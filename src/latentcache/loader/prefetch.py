"""Work done ahead on a thread, and memory for its results that is used again."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
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
) -> Iterator[T]:
    """Work at most `depth` items ahead of whoever takes the results, in order.

    Two threads take turns: while one makes the next plan, the other does the work of the last, most
    of which is copying, without the interpreter lock. What they raise is raised here, in its turn.
    `plans` is closed when this iterator is; `cancel` is called before, to let work that waits end.

    Raises:
        ConfigError: a process that was forked while this iterator was at work goes on with it. The
            threads are the parent's.
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

    ahead: deque[Future[T | None]] = deque()
    # Also at the interpreter's end, which would otherwise find this iterator without its modules.
    stop = weakref.finalize(ahead, _shut_down, pool, pid)
    try:
        # In here: after a Ctrl-C while a thread starts, the pool does not know of it.
        ahead.extend(pool.submit(run, next(tickets)) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(run, next(tickets)))
            yield item
            if os.getpid() != pid:
                raise ConfigError(
                    "this iterator of a LatentLoader belongs to the process that was forked: in "
                    "the new process, iterate over the loader anew"
                )
    finally:
        if os.getpid() == pid:  # the locks of another process may never be free here
            cancel()
            stop()
            with turn:
                plans.close()


def _shut_down(pool: ThreadPoolExecutor, pid: int) -> None:
    if os.getpid() == pid:
        pool.shutdown(cancel_futures=True)


class Memory:
    """Memory for tensors on the CPU: fresh pages for each batch would cost half the speed.

    A buffer is used again once no tensor of it is alive, be it a view, which the reference count of
    the array beneath it shows. Beside a GPU torch's allocator of pinned memory does the same, and
    waits for copies that are under way.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self._lock = threading.Lock()
        # CUDA cannot be used in a process that was forked.
        self._is_pinned = torch.cuda.is_available() and os.getpid() == _FIRST_PID

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor that shares memory with no other that is alive; its values are any."""
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
