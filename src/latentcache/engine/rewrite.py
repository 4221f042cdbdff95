"""Rewriting a unit: its rows are written again with other kept columns and the stored latents.

The same version of the source is read again, and each sample gets the stored row of its key. If a
sample has no row or a row has no sample, the unit is encoded, which is always correct: a sample may
have been rejected for a field that is no longer kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.layout import latent_offsets, row_bytes, row_group_rows, tensor_from_bytes
from latentcache.dataset.parquet import read_table
from latentcache.dataset.quantization import to_values
from latentcache.dataset.receipts import DataFile, Receipt, read_receipts
from latentcache.dataset.shards import BucketWriter, RejectRow, RowMeta, iterate_latents
from latentcache.dataset.statistics import Statistics
from latentcache.engine.attempt import Attempt, AttemptRunner, at_boundary, reject_row
from latentcache.engine.job import UnitFailure, UnitTask
from latentcache.errors import DatasetError, ObjectNotFound, Reject
from latentcache.images.source import RejectedSample, Sample
from latentcache.images.text_fields import read_columns
from latentcache.storage.failures import named_local

_SIZES = ("original_width", "original_height", "crop_top", "crop_left")

_LATENTS_AT_ONCE = 64
_CHUNK_BYTES = 2**20


class _NeedsEncoding(Exception):
    """The unit cannot be rewritten from its stored files."""


class Rewriter(AttemptRunner):
    """A runner that rewrites units; two threads may call it at once."""

    def rewrite(self, task: UnitTask) -> Receipt | UnitFailure | None:
        """Rewrite one unit and upload its files; return None if it must be encoded instead."""
        return at_boundary(task, partial(self._rewrite, task))

    def _rewrite(self, task: UnitTask) -> Receipt | None:
        try:
            return self._run(task)
        except _NeedsEncoding:
            return None

    def _new_attempt(self, task: UnitTask, folder: Path, gather: bool) -> Attempt:
        return _Rewrite(self, task, folder, gather)


class _Rewrite(Attempt):
    """One attempt at rewriting one unit; its stages are `fetch`, `write` and `upload`."""

    def run(self) -> Receipt:
        """Rewrite the unit and return its receipt, or raise `_NeedsEncoding`."""
        name = f"{self.task.unit.id}-{self.task.generation - 1}"
        (before,) = read_receipts(self.output, [name])
        record, qa = before.record, None
        with self.times["fetch"].working():
            files: dict[str, list[Path]] = {}
            for file in record.files:
                files.setdefault(file.bucket, []).append(self._fetch(file))
            # Rejects of samples with read errors are not kept: these samples are read again.
            rows = read_table(self._fetch(record.rejects)).to_pylist() if record.rejects else []
            rejects = {row["key"]: RejectRow(**row) for row in rows if row["stage"] != "read"}
            if record.qa:  # it stays valid, because the latents do not change
                path = f"qa/{self.task.unit.id}/{self.stem}.parquet"
                file = replace(record.qa.file, path=path)
                qa = self._fetch(record.qa.file), replace(record.qa, file=file)
        with self._writing():
            self._write_rows(files, rejects)
        if self.samples.num_samples != record.num_samples:
            raise _NeedsEncoding
        buckets = map(Bucket.parse, files)
        writers = [self.writers[bucket] for bucket in buckets if bucket in self.writers]
        record = self._publish(writers, lambda: qa)
        statistics = before.statistics
        if record.num_rows != before.record.num_rows:
            statistics = _statistics_of(writers, self.contract)
        # Notes on encoding the latents stay; those on reading texts are new.
        kept = (before.notes or {}).items()
        notes = {name: number for name, number in kept if not name.startswith("text_as_")}
        return replace(
            before,
            record=record,
            statistics=statistics,
            notes=notes | dict(self.notes),
            **self._measured(),
        )

    def _fetch(self, file: DataFile) -> Path:
        """Copy a stored file to local disk; it must have its hash."""
        digest = hashlib.sha256()
        target = self.folder / f"stored-{file.path.replace('/', '-')}"
        try:
            with (
                self.output.open(file.path) as source,
                named_local(target),
                target.open("wb") as copy,
            ):
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
        except ObjectNotFound as error:
            raise _NeedsEncoding from error
        if digest.hexdigest() != file.sha256:
            raise _NeedsEncoding
        return target

    def _write_rows(
        self, files: dict[str, list[Path]], rejects: dict[str | None, RejectRow]
    ) -> None:
        """Write each stored row with the columns of its sample; buckets keep the samples' order."""
        stored: dict[str, Iterator[_StoredRow]] = {}
        bucket_names: dict[str | None, str] = {}
        for name, paths in files.items():
            try:
                table = read_table(paths[-1], ["key", *_SIZES]).to_pylist()
            except (DatasetError, pa.ArrowException, OSError) as error:
                raise _NeedsEncoding from error
            stored[name] = _read_rows(paths, table, self.contract, Bucket.parse(name))
            bucket_names |= {row["key"]: name for row in table}
        samples = self.read_samples()
        while True:
            with self.times["fetch"].working():
                sample = next(samples, None)
            if sample is None:
                break
            with self.times["write"].working():
                bucket = bucket_names.pop(sample.key, None)
                row = next(stored[bucket], None) if bucket else None
                if bucket and (row is None or row.meta.key != sample.key):
                    raise _NeedsEncoding
                self._write_sample(sample, row, rejects)
        if bucket_names:  # rows without a sample
            raise _NeedsEncoding

    def _write_sample(
        self,
        sample: Sample | RejectedSample,
        row: _StoredRow | None,
        rejects: dict[str | None, RejectRow],
    ) -> None:
        """Write one sample as a row or a reject, as encoding it would."""
        if isinstance(sample, RejectedSample):
            has_image = sample.num_images > 0
            self._reject(reject_row(sample.key, sample.reject, has_image=has_image))
            return
        try:
            columns = read_columns(sample.fields, self.columns, self.notes)
        except Reject as reject:
            self._reject(reject_row(sample.key, reject))
            return
        if row:
            meta = replace(row.meta, columns=columns)
            self._append(row.bucket, row.latent[None], [meta])
        elif sample.key in rejects:
            self._reject(rejects[sample.key])
        else:
            raise _NeedsEncoding


