"""The units that wait for an actor, and how often each was tried."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from latentcache.dataset.receipts import Unit
from latentcache.engine.actors import Failed, Retries
from latentcache.engine.job import UnitFailure, UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.errors import AccessDenied

# From so many losses on a unit has its actor to itself: if it is what takes nodes down, as one that
# eats all their memory does, it drags no other along.
_ALONE_AFTER_LOSSES = 3


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit in an actor's hands; `alone` because an earlier attempt may have crashed its actor.

    `valid_until` counts from when it was handed out, which is before any upload.
    """

    unit: PlannedUnit
    task: UnitTask
    alone: bool
    valid_until: float


class UnitQueue:
    """Units that wait: `pending` ones, and `suspects`, each of which goes to an actor alone.

    Args:
        pending: the units to begin with.
        retries: how often a unit is tried again, before it is given up.
        may_read: whether the driver itself may read a unit's source, where an actor may not.
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
        """Queue a unit that failed again, or give it up; end the run, if no other can do better.

        Args:
            assignment: the unit.
            failure: what went wrong.
            crashed: the actor is gone too, so the unit goes alone.
        """
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
            (self.suspects if crashed else self.pending).append(unit)

    def lose(self, assignments: list[Assignment], *, has_crashed: bool) -> Iterator[Failed]:
        """Queue the units of a lost actor again.

        Only a crash with one unit in hand is that unit's failure.
        """
        if not has_crashed:
            for assignment in assignments:
                yield from self._preempted(assignment)
        elif len(assignments) == 1:
            source = assignments[0].unit.unit.source
            message = f"{source}: its actor crashed or was killed with this unit alone in hand"
            yield from self.fail(assignments[0], UnitFailure(message), crashed=True)
        else:
            self.suspects.extend(assignment.unit for assignment in assignments)

    def _preempted(self, assignment: Assignment) -> Iterator[Failed]:
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
            self.suspects.append(unit)
        else:
            self.pending.appendleft(unit)
