"""The driver's loop over nodes that come and go as hypothesis decides: every unit ends once."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from latentcache.dataset.receipts import Receipt, Unit
from latentcache.engine.dispatcher import ActorLost, Dispatcher, Failed, Finished, Retries
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.engine.waiting import StopSignal
from latentcache.errors import ClusterError
from latentcache.storage_options import StorageOptions
from makers import make_contract
from simulated import make_receipt

CONTRACT = make_contract()
UNITS = [Unit.of(f"{index}.tar", 1, "v1", CONTRACT.fingerprint) for index in range(9)]
JOB = Job(CONTRACT, "demo", StorageOptions(), StorageOptions(), "out", StorageOptions(), None, 1)

HAPPENINGS = ("done", "done", "failed", "changed", "crash", "node lost", "node added")


class Fleet:
    """Nodes with room for one or two actors each.

    One event of the script happens at a time. After the end of the script, nothing fails.
    """

    def __init__(self, num_actors: int, script: Sequence[tuple[str, int]]) -> None:
        self.num_actors = num_actors
        self.failures: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.num_lost_unready = 0
        self.now = 1000.0
        self.alive: dict[int, int | None] = {}  # actors, and the node of each that has one
        self._script = list(script)
        self._numbers = itertools.count()
        self._places: dict[int, int] = {}  # of each node
        self._calls: dict[int, tuple[int, UnitTask | None]] = {}
        self._outcomes: dict[int, Any] = {}
        self._gone: dict[int, ActorLost] = {}

    def start_actor(self, job: Job) -> int:
        actor = next(self._numbers)
        self.alive[actor] = None
        assert len(self.alive) <= self.num_actors
        return actor

    def call(self, actor: int, method: str, *args: Any) -> int:
        assert actor in self.alive, "a call to a killed actor"
        call, task = next(self._numbers), args[0] if args else None
        if task:
            assert len(self._in_hand(actor)) < UNITS_PER_ACTOR
            assert task.unit.id not in {t.unit.id for _, t in self._calls.values() if t}
        self._calls[call] = (actor, task)
        if actor in self._gone:
            self._outcomes[call] = self._gone[actor]
        elif method == "stats":
            self._outcomes[call] = {}
        elif method == "setup" and self.alive[actor] is not None:
            self._outcomes[call] = "a node"
        return call

    def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
        if not any(call in self._outcomes for call in calls):
            self.now += timeout_s
            for happening in [self._script.pop(0)] if self._script else [("node added", 0), DONE]:
                self._happen(*happening)
            self._place()
        return [call for call in calls if call in self._outcomes]

    def result(self, call: int, node: str | None) -> Any:
        actor, task = self._calls[call]
        outcome = self._outcomes.pop(call)
        in_hand = self._in_hand(actor)
        if isinstance(outcome, ActorLost):
            self.num_lost_unready += node is None
            if not outcome.has_crashed:
                self.losses.update(in_hand)
            elif len(in_hand) == 1:
                self.failures.update(in_hand)
            raise outcome
        if isinstance(outcome, UnitFailure):
            assert task
            self.failures[task.unit.source] += 1
        del self._calls[call]
        return outcome

    def kill(self, actor: int) -> None:
        del self.alive[actor]
        for call in [call for call, (of, _) in self._calls.items() if of == actor]:
            del self._calls[call]
            self._outcomes.pop(call, None)

    def _in_hand(self, actor: int) -> list[str]:
        return [t.unit.source for of, t in self._calls.values() if of == actor and t]

    def _happen(self, what: str, which: int) -> None:
        running = [(c, a, t) for c, (a, t) in self._calls.items() if t and c not in self._outcomes]
        if what == "node added":
            self._places[next(self._numbers)] = 1 + which % 2
        elif what == "node lost" and self._places:
            node = list(self._places)[which % len(self._places)]
            del self._places[node]
            for actor in [actor for actor, on in self.alive.items() if on == node]:
                self._lose(actor, has_crashed=False)
        elif running:
            call, actor, task = running[which % len(running)]
            if what == "crash":
                self._lose(actor, has_crashed=True)
            elif what == "done":
                receipt = make_receipt(CONTRACT, task.unit, task.generation, task.attempt)
                self._outcomes[call] = receipt.to_bytes()
            elif what in ("failed", "changed"):
                self._outcomes[call] = UnitFailure(what, changed=what == "changed")

    def _lose(self, actor: int, *, has_crashed: bool) -> None:
        if actor not in self._gone:
            self._gone[actor] = ActorLost("it is gone", has_crashed=has_crashed)
            for call, (of, _) in self._calls.items():
                if of == actor:  # what has ended by then may have been heard of, or not
                    self._outcomes.setdefault(call, self._gone[actor])

    def _place(self) -> None:
        """Give actors that pend a place, as far as there are free ones."""
        taken = Counter(node for actor, node in self.alive.items() if actor not in self._gone)
        for actor in [actor for actor, node in self.alive.items() if node is None]:
            free = [node for node, places in self._places.items() if taken[node] < places]
            if free:
                self.alive[actor] = free[0]
                taken[free[0]] += 1
                for call, (of, _) in self._calls.items():
                    if of == actor:
                        self._outcomes.setdefault(call, "a node")


DONE = ("done", 0)


@given(
    num_actors=st.integers(1, 4),
    num_units=st.integers(0, len(UNITS)),
    retries=st.builds(Retries, st.integers(0, 2), st.integers(0, 4)),
    script=st.lists(st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, 7)), max_size=60),
)
def test_every_unit_ends_once_within_its_retries_for_any_history_of_nodes(
    num_actors: int, num_units: int, retries: Retries, script: list[tuple[str, int]]
):
    fleet = Fleet(num_actors, script)
    pending = [PlannedUnit(unit, 0, "new") for unit in UNITS[:num_units]]
    dispatcher = Dispatcher(fleet, JOB, pending, retries, StopSignal())
    finished: list[str] = []
    failed: dict[str, Failed] = {}
    with patch.object(time, "monotonic", lambda: fleet.now):
        try:
            for event in dispatcher.run():
                if isinstance(event, Finished):
                    finished.append(Receipt.from_bytes(event.receipt).record.unit.source)
                elif isinstance(event, Failed):
                    source = event.task.unit.source
                    assert source not in failed
                    failed[source] = event
        except ClusterError:  # the script did not let any actor get ready
            assert fleet.num_lost_unready >= 5
            return
        finally:
            assert not fleet.alive, "an actor is left behind"
    assert len(finished) == len(set(finished))
    assert not failed.keys() & set(finished)
    assert failed.keys() | set(finished) == {unit.source for unit in UNITS[:num_units]}
    for source in finished:
        assert fleet.failures[source] <= retries.failures
        assert fleet.losses[source] <= retries.preemptions
    for source, event in failed.items():
        spent = fleet.failures[source] == retries.failures + 1
        lost = fleet.losses[source] == retries.preemptions + 1
        assert event.changed or spent or lost
        assert ("its node was lost" in event.message) == lost
        assert fleet.failures[source] <= retries.failures + 1
        assert fleet.losses[source] <= retries.preemptions + 1
