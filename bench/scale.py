"""Measure 200,000 units, two billion images: plan, resume, manifests, status, opening the dataset.

`make bench`, or `python bench/scale.py [--units 200000]`. It creates once, in bench/.data, an
output in which all but ten units are done: receipts and manifests as runs leave them, a manifest
for every thousand units, and no latents. Then it measures the time and the peak memory of each step
in its own process: a first plan (over an empty output), the run that encodes the last ten units
(simulated actors; listing, plan, receipts and manifests are real), a run without pending units,
`status`, `open_dataset`, and manifests in which a unit is replaced. It prints a table and writes
bench/results/scale.json.

The demo VAE has 16 latent channels, four times those of Stable Diffusion's, so receipts and
manifest parts are larger than usual.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness import peak_mib, print_table, write_results
from latentcache import make_plan, open_dataset, run
from latentcache.dataset.contract import establish_contract
from latentcache.dataset.receipts import new_attempt
from latentcache.dataset.state import write_next
from latentcache.engine import run as run_module
from latentcache.engine.plan import Plan
from latentcache.engine.run import MANIFEST_EVERY_UNITS
from latentcache.engine.status import read_status
from latentcache.storage_options import StorageOptions
from simulated import Clock, SimulatedCluster, make_config, make_receipt

DATA = Path(__file__).parent / ".data"
NUM_LEFT = 10
NUM_ACTORS = 256


def prepare(folder: Path, num_units: int) -> None:
    """Create an output in which all but the last units are done, or restore it."""
    config = make_config(str(folder), num_units, NUM_ACTORS)
    plan = make_plan(config)
    num_manifests = -(-(num_units - NUM_LEFT) // MANIFEST_EVERY_UNITS) - 1
    if not (folder / "prepared").exists():
        establish_contract(plan.output, plan.contract, {})
        _run_once(folder, plan, num_manifests)
        (folder / "prepared").touch()
    for path in sorted((folder / "manifests").iterdir())[num_manifests:]:
        path.unlink()
    for unit in plan.units[num_units - NUM_LEFT :]:
        for generation in (0, 1):
            (folder / "commits" / f"{unit.id}-{generation}.json").unlink(missing_ok=True)


def _run_once(folder: Path, plan: Plan, num_manifests: int) -> None:
    """Commit the units in order. No manifest lists the last receipts, as after a killed driver."""
    (folder / "commits").mkdir(exist_ok=True)
    state, listing = plan.state, plan.snapshot
    for number, unit in enumerate(plan.units[: len(plan.units) - NUM_LEFT], 1):
        receipt = make_receipt(plan.contract, unit, 0, new_attempt())
        (folder / receipt.path).write_bytes(receipt.to_bytes())  # as put_if_absent, without fsync
        state.add(receipt)
        if number % MANIFEST_EVERY_UNITS == 0 and number <= num_manifests * MANIFEST_EVERY_UNITS:
            state, _ = write_next(
                state,
                plan.contract.fingerprint,
                plan.contract.stored_channels,
                lambda: listing,
                on_missing="keep",
            )
            print(f"\rmade {number} of {len(plan.units)} units", end="", file=sys.stderr)


def step_imports(folder: Path, num_units: int) -> dict[str, Any]:
    """Import the modules, and do nothing else."""
    return {}


def step_plan(folder: Path, num_units: int) -> dict[str, Any]:
    """Plan over an empty output."""
    with tempfile.TemporaryDirectory() as empty:
        plan = make_plan(make_config(empty, num_units, NUM_ACTORS))
    assert len(plan.pending) == num_units
    return {"num_pending": len(plan.pending)}


def step_resume(folder: Path, num_units: int) -> dict[str, Any]:
    """Run the last ten units."""
    return _run(folder, num_units, NUM_LEFT)


def step_nothing(folder: Path, num_units: int) -> dict[str, Any]:
    """Run again without pending units."""
    return _run(folder, num_units, 0)


def _run(folder: Path, num_units: int, num_left: int) -> dict[str, Any]:
    began = time.perf_counter()
    cluster = SimulatedCluster(NUM_ACTORS, Clock(), lambda _: 0.0)
    handed_out: list[float] = []

    def call(actor: Any, method: str, *args: Any) -> int:
        if method == "run_unit":
            handed_out.append(time.perf_counter() - began)
        return SimulatedCluster.call(cluster, actor, method, *args)

    with (
        patch.object(run_module, "Cluster", lambda *_: cluster),
        patch.object(cluster, "call", call),
    ):
        summary = run(make_config(str(folder), num_units, NUM_ACTORS), quiet=True)
    assert (summary.status, summary.num_committed) == ("complete", num_left), summary
    assert len(handed_out) == num_left
    first = {"first_unit_after_s": handed_out[0]} if handed_out else {}
    return {**first, "manifest": summary.manifest}


def step_status(folder: Path, num_units: int) -> dict[str, Any]:
    """Read the status."""
    status = read_status(str(folder), StorageOptions())
    assert status.num_committed == num_units
    return {"num_rows": status.num_rows}


def step_open(folder: Path, num_units: int) -> dict[str, Any]:
    """Open the dataset."""
    return {"num_rows": len(open_dataset(str(folder)))}


def step_replace(folder: Path, num_units: int) -> dict[str, Any]:
    """Encode two units again: their old statistics must be subtracted from the sums."""
    plan = make_plan(make_config(str(folder), num_units, NUM_ACTORS))
    state, listing = plan.state, plan.snapshot
    figures = {}
    for name, unit in zip(("first_manifest_s", "next_manifest_s"), plan.units[::-1], strict=False):
        receipt = make_receipt(plan.contract, unit, 1, new_attempt())
        assert plan.output.put_if_absent(receipt.path, receipt.to_bytes())
        state.add(receipt)
        began = time.perf_counter()
        state, manifest = write_next(
            state,
            plan.contract.fingerprint,
            plan.contract.stored_channels,
            lambda: listing,
            on_missing="keep",
        )
        figures[name] = time.perf_counter() - began
        assert manifest
        assert manifest.num_units == num_units
    return figures


STEPS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "imports alone": step_imports,
    "first plan": step_plan,
    f"resume, {NUM_LEFT} left": step_resume,
    "nothing to do": step_nothing,
    "status": step_status,
    "open_dataset": step_open,
    "replace a unit": step_replace,
}


def measure(name: str, folder: Path, num_units: int) -> dict[str, Any]:
    """Run a step in its own process."""
    command = [sys.executable, __file__, "--units", str(num_units), "--step", name]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return {"seconds": time.perf_counter() - began, **figures}


def _steps_text(figures: dict[str, Any]) -> str:
    parts = {name: value for name, value in figures.items() if name.endswith("_s")}
    return ", ".join(f"{name.removesuffix('_s')} {value:.1f} s" for name, value in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=200_000)
    parser.add_argument("--prepare", action="store_true", help="make the output, and no more")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = DATA / f"scale-{arguments.units}"

    if arguments.step:
        figures = STEPS[arguments.step](folder, arguments.units)
        print(json.dumps({**figures, "peak_mib": peak_mib()}))
        return
    prepare(folder, arguments.units)
    if arguments.prepare:
        return
    results = {name: measure(name, folder, arguments.units) for name in STEPS}
    print_table(
        f"{arguments.units} units, {len(list((folder / 'parts').iterdir()))} parts",
        ["seconds", "peak MiB", "of which"],
        [
            [name, f"{figures['seconds']:.1f}", f"{figures['peak_mib']:.0f}", _steps_text(figures)]
            for name, figures in results.items()
        ],
    )
    write_results("scale", {str(arguments.units): results}, ["pyarrow", "fsspec"])


if __name__ == "__main__":
    main()
