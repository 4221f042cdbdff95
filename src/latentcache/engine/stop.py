"""A wish to end early, and the signals that become one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """A wish to end early: no more units are handed out, and those in hand get until `deadline`.

    `deadline` is in seconds of `time.monotonic`; None lets them finish.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None

    def request(self, reason: str, grace_s: float | None = None) -> None:
        """Ask for the end; a second wish may only bring it nearer. Safe in a signal handler."""
        self.reason = self.reason or reason
        if grace_s is not None:
            wanted = time.monotonic() + grace_s
            self.deadline = min(self.deadline or wanted, wanted)

    @property
    def is_over(self) -> bool:
        """Whether the units in hand are to be given up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@contextmanager
def stop_on_signals(
    stop: StopSignal, grace_s: float, on_first: Callable[[], None]
) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a wish to end; Ray sets its own handlers before.

    Args:
        stop: told of the wish.
        grace_s: what the first signal leaves to what is in hand; a second one leaves nothing.
        on_first: called once, to tell the person.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        again = stop.reason is not None
        stop.request("interrupted", grace_s=0.0 if again else grace_s)
        if not again:
            on_first()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
