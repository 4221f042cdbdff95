"""The settings of the whole process, made when a command or an actor starts, not on import."""

from __future__ import annotations

import os
import warnings

_RAY_SETTINGS = {
    # Silences Ray's warning that actors with zero GPUs will see them differently. The actors of
    # this package request no GPU or a whole one.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray reads this variable at import.
    "RAY_DEDUP_LOGS": "0",
    # Without it Ray prints the errors of calls whose results are not awaited after a first failure.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}


def start_process() -> None:
    """Set the warning filters, and Ray's variables that are not set; a second call does nothing."""
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Pillow warns of oddities in metadata that do not affect the pixels. `catch_warnings` is not
    # thread-safe, so the filters apply to the process, and only to the modules of Pillow.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", module=r"pillow_")
