"""The unit boundary: an error inside a unit becomes the failure of that unit alone."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from latentcache.engine.job import UnitFailure, UnitTask
from latentcache.errors import (
    AccessDenied,
    ConfigError,
    DiskFull,
    FieldMissing,
    LatentCacheError,
    SourceChanged,
    one_line,
)

R = TypeVar("R")


def at_boundary(task: UnitTask, run: Callable[[], R]) -> R | UnitFailure:
    """Return the result of `run`, or the failure of the unit if `run` raises.

    Args:
        task: the unit, for messages.
        run: encodes or rewrites the unit.

    Raises:
        torch.AcceleratorError: the GPU is lost, which is not the fault of the unit.
    """
    try:
        return run()
    except LatentCacheError as error:
        return UnitFailure(
            str(error),
            changed=isinstance(error, SourceChanged),
            denied=isinstance(error, AccessDenied),
            fatal=error if isinstance(error, DiskFull | ConfigError) else None,
            lacks_field=isinstance(error, FieldMissing),
        )
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001  (the unit boundary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = DiskFull("no room left on the local disk (TMPDIR)")
            return UnitFailure(str(full), fatal=full)
        print("\n".join(map(one_line, traceback.format_exc().splitlines())), file=sys.stderr)
        return UnitFailure(one_line(f"{task.unit.title}: {type(error).__name__}: {error}"))
