"""Leases: how runs and `gc` on one output see each other. Advisory; receipts decide what counts.

A lease counts for ten minutes after its last renewal by the store's clock, which is that of all
drivers; no host's own clock is asked where it matters. A run and `gc` exclude each other: each
writes its lease before it looks for that of the other, so that at least one sees the other. Then
`gc` stops, and the run waits.
"""

from __future__ import annotations

import json
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
from latentcache.engine.stop import StopSignal, stop_on_signals
from latentcache.engine.waiting import Reminder
from latentcache.errors import IncompleteRun, ObjectNotFound
from latentcache.storage import Store

RUNS = "runs"
RENEW_EVERY_S = 60.0
STALE_AFTER_S = 600.0

# How often somebody who waits looks whether the others have ended, and heeds a wish to end.
_LOOK_EVERY_S = 5.0
_HEED_EVERY_S = 0.2

_GC_PREFIX = "gc-"

# Leases of this process. A container that is started again has its host's name and process id
# again.
_ours: set[str] = set()


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run, or `gc`, that holds a lease; `age_s` is since its last renewal, by the store's clock.

    A run has `num_units` to encode, and leaves an output of `num_total`, those there before
    included. Of a lease that cannot be parsed, `host` is empty and all numbers are 0.
    """

    run: str
    host: str
    pid: int
    num_units: int
    num_total: int
    num_committed: int
    age_s: float

    @property
    def is_gc(self) -> bool:
        """Whether it is `gc`, not a run."""
        return self.run.startswith(_GC_PREFIX)

    def __str__(self) -> str:
        """Return who it is."""
        if not self.host:
            return f"whose lease cannot be read, renewed {self.age_s:.0f} s ago"
        return f"pid {self.pid} on {self.host}, which renewed its lease {self.age_s:.0f} s ago"


class Lease:
    """The lease of this run, or of this `gc`, renewed while it works and deleted when it ends.

    Args:
        store: the output.
        num_units: how many units the run will encode.
        num_total: how many the output will have then; 0 if it does not grow.
        is_gc: whether it is that of `gc`.
    """

    def __init__(
        self, store: Store, num_units: int, num_total: int = 0, *, is_gc: bool = False
    ) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.run = f"{_GC_PREFIX if is_gc else ''}{started}-{secrets.token_hex(4)}"
        self._store = store
        self._num_units = num_units
        self._num_total = num_total
        self._path = f"{RUNS}/{self.run}.json"
        self._renew_at = 0.0
        self._renewed_at = 0.0
        self.num_committed = 0

    def __enter__(self) -> Lease:
        _ours.add(self.run)
        self.renew()
        return self

    def __exit__(self, *_: object) -> None:
        _ours.discard(self.run)
        self._store.delete(self._path)

    def renew(self) -> None:
        """Write the lease again if a minute has passed."""
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + RENEW_EVERY_S
        renewed_at = clock.boot_time_s()
        tree = {
            "run": self.run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "num_units": self._num_units,
            "num_total": self._num_total,
            "num_committed": self.num_committed,
            "renewed_at": datetime.now(UTC).isoformat(),
        }
        self._store.put(self._path, json.dumps(tree).encode())
        self._renewed_at = renewed_at

    @property
    def is_fresh(self) -> bool:
        """Whether the last renewal is less than half the time ago after which a lease is stale."""
        return clock.boot_time_s() - self._renewed_at < STALE_AFTER_S / 2

    def others(self) -> list[RunInfo]:
        """List the other runs at work on the output, oldest first."""
        return [run for run in active_runs(self._store) if run.run != self.run]

    def require_exclusive(self) -> None:
        """Refuse to run `gc` beside anybody.

        Raises:
            IncompleteRun: a run, or another `gc`, holds a lease under ten minutes old.
        """
        for other in active_leases(self._store):
            if other.run != self.run:
                lease = self._store.url_of(f"{RUNS}/{other.run}.json")
                raise IncompleteRun(
                    f"{'another gc' if other.is_gc else 'a run'} is at work on {self._store.url}, "
                    f"{other}: wait for it to end, or delete {lease} if it died"
                )

    def wait_for_gc(self, stop: StopSignal, say: Callable[[str], None]) -> None:
        """Wait until no `gc` is at work on the output; renew the lease meanwhile.

        Args:
            stop: a wish to end ends the waiting.
            say: shows a line to the person.
        """

        def active_gcs() -> list[RunInfo]:
            self.renew()
            return [lease for lease in active_leases(self._store) if lease.is_gc]

        _wait_while(active_gcs, "waiting for gc to end: {}", stop, say)

    def require_alone(self) -> None:
        """Refuse to work beside another driver, on a store that cannot tell who was first.

        Any other lease counts: of two drivers that see each other's, neither can know whether the
        other looked before. Started at the very same moment, both refuse.

        Raises:
            IncompleteRun: another run holds a lease under ten minutes old.
        """
        for other in self.others():
            lease = self._store.url_of(f"{RUNS}/{other.run}.json")
            raise IncompleteRun(
                f"{self._store.url} has no conditional writes, so one run at a time, and "
                f"another is at work, {other}: wait for it (`compute.on_busy: wait`), or "
                f"delete {lease} if it died"
            )


def stand_aside(
    store: Store, on_busy: Literal["skip", "wait"], stop: StopSignal, say: Callable[[str], None]
) -> None:
    """Leave the output to the run at work there: wish to end, or wait until it has ended.

    Who looks first and takes his lease then leaves a moment in which two may both find the output
    free; they join, which is safe. The other way round, both might stand aside.

    Args:
        store: the output.
        on_busy: `skip` or `wait`.
        stop: told `skipped`; a wish to end ends the waiting.
        say: tells the person.
    """
    if on_busy == "skip":
        stop.request("skipped")
        say(f"skipped: another run is at work on {store.url} (compute.on_busy)")
        return
    text = "waiting for another run to end: {} (compute.on_busy)"
    _wait_while(lambda: active_runs(store), text, stop, say)


def _wait_while(
    list_others: Callable[[], list[RunInfo]],
    text: str,
    stop: StopSignal,
    say: Callable[[str], None],
) -> None:
    """Wait until there are no others; say now and then who the first of them is."""
    reminder = Reminder(say)
    with stop_on_signals(stop, 0.0, lambda: say("stopping")):
        while not stop.reason and (others := list_others()):
            reminder.remind(text.format(others[0]))
            look_again_at = time.monotonic() + _LOOK_EVERY_S
            while not stop.reason and time.monotonic() < look_again_at:
                time.sleep(_HEED_EVERY_S)


@dataclass(frozen=True, slots=True)
class _LeaseFile:
    """What readers take from a lease; releases may write more fields."""

    host: Annotated[str, Pattern(r"[\x21-\x7e]{1,255}")]
    pid: Annotated[int, Range(1, 2**31 - 1)]
    num_units: Count
    num_total: Count
    num_committed: Count


def active_runs(store: Store) -> list[RunInfo]:
    """List the runs at work on an output, as `active_leases` does, without `gc`."""
    return [lease for lease in active_leases(store) if not lease.is_gc]


def active_leases(store: Store) -> list[RunInfo]:
    """List the leases of runs and of `gc`, oldest first, but for dead processes of this host.

    A lease that cannot be parsed is one of a run at work, until it is ten minutes old.
    """
    leases = store.list(RUNS)
    now = store.now() if leases else 0.0
    found = []
    for info in leases:
        try:
            data = store.read_bytes(info.path)
        except ObjectNotFound:
            continue  # it ended between the listing and now
        name = info.path.removeprefix(f"{RUNS}/").removesuffix(".json")
        run = _parse(name, data, now - (info.modified_at or 0.0))
        if run.age_s < STALE_AFTER_S and not _died_here(run):
            found.append(run)
    return sorted(found, key=lambda run: run.run)


def _parse(name: str, data: bytes, age_s: float) -> RunInfo:
    try:
        lease = build(_LeaseFile, load_json(data), ignore_unknown=True)
    except ValueError:
        return RunInfo(name, "", 0, 0, 0, 0, age_s)
    return RunInfo(
        run=name,
        host=lease.host,
        pid=lease.pid,
        num_units=lease.num_units,
        num_total=lease.num_total,
        num_committed=lease.num_committed,
        age_s=age_s,
    )


def _died_here(run: RunInfo) -> bool:
    if run.host != socket.gethostname():
        return False
    return run.run not in _ours if run.pid == os.getpid() else not _is_running(run.pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
