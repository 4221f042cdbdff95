"""Ray: one actor per GPU, units handed out by the driver, and what to do when an actor is lost.

The only file that imports ray. The driver's own loop hands out units, two to an actor, and yields
what comes back; actors keep no state that a unit needs, so losing one costs the units it had in
hand. Ray's own restarts and retries are off: this loop does both, because it must tell a crash,
which counts against a unit, from a preemption, which does not.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

# A local cluster is for this process alone; tokens would only write files into the user's home.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Warns of a change to come in how actors without GPUs see them; ours ask for none or a whole one.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Else Ray prints the errors of calls that nobody waits for any more, after the first one failed.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

import ray
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Receipt, new_attempt
from latentcache.engine.job import Job, UnitFailure, UnitTask
from latentcache.engine.plan import PlannedUnit
from latentcache.engine.settle import settle
from latentcache.engine.unit import UnitRunner
from latentcache.errors import ClusterError, LatentCacheError, StorageError
from latentcache.images.source import SourceShard
from latentcache.networks import load_lpips
from latentcache.vae.encoder import LatentEncoder, require_fp32
from latentcache.vae.examine import Examiner
from latentcache.vae.model import KLAutoencoder
from latentcache.vae.weights import encoder_fingerprint, load_vae

A = TypeVar("A")
B = TypeVar("B")

# One unit is finished while the next is fetched and decoded.
UNITS_PER_ACTOR = 2

_POLL_S = 2.0

# Tries after the first, of work that is done again as a whole.
_RETRIES = 2

# Actors lost in a row before any of them got ready: something is wrong that waiting will not mend.
_MAX_START_FAILURES = 5


@dataclass(frozen=True, slots=True)
class Finished:
    """A unit that was encoded and uploaded, and waits for its receipt to be put."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Failed:
    """A unit that was given up; `changed` says that its source is another version now."""

    task: UnitTask
    message: str
    changed: bool = False


@dataclass(frozen=True, slots=True)
class Polled:
    """What the actors said last: one dict of `UnitRunner.stats` for each, and losses so far."""

    stats: list[dict[str, float]]
    num_lost: int


Event = Finished | Failed | Polled


class StopSignal:
    """A wish to end early: no more units are handed out, and those in hand get until `deadline`.

    `deadline` is in seconds of `time.monotonic`; None lets them finish.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None

    def request(self, reason: str, grace_s: float | None = None) -> None:
        """Ask for the end; a second wish may only bring it nearer. Safe in a signal handler."""
        self.reason = self.reason or reason
        if grace_s is not None:
            wanted = time.monotonic() + grace_s
            self.deadline = min(self.deadline or wanted, wanted)

    @property
    def is_over(self) -> bool:
        """Whether the units in hand are to be given up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


