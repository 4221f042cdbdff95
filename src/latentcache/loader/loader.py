"""`LatentLoader`: batches of a latent dataset for a training loop."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.layout import row_group_rows
from latentcache.dataset.manifest import ManifestName
from latentcache.errors import ConfigError, DatasetError, LatentCacheError, first_line
from latentcache.loader.batch import Batch, BatchReader, Plan, hand_over
from latentcache.loader.cache import parse_bytes
from latentcache.loader.files import Files, open_sources
from latentcache.loader.join import Join, Joined
from latentcache.loader.latents import LatentFinish
from latentcache.loader.order import DEFAULT_WINDOW_ROWS, BatchRows, Order, OrderOptions, Tail
from latentcache.loader.prefetch import prefetch
from latentcache.loader.ranks import num_local_ranks, rank_and_world_size
from latentcache.loader.rows import RowReader, open_cache
from latentcache.storage_options import StorageOptions

_STATE_VERSION = 1

# How to continue from a state whose field differs from this loader's.
_FIXES = {
    "manifest": "set `manifest` to the number in the state to continue with the same rows",
    "version": "this loader cannot continue from it",
    "dataset": "this loader cannot continue from it",
}

_MAX_PREFETCHED = 64
# How many batches are planned together, because NumPy's cost is mostly per call.
_MAX_GROUP = 32


class LatentLoader:
    """Batches of latents for training, in an order that is a function of the arguments.

    Each iteration yields one epoch. The next iteration yields the next epoch, even if the previous
    one was not finished. After `load_state_dict`, the first iteration continues at exactly the
    batch that was next. The sequence of global batches is the same for any number of ranks, and
    every rank has the same number of steps.

    Args:
        url: URL of the dataset, or {url: weight} to mix several; weights are shares of an epoch's
            rows, which are as many as all datasets' together.
        batch_size: number of rows of a global batch. Each rank gets a slice of it.
        seed: seed of the order and of draws from the posterior.
        rank, world_size: rank of this process and number of ranks; None takes those of an
            initialized `torch.distributed`, else of RANK and WORLD_SIZE, else 0 and 1.
        manifest: number of a manifest or "published", or {url: one of these}; None: the newest.
        shuffle: False reads in the order of the source shards, bucket after bucket.
        window_rows: how many rows of a bucket are shuffled together; see `loader/order.py`.
        block_rows: size in rows of the blocks that are shuffled before; None takes a row group.
        tail: what happens to a bucket's last rows that do not fill a batch. `drop` leaves them out
            (other rows in each epoch), `pad` repeats rows, `short` yields a smaller batch.
        dtype: dtype of the latents.
        normalize: return `(z - shift) * scale`; False returns the encoder's values.
        device: device of the batches. Batches on the CPU are pinned if there is a GPU.
        columns: names of the columns to read, also `unit` and `key`; None takes all kept columns.
        join: a Parquet file with more columns, by `unit` and `key`; see `Join`.
        cache_dir: folder for cached files of remote stores; the ranks of a node share it.
        cache_bytes: maximum size of the cached files, as a number or as text like "100gb".
        prefetch_bytes: size of the latents to prefetch, likewise.
        storage: options of the store.

    Raises:
        ConfigError: an argument is wrong, or no bucket fills a batch.
        ContractMismatch: the latents of mixed datasets differ in meaning.
        DatasetError: there is no such dataset or manifest, or a damaged file; also while iterating.
        StorageError: a store cannot be reached, after retries; also while iterating.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Mapping[str, float],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        manifest: ManifestName | Mapping[str, ManifestName] | None = None,
        shuffle: bool = True,
        window_rows: int = DEFAULT_WINDOW_ROWS,
        block_rows: int | None = None,
        tail: Tail = "drop",
        dtype: torch.dtype = torch.float32,
        normalize: bool = True,
        device: torch.device | str = "cpu",
        columns: Sequence[str] | None = None,
        join: Join | str | Path | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int | str = "100gb",
        prefetch_bytes: int | str = "128mb",
        storage: StorageOptions | None = None,
    ) -> None:
        options = OrderOptions(batch_size, seed, shuffle, window_rows, block_rows, tail)
        self.rank, self.world_size = rank_and_world_size(rank, world_size, batch_size)
        shares = url if isinstance(url, Mapping) else {url: 1.0}
        weights = {os.fspath(name): weight for name, weight in shares.items()}
        if not weights:
            raise ConfigError("no dataset is given: url is empty")
        self._files = files = Files(open_sources(list(weights), manifest, storage))
        self.contract = files.contract
        self._joined = Joined(files, join, columns)
        for number, name in enumerate(weights):
            if not self._joined.num_rows[files.source_of == number].any():
                raise DatasetError(f"{name} has no rows")
        streams = files.streams(self._joined.num_rows)
        self._order = Order(streams, options, list(weights.values()))
        _check_order(self._order, self.num_rows, next(iter(weights)))
        self._finish = LatentFinish(files.contracts, dtype, normalize)
        self._device = _checked_device(device)
        self._cache = open_cache(files, cache_dir, cache_bytes)
        if self._cache:
            _check_cache(files, options, self._cache.max_bytes, self.world_size)
        self._prefetch_bytes = parse_bytes(prefetch_bytes)
        # Everything that the order depends on, to reject states of another order.
        numbers = [source.manifest.number for source in files.sources]
        is_mixed = len(numbers) > 1
        self._identity = {
            "version": _STATE_VERSION,
            "manifest": numbers if is_mixed else numbers[0],
            "dataset": self._joined.fingerprint[:16],
            **asdict(options),
            **({"weights": list(weights.values())} if is_mixed else {}),
        }
        self._epoch, self._step = 0, 0
        self._is_begun = False
        self._idle: list[tuple[int, BatchReader]] = []  # each with the id of its process

    def __getstate__(self) -> dict[str, Any]:
        # A spawned process maps files itself.
        return {**self.__dict__, "_idle": []}

    def __len__(self) -> int:
        """Return the number of steps of an epoch, which is the same on every rank."""
        return len(self._order)

    @property
    def num_rows(self) -> int:
        """The number of rows of the datasets; with a join, only rows that have a partner count."""
        return int(self._joined.num_rows.sum())

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._epoch

    @property
    def buckets(self) -> dict[Bucket, int]:
        """The number of steps of an epoch by bucket, (width, height) in pixels."""
        return self._order.buckets

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents [b, C, h, w] without normalization, in float32, as a decoder expects."""
        return self._finish.undo(latents)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch as a few JSON values, the same on every rank."""
        return {**self._identity, "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the batch that was next when `state_dict` was called, at any world size.

        Raises:
            ConfigError: the state belongs to another order; the message names the field.
        """
        _check_identity(state, self._identity)
        epoch, step = state.get("epoch"), state.get("step")
        if not (isinstance(epoch, int) and isinstance(step, int)):
            raise ConfigError("not a state of a LatentLoader: it has no epoch and step")
        if epoch < 0 or not 0 <= step < len(self):
            raise ConfigError(
                f"the state has step {step} of epoch {epoch}, but epochs have {len(self)} steps: "
                "use a state of this dataset and order"
            )
        self._epoch, self._step = epoch, step
        self._is_begun = False

    def _move(self, epoch: int, step: int) -> None:
        self._epoch, self._step = (epoch, step) if step < len(self) else (epoch + 1, 0)

    def __iter__(self) -> Iterator[Batch]:
        if self._is_begun:
            self._move(self._epoch + 1, 0)
        self._is_begun = False
        return self._iterate(self._epoch, self._step)

    def _iterate(self, epoch: int, step: int) -> Iterator[Batch]:
        # Files stay mapped from epoch to epoch, unless two iterators are active.
        pid = os.getpid()
        self._idle = [idle for idle in self._idle if idle[0] == pid]
        if self._idle:
            _, reader = self._idle.pop()
        else:
            rows = RowReader(self._files, self._joined.columns, self._cache)
            seed = self._order.options.seed
            options = (rows, self._finish, self._device, seed)
            reader = BatchReader(self._files, self._joined, *options)
        plans = self._plan(epoch, step, reader)
        batches = prefetch(plans, reader.read, self._num_prefetched(), reader.rows.cancel)
        try:
            for batch, event in batches:
                if event is not None:
                    hand_over(batch, event)
                self._move(epoch, batch.step + 1)
                self._is_begun = self._step > 0
                yield batch
        finally:
            batches.close()  # first, so that no thread still uses the reader
            if os.getpid() == pid:
                reader.rows.clear()
                self._idle.append((pid, reader))

    def _num_prefetched(self) -> int:
        """Return the number of batches to prefetch: as many as fit into `prefetch_bytes`."""
        most = max(prod(self.contract.latent_shape(bucket)) for bucket in self._order.buckets)
        num_rows = self._order.options.batch_size // self.world_size
        num_bytes = num_rows * most * self._finish.dtype.itemsize
        return min(max(1, self._prefetch_bytes // num_bytes), _MAX_PREFETCHED)

    def _plan(self, epoch: int, step: int, reader: BatchReader) -> Generator[Plan, None, None]:
        order = self._order.batches(epoch, step, rank=self.rank, world_size=self.world_size)
        # Remote files are fetched a window before they are needed.
        max_rows = self._order.options.window_rows // self.world_size if self._cache else 0
        max_bytes = self._cache.max_bytes // 4 if self._cache else 0
        for group in _grouped(_prepared(order, reader.rows, max_rows, max_bytes)):
            try:
                plans = reader.plan(epoch, group)
            except LatentCacheError:  # of one batch: yield those before it, then raise it again
                for chosen in group:
                    yield from reader.plan(epoch, [chosen])
                raise
            yield from plans


def _prepared(
    order: Iterator[BatchRows], rows: RowReader, max_rows: int, max_bytes: int
) -> Iterator[BatchRows]:
    """Yield batches in order, after the reader has begun to open at most so much for later ones."""
    pending: deque[BatchRows] = deque()
    num_rows = 0
    for chosen in order:
        rows.prepare(chosen.files)
        pending.append(chosen)
        num_rows += len(chosen.files)
        while pending and (num_rows > max_rows or rows.num_opening_bytes > max_bytes):
            num_rows -= len(pending[0].files)
            yield pending.popleft()
    yield from pending


def _check_identity(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if the state belongs to another order."""
    for name, value in identity.items():
        if name not in state:
            raise ConfigError(f"not a state of a LatentLoader: it has no {name!r}")
        if state[name] != value:
            fix = _FIXES.get(name, f"set {name} to the value in the state")
            raise ConfigError(
                f"the state has {name} {state[name]}, this loader has {name} {value}: {fix}"
            )


def _grouped(batches: Iterator[BatchRows]) -> Iterator[list[BatchRows]]:
    """Group consecutive batches of one bucket; the first groups are small, for a fast start."""
    size, group = 1, list[BatchRows]()
    for chosen in batches:
        if group and (len(group) == size or group[0].bucket != chosen.bucket):
            yield group
            size, group = min(2 * size, _MAX_GROUP), []
        group.append(chosen)
    if group:
        yield group


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        checked = torch.device(device)
        is_cuda = checked.type == "cuda"
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {device!r}: {first_line(error)}") from error
    if is_cuda and (checked.index or 0) >= torch.cuda.device_count():
        num = torch.cuda.device_count()
        raise ConfigError(f"device is {str(device)!r}, but torch finds {num} GPUs: use 'cpu'")
    return checked


def _check_order(order: Order, num_rows: int, url: str) -> None:
    """Raise `ConfigError` if an epoch has no batch; warn of buckets that have none."""
    options = order.options
    if not len(order):
        raise ConfigError(
            f"{url} has {num_rows} rows, but no bucket has a whole batch of "
            f"{options.batch_size}: lower batch_size, or set tail to 'pad' or 'short'"
        )
    unused = {bucket: order.left_out[bucket] for bucket, num in order.buckets.items() if not num}
    if unused:
        names = ", ".join(f"{bucket.name} ({num} rows)" for bucket, num in unused.items())
        warnings.warn(
            f"these buckets have fewer rows than batch_size {options.batch_size} and are never "
            f"used: {names}; set tail to 'pad' or 'short' to train on them",
            stacklevel=3,
        )


def _check_cache(files: Files, options: OrderOptions, max_bytes: int, world_size: int) -> None:
    """Warn if a window's files do not fit into the cache, because they would be fetched repeatedly.

    A node reads its ranks' share of each window.
    """
    if files.size_bytes.sum() <= max_bytes:
        return
    block_rows = options.block_rows or max(
        row_group_rows(files.contract, bucket) for bucket in files.buckets
    )
    num_nodes = max(1, world_size // num_local_ranks())
    num_files = min(len(files), options.window_rows // block_rows + 1) / num_nodes
    num_bytes = num_files * float(files.size_bytes.mean())
    if num_bytes > max_bytes / 2:
        whole = int(files.num_rows.max())
        warnings.warn(
            f"a window of {options.window_rows} rows reads {num_files:.0f} files of "
            f"{num_bytes / 1e9:.1f} GB in total, too much for a cache of {max_bytes / 1e9:.1f} GB: "
            f"raise cache_bytes, lower window_rows, or keep files whole with block_rows={whole}",
            stacklevel=3,
        )
