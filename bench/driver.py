"""Measure the cost of the driver: 256 simulated actors in the real loop, and 8 real ones in Ray.

`make bench`, or `python bench/driver.py [--units 20000] [--actors 256] [--unit-s 10]`. The first
part uses Ray: 8 actors sleep through units of 0.2 s. It shows the share of the ideal rate, and the
cost of a call, a result and a wait. The second part is a whole run without images and Ray, on a
clock that leaps while the driver waits and runs while it works. Plan, loop, receipts and manifests
are real and go to a local folder, and each call costs the driver what Ray took. If the driver is
too slow, its actors wait. The benchmark prints both parts and writes bench/results/driver.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from harness import peak_mib, print_table, write_results
from latentcache import RunSummary, make_plan, run
from latentcache.config import Config
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Unit
from latentcache.dataset.state import write_next
from latentcache.engine import run as run_module
from latentcache.engine import work as work_module
from latentcache.engine.cluster import Cluster
from latentcache.engine.commit import Committer
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitTask
from latentcache.engine.nodes import Versions
from simulated import Clock, Costs, SimulatedCluster, make_config, make_receipt

DATA = Path(__file__).parent / ".data"
RAY_ACTORS, RAY_UNIT_S = 8, 0.2


class SleepingActor:
    """An actor that sleeps through units, one after the other."""

    def __init__(self, versions: Versions, job: Job) -> None:
        self._contract: Contract = job.contract
        self._folder = Path(job.output_url.removeprefix("file://"), "ready")
        self._encoder = threading.Lock()

    def setup(self) -> str:
        """Wait for the other actors, so that all start at once; return the node."""
        self._folder.mkdir(exist_ok=True)
        (self._folder / str(os.getpid())).touch()
        while len(list(self._folder.iterdir())) < RAY_ACTORS:
            time.sleep(0.01)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @ray.method(concurrency_group="units")  # type: ignore[untyped-decorator]
    def run_unit(self, task: UnitTask) -> bytes:
        """Sleep, and return a receipt."""
        with self._encoder:
            time.sleep(RAY_UNIT_S)
        return make_receipt(self._contract, task.unit, task.generation, task.attempt).to_bytes()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def stats(self) -> dict[str, float]:
        """Return no statistics."""
        return {}


class Waiting:
    """An actor that accepts very many calls at once."""

    def sleep(self, seconds: float) -> None:
        """Sleep through one call."""
        time.sleep(seconds)


class SleepingCluster(Cluster):
    """A cluster of real Ray actors that need no CPU, so that any number fits."""

    actor_class = SleepingActor
    ready_at = ended_at = 0.0

    @property
    def _resources(self) -> dict[str, int]:
        return {"num_gpus": 0, "num_cpus": 0}

    def result(self, call: Any, node: str | None) -> Any:
        """Record when the last actor was ready, and when the last unit was done."""
        figures = super().result(call, node)
        if isinstance(figures, str):
            type(self).ready_at = time.monotonic()
        elif isinstance(figures, bytes):
            type(self).ended_at = time.monotonic()
        return figures


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Call a function and record how long it took."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def measure_ray(num_units: int) -> dict[str, float]:
    """Measure a run over real actors: the units it loses, and its cost for the driver."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(folder, num_units, RAY_ACTORS)
        plan = make_plan(config)
        calls: list[float] = []
        results: list[float] = []
        with (
            patch.object(run_module, "Cluster", SleepingCluster),
            patch.object(Cluster, "call", timed(Cluster.call, calls)),
            patch.object(Cluster, "result", timed(Cluster.result, results)),
        ):
            began_cpu = time.process_time()
            summary = run(config, plan=plan, quiet=True)
            cpu_s = time.process_time() - began_cpu
    assert summary.status == "complete", summary
    return {
        "num_actors": RAY_ACTORS,
        "num_units": num_units,
        "unit_s": RAY_UNIT_S,
        "ideal_s": num_units * RAY_UNIT_S / RAY_ACTORS,
        "elapsed_s": SleepingCluster.ended_at - SleepingCluster.ready_at,
        "cpu_ms_per_unit": 1e3 * cpu_s / num_units,
        "call_ms": 1e3 * statistics.median(calls),
        "result_ms": 1e3 * statistics.median(results),
    }


def measure_wait(num_calls: int) -> float:
    """Return the seconds of one wait for this many calls, some of which have ended."""
    with Cluster(0, 1, 1) as cluster:
        actor = ray.remote(num_cpus=0, max_concurrency=num_calls)(Waiting).remote()
        calls = [actor.sleep.remote(0 if number < 8 else 60) for number in range(num_calls)]
        ray.get(calls[:8])
        times = []
        for _ in range(50):
            began = time.perf_counter()
            assert len(cluster.wait(calls, 1.0)) == 8
            times.append(time.perf_counter() - began)
        cluster.kill(actor)
    return statistics.median(times)


