"""The file cache: whatever ranks do to it at once, and wherever they die, the bytes are right."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_ranks import (
    LARGE,
    fork_while_held,
    open_all,
    open_at_random,
    open_in_blocks,
    open_until,
    open_when_it_comes,
    sha256,
)
from latentcache.dataset.receipts import DataFile
from latentcache.errors import ConfigError, DatasetError, DiskFull, ObjectNotFound, StorageError
from latentcache.loader.cache import FileCache, default_cache_dir, parse_bytes
from latentcache.storage import Store, retries
from latentcache.storage_options import StorageOptions
from makers import flip_byte
from servers import (
    DEADLINE_S,
    Exchange,
    FaultyProxy,
    Reply,
    S3Server,
    cut_halfway,
    slow_down,
    wait_until,
)

pytestmark = pytest.mark.slow

ALWAYS = 1_000_000

# Ranks are forked from a process that has imported all but started no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["s3fs", "latentcache.loader.cache"])


class Remote:
    """A folder of an S3 server, seen through a proxy."""

    def __init__(self, server: S3Server, proxy: FaultyProxy, prefix: str) -> None:
        if not any(b["Name"] == "cached" for b in server.client.list_buckets()["Buckets"]):
            server.make_bucket("cached")
        self._client, self._prefix, self.proxy = server.client, prefix, proxy
        options = StorageOptions(endpoint_url=proxy.endpoint_url)
        self.store = Store(f"s3://cached/{prefix}", options)

    def put(self, name: str, data: bytes) -> DataFile:
        """Put an object; returns what a receipt would say of it."""
        self._client.put_object(Bucket="cached", Key=f"{self._prefix}/{name}", Body=data)
        return DataFile(name, len(data), sha256(data), 1, "64x64")

    def delete(self, file: DataFile) -> None:
        self._client.delete_object(Bucket="cached", Key=f"{self._prefix}/{file.path}")

    def num_gets(self, file: DataFile) -> int:
        """How often the server was asked for the bytes of a file."""
        return self.proxy.count("GET", f"/{file.path}$")


def put_local(store: Store, name: str, data: bytes) -> DataFile:
    store.put(name, data)
    return DataFile(name, len(data), sha256(data), 1, "64x64")


@pytest.fixture
def remote(moto: S3Server, proxy: FaultyProxy, tmp_path: Path) -> Remote:
    return Remote(moto, proxy, tmp_path.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def start(function: Callable[..., None], *args: Any) -> Any:
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def join(process: Any) -> int:
    process.join(DEADLINE_S)
    assert process.exitcode is not None, "it hangs"
    code: int = process.exitcode
    return code


def read(cache: FileCache, store: Store, file: DataFile) -> bytes:
    with cache.open(store, file) as path:
        return path.read_bytes()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def parts_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def num_waiting_for(part: Path) -> int:
    """How many wait for a lock on a file, as the kernel tells."""
    inode = f":{part.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return sum("-> FLOCK" in line and inode in line for line in lines)


def wait_until_all_want(folder: Path, num_waiting: int) -> None:
    (part,) = parts_in(folder)
    wait_until(lambda: num_waiting_for(part) == num_waiting, f"{num_waiting} that wait")


@pytest.mark.parametrize("name", ["moto", "rclone"])
def test_a_file_is_fetched_once_and_then_read_from_disk(
    name: str, request: pytest.FixtureRequest, folder: Path
) -> None:
    server: S3Server = request.getfixturevalue(name)
    with FaultyProxy(server.endpoint_url) as proxy:
        remote = Remote(server, proxy, f"once-{name}")
        data = os.urandom(300_000)
        first, same = remote.put("a.parquet", data), remote.put("deep/er/b.parquet", data)
        for file in (first, first, same):  # another dataset may hold the same bytes
            assert read(FileCache(folder, LARGE), remote.store, file) == data
        assert (remote.num_gets(first), remote.num_gets(same)) == (1, 0)
    assert names_in(folder) == {first.sha256}


def test_one_rank_fetches_a_file_and_the_others_wait(remote: Remote, folder: Path) -> None:
    file, other = (remote.put(name, os.urandom(100_000)) for name in ("a", "b"))
    gate = remote.proxy.gate("/a$")
    ranks = [start(open_all, remote.store, folder, [file, other], 3) for _ in range(3)]
    wait_until(lambda: gate.is_reached, "the first rank")
    wait_until_all_want(folder, 8)
    gate.open()
    assert [join(rank) for rank in ranks] == [0, 0, 0]
    assert (remote.num_gets(file), remote.num_gets(other)) == (1, 1)
    assert names_in(folder) == {file.sha256, other.sha256}


@pytest.mark.parametrize("max_bytes", [0, 10_000])
def test_ranks_that_evict_each_others_files_still_get_their_files(
    max_bytes: int, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    files = [put_local(store, str(number), bytes([number]) * 4000) for number in range(40)]
    folder = tmp_path / "cache"
    ranks = [start(open_at_random, store, folder, files, max_bytes, seed) for seed in range(3)]
    assert [join(rank) for rank in ranks] == [0, 0, 0]
    assert not parts_in(folder)


@pytest.mark.parametrize("is_fetched", [False, True], ids=["before the fetch", "after it"])
def test_a_copy_cached_by_another_process_is_used_and_not_replaced(
    is_fetched: bool, remote: Remote, tmp_path: Path
) -> None:
    file = remote.put("a", os.urandom(1000))
    folder, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    # The folder itself is opened to lock it for the renaming.
    trigger = folder if is_fetched else folder / f"{file.sha256}.1000.part"
    assert join(start(open_when_it_comes, remote.store, folder, elsewhere, file, trigger)) == 0
    assert remote.num_gets(file) == 1 + is_fetched


def test_waiting_ranks_get_the_file_when_the_fetching_rank_is_killed(
    remote: Remote, folder: Path
) -> None:
    file = remote.put("a", os.urandom(100_000))
    gate = remote.proxy.gate("/a$")
    ranks = [start(open_all, remote.store, folder, [file]) for _ in range(3)]
    wait_until(lambda: gate.is_reached, "the first rank")
    wait_until_all_want(folder, 2)
    os.kill(gate.client_pid, signal.SIGKILL)
    assert sorted(join(rank) for rank in ranks) == [-signal.SIGKILL, 0, 0]
    gate.open()
    assert file.sha256 in names_in(folder)


def test_a_rank_killed_at_any_point_leaves_a_usable_cache(remote: Remote, folder: Path) -> None:
    """At each dealing with the folder in turn, then at random amounts of bytes on disk."""
    rng = random.Random(3)
    cache = FileCache(folder, LARGE)
    num_kills, part_sizes = 0, []

    def judge(rank: Any, file: DataFile) -> bool:
        """Whether the rank was killed; either way the next one to open the file has it."""
        nonlocal num_kills
        code = join(rank)
        assert code in (0, -signal.SIGKILL)
        num_kills += code != 0
        part_sizes.extend(part.stat().st_size for part in parts_in(folder))
        assert sha256(read(cache, remote.store, file)) == file.sha256
        assert not parts_in(folder)
        return code != 0

    for event in itertools.count(1):
        file = remote.put(f"event-{event}", rng.randbytes(10_000))
        if not judge(start(open_until, remote.store, folder, file, event), file):
            break
    assert num_kills >= 10
    assert 0 in part_sizes
    assert 10_000 in part_sizes

    part_sizes.clear()
    block_bytes = 2**18
    for number in range(12):
        file = remote.put(f"bytes-{number}", rng.randbytes(12 * block_bytes + 1))
        num_blocks, share = rng.randrange(1, 6), rng.random()

        def kill_reader(exchange: Exchange, share: float = share) -> None:
            reply = exchange.forward()
            exchange.begin(reply)
            exchange.write(reply.body[: int(share * len(reply.body))])
            os.kill(exchange.client_pid, signal.SIGKILL)

        passed = remote.proxy.on("GET", f"/{file.path}$", pass_on, times=num_blocks)
        killed = remote.proxy.on("GET", f"/{file.path}$", kill_reader)
        assert judge(start(open_in_blocks, remote.store, folder, file, block_bytes), file)
        assert (passed.num_fired, killed.num_fired) == (num_blocks, 1)
    assert len(part_sizes) == 12
    assert len(set(part_sizes)) >= 4
    assert all(0 < size <= 12 * block_bytes for size in part_sizes)
    assert num_kills >= 22


def pass_on(exchange: Exchange) -> None:
    exchange.send(exchange.forward())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    wants=st.lists(st.integers(0, 7), max_size=30),
    max_bytes=st.integers(0, 300),
)
def test_the_least_recently_used_files_are_evicted(
    sizes: list[int], wants: list[int], max_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        store, cache = Store(f"{name}/store"), FileCache(Path(name, "cache"), max_bytes)
        files = [put_local(store, str(n), bytes([n]) * size) for n, size in enumerate(sizes)]
        model: OrderedDict[str, int] = OrderedDict()
        for want in wants:
            file = files[want % len(files)]
            assert sha256(read(cache, store, file)) == file.sha256
            if file.sha256 not in model:
                while model and sum(model.values()) + file.size_bytes > max_bytes:
                    model.popitem(last=False)
            model[file.sha256] = file.size_bytes
            model.move_to_end(file.sha256)
            assert names_in(cache.folder) == model.keys()
            assert sum(model.values()) <= max(max_bytes, file.size_bytes)


def test_files_in_use_and_foreign_files_are_not_deleted(remote: Remote, folder: Path) -> None:
    files = [remote.put(name, os.urandom(1000)) for name in "abc"]
    foreign = ["notes.txt", "0" * 63, "0" * 64 + ".parquet", "A" * 64, "0" * 64 + ".part"]
    (folder / ("f" * 64)).mkdir(parents=True)
    for name in foreign:
        (folder / name).write_bytes(bytes(10_000))
    cache = FileCache(folder, 1000)
    with cache.open(remote.store, files[0]) as held:
        for file in (files[1], files[2], files[1]):
            read(cache, remote.store, file)
            assert names_in(folder) == {*foreign, "f" * 64, held.name, file.sha256}
        assert sha256(held.read_bytes()) == files[0].sha256
    read(cache, remote.store, files[2])
    assert names_in(folder) == {*foreign, "f" * 64, files[2].sha256}


def test_parts_of_killed_downloads_are_deleted_first(remote: Remote, folder: Path) -> None:
    first, second = (remote.put(name, os.urandom(1000)) for name in "ab")
    cache = FileCache(folder, 3000)
    read(cache, remote.store, first)
    (folder / f"{'0' * 64}.2000.part").write_bytes(b"cut")
    (folder / f"{'1' * 64}.2000.{'2' * 16}.part").write_bytes(b"")
    read(cache, remote.store, second)
    assert names_in(folder) == {first.sha256, second.sha256}


def test_a_download_counts_in_full_from_its_start(remote: Remote, folder: Path) -> None:
    old, slow, quick = (remote.put(name, os.urandom(100_000)) for name in ("old", "slow", "quick"))
    cache = FileCache(folder, 250_000)
    read(cache, remote.store, old)
    gate = remote.proxy.gate("/slow$")
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(read, cache, remote.store, slow)
        wait_until(lambda: gate.is_reached, "the slow download")
        (part,) = parts_in(folder)
        assert part.stat().st_size == 0
        read(cache, remote.store, quick)
        assert names_in(folder) == {part.name, quick.sha256}
        gate.open()
        assert sha256(fetching.result(DEADLINE_S)) == slow.sha256
    assert names_in(folder) == {slow.sha256, quick.sha256}


def test_a_mapped_file_may_be_deleted(remote: Remote, folder: Path) -> None:
    files = [remote.put(name, os.urandom(1000)) for name in "ab"]
    cache = FileCache(folder, 1000)
    with cache.open(remote.store, files[0]) as path:
        mapped = torch.from_file(str(path), size=1000, dtype=torch.uint8)
    read(cache, remote.store, files[1])
    assert names_in(folder) == {files[1].sha256}
    assert sha256(mapped.numpy().tobytes()) == files[0].sha256


def test_a_forked_child_does_not_inherit_the_lock_on_a_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    files = [put_local(store, name, name.encode() * 1000) for name in "ab"]
    assert join(start(fork_while_held, store, tmp_path / "cache", *files)) == 0


def cut_short(path: Path) -> None:
    os.truncate(path, 500)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("damage", [flip_byte, cut_short, lengthen, Path.unlink])
def test_a_damaged_copy_is_fetched_again_once(
    damage: Callable[[Path], None], remote: Remote, folder: Path
) -> None:
    file = remote.put("a", os.urandom(1000))
    cache = FileCache(folder, LARGE)
    with cache.open(remote.store, file) as path:
        pass
    damage(path)
    for _ in range(2):
        assert sha256(read(cache, remote.store, file)) == file.sha256
    assert remote.num_gets(file) == 2
    assert names_in(folder) == {file.sha256}


def garble(exchange: Exchange) -> None:
    reply = exchange.forward()
    exchange.send(replace(reply, body=bytes(len(reply.body))))


def test_bytes_garbled_on_the_way_are_fetched_again(remote: Remote, folder: Path) -> None:
    file = remote.put("a", os.urandom(1000))
    garbled = remote.proxy.on("GET", "/a$", garble)
    assert sha256(read(FileCache(folder, LARGE), remote.store, file)) == file.sha256
    assert (garbled.num_fired, remote.num_gets(file)) == (1, 2)


def test_an_object_that_differs_from_its_receipt_is_named(remote: Remote, folder: Path) -> None:
    file = replace(remote.put("a", os.urandom(1000)), sha256=sha256(b"another"))
    url = remote.store.url_of("a")
    with pytest.raises(DatasetError, match=f"{url} is damaged: .*latentcache verify --repair"):
        read(FileCache(folder, LARGE), remote.store, file)
    assert remote.num_gets(file) == 2
    assert not names_in(folder)


def test_an_object_of_another_size_is_named(remote: Remote, folder: Path) -> None:
    file = replace(remote.put("a", os.urandom(1000)), size_bytes=999)
    url = remote.store.url_of("a")
    with pytest.raises(DatasetError, match=f"{url} has 1000 bytes, not 999, .*verify --repair"):
        read(FileCache(folder, LARGE), remote.store, file)
    assert not names_in(folder)


def test_a_missing_object_is_named(remote: Remote, folder: Path) -> None:
    cached, gone = (remote.put(name, os.urandom(1000)) for name in "ab")
    cache = FileCache(folder, LARGE)
    read(cache, remote.store, cached)
    for file in (cached, gone):
        remote.delete(file)
    assert sha256(read(cache, remote.store, cached)) == cached.sha256
    url = remote.store.url_of("b")
    with pytest.raises(DatasetError, match=f"{url}: .*the manifest lists it: .*repair") as caught:
        read(cache, remote.store, gone)
    assert isinstance(caught.value.__cause__, ObjectNotFound)
    assert names_in(folder) == {cached.sha256}


def test_cut_connections_and_a_busy_store_are_retried(remote: Remote, folder: Path) -> None:
    file = remote.put("a", os.urandom(100_000))
    faults = [
        remote.proxy.on("HEAD", "/a$", slow_down),
        remote.proxy.on("GET", "/a$", cut_halfway),
        remote.proxy.on("GET", "/a$", slow_down),
    ]
    assert sha256(read(FileCache(folder, LARGE), remote.store, file)) == file.sha256
    assert [fault.num_fired for fault in faults] == [1, 1, 1]


def cut(exchange: Exchange) -> None:
    exchange.cut()


def test_a_store_that_fails_halfway_is_named_and_works_again_later(
    remote: Remote, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_PAUSES_S", (0.01,))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    file = remote.put("a", os.urandom(100_000))
    dies = remote.proxy.on("GET", "/a$", cut_halfway)
    dead = remote.proxy.on("GET", "/a$", cut, times=ALWAYS)
    with pytest.raises(StorageError, match=f"cannot reach or use {remote.store.url_of('a')}"):
        read(FileCache(folder, LARGE), remote.store, file)
    assert dies.num_fired == 1
    assert dead.num_fired > 1
    assert not names_in(folder)
    dead.times = 0
    assert sha256(read(FileCache(folder, LARGE), remote.store, file)) == file.sha256


def test_waiting_processes_fetch_at_once_when_the_first_fetch_fails(
    remote: Remote, folder: Path
) -> None:
    """One after the other, each would first wait minutes for a store that is down."""
    file = remote.put("a", os.urandom(100_000))
    num_others = 3
    all_wait, all_try = threading.Event(), threading.Barrier(num_others)

    def refuse_halfway(exchange: Exchange) -> None:
        assert all_wait.wait(DEADLINE_S)
        exchange.send(Reply(403, [], b""))

    def refuse_together(exchange: Exchange) -> None:
        all_try.wait(DEADLINE_S)
        exchange.send(Reply(403, [], b""))

    def fetch(_: int) -> str:
        with pytest.raises(StorageError) as caught:
            read(FileCache(folder, LARGE), remote.store, file)
        return str(caught.value)

    first = remote.proxy.on("GET", "/a$", refuse_halfway)
    with ThreadPoolExecutor(1 + num_others) as pool:
        messages = pool.map(fetch, range(1 + num_others))
        remote.proxy.wait_for("HEAD", "/a$")
        others = remote.proxy.on("HEAD", "/a$", refuse_together, times=num_others)
        wait_until_all_want(folder, num_others)
        all_wait.set()
        assert all(remote.store.url_of("a") in message for message in messages)
    assert (first.num_fired, others.num_fired) == (1, num_others)
    assert not names_in(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_error_names_the_fix(remote: Remote, small_disk: Path) -> None:
    first, second = (remote.put(name, os.urandom(200_000)) for name in "ab")
    read(FileCache(small_disk, LARGE), remote.store, first)
    with pytest.raises(DiskFull, match=f"{small_disk}.*lower cache_bytes, or set cache_dir"):
        read(FileCache(small_disk, LARGE), remote.store, second)
    assert names_in(small_disk) == {first.sha256}, "it left rubbish on a full disk"
    assert read(FileCache(small_disk, 250_000), remote.store, second)
    assert names_in(small_disk) == {second.sha256}


def test_a_folder_that_cannot_be_used_is_named(remote: Remote, tmp_path: Path) -> None:
    file = remote.put("a", b"1")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"cannot use {tmp_path / 'file'}"):
        read(FileCache(tmp_path / "file", LARGE), remote.store, file)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (7, 7),
        ("7", 7),
        ("7b", 7),
        ("100gb", 100 * 10**9),
        (" 1.5 TB ", 15 * 10**11),
        ("2kb", 2000),
        ("0.5mb", 500_000),
        ("2KiB", 2048),
        ("3 mib", 3 * 2**20),
        ("1gib", 2**30),
        ("1tib", 2**40),
    ],
)
def test_parse_bytes(text: int | str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "gb", "100g", "1 pb", "-1", "ib", "5ib", "1e9", -1, True])
def test_parse_bytes_rejects_text_that_is_not_a_size(text: int | str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_the_default_folder_must_belong_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = default_cache_dir()
    assert folder == default_cache_dir() == tmp_path / f"latentcache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(ConfigError, match="another user: set cache_dir"):
        default_cache_dir()
