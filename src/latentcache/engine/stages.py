"""The pieces that a unit's pipeline is made of: stages on their own threads, and what they share.

`PrefetchIterator` runs an iterator ahead of its consumer through a bounded queue; a few of them
stacked make a pipeline in which every stage waits for the slowest one. `OldestFirstPool` runs the
jobs of several units on the same threads, the oldest unit's first. `ByteBudget` bounds the bytes
that they hold.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class StageTimes:
    """What one stage does for one unit; thread-safe.

    `busy_s` is its work, in seconds of its threads; `wait_s` the time in which there was work for
    it and none was done: its thread stood before a full queue, or all its jobs were queued behind
    another unit's. `num_threads` of the process can do such work at once, for all units together.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        self.busy_s = 0.0
        self.wait_s = 0.0
        self._lock = threading.Lock()
        self._num_queued = self._num_running = 0
        self._since = 0.0

    def add(self, busy_s: float = 0.0, wait_s: float = 0.0) -> None:
        """Add to both."""
        with self._lock:
            self.busy_s += busy_s
            self.wait_s += wait_s

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time inside as busy."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(busy_s=time.perf_counter() - began)

    def queued(self) -> None:
        """Count one more job that waits for a thread."""
        self._change(queued=1)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a job that waited as running, and the time inside as busy."""
        self._change(queued=-1, running=1)
        try:
            with self.working():
                yield
        finally:
            self._change(running=-1)

    def _change(self, queued: int = 0, running: int = 0) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._num_queued and not self._num_running:
                self.wait_s += now - self._since
            self._since = now
            self._num_queued += queued
            self._num_running += running

    def to_json(self) -> dict[str, float]:
        """Give the figures, seconds rounded to the millisecond."""
        return {
            "busy_s": round(self.busy_s, 3),
            "wait_s": round(self.wait_s, 3),
            "num_threads": self.num_threads,
        }


class ByteBudget:
    """Bytes that threads may hold together; whoever asks first is served first.

    So nobody starves: a large request waits for those before it, and those after it wait for the
    large one. A request for more than `num_bytes` is granted once nothing else is held.

    Args:
        num_bytes: the budget.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._held = 0
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def acquire(self, num_bytes: int) -> float:
        """Wait until so many bytes are free, and hold them; return the seconds that it took."""
        began = time.perf_counter()
        me = object()
        with self._changed:
            self._line.append(me)
            self._changed.wait_for(lambda: self._line[0] is me and self._has(num_bytes))
            self._line.popleft()
            self._held += num_bytes
            self._changed.notify_all()
        return time.perf_counter() - began

    def release(self, num_bytes: int) -> None:
        """Hold so many bytes less."""
        with self._changed:
            self._held -= num_bytes
            self._changed.notify_all()

    def _has(self, num_bytes: int) -> bool:
        return not self._held or self._held + num_bytes <= self._num_bytes


class PrefetchIterator(Generic[T]):
    """Iterate over `items` on a thread of its own, at most `depth` items ahead of the consumer.

    Use it as a context manager: leaving it stops the thread, wherever it stands. What `items`
    raises is raised to the consumer, after the items before it.

    Args:
        items: what to run ahead; it is only ever touched by the new thread.
        depth: how many finished items may wait.
        times: where to count: busy while `items` works, waiting while the queue is full.
    """

    def __init__(self, items: Iterable[T], depth: int, times: StageTimes | None = None) -> None:
        self._items = items
        self._depth = depth
        self._times = times or StageTimes()
        self._queue: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PrefetchIterator[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Let the thread end at its next item, and the consumer at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            began = time.perf_counter()
            for item in self._items:
                produced = time.perf_counter()
                with self._changed:
                    self._changed.wait_for(lambda: len(self._queue) < self._depth or self._stopped)
                    if self._stopped:
                        break
                    self._queue.append(item)
                    self._changed.notify_all()
                now = time.perf_counter()
                self._times.add(busy_s=produced - began, wait_s=now - produced)
                began = now
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


class OldestFirstPool:
    """Threads shared by several units; of the jobs that wait, the lowest rank goes first.

    Args:
        name: of the threads.
        num_threads: how many jobs run at once.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self.num_threads = num_threads
        self._waiting: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._tickets = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, rank: int, job: Callable[[], T], times: StageTimes | None = None) -> Future[T]:
        """Queue a job; `times` are told that it is queued, and when it runs."""
        future: Future[T] = Future()
        times = times or StageTimes()

        def timed() -> T:
            with times.running():
                return job()

        times.queued()
        with self._changed:
            heapq.heappush(self._waiting, (rank, next(self._tickets), future, timed))
            self._changed.notify()
        return future

    def drop(self, rank: int) -> None:
        """Forget the jobs of that rank that have not started."""
        with self._changed:
            for entry in self._waiting:
                if entry[0] == rank:
                    entry[2].cancel()
            self._waiting = [entry for entry in self._waiting if entry[0] != rank]
            heapq.heapify(self._waiting)

    def close(self) -> None:
        """End the threads when their present jobs are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                _, _, future, job = heapq.heappop(self._waiting)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # noqa: BLE001  (a future carries it)
                    future.set_exception(error)
