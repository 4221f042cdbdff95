"""Putting receipts, several at a time: the one moment at which rows come to exist."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from latentcache.dataset.receipts import Receipt, read_receipts
from latentcache.engine.actors import Finished
from latentcache.errors import DeadlinePassed
from latentcache.storage import Store

# A put is two or three round trips to a store, and 256 GPUs finish some 25 units a second.
_NUM_THREADS = 16


@dataclass(frozen=True, slots=True)
class Committed:
    """The receipt that lies in the store now: ours, or that of the driver that was first."""

    receipt: Receipt
    is_ours: bool


@dataclass(frozen=True, slots=True)
class Expired:
    """A unit whose receipt was not put in time: `gc` may have deleted its files."""

    finished: Finished


class Committer:
    """Puts receipts while the driver's loop goes on.

    Until `ended` or `drain` has returned it, a receipt counts for nothing: its unit is still in
    hand. Never more are under way than there are threads, so that a run over a store that is down
    stands still, and does not go on to encode what nobody can commit.

    Args:
        store: the output.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "commit")
        self._num_under_way = 0
        self._ended: SimpleQueue[Future[Committed | Expired]] = SimpleQueue()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def put(self, finished: Finished) -> None:
        """Begin to put the receipt of a unit, which is ours if it is of its task's attempt."""
        self._num_under_way += 1
        self._pool.submit(self._put, finished).add_done_callback(self._ended.put)

    def ended(self) -> Iterator[Committed | Expired]:
        """Yield what has been put by now; wait while no further one could be begun.

        Raises:
            StorageError: one could not be put.
        """
        while not self._ended.empty() or self._num_under_way >= _NUM_THREADS:
            yield self._take()

    def drain(self) -> Iterator[Committed | Expired]:
        """Yield all that is still under way, as it ends; raises as `ended`."""
        while self._num_under_way:
            yield self._take()

    def _take(self) -> Committed | Expired:
        future = self._ended.get()
        self._num_under_way -= 1
        return future.result()

    def _put(self, finished: Finished) -> Committed | Expired:
        data = finished.receipt
        receipt = Receipt.from_bytes(data)
        try:
            is_put = self._store.put_if_absent(receipt.path, data, valid_until=finished.valid_until)
        except DeadlinePassed:
            return Expired(finished)
        if not is_put:
            # Another driver committed this unit first, and its rows are as good.
            (receipt,) = read_receipts(self._store, [receipt.record.name])
        return Committed(receipt, is_ours=receipt.record.attempt == finished.task.attempt)
