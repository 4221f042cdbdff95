"""The loader over real S3 servers: the same batches, whatever the connection or a kill does."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentcache import Batch, LatentLoader, StorageOptions, storage
from latentcache.errors import DatasetError, StorageError
from makers import flip_byte
from ranks import run_ranks
from reference import assert_stored, identities, read_rows
from servers import Exchange, FaultyProxy, Reply, S3Server, cut_halfway, slow_down, wait_until
from synthetic import make_contract, write_dataset

SMALL, TALL = (64, 64), (64, 96)
UNITS = [{SMALL: 20, TALL: 6}, {SMALL: 11}, {TALL: 9}, {SMALL: 14, TALL: 2}]
NUM_FILES = 6
IDENTITY = ("unit", "key")
DATA = r"/data/.*\.parquet$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "dataset"
    write_dataset(str(folder), make_contract([SMALL, TALL]), UNITS)
    return folder


def upload(folder: Path, server: S3Server, bucket: str) -> str:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    objects = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return server.make_bucket(bucket, objects)


@pytest.fixture(scope="module")
def url(folder: Path, moto: S3Server) -> str:
    return upload(folder, moto, "loaded")


def load(url: str, cache: Path, endpoint: str, **options: Any) -> LatentLoader:
    chosen = {"batch_size": 4, "tail": "short", "columns": IDENTITY, "cache_dir": cache} | options
    return LatentLoader(url, storage=StorageOptions(endpoint_url=endpoint), **chosen)


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
    loader = load(remote, tmp_path / "cache", server.endpoint_url)
    assert bits(list(loader)) == local_bits(tmp_path / "local")
    rows = read_rows(tmp_path / "local")
    options = {"normalize": False, "dtype": torch.float16}
    for batch in load(remote, tmp_path / "cache", server.endpoint_url, **options):
        assert_stored(batch, rows)


def test_what_is_cached_is_not_fetched_again(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    expected = local_bits(folder)
    assert bits(list(load(url, tmp_path, proxy.endpoint_url))) == expected
    assert proxy.count("GET", DATA) == NUM_FILES
    assert bits(list(load(url, tmp_path, proxy.endpoint_url))) == expected
    assert proxy.count("GET", DATA) == NUM_FILES


def test_a_cache_smaller_than_the_dataset_will_do(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    sizes = [path.stat().st_size for path in folder.glob("data/*/*")]
    limit = max(sizes) * 5 // 2
    with pytest.warns(UserWarning, match="too much for a cache"):
        loader = load(url, tmp_path, proxy.endpoint_url, cache_bytes=limit, prefetch_bytes=0)
    assert bits(list(loader)) == local_bits(folder)
    assert proxy.count("GET", DATA) >= NUM_FILES
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit < sum(sizes)


def test_a_busy_store_and_cut_connections_change_nothing(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PAUSES_S", (0.01,) * 9)
    faults = [proxy.on("GET", DATA, fault, times=3) for fault in (cut_halfway, slow_down)]
    assert bits(list(load(url, tmp_path, proxy.endpoint_url))) == local_bits(folder)
    assert [fault.num_fired for fault in faults] == [3, 3]


def test_an_object_with_other_bytes_is_named(
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
        list(load(url, tmp_path, proxy.endpoint_url))
    assert "SHA-256" in str(error.value)
    assert rule.num_fired == 2
    # A fault of the connection is over at some time: the same cache then serves all.
    assert bits(list(load(url, tmp_path, proxy.endpoint_url))) == local_bits(folder)


def test_an_object_that_is_gone_is_named(folder: Path, tmp_path: Path, moto: S3Server) -> None:
    gone = upload(folder, moto, "gone")
    victim = sorted(folder.glob("data/*/*"))[2]
    moto.client.delete_object(Bucket="gone", Key=str(victim.relative_to(folder)))
    with pytest.raises(DatasetError, match=victim.name):
        list(load(gone, tmp_path, moto.endpoint_url))


def test_a_damaged_copy_is_fetched_again(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    expected = local_bits(folder)
    list(load(url, tmp_path, proxy.endpoint_url))
    flip_byte(max(tmp_path.iterdir(), key=lambda path: path.stat().st_size))
    assert bits(list(load(url, tmp_path, proxy.endpoint_url))) == expected
    assert proxy.count("GET", DATA) == NUM_FILES + 1


def keys_or_error(url: str, cache: str, endpoint: str, rank: int) -> tuple[list[Any], str]:
    """What a rank of two gets of an epoch, and how it ended."""
    storage._PAUSES_S = (0.01, 0.01)
    loader = load(url, Path(cache), endpoint, rank=rank, world_size=2, batch_size=8, tail="drop")
    keys = []
    try:
        for batch in loader:
            keys.append(identities(batch))
    except StorageError as error:
        return keys, str(error)
    return keys, ""


def test_ranks_share_a_cache(url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy) -> None:
    ranks = [(url, str(tmp_path), proxy.endpoint_url, rank) for rank in range(2)]
    (first, _), (second, _) = run_ranks(keys_or_error, ranks)
    one = LatentLoader(str(folder), batch_size=8, columns=IDENTITY)
    expected = [identities(batch) for batch in one]
    assert [a + b for a, b in zip(first, second, strict=True)] == expected
    assert proxy.count("GET", DATA) == NUM_FILES


def test_a_store_that_is_down_is_named_on_every_rank(
    url: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    def down(exchange: Exchange) -> None:
        exchange.send(Reply(500, [("Content-Type", "text/plain")], b"down"))

    rule = proxy.on("GET", DATA, down, times=10**6)
    ranks = [(url, str(tmp_path), proxy.endpoint_url, rank) for rank in range(2)]
    for keys, told in run_ranks(keys_or_error, ranks):
        assert keys == []
        assert "s3://loaded/data/" in told
    assert rule.num_fired >= 2


RANK = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_loader_s3 import load
print("begun", flush=True)
for batch in load(sys.argv[1], Path(sys.argv[2]), sys.argv[3], prefetch_bytes=0):
    print(batch.step, flush=True)
"""


def test_a_rank_killed_amid_its_first_epoch_harms_no_other(
    url: str, folder: Path, tmp_path: Path, proxy: FaultyProxy
) -> None:
    """Five times, while a file is half fetched, then while batches are read."""
    expected = local_bits(folder)
    rng = random.Random(0)
    num_parts = 0
    for attempt in range(5):
        cache = tmp_path / str(attempt)
        gate = proxy.gate(DATA) if attempt < 3 else None
        command = [sys.executable, "-c", RANK, url, str(cache), proxy.endpoint_url, *sys.path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
            assert rank.stdout
            assert rank.stdout.readline() == "begun\n"
            if gate:
                wait_until(lambda gate=gate: gate.is_reached, "no download")
            else:
                for _ in range(rng.randrange(1, 8)):
                    assert rank.stdout.readline()
            rank.send_signal(signal.SIGKILL)
        if gate:
            num_parts += len(list(cache.glob("*.part")))
            gate.open()
        assert rank.returncode == -signal.SIGKILL
        assert bits(list(load(url, cache, proxy.endpoint_url))) == expected
    assert num_parts >= 3
