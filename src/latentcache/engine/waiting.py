"""Waiting for external resources, with messages for the user."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from latentcache.errors import one_line

_REMIND_EVERY_S = 60.0


def _print_line(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


class WaitPolicy(NamedTuple):
    """How many seconds a cluster may have no GPU, and what to call during a wait.

    `say` shows a line to the user; `keep_alive` is called each second, such as to renew a lease.
    """

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
