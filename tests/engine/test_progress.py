"""What a run shows in a terminal."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from latentcache.engine.progress import RunProgress


@pytest.mark.parametrize("width", [60, 80, 140])
def test_narrow_terminal_shows_complete_counts(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in {"COLUMNS": str(width), "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with RunProgress(5000) as progress:
        for _ in range(12):
            progress.add_unit(SimpleNamespace(num_rows=1000, num_rejects=3))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "12/5000 units" in shown
    assert "36 rejects" in " ".join(shown.split())
