"""Delete the objects that no kept manifest and no valid receipt refers to, or list them (dry run).

A deleted object is never referred to again, not even by a driver that was frozen and resumes. A
unit that the newest manifest has in `removed`, or at a higher generation, never counts again: a
driver with an older manifest finds the number of its next one taken, and reads everything again.
And a driver puts a receipt or a manifest within a day of the upload of the files that it names, or
not at all (`PUT_WITHIN_S`), so no later object names a file that is two days old and unnamed.

`gc` lists files before it reads the receipts that may name them, each by its name. An incomplete
listing therefore only keeps objects. `gc` may be killed at any point and run again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise

from latentcache.dataset.contract import require_contract
from latentcache.dataset.manifest import MANIFESTS, Manifest, list_manifests, read_manifest
from latentcache.dataset.manifest_parts import PARTS, ManifestPart, names_of, read_parts
from latentcache.dataset.publish import read_published
from latentcache.dataset.receipts import COMMITS, FAILURES, read_receipts
from latentcache.engine.lease import Lease
from latentcache.errors import ConfigError, DatasetError, IncompleteRun, StorageError
from latentcache.storage import ObjectInfo, Store, Upload
from latentcache.storage_options import StorageOptions

# A driver may put a receipt up to a day after an upload (`PUT_WITHIN_S`). The second day is margin.
_MIN_AGE_DAYS = 2.0

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

# Objects to delete, or receipts to read, between two checks of the lease.
_BATCH = 1000

_FILE = re.compile(r"(?:data|rejects|qa)/([0-9a-f]{32})/(0|[1-9]\d*)-([0-9a-f]{32})[-.][^/]*")
_REPORT = re.compile(r"qa/report-(\d{8})\.(?:html|json)")
_RECEIPT = re.compile(rf"{COMMITS}/([0-9a-f]{{32}}-(?:0|[1-9]\d*))\.json")

# Called with the activity, the number of objects done, and their total (None: not known yet).
Progress = Callable[[str, int, int | None], object]


@dataclass(frozen=True, slots=True)
class Unreferenced:
    """What `collect_unreferenced` listed, and deleted if `is_deleted`: `objects` by kind (`KINDS`).

    `kept` are numbers of manifests, `uploads` incomplete ones, and `notes` on what is not listed.
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
    older_than_days: float = 7.0,
    storage: StorageOptions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Unreferenced:
    """List the objects of a dataset that nothing refers to; delete them if `delete` is set.

    Args:
        url, delete, storage, progress: for `progress` see `Progress`.
        keep_last: keep this many of the newest complete manifests, and also the newest manifest,
            the published one, and those that are not old yet; None keeps all manifests.
        keep: numbers of further manifests to keep.
        older_than_days: keep objects younger than this many days by the store's clock; at least 2.

    Raises:
        ConfigError: `keep` without `keep_last`, or a number below its minimum.
        DatasetError: there is no dataset or no manifest, or a kept manifest is damaged.
        IncompleteRun: a run or another `gc` is active, or the lease of this `gc` expired.
    """
    if keep and keep_last is None:
        raise ConfigError("--keep needs --keep-last, without which all manifests are kept")
    if keep_last is not None and keep_last < 1:
        raise ConfigError(f"--keep-last is {keep_last}, but must be at least 1")
    if not older_than_days >= _MIN_AGE_DAYS:
        raise ConfigError(
            f"--older-than-days is {older_than_days:g}, but must be at least {_MIN_AGE_DAYS:g}: a "
            "run may put the receipt of a file up to a day after its upload"
        )
    store = Store(url, storage or StorageOptions())
    require_contract(store)
    until = store.now() - older_than_days * 86400
    with Lease(store, 0, is_gc=True) if delete else nullcontext() as lease:
        if lease:
            lease.require_exclusive()
        while True:
            collector = _Collector(store, lease, until, progress)
            collector.plan(keep_last, frozenset(keep))
            if not delete or collector.delete():
                break
    return Unreferenced(
        url=store.url,
        is_deleted=delete,
        kept=[manifest.number for manifest in collector.kept],
        objects=collector.objects,
        uploads=collector.uploads,
        notes=collector.notes,
    )


