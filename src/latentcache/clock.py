"""A clock that also counts the time in which the process or the machine is suspended."""

from __future__ import annotations

import time

# macOS has no CLOCK_BOOTTIME. Its monotonic clock includes the time asleep.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_time_s() -> float:
    """Return the seconds since boot; call it as `clock.boot_time_s()`, so tests can replace it."""
    return time.clock_gettime(_CLOCK)
