"""Compute items on threads while their consumer works: in order, and at most a few ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class PrefetchIterator(Generic[T]):
    """An iterator over `items` on its own thread, which computes at most `depth` items ahead.

    Use it as a context manager: leaving the context stops the thread at its next item. The consumer
    gets an error of `items` after the items before the error.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._items = items
        self._depth = depth
        self._queue: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PrefetchIterator[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Stop the consumer at once and the thread at its next item."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._queue) < self._depth or self._stopped)
                    if self._stopped:
                        break
                    self._queue.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  (the consumer raises it)
            self._error = error
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._finished or self._stopped)
                if self._stopped:
                    return
                if not self._queue:
                    break
                item = self._queue.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error


def prefetch_map(function: Callable[[S], T], items: Iterable[S], num_threads: int) -> Iterator[T]:
    """Yield `function(item)` for each item, in order; each thread computes one result ahead.

    Unlike `Executor.map`, this bounds the results in memory, and advances `items` only as needed.

    Args:
        function, items, num_threads: only the consumer's thread iterates over `items`.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        results: deque[Future[T]] = deque()
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) == num_threads:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
