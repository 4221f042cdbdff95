"""One unit from source shard to uploaded files: fetch, decode, batch, encode, write, upload.

A `UnitRunner` lives as long as its process and runs up to two units at a time: while one is being
finished, the next is already fetched and decoded, so that the encoder never waits at a shard's
edge. It knows nothing of Ray, and it commits nothing: it gives back the receipt for the driver to
put, so that a process that was given up for dead cannot commit.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from latentcache import __version__
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.quantization import is_finite, to_stored, to_values
from latentcache.dataset.receipts import DataFile, QaFile, Receipt, UnitRecord
from latentcache.dataset.rejects import count_reasons
from latentcache.dataset.shards import (
    BucketWriter,
    RejectRow,
    RowMeta,
    describe_file,
    write_rejects,
)
from latentcache.dataset.statistics import Statistics
from latentcache.engine.accounting import SampleBudget, SampleCounts
from latentcache.engine.boundary import at_boundary, committed_receipt
from latentcache.engine.job import UNITS_PER_ACTOR, Job, UnitFailure, UnitTask
from latentcache.engine.kept_fields import SeenFields
from latentcache.engine.stages import Background, OldestFirstPool, Room, StageTimes
from latentcache.errors import Reject
from latentcache.image_files import write_thumbnail
from latentcache.images.decode import Reserve, decode_image
from latentcache.images.source import NotGrouped, RejectedSample, Sample, read_samples
from latentcache.images.text_fields import read_columns
from latentcache.images.transform import Transformed, load_image, transform_spec
from latentcache.qa.evaluator import QaEvaluator
from latentcache.qa.qa_files import QaRow, write_qa
from latentcache.qa.row_sample import QaSample
from latentcache.storage import Store
from latentcache.vae.encoder import Encoded, LatentEncoder, draw_latents

# Rejects of one reason in one unit that get a thumbnail, where they could be decoded.
_MAX_THUMBNAILS = 8

# Images that are handed to the encoder together, at least, though it may take fewer at a time:
# passing each on alone from thread to thread cost a fifth of the whole run's rate without it.
_MIN_TOGETHER = 8

# Batches of a unit that may wait for the encoder or the writer, beyond one for each encode thread.
_BATCHES_AHEAD = 1

# An actor stays below 2 GiB besides its model, however large the images are. Python with torch and
# pyarrow takes a quarter of that. Of the rest its two units together may hold so many bytes of
# samples that wait to be decoded; of images on their way from bytes to crops, which is enough for
# 16 threads on JPEGs of 16 megapixels; and of batches that wait for the encoder. What alone is
# larger than that goes alone.
_FETCHED_BYTES = 256 * 2**20
_DECODING_BYTES = 768 * 2**20
_BATCHED_BYTES = 256 * 2**20

# And each unit so many bytes of crops between the two: one for each decode thread at least.
_CROPPED_BYTES = 128 * 2**20


class UnitRunner:
    """Runs units in this process; `run` may be called from two threads at once."""

    def __init__(
        self, job: Job, encoder: LatentEncoder, evaluator: QaEvaluator | None = None
    ) -> None:
        self.job = job
        self.encoder = encoder
        self.evaluator = evaluator
        self.output = Store(job.output_url, job.output_storage)
        self.spec = transform_spec(job.contract)
        self.decode_pool = OldestFirstPool("decode", job.decode_threads)
        num_pixels = max(bucket.width_px * bucket.height_px for bucket in self.spec.buckets)
        self.encode_pool = OldestFirstPool("encode", encoder.num_threads(num_pixels))
        self.fetched = Room(_FETCHED_BYTES)
        self.decoding = Room(_DECODING_BYTES)
        self.batched = Room(_BATCHED_BYTES)
        self.finished = self.stage_times()
        self.active: list[_Attempt] = []
        self.num_rows = 0
        self.rejects: Counter[tuple[str, str]] = Counter()  # by stage and reason
        self.num_source_bytes = 0
        self.num_output_bytes = 0
        self._ranks = itertools.count()
        self._versions = {
            "latentcache": __version__,
            "torch": torch.__version__,
            "pillow": version("pillow"),
            "simplejpeg": version("simplejpeg"),
        }
        if triton := encoder.triton:
            self._versions["triton"] = triton

    def run(self, task: UnitTask) -> Receipt | UnitFailure:
        """Encode one unit and upload its files; one that another run has committed by now is done.

        Whatever goes wrong becomes the failure of the unit; see `at_boundary`.
        """
        return at_boundary(task, partial(self._run, task))

    def _run(self, task: UnitTask) -> Receipt:
        if committed := committed_receipt(self.output, task):
            return committed
        try:
            return self._attempt(task, gather=False)
        except NotGrouped:
            return self._attempt(task, gather=True)

    def _attempt(self, task: UnitTask, *, gather: bool) -> Receipt:
        with TemporaryDirectory(prefix="latentcache-") as folder:
            attempt = _Attempt(self, task, next(self._ranks), Path(folder), gather=gather)
            self.active.append(attempt)
            try:
                return attempt.run()
            finally:
                self.active.remove(attempt)
                self.num_source_bytes += attempt.num_source_bytes
                self.num_output_bytes += attempt.num_output_bytes
                for stage, times in attempt.times.items():
                    self.finished[stage].add(times.busy_s, times.wait_s)

    def stage_times(self) -> dict[str, StageTimes]:
        """Give new clocks for all stages, in the order in which a sample passes them.

        The threads of decoder and encoder, which QA shares, are there for all units; of the other
        stages each unit has one.
        """
        return {
            "fetch": StageTimes(UNITS_PER_ACTOR),
            "decode": StageTimes(self.decode_pool.num_threads),
            "encode": StageTimes(self.encode_pool.num_threads),
            "write": StageTimes(UNITS_PER_ACTOR),
            "qa": StageTimes(self.encode_pool.num_threads),
            "upload": StageTimes(UNITS_PER_ACTOR),
        }

    def stats(self) -> dict[str, float]:
        """Give cumulative figures: rows, rejects, bytes read from the source and written to the
        output, and those of each stage, `<stage>_busy_s` etc.
        """
        stages, active = self.stage_times(), list(self.active)
        for found in [self.finished, *(attempt.times for attempt in active)]:
            for stage, times in found.items():
                stages[stage].add(times.busy_s, times.wait_s)
        source_bytes = sum(attempt.num_source_bytes for attempt in active)
        output_bytes = sum(attempt.num_output_bytes for attempt in active)
        return {
            "num_rows": self.num_rows,
            "num_rejects": self.rejects.total(),
            "num_source_bytes": self.num_source_bytes + source_bytes,
            "num_output_bytes": self.num_output_bytes + output_bytes,
            **{
                f"{stage}_{name}": value
                for stage, times in stages.items()
                for name, value in times.to_json().items()
            },
        }

    def receipt(
        self,
        record: UnitRecord,
        statistics: Statistics,
        stages: dict[str, StageTimes],
        elapsed_s: float,
        notes: dict[str, int],
        fields: tuple[str, ...],
    ) -> Receipt:
        """Write up a finished attempt."""
        if self.evaluator and self.evaluator.agreement_db is not None:
            notes = {**notes, "decoder_agreement_db": int(self.evaluator.agreement_db)}
        return Receipt(
            record=record,
            contract_fingerprint=self.job.contract.fingerprint,
            statistics=statistics,
            stages={stage: times.to_json() for stage, times in stages.items()},
            elapsed_s=round(elapsed_s, 3),
            versions=self._versions,
            notes=notes,
            fields=fields,
        )


_Decoded = tuple[Transformed, RowMeta]
_Outcome = tuple[_Decoded, Counter[str]] | RejectRow  # a sample, with the notes on its text fields
_Batch = tuple[Bucket, list[RowMeta], torch.Tensor, "Future[Callable[[], Encoded]]"]


class _Attempt:
    """One attempt at one unit, in the order in which its data passes."""

    def __init__(
        self, runner: UnitRunner, task: UnitTask, rank: int, folder: Path, *, gather: bool
    ) -> None:
        self.runner = runner
        self.gather = gather
        self.contract = runner.job.contract
        self.columns = runner.job.columns
        self.seen = SeenFields(self.columns)
        self.task = task
        self.rank = rank
        self.folder = folder
        self.stem = f"{task.generation}-{task.attempt}"
        self.began = time.perf_counter()
        self.times = runner.stage_times()
        self.rejects: list[RejectRow] = []
        self.counts = SampleCounts()
        self.num_source_bytes = 0
        self.num_output_bytes = 0
        self.notes = Counter({"encoded_again_in_fp32": 0})
        if gather:
            self.notes["gathered_by_key"] = 1
        if self.contract.latents.quantization:
            self.notes["clamped_values"] = 0
        self.num_thumbnails: Counter[str] = Counter()
        self.sample: QaSample | None = None
        if runner.job.qa and runner.evaluator:
            self.sample = QaSample(runner.job.qa.sample, task.qa_wanted, task.unit.id, folder)
        self.statistics = Statistics.empty(self.contract.stored_channels)

    def run(self) -> Receipt:
        runner = self.runner
        writers: dict[Bucket, BucketWriter] = {}
        num_threads = runner.decode_pool.num_threads
        crop_bytes = max(_crop_bytes(bucket) for bucket in runner.spec.buckets)
        ahead = min(2 * num_threads + 16, max(num_threads, _CROPPED_BYTES // crop_bytes))
        try:
            with ExitStack() as stack:
                decoding = stack.enter_context(
                    Background(self._decode_all(), ahead, self.times["fetch"])
                )
                depth = runner.encode_pool.num_threads + _BATCHES_AHEAD
                batches = stack.enter_context(Background(self._batch(decoding), depth))
                stack.callback(runner.decode_pool.drop, self.rank)
                stack.callback(runner.encode_pool.drop, self.rank)
                stack.callback(decoding.stop)
                for bucket, rows, images, encoding in batches:
                    encoded = encoding.result()()
                    # A GPU works after the encode thread has only told it to.
                    self.times["encode"].add(busy_s=encoded.busy_s - encoded.start_s)
                    with self.times["write"].working():
                        self._write(writers, bucket, rows, images, encoded)
            with self.times["write"].working():
                for writer in writers.values():
                    writer.close()
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        return self._finish(list(writers.values()))

    def _decode_all(self) -> Iterator[Future[_Outcome]]:
        """Fetch: read samples in order, and queue each to be decoded."""
        budget = SampleBudget(self.runner.fetched, self.contract.source.max_sample_bytes)
        samples = read_samples(
            self.task.shard,
            self.contract.source,
            keep=tuple(column.field for column in self.columns),
            options=self.runner.job.source_storage,
            gather=self.gather,
            on_read=self._count_bytes,
            reserve=budget.reserve,
        )
        try:
            for sample in islice(samples, self.task.max_samples):
                self.counts.add(sample)
                self.seen.add(sample.names)
                num_bytes = sample.num_bytes if isinstance(sample, Sample) else 0
                budget.finish(num_bytes)
                # The thread of this stage counts as busy throughout.
                self.times["fetch"].add(-budget.waited_s, budget.waited_s)
                budget.waited_s = 0.0
                job = partial(self._decode_in_room, sample)
                future = self.runner.decode_pool.submit(self.rank, job, self.times["decode"])
                future.add_done_callback(partial(_give_back, self.runner.fetched, num_bytes))
                yield future
        finally:
            budget.close()

    def _count_bytes(self, num_bytes: int) -> None:
        self.num_source_bytes += num_bytes

    def _decode_in_room(self, sample: Sample | RejectedSample) -> _Outcome:
        room, held = self.runner.decoding, 0

        def reserve(num_bytes: int) -> None:
            nonlocal held
            room.give_back(held)  # first, so that nobody waits for more with some in hand
            held = 0
            waited_s = room.take(num_bytes)
            held = num_bytes
            self.times["decode"].add(busy_s=-waited_s)  # more threads would only wait with it

        try:
            return self._decode(sample, reserve)
        finally:
            room.give_back(held)

    def _decode(self, sample: Sample | RejectedSample, reserve: Reserve) -> _Outcome:
        if isinstance(sample, RejectedSample):
            return reject_row(sample.key, sample.reject, has_image=sample.num_images > 0)
        spec, notes = self.runner.spec, Counter[str]()
        try:
            columns = read_columns(sample.fields, self.columns, notes)
            done = load_image(sample.image, spec, reserve)
        except Reject as reject:
            thumbnail = None
            if reject.stage == "transform" and self._wants_thumbnail(reject):
                with suppress(Reject):  # in full, it may not be decoded
                    image = decode_image(sample.image, max_pixels=spec.max_pixels, reserve=reserve)
                    thumbnail = write_thumbnail(torch.from_numpy(image).permute(2, 0, 1))
            return reject_row(sample.key, reject, thumbnail)
        row = RowMeta(
            key=sample.key,
            original_width=done.original_width,
            original_height=done.original_height,
            crop_top=done.crop_top,
            crop_left=done.crop_left,
            columns=columns,
        )
        return (done, row), notes

    def _batch(self, decoding: Background[Future[_Outcome]]) -> Iterator[_Batch]:
        """Group by bucket, in order, and queue each full batch to be encoded."""
        groups: dict[Bucket, list[_Decoded]] = {}
        for future in decoding:
            outcome = future.result()
            if isinstance(outcome, RejectRow):
                self._reject(outcome)
                continue
            (image, row), notes = outcome
            self.notes.update(notes)
            bucket = image.bucket
            if self.sample:
                self.sample.offer(bucket.name, row.key, image.pixels)
            group = groups.setdefault(bucket, [])
            group.append((image, row))
            size = self.runner.encoder.batch_size(bucket.width_px, bucket.height_px)
            if len(group) >= -(-_MIN_TOGETHER // size) * size:
                yield self._encode_in_room(bucket, groups.pop(bucket))
        for bucket, group in groups.items():
            yield self._encode_in_room(bucket, group)

    def _encode_in_room(self, bucket: Bucket, group: list[_Decoded]) -> _Batch:
        num_bytes = len(group) * _crop_bytes(bucket)
        self.runner.batched.take(num_bytes)
        batch = self._encode_later(bucket, group)
        batch[-1].add_done_callback(partial(_give_back, self.runner.batched, num_bytes))
        return batch

    def _encode_later(self, bucket: Bucket, group: list[_Decoded]) -> _Batch:
        rows = [row for _, row in group]
        images = torch.stack([done.pixels for done, _ in group])

        start = partial(self.runner.encoder.start, images)
        job = self.runner.encode_pool.submit(self.rank, start, self.times["encode"])
        return bucket, rows, images, job

    def _write(
        self,
        writers: dict[Bucket, BucketWriter],
        bucket: Bucket,
        rows: list[RowMeta],
        images: torch.Tensor,
        encoded: Encoded,
    ) -> None:
        self.notes["encoded_again_in_fp32"] += encoded.num_in_fp32
        posterior, keys = self.contract.latents.posterior, [row.key for row in rows]
        latents = draw_latents(encoded.moments, posterior, self.task.unit.id, keys)
        stored, num_clamped = to_stored(latents, self.contract.latents)
        # Storing may overflow where encoding did not: float16 ends at 65,504.
        finite = is_finite(stored).all(dim=(1, 2, 3))
        finite[list(encoded.bad)] = False
        for index in (~finite).nonzero().flatten().tolist():
            message = f"the latent overflows {self.contract.latents.dtype}"
            if index in encoded.bad:
                message = "the latent is not finite, in fp32 too"
            reject = Reject("encode", "not_finite", message)
            thumbnail = None
            if self._wants_thumbnail(reject):
                thumbnail = write_thumbnail(images[index])
            self._reject(reject_row(rows[index].key, reject, thumbnail))
        kept = stored[finite]
        if not len(kept):
            return
        if bucket not in writers:
            stem = self.folder / f"{self.stem}-{bucket.name}"
            writers[bucket] = BucketWriter(
                stem, self.contract, self.columns, self.task.unit.id, bucket
            )
        kept_rows = [row for row, good in zip(rows, finite.tolist(), strict=True) if good]
        writers[bucket].append(kept, kept_rows)
        if self.contract.latents.quantization:
            self.notes["clamped_values"] += int(num_clamped[finite].sum())
        values = to_values(kept, self.contract.latents)
        self.statistics = self.statistics.merge(Statistics.of(values.numpy()))
        self.runner.num_rows += len(kept)

    def _wants_thumbnail(self, reject: Reject) -> bool:
        # They are counted as rejects are taken in, in order, so that the first never miss theirs.
        return self.num_thumbnails[reject.reason] < _MAX_THUMBNAILS

    def _reject(self, row: RejectRow) -> None:
        self.num_thumbnails[row.reason] += row.thumbnail is not None
        if self.num_thumbnails[row.reason] > _MAX_THUMBNAILS:
            row = replace(row, thumbnail=None)
        self.rejects.append(row)
        self.runner.rejects[row.stage, row.reason] += 1

    def _evaluate(self, writers: list[BucketWriter]) -> QaFile | None:
        """Look at the chosen rows, as they lie in the closed files."""
        qa, evaluator = self.runner.job.qa, self.runner.evaluator
        if not (qa and evaluator and self.sample):
            return None

        def submit(job: Callable[[], list[QaRow]]) -> list[QaRow]:
            return self.runner.encode_pool.submit(self.rank, job, self.times["qa"]).result()

        num_channels = self.contract.vae.latent_channels
        signal = float(np.square(self.statistics.std[:num_channels]).mean())
        rows = self.sample.evaluate(writers, evaluator, signal, submit)
        path = f"qa/{self.task.unit.id}/{self.stem}.parquet"
        decoder = qa.models.decoder or self.runner.job.checkpoint
        return write_qa(self.folder / "qa.parquet", path, rows, decoder)

    def _finish(self, writers: list[BucketWriter]) -> Receipt:
        """Check the closed files, upload them, and write the receipt."""
        files: list[tuple[Path, DataFile]] = []
        rejects: DataFile | None = None
        with self.times["write"].working():
            for writer in writers:
                writer.check()
                for local in writer.paths:
                    path = f"data/{self.task.unit.id}/{local.name}"
                    name = writer.bucket.name
                    files.append((local, describe_file(local, path, writer.num_rows, name)))
            if self.rejects:
                local = self.folder / f"{self.stem}.parquet"
                write_rejects(local, self.rejects)
                path = f"rejects/{self.task.unit.id}/{local.name}"
                rejects = describe_file(local, path, len(self.rejects), "")
        qa = self._evaluate(writers)
        with self.times["upload"].working():
            for local, file in files:
                self._upload(local, file)
            if rejects:
                self._upload(self.folder / f"{self.stem}.parquet", rejects)
            if qa:
                self._upload(self.folder / "qa.parquet", qa.file)
        num_rows = sum(writer.num_rows for writer in writers)
        num_with_image = sum(reject.has_image for reject in self.rejects)
        self.counts.check(self.task.unit.title, num_rows, len(self.rejects), num_with_image)
        record = UnitRecord(
            unit=self.task.unit,
            generation=self.task.generation,
            attempt=self.task.attempt,
            num_samples=self.counts.num_samples,
            num_rows=num_rows,
            num_rejects=len(self.rejects),
            num_images=self.counts.num_images,
            num_extra_images=self.counts.num_extra_images,
            files=tuple(file for _, file in files),
            rejects=rejects,
            qa=qa,
            columns=self.columns,
            absent_fields=self.seen.absent,
            reject_reasons=count_reasons(self.rejects),
        )
        elapsed_s = time.perf_counter() - self.began
        notes = dict(self.notes)
        receipt = self.runner.receipt(
            record, self.statistics, self.times, elapsed_s, notes, self.seen.names
        )
        return replace(receipt, extra_image_fields=self.counts.extra_image_fields)

    def _upload(self, local: Path, file: DataFile) -> None:
        self.runner.output.put_file(local, file.path)
        self.num_output_bytes += file.size_bytes


def _crop_bytes(bucket: Bucket) -> int:
    return 3 * bucket.width_px * bucket.height_px


def _give_back(room: Room, num_bytes: int, _: Future[Any]) -> None:
    room.give_back(num_bytes)


def reject_row(
    key: str | None, reject: Reject, thumbnail: bytes | None = None, *, has_image: bool = True
) -> RejectRow:
    """Return the row that a rejected sample leaves."""
    return RejectRow(key, reject.stage, reject.reason, reject.message, thumbnail, has_image)
