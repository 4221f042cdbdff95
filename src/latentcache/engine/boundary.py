"""The unit boundary: an error inside a unit becomes the failure of that unit alone."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from latentcache.dataset.receipts import Receipt, read_receipts
from latentcache.engine.job import UnitFailure, UnitTask
from latentcache.errors import (
    AccessDenied,
    ConfigError,
    DiskFull,
    FieldMissing,
    LatentCacheError,
    SourceChanged,
    StorageError,
    one_line,
)
from latentcache.storage import Store

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
    except SourceChanged as error:
        return UnitFailure(str(error), changed=True)
    except (DiskFull, ConfigError) as error:
        return UnitFailure(str(error), fatal=error)
    except LatentCacheError as error:
        return UnitFailure(
            str(error),
            denied=isinstance(error, AccessDenied),
            lacks_field=isinstance(error, FieldMissing),
        )
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001  (the unit boundary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = DiskFull("no room left on the local disk (TMPDIR)")
            return UnitFailure(str(full), fatal=full)
        lines = map(one_line, traceback.format_exc().splitlines())
        print("\n".join(lines), file=sys.stderr)
        return UnitFailure(one_line(f"{task.unit.title}: {type(error).__name__}: {error}"))


def committed_receipt(output: Store, task: UnitTask) -> Receipt | None:
    """Return the receipt that another run has put for a task; None if there is none.

    A store error also returns None: the unit is then encoded for nothing, but no row is lost.

    Args:
        output: the store of the dataset.
        task: the unit; a trial (`max_samples`) has no receipt.
    """
    if task.max_samples is not None:
        return None
    try:
        (receipt,) = read_receipts(output, [f"{task.unit.id}-{task.generation}"])
    except StorageError:
        return None
    return receipt
