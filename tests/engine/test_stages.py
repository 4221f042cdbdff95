"""What the stages of a unit share: times, pools that run the oldest unit first, byte budgets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentcache.engine.stages import ByteBudget, OldestFirstPool, PrefetchIterator, StageTimes

# So long that only a hang reaches it; nothing here waits for time to pass.
HANG_S = 60.0


def wait(event: threading.Event) -> None:
    assert event.wait(HANG_S), "hangs"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def test_busy_and_waiting_times_are_counted():
    times = StageTimes()
    with PrefetchIterator(times.produce(range(10)), 1) as background:
        assert list(background) == list(range(10))
    assert times.busy_s > 0
    assert times.wait_s >= 0
    assert times.to_json().keys() == {"busy_s", "wait_s", "num_threads"}
    before = times.busy_s
    with pytest.raises(ValueError, match="inside"), times.working():
        raise ValueError("inside")
    assert times.busy_s > before


@pytest.fixture
def pool() -> Iterator[OldestFirstPool]:
    pool = OldestFirstPool("test", 1)
    yield pool
    pool.close()


def block(pool: OldestFirstPool) -> threading.Event:
    """Keep the pool's one thread busy until the event is set."""
    started, release = threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        wait(release)

    pool.submit(-1, job)
    wait(started)
    return release


def test_pool_runs_jobs_by_rank_then_by_submission(pool: OldestFirstPool):
    release = block(pool)
    ran: list[tuple[int, int]] = []
    futures = [
        pool.submit(rank, lambda rank=rank, index=index: ran.append((rank, index)))
        for index, rank in enumerate([3, 1, 2, 1, 3, 2, 1])
    ]
    release.set()
    for future in futures:
        future.result(HANG_S)
    assert ran == [(1, 1), (1, 3), (1, 6), (2, 2), (2, 5), (3, 0), (3, 4)]


def test_pool_returns_results_and_errors_in_futures(pool: OldestFirstPool):
    def fail() -> None:
        raise ValueError("job")

    assert pool.submit(0, lambda: 42).result(HANG_S) == 42
    with pytest.raises(ValueError, match="job"):
        pool.submit(0, fail).result(HANG_S)
    assert pool.submit(0, lambda: 43).result(HANG_S) == 43, "the thread lives on"


def test_drop_cancels_only_the_queued_jobs_of_its_rank(pool: OldestFirstPool):
    release = block(pool)
    ran: list[int] = []
    futures: dict[int, Future[None]] = {
        rank: pool.submit(rank, lambda rank=rank: ran.append(rank)) for rank in (1, 2, 3)
    }
    pool.drop(2)
    release.set()
    futures[3].result(HANG_S)
    assert ran == [1, 3]
    with pytest.raises(CancelledError):
        futures[2].result(HANG_S)


def test_pool_runs_one_job_per_thread_at_once():
    """Each job waits for all the others: with fewer threads this would hang."""
    pool = OldestFirstPool("test", 3)
    barrier = threading.Barrier(3)
    futures = [pool.submit(0, lambda: barrier.wait(HANG_S)) for _ in range(3)]
    assert sorted(future.result(HANG_S) for future in futures) == [0, 1, 2]
    pool.close()


def test_pool_times_each_job_for_its_own_unit(pool: OldestFirstPool):
    times, others = StageTimes(), StageTimes()
    pool.submit(0, lambda: sum(range(10_000)), times).result(HANG_S)
    pool.submit(0, lambda: sum(range(10_000)), others).result(HANG_S)
    before = times.busy_s
    assert before > 0
    assert others.busy_s > 0
    pool.submit(0, lambda: sum(range(10_000)), others).result(HANG_S)
    assert times.busy_s == before


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


def test_a_stage_waits_while_all_its_jobs_are_queued(monkeypatch: pytest.MonkeyPatch):
    clock, times = Clock(monkeypatch), StageTimes(num_threads=2)
    clock.now += 1  # nothing to do
    times.queued()
    clock.now += 2  # waits
    times.queued()
    clock.now += 4  # two wait: the time counts once
    with times.running():
        clock.now += 8  # one waits, one runs
        with times.running():
            clock.now += 16  # two at once
    clock.now += 32  # nothing to do
    assert times.to_json() == {"busy_s": 8 + 2 * 16, "wait_s": 2 + 4, "num_threads": 2}


def test_budget_is_never_exceeded_and_grants_in_order_of_request():
    budget = ByteBudget(10)
    assert budget.acquire(6) >= 0
    granted: list[int] = []
    sizes = [8, 3, 1]  # the last two would fit at once, but came later
    threads = []

    def ask(num_bytes: int) -> None:
        budget.acquire(num_bytes)
        granted.append(num_bytes)

    for num_bytes in sizes:
        thread = threading.Thread(target=ask, args=(num_bytes,))
        thread.start()
        threads.append(thread)
        while len(budget._requests) < len(threads):
            pass
    assert granted == []
    budget.release(6)
    threads[0].join(HANG_S)
    assert granted == [8]
    budget.release(8)
    for thread in threads[1:]:
        thread.join(HANG_S)
    assert sorted(granted[1:]) == [1, 3]


def test_a_request_larger_than_the_budget_is_granted_alone():
    budget = ByteBudget(10)
    budget.acquire(4)
    large = threading.Thread(target=budget.acquire, args=(25,))
    large.start()
    while not budget._requests:
        pass
    budget.release(4)
    large.join(HANG_S)
    small = threading.Thread(target=budget.acquire, args=(1,))
    small.start()
    while not budget._requests:
        pass
    assert small.is_alive()
    budget.release(25)
    small.join(HANG_S)
    assert not small.is_alive()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_many_threads_share_a_budget(sizes: list[int]):
    budget, lock = ByteBudget(20), threading.Lock()
    held, most = [], []

    def use(num_bytes: int) -> None:
        budget.acquire(num_bytes)
        with lock:
            held.append(num_bytes)
            most.append((sum(held), len([size for size in held if size])))
        with lock:
            held.remove(num_bytes)
        budget.release(num_bytes)

    threads = [threading.Thread(target=use, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
    assert all(total <= 20 or number == 1 for total, number in most)


# PrefetchIterator.


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
