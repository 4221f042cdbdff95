"""`latentcache status` on outputs that runs of other days have left, and on one that grows."""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from latentcache.dataset.contract import Contract, establish_contract
from latentcache.dataset.publish import PUBLISHED_PATH
from latentcache.dataset.receipts import Receipt, Unit, UnitRecord, new_attempt, put_failure
from latentcache.dataset.state import State, remove_units, write_next
from latentcache.dataset.statistics import Statistics
from latentcache.engine.lease import Lease
from latentcache.engine.status import Status, Watched, read_status, watch
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions
from makers import make_contract

NOWHERE = StorageOptions()


def record_of(unit: Unit, num_rows: int, num_rejects: int) -> UnitRecord:
    return UnitRecord(
        unit=unit,
        generation=0,
        attempt=new_attempt(),
        num_samples=num_rows + num_rejects,
        num_rows=num_rows,
        num_rejects=num_rejects,
        files=(),
        rejects=None,
    )


class Output:
    """An output that receives receipts, failures and manifests as a test wants them."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self.store = Store(self.url)
        self.contract: Contract = make_contract()
        establish_contract(self.store, self.contract, {})
        self.snapshot: dict[str, list[Unit]] = {}

    def unit(self, source: str, version: str = "v1") -> Unit:
        return Unit.of(source, 10, version, self.contract.fingerprint)

    def commit(self, source: str, num_rows: int = 100, version: str = "v1") -> Receipt:
        unit = self.unit(source, version)
        receipt = Receipt(
            record_of(unit, num_rows, 1), self.contract.fingerprint, Statistics.empty(4)
        )
        self.put(receipt)
        return receipt

    def put(self, receipt: Receipt) -> None:
        assert self.store.put_if_absent(receipt.path, receipt.to_bytes())
        unit = receipt.record.unit
        self.snapshot[unit.source] = [unit]

    def write_manifest(self, *, on_missing: str = "keep") -> None:
        snapshot = dict(self.snapshot)
        write_next(
            State(self.store),
            self.contract.fingerprint,
            4,
            lambda: snapshot,
            on_missing=on_missing,
        )


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path / "out")


def test_status_bottleneck_is_of_the_latest_units(output: Output):
    threads = {"decode": 4, "encode": 1}
    for day, busy in enumerate(({"decode": 90.0, "encode": 1.0}, {"decode": 1.0, "encode": 9.0})):
        for number in range(70):
            unit = output.unit(f"{day}-{number}.tar")
            record = record_of(unit, 1, 0)
            stages = {
                stage: {"busy_s": busy[stage], "wait_s": 0.0, "num_threads": threads[stage]}
                for stage in threads
            }
            fingerprint = output.contract.fingerprint
            output.put(Receipt(record, fingerprint, Statistics.empty(4), stages=stages))
        output.write_manifest()
    status = read_status(output.url, NOWHERE)
    assert status.num_committed == 140
    assert status.bottleneck == "bottleneck: encoder (expected)"


# Watching.


class Clock:
    """Time that passes only where code waits; between two waits, the next thing happens.

    Args:
        events: what happens, and how many seconds pass with it.
    """

    def __init__(self, *events: tuple[float, Callable[[], object]], reading_s: float = 0.0) -> None:
        self.now = 0.0
        self.waited: list[float] = []
        self._events = iter(events)
        self._reading_s = reading_s

    def __call__(self) -> float:
        self.now += self._reading_s
        return self.now

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        passes_s, happen = next(self._events)
        self.now += passes_s
        happen()

    def watch(self, output: Output) -> Iterator[Watched]:
        return watch(output.url, NOWHERE, 10.0, clock=self, wait=self.wait)


def without_runs(status: Status) -> Status:
    return replace(status, active_runs=[])


def test_watch_yields_rates_and_ends_with_the_run(output: Output):
    def end() -> None:
        output.commit("4.tar")
        output.write_manifest()
        lease.__exit__()

    for number in range(2):
        output.commit(f"{number}.tar")
    lease = Lease(output.store, 3, 5)
    lease.__enter__()
    failed = output.unit("4.tar")
    clock = Clock(
        (10.0, lambda: output.commit("2.tar", num_rows=50)),
        (10.0, lambda: put_failure(output.store, failed, new_attempt(), "4.tar: broken")),
        (20.0, lambda: output.commit("3.tar")),
        (10.0, end),
    )
    seen = []
    for watched in clock.watch(output):
        seen.append(watched)
        fresh = read_status(output.url, NOWHERE)
        assert without_runs(watched.status) == without_runs(fresh), "the same, read anew"
    assert [(w.status.num_committed, w.status.num_units) for w in seen] == [
        *((2, 5), (3, 5), (3, 5), (4, 5), (5, 5))
    ]
    assert [w.rows_per_s for w in seen] == [None, 5.0, 2.5, 3.75, 5.0]
    assert [w.left_s for w in seen] == [None, 20.0, 40.0, 20.0, 0.0]
    assert [len(w.status.failed) for w in seen] == [0, 0, 1, 1, 0]
    assert [w.status.complete for w in seen] == [False, False, False, False, True]
    assert clock.waited == [10.0] * 4


def test_failures_before_a_complete_manifest_do_not_count(output: Output):
    def fail(source: str) -> None:
        put_failure(output.store, output.unit(source), new_attempt(), f"{source}: broken")

    def fail_later() -> None:
        before = set(hints())
        fail("2.tar")
        (hint,) = set(hints()) - before
        os.utime(hint, (time.time() + 10,) * 2)

    def hints() -> Iterator[Path]:
        return Path(output.url).glob("failures/*")

    fail("1.tar")
    output.commit("0.tar")
    clock = Clock(
        (10.0, lambda: output.commit("1.tar", version="replaced")),
        (10.0, output.write_manifest),
        (10.0, fail_later),
    )
    seen = []
    with Lease(output.store, 1, 2):
        for watched in itertools.islice(clock.watch(output), 4):
            seen.append(list(watched.status.failed.values()))
            assert without_runs(watched.status) == without_runs(read_status(output.url, NOWHERE))
    assert seen == [["1.tar: broken"], ["1.tar: broken"], [], ["2.tar: broken"]]


def test_time_left_is_unknown_without_an_active_run(output: Output):
    output.commit("0.tar")
    output.snapshot["1.tar"] = [output.unit("1.tar")]
    output.write_manifest()
    lease = Lease(output.store, 3, 4)
    lease.__enter__()
    clock = Clock((10.0, lambda: output.commit("2.tar")), (10.0, lease.__exit__))
    watching = clock.watch(output)
    assert [next(watching).left_s for _ in range(3)] == [None, 20.0, None]


def test_watch_reads_only_new_objects(output: Output, monkeypatch: pytest.MonkeyPatch):
    for number in range(50):
        output.commit(f"{number}.tar")
    output.write_manifest()
    output.snapshot["more.tar"] = [output.unit("more.tar")]
    output.write_manifest()  # not complete
    for number in range(50, 60):
        output.commit(f"{number}.tar")
    read: list[str] = []
    read_bytes = Store.read_bytes

    def counted(store: Store, path: str) -> bytes:
        read.append(path)
        return read_bytes(store, path)

    monkeypatch.setattr(Store, "read_bytes", counted)
    clock = Clock(
        (10.0, lambda: [output.commit(f"{number}.tar") for number in (60, 61)]),
        (10.0, lambda: None),
        (10.0, lambda: output.commit("more.tar")),
        (10.0, output.write_manifest),
    )
    reads = []
    for watched in clock.watch(output):
        reads.append((watched.status.num_committed, list(read)))
        read.clear()
    (_, first), (_, two), (_, none), (_, one), (total, _) = reads
    assert sum(path.startswith("commits/") for path in first) >= 10
    assert [len(paths) for paths in (two, none, one)] == [2 + 1, 1, 1 + 1]
    assert all(paths.count(PUBLISHED_PATH) == 1 for paths in (two, none, one)), "it may move"
    assert total == 63


def test_units_that_a_manifest_drops_do_not_count(output: Output):
    def drop() -> None:
        del output.snapshot["0.tar"]
        output.commit("1.tar", version="v2")
        output.write_manifest(on_missing="drop")

    for number in range(20):
        output.commit(f"{number}.tar")
    output.snapshot["open.tar"] = [output.unit("open.tar")]
    output.write_manifest()
    put_failure(output.store, output.unit("0.tar"), new_attempt(), "before it was committed")
    for path in Path(output.url).glob("failures/*"):
        os.utime(path, (time.time() - 60,) * 2)
    clock = Clock(
        (10.0, drop), (10.0, lambda: output.commit("open.tar")), (10.0, output.write_manifest)
    )
    seen = []
    for watched in clock.watch(output):
        seen.append(watched.status)
        assert without_runs(watched.status) == without_runs(read_status(output.url, NOWHERE))
    assert [status.num_committed for status in seen] == [20, 19, 20, 20]
    assert not any(status.failed for status in seen)


def test_removed_unit_that_fails_again_counts_as_failed(output: Output):
    name = output.commit("0.tar").record.name
    output.commit("1.tar")
    output.write_manifest()
    assert remove_units(output.store, {name}) == {name}

    def fail() -> None:
        put_failure(output.store, output.unit("0.tar"), new_attempt(), "0.tar: broken")
        for path in Path(output.url).glob("failures/*"):
            os.utime(path, (time.time() + 60,) * 2)

    seen = []
    with Lease(output.store, 1):
        for watched in itertools.islice(Clock((10.0, fail)).watch(output), 2):
            seen.append(watched.status)
            assert without_runs(watched.status) == without_runs(read_status(output.url, NOWHERE))
    assert [status.num_committed for status in seen] == [1, 1]
    assert [list(status.failed.values()) for status in seen] == [[], ["0.tar: broken"]]


def test_status_does_not_count_gc_as_a_run(output: Output):
    output.commit("0.tar")
    assert not read_status(output.url, NOWHERE).gc_at_work
    with Lease(output.store, 0, is_gc=True):
        status = read_status(output.url, NOWHERE)
        assert (status.gc_at_work, status.active_runs) == (True, [])
        text = io.StringIO()
        watched = next(watch(output.url, NOWHERE, 10.0))
        Console(file=text, width=200).print(watched.to_table(output.url))
    assert ["gc", "active"] in [line.split() for line in text.getvalue().splitlines()]


def test_watch_pauses_nine_times_as_long_as_it_reads(output: Output):
    output.commit("0.tar")
    clock = Clock((0.0, lambda: None), (0.0, output.write_manifest), reading_s=3.0)
    assert len(list(clock.watch(output))) == 3
    assert clock.waited == [27.0, 27.0]


def test_watch_table_and_line_show_counts_rates_and_escaped_failures(output: Output):
    output.commit("0.tar", num_rows=1234)
    put_failure(output.store, output.unit("1.tar"), new_attempt(), "1.tar\x1b[2J: [red]broken[/]")
    with Lease(output.store, 7, 8):
        clock = Clock((90.0, lambda: output.commit("2.tar", num_rows=4500)))
        watching = clock.watch(output)
        *_, watched = next(watching), next(watching)
    text = io.StringIO()
    Console(file=text, width=200, force_terminal=True).print(watched.to_table(output.url))
    shown = text.getvalue()
    for part in ("2 of 8 (25.0%)", "5,734, 50.0/s over the last 0:01:30", "0:09:00"):
        assert part in shown
    assert "1.tar\\x1b[2J: [red]broken[/]" in shown
    assert "\x1b[2J" not in shown
    assert watched.to_line().startswith("2/8 units, 5734 rows, 50.0 rows/s, 540 s left, 2 rejects")
