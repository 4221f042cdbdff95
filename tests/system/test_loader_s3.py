"""The loader over real S3 servers: the same batches, whatever the connection or a kill does."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import torch

from latentcache import Batch, LatentLoader, open_dataset
from latentcache.errors import DatasetError, StorageError
from latentcache.storage import retries
from makers import flip_byte
from ranks import CONTEXT, be_impatient, identities_or_error, load_remote, run_ranks, send_steps
from reference import IDENTITY, assert_stored, identities, read_rows
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
from synthetic import make_contract, write_dataset

SMALL, TALL = (64, 64), (64, 96)
UNITS = [{SMALL: 20, TALL: 6}, {SMALL: 11}, {TALL: 9}, {SMALL: 14, TALL: 2}]
NUM_FILES = 6
DATA = r"/data/.*\.parquet$"
ALWAYS = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "dataset"
    write_dataset(str(folder), make_contract([SMALL, TALL]), UNITS)
    return folder


def upload(folder: Path, server: S3Server, bucket: str) -> str:
    paths = [path for path in folder.rglob("*") if path.is_file() and "commits" not in path.parts]
    objects = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return server.make_bucket(bucket, objects)


@pytest.fixture(scope="module")
def url(folder: Path, moto: S3Server) -> str:
    return upload(folder, moto, "loaded")


def bits(batches: Sequence[Batch]) -> list[tuple[list[tuple[str, str]], bytes]]:
    return [(identities(batch), batch.latents.numpy().tobytes()) for batch in batches]


def local_bits(folder: Path, **options: Any) -> list[tuple[list[tuple[str, str]], bytes]]:
    chosen = {"batch_size": 4, "tail": "short", "columns": IDENTITY} | options
    return bits(list(LatentLoader(str(folder), **chosen)))


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("name", ["moto", "rclone"])
def test_a_remote_dataset_gives_the_batches_of_a_local_one(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, format: str
) -> None:
    server: S3Server = request.getfixturevalue(name)
    contract = make_contract([SMALL, TALL], format=format)
    write_dataset(str(tmp_path / "local"), contract, UNITS)
    remote = upload(tmp_path / "local", server, f"same-{format}")
    loader = load_remote(remote, tmp_path / "cache", server.endpoint_url)
    assert bits(list(loader)) == local_bits(tmp_path / "local")
    rows = read_rows(tmp_path / "local")
    options = {"normalize": False, "dtype": torch.float16}
    for batch in load_remote(remote, tmp_path / "cache", server.endpoint_url, **options):
        assert_stored(batch, rows)


def test_a_cached_file_is_not_fetched_again(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    expected = local_bits(folder)
    assert bits(list(load_remote(url, tmp_path, proxy.endpoint_url))) == expected
    assert proxy.count("GET", DATA) == NUM_FILES
    assert bits(list(load_remote(url, tmp_path, proxy.endpoint_url))) == expected
    assert proxy.count("GET", DATA) == NUM_FILES


def test_a_cache_may_be_smaller_than_the_dataset(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    sizes = [path.stat().st_size for path in folder.glob("data/*/*")]
    limit = max(sizes) * 5 // 2
    with pytest.warns(UserWarning, match="too much for a cache"):
        loader = load_remote(url, tmp_path, proxy.endpoint_url, cache_bytes=limit, prefetch_bytes=0)
    assert bits(list(loader)) == local_bits(folder)
    assert proxy.count("GET", DATA) >= NUM_FILES
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit < sum(sizes)


def test_a_busy_store_and_cut_connections_change_no_batch(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_PAUSES_S", (0.01,) * 9)
    faults = [proxy.on("GET", DATA, fault, times=3) for fault in (cut_halfway, slow_down)]
    assert bits(list(load_remote(url, tmp_path, proxy.endpoint_url))) == local_bits(folder)
    assert [fault.num_fired for fault in faults] == [3, 3]


def test_an_object_with_another_hash_is_named(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    """It is fetched twice, for the first time may have been the connection's doing."""

    def replaced(exchange: Exchange) -> None:
        reply = exchange.forward()
        middle = len(reply.body) // 2
        other = reply.body[:middle] + b"????" + reply.body[middle + 4 :]
        exchange.send(replace(reply, body=other))

    victim = sorted(folder.glob("data/*/*"))[0]
    rule = proxy.on("GET", f"{victim.name}$", replaced, times=2)
    with pytest.raises(DatasetError, match=victim.name) as error:
        list(load_remote(url, tmp_path, proxy.endpoint_url))
    assert "SHA-256" in str(error.value)
    assert rule.num_fired == 2
    # A fault of the connection is over at some time: the same cache then serves all.
    assert bits(list(load_remote(url, tmp_path, proxy.endpoint_url))) == local_bits(folder)


def test_a_missing_object_is_named(folder: Path, tmp_path: Path, moto: S3Server) -> None:
    gone = upload(folder, moto, "gone")
    victim = sorted(folder.glob("data/*/*"))[2]
    moto.client.delete_object(Bucket="gone", Key=str(victim.relative_to(folder)))
    with pytest.raises(DatasetError, match=victim.name):
        list(load_remote(gone, tmp_path, moto.endpoint_url))


