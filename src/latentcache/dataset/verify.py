"""Check that the objects of a dataset match its manifest."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.layout import TORCH_DTYPES, latent_offsets
from latentcache.dataset.manifest import ManifestName
from latentcache.dataset.parquet import open_parquet
from latentcache.dataset.quantization import is_finite
from latentcache.dataset.reader import Dataset, open_dataset
from latentcache.dataset.receipts import DataFile, UnitRecord
from latentcache.dataset.shards import check_schema, iterate_latents, read_rejects
from latentcache.dataset.state import remove_units
from latentcache.errors import DatasetError, ObjectNotFound
from latentcache.storage import Store
from latentcache.storage.failures import named_local
from latentcache.storage_options import StorageOptions

_THREADS = 8

# How many unit records are in memory at a time, because there may be very many units.
_UNITS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """A difference between an object and the manifest, or a damaged object."""

    unit: str
    source: str
    path: str
    message: str


@dataclass(slots=True)
class Verification:
    """The result of `verify`; `repaired` lists the ids of units that were removed."""

    ok: bool
    manifest: int
    num_units: int
    num_files: int = 0
    num_rows: int = 0
    num_rejects: int = 0
    problems: list[Problem] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


def verify(
    url: str | os.PathLike[str],
    manifest: ManifestName | None = None,
    *,
    storage: StorageOptions | None = None,
    quick: bool = False,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check every object of a dataset: existence, size, SHA-256, rows, and finite latents.

    Args:
        url, manifest, storage: see `open_dataset`.
        quick: check only that objects exist and have the right size.
        repair: put a manifest without the bad units, so that the next run encodes them again.
        progress: called with the number of units checked and the number of all units.

    Raises:
        DatasetError: there is no manifest to check.
        IncompleteRun: `repair` failed because another process put manifests first, several times.
    """
    dataset = open_dataset(url, manifest, storage=storage)
    units, totals = dataset.units, dataset.manifest
    result = Verification(ok=True, manifest=totals.number, num_units=len(units))
    num_checked, remaining = 0, iter(units)
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(remaining, _UNITS_AT_ONCE)):
            checked = pool.map(lambda record: list(_check_unit(dataset, record, quick)), some)
            for record, problems in zip(some, checked, strict=True):
                num_others = (record.rejects is not None) + (record.qa is not None)
                result.num_files += len(record.files) + num_others
                result.num_rows += record.num_rows
                result.num_rejects += record.num_rejects
                result.problems += problems
                num_checked += 1
                if progress:
                    progress(num_checked, len(units))
    counts = (result.num_units, result.num_rows, result.num_rejects)
    if counts != (totals.num_units, totals.num_rows, totals.num_rejects):
        message = "its totals of units, rows and rejects are not those of its units"
        result.problems.append(Problem("", "", totals.path, message))
    result.ok = not result.problems
    if repair:
        bad = {problem.unit for problem in result.problems}
        names = {record.name for record in units if record.unit.id in bad}
        removed = remove_units(dataset.store, names) if names else set()
        result.repaired = sorted(name.rpartition("-")[0] for name in removed)
    return result


def _check_unit(dataset: Dataset, record: UnitRecord, quick: bool) -> Iterator[Problem]:
    def problem(path: str, message: str) -> Problem:
        return Problem(record.unit.id, record.unit.source, path, message)

    groups: dict[str, list[DataFile]] = {}
    for file in record.files:
        groups.setdefault(file.bucket, []).append(file)
    num_rows = sum(files[-1].num_rows for files in groups.values())
    if num_rows != record.num_rows:
        yield problem("", f"the files hold {num_rows} rows, but the receipt says {record.num_rows}")
    others = [record.rejects] if record.rejects else []
    others += [record.qa.file] if record.qa else []
    keys: set[str] = set()
    for files in (*groups.values(), *([file] for file in others)):
        with tempfile.TemporaryDirectory(prefix="latentcache-") as folder:
            targets = [Path(folder, file.path.rpartition("/")[2]) for file in files]
            is_good = True
            for file, target in zip(files, targets, strict=True):
                if message := _check_object(dataset.store, file, None if quick else target):
                    is_good = False
                    yield problem(file.path, message)
            messages: Iterable[str] = ()
            if files[0].bucket:
                messages = _check_rows(targets, files[-1], dataset.contract, keys)
            elif files[0] is record.rejects:
                messages = _check_rejects(targets[0], record.num_rejects)
            if is_good and not quick:
                yield from (problem(files[-1].path, message) for message in messages)


def _check_object(store: Store, file: DataFile, target: Path | None) -> str | None:
    """Return the problem of one object, or None; copy the object to `target` if that is given."""
    try:
        info = store.info(file.path)
        if info.size_bytes != file.size_bytes:
            return f"has {info.size_bytes} bytes, not {file.size_bytes}"
        if target is None:
            return None
        digest = hashlib.sha256()
        with store.open(file.path) as source, named_local(target), target.open("wb") as copy:
            while chunk := source.read(2**20):
                digest.update(chunk)
                copy.write(chunk)
    except ObjectNotFound:
        return "is gone"
    return None if digest.hexdigest() == file.sha256 else "its SHA-256 differs"


def _check_rejects(local: Path, num_rejects: int) -> Iterator[str]:
    try:
        num_rows = read_rejects(local).num_rows
    except (DatasetError, pa.ArrowException, OSError, ValueError) as error:
        yield f"cannot be read: {error}"
    else:
        if num_rows != num_rejects:
            yield f"holds {num_rows} rejects, but the receipt says {num_rejects}"


def _check_rows(
    local: list[Path], file: DataFile, contract: Contract, keys: set[str]
) -> Iterator[str]:
    bucket, dtype = Bucket.parse(file.bucket), TORCH_DTYPES[contract.latents.dtype]
    shape = contract.latent_shape(bucket)
    num_rows = 0
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(path.open("rb")) for path in local]
            latent_offsets(opened, contract, bucket, file.num_rows)
        with open_parquet(local[-1]) as rows:
            check_schema(rows.schema_arrow, contract)
            names = [name for name in rows.schema_arrow.names if name != "latent"]
            for number in range(rows.num_row_groups):
                rows.read_row_group(number, names, use_threads=False).validate(full=True)
        for key, latent in iterate_latents(local):
            num_rows += 1
            if key in keys:
                yield f"row {key!r} occurs twice"
            keys.add(key)
            if tuple(latent.shape) != shape or latent.dtype != dtype:
                yield f"row {key!r} is {latent.dtype} {list(latent.shape)}, not {dtype} {shape}"
            elif not is_finite(latent).all():
                yield f"row {key!r} is not finite"
    except (DatasetError, pa.ArrowException, OSError, ValueError) as error:
        yield f"cannot be read: {error}"
    if num_rows != file.num_rows:
        yield f"holds {num_rows} rows, but the receipt says {file.num_rows}"
