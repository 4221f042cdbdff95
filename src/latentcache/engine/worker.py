"""What an actor loads before its first unit."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch

from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Receipt
from latentcache.engine.boundary import at_boundary
from latentcache.engine.calibration import calibrate
from latentcache.engine.job import Job, UnitFailure, UnitTask
from latentcache.engine.rewrite import Rewriter
from latentcache.engine.unit import UnitRunner
from latentcache.errors import ClusterError
from latentcache.images.source import SourceShard
from latentcache.qa.evaluator import load_evaluator
from latentcache.vae.encoder import LatentEncoder, prepare_device
from latentcache.vae.model import KLAutoencoder
from latentcache.vae.weights import encoder_fingerprint, load_vae


class ActorRunner:
    """Runs the units of one actor: rewrites without an encoder, all others with one.

    Args:
        job: what the units have in common; with `loads_late` the encoder waits for a unit that
            needs it.
        device: `cuda` or `cpu`.

    Raises:
        ClusterError: as `load_runner`.
        CheckpointError: likewise.
    """

    def __init__(self, job: Job, device: str) -> None:
        self.job, self._device = job, device
        self._rewriter = Rewriter(job)
        self._lock = Lock()
        self._encoding = None if job.loads_late else load_runner(job, device)

    def run(self, task: UnitTask) -> Receipt | UnitFailure:
        """Run one unit; may be called from two threads at once."""
        if task.rewrites and (rewritten := self._rewriter.run(task)):
            return rewritten
        loaded = at_boundary(task, self.load)
        return loaded if isinstance(loaded, UnitFailure) else loaded.run(task)

    def load(self) -> UnitRunner:
        """Return the runner that encodes; load it if need be."""
        with self._lock:
            if self._encoding is None:
                self._encoding = load_runner(self.job, self._device)
            return self._encoding

    def stats(self) -> dict[str, float]:
        """Return cumulative figures; see `UnitRunner.stats`."""
        rewritten, encoding = self._rewriter.stats(), self._encoding
        if encoding is None:
            return rewritten
        encoded = encoding.stats()
        return {
            name: value if name.endswith("_num_threads") else value + rewritten[name]
            for name, value in encoded.items()
        }

    @property
    def rejects(self) -> dict[tuple[str, str], int]:
        """Rejects so far, by stage and reason."""
        return dict(self._encoding.rejects) if self._encoding else {}


def load_runner(job: Job, device: str) -> UnitRunner:
    """Load what runs units.

    Raises:
        ClusterError: the device cannot be used here, or the checkpoint is another one here.
        CheckpointError: a checkpoint cannot be used.
    """
    vae = _load_vae(job, device)
    evaluator = load_evaluator(job.contract, vae, job.qa.models) if job.qa else None
    encoder = LatentEncoder(vae, job.contract.latents.precision, job.batch_size)
    runner = UnitRunner(job, encoder, evaluator)
    # The runner's threads fill the cores; where few can encode at once, torch's help them.
    num_encoding = runner.encode_pool.num_threads
    num_threads = torch.get_num_threads() // num_encoding if device == "cpu" else 1
    torch.set_num_threads(max(1, num_threads))
    return runner


def calibrate_contract(job: Job, shards: Sequence[SourceShard], device: str) -> Contract:
    """Find out what the job's contract leaves open; see `engine/calibration.py`."""
    return calibrate(_load_vae(job, device), job, shards)


def _load_vae(job: Job, device: str) -> KLAutoencoder:
    prepare_device(device)
    vae = load_vae(job.checkpoint, device=device, decoder=False, options=job.checkpoint_storage)
    if encoder_fingerprint(vae) != job.contract.vae.encoder_fingerprint:
        raise ClusterError(
            f"{job.checkpoint} gives a worker another encoder than it gave the driver: put the "
            "checkpoint where every node reads the same"
        )
    return vae
