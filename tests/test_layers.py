"""The layers, read off the imports: a file imports its own package and the layers below.

Single files that the packages of a layer share (`errors.py`, `metrics.py`) stand half a layer
lower, so that no package imports its neighbour and nothing goes in circles.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import latentcache
from makers import make_contract, make_latents, write_dataset

PACKAGE = Path(latentcache.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "errors": 0.0,
    "startup": 0.25,
    "clock": 0.25,
    "log": 0.25,
    "urls": 0.25,
    "yaml_files": 0.25,
    "storage_options": 0.25,
    "config_types": 0.4,
    "config_files": 0.4,
    "config_source": 0.45,
    "config": 0.5,
    "config_eval": 0.6,
    "parquet_footer": 0.5,
    "storage": 1.0,
    "dataset": 1.5,
    "bottleneck": 2.0,
    "image_files": 2.0,
    "metrics": 2.0,
    "networks": 2.0,
    "demo": 2.5,
    "images": 2.5,
    "vae": 2.5,
    "loader": 2.5,
    "evaluation": 3.0,
    "qa": 3.0,
    "engine": 3.5,
    "cli": 4.5,
    "__init__": 5.0,
}

CONFIG_FILES = (
    "config",
    "config_eval",
    "config_files",
    "config_source",
    "config_types",
)

# Libraries that one place alone may know, relative to the package.
HOMES = {
    "ray": {"engine/cluster.py", "engine/connection.py", "engine/prometheus.py"},
    "webdataset": {"images/braces.py", "images/samples.py", "demo/demo_data.py"},
    "pydantic": {f"{name}.py" for name in CONFIG_FILES},
    "pydantic_core": {f"{name}.py" for name in CONFIG_FILES},
    "yaml": {"yaml_files.py"},
    "typer": {f"cli/{name}.py" for name in ("base", "runs", "datasets", "quality", "tools")},
    "jinja2": {"qa/html.py"},
    "triton": {"vae/kernels.py", "vae/triton_kernels.py"},
    "diffusers": set(),
    "torchvision": set(),
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def part_of(dotted: str) -> str:
    """The package or single file of latentcache that a module belongs to."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"


def imports_of(file: Path) -> list[tuple[ast.stmt, str]]:
    """Every module that a file imports, at any depth, by its absolute name."""
    actual: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            actual += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: relative import; write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            actual += [
                (node, name if node.module == "latentcache" else node.module) for name in names
            ]
    return [(node, name) for node, name in actual if name]


def eager_imports_of(file: Path) -> set[str]:
    """What importing the file imports at once: its top level, less `if TYPE_CHECKING`."""
    top = [
        n for n in ast.parse(file.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    lines = {node.lineno for node in top}
    return {name for node, name in imports_of(file) if node.lineno in lines}


def test_every_file_has_a_layer():
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert parts <= LAYERS.keys(), "give the new package a layer, here and in docs/architecture.md"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_imports_only_its_own_package_and_layers_below(file: Path):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for _, name in imports_of(file):
        if name.split(".")[0] != "latentcache" or name == "latentcache.__version__":
            continue
        other = part_of(name)
        assert other == part or LAYERS[other] < LAYERS[part], f"{name_of(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_functions_and_classes_stay_small(file: Path):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno:
            limit = 200 if isinstance(node, ast.ClassDef) else 60
            assert node.end_lineno - node.lineno < limit, f"{node.name} is long: split it"


def test_no_file_reads_parquet_on_threads_that_outlive_the_process():
    users = {name_of(file) for file in FILES if "pq.read_table(" in file.read_text()}
    assert not users, "read with dataset/parquet.py, which says why"


def test_importing_a_module_has_no_side_effects():
    """A call or an assignment to another module's attribute at the top level of a file."""
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            is_setting = isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets
            )
            is_loop = isinstance(node, ast.For | ast.While | ast.With)
            is_allowed = name_of(file) == "cli/__main__.py"
            assert is_allowed or not (is_call or is_setting or is_loop), f"{name_of(file)}"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_only_by_its_own_modules(library: str):
    users = {
        name_of(file)
        for file in FILES
        if any(name.split(".")[0] == library for _, name in imports_of(file))
    }
    assert users <= HOMES[library]


def test_the_top_level_and_the_cli_import_heavy_modules_lazily():
    for file in (PACKAGE / "__init__.py", *PACKAGE.glob("cli/*.py")):
        names = {n for n in eager_imports_of(file) if not n.startswith("latentcache.cli")}
        known = {name.split(".")[0] for name in names}
        assert known - set(sys.stdlib_module_names) <= {"typer"}, name_of(file)


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after some code."""
    tail = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def test_importing_latentcache_loads_nothing_heavy():
    loaded = modules_after("import latentcache")
    assert not loaded & {"torch", "ray", "pyarrow", "pydantic", "fsspec", "numpy"}


def test_help_loads_nothing_heavy():
    loaded = modules_after(
        "from latentcache.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert "typer" in loaded
    assert not loaded & {"torch", "ray", "pyarrow", "pydantic", "fsspec", "numpy"}


def test_reading_a_dataset_never_loads_ray(tmp_path: Path):
    contract = make_contract()
    write_dataset(tmp_path, contract, {"a.tar": {(64, 64): make_latents(contract, (64, 64), 3)}})
    loaded = modules_after(
        "import latentcache\n"
        f"dataset = latentcache.open_dataset({str(tmp_path / 'out')!r})\n"
        "assert len(dataset) == 3 and dataset[-1].key == 'k0002'\n"
        "assert not list(dataset.rejects())"
    )
    assert "pyarrow" in loaded
    assert not loaded & {"ray", "webdataset", "typer", "pydantic"}
