"""Fuzz one target: mutated inputs, the promise checked on each, and peak memory measured.

Run by `test_fuzz.py` with a few hundred inputs for each target, and by hand for a long run:

    python tests/fuzz/fuzz.py --inputs 100000            # all targets, 100,000 inputs each
    python tests/fuzz/fuzz.py tars --inputs 5000 --seed 7

Each target runs in a child process, so that an abort (a signal) is a finding and not the end of the
run, and so that peak memory is the target's own. The input under test is written to a file before
it is checked; a finding prints the path of its input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = Path(__file__).parent / "targets"

_WORDS = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80"]


def mutate_bytes(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Return `data` with one to eight random edits: bits, bytes, words, cuts, copies, splices."""
    edited = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        if not edited:
            break
        position, kind = rng.randrange(len(edited)), rng.randrange(8)
        if kind <= 1:
            edited[position] ^= 1 << rng.randrange(8)
        elif kind == 2:
            edited[position] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 3:
            edited[position : position + 4] = rng.choice(_WORDS)
        elif kind == 4:
            del edited[position : position + rng.randrange(1, 200)]
        elif kind == 5:
            edited[position:position] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 6:
            other = rng.choice(seeds)
            start = rng.randrange(len(other)) if other else 0
            size = rng.randrange(1, 600)
            edited[position : position + size] = other[start : start + size]
        else:
            del edited[position:]
    return bytes(edited)


@dataclass(frozen=True)
class Target:
    """One parser under test.

    Attributes:
        seeds: returns valid inputs, which are mutated. Called once with an empty folder.
        check: checks the promise for one input and returns the outcome as a short label, such as
            the reason of a reject. It catches the errors that the promise allows; every other
            exception is a finding. The folder is empty at first and may be reused.
        max_growth_mib: peak memory that all inputs together may add to the process, in MiB.
        mutate: makes an input from a seed; gets the generator, the seed, and all seeds.
    """

    seeds: Callable[[Path], list[bytes]]
    check: Callable[[bytes, Path], str]
    max_growth_mib: int
    mutate: Callable[[random.Random, bytes, Sequence[bytes]], bytes] = mutate_bytes


@dataclass
class Report:
    """What a run of one target found; `findings` are `[label, path of the input]`."""

    target: str
    num_inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, str]] = field(default_factory=list)
    growth_mib: int = 0
    max_growth_mib: int = 0

    @property
    def is_good(self) -> bool:
        """Whether no input broke a promise and memory stayed within its bound."""
        return not self.findings and self.growth_mib <= self.max_growth_mib


def all_targets() -> list[str]:
    """Return the names of all targets, which are the modules in `targets/`."""
    return sorted(path.stem for path in TARGETS.glob("*.py") if path.stem != "__init__")


def run_child(name: str, num_inputs: int, seed: int, folder: Path, timeout_s: float) -> Report:
    """Fuzz one target in a child process; a signal or a time-out is a finding.

    Args:
        name: of the target.
        num_inputs: how many inputs to try.
        seed: of the generator; the same seed gives the same inputs.
        folder: where inputs are written; those of findings stay.
        timeout_s: after which the child counts as hung.
    """
    command = [sys.executable, __file__, name, "--child", "--inputs", str(num_inputs)]
    command += ["--seed", str(seed), "--folder", str(folder)]
    current = folder / f"{name}-current"
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Report(name, findings=[(f"no end after {timeout_s:.0f} s", str(current))])
    if done.returncode:
        return Report(name, findings=[(f"exit {done.returncode}", str(current))])
    tree: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    tree["outcomes"] = Counter(tree["outcomes"])
    return Report(**tree)


def _run_here(name: str, num_inputs: int, seed: int, folder: Path) -> Report:
    target: Target = importlib.import_module(f"targets.{name}").TARGET
    scratch = folder / f"{name}-scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds(scratch)
    for data in seeds:  # imports and caches are not the inputs' doing
        target.check(data, scratch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = Report(name, max_growth_mib=target.max_growth_mib)
    current, seen = folder / f"{name}-current", set()
    for index in range(num_inputs):
        rng = random.Random(f"{name} {seed} {index}")
        data = target.mutate(rng, rng.choice(seeds), seeds)
        current.write_bytes(data)
        try:
            report.outcomes[target.check(data, scratch)] += 1
        except Exception as error:  # noqa: BLE001  (what is not allowed is the finding)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            label = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}"
            report.outcomes["FINDING"] += 1
            if (type(error), frame.filename, frame.lineno) not in seen:
                seen.add((type(error), frame.filename, frame.lineno))
                kept = folder / f"{name}-{seed}-{index}"
                kept.write_bytes(data)
                report.findings.append((label[:300], str(kept)))
        report.num_inputs += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report.growth_mib = (peak - before) // 1024
    return report


def main() -> None:
    """Fuzz the named targets, or all, and print what was found; exit 1 if anything was."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(all_targets())}; default all")
    parser.add_argument("--inputs", type=int, default=500, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for inputs; those of findings stay there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    if args.child:
        warnings.simplefilter("ignore")
        report = _run_here(args.targets[0], args.inputs, args.seed, folder)
        print(json.dumps(report.__dict__))
        return
    is_good = True
    for name in args.targets or all_targets():
        report = run_child(name, args.inputs, args.seed, folder, timeout_s=10 * 3600)
        is_good = is_good and report.is_good
        print(
            f"{name}: {report.num_inputs} inputs, {len(report.findings)} findings, peak memory "
            f"+{report.growth_mib} of {report.max_growth_mib} MiB; "
            + ", ".join(f"{label} {count}" for label, count in report.outcomes.most_common()),
            flush=True,
        )
        for label, path in report.findings:
            print(f"  {label}\n    input: {path}", flush=True)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
