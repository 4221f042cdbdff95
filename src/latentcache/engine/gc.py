"""Garbage collection: delete what no kept manifest names; `dataset/garbage.py` says what that is.

It may be killed anywhere and run again. Receipts are never deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from latentcache.dataset.contract import Contract, require_contract
from latentcache.dataset.garbage import KINDS, GarbagePlan, Keep, plan_garbage
from latentcache.dataset.manifest import put_manifest
from latentcache.dataset.publish import read_published
from latentcache.dataset.receipts import Receipt, Unit, read_receipts, void_receipt
from latentcache.engine.lease import RUNS, Lease, active_runs
from latentcache.errors import ConfigError, IncompleteRun
from latentcache.storage import ObjectInfo, Store, Upload
from latentcache.storage_options import StorageOptions

DEFAULT_AGE_DAYS = 7.0

_DAY_S = 86400.0

# How often it begins anew because somebody committed something in the meantime.
_MAX_TRIES = 5

_THREADS = 16

Progress = Callable[[str, int, int | None], object]
"""Told what is done, of how many objects, of how many in all (None: not known yet)."""


@dataclass(frozen=True, slots=True)
class GarbageObject:
    """An object that nothing names."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """What `collect_garbage` found, and deleted if `is_deleted`.

    `found` holds objects by kind, `uploads` multipart uploads that were never ended. `kept` are the
    numbers of the manifests that stay; `voided` names the receipts put first, and `manifest` is the
    number of the manifest that tells of them, None where there was no need for one. `notes` say
    what could not be looked at.
    """

    url: str
    is_deleted: bool
    kept: list[int]
    voided: list[str]
    manifest: int | None
    found: dict[str, list[GarbageObject]]
    uploads: list[Upload]
    notes: list[str]

    @property
    def num_objects(self) -> int:
        """Objects of all kinds."""
        return sum(map(len, self.found.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of all kinds; what uploads take, no store tells."""
        return sum(found.size_bytes for objects in self.found.values() for found in objects)


