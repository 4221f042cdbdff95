"""Runs on a cluster of several nodes: some are killed or added, some are not as they should be."""

from __future__ import annotations

import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentcache
from corpus import Shard, good, objects
from latentcache.engine.nodes import Versions
from latentcache.errors import ClusterError
from nodes import Nodes, Turnstile, parent_of, ray_nodes
from runs import (
    Cli,
    Configs,
    assert_nothing_lost_or_doubled,
    assert_same,
    open_at,
    receipts_at,
)
from servers import FaultyProxy, S3Server, wait_until

NUM_KILLS = 5
ALWAYS = 1_000_000


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, servers_folder: Path) -> Iterator[Nodes]:
    folder = servers_folder / "nodes"
    folder.mkdir()
    with ray_nodes(folder) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def nodes_cli(nodes: Nodes) -> Cli:
    return Cli(RAY_ADDRESS=nodes.address)


@pytest.fixture(scope="module")
def shards(moto: S3Server) -> list[Shard]:
    """Forty small ones, in a bucket of their own."""
    shards = [good(f"{number:02d}.tar", seed=number, num_samples=2) for number in range(20)]
    moto.make_bucket("fleet-photos", objects(shards))
    return shards


def test_killed_and_added_nodes_lose_no_row(
    nodes: Nodes,
    nodes_cli: Cli,
    cli: Cli,
    moto: S3Server,
    proxy: FaultyProxy,
    configs: Configs,
    shards: list[Shard],
):
    output = moto.make_bucket("fleet")
    # No retries: a kill that was taken for a failure would show.
    config = configs.write(
        "s3://fleet-photos",
        output,
        endpoint_url=proxy.endpoint_url,
        num_cpu_actors=3,
        unit_retries=0,
    )
    turnstile, num_kills, num_in_hand = Turnstile(), 0, 0
    proxy.on("GET", r"fleet-photos/\d+\.tar", turnstile, ALWAYS)
    for _ in range(3):
        nodes.add()
    run = nodes_cli.start("run", config, "--json")
    while num_kills < NUM_KILLS:
        # Each kill takes an active node, and meets another run: a unit was committed since.
        turnstile.wait_for_actors(2)
        turnstile.let_one_pass()
        proxy.wait_for("PUT", "fleet/commits/", times=num_kills + 1)
        victim = turnstile.wait_for_actors(2)[0]
        nodes.kill(parent_of(victim))
        num_in_hand += turnstile.forget(victim)
        num_kills += 1
        nodes.add()
    turnstile.open()
    result = run.result()
    assert result.code == 0, result.stderr
    assert (result.json["status"], result.json["failed"]) == ("complete", [])
    assert result.json["num_committed"] == len(shards)

    assert num_kills == NUM_KILLS
    assert num_kills <= num_in_hand <= 2 * num_kills
    # What was begun in vain was in the hands of the killed, who may still hand something over: a
    # worker outlives its raylet for a moment.
    assert 0 < turnstile.num_begun - len(shards) <= num_in_hand
    assert_nothing_lost_or_doubled(moto, output, shards)
    committed = {receipt["record"]["attempt"] for receipt in receipts_at(moto, output)}
    files = [Path(key).name for key in moto.listing("fleet") if key.startswith("data/")]
    attempts = {name.split("-")[1] for name in files}
    assert committed <= attempts
    assert len(attempts - committed) <= 2 * num_kills

    undisturbed = moto.make_bucket("fleet-undisturbed")
    calm = configs.write("s3://fleet-photos", undisturbed, endpoint_url=moto.endpoint_url)
    assert cli.ok("run", calm)["num_committed"] == len(shards)
    assert_same(open_at(moto, output), open_at(moto, undisturbed))


def refused(
    nodes: Nodes, cli: Cli, proxy: FaultyProxy, config: Path, environment: dict[str, str]
) -> str:
    """A run on a good node and a bad one, where the good one never gets ahead: what it says."""
    turnstile = Turnstile()
    proxy.on("GET", r"fleet-photos/\d+\.tar", turnstile, ALWAYS)
    for raylet in list(nodes.workers):
        nodes.kill(raylet)
    raylets = [nodes.add(), nodes.add(env_vars=environment)]
    try:
        result = cli("run", config, "--json", "--set", "compute.num_cpu_actors=2")
    finally:
        turnstile.open()
        for raylet in raylets:
            nodes.kill(raylet)
    assert result.code == 1
    assert result.stderr.count("error:") == 1
    error: str = result.json["error"]
    assert "\n" not in error
    assert f"node {socket.gethostname()}" in error
    return error


