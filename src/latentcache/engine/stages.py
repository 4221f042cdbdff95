"""What the stages of a unit's pipeline share: times, limits on bytes, threads and queues."""

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

# Bytes of a sample under construction that each unit may hold beside the shared budget. Nearly all
# samples are smaller, so reading them does not wait.
_FREE_BYTES = 32 * 2**20


class StageTimes:
    """The times of one stage for one unit; thread-safe.

    `busy_s` is the work of its threads in seconds. `wait_s` is the time in seconds in which the
    stage had work and did none: its thread waited for a full queue, or all its jobs were queued
    behind those of another unit. The units of a process share `num_threads` and `total`.
    """

    def __init__(self, num_threads: int = 1, total: StageTimes | None = None) -> None:
        self.num_threads = num_threads
        self._total = total
        self.busy_s = 0.0
        self.wait_s = 0.0
        self._lock = threading.Lock()
        self._num_queued = self._num_running = 0
        self._since = 0.0

    def add(self, busy_s: float = 0.0, wait_s: float = 0.0) -> None:
        """Add to both times.

        Args:
            busy_s, wait_s: negative ones correct what was counted.
        """
        with self._lock:
            self.busy_s += busy_s
            self.wait_s += wait_s
        if self._total:
            self._total.add(busy_s, wait_s)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time inside the context as busy."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(busy_s=time.perf_counter() - began)

    def produce(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; count the time inside `items` as busy, and other time as waiting."""
        began = time.perf_counter()
        for item in items:
            produced = time.perf_counter()
            yield item
            now = time.perf_counter()
            self.add(busy_s=produced - began, wait_s=now - produced)
            began = now

    def queued(self) -> None:
        """Count one more job that waits for a thread."""
        self._change(queued=1)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a queued job as running, and the time inside the context as busy."""
        self._change(queued=-1, running=1)
        try:
            with self.working():
                yield
        finally:
            self._change(running=-1)

    def _change(self, queued: int = 0, running: int = 0) -> None:
        with self._lock:
            now = time.perf_counter()
            waited_s = now - self._since if self._num_queued and not self._num_running else 0.0
            self._since = now
            self._num_queued += queued
            self._num_running += running
        if waited_s:
            self.add(wait_s=waited_s)

    def to_json(self) -> dict[str, float]:
        """Return the times and the number of threads, with seconds rounded to milliseconds."""
        times = {"busy_s": round(self.busy_s, 3), "wait_s": round(self.wait_s, 3)}
        return {**times, "num_threads": self.num_threads}


class ByteBudget:
    """A limit on the bytes that threads hold together, granted in order, so no request starves.

    A request for more than `num_bytes` is granted when nothing else is held.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._held = 0
        self._requests: deque[object] = deque()
        self._changed = threading.Condition()

    def acquire(self, num_bytes: int) -> float:
        """Wait until `num_bytes` are free, and hold them; return the waiting time in seconds."""
        began = time.perf_counter()
        request = object()
        with self._changed:
            self._requests.append(request)
            self._changed.wait_for(lambda: self._requests[0] is request and self._has(num_bytes))
            self._requests.popleft()
            self._held += num_bytes
            self._changed.notify_all()
        return time.perf_counter() - began

    def release(self, num_bytes: int) -> None:
        """Release `num_bytes` that are held."""
        with self._changed:
            self._held -= num_bytes
            self._changed.notify_all()

    def _has(self, num_bytes: int) -> bool:
        return not self._held or self._held + num_bytes <= self._num_bytes


class SampleBudget:
    """The bytes of the sample that a unit is reading, held in a budget that units share.

    A thread must not wait for bytes while it holds bytes of the same budget, because two units
    could then wait for each other. So the first `_FREE_BYTES` of a sample are not counted, and a
    larger sample acquires `max_sample_bytes` at once.
    """

    def __init__(
        self, fetched: ByteBudget, max_sample_bytes: int, times: StageTimes | None = None
    ) -> None:
        self._fetched = fetched
        self._max_sample_bytes = max_sample_bytes
        self._times = times or StageTimes()
        self._held = 0

    def reserve(self, num_bytes: int) -> None:
        """Wait until the sample under construction may hold `num_bytes` in total."""
        if num_bytes > _FREE_BYTES and not self._held:
            self._acquire(self._max_sample_bytes)
            self._held = self._max_sample_bytes

    def finish(self, num_bytes: int) -> None:
        """Hold `num_bytes` for the finished sample; its consumer releases them."""
        if self._held:
            self._fetched.release(self._held - num_bytes)
            self._held = 0
        else:
            self._acquire(num_bytes)

    def _acquire(self, num_bytes: int) -> None:
        waited_s = self._fetched.acquire(num_bytes)
        self._times.add(busy_s=-waited_s, wait_s=waited_s)

    def close(self) -> None:
        """Release the bytes of an unfinished sample."""
        self._fetched.release(self._held)
        self._held = 0


class OldestFirstPool:
    """Threads that several units share; the queued job with the lowest rank runs first."""

    def __init__(self, name: str, num_threads: int) -> None:
        self.num_threads = num_threads
        self._jobs: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []  # a heap
        self._tickets = itertools.count()  # jobs of one rank run in order of submission
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, rank: int, job: Callable[[], T], times: StageTimes | None = None) -> Future[T]:
        """Queue a job for the unit of a rank, and return the future of its result.

        Args:
            rank, job, times: `times` count when the job is queued and when it runs.
        """
        future: Future[T] = Future()
        times = times or StageTimes()

        def timed() -> T:
            with times.running():
                return job()

        times.queued()
        with self._changed:
            heapq.heappush(self._jobs, (rank, next(self._tickets), future, timed))
            self._changed.notify()
        return future

    def drop(self, rank: int) -> None:
        """Cancel the jobs of a rank that have not started."""
        with self._changed:
            for job in self._jobs:
                if job[0] == rank:
                    job[2].cancel()
            self._jobs = [job for job in self._jobs if job[0] != rank]
            heapq.heapify(self._jobs)

    def close(self) -> None:
        """End the threads after their present jobs, without starting queued ones."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                _, _, future, job = heapq.heappop(self._jobs)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # noqa: BLE001  (a future carries it)
                    future.set_exception(error)


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
