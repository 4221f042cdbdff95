"""Waits of the driver, with messages for the user, and requests to stop a run early."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from latentcache.errors import one_line

_REMIND_EVERY_S = 60.0


def _print_line(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


class WaitPolicy(NamedTuple):
    """How long to wait for a GPU; `keep_alive` is called each second, `say` shows a line."""

    wait_for_gpus_s: float = 0.0
    say: Callable[[str], None] = _print_line
    keep_alive: Callable[[], None] = lambda: None


NO_WAIT = WaitPolicy()


class Reminder:
    """A message about a wait, shown at once and then every minute."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._due_at = time.monotonic()

    def remind(self, line: str) -> None:
        """Show a line if a minute has passed since the last one."""
        if time.monotonic() >= self._due_at:
            self._due_at = time.monotonic() + _REMIND_EVERY_S
            self._say(line)


class StopSignal:
    """A request to stop a run early; `reason` is None until there is one.

    After it, no more units are dispatched, and those in progress may run until `deadline`, in
    seconds of `time.monotonic`; None lets them finish.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None

    def request(self, reason: str, grace_s: float | None = None) -> None:
        """Request a stop; a second request can only make the deadline earlier. Signal-safe.

        Args:
            reason, grace_s: the status of the run, and the seconds until the deadline.
        """
        self.reason = self.reason or reason
        if grace_s is not None:
            deadline = time.monotonic() + grace_s
            self.deadline = min(self.deadline or deadline, deadline)

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed, so that units in progress are abandoned."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@contextmanager
def stop_on_signals(
    stop: StopSignal, grace_s: float, on_first: Callable[[], None]
) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a stop request inside the context; main thread only.

    Enter it after Ray has started, because Ray sets handlers of its own.

    Args:
        stop, grace_s, on_first: the first signal gives `grace_s` and calls `on_first`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        is_first = stop.reason is None
        stop.request("interrupted", grace_s=grace_s if is_first else 0.0)
        if is_first:
            on_first()

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
