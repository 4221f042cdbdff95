"""The data files of one or more datasets, numbered: what the order and the reader share."""

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

# What must agree between datasets that are mixed: these decide what a tensor of latents means. How
# int8 was calibrated may differ, for each row is brought back by its own dataset's numbers.
_MUST_AGREE = ("format_version:", "vae.", "latents.posterior:", "latents.dtype:")


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset, as one manifest names it."""

    store: Store
    contract: Contract
    manifest: Manifest

    @property
    def columns(self) -> list[str]:
        """Name the kept columns of its rows."""
        return [column.name for column in self.manifest.columns]

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.store.url


class Files:
    """The files that hold rows, numbered from 0 through all datasets.

    [F] are: `num_rows`, `size_bytes`, `source_of`, `bucket_of` (index into `buckets`), `first_row`.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        tables = [read_files(source.store, source.manifest) for source in sources]
        # A bucket of a unit has one Parquet file; beside it safetensors has one with the latents.
        rows = [t.filter(pc.ends_with(t["path"], ".parquet")) for t in tables]
        latents = [
            t.filter(pc.ends_with(t["path"], ".safetensors"))
            if source.contract.latents.format == "safetensors"
            else r
            for source, t, r in zip(sources, tables, rows, strict=True)
        ]
        self._rows = pa.concat_tables(rows).combine_chunks()
        self._latents = pa.concat_tables(latents).combine_chunks()
        for name in ("unit", "bucket", "num_rows"):
            if not self._rows[name].equals(self._latents[name]):
                raise DatasetError(
                    f"{sources[0].url}: a unit's rows and latents differ in {name}: run "
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
        """Refuse buckets that no contract has, and files too small for their rows.

        What is allocated by the number of rows is thereby bounded by the size of the files.
        """
        for number, source in enumerate(self.sources):
            mine = self.source_of == number
            known = set(source.contract.transform.buckets)
            for index, bucket in enumerate(self.buckets):
                chosen = mine & (self.bucket_of == index)
                if not chosen.any():
                    continue
                if bucket not in known:
                    raise DatasetError(
                        f"{source.url} has rows of bucket {Bucket(*bucket).name}, which its "
                        "contract.json does not have"
                    )
                least = self.size_bytes[chosen] // row_bytes(source.contract, bucket)
                if (self.num_rows[chosen] > least).any():
                    raise DatasetError(
                        f"{source.url} has files that are too small for the rows that manifest "
                        f"{source.manifest.number} names: run `latentcache verify`"
                    )

    @property
    def contract(self) -> Contract:
        """Give the first dataset's contract; the others agree with it in what latents are."""
        return self.sources[0].contract

    @property
    def contracts(self) -> list[Contract]:
        """Give each dataset's contract, as `source_of` counts them."""
        return [source.contract for source in self.sources]

    def contract_of(self, file: int) -> Contract:
        """Give the contract that a file was written under."""
        return self.sources[int(self.source_of[file])].contract

    def store_of(self, file: int) -> Store:
        """Give the store that holds a file."""
        return self.sources[int(self.source_of[file])].store

    def rows_file(self, file: int) -> DataFile:
        """Give the Parquet file with the keys and columns."""
        return _data_file(self._rows, file)

    def latents_file(self, file: int) -> DataFile:
        """Give the file with the latents: the same one, unless the format is safetensors."""
        return _data_file(self._latents, file)

    def bucket(self, file: int) -> Bucket:
        """Give the bucket of a file's rows."""
        return self.buckets[int(self.bucket_of[file])]

    def unit(self, file: int) -> str:
        """Give the id of the unit that a file belongs to."""
        unit: str = self._rows["unit"][file].as_py()
        return unit

    def streams(self, num_rows: Ints) -> list[Stream]:
        """Group the files by dataset and bucket, for the order.

        Args:
            num_rows: [F] rows of each that count; files without any are left out.
        """
        found = []
        for index, source in enumerate(self.sources):
            for number, bucket in enumerate(self.buckets):
                chosen = (self.source_of == index) & (self.bucket_of == number) & (num_rows > 0)
                files = np.flatnonzero(chosen)
                if len(files):
                    group_rows = row_group_rows(source.contract, bucket)
                    found.append(Stream(index, bucket, files, num_rows[files], group_rows))
        return found

    def fingerprint(self) -> str:
        """Hash of which rows there are and in which order, hex."""
        parts = [
            [s.contract.fingerprint, [g.sha256 for g in s.manifest.segments], s.manifest.removed]
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
    """Open datasets that are to be read together.

    Args:
        urls: where they lie.
        manifests: the number of a manifest or "published", or one for each URL; None takes the
            newest complete.
        storage: how to reach all of them.

    Raises:
        ConfigError: `manifests` names a URL that is not among them, or one number for several.
        ContractMismatch: their latents do not mean the same; the message names each field.
        DatasetError: there is no dataset, or no such manifest, or no complete one.
    """
    if isinstance(manifests, int | str):
        if isinstance(manifests, int) and len(urls) > 1:
            raise ConfigError("manifest must be {url: number} where several datasets are mixed")
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
                f"{source.url} cannot be mixed with {first.url}; their latents differ in:",
                *(f"  {line}" for line in differ),
            )
    return sources
