"""What this package sets for a whole process: once, when a command or an actor starts.

Importing a module of this package sets nothing.
"""

from __future__ import annotations

import os
import warnings

_RAY_SETTINGS = {
    # Ray warns of a change in how actors without GPUs see them; ours ask for none or a whole one.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray reads this one when it is imported.
    "RAY_DEDUP_LOGS": "0",
    # Without it Ray prints the errors of calls whose results are not awaited after a first failure.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}


def start_process() -> None:
    """Set Ray's environment, unless it is set, and the warning filters; may be called again."""
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Pillow warns of oddities in metadata that do not touch the pixels. `catch_warnings` is not
    # thread-safe, so the filters are set for the process, and for Pillow's modules alone.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", module=r"pillow_")
