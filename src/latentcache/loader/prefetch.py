"""Work done ahead on a thread, and memory for its results that is used again."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import TypeVar

import numpy as np
import torch

P = TypeVar("P")
T = TypeVar("T")

_NUM_WORKERS = 2


def prefetch(plans: Generator[P, None, None], work: Callable[[P], T], depth: int) -> Iterator[T]:
    """Work at most `depth` items ahead of whoever takes the results, in order.

    Plans are made one after the other on a thread of their own; `work` runs on two more: while one
    copies, which needs no interpreter lock, another plan is made. What they raise is raised here,
    in its turn. `plans` is closed when this iterator is.
    """
    planner = ThreadPoolExecutor(1, thread_name_prefix="latentcache-plan")
    workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="latentcache-work")

    def plan() -> Future[T] | None:
        for item in plans:
            return workers.submit(work, item)
        return None

    try:
        ahead = deque(planner.submit(plan) for _ in range(depth))
        while (task := ahead.popleft().result()) is not None:
            ahead.append(planner.submit(plan))
            yield task.result()
    finally:
        planner.shutdown(cancel_futures=True)
        workers.shutdown(cancel_futures=True)
        plans.close()


class Memory:
    """Memory for tensors on the CPU: fresh pages for each batch would cost half the speed.

    A buffer is used again once no tensor of it is alive, be it a view, which the reference count of
    the array beneath it shows. Beside a GPU torch's allocator of pinned memory does the same, and
    waits for copies that are under way.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self._lock = threading.Lock()
        self._is_pinned = torch.cuda.is_available()

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
