"""Rewriting a unit: its rows are written again with other kept columns and the stored latents.

No image is decoded and no encoder is loaded. The same version of the source is read again, and each
sample gets the stored row of its key. If a sample has no row or a row has no sample, the unit is
encoded, which is always correct: a sample may have been rejected for a field that is no longer
kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.layout import (
    latent_offsets,
    row_bytes,
    row_group_rows,
    tensor_from_bytes,
)
from latentcache.dataset.parquet import read_table
from latentcache.dataset.quantization import to_values
from latentcache.dataset.receipts import DataFile, QaFile, Receipt, read_receipts
from latentcache.dataset.shards import (
    BucketWriter,
    RejectRow,
    RowMeta,
    iterate_latents,
)
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
    """A rewriter of units in this process; two threads may call it at once."""

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
        """Rewrite the unit and return its receipt.

        Raises:
            _NeedsEncoding: the stored files do not suffice.
        """
        name = f"{self.task.unit.id}-{self.task.generation - 1}"
        (before,) = read_receipts(self.output, [name])
        with ExitStack() as stack:
            with self.times["fetch"].working():
                stored = [
                    stack.enter_context(rows) for rows in self._fetch_rows(before.record.files)
                ]
                rejects = self._fetch_rejects(before.record.rejects)
                qa = self._fetch_qa(before.record.qa)
            with self.writing():
                self._write_rows(stored, rejects)
        if self.samples.num_samples != before.record.num_samples:
            raise _NeedsEncoding
        return self._finish(before, [rows.bucket for rows in stored], qa)

    def _fetch_rows(self, files: Iterable[DataFile]) -> Iterator[_StoredRows]:
        """Copy the files of the unit's rows to local disk and open them, bucket by bucket."""
        groups: dict[str, list[DataFile]] = {}
        for file in files:
            groups.setdefault(file.bucket, []).append(file)
        for bucket, group in groups.items():
            paths = [self._fetch(file) for file in group]
            yield _StoredRows(bucket, paths, self.contract, group[-1].num_rows)

    def _fetch(self, file: DataFile) -> Path:
        """Copy a stored file to local disk and check its hash.

        Raises:
            _NeedsEncoding: the file is missing or damaged.
        """
        store, digest = self.output, hashlib.sha256()
        target = self.folder / f"stored-{file.path.replace('/', '-')}"
        try:
            with store.open(file.path) as source, named_local(target), target.open("wb") as copy:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
        except ObjectNotFound as error:
            raise _NeedsEncoding from error
        if digest.hexdigest() != file.sha256:
            raise _NeedsEncoding
        return target

    def _fetch_rejects(self, file: DataFile | None) -> dict[str | None, RejectRow]:
        """Return the rejects of samples that were read without error, by key.

        Only these stay valid; samples with read errors are read again.
        """
        if file is None:
            return {}
        table = read_table(self._fetch(file))
        rows = (RejectRow(**row) for row in table.to_pylist())
        return {row.key: row for row in rows if row.stage != "read"}

    def _fetch_qa(self, qa: QaFile | None) -> tuple[Path, QaFile] | None:
        """Copy the QA file of the unit, which stays valid because the latents do not change."""
        if qa is None:
            return None
        path = f"qa/{self.task.unit.id}/{self.stem}.parquet"
        return self._fetch(qa.file), replace(qa, file=replace(qa.file, path=path))

    def _write_rows(self, stored: list[_StoredRows], rejects: dict[str | None, RejectRow]) -> None:
        """Read the samples, and write each stored row with the columns of its sample."""
        left = {key: (rows, index) for rows in stored for index, key in enumerate(rows.keys)}
        for sample in self._read_timed():
            position = left.pop(sample.key, None) if sample.key is not None else None
            with self.times["write"].working():
                self._write_sample(sample, position, rejects)
        if left:  # rows without a sample
            raise _NeedsEncoding

    def _read_timed(self) -> Iterator[Sample | RejectedSample]:
        """Yield the samples, and count the time of reading them."""
        samples = self.read_samples()
        while True:
            with self.times["fetch"].working():
                sample = next(samples, None)
            if sample is None:
                return
            yield sample

    def _write_sample(
        self,
        sample: Sample | RejectedSample,
        position: tuple[_StoredRows, int] | None,
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
        if position is None:
            if sample.key not in rejects:
                raise _NeedsEncoding
            self._reject(rejects[sample.key])
            return
        rows, index = position
        row = RowMeta(sample.key, **rows.sizes(index), columns=columns)
        self._append(rows.bucket, rows.read_latent(index)[None], [row])

    def _finish(
        self, before: Receipt, buckets: list[Bucket], qa: tuple[Path, QaFile] | None
    ) -> Receipt:
        """Upload the closed files and return the receipt."""
        writers = [self.writers[bucket] for bucket in buckets if bucket in self.writers]
        record = self.publish(writers, lambda: qa)
        statistics = before.statistics
        if record.num_rows != before.record.num_rows:
            statistics = _statistics_of(writers, self.contract)
        return replace(
            before,
            record=record,
            statistics=statistics,
            notes=_notes_after(before, self.notes),
            **self.measured(),
        )


class _StoredRows:
    """The rows of one bucket in files on local disk; `keys` is in the order of the rows.

    Args:
        name: the name of the bucket, `WIDTHxHEIGHT`.
        paths: the Parquet file, or the safetensors file and the Parquet file of its rows.
        contract: the contract of the files.
        num_rows: the number of rows in the files.

    Raises:
        _NeedsEncoding: the layout of the files differs from the contract.
    """

    def __init__(self, name: str, paths: list[Path], contract: Contract, num_rows: int) -> None:
        self.bucket = Bucket.parse(name)
        self._dtype = contract.latents.dtype
        self._shape = contract.latent_shape(self.bucket)
        self._size = row_bytes(contract, self.bucket)
        self._stride = self._size + (4 if contract.latents.format == "parquet" else 0)
        self._group_rows = row_group_rows(contract, self.bucket)
        self._raw = paths[0].open("rb")
        try:
            with paths[-1].open("rb") as rows:
                files = [self._raw] if len(paths) == 1 else [self._raw, rows]
                self._offsets = latent_offsets(files, contract, self.bucket, num_rows)
            table = read_table(paths[-1], ["key", *_SIZES])
        except (DatasetError, pa.ArrowException, OSError) as error:
            self._raw.close()
            raise _NeedsEncoding from error
        self.keys: list[str] = table["key"].to_pylist()
        self._sizes = {name: table[name].to_numpy() for name in _SIZES}

    def __enter__(self) -> _StoredRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def sizes(self, index: int) -> dict[str, int]:
        """Return the original size and the crop offset of a row, in pixels."""
        return {name: int(values[index]) for name, values in self._sizes.items()}

    def read_latent(self, index: int) -> torch.Tensor:
        """Read the latent of a row, [C, H, W] in the stored dtype."""
        group, within = divmod(index, self._group_rows)
        self._raw.seek(self._offsets[group] + within * self._stride)
        data = self._raw.read(self._size)
        return tensor_from_bytes(data, self._dtype, self._shape)


def _notes_after(before: Receipt, texts: Counter[str]) -> dict[str, int]:
    """Return the earlier notes on encoding the latents, and the new notes on reading texts."""
    kept = (before.notes or {}).items()
    return {name: n for name, n in kept if not name.startswith("text_as_")} | dict(texts)


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