class _EncoderActor:
    """What runs on a GPU. `__init__` cannot fail, so that a failure is told apart from a crash."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._runner: UnitRunner | None = None

    def setup(self) -> str | LatentCacheError:
        """Load the VAE; says which node this is, or why it cannot be used."""
        try:
            vae = _load_vae(self._job)
            examiner = _load_examiner(self._job, vae)
        except LatentCacheError as error:
            return error
        precision = self._job.contract.latents.precision
        encoder = LatentEncoder(vae, precision, self._job.batch_size)
        self._runner = UnitRunner(self._job, encoder, examiner)
        # The runner's threads fill the cores; where few can encode at once, torch's help them.
        num_encoding = self._runner.encode_pool.num_threads
        on_cpu = vae.device.type == "cpu"
        torch.set_num_threads(max(1, torch.get_num_threads() // num_encoding) if on_cpu else 1)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def run_unit(self, task: UnitTask) -> bytes | UnitFailure:
        """Run one unit; the receipt comes back as the bytes that will be put."""
        assert self._runner
        result = self._runner.run(task)
        return result.to_bytes() if isinstance(result, Receipt) else result

    def stats(self) -> dict[str, float]:
        """Say how far things are."""
        return self._runner.stats() if self._runner else {}


class _CallingActor:
    """Calls functions; what they cache in their module stays with its process and GPU."""

    def call(self, function: Callable[[A], B], item: A) -> B:
        """Call one."""
        return function(item)


def _load_vae(job: Job) -> KLAutoencoder:
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"a worker has a GPU, but its torch {torch.__version__} cannot use it: install a CUDA "
            "build there, or set compute.num_gpus to 0"
        )
    require_fp32()
    vae = load_vae(job.checkpoint, device=device, decoder=False, options=job.checkpoint_storage)
    if encoder_fingerprint(vae) != job.contract.vae.encoder_fingerprint:
        raise ClusterError(
            f"{job.checkpoint} gives a worker another encoder than it gave the driver: put the "
            "checkpoint where every node reads the same"
        )
    return vae


def _load_examiner(job: Job, vae: KLAutoencoder) -> Examiner | None:
    if not job.qa:
        return None
    decoder = load_vae(job.qa.decoder, device=vae.device, options=job.qa.decoder_storage)
    lpips = None
    if job.qa.lpips:
        url, sha256 = job.qa.lpips
        lpips = load_lpips(url, sha256, job.qa.lpips_storage, vae.device)
    return Examiner(job.contract, vae, decoder, lpips)


def _settle(job: Job, shards: Sequence[SourceShard]) -> Contract:
    return settle(_load_vae(job), job, shards)


class Cluster:
    """A connection to Ray: a cluster of this process's own, or the one at RAY_ADDRESS.

    Args:
        num_gpus: actors with a GPU each; 0 for actors on CPUs.
        num_cpu_actors: how many of those.
        decode_threads: CPUs that each actor asks for; None takes an equal share of the cluster's.

    Raises:
        ClusterError: Ray cannot be reached, or has no GPU and none to come.
    """

    def __init__(self, num_gpus: int, num_cpu_actors: int, decode_threads: int | None) -> None:
        address = os.environ.get("RAY_ADDRESS") or "local"
        arguments: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **arguments)
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            reason = _first_line(error)
            raise ClusterError(f"cannot join the Ray cluster at {address}: {reason}") from error
        try:
            self._size_actors(num_gpus, num_cpu_actors, decode_threads)
        except ClusterError:
            ray.shutdown()
            raise

    def _size_actors(self, num_gpus: int, num_cpu_actors: int, decode_threads: int | None) -> None:
        """Decide what each actor asks for; one that no node can hold would pend without a word."""
        resources = ray.cluster_resources()
        # Not a public call, but the one that Ray Data plans with; None without an autoscaler.
        offered = ray._private.state.state.get_max_resources_from_cluster_config() or {}
        if num_gpus and not resources.get("GPU") and not offered.get("GPU"):
            raise ClusterError(
                f"compute.num_gpus is {num_gpus}, but Ray finds no GPU here and none to come; "
                "`--set compute.num_gpus=0` encodes on the CPU"
            )
        self.num_actors = num_gpus or num_cpu_actors
        share = int(resources.get("CPU", 1)) // self.num_actors
        self.num_cpus_per_actor = decode_threads or max(1, min(share, 16))
        self.num_gpus_per_actor = 1 if num_gpus else 0
        largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        if self.num_cpus_per_actor > largest and not offered:
            raise ClusterError(
                f"compute.decode_threads is {decode_threads}, but the largest node has {largest} "
                "CPUs; lower it, or leave it at auto"
            )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def settle(self, job: Job, shards: Sequence[SourceShard]) -> Contract:
        """Find out on one worker what the job's contract leaves open; see `engine/settle.py`.

        Raises:
            ClusterError: the task was lost again and again.
            CheckpointError: the checkpoint cannot be read there.
            SourceError: there is no image to calibrate on.
        """
        task = ray.remote(_settle).options(max_retries=_RETRIES, **self._resources)
        contract: Contract = _get(
            task.remote(job, list(shards)), "a look at the first images failed"
        )
        return contract

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
        return ray.remote(_CallingActor).options(**options).remote()

    def _result_of(self, call: _Call, actors: list[Any]) -> Any:
        """Wait for a call, and make it again if that may help."""
        for _ in range(_RETRIES):
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
        return _get(call.ref, "a call failed")

    def start_actor(self, job: Job) -> Any:
        """Ask for one more actor; it may pend until there is room."""
        actor_class = ray.remote(
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"units": UNITS_PER_ACTOR, "control": 1},
        )(_EncoderActor)
        return actor_class.options(**self._resources).remote(job)

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
        raise ClusterError(f"{failure}: {_first_line(cause or error)}") from error


@dataclass(frozen=True, slots=True)
class _Assignment:
    """A unit in an actor's hands; `alone` because an earlier attempt may have crashed its actor."""

    unit: PlannedUnit
    task: UnitTask
    alone: bool


