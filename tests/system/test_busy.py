"""Several runs on one output: beside each other, one after the other, or one alone."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import latentcache
from corpus import good, objects
from latentcache import clock
from latentcache.config import Config, parse_config
from latentcache.engine import lease as lease_module
from latentcache.engine import run as run_module
from latentcache.engine.lease import STALE_AFTER_S, Lease, active_leases, active_runs
from latentcache.engine.progress import RunProgress
from latentcache.engine.status import read_status
from latentcache.storage import Store, local_files, retries
from latentcache.storage_options import StorageOptions
from makers import config_tree, png, tree_digest, write_tar
from runs import Configs, assert_nothing_lost_or_doubled, receipts_at
from servers import DEADLINE_S, Exchange, FaultyProxy, S3Server
from thread_cluster import ThreadCluster

NUM_RACES = 8
ALWAYS = 1_000_000
HOURS = 3600


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Cluster", ThreadCluster)
    monkeypatch.setattr(lease_module, "_LIST_EVERY_S", 0.05)
    monkeypatch.setattr(lease_module, "_CHECK_STOP_EVERY_S", 0.01)


@pytest.fixture
def reactions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], object]]:
    """Return actions by text; an action runs once, when a run logs a line with its text."""
    reactions: dict[str, Callable[[], object]] = {}
    said: list[str] = []

    def say(progress: RunProgress, *words: str, **_: object) -> None:
        line = words[-1]
        said.append(line)
        for text in [text for text in reactions if text in line]:
            reactions.pop(text)()

    monkeypatch.setattr(RunProgress, "say", say)
    return reactions


def make_config(folder: Path, on_busy: str, num_shards: int = 2) -> Config:
    for number in range(num_shards):
        path = folder / "src" / f"{number}.tar"
        if not path.exists():
            members = [(f"{index}.png", png(70, 64, 10 * number + index)) for index in range(2)]
            write_tar(path, members)
    compute = {"on_busy": on_busy, "decode_threads": 1}
    return parse_config(config_tree(folder, source={"keep": []}, compute=compute))


def write_lease(store: Store, age_s: float = 0.0, name: str = "other") -> Path:
    """Another host's lease; that of `gc`, if its name begins so."""
    tree = {"run": name, "host": "elsewhere", "pid": 7, "renewed_at": "some time"}
    counts = {"num_units": 2, "num_total": 2, "num_committed": 0}
    store.put(f"runs/{name}.json", json.dumps(tree | counts).encode())
    path = store.local_path(f"runs/{name}.json")
    assert path
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_on_busy_skip_ends_the_run_while_another_is_active(tmp_path: Path):
    config = make_config(tmp_path, "skip")
    write_lease(Store(config.output.url))
    before = tree_digest(tmp_path)
    summary = latentcache.run(config, quiet=True)
    assert (summary.status, summary.exit_code) == ("skipped", 0)
    assert (summary.num_units, summary.num_committed, summary.manifest) == (2, 0, None)
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("on_busy", ["join", "skip", "wait"])
def test_run_waits_for_an_active_gc(
    tmp_path: Path, reactions: dict[str, Callable[[], object]], on_busy: str
):
    config = make_config(tmp_path, on_busy)
    lease = write_lease(Store(config.output.url), name="gc-other")
    seen: list[Any] = []

    def end_gc() -> None:
        seen.append(read_status_of(config))
        lease.unlink()

    reactions["waiting for gc to end: pid 7 on elsewhere"] = end_gc
    summary = latentcache.run(config)
    assert not reactions
    assert (summary.status, summary.num_committed) == ("complete", 2)
    ((num_runs, gc_at_work, num_objects),) = seen
    assert (num_runs, gc_at_work) == (1, True), "its own lease was there before it looked"
    assert num_objects == 2, "it had written nothing but its lease"


def read_status_of(config: Config) -> tuple[int, bool, int]:
    """Return how many runs are active, whether `gc` is, and how many objects there are."""
    store = Store(config.output.url)
    leases = active_leases(store)
    return len(active_runs(store)), any(lease.is_gc for lease in leases), len(store.walk())