class _StoredRow(NamedTuple):
    """A stored row without its columns, and its latent [C, H, W] in the stored dtype."""

    bucket: Bucket
    meta: RowMeta
    latent: torch.Tensor


def _read_rows(
    paths: list[Path], table: list[dict[str, Any]], contract: Contract, bucket: Bucket
) -> Iterator[_StoredRow]:
    """Yield the rows of a bucket's files, one at a time; `table` holds the fields of `RowMeta`."""
    size, group_rows = row_bytes(contract, bucket), row_group_rows(contract, bucket)
    stride = size + (4 if contract.latents.format == "parquet" else 0)
    dtype, shape = contract.latents.dtype, contract.latent_shape(bucket)
    with paths[0].open("rb") as raw, paths[-1].open("rb") as last:
        try:
            files = [raw, last][: len(paths)]
            offsets = latent_offsets(files, contract, bucket, len(table))
        except (DatasetError, OSError) as error:
            raise _NeedsEncoding from error
        for index, row in enumerate(table):
            group, within = divmod(index, group_rows)
            raw.seek(offsets[group] + within * stride)
            latent = tensor_from_bytes(raw.read(size), dtype, shape)
            yield _StoredRow(bucket, RowMeta(**row, columns={}), latent)


def _statistics_of(writers: Iterable[BucketWriter], contract: Contract) -> Statistics:
    """Compute the statistics of the latent values in closed files."""
    statistics = Statistics.empty(contract.stored_channels)
    for writer in writers:
        left = iterate_latents(writer.paths)
        while rows := list(islice(left, _LATENTS_AT_ONCE)):
            latents = torch.stack([latent for _, latent in rows])
            values = to_values(latents, contract.latents).numpy()
            statistics = statistics.merge(Statistics.of(values))
    return statistics
