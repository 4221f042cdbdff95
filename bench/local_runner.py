"""The runner of an actor in this process, for benchmarks of single stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentcache import make_plan, parse_config
from latentcache.engine.job import make_job
from latentcache.engine.plan import Plan
from latentcache.engine.unit import UnitRunner
from latentcache.engine.worker import load_runner


def make_runner(
    shards: Path, output: Path, decode_threads: int, **sections: Any
) -> tuple[Plan, UnitRunner]:
    """Plan a run of 256 px latents with the demo VAE on CPUs, and load what its actor loads.

    Args:
        shards, output: the folder of the shards, and that of the dataset.
        decode_threads: the number of decode threads.
        sections: further sections of the config.
    """
    config = parse_config(
        {
            "name": "bench",
            "source": {"shards": f"{shards}/*.tar"},
            "transform": {"resolution_px": 256},
            "vae": {"checkpoint": "demo"},
            "output": {"url": str(output)},
            "compute": {"num_gpus": 0, "precision": "fp32"},
            **sections,
        }
    )
    plan = make_plan(config)
    return plan, load_runner(make_job(config, plan.contract, decode_threads), "cpu")
