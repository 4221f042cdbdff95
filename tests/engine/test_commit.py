"""Receipts put several at a time: each counts once it lies there, and not before."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest

from latentcache import clock
from latentcache.dataset.receipts import Receipt, Unit, list_receipt_names, new_attempt
from latentcache.engine.commit import Committer
from latentcache.engine.dispatcher import Finished
from latentcache.engine.job import UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.errors import StorageError
from latentcache.storage import Store
from makers import make_contract
from simulated import make_receipt

CONTRACT = make_contract()


def receipts(num: int) -> list[Receipt]:
    units = [Unit.of(f"{index}.tar", 1, "v1", CONTRACT.fingerprint) for index in range(num)]
    return [make_receipt(CONTRACT, unit, 0, new_attempt()) for unit in units]


def finished(receipt: Receipt, attempt: str = "", valid_until: float = math.inf) -> Finished:
    """Return the event of a finished unit; `attempt` is its task's, if not the receipt's."""
    record = receipt.record
    task = UnitTask(record.unit, record.generation, attempt or record.attempt)
    unit = PlannedUnit(record.unit, record.generation, "new")
    return Finished(task, receipt.to_bytes(), unit, valid_until)


class GatedStore(Store):
    """Puts nothing before `gate` is set, or `opens_at` puts wait; `refused` is never taken."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gate = threading.Event()
        self.refused = ""
        self.opens_at = 0
        self._num_waiting = 0
        self._lock = threading.Lock()

    def put_if_absent(self, path: str, data: bytes, **options: Any) -> bool:
        with self._lock:
            self._num_waiting += 1
            if self._num_waiting == self.opens_at:
                self.gate.set()
        assert self.gate.wait(60)
        if self.refused and self.refused in path:
            raise StorageError(f"cannot reach or use {path}")
        return super().put_if_absent(path, data, **options)


def test_receipt_counts_only_after_its_put_ended(tmp_path: Path):
    store = GatedStore(str(tmp_path))
    expected = receipts(3)
    with Committer(store) as committer:
        for receipt in expected:
            committer.put(finished(receipt))
        assert not list(committer.ended())
        assert not list_receipt_names(store)
        store.gate.set()
        results = list(committer.drain())
        assert not list(committer.drain())
    assert {c.receipt.record.name for c in results} == set(list_receipt_names(store))
    assert all(committed.is_ours for committed in results)


def test_number_of_puts_in_progress_is_bounded(tmp_path: Path):
    store = GatedStore(str(tmp_path))
    store.opens_at = 16
    num_ended = 0
    with Committer(store) as committer:
        for number, receipt in enumerate(receipts(40), 1):
            committer.put(finished(receipt))
            num_ended += len(list(committer.ended()))
            assert num_ended >= number - 15
            assert store.gate.is_set() or num_ended == 0
        num_ended += len(list(committer.drain()))
    assert num_ended == len(list_receipt_names(store)) == 40


def test_receipt_of_the_first_driver_is_used(tmp_path: Path):
    store = Store(str(tmp_path))
    (first,) = receipts(1)
    assert store.put_if_absent(first.path, first.to_bytes())
    with Committer(store) as committer:
        (second,) = receipts(1)
        committer.put(finished(second))
        (committed,) = committer.drain()
        # Another who met it before he began gives it back as it is.
        committer.put(finished(first, second.record.attempt))
        (met,) = committer.drain()
    assert not committed.is_ours
    assert not met.is_ours
    assert committed.receipt.record == met.receipt.record == first.record


def test_failed_put_raises_after_the_other_puts(tmp_path: Path):
    store = GatedStore(str(tmp_path))
    expected = receipts(5)
    store.refused = expected[2].path
    with Committer(store) as committer:
        for receipt in expected:
            committer.put(finished(receipt))
        store.gate.set()
        with pytest.raises(StorageError, match="cannot reach"):
            list(committer.drain())
    assert set(list_receipt_names(store)) == {
        r.record.name for r in expected if r is not expected[2]
    }


def test_expired_receipt_is_not_put(tmp_path: Path):
    store = Store(str(tmp_path))
    late, first = receipts(2)
    assert store.put_if_absent(first.path, first.to_bytes())
    with Committer(store) as committer:
        for receipt in (late, first):
            committer.put(finished(receipt, valid_until=clock.boot_time_s() - 1))
        results = list(committer.drain())
    assert all(isinstance(result, Finished) for result in results)
    assert list_receipt_names(store) == [first.record.name]
