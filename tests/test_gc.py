"""Garbage collection over any history: what a kept manifest names stays, and all else goes.

The histories are made of events in two ages, eight days ago and now; the files are a few bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache import collect_garbage, publish, verify
from latentcache.dataset import state as state_module
from latentcache.dataset.contract import establish_contract
from latentcache.dataset.manifest import list_manifests, read_manifest, read_records
from latentcache.dataset.publish import PUBLISHED_PATH
from latentcache.dataset.receipts import (
    DataFile,
    QaFile,
    Receipt,
    Unit,
    UnitRecord,
    list_failures,
    list_receipt_names,
    new_attempt,
    put_failure,
    read_failures,
)
from latentcache.dataset.segments import put_segment
from latentcache.dataset.state import State, write_next
from latentcache.dataset.statistics import Statistics
from latentcache.engine.gc import Garbage
from latentcache.engine.lease import Lease
from latentcache.errors import ConfigError, DatasetError, IncompleteRun
from latentcache.storage import ObjectInfo, Store
from makers import make_contract, tree_digest

CONTRACT = make_contract()
DAY_S = 86400.0
SOURCES = ["a.tar", "b.tar", "c.tar"]
FOLDERS = ("data", "rejects", "qa")


class World:
    """An output, the source it was made of, and what was done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(str(folder))
        self.url = str(folder)
        self.listed = dict.fromkeys(SOURCES, "v1")
        self.receipts: dict[str, list[str | None]] = {}  # unit id -> attempt by generation
        establish_contract(self.store, CONTRACT, {})

    def unit(self, source: str) -> Unit:
        return Unit.of(source, 10, self.listed[source], CONTRACT.fingerprint)

    def upload(self, unit: Unit, generation: int) -> UnitRecord:
        """What an actor leaves before the driver puts its receipt."""
        attempt = new_attempt()
        stem = f"{unit.id}/{generation}-{attempt}"
        paths = [f"data/{stem}-8x8.parquet", f"rejects/{stem}.parquet", f"qa/{stem}.parquet"]
        for path in paths:
            self.store.put(path, b"some")
        buckets = ("8x8", "", "")
        data, rejects, qa = (
            DataFile(path, 4, "0" * 64, 1, bucket)
            for path, bucket in zip(paths, buckets, strict=True)
        )
        seen = QaFile(qa, {"8x8": 1}, 30.0, 60.0)
        return UnitRecord(unit, generation, attempt, 2, 1, 1, (data,), rejects, seen)

    def commit(self, source: str) -> Receipt:
        unit = self.unit(source)
        there = self.receipts.setdefault(unit.id, [])
        record = self.upload(unit, len(there))
        receipt = Receipt(record, CONTRACT.fingerprint, Statistics.empty(4))
        assert self.store.put_if_absent(receipt.path, receipt.to_bytes())
        there.append(record.attempt)
        return receipt

    def lose(self, source: str) -> None:
        """An attempt at a generation that another attempt has committed, or nobody yet."""
        unit = self.unit(source)
        self.upload(unit, max(len(self.receipts.get(unit.id, ())) - 1, 0))

    def abandon(self, source: str) -> None:
        """An attempt that nobody committed."""
        unit = self.unit(source)
        self.upload(unit, len(self.receipts.get(unit.id, ())))

    def void(self, source: str) -> None:
        """`verify --repair` of the unit, if it has rows."""
        unit = self.unit(source)
        there = self.receipts.get(unit.id)
        if there and there[-1]:
            path = f"commits/{unit.id}-{len(there) - 1}.json"
            void = Receipt.from_bytes(self.store.read_bytes(path)).voided()
            assert self.store.put_if_absent(void.path, void.to_bytes())
            there.append(None)

    def litter(self, source: str) -> None:
        """What kills leave: a segment without its manifest, and half a file."""
        record = self.upload(self.unit(source), 0)
        put_segment(self.store, [Receipt(record, CONTRACT.fingerprint, Statistics.empty(4))])
        for path in ("data", f"data/{record.unit.id}"):
            (self.folder / path / f".tmp-{new_attempt()}").write_bytes(b"ha")

    def change(self, source: str) -> None:
        self.listed[source] = "v2" if self.listed[source] == "v1" else "v1"

    def write(self, state: State | None = None, *, without: str = "", drop: bool = False) -> None:
        """Write the next manifest, from what a driver knows."""
        listing = {source: [self.unit(source)] for source in SOURCES if source != without}
        with patch.object(state_module, "MAX_MISSING_SHARE", 1.0):
            write_next(
                state or State(self.store),
                CONTRACT.fingerprint,
                4,
                lambda: listing,
                on_missing="drop" if drop else "keep",
            )

    def age(self) -> None:
        """Let eight days pass."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                self.set_age(path)

    def set_age(self, path: Path) -> None:
        then = time.time() - 8 * DAY_S
        os.utime(path, (then, then))

    def is_old(self, path: str) -> bool:
        return (self.folder / path).stat().st_mtime < time.time() - 7 * DAY_S

    def files(self) -> set[str]:
        paths = (path for folder in FOLDERS for path in (self.folder / folder).glob("*/*"))
        return {p.relative_to(self.folder).as_posix() for p in paths if p.is_file()}

    def names_in(self, number: int) -> set[str]:
        return {r.name for r in read_records(self.store, read_manifest(self.store, number))}

    def gc(self, **options: Any) -> Garbage:
        return collect_garbage(self.url, delete=True, **options)


class Model:
    """DESIGN §4 and the issue, said the slow way: which files must be gone after a collection."""

    def __init__(self, world: World, keep_last: int | None) -> None:
        self.world = world
        numbers = list_manifests(world.store)
        complete = [n for n in numbers if read_manifest(world.store, n).complete]
        self.kept = set(numbers)
        if keep_last is not None:
            young = {n for n in numbers if not world.is_old(f"manifests/{n:08d}.json")}
            # Readers were given a complete one until the next one came.
            given = {n for n, after in pairwise(complete) if after in young}
            self.kept = {numbers[-1], *complete[-keep_last:], *young, *given}
            pointer = world.folder / "published.json"
            if pointer.exists():
                self.kept.add(json.loads(pointer.read_text())["manifest"])
        self.live = {name for n in self.kept for name in world.names_in(n)}
        self.ever = {name for n in numbers for name in world.names_in(n)}

    def is_given_up(self, unit: str, generation: int) -> bool:
        name, there = f"{unit}-{generation}", self.world.receipts[unit]
        is_old = self.world.is_old(f"commits/{name}.json")
        if there[generation] is None or name in self.live or not is_old:
            return False
        if self.is_at_work(unit, generation + 1):
            return False
        last = len(there) - 1
        if generation == last or there[last] is None or self.is_given_up(unit, last):
            return True
        return any(f"{unit}-{g}" in self.ever for g in range(generation + 1, last + 1))

    def is_garbage(self, path: str) -> bool:
        _, unit, name = path.split("/")
        if name.startswith(".tmp-"):
            return self.world.is_old(path)
        generation, attempt = int(name.split("-")[0]), name.split("-")[1].removesuffix(".parquet")
        there = self.world.receipts.get(unit, [])
        if generation < len(there):
            return there[generation] != attempt or self.is_given_up(unit, generation)
        last = len(there) - 1
        is_over = last < 0 or there[last] is None or self.is_given_up(unit, last)
        return is_over and not self.is_at_work(unit, generation)

    def is_at_work(self, unit: str, generation: int) -> bool:
        """Whether a young attempt may yet be committed."""
        return generation >= len(self.world.receipts.get(unit, ())) and any(
            f"/{unit}/{generation}-" in path and not self.world.is_old(path)
            for path in self.world.files()
        )


EVENTS = ("commit", "commit", "commit", "lose", "abandon", "void", "litter", "change")


def live_through(data: st.DataObject, world: World, most: int) -> None:
    for _ in range(data.draw(st.integers(0, most), "events")):
        event = data.draw(st.sampled_from([*EVENTS, "write", "write", "publish"]), "event")
        source = data.draw(st.sampled_from(SOURCES), "source")
        if event == "write":
            without = data.draw(st.sampled_from(["", source]), "without")
            world.write(without=without, drop=data.draw(st.booleans(), "drop"))
        elif event == "publish":
            with patched(DatasetError):
                publish(world.url)
        else:
            getattr(world, event)(source)


@contextmanager
def patched(*kinds: type[Exception]) -> Iterator[None]:
    """What goes wrong for want of a manifest is no event."""
    try:
        yield
    except kinds:
        return


class Forgetful(Store):
    """A store whose listing of receipts lacks some."""

    missed: frozenset[int] = frozenset()

    def list(self, folder: str = "") -> list[ObjectInfo]:
        found = super().list(folder)
        if folder != "commits":
            return found
        return [info for index, info in enumerate(found) if index not in self.missed]


def assert_nobody_can_bring_back_what_is_gone(world: World, missed: frozenset[int]) -> None:
    store = Forgetful(world.url)
    store.missed = missed
    state, files = State(store), world.files()
    for unit, there in world.receipts.items():
        if (current := state.current(unit)) is not None:
            attempt = there[current.generation] if current.generation < len(there) else None
            assert attempt
            assert sum(attempt in path for path in files) == 3


@settings(max_examples=150, print_blob=True)
@given(data=st.data())
def test_after_any_history_what_is_named_stays_and_all_else_goes(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        live_through(data, world, 14)
        world.age()
        live_through(data, world, 6)
        world.write()
        if not list_manifests(world.store):
            with pytest.raises(DatasetError, match="has no manifest"):
                world.gc()
            return
        keep_last = data.draw(st.sampled_from([None, 1, 2]), "keep_last")
        model = Model(world, keep_last)
        before, receipts = world.files(), set(list_receipt_names(world.store))
        garbage = {path for path in before if model.is_garbage(path)}
        late = State(world.store)  # a driver that has read everything, and is slow

        digest = tree_digest(world.folder)
        planned = collect_garbage(world.url, keep_last=keep_last)
        assert tree_digest(world.folder) == digest, "a dry run writes nothing"
        found = world.gc(keep_last=keep_last)
        assert found.found == planned.found
        assert found.voided == planned.voided
        assert (found.manifest is not None) >= bool(found.voided)

        assert world.files() == before - garbage
        kept = set(list_manifests(world.store))
        assert kept == set(found.kept) == model.kept | {found.manifest} - {None}
        assert set(list_receipt_names(world.store)) == receipts | set(found.voided)
        assert {p.name for p in (world.folder / "segments").iterdir()} >= {
            segment.path.removeprefix("segments/")
            for number in kept
            for segment in read_manifest(world.store, number).segments
        }
        for number in kept:
            assert verify(world.url, number, quick=True).ok
        if found.manifest:
            assert world.names_in(found.manifest) == world.names_in(found.manifest - 1)

        missed = data.draw(st.frozensets(st.integers(0, 20), max_size=4), "missed")
        assert_nobody_can_bring_back_what_is_gone(world, missed)

        digest = tree_digest(world.folder)
        again = world.gc(keep_last=keep_last)
        assert (again.num_objects, again.voided, again.manifest) == (0, [], None)
        assert tree_digest(world.folder) == digest

        for source in data.draw(st.sets(st.sampled_from(SOURCES)), "changed back"):
            world.change(source)
        world.write(late, drop=data.draw(st.booleans(), "late drop"))
        for number in list_manifests(world.store):
            assert verify(world.url, number, quick=True).ok


# The same rules, one by one.


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def full(world: World) -> World:
    """Three manifests of old: `a.tar` was replaced, `b.tar` encoded again; and all kinds of litter.

    `c.tar` has an attempt that was begun at its next generation.
    """
    for source in SOURCES:
        world.commit(source)
        world.lose(source)
    world.write()
    world.change("a.tar")
    world.abandon("a.tar")
    world.write()
    world.commit("a.tar")
    world.void("b.tar")
    world.commit("b.tar")
    world.abandon("c.tar")
    world.litter("a.tar")
    world.write()
    (world.folder / "qa" / "report-00000001.html").write_text("seen")
    world.age()
    return world


def kinds(found: Garbage) -> dict[str, int]:
    return {kind: len(objects) for kind, objects in found.found.items() if objects}


def test_by_default_every_manifest_stays(world: World) -> None:
    found = full(world).gc()
    assert kinds(found) == {"attempts": 15, "segments": 1, "temporary": 2}
    assert (found.voided, found.manifest) == ([], None)
    for number in (1, 2, 3):
        assert verify(world.url, number, quick=True).ok


def test_units_of_manifests_that_go_are_undone_first(world: World) -> None:
    found = full(world).gc(keep_last=1)
    # Of the first manifest: the old version of a.tar, and the first generation of b.tar.
    assert kinds(found) == {
        "attempts": 15,
        "units": 6,
        "segments": 1,
        "temporary": 2,
        "manifests": 3,  # and the report of one
    }
    world.change("a.tar")
    assert found.voided == [f"{world.unit('a.tar').id}-1"]
    assert (found.manifest, found.kept) == (4, [3, 4])
    assert found.num_bytes == 21 * 4 + sum(
        each.size_bytes
        for kind in ("segments", "temporary", "manifests")
        for each in found.found[kind]
    )
    # Back to its first bytes: it is void, so it is encoded again, and not named without its files.
    world.write()
    newest = read_manifest(world.store, 5)
    assert (newest.complete, newest.stale) == (False, ("a.tar",))
    state = State(world.store)
    assert state.current(world.unit("a.tar").id) is None
    assert state.generation(world.unit("a.tar").id) == 1


def test_a_run_after_it_reads_no_receipt_of_a_void(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(world).gc(keep_last=1)
    read: list[str] = []
    read_bytes = Store.read_bytes
    monkeypatch.setattr(
        Store, "read_bytes", lambda self, path: read.append(path) or read_bytes(self, path)
    )
    State(world.store)
    assert [path for path in read if path.startswith("commits/")] == []


def test_kept_numbers_and_the_published_one_stay(world: World) -> None:
    publish(full(world).url, 1)
    assert world.gc(keep_last=1).kept == [1, 3]
    with pytest.raises(ConfigError, match="--keep adds to --keep-last"):
        world.gc(keep=[2])
    assert set(world.gc(keep_last=1, keep=[1]).kept) == {1, 3}
    with pytest.raises(DatasetError, match="no manifest 7"):
        world.gc(keep_last=1, keep=[7])


def test_what_readers_were_given_until_today_stays(world: World) -> None:
    """Manifest 3 is old, but it was the newest one until a moment ago."""
    full(world)
    world.change("b.tar")
    world.commit("b.tar")
    world.write()
    found = world.gc(keep_last=1)
    assert found.kept == [3, 4, 5]
    assert found.manifest == 5  # voids what manifest 1 alone named
    world.age()
    assert world.gc(keep_last=1).kept == [4, 5, 6]


def test_parts_wait_for_one_at_which_runs_still_fail(world: World) -> None:
    world.commit("b.tar")
    world.write()
    parts = [Unit.of("c.parquet", 10, "v1", CONTRACT.fingerprint, f"{k}/2") for k in range(2)]
    receipt = Receipt(world.upload(parts[0], 0), CONTRACT.fingerprint, Statistics.empty(4))
    assert world.store.put_if_absent(receipt.path, receipt.to_bytes())
    world.age()
    put_failure(world.store, parts[1], new_attempt(), "c.parquet [1/2]: broken")
    hints = [hint.path for hint in list_failures(world.store)]
    assert read_failures(world.store, hints) == {parts[1].id: "c.parquet [1/2]: broken"}
    assert (world.gc().num_objects, world.gc().voided) == (0, [])
    world.age()  # nobody has tried it for a week
    found = world.gc()
    assert (kinds(found), found.voided) == ({"units": 3, "failures": 1}, [f"{parts[0].id}-1"])
    assert list_failures(world.store) == []
    assert read_failures(world.store, hints) == {}, "listed before, and read after"


def test_what_is_young_stays(world: World) -> None:
    full(world)
    assert kinds(world.gc(keep_last=1, older_than_days=9)) == {"attempts": 15}


def test_a_manifest_published_meanwhile_is_seen(world: World) -> None:
    full(world)
    put = Store.put_if_absent

    def publish_then_put(store: Store, path: str, data: bytes) -> bool:
        if path == "manifests/00000004.json":
            publish(world.url, 1)
        return put(store, path, data)

    with patch.object(Store, "put_if_absent", publish_then_put):
        found = world.gc(keep_last=1)
    assert 1 in found.kept
    for number in found.kept:
        assert verify(world.url, number, quick=True).ok


def test_a_manifest_published_while_it_is_deleted_is_put_back(world: World) -> None:
    """The pointer comes after the last look at it, and before the manifest goes."""
    full(world)
    data = world.store.read_bytes("manifests/00000001.json")
    delete_many, num_times = Store.delete_many, []

    def publish_then_delete(store: Store, paths: list[str], *args: Any) -> None:
        if not num_times:
            num_times.append(publish(world.url, 1))
        delete_many(store, paths, *args)

    with patch.object(Store, "delete_many", publish_then_delete):
        found = world.gc(keep_last=1)
    assert num_times
    assert 1 in found.kept
    assert world.store.read_bytes("manifests/00000001.json") == data
    for number in found.kept:
        assert verify(world.url, number, quick=True).ok


def test_a_manifest_that_is_deleted_while_it_is_published_is_not(world: World) -> None:
    publish(full(world).url, 3)
    put = Store.put

    def put_then_delete(store: Store, path: str, data: bytes) -> None:
        put(store, path, data)
        store.delete("manifests/00000001.json")

    with patch.object(Store, "put", put_then_delete), pytest.raises(DatasetError, match="no manif"):
        publish(world.url, 1, force=True)
    assert json.loads(world.store.read_bytes(PUBLISHED_PATH))["manifest"] == 3


def test_a_receipt_put_meanwhile_wins(world: World) -> None:
    """A driver that was frozen for a week commits its attempt while `gc` is about to void it."""
    world.commit("b.tar")
    world.write()
    unit = world.unit("a.tar")
    record = world.upload(unit, 0)
    world.age()
    receipt = Receipt(record, CONTRACT.fingerprint, Statistics.empty(4))
    put, num_late = Store.put_if_absent, []

    def commit_then_put(store: Store, path: str, data: bytes) -> bool:
        if path == receipt.path and not num_late:
            num_late.append(put(store, path, receipt.to_bytes()))
        return put(store, path, data)

    with patch.object(Store, "put_if_absent", commit_then_put):
        found = world.gc()
    assert num_late == [True]
    assert found.num_objects == 0
    world.write()
    assert verify(world.url, list_manifests(world.store)[-1], quick=True).ok
    assert f"{unit.id}-0" in world.names_in(list_manifests(world.store)[-1])


def test_a_driver_that_comes_late_loses(world: World) -> None:
    """… or it comes after the void, and its receipt is not taken."""
    world.commit("b.tar")
    world.write()
    record = world.upload(world.unit("a.tar"), 0)
    world.age()
    assert world.gc().voided == [f"{record.unit.id}-0"]
    receipt = Receipt(record, CONTRACT.fingerprint, Statistics.empty(4))
    assert not world.store.put_if_absent(receipt.path, receipt.to_bytes())


def test_a_manifest_put_meanwhile_has_it_look_again(world: World) -> None:
    """A run brings a source back whose unit is about to go."""
    full(world)
    world.change("a.tar")
    put, num_late = Store.put_if_absent, []

    def write_then_put(store: Store, path: str, data: bytes) -> bool:
        if path.startswith("commits/") and not num_late:
            num_late.append(1)
            world.write()
            assert read_manifest(store, 4).complete
        return put(store, path, data)

    with patch.object(Store, "put_if_absent", write_then_put):
        found = world.gc(keep_last=1)
    assert num_late
    assert {3, 4} >= set(found.kept) - {5}
    for number in list_manifests(world.store):
        assert verify(world.url, number, quick=True).ok


class Killed(BaseException):
    """kill -9."""


def test_killed_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    undisturbed = full(World(tmp_path / "undisturbed"))
    undisturbed.gc(keep_last=1)
    num_left = len(undisturbed.files())
    assert num_left
    for when in range(1000):
        world = full(World(tmp_path / str(when)))
        was_killed = kill_at(when, world)
        for lease in (world.folder / "runs").glob("*"):
            lease.unlink()  # ten minutes later
        for number in list_manifests(world.store):
            assert verify(world.url, number, quick=True).ok, when
        world.gc(keep_last=1)
        assert len(world.files()) == num_left
        assert {1, 2}.isdisjoint(list_manifests(world.store))
        assert not list((world.folder / "qa").glob("report-*"))
        for number in list_manifests(world.store):
            assert verify(world.url, number, quick=True).ok, when
        if not was_killed:
            break
    assert when > 20


def kill_at(when: int, world: World) -> bool:
    """Let a collection die before its n-th change to the store; False if it has fewer."""
    num_changes = 0

    def counted(name: str) -> Any:
        method = getattr(Store, name)

        def change(store: Store, *args: Any) -> Any:
            nonlocal num_changes
            if num_changes >= when:
                raise Killed
            num_changes += 1
            return method(store, *args)

        return change

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("put", "put_if_absent", "delete"):
            monkeypatch.setattr(Store, name, counted(name))
        try:
            world.gc(keep_last=1)
        except Killed:
            return True
    return False


def test_beside_a_run_it_stands_aside(world: World) -> None:
    full(world)
    before = world.files()
    with Lease(world.store, 1), pytest.raises(IncompleteRun, match="wait for it, or delete"):
        world.gc()
    assert world.files() == before
    assert collect_garbage(world.url).num_objects
    assert world.gc().num_objects


def test_what_is_not_ours_is_left_alone(world: World) -> None:
    full(world)
    strange = ["data/readme.txt", "data/x/1-2.parquet", "qa/notes.txt", "rejects/a.parquet"]
    for path in strange:
        world.store.put(path, b"mine")
        world.set_age(world.folder / path)
    world.gc(keep_last=1)
    assert all(world.store.exists(path) for path in strange)


def test_a_number_that_gc_made_free_is_not_taken_again(world: World) -> None:
    """A driver that was frozen since manifest 1, which is gone by now, must not put a second 2."""
    for source in SOURCES:
        world.commit(source)
    world.write()
    late = State(world.store)
    world.change("a.tar")
    world.commit("a.tar")
    world.write()
    world.change("b.tar")
    world.commit("b.tar")
    world.write()
    world.age()
    assert world.gc(keep_last=1).kept == [3, 4]
    world.change("b.tar")
    world.write(late)
    assert list_manifests(world.store) == [3, 4, 5]
    assert verify(world.url, 5, quick=True).ok
