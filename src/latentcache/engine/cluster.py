"""Ray: actors on GPUs or CPUs, and what their loss means.

Besides this file only `connection.py` and, for metrics, `prometheus.py` import ray. Ray's own
restarts and retries are off: the driver's loop, in `dispatcher.py`, does both.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from latentcache.dataset.receipts import Receipt
from latentcache.engine.actors import ActorLost
from latentcache.engine.connection import Connection, connect
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.prometheus import ActorMetrics
from latentcache.engine.sizing import NodeShape, cpus_per_actor
from latentcache.engine.versions import Versions
from latentcache.engine.waiting import NO_WAIT, Reminder, WaitPolicy
from latentcache.engine.worker import ActorRunner
from latentcache.errors import ClusterError, LatentCacheError, StorageError, first_line
from latentcache.startup import start_process

A = TypeVar("A")
B = TypeVar("B")

# Tries after the first, of work that is done again as a whole.
_RETRIES = 2

# How often somebody who waits is asked whether he lives.
_KEEP_ALIVE_EVERY_S = 1.0

# A node that is taken away in good order ends its actors first, and only then says so.
_NODE_MAY_LINGER_S = 2.0


def _device() -> str:
    return "cuda" if ray.get_gpu_ids() else "cpu"


class _EncoderActor:
    """What runs on a GPU. `__init__` cannot fail, so that a failure is told apart from a crash."""

    def __init__(self, versions: Versions, job: Job) -> None:
        start_process()
        self._versions = versions
        self._job = job
        self._runner: ActorRunner | None = None
        self._metrics = ActorMetrics(job.name)

    def setup(self) -> str | LatentCacheError:
        """Load the VAE; says which node this is, or why it cannot be used."""
        try:
            self._versions.require_here()
        except ClusterError as error:
            return error
        try:
            self._runner = ActorRunner(self._job, _device())
        except LatentCacheError as error:
            return _with_host(error)
        except RuntimeError as error:  # what torch raises of a GPU that is broken or taken
            return _with_host(ClusterError(f"cannot use its device: {first_line(error)}"))
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @ray.method(concurrency_group="units")  # type: ignore[untyped-decorator]
    def run_unit(self, task: UnitTask) -> bytes | UnitFailure:
        """Run one unit; the receipt comes back as the bytes that will be put."""
        assert self._runner
        try:
            result = self._runner.run(task)
        except torch.AcceleratorError:
            # All that this process asks of its GPU will fail from now on, whatever the unit: end as
            # a crash, which another process takes up.
            traceback.print_exc()
            os._exit(1)
        if isinstance(result, Receipt):
            return result.to_bytes()
        if result.fatal:
            return replace(result, fatal=_with_host(result.fatal))
        if result.denied:
            return replace(result, message=f"on node {socket.gethostname()}: {result.message}")
        return result

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def stats(self) -> dict[str, float]:
        """Say how far things are, to Prometheus too."""
        if self._runner is None:
            return {}
        stats = self._runner.stats()
        self._metrics.update(stats, self._runner.rejects)
        return stats


def _with_host(error: LatentCacheError) -> LatentCacheError:
    """Say on which node it is that something is wrong."""
    head, *lines = error.args
    return type(error)(f"on node {socket.gethostname()}: {head}", *lines)


def _with_device(versions: Versions, function: Callable[..., A], *arguments: Any) -> A:
    start_process()
    versions.require_here()
    return function(*arguments, _device())


class _CallingActor:
    """Calls functions; what they cache in their module stays with its process and GPU."""

    def __init__(self, versions: Versions) -> None:
        start_process()
        self._versions = versions

    def call(self, function: Callable[[A], B], item: A) -> B:
        """Call one."""
        self._versions.require_here()
        return function(item)


class Cluster:
    """A connection to Ray: a cluster of this process's own, or the one at RAY_ADDRESS.

    A `Dispatcher` drives its actors; see `engine.dispatcher.Actors`.

    Args:
        num_gpus: actors with a GPU each; 0 for actors on CPUs.
        num_cpu_actors: how many of those.
        decode_threads: CPUs that each actor asks for; None takes as many as leave all of them room.
        patience: how long to wait for a GPU, and what happens during this and other waits.

    Raises:
        ClusterError: Ray cannot be reached, has no GPU and none to come, or no room for an actor.
    """

    actor_class: type = _EncoderActor

    def __init__(
        self,
        num_gpus: int,
        num_cpu_actors: int,
        decode_threads: int | None,
        patience: WaitPolicy = NO_WAIT,
    ) -> None:
        self._connection = connect()
        self._patience = patience
        self.num_actors = num_gpus or num_cpu_actors
        self.num_gpus_per_actor = 1 if num_gpus else 0
        try:
            if num_gpus:
                _wait_for_a_gpu(self._shapes, self._connection, self._patience, num_gpus)
            self.num_cpus_per_actor = cpus_per_actor(
                self._shapes(),
                self.num_actors,
                with_gpu=num_gpus > 0,
                decode_threads=decode_threads,
            )
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _shapes(self) -> list[NodeShape]:
        """What nodes Ray has; which its autoscaler may add, none but Anyscale's tells."""
        found = [node["Resources"] for node in self._connection.ask(ray.nodes) if node["Alive"]]
        return [NodeShape(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in found]

    def ask(self, function: Callable[..., A], *arguments: Any) -> A:
        """Call a function on one worker like a run's, with its device (`cuda`, `cpu`) as the last
        argument; again if the worker is lost.

        Raises:
            ClusterError: it was lost again and again.
            LatentCacheError: what the function raised.
        """
        task = ray.remote(_with_device).options(max_retries=_RETRIES, **self._resources)
        ref = self._connection.ask(lambda: task.remote(Versions.here(), function, *arguments))
        while not ray.wait([ref], timeout=_KEEP_ALIVE_EVERY_S)[0]:
            self._connection.require_alive()
            self._patience.keep_alive()
        answer: A = _get(ref, "a worker failed")
        return answer

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Call a function on each item, on as many actors as a run would have.

        Results come in the order of the items, of which two wait for each actor. A call whose actor
        is lost, or that a store failed, is made again.

        Raises:
            ClusterError: a call was lost again and again.
            LatentCacheError: what the function raised.
        """
        items = list(items)
        actors = [self._start_caller() for _ in range(min(self.num_actors, len(items)))]
        waiting: deque[_Call] = deque()
        try:
            for number, item in enumerate(items):
                if len(waiting) == 2 * len(actors):
                    yield self._result_of(waiting.popleft(), actors)
                call = _Call(number % len(actors), function, item)
                call.make(actors)
                waiting.append(call)
            while waiting:
                yield self._result_of(waiting.popleft(), actors)
        finally:
            for actor in actors:
                ray.kill(actor)

    def _start_caller(self) -> Any:
        options = {"max_restarts": 0, "max_task_retries": 0, **self._resources}
        actor_class = ray.remote(_CallingActor).options(**options)
        return self._connection.ask(lambda: actor_class.remote(Versions.here()))

    def _result_of(self, call: _Call, actors: list[Any]) -> Any:
        """Wait for a call, and make it again if that may help."""
        for _ in range(_RETRIES):
            self._connection.wait(call.ref)
            try:
                return ray.get(call.ref)
            except RayTaskError as error:
                if not isinstance(error.cause, StorageError):
                    break
            except RayError:
                if actors[call.number] is call.actor:  # else another call of it has seen to that
                    ray.kill(call.actor)
                    actors[call.number] = self._start_caller()
            call.make(actors)
        self._connection.wait(call.ref)
        return _get(call.ref, "a call failed")

    def start_actor(self, job: Job) -> Any:
        """Ask for one more actor; it may pend until there is room."""
        actor_class = ray.remote(
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"units": UNITS_PER_ACTOR, "control": 1},
        )(self.actor_class)
        with_room = actor_class.options(**self._resources)
        return self._connection.ask(lambda: with_room.remote(Versions.here(), job))

    def call(self, actor: Any, method: str, *args: Any) -> Any:
        """Call a method of an actor."""
        return getattr(actor, method).remote(*args)

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Give the calls that have ended; wait for a first one at most that time.

        Raises:
            ClusterError: Ray itself is lost.
        """
        self._connection.require_alive()
        if not calls:
            time.sleep(timeout_s)
            return []
        ended, left = ray.wait(calls, num_returns=1, timeout=timeout_s)
        others = ray.wait(left, num_returns=len(left), timeout=0)[0] if ended and left else []
        return [*ended, *others]

    def result(self, call: Any, node: str | None) -> Any:
        """Give what a call returned; see `Actors.result`."""
        try:
            return ray.get(call)
        except RayTaskError as error:  # our own code failed outside the unit boundary
            return UnitFailure(str(error.cause))
        except RayError as error:
            if isinstance(error, ActorDiedError) and error.actor_init_failed:
                # Nothing but imports happens there; the last line of the traceback names the one.
                return ClusterError(
                    f"a worker cannot load latentcache: {str(error).strip().splitlines()[-1]}; "
                    "install the driver's packages on every node"
                )
            raise ActorLost(
                first_line(error), has_crashed=self._has_crashed(error, node)
            ) from error

    def _has_crashed(self, error: RayError, node: str | None) -> bool:
        """Tell a crash from a preemption, by whether the actor's node is still there."""
        if isinstance(error, OutOfMemoryError):
            return True
        if not isinstance(error, ActorDiedError) or error.preempted:
            return False
        deadline = time.monotonic() + _NODE_MAY_LINGER_S
        while is_alive := self._is_alive(node):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        return is_alive

    def _is_alive(self, node: str | None) -> bool:
        nodes = self._connection.ask(ray.nodes)
        return any(entry["NodeID"] == node and entry["Alive"] for entry in nodes)

    def kill(self, actor: Any) -> None:
        """End an actor, whatever it is at."""
        ray.kill(actor)

    @property
    def _resources(self) -> dict[str, int]:
        return {"num_gpus": self.num_gpus_per_actor, "num_cpus": self.num_cpus_per_actor}


@dataclass(slots=True)
class _Call:
    """A call of `Cluster.map`, in the hands of the actor of that number."""

    number: int
    function: Callable[[Any], Any]
    item: Any
    actor: Any = None
    ref: Any = None

    def make(self, actors: Sequence[Any]) -> None:
        """Make it, again if need be."""
        self.actor = actors[self.number]
        self.ref = self.actor.call.remote(self.function, self.item)


def _get(ref: Any, failure: str) -> Any:
    """Wait for a result; what went wrong is an error of ours."""
    try:
        return ray.get(ref)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, LatentCacheError):
            raise cause from error
        raise ClusterError(f"{failure}: {first_line(cause or error)}") from error


