"""The wheel, in an environment that has its dependencies and no source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", *options, str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Install the wheel in a new environment, and return a function that runs commands in it."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--quiet", "--no-deps", "--no-index", "--prefix", str(folder)]
    subprocess.run([*pip, "install", *target, "--ignore-installed", str(wheel)], check=True)
    # The dependencies are those of this environment. Its own .pth files, one of which names the
    # source tree, have no effect in a folder that a .pth file names.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        command = (folder / "bin" / command[0], *command[1:])
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_package_its_data_and_its_types(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "latentcache/py.typed" in expected
    assert {name for name in names if not name.partition("/")[0].endswith(".dist-info")} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_metadata_of_the_wheel_is_that_of_the_project(wheel: Path):
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    required = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert required == sorted(text.replace("_", "-") for text in project["dependencies"])
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert metadata["Requires-Python"] == project["requires-python"]


def test_the_installed_command_draws_and_plans_the_demo(run: Run):
    where = run("python", "-c", "import latentcache; print(latentcache.__file__)")
    assert ROOT not in Path(where).parents
    assert Path(where.strip()).with_name("py.typed").is_file()
    run("latentcache", "demo-data", "demo/shards", "--shards", "1", "--samples", "8")
    config = ROOT / "configs" / "demo.yaml"
    plan = json.loads(run("latentcache", "plan", config, "--json"))
    assert plan["num_pending"] == 1
