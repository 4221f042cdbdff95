"""Ray: actors on GPUs or CPUs, and whether a lost actor crashed or was preempted.

Ray does not restart actors or retry their calls: the driver's loop in `dispatcher.py` does.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

import ray
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from latentcache.dataset.receipts import Receipt
from latentcache.engine.connection import connect
from latentcache.engine.dispatcher import ActorLost
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.nodes import NodeShape, Versions, cpus_per_actor
from latentcache.engine.prometheus import ActorMetrics
from latentcache.engine.waiting import NO_WAIT, Reminder, WaitPolicy
from latentcache.engine.worker import ActorRunner
from latentcache.errors import ClusterError, LatentCacheError, StorageError, first_line
from latentcache.startup import start_process

A = TypeVar("A")
B = TypeVar("B")

# How often a call of `Workers.map` is repeated.
_RETRIES = 2

# The interval at which a waiting process calls `WaitPolicy.keep_alive`.
_KEEP_ALIVE_EVERY_S = 1.0

# A node that is removed in an orderly way ends its actors before it is reported as dead.
_NODE_MAY_LINGER_S = 2.0


def _device() -> str:
    return "cuda" if ray.get_gpu_ids() else "cpu"


def _call_with_device(function: Callable[..., A], arguments: Sequence[Any]) -> A:
    return function(*arguments, _device())


class _CallingActor:
    """An actor that calls functions, whose module-level caches stay with its process and GPU."""

    def __init__(self, versions: Versions) -> None:
        start_process()
        self._versions = versions

    def call(self, function: Callable[[A], B], item: A) -> B:
        self._versions.require_here()
        return function(item)


class Workers:
    """A connection to Ray, which calls functions on actors; see `connect` and `cpus_per_actor`.

    It has `num_gpus` actors with one GPU each or, if that is 0, `num_cpu_actors` on CPUs. Raises a
    `ClusterError` if Ray cannot be reached, has no GPU in time, or has no node for an actor.
    """

    def __init__(
        self,
        num_gpus: int,
        num_cpu_actors: int,
        decode_threads: int | None,
        wait_policy: WaitPolicy = NO_WAIT,
    ) -> None:
        self._wait_policy = wait_policy
        self.num_actors = num_gpus or num_cpu_actors
        self.num_gpus_per_actor = 1 if num_gpus else 0
        self._connection = connect()
        try:
            if num_gpus:
                self._wait_for_a_gpu()
            self.num_cpus_per_actor = cpus_per_actor(
                self._shapes(),
                self.num_actors,
                with_gpu=num_gpus > 0,
                decode_threads=decode_threads,
            )
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _wait_for_a_gpu(self) -> None:
        """Wait for a first GPU or raise; without one, actors would stay pending silently."""
        if self._has_gpu():
            return
        wait_s = self._wait_policy.wait_for_gpus_s
        reminder, began = Reminder(self._wait_policy.say), time.monotonic()
        # An autoscaler adds nodes only for pending tasks and actors.
        task = ray.remote(_device).options(num_gpus=1, num_cpus=1)
        ref = self._connection.ask(task.remote)
        while not self._has_gpu():
            left_s = began + wait_s - time.monotonic()
            if left_s <= 0:
                raise ClusterError(
                    f"compute.num_gpus is {self.num_actors}, but Ray found no "
                    f"GPU{f' in {wait_s:.0f} s' if wait_s else ''}: set compute.wait_for_gpus_s to "
                    "wait for one, or encode on the CPU with `--set compute.num_gpus=0`"
                )
            reminder.remind(
                f"Ray has no GPU yet: waiting {left_s:.0f} s more (compute.wait_for_gpus_s)"
            )
            self._wait_policy.keep_alive()
            time.sleep(min(left_s, _KEEP_ALIVE_EVERY_S))
        ray.cancel(ref, force=True)

    def _has_gpu(self) -> bool:
        return any(shape.num_gpus for shape in self._shapes())

    def _shapes(self) -> list[NodeShape]:
        """Return the nodes that are alive; only Anyscale's autoscaler reports what it may add."""
        nodes = [node["Resources"] for node in self._connection.ask(ray.nodes) if node["Alive"]]
        return [NodeShape(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]

    def ask(self, function: Callable[..., A], *arguments: Any) -> A:
        """Return the result of a function on an actor; its last argument is `cuda` or `cpu`."""
        (answer,) = self.map(partial(_call_with_device, function), [arguments])
        return answer

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Yield the result of a function for each item, in order, from as many actors as a run has.

        Each actor has up to two calls. A call is repeated if its actor or a store failed. The last
        error is raised: that of the function, or a `ClusterError`.

        Args:
            function, items: the function is picklable.
        """
        items = list(items)
        actors = [self._start_caller() for _ in range(min(self.num_actors, len(items)))]

        def start(number: int) -> tuple[int, Any, Any]:
            actor = actors[number % len(actors)]
            return number, actor, actor.call.remote(function, items[number])

        def finish(number: int, actor: Any, call: Any, num_retries: int = _RETRIES) -> Any:
            while not ray.wait([call], timeout=_KEEP_ALIVE_EVERY_S)[0]:
                self._connection.require_alive()
                self._wait_policy.keep_alive()
            try:
                return ray.get(call)
            except RayError as error:
                cause = getattr(error, "cause", None)
                is_lost = not isinstance(error, RayTaskError)
                if not num_retries or not (is_lost or isinstance(cause, StorageError)):
                    if isinstance(cause, LatentCacheError):
                        raise cause from error
                    raise ClusterError(f"a worker failed: {first_line(cause or error)}") from error
                if is_lost and actors[number % len(actors)] is actor:  # not replaced yet
                    ray.kill(actor)
                    actors[number % len(actors)] = self._start_caller()
            return finish(*start(number), num_retries - 1)

        calls: deque[tuple[int, Any, Any]] = deque()
        try:
            for number in range(len(items)):
                if len(calls) == 2 * len(actors):
                    yield finish(*calls.popleft())
                calls.append(start(number))
            while calls:
                yield finish(*calls.popleft())
        finally:
            for actor in actors:
                ray.kill(actor)

    def _start_caller(self) -> Any:
        # Ray's own retries are used up while an actor restarts, so `map` retries itself.
        actor_class = ray.remote(_CallingActor).options(**self._resources)
        return self._connection.ask(lambda: actor_class.remote(Versions.here()))

    @property
    def _resources(self) -> dict[str, int]:
        return {"num_gpus": self.num_gpus_per_actor, "num_cpus": self.num_cpus_per_actor}


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
        if self._runner is None:
            return {}
        self._metrics.update_totals(self._runner.totals)
        return self._runner.totals.stats()


def _with_host(error: LatentCacheError) -> LatentCacheError:
    """Add the name of this node to an error."""
    head, *lines = error.args
    return type(error)(f"on node {socket.gethostname()}: {head}", *lines)


class Cluster(Workers):
    """The actors of a run, which a `Dispatcher` drives."""

    actor_class: type = _EncoderActor

    def start_actor(self, job: Job) -> Any:
        """Request one more actor, which may be pending until the cluster has resources for it."""
        groups = {"units": UNITS_PER_ACTOR, "control": 1}
        actor_class = ray.remote(concurrency_groups=groups, **self._resources)(self.actor_class)
        return self._connection.ask(lambda: actor_class.remote(Versions.here(), job))

    def call(self, actor: Any, method: str, *args: Any) -> Any:
        """Start a call of an actor's method and return its handle.

        Args:
            actor, method, args: from `start_actor`, and the name of its method and the arguments.
        """
        return getattr(actor, method).remote(*args)

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Return the calls that have ended, as soon as there is one; raise if Ray itself is lost.

        Args:
            calls, timeout_s: without calls it waits for the whole `timeout_s`.
        """
        self._connection.require_alive()
        if not calls:
            time.sleep(timeout_s)
            return []
        ended, left = ray.wait(calls, num_returns=1, timeout=timeout_s)
        others = ray.wait(left, num_returns=len(left), timeout=0)[0] if ended and left else []
        return [*ended, *others]

    def result(self, call: Any, node: str | None) -> Any:
        """Return the result of a call that ended (`UnitFailure`: its error), or raise `ActorLost`.

        Args:
            call, node: `node` is what `setup` of its actor returned; None before its end.
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
            has_crashed = self._has_crashed(error, node)
            raise ActorLost(first_line(error), has_crashed=has_crashed) from error

    def _has_crashed(self, error: RayError, node: str | None) -> bool:
        """Return whether an actor crashed, which is so if its node is still alive."""
        if isinstance(error, OutOfMemoryError):
            return True
        if not isinstance(error, ActorDiedError) or error.preempted:
            return False
        deadline = time.monotonic() + _NODE_MAY_LINGER_S
        while any(n["NodeID"] == node and n["Alive"] for n in self._connection.ask(ray.nodes)):
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.1)
        return False

    def kill(self, actor: Any) -> None:
        """End an actor at once, with all its calls."""
        ray.kill(actor)
