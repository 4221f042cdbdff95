"""The driver's loop: hands out units, two to an actor, and says what became of them.

Actors keep no state that a unit needs, so losing one costs the units it had in hand. The cluster
restarts and retries nothing: this loop does both, because it must tell a crash, which counts
against a unit, from a preemption, which does not. It knows a cluster by what `Actors` says.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from latentcache import clock
from latentcache.dataset.receipts import PUT_WITHIN_S, Unit, new_attempt
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.engine.stop import StopSignal
from latentcache.errors import (
    AccessDenied,
    ClusterError,
    DiskFull,
    LatentCacheError,
    StorageError,
)

_POLL_S = 2.0

# A call takes half a millisecond of the driver's time, of which 256 actors leave 40 for each unit.
_MAX_POLLS_PER_S = 32

# Longest waits for anything to come back, and, while all actors are lost, for one to be started.
_WAIT_S, _WAIT_FOR_ACTORS_S = 1.0, 0.1

# Times in a row that actors were lost before any got ready: waiting will not mend what is wrong.
_MAX_START_FAILURES = 5

# From so many losses on a unit has its actor to itself: if it is what takes nodes down, as one that
# eats all their memory does, it drags no other along.
_ALONE_AFTER_LOSSES = 3


class ActorLost(Exception):
    """An actor is gone; `has_crashed`, if its node is not."""

    def __init__(self, message: str, *, has_crashed: bool) -> None:
        super().__init__(message)
        self.has_crashed = has_crashed


class Actors(Protocol):
    """What the loop needs of a cluster. Actors and calls are the cluster's own, opaque here."""

    num_actors: int

    def start_actor(self, job: Job) -> Any:
        """Ask for one more actor; it may pend until there is room."""

    def call(self, actor: Any, method: Literal["setup", "run_unit", "stats"], *args: Any) -> Any:
        """Call a method of an actor; see `engine.worker.Worker`."""

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Give the calls that have ended, after at most that time; with none, wait it out."""

    def result(self, call: Any, node: str | None) -> Any:
        """Give what a call returned; `UnitFailure` for one that raised.

        Args:
            call: one that has ended.
            node: where its actor runs, as its `setup` said.

        Raises:
            ActorLost: instead of an answer.
        """

    def kill(self, actor: Any) -> None:
        """End an actor, whatever it is at."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A unit that was encoded and uploaded; `receipt` are the bytes that wait to be put.

    They are of another attempt than `task`'s where another run had put them already. They may be
    put until `valid_until`, in seconds of `clock.boot_time_s`; after that, `unit` is to be encoded
    again.
    """

    task: UnitTask
    receipt: bytes
    unit: PlannedUnit
    valid_until: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A unit that was given up.

    `changed`: its source is another version now. `lacks_field`: see `UnitFailure`.
    """

    task: UnitTask
    message: str
    changed: bool = False
    lacks_field: bool = False


@dataclass(frozen=True, slots=True)
class Polled:
    """What the actors said last: one dict of `UnitRunner.stats` for each, and losses so far."""

    stats: list[dict[str, float]]
    num_lost: int


