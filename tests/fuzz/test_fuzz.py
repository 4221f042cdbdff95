"""Every parser of foreign bytes keeps its promise on mutated inputs, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import all_targets, run_child

pytestmark = pytest.mark.slow

NUM_INPUTS = 500


@pytest.mark.parametrize("name", all_targets())
def test_mutated_inputs_break_no_promise(name: str, tmp_path: Path) -> None:
    report = run_child(name, NUM_INPUTS, seed=0, folder=tmp_path, timeout_s=600)
    assert not report.findings
    assert report.num_inputs == NUM_INPUTS
    assert len(report.outcomes) > 1, "all inputs had one outcome: the mutations reach nothing"
    assert report.growth_mib <= report.max_growth_mib
