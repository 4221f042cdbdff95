"""What the driver's loop needs of a cluster, and what it says of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from latentcache.engine.job import Job, UnitTask
from latentcache.engine.plan import PlannedUnit


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
