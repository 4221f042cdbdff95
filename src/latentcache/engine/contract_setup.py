"""The contract of a run: open values are measured, and it is put before the first unit."""

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
    """Return the contract with its open values measured on a worker.

    Args:
        config: the config of the run.
        contract: the contract that the config requests.
        shards: the source shards whose images are measured.
        cluster: the cluster of the worker.
        progress: shows that int8 is calibrated.
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
    """Put the contract if there is none, and probe whether the store has conditional writes.

    Args:
        config: the config of the run.
        output: the store.
        wanted: the contract that the config requests, which may have open values.
        resolved: the same contract with the values that this run measured.

    Returns:
        The contract at the output. If another driver put it first, it has the values of that
        driver.

    Raises:
        ContractMismatch: the output has a different contract.
    """
    provenance = {
        "name": config.name,
        "checkpoint": absolute_url(config.vae.checkpoint),
        # `__version__`, because the package may have come with a Ray job and not be installed.
        "versions": {"latentcache": __version__}
        | {name: version(name) for name in ("torch", "pillow", "ray")},
    }
    try:
        data = establish_contract(output, resolved, provenance)
    except ContractMismatch:
        existing = read_contract(output)
        if existing is None:
            raise
        resolved = wanted.resolved_as(existing)
        require_same(output, existing, resolved)
        data = establish_contract(output, resolved, provenance)
    output.probe_conditional(CONTRACT_PATH, data)
    return resolved
