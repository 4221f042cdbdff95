"""`latentcache run` as a Ray job: the same program, whose summary and exit code come back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import latentcache
from corpus import Shard, good, objects
from latentcache.engine.job import UNITS_PER_ACTOR
from runs import Cli, Configs, Result, Running, assert_nothing_lost_or_doubled, receipts_at
from servers import SCRIPTS, SECRET_KEY, FaultyProxy, JobServer, S3Server, job_server, wait_until

README = Path(__file__).parents[2] / "infra" / "README.md"
TOKEN = "not-much-of-a-secret-but-long-enough"


@dataclass(frozen=True, slots=True)
class Job:
    """What the cluster says of a job that has ended or still works."""

    status: str
    exit_code: int | None
    runtime_env: dict[str, Any]
    log: str

    @property
    def summary(self) -> dict[str, Any]:
        """The last thing that it said."""
        tree: dict[str, Any] = json.loads(self.log.splitlines()[-1])
        return tree


class Jobs:
    """`ray job …`, as called by a user who knows how to reach the cluster."""

    def __init__(self, server: JobServer) -> None:
        self.server = server
        self._env = os.environ | server.env

    def __call__(self, verb: str, *args: str) -> Result:
        command = [str(SCRIPTS / "ray"), "job", verb, f"--address={self.server.url}", *args]
        return Running(command, self._env).result()

    def ask(self, name: str) -> Job:
        details = json.loads(self._get(f"/api/jobs/{name}"))
        return Job(
            status=details["status"],
            exit_code=details["driver_exit_code"],
            runtime_env=details["runtime_env"],
            log=json.loads(self._get(f"/api/jobs/{name}/logs"))["logs"],
        )

    def _get(self, path: str) -> bytes:
        headers = {"Authorization": f"Bearer {TOKEN}"}  # a cluster without auth does not mind
        request = urllib.request.Request(self.server.url + path, headers=headers)
        with urllib.request.urlopen(request) as reply:
            data: bytes = reply.read()
        return data

    def ask_as_documented(self, name: str) -> str:
        """What infra/README.md tells schedulers to run prints this."""
        actual = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        assert actual
        code = actual[1].replace("http://127.0.0.1:8265", self.server.url).replace("photos-1", name)
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=self._env, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()


@pytest.fixture(scope="module")
def jobs(servers_folder: Path) -> Iterator[Jobs]:
    """A cluster with a dashboard and token authentication; other tests use one without."""
    folder = servers_folder / "jobs"
    folder.mkdir()
    (folder / "token").write_text(TOKEN)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    with job_server(folder, env) as server:
        yield Jobs(server)


def shards_of(num_shards: int) -> list[Shard]:
    return [good(f"{number}.tar", seed=number) for number in range(num_shards)]


def pack(folder: Path, config: Path) -> Path:
    """The `runtime_env` of a job that brings its config, and a package of a version of its own."""
    package, working_dir = folder / "latentcache", folder / "job"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(latentcache.__file__).parent, package, ignore=ignore)
    file = package / "__init__.py"
    file.write_text(file.read_text().replace(latentcache.__version__, "0.1.0+travelled"))
    working_dir.mkdir()
    shutil.copy(config, working_dir / "config.yaml")
    path = folder / "runtime-env.yaml"
    path.write_text(yaml.safe_dump({"working_dir": str(working_dir), "py_modules": [str(package)]}))
    return path


def test_a_ray_job_gives_the_summary_of_a_local_run(
    jobs: Jobs, rclone: S3Server, configs: Configs, tmp_path: Path
) -> None:
    store = rclone
    shards = shards_of(3)
    source = store.make_bucket("job-photos", objects(shards))
    output = f"{store.make_bucket('job-latents')}/there"
    config = configs.write(source, output, endpoint_url=store.endpoint_url)

    submitted = jobs(
        *("submit", "--submission-id=whole", f"--runtime-env={pack(tmp_path, config)}"),
        *("--", "python", "-m", "latentcache.cli", "run", "config.yaml", "--json"),
    )

    assert submitted.code == 0, submitted.stdout
    job = jobs.ask("whole")
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0)
    assert jobs.ask_as_documented("whole") == "SUCCEEDED 0"
    assert (job.summary["status"], job.summary["exit_code"]) == ("complete", 0)
    assert job.summary["num_committed"] == len(shards)
    assert job.log.splitlines()[-1] in submitted.stdout
    assert_nothing_lost_or_doubled(store, output, shards)
    # Driver and actors ran what came with the job; credentials did not come with it.
    contract = json.loads(store.read("job-latents", "there/contract.json"))
    versions = [contract["provenance"]["versions"]]
    versions += [receipt["versions"] for receipt in receipts_at(store, output)]
    assert {version["latentcache"] for version in versions} == {"0.1.0+travelled"}
    assert SECRET_KEY not in json.dumps(job.runtime_env)


def test_a_ray_job_reports_the_exit_code(jobs: Jobs, configs: Configs) -> None:
    config = configs.write("s3://photos", "s3://nowhere")
    command = ("latentcache", "run", str(config), "--json", "--set", "compute.num_gpu=1")
    assert jobs("submit", "--submission-id=wrong", "--", *command).code == 1  # as for any failure
    job = jobs.ask("wrong")
    assert (job.status, job.exit_code, job.summary["exit_code"]) == ("FAILED", 2, 2)
    assert "compute.num_gpu" in job.summary["error"]
    assert jobs.ask_as_documented("wrong") == "FAILED 2"


def test_a_cluster_with_tokens_refuses_other_clients(
    jobs: Jobs, moto: S3Server, configs: Configs
) -> None:
    command = [str(SCRIPTS / "ray"), "job", "list", f"--address={jobs.server.url}"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "Authentication required" in refused.stderr

    shards = shards_of(1)
    source = moto.make_bucket("token-photos", objects(shards))
    output = moto.make_bucket("token-latents")
    config = configs.write(source, output, endpoint_url=moto.endpoint_url)
    cli = Cli(RAY_ADDRESS=jobs.server.address)
    result = cli("run", config, "--json")
    assert (result.code, result.json["status"]) == (1, "error")
    assert "cannot join the Ray cluster" in result.json["error"]
    assert not moto.listing("token-latents")
    assert cli.with_env(**jobs.server.env).ok("run", config)["num_committed"] == 1


def test_a_stopped_ray_job_resumes(jobs: Jobs, moto: S3Server, configs: Configs) -> None:
    shards = shards_of(8)
    source = moto.make_bucket("stopped-photos", objects(shards))
    output = moto.make_bucket("stopped-latents")
    assert UNITS_PER_ACTOR == 2
    with FaultyProxy(moto.endpoint_url) as proxy:
        config = configs.write(source, output, endpoint_url=proxy.endpoint_url)
        command = ("--", "latentcache", "run", str(config), "--json")

        def stop(name: str, in_hand: tuple[str, str], *options: str) -> None:
            """Stop a job that has these two shards in its hands."""
            gates = [proxy.gate(f"stopped-photos/{shard}") for shard in in_hand]
            jobs("submit", "--no-wait", f"--submission-id={name}", *options, *command)
            for gate in gates:
                wait_until(lambda: gate.is_reached, f"{name} to run")  # noqa: B023
            assert jobs("stop", "--no-wait", name).code == 0
            if options:
                wait_until(lambda: "units in progress get 20 s" in jobs.ask(name).log, "the signal")
                for gate in gates:
                    gate.open()
            wait_until(lambda: jobs.ask(name).status == "STOPPED", f"{name} to stop")

        # Given the time, it commits its units in progress, and reports how far it came.
        patient = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
        stop("patient", ("2.tar", "3.tar"), f"--runtime-env-json={json.dumps(patient)}")
        summary = jobs.ask("patient").summary
        assert (summary["status"], summary["exit_code"]) == ("interrupted", 1)
        assert summary["num_committed"] == len(receipts_at(moto, output)) == 4

        # Killed after Ray's three seconds, it reports nothing more and loses its units in progress.
        stop("killed", ("6.tar", "7.tar"))
        assert "exit_code" not in jobs.ask("killed").log
        assert len(receipts_at(moto, output)) == 6

        jobs("submit", "--submission-id=again", *command)
        summary = jobs.ask("again").summary
        assert (summary["status"], summary["num_skipped"], summary["num_committed"]) == (
            "complete",
            6,
            2,
        )
        reads = {shard.name: proxy.count("GET", f"photos/{shard.name}") for shard in shards}
        assert [name for name, num_reads in reads.items() if num_reads > 1] == ["6.tar", "7.tar"]
    assert_nothing_lost_or_doubled(moto, output, shards)
