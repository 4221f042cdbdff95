"""The main job against two real S3 servers: nothing lost, nothing doubled, nothing done twice."""

from __future__ import annotations

import pytest

import latentcache
from corpus import Shard, good, objects
from latentcache import Dataset
from runs import (
    Cli,
    Configs,
    Made,
    assert_nothing_lost_or_doubled,
    assert_same,
    open_at,
    rows_of,
)
from servers import FaultyProxy, S3Server, overwrite


@pytest.fixture(params=["moto", "rclone"])
def made(request: pytest.FixtureRequest) -> Made:
    result: Made = request.getfixturevalue(f"made_on_{request.param}")
    return result


def test_every_sample_becomes_a_row_or_a_reject(made: Made, corpus: list[Shard]) -> None:
    summary = made.first.json
    assert summary["status"] == "complete"
    assert summary["num_units"] == summary["num_committed"] == len(corpus)
    assert summary["num_skipped"] == 0
    assert summary["num_rows"] == sum(len(shard.rows) for shard in corpus)
    assert summary["num_rejects"] == sum(len(shard.rejects) for shard in corpus)
    assert_nothing_lost_or_doubled(made.server, made.output, corpus)


def test_both_servers_give_the_same_dataset(made: Made, undisturbed: Dataset) -> None:
    assert_same(open_at(made.server, made.output), undisturbed)


def test_a_second_run_writes_nothing(made: Made, cli: Cli) -> None:
    before = made.server.listing("made")
    with FaultyProxy(made.server.endpoint_url) as proxy:
        url = f"storage.endpoint_url={proxy.endpoint_url}"
        again = cli.ok("run", made.config, "--set", f"source.{url}", "--set", f"output.{url}")
        assert {method for method, _, _ in proxy.log} == {"GET", "HEAD"}
    assert again["num_committed"] == 0
    assert again["num_skipped"] == again["num_units"] == made.first.json["num_units"]
    for name in ("num_rows", "num_rejects", "manifest", "status"):
        assert again[name] == made.first.json[name]
    assert made.server.listing("made") == before


def test_qa_results_are_stored_and_can_be_repeated(made: Made, cli: Cli) -> None:
    keys = made.server.listing("made")
    prefix = f"{made.output.removeprefix('s3://made/')}/qa/"
    assert {f"{prefix}report-00000001.{kind}" for kind in ("html", "json")} <= keys.keys()
    assert made.first.json["report"] == f"{made.output}/qa/report-00000001.html"
    seen = made.first.json["num_qa_rows"]
    assert seen >= 3  # buckets
    assert cli.ok("qa", made.config)["totals"]["num_qa_rows"] == seen
    assert cli.ok("qa", made.config, "--units", "2", "--rows", "8")["totals"]["num_qa_rows"] == 8
    assert made.server.listing("made") == keys


def test_plan_status_and_verify_agree(made: Made, cli: Cli, corpus: list[Shard]) -> None:
    first = made.first.json
    plan = latentcache.make_plan(latentcache.load_config(made.config))
    assert (len(plan.units), plan.pending, plan.diff) == (len(corpus), [], [])
    status = cli.ok("status", made.config)
    verified = cli.ok("verify", made.config)
    for actual in (status, verified):
        assert actual["num_units"] == len(corpus)
        assert actual["num_rows"] == first["num_rows"]
        assert actual["num_rejects"] == first["num_rejects"]
    assert status["manifests"] == [1]
    assert not status["active_runs"]
    assert verified["ok"]
    assert verified["problems"] == []


def test_a_store_without_conditional_writes_is_detected(made: Made) -> None:
    said = "no conditional writes" in made.first.stderr
    assert said == (made.server.name == "rclone")


