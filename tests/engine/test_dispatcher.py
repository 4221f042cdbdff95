"""The driver's loop over simulated actors: who gets what, what a loss costs, what a unit costs.

On a clock that moves by leaps alone, so that every figure is exact.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import latentcache
from latentcache import make_plan, run
from latentcache.dataset.manifest import list_manifests
from latentcache.dataset.receipts import Receipt, Unit, list_receipt_names
from latentcache.engine import run as run_module
from latentcache.engine.dispatcher import (
    ActorLost,
    Dispatcher,
    Event,
    Failed,
    Finished,
    Polled,
    Retries,
)
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure
from latentcache.engine.plan import PlannedUnit
from latentcache.engine.waiting import StopSignal
from latentcache.errors import (
    AccessDenied,
    ClusterError,
    DiskFull,
    LatentCacheError,
    StorageError,
)
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions
from makers import make_contract
from simulated import Clock, SimulatedCluster, make_config

CONTRACT = make_contract()
UNITS = [Unit.of(f"{index:03d}.tar", 1, "v1", CONTRACT.fingerprint) for index in range(100)]
JOB = Job(CONTRACT, "demo", StorageOptions(), StorageOptions(), "out", StorageOptions(), None, 1)

CRASH, PREEMPTION = True, False


class Actors(SimulatedCluster):
    """Simulated actors that fail on demand.

    `faults` says, by source, how each attempt at it ends, as far as they do not succeed: by the
    loss of its actor (`CRASH`, `PREEMPTION`) or by a failure. `log` holds, in the order of their
    ends, the attempts with their actor's number, begin, end, and number of units in progress.
    """

    def __init__(self, num_actors: int, clock: Clock, faults: dict[str, list[Any]]) -> None:
        super().__init__(num_actors, clock, lambda unit: 1.0)
        self.faults = faults
        self.log: list[tuple[str, int, float, int]] = []
        self.most_in_hand = 0
        self.started: list[Any] = []
        self.killed: list[Any] = []
        self.num_dead_on_arrival = 0
        self.setups: list[LatentCacheError | UnitFailure] = []  # what the first ones say
        self._in_hand: Counter[Any] = Counter()
        self._calls: dict[int, tuple[Any, str, Any]] = {}

    def start_actor(self, job: Job) -> Any:
        self.started.append(super().start_actor(job))
        return self.started[-1]

    def call(self, actor: Any, method: str, *args: Any) -> int:
        call = super().call(actor, method, *args)
        self._calls[call] = (actor, method, args[0] if args else None)
        if method == "run_unit":
            self._in_hand[actor] += 1
            self.most_in_hand = max(self.most_in_hand, self._in_hand[actor])
        return call

    def result(self, call: int, node: str | None) -> Any:
        actor, method, task = self._calls.pop(call)
        assert actor not in self.killed, "a call to a dead actor"
        assert (node is None) == (method == "setup")
        if method == "setup" and self.num_dead_on_arrival:
            self.num_dead_on_arrival -= 1
            raise ActorLost("died at once", has_crashed=True)
        if method == "setup" and self.setups:
            return self.setups.pop(0)
        result = super().result(call, node)
        if method != "run_unit":
            return result
        number = self.started.index(actor)
        self.log.append((task.unit.source, number, self._clock.now(), self._in_hand[actor]))
        self._in_hand[actor] -= 1
        left = self.faults.get(task.unit.source)
        fault = left.pop(0) if left else None
        if isinstance(fault, bool):
            raise ActorLost("it is gone", has_crashed=fault)
        return fault or result

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(real=lambda: 1000.0)
    monkeypatch.setattr(time, "monotonic", clock.now)
    return clock


def planned(num_units: int) -> list[PlannedUnit]:
    return [PlannedUnit(unit, 0, "new") for unit in UNITS[:num_units]]


def dispatch(
    actors: Actors,
    num_units: int,
    *,
    retries: int = 1,
    preemptions: int = 20,
    stop: StopSignal | None = None,
    may_read: Callable[[Unit], bool] = lambda unit: False,
) -> Iterator[Event]:
    budgets = Retries(retries, preemptions)
    units = planned(num_units)
    return Dispatcher(actors, JOB, units, budgets, stop or StopSignal(), may_read).run()


def sources(events: Sequence[Event]) -> list[str]:
    """The sources of the finished units, in that order."""
    receipts = [Receipt.from_bytes(e.receipt) for e in events if isinstance(e, Finished)]
    return [receipt.record.unit.source for receipt in receipts]


def failures(events: Sequence[Event]) -> list[tuple[str, str]]:
    return [(e.task.unit.source, e.message) for e in events if isinstance(e, Failed)]


def test_units_are_dispatched_in_order_two_per_actor(clock: Clock):
    began, actors = clock.now(), Actors(4, clock, {})
    events = list(dispatch(actors, 41))
    assert sorted(sources(events)) == [unit.source for unit in UNITS[:41]]
    assert actors.most_in_hand == UNITS_PER_ACTOR
    assert clock.now() - began == 11  # 41 s of work for four
    assert Counter(number for _, number, *_ in actors.log) == {0: 11, 1: 10, 2: 10, 3: 10}
    assert len(actors.started) == len(actors.killed) == 4, "none is left behind"


def test_no_more_actors_start_than_units_exist(clock: Clock):
    actors = Actors(256, clock, {})
    assert len(sources(list(dispatch(actors, 3)))) == 3
    assert len(actors.started) == 3
    assert actors.most_in_hand == 1, "the fewest first"


def test_poll_interval_grows_with_the_number_of_actors(clock: Clock):
    for num_actors, every_s in ((2, 2.0), (96, 3.0)):
        began, actors = clock.now(), Actors(num_actors, clock, {})
        actors._unit_s = lambda unit: 60.0
        polled = [e for e in dispatch(actors, num_actors) if isinstance(e, Polled)]
        assert len(polled[-1].stats) == num_actors
        assert len(polled) == pytest.approx((clock.now() - began) / every_s, abs=2)


def test_crash_with_two_units_in_progress_fails_neither(clock: Clock):
    # The first has its actor to itself when it crashes again: with no retries left, it is given up.
    actors = Actors(2, clock, {"004.tar": [CRASH]})
    events = list(dispatch(actors, 20, retries=0))
    assert sorted(sources(events)) == [unit.source for unit in UNITS[:20]]
    assert not failures(events)
    assert [entry[0] for entry in actors.log].count("004.tar") == 2
    again = [entry for entry in actors.log if entry[0] in ("004.tar", "006.tar")][-2:]
    assert [in_hand for *_, in_hand in again] == [1, 1], "suspects run alone"
    assert len(actors.started) == 3


def test_unit_that_crashes_alone_fails_after_its_retries(clock: Clock):
    actors = Actors(2, clock, {"004.tar": [CRASH] * 9})
    events = list(dispatch(actors, 20, retries=1))
    ((source, message),) = failures(events)
    assert source == "004.tar"
    assert "crashed" in message
    assert len(actors.faults["004.tar"]) == 9 - 3, "once beside another, twice alone"
    assert sorted(sources(events)) == [u.source for u in UNITS[:20] if u.source != source]


def test_preemption_does_not_count_as_failure(clock: Clock):
    actors = Actors(2, clock, {"004.tar": [PREEMPTION] * 9})
    events = list(dispatch(actors, 20, retries=0))
    assert sorted(sources(events)) == [unit.source for unit in UNITS[:20]]
    assert not actors.faults["004.tar"]
    assert 2 + 8 <= len(actors.started) <= 2 + 9
    polled = [event for event in events if isinstance(event, Polled)]
    assert 1 <= polled[-1].num_lost <= 9


def test_unit_whose_node_is_always_lost_runs_alone_and_then_fails(clock: Clock):
    actors = Actors(1, clock, {"004.tar": [PREEMPTION] * 99})
    events = list(dispatch(actors, 20, retries=0, preemptions=4))
    ((source, message),) = failures(events)
    assert source == "004.tar"
    assert message.startswith("004.tar: its node was lost 5 times")
    assert len(actors.faults[source]) == 99 - 5
    assert sorted(sources(events)) == [u.source for u in UNITS[:20] if u.source != source]
    alone = [in_hand for name, _, _, in_hand in actors.log if name == source][-2:]
    assert alone == [1, 1], "it failed its neighbours twice, and then ran alone"


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ("lost cut lost cut lost", None),
        ("lost cut lost lost lost", "its node was lost 4 times"),
        ("cut lost cut cut", "cut"),
    ],
)
def test_failures_and_preemptions_are_counted_separately(
    clock: Clock, attempts: str, expected: str | None
):
    ends = {"lost": PREEMPTION, "cut": UnitFailure("cut")}
    actors = Actors(1, clock, {"000.tar": [ends[end] for end in attempts.split()]})
    events = list(dispatch(actors, 1, retries=2, preemptions=3))
    assert not actors.faults["000.tar"]
    if expected is None:
        assert sources(events) == ["000.tar"]
    else:
        ((_, message),) = failures(events)
        assert expected in message


def test_idle_actors_end_when_no_unit_is_pending(clock: Clock):
    actors = Actors(3, clock, {})
    actors._unit_s = lambda unit: 100.0 if unit.source == "000.tar" else 1.0
    num_alive = [
        len(actors.started) - len(actors.killed)
        for event in dispatch(actors, 6)
        if isinstance(event, Polled)
    ]
    assert num_alive[0] == 3
    assert num_alive.count(1) > 40, "at two seconds a poll, almost all the time"
    assert len(actors.started) == 3


def test_lost_unit_gets_a_new_actor_after_idle_ones_ended(clock: Clock):
    actors = Actors(2, clock, {"000.tar": [CRASH]})
    actors._unit_s = lambda unit: 100.0 if unit.source == "000.tar" else 1.0
    assert len(sources(list(dispatch(actors, 2)))) == 2
    assert len(actors.started) == 3
    assert actors.most_in_hand == 1


def test_source_denied_to_an_actor_only_ends_the_run(clock: Clock):
    denied = UnitFailure("on node n7: access to 003.tar denied", denied=True)
    with pytest.raises(AccessDenied, match=r"on node n7: .* give every node the same credentials"):
        list(dispatch(Actors(2, clock, {"003.tar": [denied]}), 10, may_read=lambda unit: True))
    # A shard that no node may read is a shard that fails.
    events = list(dispatch(Actors(2, clock, {"003.tar": [denied] * 2}), 10, retries=1))
    assert failures(events) == [("003.tar", denied.message)]
    assert len(sources(events)) == 9


def test_other_actors_continue_while_suspects_wait(clock: Clock):
    began, actors = clock.now(), Actors(8, clock, {"003.tar": [CRASH]})
    events = list(dispatch(actors, 80))
    assert sorted(sources(events)) == [unit.source for unit in UNITS[:80]]
    # Ten rounds; one more for the unit that ran twice, and one in which two actors got empty.
    assert clock.now() - began <= 12


def test_failed_unit_is_retried_unless_its_source_changed(clock: Clock):
    faults = {
        "001.tar": [UnitFailure("a cut connection")],
        "002.tar": [UnitFailure("a cut connection")] * 2,
        "003.tar": [UnitFailure("another version", changed=True)],
    }
    actors = Actors(2, clock, faults)
    events = list(dispatch(actors, 10, retries=1))
    assert dict(failures(events)) == {
        "002.tar": "a cut connection",
        "003.tar": "another version",
    }
    assert [e.changed for e in events if isinstance(e, Failed)].count(True) == 1
    assert len(sources(events)) == 8


def test_fatal_unit_failure_ends_the_run(clock: Clock):
    actors = Actors(2, clock, {"003.tar": [UnitFailure("no room", fatal=DiskFull("no room"))]})
    with pytest.raises(DiskFull):
        list(dispatch(actors, 10))
    assert len(actors.killed) == 2


def test_actors_that_never_get_ready_end_the_run_after_backoff(clock: Clock):
    began, actors = clock.now(), Actors(1, clock, {})
    actors.num_dead_on_arrival = 99
    with pytest.raises(ClusterError, match="die before they are ready: died at once"):
        list(dispatch(actors, 3))
    assert len(actors.started) == len(actors.killed) == 5
    assert clock.now() - began == pytest.approx(1 + 3 + 7 + 15, abs=1)

    actors = Actors(1, clock, {})
    actors.num_dead_on_arrival = 4
    assert len(sources(list(dispatch(actors, 3)))) == 3

    # Many that were asked for together and die together are one mishap.
    actors = Actors(30, clock, {})
    actors.num_dead_on_arrival = 30
    assert len(sources(list(dispatch(actors, 60)))) == 60
    assert len(actors.started) <= 60


def test_store_error_in_setup_is_retried_by_the_next_actor(clock: Clock):
    actors = Actors(1, clock, {})
    actors.setups = [StorageError("on node n7: cannot reach s3://vae")] * 4
    assert len(sources(list(dispatch(actors, 3)))) == 3
    assert len(actors.started) == len(actors.killed) == 5

    actors.setups = [StorageError("on node n7: cannot reach s3://vae")] * 5
    with pytest.raises(ClusterError, match="are ready: on node n7: cannot reach s3://vae"):
        list(dispatch(actors, 3))


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (AccessDenied("no credentials"), AccessDenied),
        (ClusterError("another version"), ClusterError),
        (UnitFailure("on node n7: no CUDA"), ClusterError),
    ],
)
def test_fatal_setup_error_ends_the_run(
    clock: Clock, said: LatentCacheError | UnitFailure, raised: type[LatentCacheError]
):
    actors = Actors(2, clock, {})
    actors.setups = [said]
    with pytest.raises(raised, match=said.message if isinstance(said, UnitFailure) else str(said)):
        list(dispatch(actors, 3))
    assert len(actors.started) == len(actors.killed) == 2


def test_stop_request_lets_units_in_progress_finish_until_the_deadline(clock: Clock):
    for grace_s, num_done in ((None, 6), (6.0, 6), (2.0, 4), (0.0, 4)):
        stop, done = StopSignal(), 0
        actors = Actors(2, clock, {})
        actors._unit_s = lambda unit: 5.0
        for event in dispatch(actors, 20, stop=stop):
            if isinstance(event, Finished):
                done += 1
                if done == 4:  # two by each, and each has just begun the next
                    stop.request("interrupted", grace_s)
        assert done == num_done
        assert len(actors.killed) == 2


def test_unit_added_during_the_loop_is_dispatched(clock: Clock):
    actors = Actors(1, clock, {"000.tar": [UnitFailure("another version", changed=True)]})
    dispatcher = Dispatcher(actors, JOB, planned(1), Retries(0, 0), StopSignal())
    events = []
    for event in dispatcher.run():
        events.append(event)
        if isinstance(event, Failed):
            dispatcher.add(PlannedUnit(replace(UNITS[0], version="v2"), 0, "changed"))
    assert sources(events) == ["000.tar"]


# What a unit costs the whole driver.


class Counting:
    """Counts the lines of the package that this thread runs, and what it asks of a store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_lines = 0
        self.asked: Counter[str] = Counter()
        self._package = str(Path(latentcache.__file__).parent)
        for name in ("read_bytes", "put", "put_if_absent", "list"):
            monkeypatch.setattr(Store, name, self._counted(name, getattr(Store, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def call(store: Store, path: str = "", *args: Any, **options: Any) -> Any:
            self.asked[f"{name} {path.partition('/')[0]}"] += 1
            return method(store, path, *args, **options)

        return call

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(self._package):
            return None
        self.num_lines += event == "line"
        return self._trace

    def __enter__(self) -> Counting:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def cost_of_a_run(
    folder: Path, num_units: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Counting:
    config = make_config(str(folder), num_units, 16)
    plan = make_plan(config)
    cluster = SimulatedCluster(16, clock, lambda unit: 10.0)
    monkeypatch.setattr(run_module, "Cluster", lambda *_: cluster)
    monkeypatch.setattr(run_module, "MANIFEST_EVERY_UNITS", 50)
    with monkeypatch.context() as patch, Counting(patch) as counting:
        summary = run(config, plan=plan, quiet=True)
    assert (summary.status, summary.num_committed) == ("complete", num_units)
    assert len(list_receipt_names(plan.output)) == num_units
    assert len(list_manifests(plan.output)) >= num_units // 50
    return counting


@pytest.mark.slow
def test_driver_cost_per_unit_does_not_grow_with_the_number_of_units(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    few = cost_of_a_run(tmp_path / "few", 250, clock, monkeypatch)
    many = cost_of_a_run(tmp_path / "many", 1000, clock, monkeypatch)
    assert many.num_lines / 1000 < 1.05 * few.num_lines / 250
    for counting, num_units in ((few, 250), (many, 1000)):
        num_manifests = counting.asked.pop("put_if_absent manifests")
        assert num_units // 50 <= num_manifests <= num_units // 50 + 1
        assert counting.asked.pop("put parts") == num_manifests
        assert counting.asked.pop("list manifests") == num_manifests
        assert counting.asked.pop("put_if_absent commits") == num_units
        counting.asked.pop("put runs")  # the lease, once a minute
        assert counting.asked.total() < 10, counting.asked


def test_resume_reads_manifest_parts_and_only_unnamed_receipts(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    cost_of_a_run(tmp_path, 500, clock, monkeypatch)
    newest = max((tmp_path / "manifests").iterdir())
    newest.unlink()
    with monkeypatch.context() as patch:
        counting = Counting(patch)
        plan = make_plan(make_config(str(tmp_path), 500, 16))
    assert not plan.pending
    assert plan.state.manifest
    num_named = plan.state.manifest.num_units
    assert 400 <= num_named < 500
    assert counting.asked["read_bytes parts"] == len(plan.state.manifest.parts)
    assert counting.asked["read_bytes commits"] == 500 - num_named == len(plan.state.outside)
