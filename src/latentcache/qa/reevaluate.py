"""Evaluate rows of a dataset again, with crops that the run kept or with source shards.

The results have the format of the run's own QA files, so that one report serves both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import torch

from latentcache.dataset.parquet import naming_damage, open_parquet
from latentcache.dataset.reader import Dataset
from latentcache.dataset.receipts import UnitRecord, UnitSummary
from latentcache.dataset.shards import check_schema, read_latents
from latentcache.errors import ConfigError, DatasetError, Reject, SourceError, StorageError
from latentcache.image_files import write_png
from latentcache.images.moved import NOT_MOVED, Moved
from latentcache.images.source import Sample, read_images, shard_of
from latentcache.images.transform import load_image, transform_spec
from latentcache.qa.access import NamedSources, find_checkpoint, shown
from latentcache.qa.evaluator import QaEvaluator, QaModels
from latentcache.qa.gates import Gates, QaTotals
from latentcache.qa.qa_files import QaFiles, QaRow, read_measures, read_qa_rows, write_qa
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions
from latentcache.vae.encoder import require_fp32
from latentcache.vae.weights import encoder_fingerprint, load_vae

_Crops = dict[str, dict[str, bytes]]  # PNG files of a unit's rows, by bucket and key
_Geometry = tuple[str | int, ...]  # bucket, original width and height, crop top and left


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows to evaluate, drawn with `seed` and spread over the buckets.

    If `num_units` is 0, the images are the crops that the run kept. Otherwise the source shards of
    that many units are read again, at the URLs to which they `moved`, and only if in `sources`.
    """

    num_rows: int = 256
    num_units: int = 0
    seed: int = 0
    sources: tuple[str, ...] = ()
    source_storage: StorageOptions = StorageOptions()
    moved: Moved = NOT_MOVED


@dataclass(slots=True)
class QaResult:
    """The result of an evaluation: the checkpoint that decoded, and the new QA files."""

    decoder: str
    files: QaFiles
    breaches: list[str] = field(default_factory=list)  # failed gates, rows unlike their source
    notes: list[str] = field(default_factory=list)  # lines that explain the figures


