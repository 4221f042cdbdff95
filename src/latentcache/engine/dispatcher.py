"""The driver's loop: hands out units, two to an actor, and says what became of them.

Actors keep no state that a unit needs, so losing one costs the units it had in hand. The cluster
restarts and retries nothing: this loop does both, because it must tell a crash, which counts
against a unit, from a preemption, which does not. It knows a cluster by what `Actors` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from latentcache import clock
from latentcache.dataset.receipts import PUT_WITHIN_S, Unit, new_attempt
from latentcache.engine.actors import ActorLost, Actors, Event, Finished, Polled, Retries
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.engine.stop import StopSignal
from latentcache.engine.unit_queue import Assignment, UnitQueue
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


@dataclass(eq=False, slots=True)
class _Worker:
    """One actor as the driver sees it; `node` is None until its setup is done.

    Actors of one `wave` were asked for before any of them was lost.
    """

    actor: Any
    setup: Any
    wave: int
    node: str | None = None
    in_hand: dict[Any, Assignment] = field(default_factory=dict)
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
        self._queue = UnitQueue(pending, retries, may_read)
        self._stop = stop
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
        self._queue.pending.append(unit)

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
        return bool(self._num_in_hand or self._queue)

    def _start_actors(self) -> None:
        if self._stop.reason or len(self._workers) >= self._actors.num_actors:
            return
        busy = sum(bool(worker.in_hand) for worker in self._workers)
        wanted = min(self._actors.num_actors, len(self._queue) + busy)
        while len(self._workers) < wanted and time.monotonic() >= self._may_start_at:
            actor = self._actors.start_actor(self._job)
            worker = _Worker(actor, self._actors.call(actor, "setup"), self._wave)
            self._workers.append(worker)
            self._calls[worker.setup] = worker

    def _end_idle_actors(self) -> None:
        """With nothing left to hand out, let an autoscaler have the nodes of idle actors."""
        if self._stop.reason or not self._queue:
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
        if self._stop.reason or not self._queue:
            return
        emptiest_first = sorted(self._with_room, key=lambda worker: len(worker.in_hand))
        num_kept = len(self._queue.suspects)
        for worker in emptiest_first[:num_kept]:
            if not worker.in_hand:
                self._give(worker, self._queue.suspects.popleft(), alone=True)
        for num_in_hand in range(UNITS_PER_ACTOR):
            for worker in emptiest_first[num_kept:]:
                if self._queue.pending and len(worker.in_hand) == num_in_hand:
                    self._give(worker, self._queue.pending.popleft(), alone=False)

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
        worker.in_hand[call] = Assignment(unit, task, alone, valid_until)
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
                yield from self._queue.fail(assignment, result)

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

    def _lose(self, worker: _Worker, lost: ActorLost) -> Iterator[Event]:
        """An actor is gone: queue its units again."""
        assignments = list(worker.in_hand.values())
        self._end(worker)
        self._num_in_hand -= len(assignments)
        self._num_lost += 1
        self._back_off(worker, lost)
        yield from self._queue.lose(assignments, has_crashed=lost.has_crashed)

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
