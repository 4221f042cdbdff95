"""Leases and failure hints: whatever they hold, the run counts as active and no reader fails."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz import Target
from latentcache.dataset.receipts import read_failures
from latentcache.engine.lease import active_runs
from latentcache.storage import Store
from tiny import mutate_json

_UNIT = "a" * 32
_HINT = f"failures/{_UNIT}-{'b' * 32}.json"


def _seeds(folder: Path) -> list[bytes]:
    lease = {
        "run": "x",
        "host": "elsewhere",
        "pid": 7,
        "num_units": 3,
        "num_total": 4,
        "num_committed": 1,
        "renewed_at": "2026-01-01T00:00:00+00:00",
    }
    unit = {"id": _UNIT, "source": "s.tar", "size_bytes": 1, "version": "1", "range": None}
    hint = {"unit": unit, "attempt": "b" * 32, "message": "no room"}
    return [json.dumps(tree).encode() for tree in (lease, hint)]


def _check(data: bytes, folder: Path) -> str:
    store = Store(str(folder))
    store.put("runs/x.json", data)
    store.put(_HINT, data)
    (run,) = active_runs(store)
    assert run.run == "x"
    assert run.host.isprintable()
    str(run)
    messages = read_failures(store, [_HINT])
    assert messages.keys() <= {_UNIT}
    return f"{'lease' if run.host else 'unknown run'}, {len(messages)} hints"


TARGET = Target(_seeds, _check, max_growth_mib=60, mutate=mutate_json)
