"""Leases, by which runs and `gc` on one output detect each other.

Leases are advisory; receipts decide which rows exist. The store's clock, which all drivers share,
measures the age of a lease. A run and `gc` exclude each other: each writes its lease before it
looks for the other's, so at least one sees the other. Then `gc` stops, and a run waits.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal

from latentcache import clock
from latentcache.dataset.parse import Count, Pattern, Range, build, load_json
from latentcache.engine.waiting import Reminder, StopSignal, stop_on_signals
from latentcache.errors import IncompleteRun, ObjectNotFound
from latentcache.storage import Store

# The folder of leases. One is valid for `STALE_AFTER_S` after its last renewal.
RUNS = "runs"
RENEW_EVERY_S = 60.0
STALE_AFTER_S = 600.0

# Intervals of a waiting process: between two listings of the leases, and between two checks of the
# stop signal.
_LIST_EVERY_S = 5.0
_CHECK_STOP_EVERY_S = 0.2

_GC_PREFIX = "gc-"

# Leases of this process. A restarted container may have the host name and process id of the one
# before, so these do not identify a lease.
_ours: set[str] = set()


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run, or a `gc`, that holds a lease; `host` is empty if the lease cannot be parsed.

    The run encodes `num_units` units, and the output has `num_total` afterwards, 0 if it does not
    grow. `age_s` is the time since the last renewal in seconds, by the store's clock.
    """

    run: str
    host: Annotated[str, Pattern(r"[\x21-\x7e]{1,255}")]
    pid: Annotated[int, Range(1, 2**31 - 1)]
    num_units: Count
    num_total: Count
    num_committed: Count
    age_s: float

    @property
    def is_gc(self) -> bool:
        """Whether the holder is a `gc`, not a run."""
        return self.run.startswith(_GC_PREFIX)

    def __str__(self) -> str:
        if not self.host:
            return f"whose lease cannot be read, renewed {self.age_s:.0f} s ago"
        return f"pid {self.pid} on {self.host}, which renewed its lease {self.age_s:.0f} s ago"


class Lease:
    """The lease of this run or `gc`: renewed while it is active, deleted when it ends."""

    def __init__(
        self, store: Store, num_units: int, num_total: int = 0, *, is_gc: bool = False
    ) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.run = f"{_GC_PREFIX if is_gc else ''}{started}-{secrets.token_hex(4)}"
        self.num_committed = 0
        self._counts = {"num_units": num_units, "num_total": num_total}
        self._store = store
        self._path = f"{RUNS}/{self.run}.json"
        self._renewed_at = -math.inf

    def __enter__(self) -> Lease:
        _ours.add(self.run)
        self.renew()
        return self

    def __exit__(self, *_: object) -> None:
        _ours.discard(self.run)
        self._store.delete(self._path)

    def renew(self) -> None:
        """Write the lease again if a minute has passed since the last time."""
        now = clock.boot_time_s()
        if now - self._renewed_at < RENEW_EVERY_S:
            return
        tree = {
            "run": self.run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self._counts,
            "num_committed": self.num_committed,
            "renewed_at": datetime.now(UTC).isoformat(),
        }
        self._store.put(self._path, json.dumps(tree).encode())
        self._renewed_at = now

    @property
    def is_fresh(self) -> bool:
        """Whether the last renewal is younger than half of `STALE_AFTER_S`."""
        return clock.boot_time_s() - self._renewed_at < STALE_AFTER_S / 2

    def others(self) -> list[RunInfo]:
        """Return the other active runs of the output, oldest first."""
        return [run for run in active_runs(self._store) if run.run != self.run]

    def require_exclusive(self) -> None:
        """Raise `IncompleteRun` if a run or another `gc` is active on the output."""
        for other in active_leases(self._store):
            if other.run != self.run:
                raise IncompleteRun(
                    f"{'another gc' if other.is_gc else 'a run'} is active on {self._store.url}, "
                    f"{other}: wait until it ends, or delete {self._url_of(other)} if it died"
                )

    def require_alone(self) -> None:
        """Raise `IncompleteRun` if another run is active; two that start at once both refuse."""
        for other in self.others():
            raise IncompleteRun(
                f"{self._store.url} has no conditional writes, so it allows one run at a time, and "
                f"another run is active, {other}: wait for it (`compute.on_busy: wait`), or "
                f"delete {self._url_of(other)} if it died"
            )

    def _url_of(self, other: RunInfo) -> str:
        return self._store.url_of(f"{RUNS}/{other.run}.json")

    def wait_for_gc(self, stop: StopSignal, say: Callable[[str], None]) -> None:
        """Wait until no `gc` is active on the output; renew the lease meanwhile.

        Args:
            stop, say: a reason in `stop` ends the wait; `say` shows a line to the user.
        """

        def active_gcs() -> list[RunInfo]:
            self.renew()
            return [lease for lease in active_leases(self._store) if lease.is_gc]

        _wait_while(active_gcs, "waiting for gc to end: {}", stop, say)


