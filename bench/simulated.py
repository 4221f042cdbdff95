"""Runs without images: a source that is only a listing, and actors on a simulated clock.

The driver is real: it lists, plans, dispatches, puts receipts and writes manifests. The benchmarks
of the driver and of very many units use this, and so do the tests of the driver's cost per unit.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from latentcache import urls
from latentcache.config import Config, parse_config
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import DataFile, QaFile, Receipt, Unit, UnitRecord
from latentcache.dataset.statistics import HISTOGRAM_EDGES, Statistics
from latentcache.engine.job import Job, UnitTask

ROWS_PER_UNIT = 10_000
REJECTS_PER_UNIT = 3
NUM_QA_ROWS = 10

STAGES = ("fetch", "decode", "encode", "write", "qa", "upload")


class ListedFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system in which `listed://<name>/<count>` lists shards that cannot be read."""

    protocol = "listed"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List the folder as an object store does: sizes and ETags."""
        root = path.rstrip("/")
        names = [f"{root}/{number:08d}.tar" for number in range(int(root.rpartition("/")[2]))]
        if not detail:
            return names
        return [
            {"name": name, "size": 10**9 + number, "type": "file", "ETag": f'"{number:032x}"'}
            for number, name in enumerate(names)
        ]


fsspec.register_implementation("listed", ListedFileSystem, clobber=True)
urls.SCHEMES = urls.SCHEMES | {"listed"}


def make_config(output: str, num_units: int, num_actors: int, *, qa: bool = True) -> Config:
    """Return a config of `num_units` units, for actors that need no GPU."""
    tree: dict[str, Any] = {
        "name": "simulated",
        "source": {"shards": f"listed://photos/{num_units}/*.tar"},
        "transform": {"resolution_px": 256},
        "vae": {"checkpoint": "demo"},
        "output": {"url": output},
        "compute": {"num_gpus": 0, "num_cpu_actors": num_actors, "decode_threads": 1},
    }
    return parse_config(tree | ({"qa": {"min_psnr_db": 20}} if qa else {}))


def make_receipt(contract: Contract, unit: Unit, generation: int, attempt: str) -> Receipt:
    """Return a receipt like that of ten thousand photographs, with its own numbers."""
    bucket = Bucket(*contract.transform.buckets[0]).name
    stem = f"{unit.id}/{generation}-{attempt}"
    digest = unit.id * 2
    qa_file = DataFile(f"qa/{stem}.parquet", 1_400_000, digest, NUM_QA_ROWS, "")
    record = UnitRecord(
        unit=unit,
        generation=generation,
        attempt=attempt,
        num_samples=ROWS_PER_UNIT + REJECTS_PER_UNIT,
        num_rows=ROWS_PER_UNIT,
        num_rejects=REJECTS_PER_UNIT,
        files=(
            DataFile(f"data/{stem}-{bucket}.parquet", 83_000_000, digest, ROWS_PER_UNIT, bucket),
        ),
        rejects=DataFile(f"rejects/{stem}.parquet", 9000, digest, REJECTS_PER_UNIT, ""),
        qa=QaFile(
            file=qa_file, num_rows={bucket: NUM_QA_ROWS}, mean_psnr_db=31.0, min_drift_db=62.0
        ),
    )
    rng = np.random.default_rng(int(unit.id[:8], 16))
    num_channels = contract.stored_channels
    centres = np.append(HISTOGRAM_EDGES, 2 * HISTOGRAM_EDGES[-1])
    profile = ROWS_PER_UNIT * 1024 / 10 * np.exp(-(centres**2) / 32)
    statistics = Statistics(
        count=ROWS_PER_UNIT * 1024,
        mean=rng.normal(size=num_channels),
        m2=rng.normal(4e7, 1e6, num_channels),
        minimum=rng.normal(-18, 1, num_channels),
        maximum=rng.normal(18, 1, num_channels),
        histogram=rng.poisson(profile, (num_channels, len(centres))),
    )
    seconds = {
        stage: {"busy_s": 7.123456, "wait_s": 2.345678, "num_threads": 2} for stage in STAGES
    }
    versions = {"latentcache": "0.1.0", "torch": "2.13.0", "pillow": "12.0.0"}
    return Receipt(record, contract.fingerprint, statistics, stages=seconds, versions=versions)


class Clock:
    """A clock that runs with real time, and leaps while there is nothing to do but wait.

    Args:
        real: returns real seconds; a constant function leaves only the leaps.
    """

    def __init__(self, real: Callable[[], float] = time.perf_counter) -> None:
        self.unseen_cpu_s = 0.0
        """Seconds of processor time while it was stopped."""
        self._real = real
        self._ahead_s = 0.0

    def now(self) -> float:
        """Return the seconds since an arbitrary moment."""
        return self._real() + self._ahead_s

    def leap(self, seconds: float) -> None:
        """Advance the clock."""
        self._ahead_s += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock inside the context."""
        began, began_cpu = self._real(), time.thread_time()
        try:
            yield
        finally:
            self._ahead_s -= self._real() - began
            self.unseen_cpu_s += time.thread_time() - began_cpu


