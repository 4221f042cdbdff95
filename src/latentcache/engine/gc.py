"""Delete the objects that no kept manifest and no valid receipt refers to, or list them (dry run).

A deleted object is never referred to again, not even by a driver that was frozen and resumes:

- A unit that the newest manifest has in `removed`, or at a higher generation, never counts again. A
  driver with an older manifest finds the number of its next manifest taken, and reads everything
  again.
- A driver puts a receipt or a manifest within a day of the upload of the files that it names, or
  not at all (`PUT_WITHIN_S`). So no later object names a file that is two days old and unnamed.

`gc` lists files first, and then reads the receipts that may name them, each by its name. An
incomplete listing therefore only keeps objects. `gc` may be killed at any point and run again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain

from latentcache.dataset.contract import require_contract
from latentcache.dataset.manifest import MANIFESTS, Manifest, list_manifests, read_manifest
from latentcache.dataset.manifest_parts import PARTS, ManifestPart, names_of, read_parts
from latentcache.dataset.publish import read_published
from latentcache.dataset.receipts import COMMITS, FAILURES, read_receipts
from latentcache.engine.lease import Lease
from latentcache.errors import ConfigError, DatasetError, IncompleteRun, StorageError
from latentcache.storage import ObjectInfo, Store, Upload
from latentcache.storage_options import StorageOptions

DEFAULT_AGE_DAYS = 7.0

# A driver may put a receipt up to a day after an upload (`PUT_WITHIN_S`). The second day is margin.
MIN_AGE_DAYS = 2.0

# Kinds of objects in the order of their deletion: an object goes before the objects that it names.
KINDS = {
    "manifests": "manifests that are not kept",
    "reports": "QA reports on manifests that are not kept",
    "receipts": "receipts of superseded units that no kept manifest names",
    "files": "data, reject and QA files of lost attempts and superseded units",
    "parts": "parts that no kept manifest names",
    "failures": "old records of units that failed",
    "temporary": "incomplete files of writers that died",
}

_DAY_S = 86400.0

# Objects to delete, or receipts to read, between two checks of the lease.
_BATCH = 1000

_FILE = re.compile(r"(?:data|rejects|qa)/([0-9a-f]{32})/(0|[1-9]\d*)-([0-9a-f]{32})[-.][^/]*")
_REPORT = re.compile(r"qa/report-(\d{8})\.(?:html|json)")
_RECEIPT = re.compile(rf"{COMMITS}/([0-9a-f]{{32}}-(?:0|[1-9]\d*))\.json")

Progress = Callable[[str, int, int | None], object]
"""Called with the activity, the number of objects done, and their total (None: not known yet)."""


@dataclass(frozen=True, slots=True)
class Unreferenced:
    """The objects that `collect_unreferenced` listed, and deleted if `is_deleted`.

    `kept` are the numbers of the kept manifests. `objects` holds the objects by kind (see `KINDS`).
    `uploads` are multipart uploads that were never completed. `notes` name what could not be
    listed.
    """

    url: str
    is_deleted: bool
    kept: list[int]
    objects: dict[str, list[ObjectInfo]]
    uploads: list[Upload]
    notes: list[str]

    @property
    def num_objects(self) -> int:
        """The number of objects of all kinds."""
        return sum(map(len, self.objects.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects, without uploads, whose sizes no store reports."""
        return sum(info.size_bytes for info in chain.from_iterable(self.objects.values()))


