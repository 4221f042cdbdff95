"""The queue of units that wait for an actor, with the number of tries of each."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from latentcache.dataset.receipts import Unit
from latentcache.engine.actors import Failed, Retries
from latentcache.engine.job import UnitFailure, UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.errors import AccessDenied

# After this many losses a unit runs alone on its actor. A unit that takes nodes down, for example
# by using all their memory, then takes no other unit down with it.
_ALONE_AFTER_LOSSES = 3


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit that is assigned to an actor.

    `alone` is set if an earlier attempt may have crashed its actor. The receipt may be put until
    `valid_until`, in seconds of `clock.boot_time_s`; the time counts from the dispatch, which is
    before any upload.
    """

    unit: PlannedUnit
    task: UnitTask
    alone: bool
    valid_until: float


class UnitQueue:
    """Units that wait: `pending` ones, and `suspects`, each of which runs alone on an actor.

    Args:
        pending: the first units of the queue.
        retries: how often a unit is tried again before it is given up.
        may_read: returns whether the driver itself may read the source of a unit; called when a
            store has refused that source to an actor.
    """

    def __init__(
        self,
        pending: Iterable[PlannedUnit],
        retries: Retries,
        may_read: Callable[[Unit], bool],
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
        self, assignment: Assignment, failure: UnitFailure, *, crashed: bool = False
    ) -> Iterator[Failed]:
        """Queue a failed unit again, or yield it as given up.

        Args:
            assignment: the unit.
            failure: why the attempt failed.
            crashed: the actor is lost too, so the unit becomes a suspect.

        Raises:
            AccessDenied: a store refuses an actor a source that the driver may read.
            LatentCacheError: the failure affects all units.
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
            (self.suspects if crashed else self.pending).append(unit)

    def lose(self, assignments: list[Assignment], *, has_crashed: bool) -> Iterator[Failed]:
        """Queue the units of a lost actor again.

        Only a crash with a single unit in progress counts as a failure of that unit.

        Args:
            assignments: the units of the actor.
            has_crashed: whether the actor crashed; False if its node was lost.
        """
        if not has_crashed:
            for assignment in assignments:
                yield from self._preempted(assignment)
        elif len(assignments) == 1:
            source = assignments[0].unit.unit.source
            message = f"{source}: its actor crashed or was killed while it ran this unit alone"
            yield from self.fail(assignments[0], UnitFailure(message), crashed=True)
        else:
            self.suspects.extend(assignment.unit for assignment in assignments)

    def _preempted(self, assignment: Assignment) -> Iterator[Failed]:
        """Queue a unit whose node was lost first, or yield it if that happened too often."""
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
            self.suspects.append(unit)
        else:
            self.pending.appendleft(unit)
