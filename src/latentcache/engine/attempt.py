"""The common part of encoding and rewriting a unit: files, counts, uploads, the record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from latentcache.bottleneck import STAGES
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.receipts import DataFile, QaFile, UnitRecord
from latentcache.dataset.rejects import count_reasons
from latentcache.dataset.shards import BucketWriter, RejectRow, describe_file, write_rejects
from latentcache.engine.accounting import SampleCounts
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitTask
from latentcache.engine.kept_fields import SeenFields
from latentcache.engine.stages import StageTimes
from latentcache.errors import Reject
from latentcache.images.samples import ReserveSample
from latentcache.images.source import RejectedSample, Sample, read_samples
from latentcache.storage import Store


def stage_times(num_threads: dict[str, int] | None = None) -> dict[str, StageTimes]:
    """Return new times for all stages, in the order in which a sample passes them.

    Args:
        num_threads: the number of threads of each stage whose threads serve all units; the other
            stages have one thread per unit.
    """
    shared = num_threads or {}
    return {stage: StageTimes(shared.get(stage, UNITS_PER_ACTOR)) for stage in STAGES}


def reject_row(
    key: str | None, reject: Reject, thumbnail: bytes | None = None, *, has_image: bool = True
) -> RejectRow:
    """Return the reject row of a sample.

    Args:
        key: the key of the sample; None if it has none.
        reject: why the sample was rejected.
        thumbnail: a small encoded picture of the image, if it could be decoded.
        has_image: whether the sample has an image.
    """
    return RejectRow(key, reject.stage, reject.reason, reject.message, thumbnail, has_image)


class Attempt:
    """One attempt at one unit.

    Args:
        job: the settings that all units share.
        output: the store of the dataset.
        task: the unit and its attempt.
        folder: a local folder that only this attempt uses.
        times: the times of each stage.
        gather: read a tar whose samples are not grouped by key.
    """

    def __init__(
        self,
        job: Job,
        output: Store,
        task: UnitTask,
        folder: Path,
        times: dict[str, StageTimes],
        *,
        gather: bool,
    ) -> None:
        self.job, self.output, self.task, self.folder = job, output, task, folder
        self.contract, self.columns = job.contract, job.columns
        self.gather = gather
        self.stem = f"{task.generation}-{task.attempt}"
        self.began = time.perf_counter()
        self.times = times
        self.samples = SampleCounts()
        self.seen = SeenFields(self.columns)
        self.rejects: list[RejectRow] = []
        self.notes: Counter[str] = Counter()
        self.writers: dict[Bucket, BucketWriter] = {}
        self.num_source_bytes = self.num_output_bytes = 0

    @property
    def counts(self) -> dict[str, int]:
        """Counts so far: rows, rejects, bytes read from the source, bytes written to the output."""
        return {
            "num_rows": sum(writer.num_rows for writer in list(self.writers.values())),
            "num_rejects": len(self.rejects),
            "num_source_bytes": self.num_source_bytes,
            "num_output_bytes": self.num_output_bytes,
        }

    @property
    def elapsed_s(self) -> float:
        """Seconds since the attempt began."""
        return round(time.perf_counter() - self.began, 3)

    def read_samples(
        self, reserve: ReserveSample = lambda num_bytes: None
    ) -> Iterator[Sample | RejectedSample]:
        """Yield the samples of the source in order, and count them.

        Args:
            reserve: see `read_samples` in `images/source.py`.
        """
        samples = read_samples(
            self.task.shard,
            self.contract.source,
            keep=tuple(column.field for column in self.columns),
            options=self.job.source_storage,
            gather=self.gather,
            on_read=self._count_bytes,
            reserve=reserve,
        )
        for sample in islice(samples, self.task.max_samples):
            self.samples.add(sample)
            self.seen.add(sample.names)
            yield sample

    def _count_bytes(self, num_bytes: int) -> None:
        self.num_source_bytes += num_bytes

    def writer(self, bucket: Bucket) -> BucketWriter:
        """Return the writer of a bucket; create it at the first call."""
        if bucket not in self.writers:
            stem = self.folder / f"{self.stem}-{bucket.name}"
            unit_id = self.task.unit.id
            self.writers[bucket] = BucketWriter(stem, self.contract, self.columns, unit_id, bucket)
        return self.writers[bucket]

    @contextmanager
    def writing(self) -> Iterator[None]:
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

    def publish(
        self,
        writers: Iterable[BucketWriter],
        qa: Callable[[], tuple[Path, QaFile] | None],
    ) -> UnitRecord:
        """Check the closed files and upload them.

        Args:
            writers: the writers of the unit's buckets, in the order of the record.
            qa: writes the local QA file; returns its path and its entry in the record, or None.

        Returns:
            The record of the unit.
        """
        files: list[tuple[Path, DataFile]] = []
        rejects: DataFile | None = None
        num_rows, unit = 0, self.task.unit
        with self.times["write"].working():
            for writer in writers:
                writer.check()
                num_rows += writer.num_rows
                for local in writer.paths:
                    path, name = f"data/{unit.id}/{local.name}", writer.bucket.name
                    files.append((local, describe_file(local, path, writer.num_rows, name)))
            local = self.folder / f"{self.stem}.parquet"
            if self.rejects:
                write_rejects(local, self.rejects)
                path = f"rejects/{unit.id}/{local.name}"
                rejects = describe_file(local, path, len(self.rejects), "")
        num_with_image = sum(row.has_image for row in self.rejects)
        self.samples.check(unit.title, num_rows, len(self.rejects), num_with_image)
        qa_file = qa()
        with self.times["upload"].working():
            for data, file in files:
                self._upload(data, file)
            if rejects:
                self._upload(local, rejects)
            if qa_file:
                self._upload(qa_file[0], qa_file[1].file)
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

    def _upload(self, local: Path, file: DataFile) -> None:
        self.output.put_file(local, file.path)
        self.num_output_bytes += file.size_bytes


class AttemptLog:
    """Statistics of the attempts of a process, both ended and active.

    Args:
        num_threads: see `stage_times`.
    """

    def __init__(self, num_threads: dict[str, int] | None = None) -> None:
        self._num_threads = num_threads
        self._times = self.new_times()
        self._counts: Counter[str] = Counter()
        self.active: list[Attempt] = []

    def new_times(self) -> dict[str, StageTimes]:
        """Return new times for all stages."""
        return stage_times(self._num_threads)

    @contextmanager
    def watch(self, attempt: Attempt) -> Iterator[None]:
        """Count an attempt as active inside the context, and as ended afterwards."""
        self.active.append(attempt)
        try:
            yield
        finally:
            self.active.remove(attempt)
            self._counts.update(attempt.counts)
            for stage, times in attempt.times.items():
                self._times[stage].add(times.busy_s, times.wait_s)

    def stats(self) -> dict[str, float]:
        """Return cumulative statistics.

        These are `num_rows`, `num_rejects`, `num_source_bytes`, `num_output_bytes`, and for each
        stage `<stage>_busy_s`, `<stage>_wait_s` and `<stage>_num_threads`.
        """
        stages, active = self.new_times(), list(self.active)
        for attempt_times in [self._times, *(attempt.times for attempt in active)]:
            for stage, times in attempt_times.items():
                stages[stage].add(times.busy_s, times.wait_s)
        names = ("num_rows", "num_rejects", "num_source_bytes", "num_output_bytes")
        counts = [self._counts, *(attempt.counts for attempt in active)]
        return {
            **{name: sum(count[name] for count in counts) for name in names},
            **{
                f"{stage}_{name}": value
                for stage, times in stages.items()
                for name, value in times.to_json().items()
            },
        }