def collect_unreferenced(
    url: str | os.PathLike[str],
    *,
    delete: bool = False,
    keep_last: int | None = None,
    keep: Sequence[int] = (),
    older_than_days: float = DEFAULT_AGE_DAYS,
    storage: StorageOptions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Unreferenced:
    """List the objects of a dataset that nothing refers to; delete them if `delete` is set.

    Args:
        url: the URL of the dataset.
        delete: delete the objects; False changes nothing.
        keep_last: keep this many of the newest complete manifests, and also the newest manifest,
            the published one, and those that are not old yet; None keeps all manifests.
        keep: numbers of further manifests to keep.
        older_than_days: keep objects younger than this many days by the store's clock; at least 2.
        storage: the options of the store.
        progress: see `Progress`.

    Returns:
        The listed objects.

    Raises:
        ConfigError: `keep` without `keep_last`, or a number below its minimum.
        DatasetError: there is no dataset or no manifest, or a kept manifest is damaged.
        IncompleteRun: a run or another `gc` is active, or the lease of this `gc` expired.
    """
    if keep and keep_last is None:
        raise ConfigError("--keep needs --keep-last, without which all manifests are kept")
    if keep_last is not None and keep_last < 1:
        raise ConfigError(f"--keep-last is {keep_last}, but must be at least 1")
    if not older_than_days >= MIN_AGE_DAYS:
        raise ConfigError(
            f"--older-than-days is {older_than_days:g}, but must be at least {MIN_AGE_DAYS:g}: a "
            "run may put the receipt of a file up to a day after its upload"
        )
    store = Store(url, storage or StorageOptions())
    require_contract(store)
    until = store.now() - older_than_days * _DAY_S
    with ExitStack() as stack:
        lease = stack.enter_context(Lease(store, 0, is_gc=True)) if delete else None
        if lease:
            lease.require_exclusive()
        collector = _Collector(store, lease, until, progress)
        plan = collector.plan(keep_last, frozenset(keep))
        while delete and not collector.delete(plan):
            plan = collector.plan(keep_last, frozenset(keep))
    kept = [manifest.number for manifest in plan.kept]
    return Unreferenced(store.url, delete, kept, plan.objects, plan.uploads, plan.notes)


@dataclass(slots=True)
class _Plan:
    """The kept manifests, oldest first, the expired ones, and the objects to delete by kind."""

    kept: list[Manifest] = field(default_factory=list)
    expired: list[Manifest] = field(default_factory=list)
    objects: dict[str, list[ObjectInfo]] = field(default_factory=lambda: {k: [] for k in KINDS})
    uploads: list[Upload] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Units:
    """The attempts and generations of units in manifests.

    `attempts` maps the units (`<unit>-<generation>`) that count in a kept manifest to the attempt
    that encoded them. `generations` maps unit ids to the highest generation in the newest manifest,
    including removed units.
    """

    attempts: dict[str, str] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)

    def may_come(self, name: str) -> bool:
        """Return whether a later manifest may name this unit, if the unit has a receipt."""
        unit, _, generation = name.rpartition("-")
        return int(generation) > self.generations.get(unit, -1)


