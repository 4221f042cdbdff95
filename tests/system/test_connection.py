"""Ray: a private cluster is closed to all others, and a dead or silent part is reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import Shard
from latentcache import Dataset
from latentcache.engine import connection as connection_module
from latentcache.engine.connection import JoinedCluster, connect
from latentcache.errors import ClusterError
from nodes import is_actor, parent_of
from runs import (
    Cli,
    Configs,
    Running,
    assert_nothing_lost_or_doubled,
    assert_same,
    open_at,
    receipts_at,
)
from servers import DEADLINE_S, FaultyProxy, S3Server, free_port, ray_cluster, wait_until


def tree_of(root: int) -> list[int]:
    """A process and all that it started, and what those started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                children.setdefault(parent_of(int(path.name)), []).append(int(path.name))
            except OSError:  # it has ended
                continue
    actual = [root]
    for pid in actual:
        actual += children.get(pid, [])
    return actual


def the_one(tree: list[int], name: str) -> int:
    (pid,) = [pid for pid in tree if Path(f"/proc/{pid}/comm").read_text().strip() == name]
    return pid


def listening(pids: list[int]) -> set[tuple[int, str, int]]:
    """The process, the address and the port of all TCP sockets on which processes listen."""
    owners: dict[str, int] = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = os.readlink(link)
            except OSError:
                continue
            if name.startswith("socket:["):
                owners[name[8:-1]] = pid
    actual = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = Path(f"/proc/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in owners:
                host, port = local.split(":")
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                address = socket.inet_ntop(family, b"".join(words))
                actual.add((owners[rest[5]], address, int(port, 16)))
    return actual


_INTRUDE = """
import sys
import ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("connected", flush=True)
print(ray.get(ray.remote(num_cpus=0)(lambda: "ran code").remote(), timeout=60))
"""


def intrude(address: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Try to run code in a cluster from a process outside its tree, over loopback."""
    # This lets Ray take a loopback address for what it is.
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HOME": str(home)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", _INTRUDE, address]
    return subprocess.run(
        command, env=kept | env, capture_output=True, text=True, timeout=DEADLINE_S
    )


def assert_closed(driver: int, folder: Path, home: Path) -> str:
    """Assert that no other user can reach a run's cluster; return its token."""
    tree = tree_of(driver)
    gcs = the_one(tree, "gcs_server")
    sockets = listening(tree)
    assert {the_one(tree, "raylet"), gcs} <= {pid for pid, _, _ in sockets}
    assert {address for _, address, _ in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    (session,) = folder.glob("lc-*")
    assert stat.S_IMODE(session.stat().st_mode) == 0o700

    environ = Path(f"/proc/{gcs}/environ").read_bytes().split(b"\0")
    variables = dict(item.split(b"=", 1) for item in environ if b"=" in item)
    token = variables[b"RAY_AUTH_TOKEN"].decode()
    assert len(token) == 64
    for pid in tree_of(driver):
        assert token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert not files_with(token, session)

    (port,) = {port for pid, _, port in sockets if pid == gcs}
    home.mkdir()
    for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = intrude(f"127.0.0.1:{port}", home, **environment)
        assert refused.returncode != 0
        assert "ran code" not in refused.stdout
        assert "uthenticat" in refused.stderr, refused.stderr
    # The same does run code for who has the token, so it was the token that was missing.
    allowed = intrude(f"127.0.0.1:{port}", home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert "ran code" in allowed.stdout, allowed.stderr
    return token


def files_with(text: str, folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_private_cluster_is_closed_and_a_killed_raylet_ends_the_run(
    moto: S3Server,
    proxy: FaultyProxy,
    cli: Cli,
    local_cli: Cli,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
    tmp_path: Path,
    servers_folder: Path,
) -> None:
    output = moto.make_bucket("killed-raylet")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    first, second = (proxy.gate("photos/04.tar") for _ in range(2))
    home = Path(os.environ["HOME"])
    before = set(home.rglob("*"))
    folder = servers_folder / "private"
    folder.mkdir()
    run = local_cli.with_env(RAY_TMPDIR=str(folder)).start("run", config, "--json")
    run.wait_until_it_is_at(first)
    token = assert_closed(run.process.pid, folder, tmp_path / "home")

    actor = first.client_pid
    assert is_actor(actor)
    os.kill(actor, signal.SIGKILL)
    first.open()
    run.wait_until_it_is_at(second)
    assert second.client_pid != actor, "it goes on with another one"
    tree = tree_of(run.process.pid)
    raylet = the_one(tree, "raylet")
    os.kill(raylet, signal.SIGKILL)
    result = run.result()
    second.open()
    assert result.code == 1
    assert "Ray's raylet of this run was killed by signal 9" in result.json["error"]
    assert result.stderr.splitlines()[-1] == f"latentcache: error: {result.json['error']}"
    wait_until(lambda: not any(map(is_running, tree)), "all its processes to end")
    assert os.listdir(folder) == []
    assert set(home.rglob("*")) == before
    assert token not in result.stdout + result.stderr
    for key in moto.listing("killed-raylet"):
        assert token.encode() not in moto.read("killed-raylet", key)

    assert receipts_at(moto, output)
    assert cli.ok("run", config)["num_skipped"] > 0
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


_RUN_TWICE = """
import json, os, sys
import latentcache

def variables():
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}

config, before, ends = latentcache.load_config(sys.argv[1]), variables(), []
for _ in range(2):
    try:
        ends.append(latentcache.run(config, quiet=True).status)
    except latentcache.LatentCacheError as error:
        ends.append(f"{type(error).__name__}: {error}")
    assert variables() == before
print(json.dumps(ends))
"""


def test_a_killed_gcs_is_one_error_and_the_process_can_run_again(
    moto: S3Server,
    proxy: FaultyProxy,
    configs: Configs,
    corpus: list[Shard],
    undisturbed: Dataset,
    tmp_path: Path,
) -> None:
    output = moto.make_bucket("killed-gcs")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    gate = proxy.gate("photos/04.tar")
    # Batch systems set one that is too long for Ray's sockets.
    long_folder = tmp_path / ("scratch-" + "x" * 100)
    long_folder.mkdir()
    environment = dict(os.environ) | {"TMPDIR": str(long_folder)}
    run = Running([sys.executable, "-c", _RUN_TWICE, str(config)], environment)
    run.wait_until_it_is_at(gate)
    gcs = the_one(tree_of(run.process.pid), "gcs_server")
    os.kill(gcs, signal.SIGKILL)
    result = run.result()  # one unit waits at the gate, so the first run cannot end well
    gate.open()
    assert result.code == 0, result.stderr
    lost, again = json.loads(result.stdout)
    assert lost.startswith("ClusterError: Ray's gcs_server of this run was killed by signal 9")
    assert again == "complete"
    assert_nothing_lost_or_doubled(moto, output, corpus)
    assert_same(open_at(moto, output), undisturbed)


def test_a_cluster_whose_head_dies_ends_the_run(
    moto: S3Server, proxy: FaultyProxy, configs: Configs, servers_folder: Path
) -> None:
    output = moto.make_bucket("killed-head")
    config = configs.write("s3://photos", output, endpoint_url=proxy.endpoint_url)
    gate = proxy.gate("photos/04.tar")
    folder = servers_folder / "head"
    folder.mkdir()
    with ray_cluster(folder) as address:
        run = Cli(RAY_ADDRESS=address).start("run", config, "--json")
        run.wait_until_it_is_at(gate)
        (gcs,) = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit()
            and (path / "comm").read_text() == "gcs_server\n"
            and str(folder).encode() in (path / "cmdline").read_bytes()
        ]
        os.kill(gcs, signal.SIGKILL)
        result = run.result()
    gate.open()
    assert result.code == 1
    assert f"the Ray cluster at {address} (RAY_ADDRESS) is lost" in result.json["error"]
    assert "\n" not in result.json["error"]


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[str]:
    """Something that listens and is no Ray: silent, hanging up, or of another language."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        held = []

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if request.param == "hangs up":
                    connection.close()
                elif request.param == "speaks HTTP/1.1":
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize("listener", ["silent", "hangs up", "speaks HTTP/1.1"], indirect=True)
def test_an_address_without_ray_is_named(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_PROBE_TIMEOUT_S", 0.2)
    assert_names_address(listener, monkeypatch)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:closed", "nosuchhost.invalid:6379", "garbage", "1.2.3.4:x", "h:99999999"]
)
def test_an_unresolvable_address_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_names_address(address.replace("closed", str(free_port())), monkeypatch)


def assert_names_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match="RAY_ADDRESS") as caught:
        connect()
    assert f"cannot join the Ray cluster at {address}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_silent_cluster_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    for name, value in (("_PROBE_EVERY_S", 0.02), ("_LOST_AFTER_S", 0.1)):
        monkeypatch.setattr(connection_module, name, value)
    cluster = JoinedCluster.__new__(JoinedCluster)
    cluster._name, cluster._lost, cluster._closed = "the cluster", None, threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        watch = threading.Thread(target=cluster._watch, args=([address],))
        watch.start()
        for _ in range(3):
            connection, _ = server.accept()
            with connection:
                connection.sendall(settings)
                connection.recv(100)
        cluster.require_alive()
    watch.join(DEADLINE_S)
    with pytest.raises(
        ClusterError, match=r"the cluster is lost: 127\.0\.0\.1:\d+ does not answer"
    ):
        cluster.require_alive()


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_an_unusable_temporary_folder_is_named(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    wrong = [str(tmp_path / "file"), str(tmp_path / "none")]
    for value in [*wrong, ""] if variable == "RAY_TMPDIR" else wrong:
        monkeypatch.setenv(variable, value)
        with pytest.raises(ClusterError, match=f"^{variable} is '{value}'") as caught:
            connect()
        assert "\n" not in str(caught.value)


def test_an_error_says_that_no_short_temporary_folder_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_folder = tmp_path / ("x" * 100)
    long_folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(long_folder))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(connection_module, "_SHORT_FOLDERS", ())
    with pytest.raises(ClusterError, match="path of at most 29 bytes: set RAY_TMPDIR to one"):
        connect()
