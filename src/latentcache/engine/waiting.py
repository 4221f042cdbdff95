"""Waiting for something outside, and telling the person who waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from latentcache.errors import one_line

_REMIND_EVERY_S = 60.0


def _tell(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class WaitPolicy:
    """How long to wait for GPUs, and what happens while something is waited for.

    Args:
        wait_for_gpus_s: how long a cluster may have none.
        say: tells the person one line.
        keep_alive: called about every second.
    """

    wait_for_gpus_s: float = 0.0
    say: Callable[[str], None] = _tell
    keep_alive: Callable[[], None] = lambda: None


NO_WAIT = WaitPolicy()


class Reminder:
    """Says what is waited for: at once, and then every minute."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._due_at = time.monotonic()

    def remind(self, line: str) -> None:
        """Say it, if it is time."""
        if time.monotonic() >= self._due_at:
            self._due_at = time.monotonic() + _REMIND_EVERY_S
            self._say(line)