@dataclass(slots=True)
class _Worker:
    """One actor as the driver sees it; `node` is None until its setup is done."""

    handle: Any
    setup: Any
    node: str | None = None
    in_hand: dict[Any, _Assignment] = field(default_factory=dict)
    poll: Any = None
    stats: dict[str, float] = field(default_factory=dict)


class Dispatcher:
    """The driver's loop: keeps the actors supplied with units until all are done or given up.

    Args:
        cluster: where the actors run.
        job: what the units have in common.
        pending: the units to begin with.
        unit_retries: tries after the first, before a unit is given up.
        stop: may end the loop early.
    """

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        pending: Iterable[PlannedUnit],
        unit_retries: int,
        stop: StopSignal,
    ) -> None:
        self._cluster = cluster
        self._job = job
        self._pending = deque(pending)
        self._suspects: deque[PlannedUnit] = deque()
        self._unit_retries = unit_retries
        self._stop = stop
        self._failures: Counter[str] = Counter()
        self._workers: list[_Worker] = []
        self._num_lost = 0
        self._start_failures = 0
        self._may_start_at = 0.0
        self.qa_wanted: dict[str, int] = {}
        """QA rows wanted of each bucket, at least, from units that are handed out from now on."""

    def add(self, unit: PlannedUnit) -> None:
        """Add one more unit while the loop runs."""
        self._pending.append(unit)

    def run(self) -> Iterator[Event]:
        """Yield each unit as it ends, and what the actors say every two seconds.

        Raises:
            ClusterError: actors are lost before they get ready, again and again.
            LatentCacheError: an actor met what no other could do better: a checkpoint that cannot
                be used, a disk without room.
        """
        next_poll = time.monotonic()
        try:
            while self._has_work():
                self._start_actors()
                self._hand_out()
                if time.monotonic() >= next_poll:
                    next_poll = time.monotonic() + _POLL_S
                    self._ask_for_stats()
                    yield Polled([w.stats for w in self._workers if w.stats], self._num_lost)
                for worker, ref in self._ready():
                    yield from self._take(worker, ref)
        finally:
            for worker in self._workers:
                ray.kill(worker.handle)
            self._workers.clear()

    def _has_work(self) -> bool:
        in_hand = any(worker.in_hand for worker in self._workers)
        if self._stop.reason:
            return in_hand and not self._stop.is_over
        return bool(in_hand or self._pending or self._suspects)

    def _start_actors(self) -> None:
        waiting = len(self._pending) + len(self._suspects)
        busy = sum(bool(worker.in_hand) for worker in self._workers)
        wanted = min(self._cluster.num_actors, waiting + busy)
        if self._stop.reason or time.monotonic() < self._may_start_at:
            return
        while len(self._workers) < wanted:
            handle = self._cluster.start_actor(self._job)
            self._workers.append(_Worker(handle, handle.setup.remote()))

    def _hand_out(self) -> None:
        """Give units to the actors with the fewest; one that may have crashed an actor goes alone.

        While such a suspect waits, the emptiest actor gets nothing else until it can take it.
        """
        ready = [
            w for w in self._workers if w.node and not any(a.alone for a in w.in_hand.values())
        ]
        while ready and not self._stop.reason and (self._pending or self._suspects):
            worker = min(ready, key=lambda w: len(w.in_hand))
            if self._suspects:
                if not worker.in_hand:
                    self._give(worker, self._suspects.popleft(), alone=True)
                ready.remove(worker)
            elif len(worker.in_hand) < UNITS_PER_ACTOR:
                self._give(worker, self._pending.popleft(), alone=False)
            else:
                return

    def _give(self, worker: _Worker, unit: PlannedUnit, *, alone: bool) -> None:
        task = UnitTask(unit.unit, unit.generation, new_attempt(), self.qa_wanted)
        ref = worker.handle.run_unit.options(concurrency_group="units").remote(task)
        worker.in_hand[ref] = _Assignment(unit, task, alone)

    def _ask_for_stats(self) -> None:
        for worker in self._workers:
            if worker.node and worker.poll is None:
                worker.poll = worker.handle.stats.options(concurrency_group="control").remote()

    def _ready(self) -> list[tuple[_Worker, Any]]:
        """Wait up to a second for anything to come back."""
        owners: dict[Any, _Worker] = {}
        for worker in self._workers:
            refs = [*worker.in_hand, worker.poll, None if worker.node else worker.setup]
            owners |= {ref: worker for ref in refs if ref is not None}
        if not owners:
            time.sleep(0.1)  # all actors are lost, and the next may not start yet
            return []
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=1.0)
        return [(owners[ref], ref) for ref in ready]

    def _take(self, worker: _Worker, ref: Any) -> Iterator[Event]:
        """Take in what came back: a unit's end, an actor's readiness or figures, or its loss."""
        try:
            result = ray.get(ref)
        except RayTaskError as error:  # our own code failed outside the unit boundary
            result = UnitFailure(str(error.cause))
        except RayError as error:
            yield from self._lose(worker, error)
            return
        if ref == worker.poll:
            worker.poll = None
            if isinstance(result, dict):
                worker.stats = result
        elif ref == worker.setup:
            if isinstance(result, LatentCacheError | UnitFailure):
                raise (
                    result if isinstance(result, LatentCacheError) else ClusterError(result.message)
                )
            worker.node = result
            self._start_failures = 0
        else:
            assignment = worker.in_hand.pop(ref)
            if isinstance(result, bytes):
                yield Finished(Receipt.from_bytes(result))
            else:
                yield from self._fail(assignment, result)

    def _fail(
        self, assignment: _Assignment, failure: UnitFailure, *, crashed: bool = False
    ) -> Iterator[Event]:
        if failure.fatal:
            raise failure.fatal
        unit = assignment.unit
        self._failures[unit.unit.id] += 1
        if failure.changed or self._failures[unit.unit.id] > self._unit_retries:
            yield Failed(assignment.task, failure.message, failure.changed)
        else:
            (self._suspects if crashed else self._pending).append(unit)

    def _lose(self, worker: _Worker, error: RayError) -> Iterator[Event]:
        """An actor is gone: requeue its units. Only a crash with one unit in hand counts."""
        self._workers.remove(worker)
        ray.kill(worker.handle)
        self._num_lost += 1
        if worker.node is None:
            self._start_failures += 1
            if self._start_failures >= _MAX_START_FAILURES:
                raise ClusterError(f"actors die before they get ready: {_first_line(error)}")
        # The first loss costs no time; a row of them backs off to half a minute.
        self._may_start_at = time.monotonic() + min(30.0, 2.0**self._start_failures - 1)
        crashed = isinstance(error, OutOfMemoryError) or (
            isinstance(error, ActorDiedError) and self._is_alive(worker.node)
        )
        assignments = list(worker.in_hand.values())
        if crashed and len(assignments) == 1:
            message = "its actor crashed or was killed with this unit alone in hand"
            yield from self._fail(assignments[0], UnitFailure(message), crashed=True)
        elif crashed:
            self._suspects.extend(assignment.unit for assignment in assignments)
        else:
            self._pending.extendleft(assignment.unit for assignment in assignments)

    @staticmethod
    def _is_alive(node: str | None) -> bool:
        return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