def collect_garbage(
    url: str | os.PathLike[str],
    *,
    delete: bool = False,
    keep_last: int | None = None,
    keep: Sequence[int] = (),
    older_than_days: float = DEFAULT_AGE_DAYS,
    storage: StorageOptions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Garbage:
    """Find what no kept manifest of a dataset names, and delete it if told to.

    Args:
        url: the dataset.
        delete: False changes nothing.
        keep_last: keep this many of the newest complete manifests, the newest one, the published
            one, and those that are not old yet; None keeps all manifests.
        keep: numbers of further manifests to keep.
        older_than_days: by the store's clock; what is younger stays, but for files of attempts that
            another one was faster than.
        storage: how to reach the store.
        progress: see `Progress`.

    Raises:
        ConfigError: `keep` without `keep_last`, or a number below its least.
        DatasetError: there is no dataset or no manifest, or one that is kept is damaged.
        IncompleteRun: a run is at work, or has come in between again and again.
    """
    if keep and keep_last is None:
        raise ConfigError("all manifests are kept: --keep adds to --keep-last")
    if older_than_days < 0 or (keep_last is not None and keep_last < 1):
        raise ConfigError("--older-than-days is at least 0, --keep-last at least 1")
    store = Store(url, storage or StorageOptions())
    contract = require_contract(store)
    now = store.now()
    terms = Keep(now - older_than_days * _DAY_S, keep_last, tuple(keep))
    with ExitStack() as stack:
        lease = stack.enter_context(Lease(store, 0)) if delete else None
        if lease:
            _require_alone(store, lease)
        collector = _Collector(store, contract, lease, progress)
        if not delete:
            return collector.summary(collector.plan(terms), None)
        for _ in range(_MAX_TRIES):
            plan = collector.plan(terms)
            manifest = collector.settle(plan)
            if manifest is not None and collector.delete_manifests(plan):
                collector.delete_rest(plan)
                return collector.summary(plan, manifest)
    raise IncompleteRun(f"others write to {store.url} all the time: try again when no run is")


def _require_alone(store: Store, lease: Lease) -> None:
    for other in active_runs(store):
        if other.run != lease.run:
            raise IncompleteRun(
                f"another run is at work on {store.url}, {other}: wait for it, or delete "
                f"{store.url_of(f'{RUNS}/{other.run}.json')} if it died"
            )


class _Collector:
    """One collection: its plan, what is put first, and the deleting."""

    def __init__(
        self, store: Store, contract: Contract, lease: Lease | None, progress: Progress
    ) -> None:
        self._store = store
        self._contract = contract
        self._lease = lease
        self._progress = progress
        self._num_done = 0

    def plan(self, keep: Keep) -> GarbagePlan:
        """Look at everything."""
        self._num_done = 0
        return plan_garbage(self._store, keep, lambda: self._step("looking", 1, None))

    def _step(self, what: str, num: int, total: int | None) -> None:
        self._num_done += num
        self._progress(what, self._num_done, total)
        if self._lease:
            self._lease.renew()

    def settle(self, plan: GarbagePlan) -> int | None:
        """Put what must be there before anything is deleted.

        Returns:
            The number of the newest manifest then; None if somebody was faster, so that the plan is
            void.
        """
        manifest = plan.newest
        if plan.needs_manifest:
            if not self._put_voids(plan):
                return None
            removed = {*manifest.removed, *plan.known_voids, *plan.voids}
            manifest = replace(
                manifest,
                number=manifest.number + 1,
                created_at=datetime.now(UTC).isoformat(),
                removed=tuple(sorted(removed)),
            )
            if not put_manifest(self._store, manifest):
                return None
        published = read_published(self._store)
        is_kept = published is None or published.manifest in (*plan.kept, manifest.number)
        return manifest.number if is_kept else None

    def _put_voids(self, plan: GarbagePlan) -> bool:
        """Undo units, and shut out attempts; False if some got a receipt in the meantime."""
        befores = [name for name in plan.voids.values() if name]
        receipts = dict(zip(befores, read_receipts(self._store, befores), strict=True))

        def put(name: str, before: str | None) -> bool:
            void = receipts[before].voided() if before else self._first_void(name)
            assert void.record.name == name
            return self._store.put_if_absent(void.path, void.to_bytes())

        with ThreadPoolExecutor(_THREADS) as pool:
            return all(list(pool.map(put, plan.voids.keys(), plan.voids.values())))

    def _first_void(self, name: str) -> Receipt:
        """Shut out attempts at a unit of which only the id is known."""
        unit_id, _, generation = name.rpartition("-")
        unit = Unit(unit_id, source="", size_bytes=0, version="")
        contract = self._contract
        return void_receipt(unit, int(generation), contract.fingerprint, contract.stored_channels)

    def delete_manifests(self, plan: GarbagePlan) -> bool:
        """Delete manifests, before anything that they name.

        Returns:
            False if one of them was published in that moment. `publish` looks whether a manifest
            is there after it wrote the pointer, and this looks at the pointer afterwards: one of
            the two sees the other. It is put back then, and the plan is void.
        """
        self._num_done = 0
        self._delete(plan, plan.found["manifests"])
        published = read_published(self._store)
        for manifest in plan.dropped:
            if published and published.manifest == manifest.number:
                self._store.put_if_absent(manifest.path, manifest.to_bytes())
                return False
        return True

    def delete_rest(self, plan: GarbagePlan) -> None:
        """Delete all else."""
        for kind in KINDS.keys() - {"manifests"}:
            self._delete(plan, plan.found[kind])
        for upload in plan.uploads:
            self._store.abort_upload(upload)
            self._step("deleting", 1, plan.num_found)

    def _delete(self, plan: GarbagePlan, objects: Sequence[ObjectInfo]) -> None:
        paths = [info.path for info in objects]
        self._store.delete_many(paths, lambda num: self._step("deleting", num, plan.num_found))

    def summary(self, plan: GarbagePlan, manifest: int | None) -> Garbage:
        """Say what was found; `manifest` is what `settle` gave."""
        is_new = manifest is not None and manifest > plan.newest.number
        return Garbage(
            url=self._store.url,
            is_deleted=manifest is not None,
            kept=[*plan.kept, manifest] if manifest and is_new else plan.kept,
            voided=sorted(plan.voids),
            manifest=manifest if is_new else None,
            found={
                kind: [GarbageObject(info.path, info.size_bytes) for info in infos]
                for kind, infos in plan.found.items()
            },
            uploads=plan.uploads,
            notes=plan.notes,
        )
