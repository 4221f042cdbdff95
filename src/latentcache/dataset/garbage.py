"""What no kept manifest names, and what it takes to be rid of it. Reads, and changes nothing.

A manifest that a run is about to put may name any unit that is committed, and a driver that was
frozen for days may still put a receipt. So that no clock and no lease needs to be trusted:

- A unit that is committed is undone by a `void` receipt, and a manifest tells of it, before its
  files go. Whoever decided on a manifest without knowing that finds its number taken, and reads
  everything again.
- An attempt without a receipt is shut out by a `void` receipt of its generation, for only one
  receipt of a generation is ever put.
- A segment that no manifest names is its writer's alone, and a manifest that was put after it shuts
  that writer out.

Age only saves work: what is young may belong to a run that goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain

from latentcache.dataset.manifest import MANIFESTS, Manifest, list_manifests, read_manifest
from latentcache.dataset.publish import read_published
from latentcache.dataset.receipts import COMMITS, FAILURES, read_failed_units, read_receipts
from latentcache.dataset.segments import SEGMENTS, Segment, names_of, read_segments
from latentcache.errors import DatasetError, StorageError
from latentcache.storage import ObjectInfo, Store, Upload

KINDS = {
    "attempts": "files of attempts that another one was faster than",
    "units": "files of units that no kept manifest names",
    "orphans": "files of attempts that never ended",
    "manifests": "manifests that are not kept, and their reports",
    "segments": "segments that no kept manifest names",
    "failures": "hints about units that failed a while ago",
    "temporary": "half-written files of writers that died",
}

_FILE = re.compile(r"(?:data|rejects|qa)/([0-9a-f]{32})/(\d+)-([0-9a-f]{32})[-.][^/]*")
_RECEIPT = re.compile(rf"{COMMITS}/([0-9a-f]{{32}}-\d+)\.json")
_REPORT = re.compile(r"qa/report-(\d{8})\.(?:html|json)")

Tick = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Keep:
    """What stays: manifests, and all that changed after `until`, by the store's clock.

    `last` keeps that many of the newest complete manifests, and those of `numbers`; None keeps all.
    The newest of all and the published one always stay. A complete manifest changed when the next
    one came: until then readers were given it.
    """

    until: float
    last: int | None = None
    numbers: tuple[int, ...] = ()

    def is_old(self, modified_at: float | None) -> bool:
        """Whether something is old enough to go; a store that does not say keeps it."""
        return modified_at is not None and modified_at <= self.until


@dataclass(slots=True)
class GarbagePlan:
    """What is to go, and what must be put before.

    `kept` are the numbers of the manifests that stay, `dropped` those that go. `found` holds
    objects by kind (see `KINDS`). `voids` are the receipts to put, by name, each with
    the name of the unit's receipt before it, if it has one. `known_voids` are those that lie there
    and that the newest manifest does not tell of. If `needs_manifest`, nothing may be deleted
    before a manifest after `newest` tells of both. `notes` say what could not be looked at.
    """

    newest: Manifest
    kept: list[int]
    dropped: list[Manifest]
    found: dict[str, list[ObjectInfo]] = field(default_factory=lambda: {k: [] for k in KINDS})
    uploads: list[Upload] = field(default_factory=list)
    voids: dict[str, str | None] = field(default_factory=dict)
    known_voids: set[str] = field(default_factory=set)
    needs_manifest: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def num_found(self) -> int:
        """Objects and uploads that are to go."""
        return len(self.uploads) + sum(map(len, self.found.values()))


@dataclass(slots=True)
class _Known:
    """What manifests and receipts say.

    `attempts` maps each receipt's name to the attempt that it commits, None for a void; `live` are
    those that a kept manifest names; `latest` maps units to their highest generation, and `told` to
    the highest one that the newest manifest tells of. `changed_at` has the times of the receipts
    that no kept manifest names, and `waiting` those of them that only wait for another part of
    their source, at which a run failed not long ago.
    """

    attempts: dict[str, str | None] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    latest: dict[str, int] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    changed_at: dict[str, float | None] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)

    def is_void(self, name: str) -> bool:
        return name in self.attempts and self.attempts[name] is None


def plan_garbage(store: Store, keep: Keep, tick: Tick = lambda: None) -> GarbagePlan:
    """Find what no kept manifest names.

    Args:
        store: the output.
        keep: what stays whatever names it.
        tick: called for every object that is looked at.

    Raises:
        DatasetError: there is no manifest, one that is to be kept is not there, or one or a segment
            or a receipt is damaged.
    """
    manifests, dropped = _choose(store, keep)
    newest = manifests[-1]
    known = _read_known(store, manifests, keep, tick)
    plan = GarbagePlan(newest, [manifest.number for manifest in manifests], dropped)
    plan.known_voids = {n for n, a in known.attempts.items() if a is None}.difference(
        newest.removed
    )
    _find_files(store, plan, known, keep, tick)
    _find_manifests(store, plan)
    _find_segments(store, plan, manifests, keep)
    plan.found["failures"] = [i for i in store.iterate(FAILURES) if keep.is_old(i.modified_at)]
    plan.found["temporary"] = [i for i in store.temp_files() if keep.is_old(i.modified_at)]
    try:
        plan.uploads = [u for u in store.list_uploads() if keep.is_old(u.started_at)]
    except StorageError as error:
        plan.notes.append(f"multipart uploads stay: {error}")
    plan.needs_manifest |= bool(plan.voids)
    for infos in plan.found.values():
        infos.sort(key=lambda info: info.path)
    return plan


def _choose(store: Store, keep: Keep) -> tuple[list[Manifest], list[Manifest]]:
    """Read the manifests that stay, oldest first, and the others."""
    listed = {info.path: info for info in store.list(MANIFESTS)}
    numbers = list_manifests(store)
    if not numbers:
        raise DatasetError(f"{store.url} has no manifest: nothing says yet what counts")
    published = read_published(store)
    always = {numbers[-1], *keep.numbers, *([published.manifest] if published else [])}
    kept: list[Manifest] = []
    dropped: list[Manifest] = []
    num_left = len(numbers) if keep.last is None else keep.last
    if unknown := set(keep.numbers).difference(numbers):
        read_manifest(store, min(unknown))  # says what there is
    later: Manifest | None = None  # the next one, if it is kept
    is_long_past = False  # whether readers have been given a newer one since before `keep.until`
    for number in reversed(numbers):
        manifest = read_manifest(store, number)
        info = listed.get(manifest.path)
        is_repeated = later is not None and _is_repeated(manifest, later)
        is_last = num_left > 0 and not is_repeated and (manifest.complete or keep.last is None)
        num_left -= is_last
        is_old = info is not None and keep.is_old(info.modified_at)
        is_past = is_long_past if manifest.complete else is_old
        is_long_past |= manifest.complete and is_old
        if is_repeated or is_last or not is_past or number in always:
            kept.append(manifest)
            later = manifest
        else:
            dropped.append(manifest)
            later = None
    return kept[::-1], dropped


def _is_repeated(manifest: Manifest, later: Manifest) -> bool:
    """Whether a manifest says no more than that some receipts are void: those of `gc` do.

    The two are one to whoever counts how many are kept.
    """
    fields = ("segments", "stale", "complete", "num_units")
    return set(manifest.removed) <= set(later.removed) and all(
        getattr(manifest, name) == getattr(later, name) for name in fields
    )


def _read_known(store: Store, manifests: Sequence[Manifest], keep: Keep, tick: Tick) -> _Known:
    known = _Known()
    _read_named(store, manifests, known, tick)
    unread = []
    for info in store.iterate(COMMITS):
        if match := _RECEIPT.fullmatch(info.path):
            if match[1] not in known.live:
                known.changed_at[match[1]] = info.modified_at
            if match[1] not in known.attempts:
                unread.append(match[1])
        tick()
    hints = [i.path for i in store.iterate(FAILURES) if not keep.is_old(i.modified_at)]
    failing = {(unit.source, unit.version) for unit in read_failed_units(store, hints)}
    for name, receipt in zip(unread, read_receipts(store, unread), strict=True):
        record = receipt.record
        known.attempts[name] = record.attempt if receipt.state == "rows" else None
        if (record.unit.source, record.unit.version) in failing:
            known.waiting.add(name)
    _take_highest(known.latest, known.attempts)
    return known


def _read_named(store: Store, manifests: Sequence[Manifest], known: _Known, tick: Tick) -> None:
    """Take in what the kept manifests say."""
    segments: dict[Segment, AbstractSet[str]] = {}
    uncounted: AbstractSet[str] | None = None
    for manifest in reversed(manifests):
        removed = frozenset(manifest.removed)
        # What counts in none of the manifests from here on: those after it name its segments too.
        uncounted = removed if uncounted is None else uncounted & removed
        for segment in manifest.segments:
            segments[segment] = uncounted
    newest = manifests[-1]
    columns = ("unit", "generation", "attempt")
    tables = read_segments(store, segments, "a kept manifest", columns)
    for (segment, gone), table in zip(segments.items(), tables, strict=True):
        names = names_of(table).to_pylist()
        known.attempts.update(zip(names, table["attempt"].to_pylist(), strict=True))
        known.live.update(name for name in names if name not in gone)
        if segment in newest.segments:
            _take_highest(known.told, names)
        tick()
    _take_highest(known.told, newest.removed)
    for name in newest.removed:
        known.attempts.setdefault(name, None)


def _split(name: str) -> tuple[str, int]:
    unit, _, generation = name.rpartition("-")
    return unit, int(generation)


def _take_highest(generations: dict[str, int], names: Iterable[str]) -> None:
    for unit, generation in map(_split, names):
        generations[unit] = max(generation, generations.get(unit, -1))


def _give_up(plan: GarbagePlan, known: _Known, keep: Keep, at_work: AbstractSet[str]) -> set[str]:
    """Choose the receipts whose rows no reader can want; a unit's last one is to be undone first.

    One that was followed by another is given up only if that is certain to stay: if it lies in the
    newest manifest, or is a void that the next one will tell of. One listing of the receipts that
    lacks the latter must not bring it back.
    """
    old = set()
    for name, changed_at in known.changed_at.items():
        unit, generation = _split(name)
        if (
            keep.is_old(changed_at)
            and name not in known.waiting
            and not known.is_void(name)
            and f"{unit}-{generation + 1}" not in at_work
        ):
            old.add(name)
    given_up = set()
    for name in old:
        unit, generation = _split(name)
        last = f"{unit}-{known.latest[unit]}"
        if generation < known.told.get(unit, -1) or last in old or known.is_void(last):
            given_up.add(name)
        if last == name:
            plan.voids[f"{unit}-{generation + 1}"] = name
    return given_up


def _find_files(store: Store, plan: GarbagePlan, known: _Known, keep: Keep, tick: Tick) -> None:
    unnamed: dict[str, list[ObjectInfo]] = {}  # of a receipt that no kept manifest names
    uncommitted: dict[str, list[ObjectInfo]] = {}  # of a receipt that there is not
    for info in chain.from_iterable(store.iterate(folder) for folder in ("data", "rejects", "qa")):
        tick()
        match = _FILE.fullmatch(info.path)
        if not match:
            continue
        name, attempt = f"{match[1]}-{int(match[2])}", match[3]
        if name not in known.attempts:
            uncommitted.setdefault(name, []).append(info)
        elif known.attempts[name] != attempt:
            plan.found["attempts"].append(info)
        elif name not in known.live:
            unnamed.setdefault(name, []).append(info)
    at_work = {
        name
        for name, infos in uncommitted.items()
        if not all(keep.is_old(info.modified_at) for info in infos)
    }
    given_up = _give_up(plan, known, keep, at_work)
    for name in given_up & unnamed.keys():
        unit, generation = _split(name)
        plan.found["units"] += unnamed[name]
        plan.needs_manifest |= known.told.get(unit, -1) <= generation
    for name in uncommitted.keys() - at_work:
        unit, generation = _split(name)
        last = f"{unit}-{known.latest[unit]}" if unit in known.latest else None
        # Rows that count stay as they are: a void after them would have them encoded again.
        is_over = last is None or known.is_void(last) or last in given_up
        if is_over and generation == known.latest.get(unit, -1) + 1:
            plan.voids[name] = last
            plan.found["orphans"] += uncommitted[name]


def _find_manifests(store: Store, plan: GarbagePlan) -> None:
    gone = {manifest.path for manifest in plan.dropped}
    plan.found["manifests"] += [info for info in store.list(MANIFESTS) if info.path in gone]
    for info in store.list("qa"):
        match = _REPORT.fullmatch(info.path)
        # A number that is gone already was deleted by a `gc` that was killed.
        if match and int(match[1]) < plan.newest.number and int(match[1]) not in plan.kept:
            plan.found["manifests"].append(info)


def _find_segments(
    store: Store, plan: GarbagePlan, manifests: Sequence[Manifest], keep: Keep
) -> None:
    named = {segment.path for manifest in manifests for segment in manifest.segments}
    newest_at = store.info(plan.newest.path).modified_at
    for info in store.iterate(SEGMENTS):
        if info.path not in named and keep.is_old(info.modified_at):
            plan.found["segments"].append(info)
            is_shut_out = newest_at and info.modified_at and info.modified_at < newest_at
            plan.needs_manifest |= not is_shut_out
