"""The protocol between the dispatcher and a cluster, and the events of the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from latentcache.engine.job import Job, UnitTask
from latentcache.engine.plan import PlannedUnit


class ActorLost(Exception):
    """An actor is lost; `has_crashed` is True if its node is still alive."""

    def __init__(self, message: str, *, has_crashed: bool) -> None:
        super().__init__(message)
        self.has_crashed = has_crashed


class Actors(Protocol):
    """The operations that the dispatcher needs; actors and calls are opaque handles."""

    num_actors: int

    def start_actor(self, job: Job) -> Any:
        """Request one more actor, which may be pending until the cluster has resources for it."""

    def call(self, actor: Any, method: Literal["setup", "run_unit", "stats"], *args: Any) -> Any:
        """Start a call of an actor's method and return its handle.

        Args:
            actor, method, args: from `start_actor`, and the method's name and arguments.
        """

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Return the calls that have ended, as soon as there is one.

        Args:
            calls, timeout_s: without calls it waits for the whole `timeout_s`.
        """

    def result(self, call: Any, node: str | None) -> Any:
        """Return the result of a call that ended (`UnitFailure`: its error), or raise `ActorLost`.

        Args:
            call, node: `node` is what `setup` of its actor returned; None before its end.
        """

    def kill(self, actor: Any) -> None:
        """End an actor at once, with all its calls."""


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