class _Collector:
    """One garbage collection; objects that changed after `until`, by the store's clock, stay."""

    def __init__(self, store: Store, lease: Lease | None, until: float, progress: Progress) -> None:
        self._store, self._lease, self._until, self._progress = store, lease, until, progress
        self._num_done = 0
        self.kept: list[Manifest] = []  # oldest first
        self._expired: list[Manifest] = []
        self.objects: dict[str, list[ObjectInfo]] = {kind: [] for kind in KINDS}
        self.uploads: list[Upload] = []
        self.notes: list[str] = []
        # By `<unit>-<generation>`, for units that count in a kept manifest.
        self._attempts: dict[str, str] = {}
        # The highest ones in the newest manifest by unit id, removed units included.
        self._generations: dict[str, int] = {}

    def plan(self, keep_last: int | None, keep: AbstractSet[int]) -> None:
        """Choose the kept manifests, and list the objects that nothing refers to.

        Args:
            keep_last, keep: see `collect_unreferenced`.
        """
        infos = {info.path: info for info in self._store.list(MANIFESTS)}
        numbers = list_manifests(self._store)
        if not numbers:
            raise DatasetError(
                f"{self._store.url} has no manifest, so what is referenced is unknown: run "
                "`latentcache run` first"
            )
        if unknown := keep - set(numbers):
            read_manifest(self._store, min(unknown))  # raises, and names the existing ones
        published = read_published(self._store)
        manifests = [read_manifest(self._store, number) for number in numbers]
        young = {m.number for m in manifests if not self._is_old(infos.get(m.path))}
        complete = [manifest.number for manifest in manifests if manifest.complete]
        kept = {numbers[-1], *keep, *young, *([published.manifest] if published else [])}
        kept.update(numbers if keep_last is None else complete[-keep_last:])
        # Readers opened a complete manifest until the next one was written.
        kept.update(number for number, after in pairwise(complete) if after in young)
        self.kept = [manifest for manifest in manifests if manifest.number in kept]
        self._expired = [manifest for manifest in manifests if manifest.number not in kept]
        self.objects["manifests"] = [infos[manifest.path] for manifest in self._expired]
        self._read_units()
        self._list_files()
        for info in self._list_old(COMMITS):
            match = _RECEIPT.fullmatch(info.path)
            if match and match[1] not in self._attempts and not self._may_count(match[1]):
                self.objects["receipts"].append(info)
        named = {part.path for manifest in self.kept for part in manifest.parts}
        self.objects["parts"] = [i for i in self._list_old(PARTS) if i.path not in named]
        self.objects["failures"] = list(self._list_old(FAILURES))
        self.objects["temporary"] = [i for i in self._store.temp_files() if self._is_old(i)]
        try:
            uploads = self._store.list_uploads()
            self.uploads = [upload for upload in uploads if upload.started_at <= self._until]
        except StorageError as error:
            self.notes.append(f"multipart uploads are kept: {error}")
        for objects in self.objects.values():
            objects.sort(key=lambda info: info.path)

    def _read_units(self) -> None:
        """Read the units of the kept manifests."""
        parts: dict[ManifestPart, AbstractSet[str]] = {}  # with the units removed in all manifests
        newest = self.kept[-1]
        removed: AbstractSet[str] = frozenset(newest.removed)
        for manifest in reversed(self.kept):
            removed &= frozenset(manifest.removed)
            parts |= dict.fromkeys(manifest.parts, removed)
        columns = ("unit", "generation", "attempt")
        tables = read_parts(self._store, parts, "a kept manifest", columns)
        known = list(newest.removed)
        for (part, dropped), table in zip(parts.items(), tables, strict=True):
            names = names_of(table).to_pylist()
            attempts = zip(names, table["attempt"].to_pylist(), strict=True)
            self._attempts.update((name, by) for name, by in attempts if name not in dropped)
            known += names if part in newest.parts else []
            self._step("listing", 1)
        for name in known:
            unit, _, generation = name.rpartition("-")
            self._generations[unit] = max(int(generation), self._generations.get(unit, -1))

    def _may_count(self, name: str) -> bool:
        """Return whether a later manifest may name this unit, if the unit has a receipt."""
        unit, _, generation = name.rpartition("-")
        return int(generation) > self._generations.get(unit, -1)

    def _list_files(self) -> None:
        """List files that no unit refers to, and reports on manifests that are not kept."""
        open_files: dict[str, list[tuple[str, ObjectInfo]]] = {}  # by the receipt that may name it
        numbers = {manifest.number for manifest in self.kept}
        for info in chain.from_iterable(map(self._list_old, ("data", "rejects", "qa"))):
            if report := _REPORT.fullmatch(info.path):
                if int(report[1]) < self.kept[-1].number and int(report[1]) not in numbers:
                    self.objects["reports"].append(info)
            elif match := _FILE.fullmatch(info.path):
                name, attempt = f"{match[1]}-{match[2]}", match[3]
                if self._attempts.get(name) == attempt:
                    continue
                if self._may_count(name):
                    open_files.setdefault(name, []).append((attempt, info))
                else:
                    self.objects["files"].append(info)
        open_names = list(open_files)
        for first in range(0, len(open_names), _BATCH):
            names = open_names[first : first + _BATCH]
            receipts = read_receipts(self._store, names, missing_ok=True)
            committed = {receipt.record.name: receipt.record.attempt for receipt in receipts}
            for name in names:
                lost = (info for made, info in open_files[name] if made != committed.get(name))
                self.objects["files"] += lost
            self._step("listing", len(names))

    def _list_old(self, folder: str) -> Iterator[ObjectInfo]:
        for info in self._store.iterate(folder):
            self._step("listing", 1)
            if self._is_old(info):
                yield info

    def _is_old(self, info: ObjectInfo | None) -> bool:
        modified_at = info.modified_at if info else None
        return modified_at is not None and modified_at <= self._until

    def delete(self) -> bool:
        """Delete the listed objects, unless an expired manifest was published meanwhile.

        `publish` writes the pointer and then checks that its manifest exists. This function deletes
        manifests and then checks the pointer. So at least one of the two sees the other. Then it
        puts the manifest back, deletes nothing further, and returns False.
        """
        self._num_done = 0
        num_objects = len(self.uploads) + sum(map(len, self.objects.values()))
        for kind in KINDS:
            for first in range(0, len(self.objects[kind]), _BATCH):
                self._step("deleting", 0, num_objects)
                paths = [info.path for info in self.objects[kind][first : first + _BATCH]]
                self._store.delete_many(paths)
                self._step("deleting", len(paths), num_objects)
            published = read_published(self._store) if kind == "manifests" else None
            for manifest in self._expired:
                if published and published.manifest == manifest.number:
                    self._store.put_if_absent(manifest.path, manifest.to_bytes())
                    return False
        for upload in self.uploads:
            self._store.abort_upload(upload)
            self._step("deleting", 1, num_objects)
        return True

    def _step(self, what: str, num_done: int, total: int | None = None) -> None:
        """Report progress and renew the lease; raise if the lease expired while gc was frozen."""
        self._num_done += num_done
        self._progress(what, self._num_done, total)
        if self._lease:
            if not self._lease.is_fresh:
                raise IncompleteRun("stopped: the lease of gc expired; run gc again")
            self._lease.renew()
