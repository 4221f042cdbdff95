"""What the tests share: a private home, servers and a Ray cluster started once, a tiny VAE."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Several tests run at a time. With a thread for each core of their own, which wait by spinning, the
# whole takes half as long again. Torch asks when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# Triton asks when it is imported, which diffusers does: where no GPU is, its interpreter runs them.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

import runs
import warm
from checkpoints import write_diffusers_folder
from corpus import Shard, make_corpus, objects
from latentcache import Dataset, urls
from runs import Cli, Configs, Made, make, open_at
from servers import (
    ACCESS_KEY,
    SECRET_KEY,
    FaultyProxy,
    S3Server,
    moto_server,
    ray_cluster,
    rclone_server,
)


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is imported that looks for a home, credentials or Ray's settings."""
    # No test is about time, and the machine may be busy.
    # In CI the examples are the same in each run; elsewhere each run tries others.
    is_ci = bool(os.environ.get("CI"))
    hypothesis.settings.register_profile("untimed", deadline=None, derandomize=is_ci)
    hypothesis.settings.load_profile("untimed")
    # A script's background jobs ignore Ctrl-C, and so does all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tempfile.TemporaryDirectory(prefix="latentcache-home-")
    config.add_cleanup(home.cleanup)
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        del os.environ[name]
    os.environ |= {
        "HOME": home.name,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need servers or Ray, and spread them over the whole run."""
    for item in items:
        if _is_system(item) or "servers_folder" in getattr(item, "fixturenames", ()):
            item.add_marker("system")
    # Several tests of Ray at once would wait for each other. By name, few of them are neighbours.
    items.sort(key=lambda item: item.path.name)


def _is_system(item: pytest.Item) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return item.path.parent.name == "system" or not {"moto", "rclone"}.isdisjoint(
        value for value in parameters if isinstance(value, str)
    )


@pytest.fixture
def memory_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `memory://` URLs be opened, for a store that needs no server; users' are refused."""
    monkeypatch.setattr(urls, "SCHEMES", urls.SCHEMES | {"memory"})


@pytest.fixture(autouse=True)
def _no_command_outlives_its_test() -> Iterator[None]:
    yield
    while runs.started:
        runs.started.pop().end()


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    # Not pytest's own: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def moto(servers_folder: Path, corpus: list[Shard]) -> Iterator[S3Server]:
    """An S3 server with conditional writes; its bucket `photos` holds the corpus."""
    with moto_server(servers_folder) as server:
        server.make_bucket("photos", objects(corpus))
        yield server


@pytest.fixture(scope="session")
def rclone(servers_folder: Path, corpus: list[Shard]) -> Iterator[S3Server]:
    """An S3 server without conditional writes; its bucket `photos` holds the corpus."""
    with rclone_server(servers_folder) as server:
        server.make_bucket("photos", objects(corpus))
        yield server


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(moto.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def ray_address(servers_folder: Path) -> Iterator[str]:
    with ray_cluster(servers_folder) as address:
        yield address


@pytest.fixture(scope="session")
def cli() -> Cli:
    """The command line without Ray, in processes that start at once."""
    warm.start_fork_server()
    return warm.WarmCli()


@pytest.fixture(scope="session")
def ray_cli(ray_address: str) -> Cli:
    """The command line, with the session's Ray cluster to join."""
    return Cli(RAY_ADDRESS=ray_address)


@pytest.fixture(scope="session")
def local_cli(servers_folder: Path) -> Cli:
    """The command line, to start a Ray of its own."""
    return Cli(RAY_TMPDIR=str(servers_folder))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KL-f8 of the real depth and no width, with random weights."""
    return write_diffusers_folder(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture
def configs(tmp_path: Path, checkpoint: Path) -> Configs:
    folder = tmp_path / "configs"
    folder.mkdir()
    return Configs(folder, checkpoint)


@pytest.fixture(scope="session")
def corpus() -> list[Shard]:
    return make_corpus()


@pytest.fixture(scope="session")
def made_on_moto(
    moto: S3Server, cli: Cli, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    return make(moto, cli, Configs(tmp_path_factory.mktemp("moto"), checkpoint))


@pytest.fixture(scope="session")
def made_on_rclone(
    rclone: S3Server, cli: Cli, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    return make(rclone, cli, Configs(tmp_path_factory.mktemp("rclone"), checkpoint))


@pytest.fixture(scope="session")
def undisturbed(made_on_moto: Made) -> Dataset:
    """What a run over the corpus makes where nothing goes wrong."""
    return open_at(made_on_moto.server, made_on_moto.output)