def _wait_for_a_gpu(
    shapes: Callable[[], Sequence[NodeShape]],
    connection: Connection,
    patience: WaitPolicy,
    num_actors: int,
) -> None:
    """Actors that ask for a GPU where none is or will be would pend without a word."""
    if any(shape.num_gpus for shape in shapes()):
        return
    wait_s = patience.wait_for_gpus_s
    reminder, began = Reminder(patience.say), time.monotonic()
    # An autoscaler adds a node for what pends, and for nothing else.
    task = ray.remote(_nothing).options(num_gpus=1, num_cpus=1)
    ref = connection.ask(task.remote)
    while not any(shape.num_gpus for shape in shapes()):
        left_s = began + wait_s - time.monotonic()
        if left_s <= 0:
            raise ClusterError(
                f"compute.num_gpus is {num_actors}, but Ray finds no GPU here and none to "
                f"come{f' in {wait_s:.0f} s' if wait_s else ''}; compute.wait_for_gpus_s waits "
                "for one, `--set compute.num_gpus=0` encodes on the CPU"
            )
        reminder.remind(
            f"Ray has no GPU yet: waiting {left_s:.0f} s more (compute.wait_for_gpus_s)"
        )
        patience.keep_alive()
        time.sleep(min(left_s, _KEEP_ALIVE_EVERY_S))
    ray.cancel(ref, force=True)


def _nothing() -> None:
    """A task whose only purpose is to be waited for by an autoscaler."""