Event = Finished | Failed | Polled


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a unit is tried again: after failures of its own, and after its actor was taken.

    The two are counted apart, for the second is nobody's fault.
    """

    failures: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class _Assignment:
    """A unit in an actor's hands; `alone` because an earlier attempt may have crashed its actor.

    `valid_until` counts from when it was handed out, which is before any upload.
    """

    unit: PlannedUnit
    task: UnitTask
    alone: bool
    valid_until: float


@dataclass(eq=False, slots=True)
class _Worker:
    """One actor as the driver sees it; `node` is None until its setup is done.

    Actors of one `wave` were asked for before any of them was lost.
    """

    actor: Any
    setup: Any
    wave: int
    node: str | None = None
    in_hand: dict[Any, _Assignment] = field(default_factory=dict)
    poll: Any = None
    stats: dict[str, float] = field(default_factory=dict)


class Dispatcher:
    """Keeps the actors supplied with units until all are done or given up.

    What a finished unit costs here does not grow with the number of units, and with the number of
    actors only by what `Actors.wait` makes of it.

    Args:
        actors: the cluster.
        job: what the units have in common.
        pending: the units to begin with.
        retries: how often a unit is tried again, before it is given up.
        stop: may end the loop early.
        may_read: whether the driver itself may read a unit's source, where an actor may not.
    """

    def __init__(
        self,
        actors: Actors,
        job: Job,
        pending: Iterable[PlannedUnit],
        retries: Retries,
        stop: StopSignal,
        may_read: Callable[[Unit], bool] = lambda unit: False,
    ) -> None:
        self._actors = actors
        self._job = job
        self._pending = deque(pending)
        self._suspects: deque[PlannedUnit] = deque()
        self._retries = retries
        self._stop = stop
        self._may_read = may_read
        self._failures: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._workers: list[_Worker] = []
        self._calls: dict[Any, _Worker] = {}  # all that are under way
        self._with_room: dict[_Worker, None] = {}  # who waits longest first
        self._num_in_hand = 0
        self._num_lost = 0
        self._start_failures = 0
        self._wave = 0
        self._may_start_at = 0.0
        self.qa_wanted: dict[str, int] = {}
        """QA rows wanted of each bucket, at least, from units that are handed out from now on."""

    def add(self, unit: PlannedUnit) -> None:
        """Add one more unit while the loop runs, or before it runs again."""
        self._pending.append(unit)

    def run(self) -> Iterator[Event]:
        """Yield each unit as it ends, and now and then what the actors say.

        Raises:
            ClusterError: actors are lost before they get ready, again and again.
            LatentCacheError: an actor met what no other could do better: a checkpoint that cannot
                be used, a disk without room; or what waiting cannot mend: a node of another
                version, or without the driver's credentials.
        """
        next_poll = time.monotonic()
        try:
            while self.has_work():
                self._hand_out()
                self._end_idle_actors()
                self._start_actors()
                if time.monotonic() >= next_poll:
                    every_s = max(_POLL_S, len(self._workers) / _MAX_POLLS_PER_S)
                    next_poll = time.monotonic() + every_s
                    self._ask_for_stats()
                    yield Polled([w.stats for w in self._workers if w.stats], self._num_lost)
                timeout_s = _WAIT_S if self._calls else _WAIT_FOR_ACTORS_S
                for call in self._actors.wait(list(self._calls), timeout_s):
                    if worker := self._calls.pop(call, None):  # else its actor was lost meanwhile
                        yield from self._take(worker, call)
        finally:
            for worker in list(self._workers):
                self._end(worker)

    def has_work(self) -> bool:
        """Whether `run` has anything to do: units in hand or to be handed out."""
        if self._stop.reason:
            return self._num_in_hand > 0 and not self._stop.is_over
        return bool(self._num_in_hand or self._pending or self._suspects)

    def _start_actors(self) -> None:
        if self._stop.reason or len(self._workers) >= self._actors.num_actors:
            return
        waiting = len(self._pending) + len(self._suspects)
        busy = sum(bool(worker.in_hand) for worker in self._workers)
        wanted = min(self._actors.num_actors, waiting + busy)
        while len(self._workers) < wanted and time.monotonic() >= self._may_start_at:
            actor = self._actors.start_actor(self._job)
            worker = _Worker(actor, self._actors.call(actor, "setup"), self._wave)
            self._workers.append(worker)
            self._calls[worker.setup] = worker

    def _end_idle_actors(self) -> None:
        """With nothing left to hand out, let an autoscaler have the nodes of those that are empty.

        So it goes with actors that still wait for a node. A unit that comes back starts one again.
        """
        if self._stop.reason or not (self._pending or self._suspects):
            for worker in [worker for worker in self._workers if not worker.in_hand]:
                self._end(worker)

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._with_room.pop(worker, None)
        for call in (worker.setup, worker.poll, *worker.in_hand):
            self._calls.pop(call, None)
        self._actors.kill(worker.actor)

    def _hand_out(self) -> None:
        """Give units to the actors with the fewest; one that may have crashed an actor goes alone.

        For each such suspect that waits, one actor gets nothing else until it is empty.
        """
        if self._stop.reason or not (self._pending or self._suspects):
            return
        emptiest_first = sorted(self._with_room, key=lambda worker: len(worker.in_hand))
        num_kept = len(self._suspects)
        for worker in emptiest_first[:num_kept]:
            if not worker.in_hand:
                self._give(worker, self._suspects.popleft(), alone=True)
        for num_in_hand in range(UNITS_PER_ACTOR):
            for worker in emptiest_first[num_kept:]:
                if self._pending and len(worker.in_hand) == num_in_hand:
                    self._give(worker, self._pending.popleft(), alone=False)

    def _give(self, worker: _Worker, unit: PlannedUnit, *, alone: bool) -> None:
        attempt = new_attempt()
        task = UnitTask(
            unit.unit,
            unit.generation,
            attempt,
            self.qa_wanted,
            files=unit.files,
            url=unit.url,
            rewrites=unit.kind == "rewrite",
        )
        valid_until = clock.boot_time_s() + PUT_WITHIN_S
        call = self._actors.call(worker.actor, "run_unit", task)
        self._calls[call] = worker
        worker.in_hand[call] = _Assignment(unit, task, alone, valid_until)
        self._num_in_hand += 1
        if alone or len(worker.in_hand) == UNITS_PER_ACTOR:
            del self._with_room[worker]

    def _ask_for_stats(self) -> None:
        for worker in self._workers:
            if worker.node and worker.poll is None:
                worker.poll = self._actors.call(worker.actor, "stats")
                self._calls[worker.poll] = worker

    def _take(self, worker: _Worker, call: Any) -> Iterator[Event]:
        """Take in what came back: a unit's end, an actor's readiness or figures, or its loss."""
        try:
            result = self._actors.result(call, worker.node)
        except ActorLost as lost:
            yield from self._lose(worker, lost)
            return
        if call == worker.poll:
            worker.poll = None
            if isinstance(result, dict):
                worker.stats = result
        elif call == worker.setup:
            yield from self._begin(worker, result)
        else:
            assignment = worker.in_hand.pop(call)
            self._num_in_hand -= 1
            self._with_room.setdefault(worker)
            if isinstance(result, bytes):
                yield Finished(assignment.task, result, assignment.unit, assignment.valid_until)
            else:
                yield from self._fail(assignment, result)

    def _begin(
        self, worker: _Worker, result: str | LatentCacheError | UnitFailure
    ) -> Iterator[Event]:
        """An actor is ready, or says why not; only a store may answer the next one better."""
        if isinstance(result, StorageError) and not isinstance(result, AccessDenied | DiskFull):
            yield from self._lose(worker, ActorLost(str(result), has_crashed=False))
        elif isinstance(result, LatentCacheError):
            raise result
        elif isinstance(result, UnitFailure):
            raise ClusterError(result.message)
        else:
            worker.node = result
            self._with_room[worker] = None
            self._start_failures = 0

    def _fail(
        self, assignment: _Assignment, failure: UnitFailure, *, crashed: bool = False
    ) -> Iterator[Event]:
        """A unit failed: try it again, or give it up; or end the run, if no other can do better."""
        if failure.fatal:
            raise failure.fatal
        unit = assignment.unit
        if failure.denied and self._may_read(unit.unit):
            raise AccessDenied(
                f"{failure.message}; the driver may, so give every node the same credentials or "
                "permissions, and the right time"
            )
        self._failures[unit.unit.id] += 1
        is_final = failure.changed or failure.lacks_field
        if is_final or self._failures[unit.unit.id] > self._retries.failures:
            yield Failed(assignment.task, failure.message, failure.changed, failure.lacks_field)
        else:
            (self._suspects if crashed else self._pending).append(unit)

    def _lose(self, worker: _Worker, lost: ActorLost) -> Iterator[Event]:
        """An actor is gone: requeue its units. Only a crash with one unit in hand is a failure."""
        assignments = list(worker.in_hand.values())
        self._end(worker)
        self._num_in_hand -= len(assignments)
        self._num_lost += 1
        self._back_off(worker, lost)
        if not lost.has_crashed:
            for assignment in assignments:
                yield from self._take_back(assignment)
        elif len(assignments) == 1:
            source = assignments[0].unit.unit.source
            message = f"{source}: its actor crashed or was killed with this unit alone in hand"
            yield from self._fail(assignments[0], UnitFailure(message), crashed=True)
        else:
            self._suspects.extend(assignment.unit for assignment in assignments)

    def _back_off(self, worker: _Worker, lost: ActorLost) -> None:
        """Decide when to start the next actor; what goes wrong for a whole wave counts once."""
        if worker.node is None and worker.wave == self._wave:
            self._wave += 1
            self._start_failures += 1
            is_hopeless = not any(other.node for other in self._workers)
            if self._start_failures >= _MAX_START_FAILURES and is_hopeless:
                raise ClusterError(f"actors die before they get ready: {lost}")
        # The first loss costs no time; a row of them backs off to half a minute.
        pause_s = min(30.0, 2.0 ** min(self._start_failures, 5) - 1)
        self._may_start_at = time.monotonic() + pause_s

    def _take_back(self, assignment: _Assignment) -> Iterator[Event]:
        """A unit's node was taken away: it goes first, unless that has happened too often."""
        unit = assignment.unit
        self._losses[unit.unit.id] += 1
        num_losses = self._losses[unit.unit.id]
        if num_losses > self._retries.preemptions:
            message = (
                f"{unit.unit.source}: its node was lost {num_losses} times while it was encoded "
                f"(compute.preemption_retries is {self._retries.preemptions})"
            )
            yield Failed(assignment.task, message)
        elif num_losses >= _ALONE_AFTER_LOSSES:
            self._suspects.append(unit)
        else:
            self._pending.appendleft(unit)
