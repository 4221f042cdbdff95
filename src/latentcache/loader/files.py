"""Number the data files of one or more datasets, for the order and the row reader."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract, contract_diff
from latentcache.dataset.layout import row_bytes, row_group_rows
from latentcache.dataset.manifest import Manifest, ManifestName, read_files
from latentcache.dataset.reader import open_manifest
from latentcache.dataset.receipts import DataFile
from latentcache.errors import ConfigError, ContractMismatch, DatasetError
from latentcache.loader.order import Stream
from latentcache.loader.permutation import Ints
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions

# The contract fields that must agree between mixed datasets, because they decide what a tensor of
# latents means. The calibration of int8 may differ: each row is dequantized with its own dataset's.
_MUST_AGREE = ("format_version:", "vae.", "latents.posterior:", "latents.dtype:")


@dataclass(frozen=True, slots=True)
class Source:
    """One manifest of a dataset."""

    store: Store
    contract: Contract
    manifest: Manifest


class Files:
    """The files that hold rows, numbered from 0 across all datasets.

    By file, int64 [F]: `num_rows`, `size_bytes` (of the file with latents), `source_of` (index into
    `sources`), `bucket_of` (index into `buckets`), and `first_row` (index among all rows).
    `contract` is the first dataset's; the others agree with it about the meaning of latents.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.contracts = [source.contract for source in sources]
        self.contract = self.contracts[0]
        # A bucket of a unit has one Parquet file. With the format safetensors it has another file,
        # which holds the latents.
        rows, latents = [], []
        for source in sources:
            table = read_files(source.store, source.manifest)
            rows.append(table.filter(pc.ends_with(table["path"], ".parquet")))
            is_parquet = source.contract.latents.format == "parquet"
            is_tensor = pc.ends_with(table["path"], ".safetensors")
            latents.append(rows[-1] if is_parquet else table.filter(is_tensor))
        self._rows = pa.concat_tables(rows).combine_chunks()
        self._latents = pa.concat_tables(latents).combine_chunks()
        for name in ("unit", "bucket", "num_rows"):
            if not self._rows[name].equals(self._latents[name]):
                raise DatasetError(
                    f"{sources[0].store.url}: a unit's rows and latents differ in {name}: run "
                    "`latentcache verify`"
                )
        self.num_rows: Ints = self._rows["num_rows"].to_numpy().astype(np.int64)
        self.size_bytes: Ints = self._latents["size_bytes"].to_numpy()
        self.source_of: Ints = np.repeat(np.arange(len(sources)), [len(r) for r in rows])
        self.first_row: Ints = np.cumsum(self.num_rows) - self.num_rows
        names = self._rows["bucket"].combine_chunks().dictionary_encode()
        self.buckets = [Bucket.parse(name) for name in names.dictionary.to_pylist()]
        self.bucket_of: Ints = names.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        self._check()

    def __len__(self) -> int:
        return len(self.num_rows)

    def _check(self) -> None:
        """Raise `DatasetError` for unknown buckets, and for too many rows, which take memory."""
        for index, source in enumerate(self.sources):
            mine = self.source_of == index
            for number in np.unique(self.bucket_of[mine]).tolist():
                bucket = self.buckets[number]
                if bucket not in source.contract.transform.buckets:
                    raise DatasetError(
                        f"{source.store.url} has rows of bucket {bucket.name}, which its "
                        "contract.json does not have"
                    )
                chosen = mine & (self.bucket_of == number)
                most = self.size_bytes[chosen] // row_bytes(source.contract, bucket)
                if (self.num_rows[chosen] > most).any():
                    raise DatasetError(
                        f"{source.store.url} has files that are too small for the rows that "
                        f"manifest {source.manifest.number} lists: run `latentcache verify`"
                    )

    def source(self, file: int) -> Source:
        """Return the dataset that holds a file."""
        return self.sources[int(self.source_of[file])]

    def rows_file(self, file: int) -> DataFile:
        """Return the entry of the Parquet file with the keys and columns."""
        return _data_file(self._rows, file)

    def latents_file(self, file: int) -> DataFile:
        """Return the entry of the file with latents: the same file unless it is safetensors."""
        return _data_file(self._latents, file)

    def unit(self, file: int) -> str:
        """Return the id of the unit that a file belongs to."""
        unit: str = self._rows["unit"][file].as_py()
        return unit

    def streams(self, num_rows: Ints) -> list[Stream]:
        """Group files by dataset and bucket; `num_rows`, int64 [F], says how many rows count."""
        streams = []
        for index, contract in enumerate(self.contracts):
            for number, bucket in enumerate(self.buckets):
                chosen = (self.source_of == index) & (self.bucket_of == number) & (num_rows > 0)
                files = np.flatnonzero(chosen)
                if len(files):
                    group_rows = row_group_rows(contract, bucket)
                    streams.append(Stream(index, bucket, files, num_rows[files], group_rows))
        return streams

    def fingerprint(self) -> str:
        """Return a hash (hex) of everything that decides which rows exist and in which order."""
        parts = [
            [s.contract.fingerprint, [g.sha256 for g in s.manifest.parts], s.manifest.removed]
            for s in self.sources
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _data_file(table: pa.Table, number: int) -> DataFile:
    (fields,) = table.slice(number, 1).drop_columns("unit").to_pylist()
    return DataFile(**fields)


def open_sources(
    urls: Sequence[str],
    manifests: Mapping[str, ManifestName] | ManifestName | None,
    storage: StorageOptions | None,
) -> list[Source]:
    """Open datasets to read them together.

    Args:
        urls, manifests, storage: as for `LatentLoader`.

    Raises:
        ConfigError: `manifests` has an unknown URL, or is one number for several datasets.
        ContractMismatch: the latents of the datasets differ in meaning.
        DatasetError: there is no dataset, no such manifest, or no complete manifest.
    """
    if isinstance(manifests, int | str):
        if isinstance(manifests, int) and len(urls) > 1:
            raise ConfigError("manifest must be {url: number} if several datasets are mixed")
        manifests = dict.fromkeys(urls, manifests)
    manifests = {os.fspath(url): name for url, name in (manifests or {}).items()}
    if unknown := manifests.keys() - set(urls):
        raise ConfigError(f"manifest names {min(unknown)}, which is not among the datasets")
    sources = [Source(*open_manifest(url, manifests.get(url), storage=storage)) for url in urls]
    first = sources[0]
    for source in sources[1:]:
        lines = contract_diff(source.contract, first.contract, ("the former", "the latter"))
        if differ := [line for line in lines if line.startswith(_MUST_AGREE)]:
            raise ContractMismatch(
                f"{source.store.url} cannot be mixed with {first.store.url}; their latents differ "
                "in:",
                *(f"  {line}" for line in differ),
            )
    return sources