def test_a_signal_ends_the_wait_for_gc(tmp_path: Path, reactions: dict[str, Callable[[], object]]):
    config = make_config(tmp_path, "join")
    write_lease(Store(config.output.url), name="gc-other")
    before = tree_digest(tmp_path)
    reactions["waiting for gc to end"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    summary = latentcache.run(config)
    assert not reactions
    assert (summary.status, summary.exit_code) == ("interrupted", 1)
    assert tree_digest(tmp_path) == before


class Freezer:
    """Freezes the driver within its first puts of receipts: a try fails, and days pass.

    Args:
        num_times: how often.
        meanwhile: happens in those days.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        num_times: int,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.num_fired = 0
        self._num_times = num_times
        self._meanwhile = meanwhile
        self._boot_time_s = clock.boot_time_s
        self._create_file = local_files.create_file
        monkeypatch.setattr(clock, "boot_time_s", self.boot_time_s)
        monkeypatch.setattr(local_files, "create_file", self.create_file)
        monkeypatch.setattr(retries, "_PAUSES_S", (0.0,) * 9)

    def boot_time_s(self) -> float:
        return self._boot_time_s() + self.num_fired * 9 * 24 * HOURS

    def create_file(self, target: str, source: BinaryIO) -> bool:
        if "/commits/" in target and self.num_fired < self._num_times:
            self.num_fired += 1
            self._meanwhile()
            raise OSError(errno.EIO, "input/output error")
        return self._create_file(target, source)


def test_a_driver_frozen_for_days_puts_no_receipt_for_deleted_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    latentcache.run(make_config(tmp_path, "join", num_shards=1), quiet=True)
    config = make_config(tmp_path, "join", num_shards=2)
    deleted = []

    def meanwhile() -> None:
        for path in (tmp_path / "out").rglob("*"):
            os.utime(path, (time.time() - 9 * 24 * HOURS,) * 2)
        deleted.append(latentcache.collect_unreferenced(config.output.url, delete=True))

    freezer = Freezer(monkeypatch, 1, meanwhile)
    summary = latentcache.run(config, quiet=True)
    assert freezer.num_fired == 1
    (actual,) = deleted
    assert [len(objects) for objects in actual.objects.values() if objects] == [1], actual.objects
    assert (summary.status, summary.num_committed) == ("complete", 1)
    assert latentcache.verify(config.output.url).ok
    assert len(list(tmp_path.glob("out/data/*/*"))) == 2


def test_a_unit_whose_receipt_is_always_late_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_config(tmp_path, "join", num_shards=1)
    freezer = Freezer(monkeypatch, ALWAYS)
    summary = latentcache.run(config, quiet=True)
    assert freezer.num_fired == config.compute.unit_retries + 1
    assert (summary.status, summary.exit_code) == ("incomplete", 1)
    (failed,) = summary.failed
    assert "more than a day passed" in failed["message"]


def test_a_repair_during_a_run_makes_its_manifest_incomplete(
    tmp_path: Path, reactions: dict[str, Callable[[], object]]
):
    """The run loses the number of its manifest, and reads that a unit is to be encoded again."""
    latentcache.run(make_config(tmp_path, "join", num_shards=2), quiet=True)
    config = make_config(tmp_path, "join", num_shards=3)
    write_lease(Store(config.output.url))
    bad = next((tmp_path / "out" / "data").iterdir())
    repaired: list[str] = []

    def repair() -> None:
        next(bad.iterdir()).unlink()
        repaired.extend(latentcache.verify(config.output.url, repair=True).repaired)

    reactions["joining another run"] = repair
    summary = latentcache.run(config)
    assert repaired == [bad.name]
    assert (summary.status, summary.num_committed) == ("incomplete", 1)
    again = latentcache.run(config)
    assert (again.status, again.num_committed) == ("complete", 1)
    assert latentcache.verify(config.output.url).ok


@pytest.mark.parametrize("on_busy", ["skip", "wait"])
def test_an_expired_lease_blocks_no_run(tmp_path: Path, on_busy: str):
    config = make_config(tmp_path, on_busy)
    write_lease(Store(config.output.url), STALE_AFTER_S + 1)
    assert latentcache.run(config, quiet=True).status == "complete"


def test_on_busy_join_skips_units_that_another_run_committed(
    tmp_path: Path, reactions: dict[str, Callable[[], object]]
):
    config = make_config(tmp_path, "join", num_shards=3)
    write_lease(Store(config.output.url))
    others = []
    reactions["joining another run: pid 7 on elsewhere"] = lambda: others.append(
        latentcache.run(config)
    )
    summary = latentcache.run(config)
    (other,) = others
    assert (other.status, other.num_committed) == ("complete", 3)
    assert (summary.status, summary.num_committed, summary.num_skipped) == ("complete", 0, 3)
    assert summary.num_rows == other.num_rows
    assert len(list(tmp_path.glob("out/data/*/*"))) == 3, "one was encoded twice"


def test_a_lease_states_the_number_of_units_from_the_start(
    tmp_path: Path, reactions: dict[str, Callable[[], object]]
):
    config = make_config(tmp_path, "join")
    latentcache.run(config, quiet=True)
    (tmp_path / "src/1.tar").rename(tmp_path / "src/5.tar")  # 1.tar is gone, and kept
    write_lease(Store(config.output.url))
    seen = []
    reactions["joining another run"] = lambda: seen.append(
        read_status(config.output.url, StorageOptions())
    )
    assert latentcache.run(config).num_committed == 1
    (status,) = seen
    assert (status.num_committed, status.num_units) == (2, 3)


def test_on_busy_wait_encodes_what_the_other_run_left(
    tmp_path: Path, reactions: dict[str, Callable[[], object]]
):
    config = make_config(tmp_path, "wait")
    lease = write_lease(Store(config.output.url))

    def other_run_does_what_it_finds_and_ends() -> None:
        summary = latentcache.run(make_config(tmp_path, "join"), quiet=True)
        assert summary.num_committed == 2
        lease.unlink()
        make_config(tmp_path, "join", num_shards=3)

    reactions["waiting for another run to end: pid 7 on elsewhere"] = (
        other_run_does_what_it_finds_and_ends
    )
    summary = latentcache.run(config)
    assert not reactions
    assert (summary.status, summary.num_committed, summary.num_skipped) == ("complete", 1, 2)


def test_a_signal_ends_the_wait_for_another_run(
    tmp_path: Path, reactions: dict[str, Callable[[], object]]
):
    config = make_config(tmp_path, "wait")
    write_lease(Store(config.output.url))
    before = tree_digest(tmp_path)
    reactions["waiting for another run"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    summary = latentcache.run(config)
    assert not reactions
    assert (summary.status, summary.exit_code) == ("interrupted", 1)
    assert tree_digest(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_without_pending_units_reads_no_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(tmp_path, "wait")
    assert latentcache.run(config, quiet=True).num_committed == 2
    write_lease(Store(config.output.url))
    before = tree_digest(tmp_path)
    monkeypatch.setattr(Store, "put", None)
    assert latentcache.run(config, quiet=True).status == "complete"
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("hours", [-9, 9])
def test_leases_use_the_clock_of_the_store(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch, hours: int
):
    real = time.time
    on_s3 = Store(moto.make_bucket(f"clocks{hours}"), moto.options)
    with Lease(on_s3, 1) as lease:
        monkeypatch.setattr(time, "time", lambda: real() + hours * HOURS)
        (actual,) = active_runs(on_s3)
        assert actual.run == lease.run
        assert -2 < actual.age_s < 60
    assert not moto.listing(f"clocks{hours}")


def test_a_restarted_container_ignores_its_own_old_lease(tmp_path: Path):
    store = Store(str(tmp_path))
    killed = Lease(store, 1)
    killed.__enter__()
    assert [run.run for run in active_runs(store)] == [killed.run]
    lease_module._ours.clear()  # as in a new process that got the same id
    assert not active_runs(store)


def drive(number: int, configs: list[Path], start: Any, results: Any) -> None:
    """One of two drivers, in a process of its own: a run on each output, at the same time."""
    run_module.Cluster = ThreadCluster  # type: ignore[misc]
    delays = random.Random(number)
    for path in configs:
        config = latentcache.load_config(path)
        start.wait(DEADLINE_S)
        time.sleep(delays.uniform(0, 0.3))
        summary = latentcache.run(config, quiet=True)
        results.put((path, summary.exit_code, summary.num_committed, summary.num_rows))


class Race:
    """A fault that holds the first receipts of an output until two drivers wait here.

    Each driver has two of the three units, so at least one unit is encoded twice. All requests
    have a random delay.
    """

    def __init__(self) -> None:
        self._delays = random.Random(0)
        self._arrived: dict[str, Counter[int]] = defaultdict(Counter)
        self._changed = threading.Condition()

    def __call__(self, exchange: Exchange) -> None:
        output, pid = exchange.path.split("/commits/")[0], exchange.client_pid
        with self._changed:
            arrived = self._arrived[output]
            arrived[pid] += 1
            self._changed.notify_all()
            have_met = self._changed.wait_for(
                lambda: len(arrived) == 2 and min(arrived.values()) >= 2, DEADLINE_S
            )
            assert have_met, f"only one driver came to {output}"
            delay_s = self._delays.uniform(0, 0.05)
        time.sleep(delay_s)
        exchange.send(exchange.forward())


def test_racing_runs_commit_each_unit_once(moto: S3Server, configs: Configs):
    shards = [good(f"{number}.tar", seed=number, num_samples=2) for number in range(3)]
    source = moto.make_bucket("race-photos", objects(shards))
    moto.make_bucket("races")
    outputs = [f"s3://races/{number:02d}" for number in range(NUM_RACES)]
    delays = random.Random(0)

    def take_some_time(exchange: Exchange) -> None:
        time.sleep(delays.uniform(0, 0.05))
        exchange.send(exchange.forward())

    with FaultyProxy(moto.endpoint_url) as proxy:
        url = proxy.endpoint_url
        delayed = proxy.on("PUT", "/(contract|parts|manifests)", take_some_time, ALWAYS)
        raced = proxy.on("PUT", "/commits/", Race(), ALWAYS)
        paths = [configs.write(source, output, endpoint_url=url) for output in outputs]
        spawn = multiprocessing.get_context("spawn")
        start, results = spawn.Barrier(2), spawn.Queue()
        drivers = [spawn.Process(target=drive, args=(n, paths, start, results)) for n in range(2)]
        for driver in drivers:
            driver.start()
        actual = [results.get(timeout=DEADLINE_S) for _ in range(2 * NUM_RACES)]
        for driver in drivers:
            driver.join()
            assert driver.exitcode == 0
        assert delayed.num_fired > 2 * NUM_RACES
        assert raced.num_fired >= 4 * NUM_RACES
        refused = [p for _, p, status in proxy.log if "/commits/" in p and status == 412]
    assert len({path.split("/commits/")[0] for path in refused}) == NUM_RACES, "one did not race"

    num_rows = sum(len(shard.rows) for shard in shards)
    for path, output in zip(paths, outputs, strict=True):
        both = [tuple(rest) for of, *rest in actual if of == path]
        assert [code for code, _, _ in both] == [0, 0]
        assert sum(num_committed for _, num_committed, _ in both) == len(shards)
        assert {rows for _, _, rows in both} == {num_rows}
        receipts = [receipt["record"] for receipt in receipts_at(moto, output)]
        names = {(record["unit"]["id"], record["generation"]) for record in receipts}
        assert len(names) == len(receipts) == len(shards)
        assert_nothing_lost_or_doubled(moto, output, shards)
        assert latentcache.verify(output, storage=moto.options).ok
    assert not [key for key in moto.listing("races") if "/runs/" in key]
