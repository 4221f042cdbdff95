"""Encoding a unit from source shard to uploaded files: fetch, decode, batch, encode, write, upload.

A process runs two units at a time: while one is finished, the next is already fetched and decoded,
so the encoder does not wait between shards. Only the driver puts receipts, so a process that it
considers dead cannot commit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from latentcache import __version__
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.quantization import is_finite, to_stored, to_values
from latentcache.dataset.receipts import QaFile, Receipt
from latentcache.dataset.shards import RejectRow, RowMeta
from latentcache.dataset.statistics import Statistics
from latentcache.engine.attempt import Attempt, AttemptRunner, Totals, reject_row
from latentcache.engine.job import Job, UnitTask
from latentcache.engine.stages import ByteBudget, OldestFirstPool, PrefetchIterator, SampleBudget
from latentcache.errors import Reject
from latentcache.image_files import write_thumbnail
from latentcache.images.decode import Reserve, decode_image
from latentcache.images.source import RejectedSample, Sample
from latentcache.images.text_fields import read_columns
from latentcache.images.transform import Transformed, load_image, transform_spec
from latentcache.qa.evaluator import QaEvaluator, QaSample
from latentcache.qa.qa_files import QaRow, write_qa
from latentcache.vae.encoder import Encoded, LatentEncoder, draw_latents

# The most rejects of one reason in one unit that get a thumbnail, if they can be decoded.
_MAX_THUMBNAILS = 8

# The least number of images that go to the encoder together, even if its batches are smaller.
# Passing single images between threads costs a fifth of the rate of a run.
_MIN_TOGETHER = 8

# Batches of a unit that may wait for the encoder or the writer, besides one for each encode thread.
_EXTRA_BATCHES = 1

# An actor uses less than 2 GiB besides its model, for images of any size. Python with torch and
# pyarrow uses a quarter of that. These budgets limit what the two units of an actor hold together:
# bytes of samples that wait to be decoded; memory of images during decoding, enough for 16 threads
# on JPEGs of 16 megapixels; and batches that wait for the encoder. An item that is larger than its
# budget is processed alone.
_FETCHED_BYTES = 256 * 2**20
_DECODING_BYTES = 768 * 2**20
_BATCHED_BYTES = 256 * 2**20

# Each unit may also hold this many bytes of crops between decoder and batch, or one crop for each
# decode thread if that is more.
_CROPPED_BYTES = 128 * 2**20


class UnitRunner(AttemptRunner):
    """A runner that encodes units; `run` may be called from two threads at once."""

    def __init__(
        self,
        job: Job,
        encoder: LatentEncoder,
        evaluator: QaEvaluator | None = None,
        totals: Totals | None = None,
    ) -> None:
        super().__init__(job, totals or Totals())
        self.encoder = encoder
        self.evaluator = evaluator
        self.spec = transform_spec(job.contract)
        self.decode_pool = OldestFirstPool("decode", job.decode_threads)
        num_pixels = max(bucket.width_px * bucket.height_px for bucket in self.spec.buckets)
        self.encode_pool = OldestFirstPool("encode", encoder.num_threads(num_pixels))
        # All units share these threads, and QA runs on those of the encoder.
        self.totals.times["decode"].num_threads = self.decode_pool.num_threads
        for stage in ("encode", "qa"):
            self.totals.times[stage].num_threads = self.encode_pool.num_threads
        self.fetched = ByteBudget(_FETCHED_BYTES)
        self.decoding = ByteBudget(_DECODING_BYTES)
        self.batched = ByteBudget(_BATCHED_BYTES)
        self.ranks = itertools.count()  # of attempts, in the order in which they began
        self.versions = {
            "latentcache": __version__,
            "torch": torch.__version__,
            "pillow": version("pillow"),
            "simplejpeg": version("simplejpeg"),
        }
        if triton := encoder.triton:
            self.versions["triton"] = triton

    def _new_attempt(self, task: UnitTask, folder: Path, gather: bool) -> Attempt:
        return _Encoding(self, task, folder, gather)


_Decoded = tuple[Transformed, RowMeta]
_Outcome = tuple[_Decoded, Counter[str]] | RejectRow  # a sample with notes on its text fields
_Batch = tuple[Bucket, list[RowMeta], torch.Tensor, "Future[Callable[[], Encoded]]"]


class _Encoding(Attempt):
    """One attempt at encoding one unit; its methods are in the order of the data flow."""

    def __init__(self, runner: UnitRunner, task: UnitTask, folder: Path, gather: bool) -> None:
        super().__init__(runner, task, folder, gather)
        self.runner = runner
        self.rank = next(runner.ranks)
        self.notes["encoded_again_in_fp32"] = 0
        if gather:
            self.notes["gathered_by_key"] = 1
        if self.contract.latents.quantization:
            self.notes["clamped_values"] = 0
        self.num_thumbnails: Counter[str] = Counter()
        self.qa_sample: QaSample | None = None
        if (qa := self.job.qa) and runner.evaluator:
            unit_id = task.unit.id
            self.qa_sample = QaSample(qa.fraction, qa.seed, task.min_qa_rows, unit_id, folder)
        self.statistics = Statistics.empty(self.contract.stored_channels)

    def run(self) -> Receipt:
        runner, evaluator = self.runner, self.runner.evaluator
        num_threads = runner.decode_pool.num_threads
        crop_bytes = max(_crop_bytes(bucket) for bucket in runner.spec.buckets)
        max_decoded = min(2 * num_threads + 16, max(num_threads, _CROPPED_BYTES // crop_bytes))
        max_batches = runner.encode_pool.num_threads + _EXTRA_BATCHES
        with self._writing(), ExitStack() as stack:
            samples = self.times["fetch"].produce(self._decode_all())
            decoding = stack.enter_context(PrefetchIterator(samples, max_decoded))
            batches = stack.enter_context(PrefetchIterator(self._batch(decoding), max_batches))
            stack.callback(runner.decode_pool.drop, self.rank)
            stack.callback(runner.encode_pool.drop, self.rank)
            stack.callback(decoding.stop)
            for bucket, rows, images, encoding in batches:
                encoded = encoding.result()()
                # The encode thread only starts the work of a GPU, whose time is added here.
                self.times["encode"].add(busy_s=encoded.busy_s - encoded.start_s)
                with self.times["write"].working():
                    self._write(bucket, rows, images, encoded)
        record = self._publish(self.writers.values(), self._evaluate)
        if evaluator and evaluator.agreement_db is not None:
            self.notes["decoder_agreement_db"] = int(evaluator.agreement_db)
        return Receipt(
            record=record,
            contract_fingerprint=self.contract.fingerprint,
            statistics=self.statistics,
            versions=runner.versions,
            notes=dict(self.notes),
            **self._measured(),
        )

    def _decode_all(self) -> Iterator[Future[_Outcome]]:
        """Read samples in order, queue each to be decoded, and yield the future of its result."""
        fetched, times = self.runner.fetched, self.times
        budget = SampleBudget(fetched, self.contract.source.max_sample_bytes, times["fetch"])
        try:
            for sample in self.read_samples(budget.reserve):
                num_bytes = sample.num_bytes if isinstance(sample, Sample) else 0
                budget.finish(num_bytes)
                job = partial(self._decode_in_budget, sample)
                future = self.runner.decode_pool.submit(self.rank, job, times["decode"])
                future.add_done_callback(partial(lambda held, _: fetched.release(held), num_bytes))
                yield future
        finally:
            budget.close()

    def _decode_in_budget(self, sample: Sample | RejectedSample) -> _Outcome:
        budget, held = self.runner.decoding, 0

        def reserve(num_bytes: int) -> None:
            nonlocal held
            budget.release(held)  # first, because no thread may wait while it holds bytes
            held = 0
            waited_s = budget.acquire(num_bytes)
            held = num_bytes
            self.times["decode"].add(busy_s=-waited_s)  # more threads would wait too

        try:
            return self._decode(sample, reserve)
        finally:
            budget.release(held)

    def _decode(self, sample: Sample | RejectedSample, reserve: Reserve) -> _Outcome:
        if isinstance(sample, RejectedSample):
            return reject_row(sample.key, sample.reject, has_image=sample.num_images > 0)
        spec, notes = self.runner.spec, Counter[str]()
        try:
            columns = read_columns(sample.fields, self.columns, notes)
            done = load_image(sample.image, spec, reserve)
        except Reject as reject:
            thumbnail = None
            if reject.stage == "transform" and self._needs_thumbnail(reject):
                with suppress(Reject):  # decoding the full image may fail
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

    def _batch(self, decoding: PrefetchIterator[Future[_Outcome]]) -> Iterator[_Batch]:
        """Group samples by bucket, in order, and queue each full batch to be encoded."""
        groups: dict[Bucket, list[_Decoded]] = {}
        for future in decoding:
            outcome = future.result()
            if isinstance(outcome, RejectRow):
                self._reject(outcome)
                continue
            (image, row), notes = outcome
            self.notes.update(notes)
            bucket = image.bucket
            if self.qa_sample:
                self.qa_sample.offer(bucket.name, row.key, image.pixels)
            group = groups.setdefault(bucket, [])
            group.append((image, row))
            size = self.runner.encoder.batch_size(bucket.width_px, bucket.height_px)
            if len(group) >= -(-_MIN_TOGETHER // size) * size:
                yield self._encode(bucket, groups.pop(bucket))
        for bucket, group in groups.items():
            yield self._encode(bucket, group)

    def _encode(self, bucket: Bucket, group: list[_Decoded]) -> _Batch:
        batched, num_bytes = self.runner.batched, len(group) * _crop_bytes(bucket)
        batched.acquire(num_bytes)
        images = torch.stack([done.pixels for done, _ in group])
        job = partial(self.runner.encoder.start, images)
        encoding = self.runner.encode_pool.submit(self.rank, job, self.times["encode"])
        encoding.add_done_callback(lambda _: batched.release(num_bytes))
        return bucket, [row for _, row in group], images, encoding

    def _write(
        self, bucket: Bucket, rows: list[RowMeta], images: torch.Tensor, encoded: Encoded
    ) -> None:
        self.notes["encoded_again_in_fp32"] += encoded.num_in_fp32
        posterior, keys = self.contract.latents.posterior, [row.key for row in rows]
        latents = draw_latents(encoded.moments, posterior, self.task.unit.id, keys)
        stored, num_clamped = to_stored(latents, self.contract.latents)
        # The stored dtype may overflow although encoding did not: the largest float16 is 65,504.
        finite = is_finite(stored).all(dim=(1, 2, 3))
        finite[list(encoded.bad)] = False
        for index in (~finite).nonzero().flatten().tolist():
            message = f"the latent overflows {self.contract.latents.dtype}"
            if index in encoded.bad:
                message = "the latent is not finite, even in fp32"
            reject = Reject("encode", "not_finite", message)
            thumbnail = write_thumbnail(images[index]) if self._needs_thumbnail(reject) else None
            self._reject(reject_row(rows[index].key, reject, thumbnail))
        kept = stored[finite]
        if not len(kept):
            return
        kept_rows = [row for row, good in zip(rows, finite.tolist(), strict=True) if good]
        self._append(bucket, kept, kept_rows)
        if self.contract.latents.quantization:
            self.notes["clamped_values"] += int(num_clamped[finite].sum())
        values = to_values(kept, self.contract.latents)
        self.statistics = self.statistics.merge(Statistics.of(values.numpy()))

    def _needs_thumbnail(self, reject: Reject) -> bool:
        # `_reject` counts thumbnails in the order of the samples, so the first rejects get them.
        return self.num_thumbnails[reject.reason] < _MAX_THUMBNAILS

    def _reject(self, row: RejectRow) -> None:
        self.num_thumbnails[row.reason] += row.thumbnail is not None
        if self.num_thumbnails[row.reason] > _MAX_THUMBNAILS:
            row = replace(row, thumbnail=None)
        super()._reject(row)

    def _evaluate(self) -> tuple[Path, QaFile] | None:
        """Evaluate the sampled rows, as they are stored in the closed files; write the QA file."""
        if not self.qa_sample:
            return None
        qa, evaluator = self.job.qa, self.runner.evaluator
        assert qa
        assert evaluator

        def submit(job: Callable[[], list[QaRow]]) -> list[QaRow]:
            return self.runner.encode_pool.submit(self.rank, job, self.times["qa"]).result()

        std = self.statistics.std[: self.contract.vae.latent_channels]
        signal = float(np.square(std).mean())
        rows = self.qa_sample.evaluate(self.writers.values(), evaluator, signal, submit)
        local = self.folder / "qa.parquet"
        path = f"qa/{self.task.unit.id}/{self.stem}.parquet"
        file = write_qa(local, path, rows, qa.models.decoder or self.job.checkpoint)
        return (local, file) if file else None


def _crop_bytes(bucket: Bucket) -> int:
    return 3 * bucket.width_px * bucket.height_px
