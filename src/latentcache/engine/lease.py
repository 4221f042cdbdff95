"""Leases: how drivers on one output see each other. Advisory; receipts decide what is committed."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from latentcache.errors import IncompleteRun, ObjectNotFound
from latentcache.storage import Store

RUNS = "runs"
RENEW_EVERY_S = 60.0
STALE_AFTER_S = 600.0


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run that holds a lease; `age_s` is since its last renewal, by the store's clock."""

    run: str
    host: str
    pid: int
    num_units: int
    num_committed: int
    age_s: float


class Lease:
    """This driver's lease on an output, renewed while it works and deleted when it ends.

    Args:
        store: the output.
        num_units: how many units the run will encode.
    """

    def __init__(self, store: Store, num_units: int) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.run = f"{started}-{secrets.token_hex(4)}"
        self._store = store
        self._num_units = num_units
        self._path = f"{RUNS}/{self.run}.json"
        self._renew_at = 0.0
        self.num_committed = 0

    def __enter__(self) -> Lease:
        self.renew()
        return self

    def __exit__(self, *_: object) -> None:
        self._store.delete(self._path)

    def renew(self) -> None:
        """Write the lease again if a minute has passed."""
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + RENEW_EVERY_S
        tree = {
            "run": self.run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "num_units": self._num_units,
            "num_committed": self.num_committed,
            "renewed_at": datetime.now(UTC).isoformat(),
        }
        self._store.put(self._path, json.dumps(tree).encode())

    def require_alone(self) -> None:
        """Refuse to work beside another driver, on a store that cannot tell who was first.

        Any other lease counts: of two drivers that see each other's, neither can know whether the
        other looked before. Started at the very same moment, both refuse.

        Raises:
            IncompleteRun: another run holds a lease under ten minutes old.
        """
        # This lease was written a moment ago, so its time is the store's own.
        now = self._store.info(self._path).modified_at or time.time()
        for other in active_runs(self._store, now):
            if other.run != self.run:
                lease = self._store.url_of(f"{RUNS}/{other.run}.json")
                raise IncompleteRun(
                    f"{self._store.url} has no conditional writes, so one run at a time, and "
                    f"pid {other.pid} on {other.host} renewed its lease {other.age_s:.0f} s ago: "
                    f"wait for it, or delete {lease} if it died"
                )


def active_runs(store: Store, now: float | None = None) -> list[RunInfo]:
    """List the runs that hold a lease, oldest first, but for dead processes of this host.

    Args:
        store: the output.
        now: seconds since 1970 by the store's clock; None takes this host's.
    """
    now = time.time() if now is None else now
    found = []
    for info in store.list(RUNS):
        try:
            tree: dict[str, Any] = json.loads(store.read_bytes(info.path))
        except ObjectNotFound:
            continue  # it ended between the listing and now
        age_s = now - (info.modified_at or 0.0)
        died_here = tree["host"] == socket.gethostname() and not _is_running(tree["pid"])
        if age_s < STALE_AFTER_S and not died_here:
            tree.pop("renewed_at")
            found.append(RunInfo(**tree, age_s=age_s))
    return sorted(found, key=lambda run: run.run)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
