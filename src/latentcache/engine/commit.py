"""Concurrent puts of receipts, by which rows come into existence."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

from latentcache.dataset.receipts import Receipt, read_receipts
from latentcache.engine.dispatcher import Finished
from latentcache.errors import DeadlinePassed
from latentcache.storage import Store

# A put is two or three round trips to a store, and 256 GPUs finish some 25 units a second.
_NUM_THREADS = 16


class Committed(NamedTuple):
    """The receipt that is in the store; `is_ours` if it is of the attempt of this run's task."""

    receipt: Receipt
    is_ours: bool


class Committer:
    """A thread pool that puts receipts in a store while the driver's loop continues.

    A unit is in progress until `ended` or `drain` has yielded its receipt. There are never more
    puts in progress than threads, so a run does not encode units that it cannot commit. If a
    receipt is not put in time, `gc` may have deleted the files, and they yield the unit itself.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "commit")
        self._num_in_progress = 0
        self._ended: SimpleQueue[Future[Committed | Finished]] = SimpleQueue()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def put(self, finished: Finished) -> None:
        """Start the put of a unit's receipt."""
        self._num_in_progress += 1
        self._pool.submit(self._put, finished).add_done_callback(self._ended.put)

    def ended(self) -> Iterator[Committed | Finished]:
        """Yield the puts that have ended, or raise their errors; wait for one if all are busy."""
        while not self._ended.empty() or self._num_in_progress >= _NUM_THREADS:
            yield self._next()

    def drain(self) -> Iterator[Committed | Finished]:
        """Yield all puts in progress, each as it ends, or raise their errors."""
        while self._num_in_progress:
            yield self._next()

    def _next(self) -> Committed | Finished:
        future = self._ended.get()
        self._num_in_progress -= 1
        return future.result()

    def _put(self, finished: Finished) -> Committed | Finished:
        receipt = Receipt.from_bytes(finished.receipt)
        try:
            is_put = self._store.put_if_absent(
                receipt.path, finished.receipt, valid_until=finished.valid_until
            )
        except DeadlinePassed:
            return finished
        if not is_put:
            # Another driver committed this unit first. Its rows are equally valid.
            (receipt,) = read_receipts(self._store, [receipt.record.name])
        return Committed(receipt, is_ours=receipt.record.attempt == finished.task.attempt)
