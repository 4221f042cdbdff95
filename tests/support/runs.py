"""Running the command line as a user does, and reading what it left with a plain S3 client."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

import latentcache
from corpus import Shard
from latentcache import Dataset
from servers import DEADLINE_S, SCRIPTS, Gate, S3Server, wait_until


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        (line,) = self.stdout.splitlines()
        tree: dict[str, Any] = json.loads(line)
        return tree


# What a failed test may have left behind; conftest ends it.
started: list[Running] = []


class Running:
    """A running command. It always ends in time and never with a traceback."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        with ExitStack() as stack:
            # Files, not pipes: what it has said so far can be read while it goes on.
            self._stdout = stack.enter_context(tempfile.TemporaryFile())
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._stdout,
                stderr=self._stderr,
                env=env,
                start_new_session=True,
            )
            self._files = stack.pop_all()
        started.append(self)

    def end(self) -> None:
        with self._files:
            self.process.kill()
            self.process.wait()

    def wait_until_it_is_at(self, gate: Gate) -> None:
        wait_until(lambda: gate.is_reached or self.process.poll() is not None, "it at the gate")
        assert gate.is_reached, f"it ended and said: {_read(self._stderr)}"

    def wait_until_it_says(self, text: str) -> None:
        wait_until(lambda: text in _read(self._stderr), f"{text!r} on stderr")

    def wait_until_it_prints(self, text: str) -> None:
        wait_until(lambda: text in _read(self._stdout), f"{text!r} on stdout")

    def result(self) -> Result:
        with self._files:
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"it hangs; it said: {_read(self._stderr)}") from None
            stderr = _read(self._stderr)
            assert "Traceback" not in stderr, stderr
            return Result(self.process.returncode, _read(self._stdout), stderr)


def _read(file: IO[bytes]) -> str:
    # Not by seeking: the command writes at the same offset.
    return os.pread(file.fileno(), 2**20, 0).decode()


class Cli:
    """`latentcache …` in a process of its own."""

    def __init__(self, **env: str) -> None:
        self._env = env

    def with_env(self, *without: str, **env: str) -> Cli:
        kept = {name: value for name, value in self._env.items() if name not in without}
        return Cli(**kept | env)

    def start(self, *args: str | Path) -> Running:
        command = [str(SCRIPTS / "latentcache"), *map(str, args)]
        return Running(command, dict(os.environ) | self._env)

    def __call__(self, *args: str | Path) -> Result:
        return self.start(*args).result()

    def ok(self, *args: str | Path) -> dict[str, Any]:
        """Run a command that must succeed, with --json."""
        result = self(*args, "--json")
        assert result.code == 0, result.stderr
        return result.json


@dataclass(frozen=True, slots=True)
class Configs:
    """Writes configs that differ only in what a test is about."""

    folder: Path
    checkpoint: Path

    def write(
        self,
        source: str,
        output: str,
        *,
        endpoint_url: str | None = None,
        shards: str = "*.tar",
        qa: dict[str, Any] | None = None,
        **compute: Any,
    ) -> Path:
        storage = {"endpoint_url": endpoint_url} if endpoint_url else {}
        tree = {
            "name": "test",
            "source": {"shards": f"{source}/{shards}", "keep": ["txt"], "storage": storage},
            "transform": {"resolution_px": 64, "buckets": {"max_ratio": 1.7, "step_px": 16}},
            "vae": {"checkpoint": str(self.checkpoint)},
            "output": {"url": output, "storage": storage},
            # One thread each, so that every run adds up in the same order.
            "compute": {"num_gpus": 0, "num_cpu_actors": 1, "decode_threads": 1} | compute,
            "qa": qa,
            "rejects": {"max_rate": 1},  # much of the corpus is damaged
        }
        path = self.folder / f"{len(list(self.folder.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path


@dataclass(frozen=True, slots=True)
class Made:
    """What one run over the corpus, with nothing going wrong, left on a server."""

    server: S3Server
    output: str
    config: Path
    first: Result


def make(server: S3Server, cli: Cli, configs: Configs) -> Made:
    output = f"{server.make_bucket('made')}/deep/down"
    # Random weights decode to noise.
    qa = {"fraction": 0.1, "min_rows_per_bucket": 1, "min_psnr_db": 1}
    config = configs.write(
        "s3://photos", output, endpoint_url=server.endpoint_url, qa=qa, num_cpu_actors=2
    )
    first = cli("run", config, "--json")
    assert first.code == 0, first.stderr
    return Made(server, output, config, first)


Row = tuple[str, str, int, int, int, int, str | None, bytes]


def rows_of(dataset: Dataset) -> list[Row]:
    """Every row as plain values, latent included, with the name of its shard; sorted."""
    names = {record.unit.id: Path(record.unit.source).name for record in dataset.units}
    return sorted(
        (
            names[row.unit],
            row.key,
            row.original_width,
            row.original_height,
            row.crop_top,
            row.crop_left,
            row.caption or "",
            row.latent.numpy().tobytes(),
        )
        for row in dataset
    )


def rejects_of(dataset: Dataset) -> list[tuple[str, str | None, str]]:
    """Every reject: name of its shard, key, reason; in the order of the shards."""
    return [(Path(reject.source).name, reject.key, reject.reason) for reject in dataset.rejects()]


def assert_same(dataset: Dataset, undisturbed: Dataset) -> None:
    assert rows_of(dataset) == rows_of(undisturbed)
    assert rejects_of(dataset) == rejects_of(undisturbed)


def open_at(server: S3Server, url: str, manifest: int | None = None) -> Dataset:
    return latentcache.open_dataset(url, manifest, storage=server.options)


def receipts_at(server: S3Server, url: str) -> list[dict[str, Any]]:
    """The receipts below a URL, read without the package."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    folder = f"{prefix}/commits/" if prefix else "commits/"
    keys = [key for key in server.listing(bucket) if key.startswith(folder)]
    return [json.loads(server.read(bucket, key)) for key in keys]


def assert_nothing_lost_or_doubled(server: S3Server, url: str, shards: list[Shard]) -> None:
    """Hold the receipts against what was planted: samples in = rows + rejects, each once."""
    records = [receipt["record"] for receipt in receipts_at(server, url)]
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    sizes = {key: size for key, (size, _, _) in server.listing(bucket).items()}
    actual = {Path(record["unit"]["source"]).name: record for record in records}
    assert len(actual) == len(records), "a unit has two receipts"
    assert actual.keys() == {shard.name for shard in shards}
    for shard in shards:
        record = actual[shard.name]
        assert record["num_samples"] == record["num_rows"] + record["num_rejects"]
        assert record["num_samples"] == shard.num_samples, shard.name
        assert record["num_rejects"] == len(shard.rejects), shard.name
        files = record["files"] + ([record["rejects"]] if record["rejects"] else [])
        for file in files:
            assert sizes[f"{prefix}/{file['path']}".lstrip("/")] == file["size_bytes"]
    dataset = open_at(server, url)
    captions = {(name, key): (w, h, c) for name, key, w, h, _, _, c, _ in rows_of(dataset)}
    assert len(dataset) == len(captions), "a row is there twice"
    planted = {
        (shard.name, key): (width, height, caption or "")
        for shard in shards
        for key, (width, height, caption) in shard.rows.items()
    }
    assert captions == planted
    assert Counter(rejects_of(dataset)) == Counter(
        (shard.name, key, reason) for shard in shards for key, reason in shard.rejects
    )
