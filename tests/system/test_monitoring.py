"""The dashboard and the alerts: whole, and asking only for what a run really exports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from corpus import Shard
from latentcache.engine.prometheus import RunMetrics
from runs import Cli, Configs, Result
from servers import (
    DEADLINE_S,
    Exchange,
    FaultyProxy,
    S3Server,
    free_port,
    ray_cluster,
    wait_until,
)

FOLDER = Path(__file__).parents[2] / "infra" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]

# Grafana's own, with a value of the kind that it puts there.
GRAFANA = {"$__rate_interval": "1m"}


def expressions() -> dict[str, str]:
    """Every query, by where it stands."""
    actual = {f"alert {rule['alert']}": rule["expr"] for rule in ALERTS}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            actual[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            (query,) = re.findall(r"^label_values\((.*), *dataset\)$", variable["definition"])
            assert variable["query"]["query"] == variable["definition"]
            actual[f"variable {variable['name']}"] = query
    return actual


def parsed(expression: str) -> Any:
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    return promql.parse(expression)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a query asks for: metrics with the labels that it matches, and labels to group by."""

    metrics: dict[str, set[str]]
    labels: set[str]


def asked_by(expression: str) -> Asked:
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    asked = Asked({}, set())

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            matched = {matcher.name for matcher in node.matchers.matchers}
            asked.metrics.setdefault(node.name, set()).update(matched)
        elif isinstance(node, promql.AggregateExpr) and node.modifier:
            asked.labels.update(node.modifier.labels)

    promql.walk(promql.parse(expression), visit)
    return asked


def test_every_query_is_valid_promql():
    for where, expression in expressions().items():
        names = asked_by(expression).metrics
        assert names, where
        assert all(name.startswith("ray_latentcache_") for name in names), where


def test_grafana_can_import_the_dashboard():
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"]
    assert "id" not in DASHBOARD, "Grafana gives it one"
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        *("datasource", "prometheus"),
    )
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in [*panels, variables["dataset"]]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"] in ("none", "s", "percentunit", "Bps")
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            used = set(re.findall(r"\$\w+", target["expr"]))
            assert used <= {"$dataset", *GRAFANA}
            assert target["datasource"] == panel["datasource"]


def test_dashboard_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for position in places:
        assert position["x"] >= 0
        assert position["x"] + position["w"] <= 24
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_every_alert_has_a_description_with_a_fix():
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels.dataset }}" in rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"]
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))


# What a run exports.


