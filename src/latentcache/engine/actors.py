"""The protocol between the driver's loop and a cluster, and the events of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from latentcache.engine.job import Job, UnitTask
from latentcache.engine.plan import PlannedUnit


class ActorLost(Exception):
    """An actor is lost; `has_crashed` is True if its node is still alive."""

    def __init__(self, message: str, *, has_crashed: bool) -> None:
        super().__init__(message)
        self.has_crashed = has_crashed


class Actors(Protocol):
    """The operations that the loop needs of a cluster; actors and calls are opaque handles."""

    num_actors: int

    def start_actor(self, job: Job) -> Any:
        """Request one more actor, which may be pending until the cluster has resources for it."""

    def call(self, actor: Any, method: Literal["setup", "run_unit", "stats"], *args: Any) -> Any:
        """Start a call of an actor's method; return its handle.

        Args:
            actor: from `start_actor`.
            method: the name of the method; see `engine.cluster`.
            args: the arguments of the method.
        """

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Return the calls that have ended, as soon as there is one.

        Args:
            calls: calls in progress; with none, the function waits for `timeout_s`.
            timeout_s: the longest wait in seconds.
        """

    def result(self, call: Any, node: str | None) -> Any:
        """Return the result of a call; a `UnitFailure` if the call raised an error.

        Args:
            call: a call that has ended.
            node: the node of its actor, as returned by `setup`; None before the setup ended.

        Raises:
            ActorLost: the actor was lost before it returned a result.
        """

    def kill(self, actor: Any) -> None:
        """End an actor at once, with all its calls."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A unit that was encoded and uploaded; `receipt` holds the bytes to put.

    The receipt belongs to another attempt than `task` if another run has committed the unit. It may
    be put until `valid_until`, in seconds of `clock.boot_time_s`; after that, `unit` must be
    encoded again.
    """

    task: UnitTask
    receipt: bytes
    unit: PlannedUnit
    valid_until: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A unit that was given up.

    `changed` is set if its source has another version now. For `lacks_field` see `UnitFailure`.
    """

    task: UnitTask
    message: str
    changed: bool = False
    lacks_field: bool = False


@dataclass(frozen=True, slots=True)
class Polled:
    """The latest `UnitRunner.stats` of each actor, and the number of actors lost so far."""

    stats: list[dict[str, float]]
    num_lost: int


Event = Finished | Failed | Polled


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a unit is tried again: after its own failures, and after its node was lost.

    The two are counted separately, because a preemption is not caused by the unit.
    """

    failures: int
    preemptions: int
