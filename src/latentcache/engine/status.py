"""How far a dataset is: read from its manifest, receipts, failures and leases alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentcache.dataset.bottleneck import Loads
from latentcache.dataset.contract import read_contract
from latentcache.dataset.manifest import list_manifests
from latentcache.dataset.publish import read_published
from latentcache.dataset.receipts import UnitSummary, read_failures, read_receipts
from latentcache.dataset.state import State
from latentcache.engine.lease import RunInfo, active_runs
from latentcache.errors import DatasetError
from latentcache.storage import StorageOptions, Store

# Receipts that are read to tell the bottleneck: the latest.
_NUM_RECEIPTS = 64


@dataclass(frozen=True, slots=True)
class Status:
    """Totals over all committed units, named by a manifest or not.

    `num_units` are the units that have left a trace, or those of a run at work if they are more;
    `failed` maps the ids of units that were given up, and not committed since, to why.
    `bottleneck` is the stage that held the latest units up, and what would help. `published` is the
    number of the published manifest.
    """

    num_units: int
    num_committed: int
    num_rows: int
    num_rejects: int
    manifests: list[int]
    complete: bool
    failed: dict[str, str]
    active_runs: list[RunInfo]
    bottleneck: str | None
    published: int | None


def read_status(url: str, options: StorageOptions) -> Status:
    """Read the status of an output.

    Raises:
        DatasetError: nothing has been written there yet.
    """
    store = Store(url, options)
    if read_contract(store) is None:
        raise DatasetError(f"{store.url} is not a latent dataset: it has no contract.json")
    state = State(store)
    # Units that a manifest has dropped are history; those outside it are not in it yet.
    seen = {unit.unit_id for units in state.live.values() for unit in units} | state.outside.keys()
    committed = [unit for unit_id in seen if (unit := state.current(unit_id))]
    failed = {u: why for u, why in read_failures(store).items() if not state.current(u)}
    runs = active_runs(store)
    published = read_published(store)
    return Status(
        num_units=max(len(seen | failed.keys()), *(run.num_units for run in runs), 0),
        num_committed=len(committed),
        num_rows=sum(unit.num_rows for unit in committed),
        num_rejects=sum(unit.num_rejects for unit in committed),
        manifests=list_manifests(store),
        complete=bool(state.manifest and state.manifest.complete),
        failed=failed,
        active_runs=runs,
        bottleneck=_bottleneck(store, committed),
        published=published.manifest if published else None,
    )


def _bottleneck(store: Store, committed: list[UnitSummary]) -> str | None:
    # Segments are in the order of their writing; what is in none yet came last.
    in_order = sorted(committed, key=lambda u: math.inf if u.segment is None else u.segment)
    loads = Loads()
    for receipt in read_receipts(store, [unit.name for unit in in_order[-_NUM_RECEIPTS:]]):
        loads.add_receipt(receipt.stages)
    return str(loads.bottleneck) if loads.bottleneck else None