@dataclass(frozen=True, slots=True)
class Monitored:
    """A Ray cluster that tells its metrics."""

    cli: Cli
    port: int

    def scrape(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """All samples of the package's metrics: labels and value, by name."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        actual: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "latentcache" in sample.name:
                    actual.setdefault(sample.name, []).append((sample.labels, sample.value))
        return actual

    def total(self, name: str) -> float:
        return sum(value for _, value in self.scrape().get(name, []))


@pytest.fixture
def monitored(servers_folder: Path) -> Iterator[Monitored]:
    folder, port = servers_folder / "m", free_port()
    folder.mkdir()
    # A gauge is forgotten after two intervals, and the driver reports it every two seconds.
    options = (
        f"--metrics-export-port={port}",
        "--dashboard-agent-listen-port=0",
        '--system-config={"metrics_report_interval_ms": 4000}',
    )
    with ray_cluster(folder, *options) as address:
        yield Monitored(Cli(RAY_ADDRESS=address), port)


def kill_reader(exchange: Exchange) -> None:
    os.kill(exchange.client_pid, signal.SIGKILL)
    exchange.cut()


def test_a_run_exports_every_queried_metric_and_logs_its_events(
    moto: S3Server,
    proxy: FaultyProxy,
    monitored: Monitored,
    configs: Configs,
    corpus: list[Shard],
) -> None:
    may_go_on = threading.Event()

    def hold(exchange: Exchange) -> None:
        assert may_go_on.wait(DEADLINE_S)
        exchange.send(exchange.forward())

    output = moto.make_bucket("monitored")
    config = configs.write(
        "s3://photos", output, endpoint_url=proxy.endpoint_url, num_cpu_actors=2, unit_retries=1
    )
    crash = proxy.on("GET", "photos/05.tar", kill_reader, times=1_000_000)
    held = proxy.on("GET", "photos/07.tar", hold, times=1_000_000)
    run = monitored.cli.start("run", config, "--json", "--log-json")
    try:
        assert_all_is_exported(monitored, num_committed=len(corpus) - 2)
    finally:
        may_go_on.set()
    assert held.num_fired > 0
    assert 2 <= crash.num_fired <= 3
    result = run.result()
    assert result.code == 1
    # Ray sends the last word of a driver that ends in order: no alert takes it for a dead one.
    assert [value for _, value in monitored.scrape()["ray_latentcache_units_pending"]] == [0]
    assert_log_tells(result, failed_source="s3://photos/05.tar", num_lost=crash.num_fired)


def assert_all_is_exported(monitored: Monitored, num_committed: int) -> None:
    """Hold the queries against a run that has one unit left, and has given one up."""

    def is_told() -> bool:
        is_committed = monitored.total("ray_latentcache_units_committed_total") == num_committed
        return is_committed and monitored.total("ray_latentcache_units_failed") == 1

    wait_until(is_told, "the units in the metrics")
    exported = {
        name: {label for labels, _ in samples for label in labels}
        for name, samples in monitored.scrape().items()
    }
    for where, expression in expressions().items():
        asked = asked_by(expression)
        for name, labels in asked.metrics.items():
            assert name in exported, f"{where}: no {name}, but {sorted(exported)}"
            assert labels | asked.labels <= exported[name], where
    assert monitored.total("ray_latentcache_units_pending") == 1
    assert 2 <= monitored.total("ray_latentcache_actors_lost_total") <= 3
    assert 1 <= monitored.total("ray_latentcache_actors") <= 2


def assert_log_tells(result: Result, failed_source: str, num_lost: int) -> None:
    """Hold the JSON log of a run that gave a unit up and lost actors against its summary."""
    log = [json.loads(line) for line in result.stderr.splitlines()]
    for entry in log:
        assert datetime.fromisoformat(entry["time"]).utcoffset() == timedelta(0)
        assert entry["level"] in ("info", "warning", "error")
        assert entry["message"]
    by_event = {entry["event"]: entry for entry in log}
    events = [entry["event"] for entry in log]
    assert (events[0], events[-2:]) == ("run_started", ["run_ended", "incomplete"])
    assert by_event["run_started"]["num_pending"] == result.json["num_units"]
    assert by_event["actors_lost"]["num_lost"] == num_lost
    assert events.count("unit_given_up") == 1
    assert by_event["unit_given_up"]["source"] == failed_source
    assert by_event["manifest_written"]["complete"] is False
    ended = by_event["run_ended"]
    assert (ended["level"], ended["num_failed"]) == ("error", 1)
    same = ("status", "exit_code", "num_committed", "num_rows", "num_rejects", "manifest")
    assert {name: ended[name] for name in same} == {name: result.json[name] for name in same}


def test_output_of_libraries_is_json_in_a_json_log():
    code = """if True:
        import logging
        from latentcache.log import write_libraries_as_json
        write_libraries_as_json()
        print("\\x1b[33m(raylet)\\x1b[0m A worker died.\\nTo troubleshoot, look")
        logging.getLogger("other").error("it broke")
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not said.stdout
    entries = [json.loads(line) for line in said.stderr.splitlines()]
    assert [(entry["event"], entry["level"], entry["message"]) for entry in entries] == [
        ("library", "info", "(raylet) A worker died."),
        ("library", "info", "To troubleshoot, look"),
        ("library", "error", "it broke"),
    ]


def test_counters_only_increase(monkeypatch: pytest.MonkeyPatch):
    updates: list[tuple[str, float, dict[str, str]]] = []

    class Spy:
        def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
            self.name, self.labels = name, labels

        def inc(self, value: float, labels: dict[str, str]) -> None:
            assert labels.keys() == set(self.labels)
            updates.append((self.name, value, labels))

        set = inc

    monkeypatch.setattr("ray.util.metrics.Counter", Spy)
    monkeypatch.setattr("ray.util.metrics.Gauge", Spy)
    metrics = RunMetrics("photos")
    for num_lost in (0, 2, 1, 2, 5):
        metrics.update(actors=1, actors_lost_total=num_lost)
    lost = [(value, labels) for name, value, labels in updates if name.endswith("_lost_total")]
    assert lost == [(2, {"dataset": "photos"}), (3, {"dataset": "photos"})]
    assert sum(name == "latentcache_actors" for name, _, _ in updates) == 5
