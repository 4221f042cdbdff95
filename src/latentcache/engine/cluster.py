"""Ray: actors on GPUs or CPUs, and whether a lost actor crashed or was preempted.

Besides this file only `connection.py` and, for metrics, `prometheus.py` import ray. Ray's own
restarts and retries are off: the driver's loop in `dispatcher.py` does both.
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

# The number of retries of `Cluster.ask` and `Cluster.map`, which repeat a call as a whole.
_RETRIES = 2

# The interval at which a waiting process calls `WaitPolicy.keep_alive`.
_KEEP_ALIVE_EVERY_S = 1.0

# A node that is removed in an orderly way ends its actors before it is reported as dead.
_NODE_MAY_LINGER_S = 2.0


def _device() -> str:
    return "cuda" if ray.get_gpu_ids() else "cpu"


class _EncoderActor:
    """The actor that encodes; `setup` loads it, since an error in `__init__` looks like a crash."""

    def __init__(self, versions: Versions, job: Job) -> None:
        start_process()
        self._versions = versions
        self._job = job
        self._runner: ActorRunner | None = None
        self._metrics = ActorMetrics(job.name)

    def setup(self) -> str | LatentCacheError:
        """Load the VAE; return the id of this node, or the error that prevents its use."""
        try:
            self._versions.require_here()
        except ClusterError as error:
            return error
        try:
            self._runner = ActorRunner(self._job, _device())
        except LatentCacheError as error:
            return _with_host(error)
        except RuntimeError as error:  # torch raises it for a GPU that is broken or in use
            return _with_host(ClusterError(f"cannot use its device: {first_line(error)}"))
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @ray.method(concurrency_group="units")  # type: ignore[untyped-decorator]
    def run_unit(self, task: UnitTask) -> bytes | UnitFailure:
        """Run one unit; return the bytes of its receipt, or its failure."""
        assert self._runner
        try:
            result = self._runner.run(task)
        except torch.AcceleratorError:
            # Every later GPU call of this process fails. Exit, so that the driver replaces it.
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
        """Return the statistics of the runner, and export them to Prometheus."""
        if self._runner is None:
            return {}
        stats = self._runner.stats()
        self._metrics.update(stats, self._runner.rejects)
        return stats


def _with_host(error: LatentCacheError) -> LatentCacheError:
    """Add the name of this node to an error."""
    head, *lines = error.args
    return type(error)(f"on node {socket.gethostname()}: {head}", *lines)


def _with_device(versions: Versions, function: Callable[..., A], *arguments: Any) -> A:
    start_process()
    versions.require_here()
    return function(*arguments, _device())


class _CallingActor:
    """An actor that calls functions, whose module-level caches stay with its process and GPU."""

    def __init__(self, versions: Versions) -> None:
        start_process()
        self._versions = versions

    def call(self, function: Callable[[A], B], item: A) -> B:
        """Call a function.

        Args:
            function: a picklable function.
            item: its argument.
        """
        self._versions.require_here()
        return function(item)


class Cluster:
    """A connection to Ray: a cluster of this process's own, or the one at RAY_ADDRESS.

    A `Dispatcher` drives its actors; see `engine.actors.Actors`.

    Args:
        num_gpus: the number of actors with one GPU each; 0 for actors on CPUs.
        num_cpu_actors: the number of actors on CPUs if `num_gpus` is 0.
        decode_threads: CPUs of each actor; None takes the most with which all actors fit.
        patience: how long to wait for a GPU, and what to call during this and other waits.

    Raises:
        ClusterError: Ray cannot be reached, has no GPU in time, or has no node for an actor.
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
        """Return the nodes that are alive; only Anyscale's autoscaler reports what it may add."""
        nodes = [node["Resources"] for node in self._connection.ask(ray.nodes) if node["Alive"]]
        return [NodeShape(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]

    def ask(self, function: Callable[..., A], *arguments: Any) -> A:
        """Return the result of a function on a worker like a run's; retry if the worker is lost.

        The worker's device (`cuda` or `cpu`) is the last argument of the function.

        Raises:
            ClusterError: the worker was lost repeatedly.
            LatentCacheError: the error that the function raised.
        """
        task = ray.remote(_with_device).options(max_retries=_RETRIES, **self._resources)
        ref = self._connection.ask(lambda: task.remote(Versions.here(), function, *arguments))
        while not ray.wait([ref], timeout=_KEEP_ALIVE_EVERY_S)[0]:
            self._connection.require_alive()
            self._patience.keep_alive()
        answer: A = _get(ref, "a worker failed")
        return answer

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Yield the result of a function for each item, in order, from as many actors as a run has.

        Each actor has up to two calls. A call is repeated if its actor or a store failed.

        Args:
            function: a picklable function of one item.
            items: the arguments, one per call.

        Raises:
            ClusterError: a call was lost repeatedly.
            LatentCacheError: the error that the function raised.
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
        """Return the result of a call; repeat the call if its actor or a store failed."""
        for _ in range(_RETRIES):
            self._connection.wait(call.ref)
            try:
                return ray.get(call.ref)
            except RayTaskError as error:
                if not isinstance(error.cause, StorageError):
                    break
            except RayError:
                if actors[call.number] is call.actor:  # not replaced yet
                    ray.kill(call.actor)
                    actors[call.number] = self._start_caller()
            call.make(actors)
        self._connection.wait(call.ref)
        return _get(call.ref, "a call failed")

    def start_actor(self, job: Job) -> Any:
        """Request one more actor, which may be pending until the cluster has resources for it."""
        actor_class = ray.remote(
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"units": UNITS_PER_ACTOR, "control": 1},
        )(self.actor_class)
        sized_class = actor_class.options(**self._resources)
        return self._connection.ask(lambda: sized_class.remote(Versions.here(), job))

    def call(self, actor: Any, method: str, *args: Any) -> Any:
        """Start a call of an actor's method and return its handle.

        Args:
            actor: from `start_actor`.
            method: its name; `args` are its arguments.
        """
        return getattr(actor, method).remote(*args)

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Return the calls that have ended, as `Actors.wait` does; raise if Ray itself is lost.

        Args:
            calls: calls in progress.
            timeout_s: the longest wait in seconds.
        """
        self._connection.require_alive()
        if not calls:
            time.sleep(timeout_s)
            return []
        ended, left = ray.wait(calls, num_returns=1, timeout=timeout_s)
        others = ray.wait(left, num_returns=len(left), timeout=0)[0] if ended and left else []
        return [*ended, *others]

    def result(self, call: Any, node: str | None) -> Any:
        """Return the result of a call, as `Actors.result` does.

        Args:
            call: a call that has ended.
            node: the node of its actor; None before its setup ended.
        """
        try:
            return ray.get(call)
        except RayTaskError as error:  # an error outside the unit boundary
            return UnitFailure(str(error.cause))
        except RayError as error:
            if isinstance(error, ActorDiedError) and error.actor_init_failed:
                # `__init__` only imports; the last line of the traceback names the failed import.
                return ClusterError(
                    f"a worker cannot load latentcache: {str(error).strip().splitlines()[-1]}; "
                    "install the driver's packages on every node"
                )
            raise ActorLost(
                first_line(error), has_crashed=self._has_crashed(error, node)
            ) from error

    def _has_crashed(self, error: RayError, node: str | None) -> bool:
        """Return whether an actor crashed, which is so if its node is still alive."""
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
        """End an actor at once, with all its calls."""
        ray.kill(actor)

    @property
    def _resources(self) -> dict[str, int]:
        return {"num_gpus": self.num_gpus_per_actor, "num_cpus": self.num_cpus_per_actor}


@dataclass(slots=True)
class _Call:
    """A call of `Cluster.map`, assigned to the actor with index `number`."""

    number: int
    function: Callable[[Any], Any]
    item: Any
    actor: Any = None
    ref: Any = None

    def make(self, actors: Sequence[Any]) -> None:
        """Start the call on the present actor of its number."""
        self.actor = actors[self.number]
        self.ref = self.actor.call.remote(self.function, self.item)


def _get(ref: Any, failure: str) -> Any:
    """Wait for a result; turn an error of Ray into a `LatentCacheError`."""
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
    """Wait for a first GPU or raise; without one, actors would stay pending silently."""
    if any(shape.num_gpus for shape in shapes()):
        return
    wait_s = patience.wait_for_gpus_s
    reminder, began = Reminder(patience.say), time.monotonic()
    # An autoscaler adds nodes only for pending tasks and actors.
    task = ray.remote(_nothing).options(num_gpus=1, num_cpus=1)
    ref = connection.ask(task.remote)
    while not any(shape.num_gpus for shape in shapes()):
        left_s = began + wait_s - time.monotonic()
        if left_s <= 0:
            raise ClusterError(
                f"compute.num_gpus is {num_actors}, but Ray found no "
                f"GPU{f' in {wait_s:.0f} s' if wait_s else ''}: set compute.wait_for_gpus_s to "
                "wait for one, or encode on the CPU with `--set compute.num_gpus=0`"
            )
        reminder.remind(
            f"Ray has no GPU yet: waiting {left_s:.0f} s more (compute.wait_for_gpus_s)"
        )
        patience.keep_alive()
        time.sleep(min(left_s, _KEEP_ALIVE_EVERY_S))
    ray.cancel(ref, force=True)


def _nothing() -> None:
    """Do nothing; as a pending task this makes an autoscaler add a node."""