def test_without_conditional_writes_a_second_driver_is_refused(
    rclone: S3Server, cli: Cli, ray_cli: Cli, configs: Configs
) -> None:
    shards = [good(f"{number}.tar", seed=number) for number in range(3)]
    source = rclone.make_bucket("alone-photos", objects(shards))
    output = rclone.make_bucket("alone-latents")
    with FaultyProxy(rclone.endpoint_url) as proxy:
        config = configs.write(source, output, endpoint_url=proxy.endpoint_url)
        gate = proxy.gate("alone-photos/1.tar")
        first = ray_cli.start("run", config, "--json")
        first.wait_until_it_is_at(gate)
        second = cli("run", config, "--json")
        assert second.code == 1
        assert "no conditional writes" in second.json["error"]
        assert f"pid {first.process.pid}" in second.json["error"]
        status = cli.ok("status", config)
        (running,) = status["active_runs"]
        assert running["pid"] == first.process.pid
        assert status["num_units"] == len(shards)
        gate.open()
        assert first.result().code == 0
    assert_nothing_lost_or_doubled(rclone, output, shards)


def test_only_a_replaced_shard_is_encoded_again(moto: S3Server, cli: Cli, configs: Configs) -> None:
    old = [good(f"{number}.tar", seed=number) for number in range(3)]
    source = moto.make_bucket("changing-photos", objects(old))
    output = moto.make_bucket("changing-latents")
    config = configs.write(source, output, endpoint_url=moto.endpoint_url)
    assert cli.ok("run", config)["manifest"] == 1
    before = rows_of(open_at(moto, output))

    new = [old[0], good("1.tar", seed=7, num_samples=4), old[2]]
    moto.client.put_object(Bucket="changing-photos", Key="1.tar", Body=new[1].data)
    (pending,) = latentcache.make_plan(latentcache.load_config(config)).pending
    assert pending.reason == "changed"
    assert pending.unit.source == "s3://changing-photos/1.tar"
    summary = cli.ok("run", config)
    assert (summary["num_committed"], summary["num_skipped"]) == (1, 2)
    assert summary["num_rows"] == sum(len(shard.rows) for shard in new)

    dataset = open_at(moto, output)
    assert dataset.manifest.number == 2
    actual = {(name, key, width, height) for name, key, width, height, *_ in rows_of(dataset)}
    assert actual == {
        (shard.name, key, width, height)
        for shard in new
        for key, (width, height, _) in shard.rows.items()
    }
    for name, equal in (("0.tar", True), ("1.tar", False), ("2.tar", True)):
        was = [row for row in before if row[0] == name]
        assert ([row for row in rows_of(dataset) if row[0] == name] == was) == equal
    assert rows_of(open_at(moto, output, manifest=1)) == before
    for manifest in (1, 2):
        assert latentcache.verify(output, manifest, storage=moto.options).ok


def test_another_contract_is_refused_before_any_write(made_on_moto: Made, cli: Cli) -> None:
    before = made_on_moto.server.listing("made")
    change = (made_on_moto.config, "--json", "--set", "transform.resolution_px=128")
    refused = cli("run", *change)
    assert refused.code == refused.json["exit_code"] == 2
    assert "transform.buckets: dataset has [[48, 80], [64, 64], [80, 48]]" in refused.json["error"]
    planned = cli("plan", *change)
    assert planned.code == 2
    (line,) = planned.json["contract_diff"]
    assert line.startswith("transform.buckets:")
    assert made_on_moto.server.listing("made") == before


def test_a_shard_overwritten_during_a_read_gives_one_version(
    moto: S3Server, cli: Cli, configs: Configs
) -> None:
    old = [good("0.tar", seed=1), good("1.tar", seed=2, ballast_bytes=10_000_000)]
    new = [good("0.tar", seed=3), good("1.tar", seed=4, ballast_bytes=10_000_000)]
    source = moto.make_bucket("torn-photos", objects(old))
    output = moto.make_bucket("torn-latents")
    with FaultyProxy(moto.endpoint_url) as proxy:
        config = configs.write(source, output, endpoint_url=proxy.endpoint_url)
        rules = [
            proxy.on("GET", f"torn-photos/{s.name}", overwrite(moto, "torn-photos", s.name, s.data))
            for s in new
        ]
        result = cli("run", config, "--json")
        assert [rule.num_fired for rule in rules] == [1, 1]
        # The larger one takes two requests, and the overwrite fell between them.
        assert proxy.count("GET", "torn-photos/1.tar") > proxy.count("GET", "torn-photos/0.tar")
    assert result.code == 0, result.stderr
    assert result.stderr.count("changed while it was read") == 2
    assert_nothing_lost_or_doubled(moto, output, new)
