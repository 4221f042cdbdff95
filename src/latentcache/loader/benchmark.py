"""Measure the speed of a loader on this machine, for `latentcache bench-loader`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from latentcache.loader.batch import Batch
from latentcache.loader.loader import LatentLoader


@dataclass(frozen=True, slots=True)
class LoaderSpeed:
    """The speed of a loader, measured by a consumer that does nothing with a batch.

    Rates are per rank, without the first batch. `open_s` is the time to read the manifest,
    `first_batch_s` from then to the first batch, and `resume_s` to create and resume a loader.
    `step_p50_ms` and `step_p99_ms` are percentiles of the time between batches.
    """

    num_steps: int
    num_rows: int
    elapsed_s: float
    rows_per_s: float
    megabytes_per_s: float
    step_p50_ms: float
    step_p99_ms: float
    open_s: float
    first_batch_s: float
    resume_s: float


def measure_loader(
    make: Callable[[], LatentLoader],
    seconds: float,
    progress: Callable[[float], None] = lambda elapsed_s: None,
) -> LoaderSpeed:
    """Measure a loader over as many epochs as fit the time.

    Args:
        make: creates the loader; called twice, the second time to resume.
        seconds, progress: duration after the first batch, and what is called with elapsed seconds.
    """
    begun = time.perf_counter()
    loader = make()
    opened = time.perf_counter()
    batches = _forever(loader)
    next(batches)
    started = last = time.perf_counter()
    steps_s: list[float] = []
    num_rows = num_bytes = 0
    while last - started < seconds:
        batch = next(batches)
        now = time.perf_counter()
        steps_s.append(now - last)
        last = now
        num_rows += len(batch)
        num_bytes += batch.latents.nbytes
        progress(last - started)
    state = loader.state_dict()
    batches.close()

    resuming = time.perf_counter()
    again = make()
    again.load_state_dict(state)
    next(iter(again))
    resume_s = time.perf_counter() - resuming
    elapsed_s = last - started
    p50_s, p99_s = np.percentile(steps_s, [50, 99])
    return LoaderSpeed(
        num_steps=len(steps_s),
        num_rows=num_rows,
        elapsed_s=elapsed_s,
        rows_per_s=num_rows / elapsed_s,
        megabytes_per_s=num_bytes / elapsed_s / 1e6,
        step_p50_ms=float(p50_s) * 1e3,
        step_p99_ms=float(p99_s) * 1e3,
        open_s=opened - begun,
        first_batch_s=started - opened,
        resume_s=resume_s,
    )


def _forever(loader: LatentLoader) -> Generator[Batch, None, None]:
    while True:
        yield from loader