def reevaluate(
    dataset: Dataset,
    models: QaModels,
    selection: Selection,
    gates: Gates,
    folder: Path,
    *,
    checkpoint: str | None = None,
    checkpoint_storage: StorageOptions = StorageOptions(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QaResult:
    """Measure rows of a dataset again, on a GPU if there is one, and check them against gates.

    Args:
        dataset, models, selection, gates: `models` are those in addition to the dataset's VAE.
        folder, progress: an empty folder for the new QA files; called with (rows done, in total).
        checkpoint, checkpoint_storage: the dataset's VAE; None uses `find_checkpoint`.

    Raises:
        CheckpointError, ConfigError: a model cannot be used, or the user must name its URL.
        DatasetError: the dataset has no images to evaluate, or a file is damaged.
    """
    sources = NamedSources(selection.sources)
    if selection.num_units and not selection.sources and dataset.units:
        raise ConfigError(
            f"--units reads source shards again, and only {dataset.url} names them, such as "
            f"{shown(dataset.units[0].unit.source)}: pass --source with their URL, a glob or their "
            "folder, or pass the config of the run"
        )
    evaluator, decoder = _load_evaluator(dataset, models, checkpoint, checkpoint_storage)
    result = QaResult(decoder, QaFiles(Store(str(folder)), ()))
    new_records: dict[str, UnitRecord] = {}
    num_rows = 0
    for record, crops in _read_crops(dataset, selection, sources, result):
        # The dataset must not choose the name of a local file.
        local = folder / f"{len(new_records)}.parquet"
        qa = write_qa(local, local.name, _evaluate(dataset, evaluator, record, crops), decoder)
        new_records[record.unit.id] = replace(record, qa=qa)
        num_rows += qa.file.num_rows if qa else 0
        progress(num_rows, selection.num_rows)
    if not num_rows and not result.breaches:
        why = "; ".join(result.notes) or "the run kept no crops, because its config has no `qa:`"
        raise DatasetError(
            f"{dataset.url} has no rows to evaluate: {why}; `--units 2` reads shards again"
        )
    records = [new_records.get(r.unit.id) or replace(r, qa=None) for r in dataset.units]
    result.files = result.files._replace(records=records)
    result.breaches += QaTotals(gates, map(UnitSummary.of, records)).breaches()
    if evaluator.agreement_db is not None:
        result.notes.append(
            "the decoder belongs to another encoder than the dataset's; on these images the two "
            f"agree to {evaluator.agreement_db:.1f} dB"
        )
    return result


def _load_evaluator(
    dataset: Dataset, models: QaModels, checkpoint: str | None, options: StorageOptions
) -> tuple[QaEvaluator, str]:
    """Load the evaluator; return it with the checkpoint whose decoder is used."""
    require_fp32()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = checkpoint or find_checkpoint(dataset, models.decoder)
    vae = load_vae(checkpoint, device=device, options=options)
    if encoder_fingerprint(vae) != dataset.contract.vae.encoder_fingerprint:
        raise ConfigError(
            f"{checkpoint} has another encoder than the one that made the latents of "
            f"{dataset.url}: name that dataset's VAE by --checkpoint"
        )
    if models.decoder == checkpoint:
        models = replace(models, decoder=None)
    return QaEvaluator(dataset.contract, vae, models), models.decoder or checkpoint


def _read_crops(
    dataset: Dataset, selection: Selection, sources: NamedSources, result: QaResult
) -> Iterator[tuple[UnitRecord, _Crops]]:
    """Yield units with the images of the rows to evaluate, as far as they are available."""
    num_fetched = 0
    drawn = sorted(dataset.units, key=lambda record: _draw(selection.seed, record.unit.id))
    for record in islice((r for r in drawn if r.num_rows), selection.num_units):
        try:
            if selection.moved.location(record.unit.source) not in sources:
                raise SourceError(
                    f"{shown(record.unit.source)} is not in {', '.join(selection.sources[:3])}; "
                    "a source that only the dataset names is not read: pass --source"
                )
            yield record, _fetch(dataset, record, selection, result)
        except (StorageError, SourceError) as error:
            result.notes.append(f"its source cannot be read again: {error}")
        else:
            num_fetched += 1
    if not num_fetched:
        if selection.num_units:
            result.notes.append("the images are the crops that the run kept")
        yield from _read_kept(dataset, selection)


def _read_kept(dataset: Dataset, selection: Selection) -> Iterator[tuple[UnitRecord, _Crops]]:
    """Yield crops that the run kept, equally many of each bucket if there are enough."""
    measures = read_measures(QaFiles(dataset.store, dataset.units), dataset.contract)
    by_bucket: dict[str, list[tuple[str, str]]] = {}
    for row in measures.select(["bucket", "unit", "key"]).to_pylist():
        by_bucket.setdefault(row["bucket"], []).append((row["unit"], row["key"]))
    for rows in by_bucket.values():
        rows.sort(key=lambda row: _draw(selection.seed, *row))
    in_turn = (row for turn in zip_longest(*by_bucket.values()) for row in turn if row)
    keys: dict[str, set[str]] = {}
    for unit, key in islice(in_turn, selection.num_rows):
        keys.setdefault(unit, set()).add(key)
    for record in dataset.units:
        if record.unit.id in keys:
            crops: _Crops = {}
            for kept in read_qa_rows(dataset.store, record, keys[record.unit.id]):
                crops.setdefault(kept.bucket, {})[kept.key] = kept.image
            yield record, crops


def _fetch(dataset: Dataset, record: UnitRecord, selection: Selection, result: QaResult) -> _Crops:
    """Read a unit's shard again, and crop the images of some rows again."""
    rows = _read_geometry(dataset, record)
    drawn = sorted(rows, key=lambda key: _draw(selection.seed, record.unit.id, key))
    missing = set(drawn[: -(-selection.num_rows // selection.num_units)])
    spec = transform_spec(dataset.contract)
    crops: _Crops = {}
    unit, options = record.unit, selection.source_storage
    shard = shard_of(unit, options, selection.moved)
    for sample in read_images(shard, dataset.contract.source, options):
        if not isinstance(sample, Sample) or sample.key not in missing:
            continue
        missing.remove(sample.key)
        expected, row = rows[sample.key], f"row {sample.key!r} of {unit.title}"
        try:
            image = load_image(sample.image, spec)
        except Reject as reject:
            message = f"exists, but its image is rejected now: {reject.message}"
            result.breaches.append(f"{row} {message}")
            continue
        size = (image.original_width, image.original_height)
        geometry = (image.bucket.name, *size, image.crop_top, image.crop_left)
        if geometry == expected:
            crops.setdefault(image.bucket.name, {})[sample.key] = write_png(image.pixels)
        else:
            message = f"has bucket, size and crop {expected}, but its image gives {geometry}"
            result.breaches.append(f"{row} {message}")
    result.breaches += [f"row {key!r} is not in {unit.title}" for key in sorted(missing)]
    return crops


def _read_geometry(dataset: Dataset, record: UnitRecord) -> dict[str, _Geometry]:
    """Return the geometry of a unit's rows by key."""
    names = ["key", "original_width", "original_height", "crop_top", "crop_left"]
    rows: dict[str, _Geometry] = {}
    for file in record.files:
        if not file.path.endswith(".parquet"):
            continue
        with naming_damage(dataset.store, file.path), dataset.store.open(file.path) as opened:
            with open_parquet(opened) as parquet:
                check_schema(parquet.schema_arrow, dataset.contract)
                table = parquet.read(names, use_threads=False)
            table.validate(full=True)
        for row in table.to_pylist():
            key, *geometry = row.values()
            rows[key] = (file.bucket, *geometry)
    return rows


def _evaluate(
    dataset: Dataset, evaluator: QaEvaluator, record: UnitRecord, crops: _Crops
) -> Iterator[QaRow]:
    """Measure rows of a unit with the latents of its data files."""
    num_channels = dataset.contract.vae.latent_channels
    signal = float(np.square(dataset.stats.std[:num_channels]).mean())
    for bucket, images in crops.items():
        paths = [file.path for file in record.files if file.bucket == bucket]
        if not paths:
            raise DatasetError(f"{dataset.url}: {record.unit.title} has no file of {bucket}")
        with ExitStack() as stack:
            stack.enter_context(naming_damage(dataset.store, paths[-1]))
            files = [stack.enter_context(dataset.store.open(path)) for path in paths]
            stored = read_latents(files, images)
        if missing := images.keys() - stored.keys():
            raise DatasetError(f"{dataset.store.url_of(paths[-1])} has no row {min(missing)!r}")
        try:
            yield from evaluator.evaluate(record.unit.id, bucket, images, stored, signal)
        except ValueError as error:
            raise DatasetError(f"{dataset.url}: {record.unit.title}: {error}") from error


def _draw(seed: int, *names: str) -> bytes:
    """Return a pseudorandom sort key of a unit or row: the same for each call, and unique."""
    return hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