def wait_for_other_runs(
    store: Store, on_busy: Literal["skip", "wait"], stop: StopSignal, say: Callable[[str], None]
) -> None:
    """Wait until no run is active on an output, or request a stop if `on_busy` is `skip`.

    A run calls this before it takes its lease. Two runs may therefore both see a free output, and
    then join each other, which is safe. With the lease taken first, both might leave.

    Args:
        store, on_busy, stop, say: as in `Lease.wait_for_gc`; `stop` gets the reason `skipped`.
    """
    if on_busy == "skip":
        stop.request("skipped")
        say(f"skipped: another run is active on {store.url} (compute.on_busy)")
        return
    text = "waiting for another run to end: {} (compute.on_busy)"
    _wait_while(lambda: active_runs(store), text, stop, say)


def _wait_while(
    list_others: Callable[[], list[RunInfo]],
    text: str,
    stop: StopSignal,
    say: Callable[[str], None],
) -> None:
    """Wait until `list_others` returns nothing; show its first entry every minute."""
    reminder = Reminder(say)
    with stop_on_signals(stop, 0.0, lambda: say("stopping")):
        while not stop.reason and (others := list_others()):
            reminder.remind(text.format(others[0]))
            list_again_at = time.monotonic() + _LIST_EVERY_S
            while not stop.reason and time.monotonic() < list_again_at:
                time.sleep(_CHECK_STOP_EVERY_S)


def active_runs(store: Store) -> list[RunInfo]:
    """Return the active runs of an output; see `active_leases`."""
    return [lease for lease in active_leases(store) if not lease.is_gc]


def active_leases(store: Store) -> list[RunInfo]:
    """Return the valid leases of runs and of `gc`, oldest first, without dead ones of this host."""
    infos = store.list(RUNS)
    now = store.now() if infos else 0.0
    active = []
    for info in infos:
        try:
            data = store.read_bytes(info.path)
        except ObjectNotFound:
            continue  # its holder ended after the listing
        name = info.path.removeprefix(f"{RUNS}/").removesuffix(".json")
        age_s = now - (info.modified_at or 0.0)
        try:
            tree = load_json(data) | {"run": name, "age_s": age_s}
            run = build(RunInfo, tree, ignore_unknown=True)  # other releases may write more fields
        except (TypeError, ValueError):  # `|` refuses a tree that is not an object
            run = RunInfo(name, "", 0, 0, 0, 0, age_s)
        if run.age_s < STALE_AFTER_S and not _died_here(run):
            active.append(run)
    return sorted(active, key=lambda run: run.run)


def _died_here(run: RunInfo) -> bool:
    if run.host != socket.gethostname():
        return False
    if run.pid == os.getpid():
        return run.run not in _ours
    try:
        os.kill(run.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is a process of another user
        pass
    return False
