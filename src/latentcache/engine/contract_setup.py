"""The contract of a run: measured where the config leaves it open, put before the first unit."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from latentcache import __version__
from latentcache.config import Config
from latentcache.dataset.contract import (
    CONTRACT_PATH,
    Contract,
    establish_contract,
    read_contract,
    require_same,
)
from latentcache.engine.cluster import Cluster
from latentcache.engine.job import make_job
from latentcache.engine.progress import RunProgress
from latentcache.engine.worker import calibrate_contract
from latentcache.errors import ContractMismatch
from latentcache.images.source import SourceShard
from latentcache.storage import Store
from latentcache.vae.weights import absolute_url


def resolve_contract(
    config: Config,
    contract: Contract,
    shards: Sequence[SourceShard],
    cluster: Cluster,
    progress: RunProgress,
) -> Contract:
    """Return the contract with everything measured that it leaves open, on a worker.

    Args:
        config: of the run.
        contract: the one that the config asks for.
        shards: of the source, whose images are measured.
        cluster: which has the worker.
        progress: told that int8 is calibrated.
    """
    if contract.is_resolved:
        return contract
    if quantization := contract.latents.quantization:
        num_images = quantization.num_images
        message = f"calibrating int8 on {num_images} images"
        progress.say("calibrating", message, num_images=num_images)
    job = make_job(config, contract, cluster.num_cpus_per_actor)
    return cluster.ask(calibrate_contract, job, shards)


def put_contract(config: Config, output: Store, wanted: Contract, resolved: Contract) -> Contract:
    """Put the contract unless one is there; find out whether the store has conditional writes.

    Args:
        config: of the run.
        output: the store.
        wanted: the contract that the config asks for, which may leave numbers open.
        resolved: the same with this run's numbers.

    Returns:
        The contract that is there now. Where another driver was first, it has that one's numbers.

    Raises:
        ContractMismatch: another contract is there.
    """
    provenance = {
        "name": config.name,
        "checkpoint": absolute_url(config.vae.checkpoint),
        # Of the package itself not what is installed: it may have come with a Ray job.
        "versions": {"latentcache": __version__}
        | {name: version(name) for name in ("torch", "pillow", "ray")},
    }
    try:
        data = establish_contract(output, resolved, provenance)
    except ContractMismatch:
        there = read_contract(output)
        if there is None:
            raise
        resolved = wanted.resolved_as(there)
        require_same(output, there, resolved)
        data = establish_contract(output, resolved, provenance)
    output.probe_conditional(CONTRACT_PATH, data)
    return resolved
