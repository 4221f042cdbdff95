"""The dispatcher: it assigns units to actors, two to each, and yields their results.

The loss of an actor costs only its units in progress. The cluster restarts and retries nothing. The
dispatcher does both, because it distinguishes a crash, which counts against a unit, from a
preemption, which does not.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from latentcache import clock
from latentcache.dataset.receipts import PUT_WITHIN_S, Unit, new_attempt
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.engine.waiting import StopSignal
from latentcache.errors import AccessDenied, ClusterError, DiskFull, LatentCacheError, StorageError

_POLL_S = 2.0

# A call takes half a millisecond of the driver's time. With 256 actors the driver has 40 ms for
# each unit.
_MAX_POLLS_PER_S = 32

# The longest waits: for a call to end, and, while all actors are lost, until one may be started.
_WAIT_S, _WAIT_FOR_ACTORS_S = 1.0, 0.1

# After this many consecutive losses before any actor was ready, waiting will not remove the cause.
_MAX_START_FAILURES = 5

# After this many losses a unit runs alone on its actor. A unit that takes nodes down, for example
# by using all their memory, then takes no other unit down with it.
_ALONE_AFTER_LOSSES = 3


class ActorLost(Exception):
    """An actor is lost; `has_crashed` is True if its node is still alive."""

    def __init__(self, message: str, *, has_crashed: bool) -> None:
        super().__init__(message)
        self.has_crashed = has_crashed


class Finished(NamedTuple):
    """A unit that was encoded and uploaded, with the bytes of the receipt to put.

    The receipt is of another attempt than `task` if another run has committed the unit. It must not
    be put after `valid_until`, in seconds of `clock.boot_time_s`.
    """

    task: UnitTask
    receipt: bytes
    unit: PlannedUnit
    valid_until: float


class Failed(NamedTuple):
    """A unit that failed for good; for `changed` and `lacks_field` see `UnitFailure`."""

    task: UnitTask
    message: str
    changed: bool = False
    lacks_field: bool = False


class Polled(NamedTuple):
    """The latest `UnitRunner.stats` of each actor, and the number of actors lost so far."""

    stats: list[dict[str, float]]
    num_lost: int


Event = Finished | Failed | Polled


class Retries(NamedTuple):
    """How often a unit is tried again after its own failures, and after losses of its node."""

    failures: int
    preemptions: int


class _Actors(Protocol):
    """The operations of a `Cluster` that the dispatcher needs; actors and calls are opaque."""

    num_actors: int

    def start_actor(self, job: Job) -> Any: ...
    def call(self, actor: Any, method: str, *args: Any) -> Any: ...
    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]: ...
    def result(self, call: Any, node: str | None) -> Any: ...
    def kill(self, actor: Any) -> None: ...


class _Assignment(NamedTuple):
    """A unit on an actor; its receipt may be put until `valid_until`, counted from the dispatch."""

    unit: PlannedUnit
    task: UnitTask
    valid_until: float


@dataclass(eq=False, slots=True)
class _Worker:
    """An actor with its calls; actors of one `wave` were requested before any of them was lost."""

    actor: Any
    setup: Any
    wave: int
    node: str | None = None  # until its setup is done
    assigned: dict[Any, _Assignment] = field(default_factory=dict)
    poll: Any = None
    stats: dict[str, float] = field(default_factory=dict)


class _UnitQueue:
    """The units that wait: `pending` ones, and `suspects`, each of which runs alone on an actor."""

    def __init__(
        self, pending: Iterable[PlannedUnit], retries: Retries, may_read: Callable[[Unit], bool]
    ) -> None:
        self.pending = deque(pending)
        self.suspects: deque[PlannedUnit] = deque()
        self._retries = retries
        self._may_read = may_read
        self._failures: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.pending) + len(self.suspects)

    def fail(
        self, assignment: _Assignment, failure: UnitFailure, *, is_suspect: bool = False
    ) -> Iterator[Failed]:
        """Queue a failed unit again, or yield it if it is not tried again.

        Args:
            assignment, failure, is_suspect: a suspect runs alone next.
        """
        if failure.fatal:
            raise failure.fatal
        unit = assignment.unit
        if failure.denied and self._may_read(unit.unit):
            raise AccessDenied(
                f"{failure.message}; the driver has access, so give every node the same "
                "credentials or permissions, and the right time"
            )
        self._failures[unit.unit.id] += 1
        is_final = failure.changed or failure.lacks_field
        if is_final or self._failures[unit.unit.id] > self._retries.failures:
            yield Failed(assignment.task, failure.message, failure.changed, failure.lacks_field)
        else:
            (self.suspects if is_suspect else self.pending).append(unit)

    def lose(self, assignments: list[_Assignment], *, has_crashed: bool) -> Iterator[Failed]:
        """Queue the units of a lost actor again, or yield those that are not tried again.

        Only a crash with a single unit in progress counts as a failure of that unit.

        Args:
            assignments, has_crashed: False if the node of the actor was lost.
        """
        if has_crashed and len(assignments) == 1:
            source = assignments[0].unit.unit.source
            message = f"{source}: its actor crashed or was killed while it ran this unit alone"
            yield from self.fail(assignments[0], UnitFailure(message), is_suspect=True)
            return
        for unit, task, _ in assignments:
            if has_crashed:
                self.suspects.append(unit)
                continue
            self._losses[unit.unit.id] += 1
            num_losses = self._losses[unit.unit.id]
            if num_losses > self._retries.preemptions:
                yield Failed(
                    task,
                    f"{unit.unit.source}: its node was lost {num_losses} times while it was "
                    f"encoded (compute.preemption_retries is {self._retries.preemptions})",
                )
            elif num_losses >= _ALONE_AFTER_LOSSES:
                self.suspects.append(unit)
            else:
                self.pending.appendleft(unit)


class Dispatcher:
    """A loop that supplies actors with units until all units are done or have failed.

    The cost of a finished unit does not grow with the number of units. It grows with the number of
    actors only by the cost of `Cluster.wait`. `stop` ends the loop early when it has a reason.
    `may_read` returns whether the driver may read a source that a store refused to an actor.
    """

    def __init__(
        self,
        actors: _Actors,
        job: Job,
        pending: Iterable[PlannedUnit],
        retries: Retries,
        stop: StopSignal,
        may_read: Callable[[Unit], bool] = lambda unit: False,
    ) -> None:
        self._actors = actors
        self._job = job
        self._queue = _UnitQueue(pending, retries, may_read)
        self._stop = stop
        self._workers: list[_Worker] = []
        self._calls: dict[Any, _Worker] = {}  # all calls in progress
        self._available: dict[_Worker, None] = {}  # can take a unit; longest waiting first
        self._num_assigned = 0
        self._num_lost = 0
        self._start_failures = 0
        self._wave = 0
        self._may_start_at = 0.0
        self.min_qa_rows: dict[str, int] = {}
        """The least number of QA rows, by bucket, for units that are dispatched from now on."""

    def add(self, unit: PlannedUnit) -> None:
        """Add a unit, while the loop runs or before it runs again."""
        self._queue.pending.append(unit)

    def run(self) -> Iterator[Event]:
        """Yield each unit as it ends, and regularly the statistics of the actors.

        Raises:
            LatentCacheError: an error affects all actors, or they are lost before they are ready.
        """
        next_poll = time.monotonic()
        try:
            while self.has_work():
                if self._queue and not self._stop.reason:
                    self._assign_units()
                if self._queue and not self._stop.reason:
                    self._start_actors()
                else:  # no idle actor gets a unit any more, and an autoscaler may remove its node
                    for worker in [worker for worker in self._workers if not worker.assigned]:
                        self._end(worker)
                if time.monotonic() >= next_poll:
                    every_s = max(_POLL_S, len(self._workers) / _MAX_POLLS_PER_S)
                    next_poll = time.monotonic() + every_s
                    for worker in self._workers:
                        if worker.node and worker.poll is None:
                            worker.poll = self._actors.call(worker.actor, "stats")
                            self._calls[worker.poll] = worker
                    yield Polled([w.stats for w in self._workers if w.stats], self._num_lost)
                timeout_s = _WAIT_S if self._calls else _WAIT_FOR_ACTORS_S
                for call in self._actors.wait(list(self._calls), timeout_s):
                    if caller := self._calls.pop(call, None):  # else its actor was lost
                        yield from self._process(caller, call)
        finally:
            for worker in list(self._workers):
                self._end(worker)

    def has_work(self) -> bool:
        """Return whether `run` has units in progress or to dispatch."""
        if self._stop.reason:
            return self._num_assigned > 0 and not self._stop.is_over
        return bool(self._num_assigned or self._queue)

    def _start_actors(self) -> None:
        num_busy = sum(bool(worker.assigned) for worker in self._workers)
        num_useful = min(self._actors.num_actors, len(self._queue) + num_busy)
        while len(self._workers) < num_useful and time.monotonic() >= self._may_start_at:
            actor = self._actors.start_actor(self._job)
            worker = _Worker(actor, self._actors.call(actor, "setup"), self._wave)
            self._workers.append(worker)
            self._calls[worker.setup] = worker

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._available.pop(worker, None)
        for call in (worker.setup, worker.poll, *worker.assigned):
            self._calls.pop(call, None)
        self._actors.kill(worker.actor)

    def _assign_units(self) -> None:
        """Assign units to the actors with the fewest units.

        A suspect runs alone: for each, one actor gets no further units until it is empty.
        """
        emptiest_first = sorted(self._available, key=lambda worker: len(worker.assigned))
        num_reserved = len(self._queue.suspects)
        for worker in emptiest_first[:num_reserved]:
            if not worker.assigned:
                self._assign(worker, self._queue.suspects.popleft())
                self._available.pop(worker, None)
        for num_assigned in range(UNITS_PER_ACTOR):
            for worker in emptiest_first[num_reserved:]:
                if self._queue.pending and len(worker.assigned) == num_assigned:
                    self._assign(worker, self._queue.pending.popleft())

    def _assign(self, worker: _Worker, unit: PlannedUnit) -> None:
        task = UnitTask(
            unit.unit,
            unit.generation,
            new_attempt(),
            self.min_qa_rows,
            files=unit.files,
            url=unit.url,
            rewrites=unit.kind == "rewrite",
        )
        valid_until = clock.boot_time_s() + PUT_WITHIN_S
        call = self._actors.call(worker.actor, "run_unit", task)
        self._calls[call] = worker
        worker.assigned[call] = _Assignment(unit, task, valid_until)
        self._num_assigned += 1
        if len(worker.assigned) == UNITS_PER_ACTOR:
            del self._available[worker]

    def _process(self, worker: _Worker, call: Any) -> Iterator[Event]:
        """Process a call that has ended: a unit, a setup, statistics, or the loss of its actor."""
        try:
            result = self._actors.result(call, worker.node)
        except ActorLost as lost:
            yield from self._lose(worker, lost)
            return
        if call == worker.poll:
            worker.poll = None
            if isinstance(result, dict):
                worker.stats = result
        elif call != worker.setup:
            unit, task, valid_until = assignment = worker.assigned.pop(call)
            self._num_assigned -= 1
            self._available.setdefault(worker)
            if isinstance(result, bytes):
                yield Finished(task, result, unit, valid_until)
            else:
                yield from self._queue.fail(assignment, result)
        elif isinstance(result, StorageError) and not isinstance(result, AccessDenied | DiskFull):
            # A store may answer the next actor, so its error only counts as the loss of this one.
            yield from self._lose(worker, ActorLost(str(result), has_crashed=False))
        elif isinstance(result, LatentCacheError):
            raise result
        elif isinstance(result, UnitFailure):
            raise ClusterError(result.message)
        else:
            worker.node = result
            self._available[worker] = None
            self._start_failures = 0

    def _lose(self, worker: _Worker, lost: ActorLost) -> Iterator[Event]:
        """Queue the units of a lost actor again, and set when the next actor may start."""
        assignments = list(worker.assigned.values())
        self._end(worker)
        self._num_assigned -= len(assignments)
        self._num_lost += 1
        if worker.node is None and worker.wave == self._wave:  # the failures of a wave count once
            self._wave += 1
            self._start_failures += 1
            is_hopeless = not any(other.node for other in self._workers)
            if self._start_failures >= _MAX_START_FAILURES and is_hopeless:
                raise ClusterError(f"actors die before they are ready: {lost}")
        # The first loss costs no time. Consecutive losses back off to half a minute.
        pause_s = min(30.0, 2.0 ** min(self._start_failures, 5) - 1)
        self._may_start_at = time.monotonic() + pause_s
        yield from self._queue.lose(assignments, has_crashed=lost.has_crashed)
