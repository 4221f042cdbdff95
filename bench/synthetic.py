"""Latent datasets made of numbers, without a VAE, for benchmarks and tests of readers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.columns import Columns, columns_of
from latentcache.dataset.contract import (
    Contract,
    LatentContract,
    QuantizationContract,
    SourceContract,
    TransformContract,
    VaeContract,
    establish_contract,
)
from latentcache.dataset.quantization import to_stored
from latentcache.dataset.receipts import DataFile, Receipt, Unit, UnitRecord, new_attempt
from latentcache.dataset.shards import BucketWriter, RowMeta, describe_file
from latentcache.dataset.state import State, write_next
from latentcache.dataset.statistics import Statistics
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions


def make_contract(
    buckets: Sequence[Bucket],
    *,
    posterior: str = "mean",
    dtype: str = "float16",
    format: str = "parquet",
    shift_factor: float = 0.0,
    key_column: str | None = None,
) -> Contract:
    """Return the contract of a run with a kl-f8 autoencoder."""
    num_channels = 8 if posterior == "moments" else 4
    quantization = make_quantization(num_channels) if dtype == "int8" else None
    return Contract(
        vae=VaeContract(
            family="kl-f8",
            encoder_fingerprint="0" * 64,
            architecture={},
            latent_channels=4,
            downsample_factor=8,
            scaling_factor=0.18215,
            shift_factor=shift_factor,
        ),
        transform=TransformContract(
            crop="center",
            resample="bicubic",
            buckets=tuple(buckets),
            min_side_px=None,
            max_upscale=None,
            max_pixels=2**28,
        ),
        latents=LatentContract(posterior, dtype, format, "fp32", quantization),
        source=SourceContract(("jpg",), key_column),
    )


def make_quantization(num_channels: int) -> QuantizationContract:
    """Return int8 parameters that cover about ±10, different for each channel."""
    scale = np.linspace(0.08, 0.1, num_channels).astype(np.float32)
    zero_point = range(-8, 8 * num_channels - 8, 8)
    return QuantizationContract(512, 0, tuple(scale.tolist()), tuple(zero_point))


Latents = Callable[[int, Bucket, int], torch.Tensor]


def random_latents(contract: Contract) -> Latents:
    """Return random latents [N, C, H, W] for a unit's number, a bucket and a number of rows."""

    def draw(number: int, bucket: Bucket, num_rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number * 1009 + bucket[0] * 31 + bucket[1])
        shape = (num_rows, *contract.latent_shape(bucket))
        latents = torch.randn(shape, generator=generator)
        return to_stored(latents, contract.latents)[0]

    return draw


def write_dataset(
    url: str,
    contract: Contract,
    units: Sequence[Mapping[Bucket, int]],
    *,
    latents: Latents | None = None,
    keep: Sequence[str] = ("txt",),
    storage: StorageOptions | None = None,
) -> None:
    """Write a complete dataset.

    Args:
        url: URL of the dataset.
        contract: its contract.
        units: for each unit, its rows by bucket.
        latents: returns the latents; None for random ones.
        keep: the fields that are kept as columns.
        storage: how to reach the store.
    """
    store = Store(url, storage or StorageOptions())
    establish_contract(store, contract, {})
    draw, columns = latents or random_latents(contract), columns_of(keep)
    receipts = [
        _write_unit(store, contract, columns, number, rows, draw)
        for number, rows in enumerate(units)
    ]
    state = State(store)
    for receipt in receipts:
        state.add(receipt)
    snapshot = {r.record.unit.source: [r.record.unit] for r in receipts}
    write_next(
        state,
        contract.fingerprint,
        contract.stored_channels,
        lambda: snapshot,
        on_missing="keep",
        columns=columns,
    )


def _write_unit(
    store: Store,
    contract: Contract,
    columns: Columns,
    number: int,
    rows: Mapping[Bucket, int],
    draw: Latents,
) -> Receipt:
    unit = Unit.of(f"made/{number:06d}.tar", 1, "1", contract.fingerprint)
    attempt = new_attempt()
    files: list[DataFile] = []
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        for bucket, num_rows in rows.items():
            name = Bucket(*bucket).name
            stem = Path(folder, f"0-{attempt}-{name}")
            writer = BucketWriter(stem, contract, columns, unit.id, bucket)
            metas = [_row(number, first + index, columns) for index in range(num_rows)]
            writer.append(draw(number, bucket, num_rows), metas)
            writer.close()
            first += num_rows
            for path in writer.paths:
                file = describe_file(path, f"data/{unit.id}/{path.name}", num_rows, name)
                store.put_file(path, file.path)
                files.append(file)
    record = UnitRecord(
        unit=unit,
        generation=0,
        attempt=attempt,
        num_samples=first,
        num_rows=first,
        num_rejects=0,
        files=tuple(files),
        rejects=None,
        columns=columns,
    )
    receipt = Receipt(record, contract.fingerprint, Statistics.empty(contract.stored_channels))
    store.put_if_absent(receipt.path, receipt.to_bytes())
    return receipt


def _row(number: int, index: int, columns: Columns) -> RowMeta:
    kept: dict[str, str | int | None] = {
        name: (number * 100 + index) % 1000 if name == "cls" else f"{name} of {number}/{index}"
        for name in (column.name for column in columns)
    }
    key = f"{number:06d}{index:06d}"
    return RowMeta(key, 300 + index, 400 + number, index % 7, index % 5, kept)


def write_manifest(url: str, contract: Contract, num_units: int, rows_per_unit: int) -> None:
    """Write the contract and the manifest of a dataset of any size, without its files."""
    store = Store(url)
    establish_contract(store, contract, {})
    state = State(store)
    (bucket,) = contract.transform.buckets
    snapshot = {}
    for number in range(num_units):
        unit = Unit.of(f"s3://images/{number:08d}.tar", 10**9, "1", contract.fingerprint)
        name = f"data/{unit.id}/0-{unit.id}-{Bucket(*bucket).name}.parquet"
        file = DataFile(name, 82 * 10**6, unit.id * 2, rows_per_unit, Bucket(*bucket).name)
        record = UnitRecord(
            unit=unit,
            generation=0,
            attempt=unit.id,
            num_samples=rows_per_unit,
            num_rows=rows_per_unit,
            num_rejects=0,
            files=(file,),
            rejects=None,
        )
        empty = Statistics.empty(contract.stored_channels)
        state.add(Receipt(record, contract.fingerprint, empty))
        snapshot[unit.source] = [unit]
    write_next(
        state, contract.fingerprint, contract.stored_channels, lambda: snapshot, on_missing="keep"
    )