def test_a_damaged_cache_file_is_fetched_again(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    expected = local_bits(folder)
    list(load_remote(url, tmp_path, proxy.endpoint_url))
    flip_byte(max(tmp_path.iterdir(), key=lambda path: path.stat().st_size))
    assert bits(list(load_remote(url, tmp_path, proxy.endpoint_url))) == expected
    assert proxy.count("GET", DATA) == NUM_FILES + 1


def test_ranks_share_a_cache(url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy) -> None:
    ranks = [(url, tmp_path, proxy.endpoint_url, rank) for rank in range(2)]
    (first, _), (second, _) = run_ranks(identities_or_error, ranks)
    one = LatentLoader(str(folder), batch_size=8, columns=IDENTITY)
    expected = [identities(batch) for batch in one]
    assert [a + b for a, b in zip(first, second, strict=True)] == expected
    assert proxy.count("GET", DATA) == NUM_FILES


def down(exchange: Exchange) -> None:
    exchange.send(Reply(500, [("Content-Type", "text/plain")], b"down"))


def test_every_rank_names_an_unreachable_store(
    url: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    rule = proxy.on("GET", DATA, down, times=ALWAYS)
    ranks = [(url, tmp_path, proxy.endpoint_url, rank) for rank in range(2)]
    for batches, message in run_ranks(identities_or_error, ranks):
        assert batches == []
        assert "s3://loaded/data/" in message
    assert rule.num_fired >= 2


def test_an_outage_is_raised_in_order_and_the_loader_resumes_after_it(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_impatient(monkeypatch)
    options = {"batch_size": 1, "shuffle": False}
    expected = local_bits(folder, **options)
    loader = load_remote(url, tmp_path, proxy.endpoint_url, **options)
    # All are asked for ahead; what there is still comes first.
    names = [file.path for unit in open_dataset(str(folder)).units for file in unit.files]
    rules = {name: proxy.on("GET", f"/{name}$", down, times=ALWAYS) for name in names[3:]}
    batches = []
    with pytest.raises(StorageError, match=r"s3://loaded/data/.*parquet") as caught:
        batches.extend(loader)
    assert bits(batches) == expected[: len(batches)]
    assert len(batches) >= 9
    (named,) = (rule for name, rule in rules.items() if name in str(caught.value))
    # Three times, each of which is three of botocore's; and never again for batches around it.
    assert named.num_fired == 9
    for rule in rules.values():
        rule.times = 0
    assert bits(list(loader)) == expected


@pytest.mark.parametrize(("num_gets", "num_steps"), [(0, 0), (1, 0), (3, 0), (6, 2), (6, 9)])
def test_a_killed_rank_affects_no_other_rank(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy, num_gets: int, num_steps: int
) -> None:
    """While a file is half fetched, after some have been; or while batches are read."""
    passed = proxy.on("GET", DATA, pass_on, times=num_gets)
    gate = None if num_steps else proxy.gate(DATA)
    steps, to = CONTEXT.Pipe(duplex=False)
    rank = CONTEXT.Process(target=send_steps, args=(url, tmp_path, proxy.endpoint_url, to))
    rank.start()
    to.close()
    if gate:
        wait_until(lambda: gate.is_reached, "a download")
    for step in range(num_steps):
        assert steps.poll(DEADLINE_S)
        assert steps.recv() == step
    rank.kill()
    rank.join(DEADLINE_S)
    assert rank.exitcode == -signal.SIGKILL
    assert passed.num_fired == num_gets
    if gate:
        assert list(tmp_path.glob("*.part"))
        gate.open()
    assert bits(list(load_remote(url, tmp_path, proxy.endpoint_url))) == local_bits(folder)
    assert not list(tmp_path.glob("*.part"))


def pass_on(exchange: Exchange) -> None:
    exchange.send(exchange.forward())


_INTERRUPTED = """
import signal, sys

def interrupt(*_):
    print("interrupted", flush=True)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)
sys.path[:0] = sys.argv[4:]
from ranks import load_remote
print("begun", flush=True)
list(load_remote(*sys.argv[1:4]))
"""


def test_ctrl_c_stops_fetching(moto: S3Server, tmp_path: Path, proxy: FaultyProxy) -> None:
    """Of many files that are asked for ahead, those that are on their way are waited for."""
    num_files = 50
    write_dataset(str(tmp_path / "local"), make_contract([SMALL]), [{SMALL: 1}] * num_files)
    remote = upload(tmp_path / "local", moto, "interrupted")
    gates = [proxy.gate(DATA) for _ in range(8)]
    arguments = [remote, str(tmp_path / "cache"), proxy.endpoint_url, *sys.path]
    command = [sys.executable, "-c", _INTERRUPTED, *arguments]
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "begun\n"
            wait_until(lambda: all(gate.is_reached for gate in gates), "the downloads")
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            for gate in gates:
                gate.open()
            _, said = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert said.endswith("KeyboardInterrupt\n")
    assert 8 <= proxy.count("GET", DATA) < num_files


_FAILING = """
import sys
sys.path[:0] = sys.argv[4:]
from latentcache.storage import retries
from ranks import load_remote
retries._PAUSES_S = (0.01, 3600.0)
list(load_remote(*sys.argv[1:4], shuffle=False, batch_size=1))
"""


def test_a_failed_rank_does_not_wait_for_the_store(
    moto: S3Server, tmp_path: Path, proxy: FaultyProxy
) -> None:
    """One file is missing: the error comes at once. Requests for the others are retried."""
    write_dataset(str(tmp_path / "local"), make_contract([SMALL]), [{SMALL: 1}] * NUM_FILES)
    remote = upload(tmp_path / "local", moto, "failing")
    (gone,) = open_dataset(str(tmp_path / "local")).units[0].files
    moto.client.delete_object(Bucket="failing", Key=gone.path)
    rule = proxy.on("GET", DATA, down, times=ALWAYS)
    arguments = [remote, str(tmp_path / "cache"), proxy.endpoint_url, *sys.path]
    command = [sys.executable, "-c", _FAILING, *arguments]
    with Popen(command, stderr=PIPE, text=True) as process:
        try:
            _, said = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert f"{gone.path}: no such file" in said
    assert rule.num_fired >= 1
