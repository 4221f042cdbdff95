"""The common part of encoding and rewriting units: files, counts, uploads, statistics."""

from __future__ import annotations

import errno
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, TypeVar

import torch

from latentcache.bottleneck import STAGES
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.receipts import DataFile, QaFile, Receipt, UnitRecord, read_receipts
from latentcache.dataset.rejects import count_reasons
from latentcache.dataset.shards import (
    BucketWriter,
    RejectRow,
    RowMeta,
    describe_file,
    write_rejects,
)
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.kept_fields import SeenFields
from latentcache.engine.stages import StageTimes
from latentcache.errors import (
    AccessDenied,
    ConfigError,
    DiskFull,
    FieldMissing,
    LatentCacheError,
    Reject,
    SourceChanged,
    StorageError,
    one_line,
)
from latentcache.images.source import NotGrouped, RejectedSample, Sample, read_samples
from latentcache.storage import Store

R = TypeVar("R")

# The most names of extra image fields that a receipt lists.
_MAX_FIELDS = 16


def at_boundary(task: UnitTask, run: Callable[[], R]) -> R | UnitFailure:
    """Return the result of `run`, or the failure of the unit if `run` raises.

    Args:
        task, run: the unit, for messages, and what encodes or rewrites it.
    """
    try:
        return run()
    except LatentCacheError as error:
        return UnitFailure(
            str(error),
            changed=isinstance(error, SourceChanged),
            denied=isinstance(error, AccessDenied),
            fatal=error if isinstance(error, DiskFull | ConfigError) else None,
            lacks_field=isinstance(error, FieldMissing),
        )
    except torch.AcceleratorError:  # the GPU is lost, which is not the fault of the unit
        raise
    except Exception as error:  # noqa: BLE001  (the unit boundary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = DiskFull("no room left on the local disk (TMPDIR)")
            return UnitFailure(str(full), fatal=full)
        print("\n".join(map(one_line, traceback.format_exc().splitlines())), file=sys.stderr)
        return UnitFailure(one_line(f"{task.unit.title}: {type(error).__name__}: {error}"))


class Totals:
    """The counts and times of all attempts of a process so far; thread-safe."""

    def __init__(self) -> None:
        self.times = {stage: StageTimes(UNITS_PER_ACTOR) for stage in STAGES}
        self.rejects: Counter[tuple[str, str]] = Counter()  # by stage and reason
        names = ("num_rows", "num_rejects", "num_source_bytes", "num_output_bytes")
        self._counts = dict.fromkeys(names, 0)
        self._lock = Lock()

    def count(self, **numbers: int) -> None:
        """Add to some of the counts."""
        with self._lock:
            for name, number in numbers.items():
                self._counts[name] += number

    def count_reject(self, row: RejectRow) -> None:
        """Count one more reject."""
        with self._lock:
            self.rejects[row.stage, row.reason] += 1
            self._counts["num_rejects"] += 1

    def stats(self) -> dict[str, float]:
        """Return the counts, and `StageTimes.to_json` with the prefix `<stage>_`."""
        stats: dict[str, float] = {**self._counts}
        for stage, times in self.times.items():
            stats |= {f"{stage}_{name}": value for name, value in times.to_json().items()}
        return stats


class AttemptRunner:
    """A runner of units in this process; several threads may call `run` at once."""

    def __init__(self, job: Job, totals: Totals) -> None:
        self.job = job
        self.totals = totals
        self.output = Store(job.output_url, job.output_storage)

    def run(self, task: UnitTask) -> Receipt | UnitFailure:
        """Run one unit and upload its files; return its receipt, perhaps that of another run."""
        return at_boundary(task, partial(self._run, task))

    def _run(self, task: UnitTask) -> Receipt:
        if task.max_samples is None:
            with suppress(StorageError):  # the unit may be encoded for nothing, but no row is lost
                (receipt,) = read_receipts(self.output, [f"{task.unit.id}-{task.generation}"])
                return receipt
        try:
            return self._attempt(task, gather=False)
        except NotGrouped:
            return self._attempt(task, gather=True)

    def _attempt(self, task: UnitTask, *, gather: bool) -> Receipt:
        with TemporaryDirectory(prefix="latentcache-") as folder:
            return self._new_attempt(task, Path(folder), gather).run()

    def _new_attempt(self, task: UnitTask, folder: Path, gather: bool) -> Attempt:
        raise NotImplementedError


class SampleCounts:
    """Counts of the samples and images of a shard, to be checked against rows and rejects."""

    def __init__(self) -> None:
        self.num_samples = self.num_images = self.num_extra_images = 0
        self.extra_image_fields: list[str] = []

    def add(self, sample: Sample | RejectedSample) -> None:
        """Count a sample that was read."""
        self.num_samples += 1
        self.num_images += sample.num_images
        self.num_extra_images += max(0, sample.num_images - 1)
        if isinstance(sample, Sample) and sample.extra_images:
            fields = dict.fromkeys([*self.extra_image_fields, *sample.extra_images])
            self.extra_image_fields = list(fields)[:_MAX_FIELDS]

    def check(
        self, title: str, num_rows: int, num_rejects: int, num_rejects_with_image: int
    ) -> None:
        """Raise unless samples = rows + rejects, and images = rows + rejects + extra images.

        Args:
            title, num_rows, num_rejects, num_rejects_with_image: the unit, and what was written.
        """
        if num_rows + num_rejects != self.num_samples:
            raise AssertionError(
                f"{title}: {self.num_samples} samples were read, but {num_rows} rows and "
                f"{num_rejects} rejects were written"
            )
        if num_rows + num_rejects_with_image + self.num_extra_images != self.num_images:
            raise AssertionError(
                f"{title}: {self.num_images} images were read, but {num_rows} rows, "
                f"{num_rejects_with_image} rejects with an image and {self.num_extra_images} extra "
                "images were written"
            )


