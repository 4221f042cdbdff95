"""The part of an actor that does not depend on Ray: it loads models and runs units."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch

from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Receipt
from latentcache.engine.attempt import Totals, at_boundary
from latentcache.engine.calibration import calibrate
from latentcache.engine.job import Job, UnitFailure, UnitTask
from latentcache.engine.rewrite import Rewriter
from latentcache.engine.unit import UnitRunner
from latentcache.errors import ClusterError
from latentcache.images.source import SourceShard
from latentcache.qa.evaluator import QaEvaluator
from latentcache.vae.encoder import LatentEncoder, prepare_device
from latentcache.vae.model import KLAutoencoder
from latentcache.vae.weights import encoder_fingerprint, load_vae


class ActorRunner:
    """The runner of one actor: rewrites units without an encoder, and encodes all others."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self._device = job, device
        self.totals = Totals()
        self._rewriter = Rewriter(job, self.totals)
        self._lock = Lock()
        self._encoding: UnitRunner | None = None
        if not job.loads_late:
            self.load()

    def run(self, task: UnitTask) -> Receipt | UnitFailure:
        """Run one unit and return its receipt or failure; two threads may call this at once."""
        if task.rewrites and (rewritten := self._rewriter.rewrite(task)):
            return rewritten
        loaded = at_boundary(task, self.load)
        return loaded if isinstance(loaded, UnitFailure) else loaded.run(task)

    def load(self) -> UnitRunner:
        """Return the runner that encodes; load it at the first call."""
        with self._lock:
            if self._encoding is None:
                self._encoding = load_runner(self.job, self._device, self.totals)
            return self._encoding


def load_runner(job: Job, device: str, totals: Totals | None = None) -> UnitRunner:
    """Load the models and return the runner that encodes units.

    Args:
        job, device, totals: `device` is `cuda` or `cpu`, and `totals` are those of the process.

    Raises:
        ClusterError: this node cannot use the device, or reads another checkpoint than the driver.
        CheckpointError: a checkpoint cannot be used.
    """
    vae = _load_vae(job, device)
    evaluator = QaEvaluator(job.contract, vae, job.qa.models) if job.qa else None
    encoder = LatentEncoder(vae, job.contract.latents.precision, job.batch_size)
    runner = UnitRunner(job, encoder, evaluator, totals)
    # The runner's threads use all cores. If few of them encode at once, torch's threads help.
    num_threads = torch.get_num_threads() // runner.encode_pool.num_threads
    torch.set_num_threads(max(1, num_threads) if device == "cpu" else 1)
    return runner


def calibrate_contract(job: Job, shards: Sequence[SourceShard], device: str) -> Contract:
    """Return the contract of a job with its open values measured; see `engine/calibration.py`.

    Args:
        job, shards, device: `device` is `cuda` or `cpu`.
    """
    return calibrate(_load_vae(job, device), job, shards)


def _load_vae(job: Job, device: str) -> KLAutoencoder:
    prepare_device(device)
    vae = load_vae(job.checkpoint, device=device, decoder=False, options=job.checkpoint_storage)
    if encoder_fingerprint(vae) != job.contract.vae.encoder_fingerprint:
        raise ClusterError(
            f"{job.checkpoint} has another encoder on a worker than on the driver: put the "
            "checkpoint where every node reads the same file"
        )
    return vae
