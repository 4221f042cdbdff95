"""Whatever is killed, cut, lost, refused or full: nothing is lost or doubled, and nothing hangs.

Each fault is counted, so that a test in which it did not happen fails.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import latentcache
from corpus import Shard, objects
from latentcache import Dataset
from latentcache.engine import run as run_module
from latentcache.engine.lease import Lease
from latentcache.errors import DatasetError, DiskFull, IncompleteRun, LatentCacheError, SourceError
from latentcache.storage import Store
from makers import config_tree, png, tree_digest, write_tar
from nodes import is_actor
from runs import (
    Cli,
    Configs,
    assert_nothing_lost_or_doubled,
    assert_same,
    open_at,
    receipts_at,
)
from servers import (
    Exchange,
    FaultyProxy,
    S3Server,
    cut_halfway,
    free_port,
    lose_reply,
    refuse,
    slow_down,
)
from thread_cluster import ThreadCluster

ALWAYS = 1_000_000


def test_a_killed_actor_loses_no_row(
    moto: S3Server,
    proxy: FaultyProxy,
    cli: Cli,
    ray_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    output = moto.make_bucket("killed-actor")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url, num_cpu_actors=2)
    gate = proxy.gate("photos/04.tar")
    run = ray_cli.start("run", config, "--json")
    run.wait_until_it_is_at(gate)
    assert is_actor(gate.client_pid)
    os.kill(gate.client_pid, signal.SIGKILL)
    gate.open()
    result = run.result()
    assert result.code == 0, result.stderr
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)
    assert cli.ok("run", config)["num_committed"] == 0


@pytest.mark.parametrize("name", ["moto", "rclone"])
def test_a_run_resumes_after_its_driver_was_killed(
    name: str,
    request: pytest.FixtureRequest,
    cli: Cli,
    ray_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    server: S3Server = request.getfixturevalue(name)
    output = server.make_bucket("killed-driver")
    with FaultyProxy(server.endpoint_url) as proxy:
        config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
        gate = proxy.gate("photos/05.tar")
        run = ray_cli.start("run", config, "--json")
        run.wait_until_it_is_at(gate)
        proxy.wait_for("PUT", "/commits/")
        run.process.kill()
        assert run.result().code == -signal.SIGKILL
        summary = cli.ok("run", config)
    assert summary["num_skipped"] > 0
    assert summary["num_committed"] > 0
    assert summary["num_skipped"] + summary["num_committed"] == len(corpus)
    assert_nothing_lost_or_doubled(server, output, corpus)
    assert_same(open_at(server, output), undisturbed)


def test_two_concurrent_drivers_commit_each_unit_once(
    moto: S3Server,
    proxy: FaultyProxy,
    ray_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    def wait_for_both(exchange: Exchange) -> None:
        proxy.wait_for("PUT", "/runs/", times=2)
        exchange.send(exchange.forward())

    output = moto.make_bucket("two-drivers")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    held = proxy.on("GET", "photos/", wait_for_both, times=ALWAYS)
    runs = [ray_cli.start("run", config, "--json") for _ in range(2)]
    results = [run.result() for run in runs]
    assert [result.code for result in results] == [0, 0], [result.stderr for result in results]
    # All but the empty shard, which no run needs to read; what one has begun, both may have.
    assert held.num_fired >= len(corpus) - 1
    summaries = [result.json for result in results]
    assert sum(summary["num_committed"] for summary in summaries) == len(corpus)
    for summary in summaries:
        assert summary["num_committed"] + summary["num_skipped"] == len(corpus)
        assert summary["num_rows"] == len(undisturbed)
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)
    assert latentcache.verify(output, storage=moto.options).ok


def test_a_put_without_a_reply_counts_once(
    moto: S3Server,
    proxy: FaultyProxy,
    cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    output = moto.make_bucket("lost-replies")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    lost = {
        path: proxy.on("PUT", f"lost-replies/{path}", lose_reply, times)
        for path, times in (
            ("contract.json", 1),
            ("runs/", 1),
            ("data/", 2),
            ("rejects/", 2),
            ("commits/", 3),
            ("parts/", 1),
            ("manifests/", 1),
        )
    }
    summary = cli.ok("run", config)
    assert {path: rule.num_fired for path, rule in lost.items()} == {
        path: rule.times for path, rule in lost.items()
    }
    # Tried again and refused by the store: only reading back showed that the first try had won.
    for path in ("contract.json", "commits/", "manifests/"):
        assert any(f"lost-replies/{path}" in p and status == 412 for _, p, status in proxy.log)
    assert summary["num_committed"] == len(corpus)
    assert summary["manifest"] == 1
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


def test_cut_downloads_and_a_busy_store_are_retried(
    moto: S3Server,
    proxy: FaultyProxy,
    cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    output = moto.make_bucket("unsteady")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    faults = [
        proxy.on("GET", "photos/03.tar", cut_halfway, times=2),
        proxy.on("GET", "photos/04.tar", slow_down, times=3),
        proxy.on("PUT", "unsteady/data/", slow_down, times=3),
        proxy.on("PUT", "unsteady/commits/", slow_down, times=3),
        proxy.on("HEAD", "photos/", slow_down, times=2),
    ]
    assert cli.ok("run", config)["num_committed"] == len(corpus)
    assert [fault.num_fired for fault in faults] == [2, 3, 3, 3, 2]
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


def test_a_unit_that_always_kills_its_actor_fails_alone(
    moto: S3Server,
    proxy: FaultyProxy,
    ray_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    def kill_reader(exchange: Exchange) -> None:
        reader = exchange.client_pid
        assert is_actor(reader)
        os.kill(reader, signal.SIGKILL)
        exchange.cut()

    output = moto.make_bucket("crashing")
    config = configs.write(
        "s3://photos", output, endpoint_url=proxy.endpoint_url, num_cpu_actors=2, unit_retries=1
    )
    crash = proxy.on("GET", "photos/05.tar", kill_reader, times=ALWAYS)
    result = ray_cli("run", config, "--json")
    # Beside another unit the crash may be the other's, and does not count; then twice alone.
    assert 2 <= crash.num_fired <= 3
    assert result.code == 1
    assert result.json["status"] == "incomplete"
    (failed,) = result.json["failed"]
    assert failed["source"] == "s3://photos/05.tar"
    assert "crashed" in failed["message"]
    assert "given up" in result.stderr
    assert result.json["num_committed"] == len(corpus) - 1
    manifest = open_at(moto, output, result.json["manifest"]).manifest
    assert (manifest.complete, manifest.num_units) == (False, len(corpus) - 1)

    (pending,) = latentcache.make_plan(latentcache.load_config(config)).pending
    assert pending.reason.startswith("failed before: ")
    crash.times = 0
    assert ray_cli.ok("run", config)["num_committed"] == 1
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


def test_sigterm_commits_units_in_progress_and_the_run_resumes(
    moto: S3Server,
    proxy: FaultyProxy,
    cli: Cli,
    ray_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    output = moto.make_bucket("sigterm")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    # One actor has two units in progress: all that come after stay undone. A first run begins with
    # units from all over the source, in which 05.tar follows 03.tar.
    gates = [proxy.gate(f"photos/{name}") for name in ("03.tar", "05.tar")]
    run = ray_cli.start("run", config, "--json")
    for gate in gates:
        run.wait_until_it_is_at(gate)
    proxy.wait_for("PUT", "/commits/", times=3)
    run.process.send_signal(signal.SIGTERM)
    run.wait_until_it_says("stopping")
    for gate in gates:
        gate.open()
    result = run.result()
    assert result.code == 1
    assert result.json["status"] == "interrupted"
    assert f"latentcache run {config}" in result.stderr
    done = {Path(r["record"]["unit"]["source"]).name for r in receipts_at(moto, output)}
    assert done == {"00.tar", "01.tar", "02.tar", "03.tar", "05.tar"}
    assert result.json["num_committed"] == 5
    manifest = open_at(moto, output, result.json["manifest"]).manifest
    assert (manifest.complete, manifest.num_units) == (False, 5)
    with pytest.raises(DatasetError, match="no complete manifest yet"):
        open_at(moto, output)

    assert cli.ok("run", config)["num_committed"] == len(corpus) - 5
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


def test_a_second_ctrl_c_ends_the_run_at_once(
    moto: S3Server,
    proxy: FaultyProxy,
    cli: Cli,
    ray_cli: Cli,
    local_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    output = moto.make_bucket("ctrl-c")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    gates = [proxy.gate(f"photos/{name}") for name in ("03.tar", "05.tar")]
    run = local_cli.start("run", config, "--json")
    for gate in gates:
        run.wait_until_it_is_at(gate)
    proxy.wait_for("PUT", "/commits/", times=3)
    # As a terminal does: to the whole process group, Ray's processes included.
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_until_it_says("stopping")
    os.killpg(run.process.pid, signal.SIGINT)
    result = run.result()  # with both gates still closed
    assert result.code == 1
    assert result.json["status"] == "interrupted"
    assert f"latentcache run {config}" in result.stderr
    assert result.json["num_committed"] == 3
    for gate in gates:
        gate.open()
    assert cli.ok("run", config)["num_committed"] == len(corpus) - 3
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that two or three files of a unit fill."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


def test_a_run_resumes_after_its_output_disk_was_full(
    small_disk: Path, tmp_path: Path, cli: Cli, configs: Configs, corpus: list[Shard]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, data in objects(corpus).items():
        (photos / name).write_bytes(data)
    config = configs.write(str(photos), str(small_disk / "out"))
    result = cli("run", config, "--json")
    assert result.code == 1
    assert "no room left" in result.json["error"]
    assert not list(small_disk.rglob(".tmp-*")), "it left rubbish on a full disk"
    enlarge(small_disk)
    summary = cli.ok("run", config)
    assert summary["status"] == "complete"
    assert summary["num_rows"] == sum(len(shard.rows) for shard in corpus)
    assert latentcache.verify(str(small_disk / "out")).ok


def test_a_run_resumes_after_its_temporary_disk_was_full(
    small_disk: Path,
    moto: S3Server,
    cli: Cli,
    local_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    output = moto.make_bucket("full-local-disk")
    config = configs.write("s3://photos", output, endpoint_url=moto.endpoint_url)
    with (small_disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(shutil.disk_usage(small_disk).free - 4096))
    result = local_cli.with_env(TMPDIR=str(small_disk))("run", config, "--json")
    assert result.code == 1
    assert "no room left on the local disk" in result.json["error"]
    cli.ok("run", config)
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


def test_a_run_resumes_after_its_store_was_full(
    moto: S3Server,
    proxy: FaultyProxy,
    ray_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
) -> None:
    output = moto.make_bucket("full")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    full = proxy.on("PUT", "full/data/", refuse(507, "XMinioStorageFull", "Delete some"), ALWAYS)
    result = ray_cli("run", config, "--json")
    assert 1 <= full.num_fired <= 2, "it went on"
    assert result.code == 1
    assert re.search(r"on node \S+: no room left to write s3://full/data/", result.json["error"])
    assert result.stderr.splitlines()[-1] == f"latentcache: error: {result.json['error']}"
    assert not receipts_at(moto, output)
    full.times = 0
    ray_cli.ok("run", config)
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."),
        (403, "QuotaExceeded", ""),
        (500, "InternalError", "write /data/x: no space left on device"),
    ],
)
def test_errors_of_full_stores_are_recognised(
    moto: S3Server, proxy: FaultyProxy, status: int, code: str, message: str
) -> None:
    moto.make_bucket(f"full-{status}")
    options = replace(moto.options, endpoint_url=proxy.endpoint_url)
    store = Store(f"s3://full-{status}", options)
    proxy.on("PUT", f"full-{status}/", refuse(status, code, message), ALWAYS)
    with pytest.raises(DiskFull, match=f"no room left to write s3://full-{status}/x"):
        store.put("x", b"data")
    with pytest.raises(DiskFull):
        store.put_if_absent("x", b"data")


def test_a_shard_without_read_permission_fails_alone(
    moto: S3Server, proxy: FaultyProxy, cli: Cli, configs: Configs, corpus: list[Shard]
) -> None:
    output = moto.make_bucket("denied")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url, unit_retries=1)
    denied = proxy.on("GET", "photos/05.tar", refuse(403, "AccessDenied", "Not yours"), ALWAYS)
    result = cli("run", config, "--json")
    assert denied.num_fired == 4, "two attempts, and the driver's own after each"
    assert result.code == 1
    assert result.json["status"] == "incomplete"
    (failed,) = result.json["failed"]
    assert failed["source"] == "s3://photos/05.tar"
    assert "access to s3://photos/05.tar denied" in failed["message"]
    assert result.json["num_committed"] == len(corpus) - 1


@pytest.mark.parametrize("on_missing", ["keep", "drop"])
def test_an_empty_source_folder_removes_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_missing: str
) -> None:
    monkeypatch.setattr(run_module, "Cluster", ThreadCluster)
    for number in range(2):
        write_tar(tmp_path / "src" / f"{number}.tar", [("a.png", png(70, 64, number))])
    config = latentcache.parse_config(
        config_tree(tmp_path, source={"on_missing": on_missing, "keep": []})
    )
    assert latentcache.run(config, quiet=True).num_committed == 2
    shutil.rmtree(tmp_path / "src")
    before = tree_digest(tmp_path)
    with pytest.raises(SourceError) as caught:
        latentcache.run(config, quiet=True)
    assert re.search(
        r"\*\.tar matches nothing.*; \S+/out keeps its 2 units and nothing was changed",
        str(caught.value),
    )
    assert tree_digest(tmp_path) == before


def test_an_unreachable_store_is_one_line(moto: S3Server, cli: Cli, configs: Configs) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    config = configs.write("s3://photos", "s3://photos/out", endpoint_url=moto.endpoint_url)
    result = cli("run", config, "--json", "--set", f"source.storage.endpoint_url={closed}")
    assert result.code == 1
    assert f"cannot reach or use s3://photos (endpoint {closed})" in result.json["error"]
    assert result.stderr == f"latentcache: error: {result.json['error']}\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("source.shards=s3://nowhere/*.tar", "cannot use s3://nowhere.*: there is no such bucket"),
        ("output.url=s3://nowhere/out", "cannot use s3://nowhere/out.*: there is no such bucket"),
        ("source.shards=s3://photos/none.tar", r"s3://photos/none\.tar does not exist"),
        ("source.storage.profile=absent", r"cannot open s3://photos: .* profile \(absent\)"),
    ],
)
def test_a_wrong_bucket_or_shard_is_one_line(
    setting: str, message: str, moto: S3Server, configs: Configs
) -> None:
    config = configs.write("s3://photos", "s3://photos/out", endpoint_url=moto.endpoint_url)
    with pytest.raises(LatentCacheError, match=message) as caught:
        latentcache.make_plan(latentcache.load_config(config, [setting]))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"AWS_PROFILE": "absent"}, r"profile \(absent\) could not be found"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "no credentials for s3://photos/out.*: set AWS_ACCESS_KEY_ID",
        ),
        (
            {"AWS_SECRET_ACCESS_KEY": "a-wrong-secret-key"},
            "access to s3://photos/out.* denied: .*; check the credentials",
        ),
    ],
    ids=["no such profile", "no credentials", "wrong credentials"],
)
def test_wrong_credentials_are_one_line(
    environment: dict[str, str], message: str, rclone: S3Server, configs: Configs
) -> None:
    config = configs.write("s3://photos", "s3://photos/out", endpoint_url=rclone.endpoint_url)
    result = Cli(**environment)("status", config, "--json")
    assert result.code == 1
    assert re.search(message, result.json["error"])
    assert result.stderr == f"latentcache: error: {result.json['error']}\n"
    assert "a-wrong-secret-key" not in result.stderr


def test_of_two_concurrent_leases_at_least_one_sees_the_other(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first, second = Lease(store, 1), Lease(store, 1)
    with second:
        second.require_alone()
        with first, pytest.raises(IncompleteRun, match="no conditional writes"):
            first.require_alone()
    with Lease(store, 1) as third:
        third.require_alone()
