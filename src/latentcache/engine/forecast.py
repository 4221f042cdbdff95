"""Forecast of a run: one worker encodes real images, and its rate is extrapolated.

The worker does what it does in a run, except QA, and its files go to a temporary folder.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from latentcache.bottleneck import PipelineLoad
from latentcache.config import Config
from latentcache.dataset.receipts import Receipt, new_attempt
from latentcache.engine.cluster import Cluster
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitTask, make_job
from latentcache.engine.plan import Plan, units_of
from latentcache.engine.unit import UnitRunner
from latentcache.engine.waiting import WaitPolicy
from latentcache.engine.worker import calibrate_contract, load_runner
from latentcache.errors import SourceError
from latentcache.images.source import SourceShard
from latentcache.storage_options import StorageOptions

# The number of shards from which the first images are taken.
_NUM_SHARDS = 4


class _Trial(NamedTuple):
    """What one worker did in `elapsed_s`; `num_samples` includes rejects."""

    device: str
    num_samples: int
    elapsed_s: float
    source_bytes: int
    output_bytes: int
    bottleneck: str


class Prices(NamedTuple):
    """Prices in US dollars: per GPU-hour, CPU-hour, and GB and month; None if unknown."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None
    gb_month: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast for the pending units, at the rate of one actor times the number of actors.

    The rate excludes uploads: each actor must be able to send `upload_bytes_per_s`.
    """

    images_per_s: float
    device: str
    bottleneck: str
    num_tried: int
    num_images: int
    num_actors: int
    elapsed_s: float
    gpu_hours: float
    cpu_hours: float
    output_bytes: int
    upload_bytes_per_s: float
    compute_usd: float | None
    compute_usd_per_billion_images: float | None
    storage_usd_per_month: float | None

    def to_text(self) -> str:
        """Return the forecast as a few lines of text."""
        hours = f"{_digits(self.gpu_hours)} GPU-hours" if self.gpu_hours else ""
        hours = hours or f"{_digits(self.cpu_hours)} CPU-hours"
        actors = f"{self.num_actors} actors" if self.num_actors > 1 else "1 actor"
        upload = _digits(self.upload_bytes_per_s / 1e6)
        lines = [
            f"{self.num_tried} images tried on {self.device}: {self.images_per_s:,.1f} images/s "
            f"per actor; {self.bottleneck}",
            f"all pending units: about {self.num_images:,} images on {actors}: "
            f"{_duration(self.elapsed_s)}, {hours}, {_digits(self.output_bytes / 1e9)} GB out",
            f"uploading was not tried: it needs {upload} MB/s per actor",
        ]
        if self.compute_usd is not None:
            lines.append(
                f"compute: {_digits(self.compute_usd)} USD, or "
                f"{self.compute_usd_per_billion_images:,.0f} USD per billion images"
            )
        if self.storage_usd_per_month is not None:
            lines.append(f"storage: {_digits(self.storage_usd_per_month)} USD a month")
        return "\n".join(lines)


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def make_forecast(config: Config, plan: Plan, num_images: int, prices: Prices) -> Forecast:
    """Encode images of the pending shards on a worker of the cluster, and extrapolate.

    Args:
        config, plan, num_images, prices: the plan has units to encode; `num_images` are timed.

    Raises:
        ClusterError: the cluster cannot be reached, or lacks what the config requests.
        SourceError: the tried shards cannot be read, or hold no sample.
    """
    compute, to_encode = config.compute, plan.to_encode
    threads = None if compute.decode_threads == "auto" else compute.decode_threads
    pending = {planned.unit.source for planned in to_encode}
    shards = [shard for shard in plan.shards if shard.source in pending]
    wait_policy = WaitPolicy(compute.wait_for_gpus_s)
    with Cluster(compute.num_gpus, compute.num_cpu_actors, threads, wait_policy) as cluster:
        job = make_job(config, plan.contract, cluster.num_cpus_per_actor)
        trial: _Trial = cluster.ask(_try_out, job, shards, num_images)
        num_actors = min(cluster.num_actors, len(to_encode))
        num_gpus, num_cpus = cluster.num_gpus_per_actor, cluster.num_cpus_per_actor
    images_per_s = trial.num_samples / trial.elapsed_s
    num_bytes = sum(planned.unit.num_bytes for planned in to_encode)
    num_pending = round(num_bytes * trial.num_samples / trial.source_bytes)
    actor_hours = num_pending / images_per_s / 3600
    gpu_hours, cpu_hours = actor_hours * num_gpus, actor_hours * num_cpus
    output_bytes = round(num_pending * trial.output_bytes / trial.num_samples)
    costs = [(prices.gpu_hour, gpu_hours), (prices.cpu_hour, cpu_hours)]
    known = [price * hours for price, hours in costs if price is not None]
    usd, gb_month = sum(known) if known else None, prices.gb_month
    return Forecast(
        images_per_s=images_per_s,
        device=trial.device,
        bottleneck=trial.bottleneck,
        num_tried=trial.num_samples,
        num_images=num_pending,
        num_actors=num_actors,
        elapsed_s=actor_hours * 3600 / num_actors,
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        output_bytes=output_bytes,
        upload_bytes_per_s=trial.output_bytes / trial.elapsed_s,
        compute_usd=usd,
        compute_usd_per_billion_images=None if usd is None else usd / num_pending * 1e9,
        storage_usd_per_month=None if gb_month is None else gb_month * output_bytes / 1e9,
    )


def _try_out(job: Job, shards: Sequence[SourceShard], num_images: int, device: str) -> _Trial:
    """Encode the first images of a few shards in this process, after some that warm it up."""
    if not job.contract.is_resolved:
        job = replace(job, contract=calibrate_contract(job, shards, device))
    chosen = random.Random(0).sample(shards, min(len(shards), _NUM_SHARDS))
    each = math.ceil(num_images / len(chosen))
    with TemporaryDirectory(prefix="latentcache-") as folder:
        local = replace(job, output_url=folder, output_storage=StorageOptions(), qa=None)
        runner = load_runner(local, device)
        _run(runner, chosen[:1], each)
        source_bytes = int(runner.totals.stats()["num_source_bytes"])
        began = time.perf_counter()
        receipts = _run(runner, chosen, each)
        elapsed_s = time.perf_counter() - began
    loads = PipelineLoad()
    for receipt in receipts:
        loads.add_receipt(receipt.stages)
    records = [receipt.record for receipt in receipts]
    num_samples = sum(record.num_samples for record in records)
    if not num_samples:
        raise SourceError(f"{chosen[0].url} holds no sample to calibrate on")
    cpus = f"{job.decode_threads} CPUs"
    return _Trial(
        device=torch.cuda.get_device_name() if device == "cuda" else cpus,
        num_samples=num_samples,
        elapsed_s=elapsed_s,
        source_bytes=int(runner.totals.stats()["num_source_bytes"]) - source_bytes,
        output_bytes=sum(file.size_bytes for record in records for file in record.files),
        bottleneck=str(loads.bottleneck),
    )


def _run(runner: UnitRunner, shards: Sequence[SourceShard], max_samples: int) -> list[Receipt]:
    """Encode the first samples of each shard, with as many units at once as an actor has."""
    tasks = [
        UnitTask(unit, 0, new_attempt(), max_samples=max_samples, files=shard.files, url=shard.url)
        for shard, unit in zip(shards, units_of(shards, runner.job.contract), strict=True)
    ]
    receipts = []
    with ThreadPoolExecutor(UNITS_PER_ACTOR) as pool:
        for result in pool.map(runner.run, tasks):
            if not isinstance(result, Receipt):
                raise result.fatal or SourceError(result.message)
            receipts.append(result)
    return receipts