def measure_simulated(
    config: Config, num_actors: int, unit_s: float, costs: Costs
) -> dict[str, float]:
    """Measure a run over simulated actors, and how the driver spends its time."""

    def seconds(unit: Unit) -> float:  # 0.8 to 1.2 times the mean
        return unit_s * (0.8 + 0.4 * int(unit.id[:8], 16) / 2**32)

    plan = make_plan(config)
    clock = Clock()
    cluster = SimulatedCluster(num_actors, clock, seconds, costs)
    manifests: list[float] = []
    puts: list[float] = []
    with (
        patch.object(run_module, "Cluster", lambda *_: cluster),
        patch.object(work_module, "write_next", timed(write_next, manifests)),
        patch.object(Committer, "_put", timed(Committer._put, puts)),
        patch.object(time, "monotonic", clock.now),  # leases and progress use this clock too
    ):
        began_cpu = time.process_time()
        summary: RunSummary = run(config, plan=plan, quiet=True)
        cpu_s = time.process_time() - began_cpu - clock.unseen_cpu_s
    num_units = len(plan.units)
    assert summary.status == "complete", summary
    assert summary.num_committed == num_units
    ideal_s = sum(map(seconds, plan.units)) / num_actors
    passes = sorted(cluster.pass_s)
    return {
        "num_actors": num_actors,
        "num_units": num_units,
        "unit_s": unit_s,
        "ideal_s": ideal_s,
        "elapsed_s": summary.elapsed_s,
        "efficiency": ideal_s / summary.elapsed_s,
        "loop_ms_per_unit": 1e3 * sum(passes) / num_units,
        "ray_ms_per_unit": 1e3 * cluster.cluster_s / num_units,
        "manifests_ms_per_unit": 1e3 * sum(manifests) / num_units,
        "cpu_ms_per_unit": 1e3 * (cpu_s + cluster.cluster_s) / num_units,
        "put_ms": 1e3 * statistics.median(puts),
        "num_manifests": len(manifests),
        "manifest_s": max(manifests),
        "pass_p99_ms": 1e3 * passes[int(0.99 * len(passes))],
        "longest_pass_ms": 1e3 * passes[-1],
        "peak_mib": peak_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=20_000)
    parser.add_argument("--actors", type=int, default=256)
    parser.add_argument("--unit-s", type=float, default=10.0)
    parser.add_argument("--ray-units", type=int, default=800)
    arguments = parser.parse_args()

    real = measure_ray(arguments.ray_units)
    # The units in progress, and the polls.
    num_calls = (UNITS_PER_ACTOR + 1) * arguments.actors
    real["wait_ms"] = 1e3 * measure_wait(num_calls)
    real["efficiency"] = real["ideal_s"] / real["elapsed_s"]
    costs = Costs(real["call_ms"] / 1e3, real["result_ms"] / 1e3, real["wait_ms"] / 1e3)
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        config = make_config(folder, arguments.units, arguments.actors)
        simulated = measure_simulated(config, arguments.actors, arguments.unit_s, costs)

    print_table(
        f"Runs of units that take {arguments.unit_s:g} s (Ray: {RAY_UNIT_S:g} s)",
        ["actors", "units", "ideal s", "took s", "of ideal", "driver CPU ms/unit"],
        [
            [
                name,
                f"{figures['num_actors']:.0f}",
                f"{figures['num_units']:.0f}",
                f"{figures['ideal_s']:.1f}",
                f"{figures['elapsed_s']:.1f}",
                f"{figures['efficiency']:.1%}",
                f"{figures['cpu_ms_per_unit']:.2f}",
            ]
            for name, figures in (("simulated", simulated), ("Ray", real))
        ],
    )
    names = ["loop_ms_per_unit", "ray_ms_per_unit", "manifests_ms_per_unit", "put_ms"]
    names += ["pass_p99_ms", "longest_pass_ms", "manifest_s", "peak_mib"]
    print_table(
        "The simulated run's driver; the loop's time holds Ray's and the manifests'",
        [""],
        [[name, f"{simulated[name]:.2f}"] for name in names]
        + [[f"Ray's {name}", f"{real[name]:.3f}"] for name in ("call_ms", "result_ms", "wait_ms")],
    )
    name = f"simulated {arguments.units}"
    write_results("driver", {name: simulated, "ray": real}, ["ray", "pyarrow"])


if __name__ == "__main__":
    main()