def test_a_node_with_another_version_is_refused_and_named(
    nodes: Nodes,
    nodes_cli: Cli,
    moto: S3Server,
    proxy: FaultyProxy,
    configs: Configs,
    shards: list[Shard],
    tmp_path: Path,
):
    package = tmp_path / "other" / "latentcache"
    shutil.copytree(Path(latentcache.__file__).parent, package)
    init, here = package / "__init__.py", latentcache.__version__
    init.write_text(init.read_text().replace(f'__version__ = "{here}"', '__version__ = "9.9.9"'))
    output = moto.make_bucket("other-version")
    config = configs.write("s3://fleet-photos", output, endpoint_url=proxy.endpoint_url)
    error = refused(nodes, nodes_cli, proxy, config, {"PYTHONPATH": str(package.parent)})
    assert f"has latentcache 9.9.9, but the driver has {here}" in error
    assert "install the same version on every node" in error
    assert not receipts_at(moto, output)


def test_a_node_without_credentials_is_named_and_fails_no_unit(
    nodes: Nodes,
    nodes_cli: Cli,
    moto: S3Server,
    proxy: FaultyProxy,
    configs: Configs,
    shards: list[Shard],
):
    output = moto.make_bucket("no-credentials")
    config = configs.write(
        "s3://fleet-photos", output, endpoint_url=proxy.endpoint_url, unit_retries=0
    )
    empty = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    error = refused(nodes, nodes_cli, proxy, config, empty)
    assert "no credentials for s3://fleet-photos/" in error
    assert "give every node the same credentials" in error
    assert not [key for key in moto.listing("no-credentials") if key.startswith("failures/")]


def test_a_run_waits_for_gpus_that_join_the_cluster(
    nodes: Nodes, nodes_cli: Cli, moto: S3Server, configs: Configs, shards: list[Shard]
):
    output = moto.make_bucket("no-gpus")
    config = configs.write(
        "s3://fleet-photos", output, endpoint_url=moto.endpoint_url, num_gpus=1, precision="fp32"
    )
    late = nodes_cli("run", config, "--json", "--set", "compute.wait_for_gpus_s=1")
    assert late.code == 1
    assert "Ray found no GPU in 1 s" in late.json["error"]
    assert "Ray has no GPU yet: waiting 1 s more" in late.stderr

    patient = ("run", config, "--json", "--set", "compute.wait_for_gpus_s=100")
    stopped = nodes_cli.start(*patient)
    stopped.wait_until_it_says("Ray has no GPU yet")
    stopped.process.send_signal(signal.SIGTERM)
    result = stopped.result()
    assert (result.code, result.json["error"]) == (1, "interrupted")

    run = nodes_cli.start(*patient)
    run.wait_until_it_says("Ray has no GPU yet")
    # An autoscaler adds a node for what pends, and for nothing else.
    wait_until(lambda: "'GPU': 1.0}: 1+ pending" in nodes.status(), "a run to ask for a GPU")
    # It claims to have one, as a node with a CPU build of torch would.
    raylet = nodes.add(num_gpus=1)
    result = run.result()
    nodes.kill(raylet)
    assert result.code == 1
    assert re.search("on node .* a worker has a GPU, but its torch", result.json["error"])
    assert not [key for key in moto.listing("no-gpus") if key.startswith("runs/")]


@pytest.mark.parametrize(
    ("driver", "worker", "is_same"),
    [
        ("2.13.0+cpu", "2.13.1+cu130", True),
        ("2.13.0", "2.13.0", True),
        ("2.13.0+cpu", "2.12.1+cpu", False),
        ("2.13.0", "3.13.0", False),
    ],
)
def test_builds_of_one_torch_release_are_compatible(
    driver: str, worker: str, is_same: bool, monkeypatch: pytest.MonkeyPatch
):
    expected = Versions(latentcache.__version__, driver)
    existing = Versions(latentcache.__version__, worker)
    monkeypatch.setattr(Versions, "here", lambda: existing)
    if is_same:
        expected.require_here()
    else:
        with pytest.raises(ClusterError, match=re.escape(f"has torch {worker}, but the driver")):
            expected.require_here()
