"""The documents name what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
GUARANTEES = (TESTS.parent / "docs" / "guarantees.md").read_text()


def test_every_guarantee_names_tests_that_exist():
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| Promise", "| ---"))]
    assert len(promises) > 20
    for promise in promises:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", promise)
        assert named, promise
        for file, name in named:
            tree = ast.parse((TESTS / file).read_text())
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in tests, f"{file} has no test {name}"


def test_the_config_reference_is_up_to_date():
    script = TESTS.parent / "scripts" / "config_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
