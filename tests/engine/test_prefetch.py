"""Prefetching on threads: in order, bounded, and ended without a thread left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentcache.engine.stages import PrefetchIterator

# So long that only a hang reaches it; nothing here waits for time to pass.
HANG_S = 60.0


def wait(event: threading.Event) -> None:
    assert event.wait(HANG_S), "hangs"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


class Counted:
    """An iterable of integers that tells when it gives each, and where it was touched."""

    def __init__(self, num: int) -> None:
        self.given = [threading.Event() for _ in range(num)]
        self.threads: set[int] = set()
        self.is_closed = False

    def __iter__(self) -> Iterator[int]:
        try:
            for index, event in enumerate(self.given):
                self.threads.add(threading.get_ident())
                event.set()
                yield index
        finally:
            self.is_closed = True


@given(st.lists(st.integers()), st.integers(1, 5))
def test_prefetch_keeps_the_order(items: list[int], depth: int):
    with PrefetchIterator(items, depth) as background:
        assert list(background) == items


def test_prefetch_iterators_form_a_pipeline():
    with (
        PrefetchIterator(range(100), 2) as first,
        PrefetchIterator((n * n for n in first), 3) as second,
        PrefetchIterator((n + 1 for n in second), 1) as third,
    ):
        assert list(third) == [n * n + 1 for n in range(100)]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_is_bounded_by_its_depth(depth: int):
    items = Counted(30)
    with PrefetchIterator(items, depth) as background:
        consumer = iter(background)
        for taken in range(20):
            # The queue holds `depth`; one more is in the producer's hands.
            wait(items.given[taken + depth])
            # It is out of the queue's lock only to wait: by now nothing more may have been given.
            assert not items.given[taken + depth + 1].is_set()
            assert next(consumer) == taken
    assert items.threads
    assert threading.get_ident() not in items.threads


def test_prefetch_raises_an_error_after_the_items_before_it():
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    with PrefetchIterator(items(), 5) as background:
        consumer = iter(background)
        assert [next(consumer), next(consumer)] == [1, 2]
        with pytest.raises(ValueError, match="third"):
            next(consumer)


def test_an_error_passes_through_the_pipeline():
    def items() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with PrefetchIterator(items(), 1) as first, PrefetchIterator((n for n in first), 1) as second:
        consumer = iter(second)
        assert next(consumer) == 1
        with pytest.raises(KeyboardInterrupt):
            next(consumer)


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_leaving_early_ends_a_producer_that_waits_for_a_full_queue(num_taken: int):
    items = Counted(1000)
    with PrefetchIterator(items, 2) as background:
        consumer = iter(background)
        taken = [next(consumer) for _ in range(num_taken)]
        wait(items.given[num_taken + 2])
    assert taken == list(range(num_taken))
    assert not items.given[num_taken + 4].is_set()


def test_an_error_of_the_consumer_ends_the_pipeline():
    items = Counted(1000)
    with (  # noqa: PT012
        pytest.raises(ValueError, match="consumer"),
        PrefetchIterator(items, 2) as first,
        PrefetchIterator(first, 2) as second,
    ):
        next(iter(second))
        raise ValueError("consumer")


def test_stop_wakes_a_waiting_consumer():
    """The upper stage waits for an item that the lower one cannot give yet."""
    is_waiting, may_give = threading.Event(), threading.Event()

    def slow() -> Iterator[int]:
        is_waiting.set()
        wait(may_give)
        yield 1

    with PrefetchIterator(slow(), 1) as lower, PrefetchIterator(lower, 1) as upper:
        wait(is_waiting)
        lower.stop()
        assert list(upper) == []
        may_give.set()