class Attempt:
    """One attempt at one unit; with `gather` it reads a tar that is not grouped by key."""

    def __init__(self, runner: AttemptRunner, task: UnitTask, folder: Path, gather: bool) -> None:
        self.job, self.output, self.totals = runner.job, runner.output, runner.totals
        self.task, self.folder, self.gather = task, folder, gather
        self.contract, self.columns = self.job.contract, self.job.columns
        self.stem = f"{task.generation}-{task.attempt}"
        self.began = time.perf_counter()
        totals = runner.totals.times.items()
        self.times = {stage: StageTimes(total.num_threads, total) for stage, total in totals}
        self.samples = SampleCounts()
        self.seen = SeenFields(self.columns)
        self.rejects: list[RejectRow] = []
        self.notes: Counter[str] = Counter()
        self.writers: dict[Bucket, BucketWriter] = {}

    def run(self) -> Receipt:
        """Make and upload the files of the unit."""
        raise NotImplementedError

    def read_samples(
        self, reserve: Callable[[int], None] = lambda num_bytes: None
    ) -> Iterator[Sample | RejectedSample]:
        """Yield the samples of the source in order, and count them; see `images.source`."""
        samples = read_samples(
            self.task.shard,
            self.contract.source,
            keep=tuple(column.field for column in self.columns),
            options=self.job.source_storage,
            gather=self.gather,
            on_read=lambda num_bytes: self.totals.count(num_source_bytes=num_bytes),
            reserve=reserve,
        )
        for sample in islice(samples, self.task.max_samples):
            self.samples.add(sample)
            self.seen.add(sample.names)
            yield sample

    def _append(self, bucket: Bucket, latents: torch.Tensor, rows: Sequence[RowMeta]) -> None:
        if bucket not in self.writers:
            stem = self.folder / f"{self.stem}-{bucket.name}"
            unit_id = self.task.unit.id
            self.writers[bucket] = BucketWriter(stem, self.contract, self.columns, unit_id, bucket)
        self.writers[bucket].append(latents, rows)
        self.totals.count(num_rows=len(rows))

    def _reject(self, row: RejectRow) -> None:
        self.rejects.append(row)
        self.totals.count_reject(row)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Close the files of all buckets on leaving; abandon them after an error."""
        try:
            yield
            with self.times["write"].working():
                for writer in self.writers.values():
                    writer.close()
        except BaseException:
            for writer in self.writers.values():
                writer.abandon()
            raise

    def _publish(
        self, writers: Iterable[BucketWriter], qa: Callable[[], tuple[Path, QaFile] | None]
    ) -> UnitRecord:
        """Check and upload the closed files and the QA file that `qa` writes, if any."""
        files: list[tuple[Path, DataFile]] = []
        num_rows, unit = 0, self.task.unit
        with self.times["write"].working():
            for writer in writers:
                writer.check()
                num_rows += writer.num_rows
                for local in writer.paths:
                    path, name = f"data/{unit.id}/{local.name}", writer.bucket.name
                    files.append((local, describe_file(local, path, writer.num_rows, name)))
            uploads, rejects = list(files), None
            if self.rejects:
                local = self.folder / f"{self.stem}.parquet"
                write_rejects(local, self.rejects)
                path = f"rejects/{unit.id}/{local.name}"
                rejects = describe_file(local, path, len(self.rejects), "")
                uploads.append((local, rejects))
        num_with_image = sum(row.has_image for row in self.rejects)
        self.samples.check(unit.title, num_rows, len(self.rejects), num_with_image)
        if qa_file := qa():
            uploads.append((qa_file[0], qa_file[1].file))
        with self.times["upload"].working():
            for local, file in uploads:
                self.output.put_file(local, file.path)
                self.totals.count(num_output_bytes=file.size_bytes)
        return UnitRecord(
            unit=unit,
            generation=self.task.generation,
            attempt=self.task.attempt,
            num_samples=self.samples.num_samples,
            num_rows=num_rows,
            num_rejects=len(self.rejects),
            num_images=self.samples.num_images,
            num_extra_images=self.samples.num_extra_images,
            files=tuple(file for _, file in files),
            rejects=rejects,
            qa=qa_file[1] if qa_file else None,
            columns=self.columns,
            absent_fields=self.seen.absent,
            reject_reasons=count_reasons(self.rejects),
        )

    def _measured(self) -> dict[str, Any]:
        """Return the fields of the receipt that this attempt measured."""
        return {
            "stages": {stage: times.to_json() for stage, times in self.times.items()},
            "elapsed_s": round(time.perf_counter() - self.began, 3),
            "extra_image_fields": self.samples.extra_image_fields,
            "fields": self.seen.names,
        }


def reject_row(
    key: str | None, reject: Reject, thumbnail: bytes | None = None, *, has_image: bool = True
) -> RejectRow:
    """Return the reject row of a sample.

    Args:
        key, reject, thumbnail, has_image: `thumbnail` is a small picture, if the image was decoded.
    """
    return RejectRow(key, reject.stage, reject.reason, reject.message, thumbnail, has_image)
