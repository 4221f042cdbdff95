"""Actors on threads of this process: a run without Ray in which everything else is real."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from latentcache.dataset.receipts import Receipt
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.worker import ActorRunner


class ThreadActor:
    """One actor; as in Ray, its figures can be asked for while its units run."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._runner: ActorRunner | None = None
        self.threads = ThreadPoolExecutor(UNITS_PER_ACTOR + 1)

    def setup(self) -> str:
        self._runner = ActorRunner(self._job, "cpu")
        return "this node"

    def run_unit(self, task: UnitTask) -> bytes | UnitFailure:
        assert self._runner
        result = self._runner.run(task)
        return result.to_bytes() if isinstance(result, Receipt) else result

    def stats(self) -> dict[str, float]:
        assert self._runner
        return self._runner.totals.stats()


class ThreadCluster:
    """Stands in for `engine.cluster.Cluster`, which takes the same arguments."""

    num_gpus_per_actor = 0
    num_cpus_per_actor = 1
    num_actors = 1

    def __init__(self, *_: object) -> None:
        self.actors: list[ThreadActor] = []

    def __enter__(self) -> ThreadCluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            actor.threads.shutdown()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments, "cpu")

    def start_actor(self, job: Job) -> ThreadActor:
        self.actors.append(ThreadActor(job))
        return self.actors[-1]

    def call(self, actor: ThreadActor, method: str, *args: Any) -> Future[Any]:
        return actor.threads.submit(getattr(actor, method), *args)

    def wait(self, calls: Sequence[Future[Any]], timeout_s: float) -> list[Future[Any]]:
        if not calls:
            time.sleep(timeout_s)
        return list(wait(calls, timeout_s, FIRST_COMPLETED).done)

    def result(self, call: Future[Any], node: str | None) -> Any:
        return call.result()

    def kill(self, actor: ThreadActor) -> None:
        actor.threads.shutdown(wait=False, cancel_futures=True)