class _Collector:
    """One garbage collection: lists unreferenced objects and deletes them.

    Args:
        store: the output.
        lease: the lease of this `gc`; None for a dry run.
        until: keep objects that changed after this time, in seconds of the store's clock.
        progress: see `Progress`.
    """

    def __init__(self, store: Store, lease: Lease | None, until: float, progress: Progress) -> None:
        self._store = store
        self._lease = lease
        self._until = until
        self._progress = progress
        self._num_done = 0

    def plan(self, keep_last: int | None, keep: AbstractSet[int]) -> _Plan:
        """List the objects that nothing refers to.

        Args:
            keep_last: how many of the newest complete manifests to keep; None keeps all.
            keep: numbers of further manifests to keep.
        """
        self._num_done = 0
        plan = self._choose_manifests(keep_last, keep)
        units = self._read_units(plan.kept)
        self._list_files(plan, units)
        for info in self._list_old(COMMITS):
            match = _RECEIPT.fullmatch(info.path)
            if match and match[1] not in units.attempts and not units.may_come(match[1]):
                plan.objects["receipts"].append(info)
        named = {part.path for manifest in plan.kept for part in manifest.parts}
        plan.objects["parts"] = [i for i in self._list_old(PARTS) if i.path not in named]
        plan.objects["failures"] = list(self._list_old(FAILURES))
        plan.objects["temporary"] = [i for i in self._store.temp_files() if self._is_old(i)]
        try:
            uploads = self._store.list_uploads()
            plan.uploads = [upload for upload in uploads if upload.started_at <= self._until]
        except StorageError as error:
            plan.notes.append(f"multipart uploads are kept: {error}")
        for infos in plan.objects.values():
            infos.sort(key=lambda info: info.path)
        return plan

    def _choose_manifests(self, keep_last: int | None, keep: AbstractSet[int]) -> _Plan:
        """Choose the kept manifests.

        A complete manifest is old if the next complete one is old, because readers opened it until
        then.
        """
        listed = {info.path: info for info in self._store.list(MANIFESTS)}
        numbers = list_manifests(self._store)
        if not numbers:
            raise DatasetError(
                f"{self._store.url} has no manifest, so what is referenced is unknown: run "
                "`latentcache run` first"
            )
        if unknown := keep - set(numbers):
            read_manifest(self._store, min(unknown))  # raises, and names the existing ones
        published = read_published(self._store)
        always = {numbers[-1], *keep, *([published.manifest] if published else [])}
        plan = _Plan()
        num_left = len(numbers) if keep_last is None else keep_last
        is_superseded = False  # by a complete manifest that is itself old
        for number in reversed(numbers):
            manifest = read_manifest(self._store, number)
            is_last = num_left > 0 and (manifest.complete or keep_last is None)
            num_left -= is_last
            info = listed.get(manifest.path)
            is_old = info is not None and self._is_old(info)
            is_past = is_superseded if manifest.complete else is_old
            is_superseded |= manifest.complete and is_old
            if info is None or is_last or not is_past or number in always:
                plan.kept.insert(0, manifest)
            else:
                plan.expired.append(manifest)
                plan.objects["manifests"].append(info)
        return plan

    def _read_units(self, kept: Sequence[Manifest]) -> _Units:
        """Read the units of the kept manifests, which are ordered oldest first."""
        units, newest = _Units(), kept[-1]
        parts: dict[ManifestPart, AbstractSet[str]] = {}  # with the units removed in all manifests
        removed: AbstractSet[str] = frozenset(newest.removed)
        for manifest in reversed(kept):
            removed &= frozenset(manifest.removed)
            parts |= dict.fromkeys(manifest.parts, removed)
        columns = ("unit", "generation", "attempt")
        tables = read_parts(self._store, parts, "a kept manifest", columns)
        known = [newest.removed]
        for (part, dropped), table in zip(parts.items(), tables, strict=True):
            names = names_of(table).to_pylist()
            attempts = zip(names, table["attempt"].to_pylist(), strict=True)
            units.attempts.update((name, by) for name, by in attempts if name not in dropped)
            if part in newest.parts:
                known.append(names)
            self._step("listing", 1)
        for name in chain.from_iterable(known):
            unit, _, generation = name.rpartition("-")
            units.generations[unit] = max(int(generation), units.generations.get(unit, -1))
        return units

    def _list_files(self, plan: _Plan, units: _Units) -> None:
        """List files that no unit refers to, and reports on manifests that are not kept."""
        open_files: dict[str, list[tuple[str, ObjectInfo]]] = {}  # by receipt name
        numbers = {manifest.number for manifest in plan.kept}
        for info in chain.from_iterable(map(self._list_old, ("data", "rejects", "qa"))):
            if report := _REPORT.fullmatch(info.path):
                if int(report[1]) < plan.kept[-1].number and int(report[1]) not in numbers:
                    plan.objects["reports"].append(info)
            elif match := _FILE.fullmatch(info.path):
                name, attempt = f"{match[1]}-{match[2]}", match[3]
                if units.attempts.get(name) == attempt:
                    continue
                if units.may_come(name):
                    open_files.setdefault(name, []).append((attempt, info))
                else:
                    plan.objects["files"].append(info)
        names = list(open_files)
        for first in range(0, len(names), _BATCH):
            batch = names[first : first + _BATCH]
            receipts = read_receipts(self._store, batch, missing_ok=True)
            committed = {receipt.record.name: receipt.record.attempt for receipt in receipts}
            for name in batch:
                lost = (info for made, info in open_files[name] if made != committed.get(name))
                plan.objects["files"] += lost
            self._step("listing", len(batch))

    def _list_old(self, folder: str) -> Iterator[ObjectInfo]:
        for info in self._store.iterate(folder):
            self._step("listing", 1)
            if self._is_old(info):
                yield info

    def _is_old(self, info: ObjectInfo) -> bool:
        """Return whether an object is old enough to delete; False if its age is unknown."""
        return info.modified_at is not None and info.modified_at <= self._until

    def delete(self, plan: _Plan) -> bool:
        """Delete the listed objects.

        `publish` writes the pointer and then checks that its manifest exists. This function deletes
        manifests and then checks the pointer. So at least one of the two sees the other.

        Returns:
            False if an expired manifest was published meanwhile: the manifest is put back, and
            nothing further is deleted.
        """
        self._num_done = 0
        num_objects = len(plan.uploads) + sum(map(len, plan.objects.values()))
        for kind in KINDS:
            infos = plan.objects[kind]
            for first in range(0, len(infos), _BATCH):
                self._step("deleting", 0, num_objects)
                paths = [info.path for info in infos[first : first + _BATCH]]
                self._store.delete_many(paths)
                self._step("deleting", len(paths), num_objects)
            published = read_published(self._store) if kind == "manifests" else None
            for manifest in plan.expired:
                if published and published.manifest == manifest.number:
                    self._store.put_if_absent(manifest.path, manifest.to_bytes())
                    return False
        for upload in plan.uploads:
            self._store.abort_upload(upload)
            self._step("deleting", 1, num_objects)
        return True

    def _step(self, what: str, num_done: int, total: int | None = None) -> None:
        """Report progress and renew the lease.

        Raises:
            IncompleteRun: the lease expired while this process was frozen, so a run may be active.
        """
        self._num_done += num_done
        self._progress(what, self._num_done, total)
        if self._lease:
            if not self._lease.is_fresh:
                raise IncompleteRun("stopped: the lease of gc expired; run gc again")
            self._lease.renew()
