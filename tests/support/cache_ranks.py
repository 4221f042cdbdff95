"""What the processes of `test_cache.py` do. Imports little, because many of them are started."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentcache.dataset.receipts import DataFile
from latentcache.loader.cache import FileCache
from latentcache.storage import Store
from latentcache.storage.backend import Backend

LARGE = 10**12

# What the cache asks the system for, by the names of Python's audit events.
_EVENTS = {"fcntl.flock", "open", "os.mkdir", "os.remove", "os.rename", "os.scandir", "os.utime"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def open_all(store: Store, folder: Path, files: Sequence[DataFile], num_threads: int = 1) -> None:
    """Open the files on each of some threads; fails where the bytes are wrong."""
    cache = FileCache(folder, LARGE)

    def open_each(_: int) -> None:
        for file in files:
            with cache.open(store, file) as path:
                assert sha256(path.read_bytes()) == file.sha256

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(open_each, range(num_threads)))


def open_at_random(
    store: Store, folder: Path, files: Sequence[DataFile], max_bytes: int, seed: int
) -> None:
    """Open files on four threads, which leave each other no room."""
    cache = FileCache(folder, max_bytes)

    def open_some(thread: int) -> None:
        rng = random.Random(4 * seed + thread)
        for file in rng.choices(files, k=100):
            with cache.open(store, file) as path:
                assert sha256(path.read_bytes()) == file.sha256

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_some, range(4)))


def open_in_blocks(store: Store, folder: Path, file: DataFile, block_bytes: int) -> None:
    """Open a file, and fetch it in smaller blocks than usual."""
    Backend.read_block_bytes = block_bytes
    open_all(store, folder, [file])


def open_until(store: Store, folder: Path, file: DataFile, last_event: int) -> None:
    """Open a file, and be killed at the given one of all dealings with the cache's folder."""
    num_events = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_events
        if event in _EVENTS and (isinstance(args[0], int) or str(folder) in str(args[0])):
            num_events += 1
            if num_events == last_event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    open_all(store, folder, [file])


def open_when_it_comes(
    store: Store, folder: Path, elsewhere: Path, file: DataFile, trigger: Path
) -> None:
    """Open a file, and let it come from another cache when a path is first opened."""
    target = folder / file.sha256
    inodes = []

    def come(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[0] == os.fspath(trigger) and not inodes:
            inodes.append(0)
            with FileCache(elsewhere, LARGE).open(store, file) as path:
                path.rename(target)
            inodes.append(target.stat().st_ino)

    sys.addaudithook(come)
    with FileCache(folder, LARGE).open(store, file) as path:
        assert inodes == [0, path.stat().st_ino]
        assert os.listdir(folder) == [file.sha256]


def fork_while_held(store: Store, folder: Path, file: DataFile, other: DataFile) -> None:
    """Fork while a file is held, as a DataLoader may; the child outlives the holding."""
    cache = FileCache(folder, file.size_bytes)
    end_of_child, end_of_parent = os.pipe()
    with cache.open(store, file) as path:
        child = os.fork()
        if child == 0:
            os.close(end_of_parent)
            os.read(end_of_child, 1)
            os._exit(0)
    with cache.open(store, other):
        assert not path.exists(), "the child still holds it"
    os.close(end_of_parent)
    assert os.waitpid(child, 0)[1] == 0
