"""`LatentLoader`: from a latent dataset to the batches of a training loop."""

from __future__ import annotations

import logging
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
from latentcache.loader.permutation import Ints
from latentcache.loader.prefetch import prefetch
from latentcache.loader.ranks import num_ranks_here, place
from latentcache.loader.rows import MAX_AHEAD, RowReader, open_cache
from latentcache.storage_options import StorageOptions

_STATE_VERSION = 1

_log = logging.getLogger(__name__)

# Batches that are planned together, because NumPy's cost is mostly by call.
_MAX_GROUP = 32


class LatentLoader:
    """Batches of latents for training, in an order that is a function of the arguments.

    Iterating gives one epoch. The next iteration gives the next epoch, also when the one before was
    left early; after `load_state_dict` the first one continues at exactly the batch that was next.
    The sequence of global batches is the same for any number of ranks, and every rank has the same
    number of steps.

    Args:
        url: the dataset, or {url: weight} for several: each then has a share of its weight in an
            epoch's rows, of which there are as many as the datasets have together.
        batch_size: rows of a global batch. A rank gets its slice of it.
        seed: of the order, and of draws from the posterior.
        rank, world_size: of this process. Left out, they are those of `torch.distributed` where
            that is initialised, else the environment variables RANK and WORLD_SIZE, else 0 and 1.
        manifest: its number or "published", or {url: number}; the newest complete one if left
            out.
        shuffle: False reads in the order of the source shards, bucket after bucket.
        window_rows: rows of a bucket that are shuffled among each other; see `loader/order.py`.
        block_rows: neighbours that stay together before that; None takes a row group.
        tail: what becomes of rows that do not fill a batch of their bucket: `drop` leaves them out
            of the epoch (other ones in each), `pad` repeats rows, `short` gives a smaller batch.
        dtype: of the latents.
        normalize: give `(z - shift) * scale`; False gives what the encoder gave.
        device: where batches lie. On a CPU beside a GPU they are pinned.
        columns: which of the dataset's columns to read; None takes all. `unit` and `key` can be
            asked for.
        join: a Parquet file with more columns, by `unit` and `key`; see `Join`.
        cache_dir: where files of remote stores are kept; shared by the ranks of a node.
        cache_bytes: how much of them, as a number or like "100gb".
        prefetch_bytes: how many latents to have ready in advance.
        storage: how to reach the store.

    Raises:
        ConfigError: an argument is wrong, or there is not one whole batch.
        ContractMismatch: datasets that are to be mixed differ in what their latents are.
        DatasetError: there is no such dataset or manifest, or a file is gone or damaged. Iterating
            raises it too.
        StorageError: a store cannot be reached, after retries. Iterating raises it too.
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
        self.rank, self.world_size = place(rank, world_size, batch_size)
        weights = (
            {os.fspath(name): weight for name, weight in url.items()}
            if isinstance(url, Mapping)
            else {os.fspath(url): 1.0}
        )
        if not weights:
            raise ConfigError("no dataset is given: url is empty")
        self._files = Files(open_sources(list(weights), manifest, storage))
        self.contract = self._files.contract
        self._joined = Joined(self._files, join, columns)
        _check_rows(self._files, self._joined.num_rows, list(weights))
        self._order = Order(
            self._files.streams(self._joined.num_rows), options, list(weights.values())
        )
        _check_order(self._order, self.num_rows, list(weights))
        self._finish = LatentFinish(self._files.contracts, dtype, normalize)
        self._device = _device(device)
        self._cache = open_cache(self._files, cache_dir, cache_bytes)
        if self._cache:
            _check_cache(self._files, options, self._cache.max_bytes, self.world_size)
        self._prefetch_bytes = parse_bytes(prefetch_bytes)
        self._identity = self._describe(list(weights.values()))
        self._epoch, self._step = 0, 0
        self._is_begun = False
        self._idle: list[tuple[int, BatchReader]] = []  # with the process that each belongs to

    def __getstate__(self) -> dict[str, Any]:
        # A spawned process maps files for itself.
        return {**self.__dict__, "_idle": []}

    def _describe(self, weights: Sequence[float]) -> dict[str, Any]:
        """All that the order depends on: a state of another order is refused by it."""
        numbers = [source.manifest.number for source in self._files.sources]
        mixed = len(numbers) > 1
        return {
            "version": _STATE_VERSION,
            "manifest": numbers if mixed else numbers[0],
            "dataset": self._joined.fingerprint[:16],
            **asdict(self._order.options),
            **({"weights": list(weights)} if mixed else {}),
        }

    def __len__(self) -> int:
        """Count the steps of an epoch, the same on every rank."""
        return len(self._order)

    @property
    def num_rows(self) -> int:
        """Rows of the dataset (with a join: those that have a partner)."""
        return int(self._joined.num_rows.sum())

    @property
    def epoch(self) -> int:
        """The epoch of the batch that is next."""
        return self._epoch

    @property
    def buckets(self) -> dict[Bucket, int]:
        """Steps of an epoch by bucket, (width, height) in pixels."""
        return self._order.buckets

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation of [b, C, h, w] latents: float32, as a decoder takes them."""
        return self._finish.undo(latents)

    def state_dict(self) -> dict[str, Any]:
        """Say which batch is next, as a few JSON values; the same on every rank."""
        return {**self._identity, "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the batch that was next when `state_dict` was called, at any world size.

        Raises:
            ConfigError: the state is of another order; the message names the field.
        """
        epoch, step = _epoch_and_step(state, self._identity, len(self))
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
        # Files stay mapped from epoch to epoch, unless two iterators are at work.
        pid = os.getpid()
        self._idle = [idle for idle in self._idle if idle[0] == pid]
        reader = self._idle.pop()[1] if self._idle else self._make_reader()
        plans = self._plan(epoch, step, reader)
        try:
            batches = prefetch(plans, reader.read, self._num_ahead, reader.rows.cancel)
            for batch, event in batches:
                if event is not None:
                    hand_over(batch, event)
                self._move(epoch, batch.step + 1)
                self._is_begun = self._step > 0
                yield batch
        finally:
            if os.getpid() == pid:
                reader.rows.clear()
                self._idle.append((pid, reader))

    @property
    def _num_ahead(self) -> int:
        """Batches to have ready: as many as `prefetch_bytes` hold."""
        most = max(prod(self.contract.latent_shape(bucket)) for bucket in self._order.buckets)
        num_rows = self._order.options.batch_size // self.world_size
        num_bytes = num_rows * most * self._finish.dtype.itemsize
        return min(max(1, self._prefetch_bytes // num_bytes), MAX_AHEAD)

    def _make_reader(self) -> BatchReader:
        rows = RowReader(self._files, self._joined.columns, self._cache)
        seed = self._order.options.seed
        return BatchReader(self._files, self._joined, rows, self._finish, self._device, seed)

    def _plan(self, epoch: int, step: int, reader: BatchReader) -> Generator[Plan, None, None]:
        order = self._order.batches(epoch, step, rank=self.rank, world_size=self.world_size)
        # Remote files are fetched a window before they are needed.
        most = self._order.options.window_rows // self.world_size if self._cache else 0
        most_bytes = self._cache.max_bytes // 4 if self._cache else 0
        for group in _grouped(_look_ahead(order, reader.rows, most, most_bytes)):
            try:
                plans = reader.plan(epoch, group)
            except LatentCacheError:  # of one of them: those before it are good
                for chosen in group:
                    yield from reader.plan(epoch, [chosen])
                raise
            yield from plans


def _look_ahead(
    order: Iterator[BatchRows], rows: RowReader, most: int, most_bytes: int
) -> Iterator[BatchRows]:
    """Have files fetched and opened before they are needed.

    Args:
        order: the batches.
        rows: opens their files.
        most: rows that may wait.
        most_bytes: bytes of files that may be open and not needed yet.
    """
    ahead: deque[BatchRows] = deque()
    num_rows = 0
    for chosen in order:
        rows.prepare(chosen.files)
        ahead.append(chosen)
        num_rows += len(chosen.files)
        while ahead and (num_rows > most or rows.num_bytes_ahead > most_bytes):
            num_rows -= len(ahead[0].files)
            yield ahead.popleft()
    yield from ahead


def _epoch_and_step(
    state: Mapping[str, Any], identity: Mapping[str, Any], num_steps: int
) -> tuple[int, int]:
    """Read a state of a loader; see `LatentLoader.load_state_dict`.

    Args:
        state: what `state_dict` gave.
        identity: what the order of this loader depends on.
        num_steps: of an epoch.
    """
    for name, wanted in identity.items():
        if name not in state:
            raise ConfigError(f"not a state of a LatentLoader: it has no {name!r}")
        if state[name] != wanted:
            raise ConfigError(
                f"the state is of {name} {state[name]}, this loader has {name} {wanted}: "
                f"{_fix_of(name)}"
            )
    epoch, step = state.get("epoch"), state.get("step")
    if not (isinstance(epoch, int) and isinstance(step, int)):
        raise ConfigError("not a state of a LatentLoader: it has no epoch and step")
    if epoch < 0 or not 0 <= step < num_steps:
        raise ConfigError(
            f"the state names step {step} of epoch {epoch}; epochs have {num_steps} steps"
        )
    return epoch, step


def _grouped(batches: Iterator[BatchRows]) -> Iterator[list[BatchRows]]:
    """Group neighbours of one bucket: few at first, so that the first batch is soon there."""
    size, group = 1, list[BatchRows]()
    for chosen in batches:
        if group and (len(group) == size or group[0].bucket != chosen.bucket):
            yield group
            size, group = min(2 * size, _MAX_GROUP), []
        group.append(chosen)
    if group:
        yield group


def _device(device: torch.device | str) -> torch.device:
    """Return a device that batches can be moved to."""
    try:
        found = torch.device(device)
        is_cuda = found.type == "cuda"
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {device!r}: {first_line(error)}") from error
    if is_cuda and (found.index or 0) >= torch.cuda.device_count():
        num = torch.cuda.device_count()
        raise ConfigError(f"device is {str(device)!r}, and torch sees {num} GPUs: use 'cpu'")
    return found


def _check_rows(files: Files, num_rows: Ints, urls: Sequence[str]) -> None:
    """Refuse a dataset without rows."""
    for number, url in enumerate(urls):
        if not num_rows[files.source_of == number].any():
            raise DatasetError(f"{url} has no rows")


def _check_order(order: Order, num_rows: int, urls: Sequence[str]) -> None:
    """Refuse a dataset without one batch; say aloud which buckets are never seen."""
    options = order.options
    if not len(order):
        raise ConfigError(
            f"{urls[0]} has {num_rows} rows, and no bucket of it a whole batch of "
            f"{options.batch_size}; lower batch_size, or set tail to 'pad' or 'short'"
        )
    never = {bucket: order.left_out[bucket] for bucket, num in order.buckets.items() if not num}
    if never:
        names = ", ".join(f"{Bucket(*bucket).name} ({num} rows)" for bucket, num in never.items())
        warnings.warn(
            f"these buckets have fewer rows than batch_size {options.batch_size} and are never "
            f"seen: {names}; set tail to 'pad' or 'short' to train on them",
            stacklevel=3,
        )


def _check_cache(files: Files, options: OrderOptions, max_bytes: int, world_size: int) -> None:
    """Say aloud if a window's files do not fit the cache, for they would be fetched over and over.

    A node reads its ranks' share of each window.
    """
    if files.size_bytes.sum() <= max_bytes:
        return
    block_rows = options.block_rows or max(
        row_group_rows(files.contract, bucket) for bucket in files.buckets
    )
    num_nodes = max(1, world_size // num_ranks_here())
    num_files = min(len(files), options.window_rows // block_rows + 1) / num_nodes
    num_bytes = num_files * float(files.size_bytes.mean())
    if num_bytes > max_bytes / 2:
        whole = int(files.num_rows.max())
        warnings.warn(
            f"a window of {options.window_rows} rows reads {num_files:.0f} files of together "
            f"{num_bytes / 1e9:.1f} GB, too much for a cache of {max_bytes / 1e9:.1f} GB: raise "
            f"cache_bytes, lower window_rows, or keep files whole with block_rows={whole}",
            stacklevel=3,
        )


def _fix_of(field: str) -> str:
    if field == "manifest":
        return "give `manifest` the number of the state to go on with the same rows"
    if field in ("version", "dataset"):
        return "it cannot be continued here"
    return f"give {field} as it was"