@dataclass(frozen=True, slots=True)
class Costs:
    """The seconds that a cluster costs its driver: for a call, a result, and a wait."""

    call_s: float = 0.0
    result_s: float = 0.0
    wait_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Actor:
    job: Job
    free_at: float = 0.0
    num_rows: int = 0


class SimulatedCluster:
    """A replacement of `engine.cluster.Cluster`, with actors that encode units one after the other.

    Args:
        num_actors: number of actors.
        clock: the clock that they advance.
        unit_s: duration of a unit in seconds.
        costs: the costs of calls.
    """

    num_cpus_per_actor = 1

    def __init__(
        self,
        num_actors: int,
        clock: Clock,
        unit_s: Callable[[Unit], float],
        costs: Costs = Costs(),
    ) -> None:
        self.num_actors = num_actors
        self.costs = costs
        self.pass_s: list[float] = []
        """Seconds of the driver between two waits."""
        self.cluster_s = 0.0
        """Seconds that `costs` came to."""
        self.num_ended = 0
        self._clock = clock
        self._unit_s = unit_s
        self._numbers = itertools.count()
        self._due: list[tuple[float, int]] = []  # the ends of calls, the soonest first
        self._results: dict[int, Callable[[], Any]] = {}
        self._woke_at: float | None = None

    def __enter__(self) -> SimulatedCluster:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start_actor(self, job: Job) -> _Actor:
        """Start an actor, which is ready at once."""
        return _Actor(job)

    def call(self, actor: _Actor, method: str, *args: Any) -> int:
        """Start a call."""
        self._spend(self.costs.call_s)
        with self._clock.stopped():
            number, now = next(self._numbers), self._clock.now()
            if method == "run_unit":
                (task,) = args
                actor.free_at = max(actor.free_at, now) + self._unit_s(task.unit)
                due, self._results[number] = actor.free_at, lambda: self._encode(actor, task)
            elif method == "stats":
                due, self._results[number] = now, lambda: self._stats(actor)
            else:
                due, self._results[number] = now, lambda: "the node"
            heapq.heappush(self._due, (due, number))
        return number

    def _encode(self, actor: _Actor, task: UnitTask) -> bytes:
        actor.num_rows += ROWS_PER_UNIT
        contract = actor.job.contract
        return make_receipt(contract, task.unit, task.generation, task.attempt).to_bytes()

    def _stats(self, actor: _Actor) -> dict[str, float]:
        busy = {f"{stage}_busy_s": actor.num_rows / 1000 for stage in STAGES}
        threads = {f"{stage}_num_threads": 2 for stage in STAGES}
        return {"num_rows": actor.num_rows, "num_rejects": 0, **threads, **busy}

    def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
        """Leap to the end of the next call, and return all calls that have ended by then."""
        if self._woke_at is not None:
            self.pass_s.append(self._clock.now() - self._woke_at)
        self._spend(self.costs.wait_s)
        with self._clock.stopped():
            due = self._due[0][0] if self._due else np.inf
            self._clock.leap(min(max(0.0, due - self._clock.now()), timeout_s))
            ended, now = [], self._clock.now()
            while self._due and self._due[0][0] <= now:
                ended.append(heapq.heappop(self._due)[1])
        self.num_ended += len(ended)
        self._woke_at = self._clock.now()
        return ended

    def result(self, call: int, node: str | None) -> Any:
        """Return the result of a call."""
        self._spend(self.costs.result_s)
        with self._clock.stopped():
            return self._results.pop(call)()

    def kill(self, actor: _Actor) -> None:
        """End an actor."""

    def _spend(self, seconds: float) -> None:
        self._clock.leap(seconds)
        self.cluster_s += seconds
