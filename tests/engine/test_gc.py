"""`gc` over any history: what a kept manifest or a receipt that counts refers to stays.

All else goes. The histories are made of events in two ages, eight days ago and now; the files are a
few bytes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from history import CONTRACT, SOURCES, World
from latentcache import clock, collect_unreferenced, publish, verify
from latentcache.dataset.manifest import list_manifests, read_manifest
from latentcache.dataset.publish import PUBLISHED_PATH
from latentcache.dataset.receipts import (
    Receipt,
    list_failures,
    list_receipt_names,
    new_attempt,
    put_failure,
    read_failures,
)
from latentcache.dataset.state import State
from latentcache.dataset.statistics import Statistics
from latentcache.engine import gc as gc_module
from latentcache.engine.gc import Unreferenced
from latentcache.engine.lease import STALE_AFTER_S, Lease
from latentcache.errors import ConfigError, DatasetError, IncompleteRun
from latentcache.storage import ObjectInfo, Store
from makers import tree_digest


class Model:
    """The rules of docs/format.md, said the slow way: what must be gone after `gc`."""

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
        removed = read_manifest(world.store, numbers[-1]).removed
        self.known = world.names_in(numbers[-1]) | set(removed)

    def may_count(self, unit: str, generation: int) -> bool:
        """Whether a manifest may name a receipt: one does, or the newest one knows none as high."""
        is_known = any(
            f"{unit}-{g}" in self.known
            for g in range(generation, len(self.world.receipts.get(unit, ())))
        )
        return f"{unit}-{generation}" in self.live or not is_known

    def is_unreferenced(self, path: str) -> bool:
        _, unit, name = path.split("/")
        if not self.world.is_old(path):
            return False
        if name.startswith(".tmp-"):
            return True
        generation, attempt = int(name.split("-")[0]), name.split("-")[1].removesuffix(".parquet")
        attempts = self.world.receipts.get(unit, [])
        is_committed = generation < len(attempts) and attempts[generation] == attempt
        return not (is_committed and self.may_count(unit, generation))

    def receipt_goes(self, name: str) -> bool:
        unit, _, generation = name.rpartition("-")
        is_old = self.world.is_old(f"commits/{name}.json")
        return is_old and not self.may_count(unit, int(generation))


EVENTS = ("commit", "commit", "commit", "lose", "abandon", "repair", "litter", "change", "read")


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
    """Ignore errors that a missing manifest causes."""
    try:
        yield
    except kinds:
        return


class Forgetful(Store):
    """A store whose listing of receipts lacks some."""

    missed: frozenset[int] = frozenset()

    def list(self, folder: str = "") -> list[ObjectInfo]:
        infos = super().list(folder)
        if folder != "commits":
            return infos
        return [info for index, info in enumerate(infos) if index not in self.missed]


def assert_nobody_can_bring_back_what_is_gone(world: World, missed: frozenset[int]) -> None:
    store = Forgetful(world.url)
    store.missed = missed
    state, files = State(store), world.files()
    for unit, attempts in world.receipts.items():
        if (current := state.current(unit)) is not None:
            attempt = attempts[current.generation] if current.generation < len(attempts) else None
            assert attempt
            assert sum(attempt in path for path in files) == 3


@pytest.mark.slow
@settings(max_examples=90, print_blob=True)
@given(data=st.data())
def test_gc_deletes_exactly_the_unreferenced_objects_after_any_history(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        live_through(data, world, 14)
        world.age()
        live_through(data, world, 6)
        if data.draw(st.booleans(), "a run ends"):
            world.write()
        if not list_manifests(world.store):
            with pytest.raises(DatasetError, match="has no manifest"):
                world.gc()
            return
        keep_last = data.draw(st.sampled_from([None, 1, 2]), "keep_last")
        model = Model(world, keep_last)
        before, receipts = world.files(), set(list_receipt_names(world.store))
        unreferenced = {path for path in before if model.is_unreferenced(path)}
        superseded = {name for name in receipts if model.receipt_goes(name)}
        world.read("")

        digest = tree_digest(world.folder)
        planned = collect_unreferenced(world.url, keep_last=keep_last)
        assert tree_digest(world.folder) == digest, "a dry run writes nothing"
        deleted = world.gc(keep_last=keep_last)
        assert deleted.objects == planned.objects

        assert world.files() == before - unreferenced
        kept = set(list_manifests(world.store))
        assert kept == set(deleted.kept) == model.kept
        assert set(list_receipt_names(world.store)) == receipts - superseded
        assert {p.name for p in (world.folder / "parts").iterdir()} >= {
            part.path.removeprefix("parts/")
            for number in kept
            for part in read_manifest(world.store, number).parts
        }
        for number in kept:
            assert verify(world.url, number, quick=True).ok

        missed = data.draw(st.frozensets(st.integers(0, 20), max_size=4), "missed")
        assert_nobody_can_bring_back_what_is_gone(world, missed)

        digest = tree_digest(world.folder)
        assert world.gc(keep_last=keep_last).num_objects == 0
        assert tree_digest(world.folder) == digest

        for late in data.draw(st.permutations(world.late), "late"):
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
    """Four manifests of old: `a.tar` was replaced, `b.tar` repaired; and all kinds of litter.

    `c.tar` has an attempt that was begun at its next generation.
    """
    for source in SOURCES:
        world.commit(source)
        world.lose(source)
    world.write()
    world.change("a.tar")
    world.abandon("a.tar")
    world.write()
    world.repair("b.tar")
    world.commit("a.tar")
    world.commit("b.tar")
    world.abandon("c.tar")
    world.litter("a.tar")
    world.write()
    (world.folder / "qa" / "report-00000001.html").write_text("seen")
    world.age()
    return world


def kinds(listed: Unreferenced) -> dict[str, int]:
    return {kind: len(objects) for kind, objects in listed.objects.items() if objects}


NUM_LOST = 3 * (3 + 1 + 1 + 1)  # files of attempts without a receipt: lost, abandoned, litter


def test_gc_keeps_all_manifests_by_default(world: World) -> None:
    deleted = full(world).gc()
    assert kinds(deleted) == {"files": NUM_LOST, "parts": 1, "temporary": 2}
    assert deleted.kept == [1, 2, 3, 4]
    for number in deleted.kept:
        assert verify(world.url, number, quick=True).ok


def test_gc_deletes_units_and_receipts_of_expired_manifests(world: World) -> None:
    deleted = full(world).gc(keep_last=1)
    # Of the first manifest: the old version of a.tar, and the first generation of b.tar.
    assert kinds(deleted) == {
        "manifests": 3,
        "reports": 1,
        "receipts": 2,
        "files": NUM_LOST + 6,
        "parts": 1,
        "temporary": 2,
    }
    world.change("a.tar")
    old = f"commits/{world.unit('a.tar').id}-0.json"
    assert old in {each.path for each in deleted.objects["receipts"]}
    assert deleted.kept == [4]
    assert deleted.num_bytes == (NUM_LOST + 6) * 4 + sum(
        each.size_bytes
        for kind in deleted.objects.keys() - {"files"}
        for each in deleted.objects[kind]
    )
    # Back to its first bytes: it never counts again, so it is encoded again.
    world.write()
    newest = read_manifest(world.store, 5)
    assert (newest.complete, newest.stale) == (False, ("a.tar",))
    state = State(world.store)
    assert state.current(world.unit("a.tar").id) is None
    assert state.generation(world.unit("a.tar").id) == 0
    world.commit("a.tar")
    world.write()
    assert read_manifest(world.store, 6).complete
    assert f"{world.unit('a.tar').id}-1" in world.names_in(6)


def test_gc_keeps_listed_and_published_manifests(world: World) -> None:
    publish(full(world).url, 1)
    assert world.gc(keep_last=1).kept == [1, 4]
    with pytest.raises(ConfigError, match="--keep needs --keep-last"):
        world.gc(keep=[2])
    assert set(world.gc(keep_last=1, keep=[1]).kept) == {1, 4}
    with pytest.raises(DatasetError, match="no manifest 7"):
        world.gc(keep_last=1, keep=[7])


def test_gc_keeps_a_manifest_that_was_the_newest_until_today(world: World) -> None:
    """Manifest 4 is old, but it was the newest one until a moment ago."""
    full(world)
    world.change("b.tar")
    world.commit("b.tar")
    world.write()
    assert world.gc(keep_last=1).kept == [4, 5]
    world.age()
    assert world.gc(keep_last=1).kept == [5]


def test_gc_deletes_an_unnamed_receipt_after_a_newer_version_is_named(world: World) -> None:
    world.commit("a.tar")
    first = world.unit("a.tar")
    world.write(without="a.tar", drop=True)
    world.commit("b.tar")
    world.write(without="a.tar")
    world.age()
    assert world.gc().num_objects == 0, "a run may name it yet"
    world.change("a.tar")
    world.commit("a.tar")
    world.write()
    assert f"{first.id}-0" in read_manifest(world.store, list_manifests(world.store)[-1]).removed
    assert kinds(world.gc()) == {"receipts": 1, "files": 3}
    assert State(world.store).generation(first.id) == 0, "its generation stays taken"


def test_gc_keeps_a_receipt_that_no_manifest_names_yet(world: World) -> None:
    world.commit("a.tar")
    world.write()
    world.commit("a.tar")  # again, as with --retry-rejects
    world.change("a.tar")
    world.age()
    assert world.gc(keep_last=1).num_objects == 0
    world.change("a.tar")
    world.write()
    assert f"{world.unit('a.tar').id}-1" in world.names_in(list_manifests(world.store)[-1])
    assert verify(world.url, list_manifests(world.store)[-1], quick=True).ok


def test_gc_keeps_a_lower_generation_until_a_manifest_names_a_higher_one(world: World) -> None:
    """A frozen driver may know the lower one alone, and name it with the next number."""
    world.commit("b.tar")
    world.write()
    world.commit("a.tar")
    world.age()
    late = State(world.store)
    world.commit("a.tar")
    assert world.gc().num_objects == 0
    world.write(late)
    assert verify(world.url, list_manifests(world.store)[-1], quick=True).ok
    world.write()
    assert f"{world.unit('a.tar').id}-1" in world.names_in(list_manifests(world.store)[-1])


def test_gc_deletes_old_failure_records(world: World) -> None:
    world.commit("b.tar")
    world.write()
    world.age()
    put_failure(world.store, world.unit("a.tar"), new_attempt(), "a.tar: broken")
    hints = [hint.path for hint in list_failures(world.store)]
    assert read_failures(world.store, hints) == {world.unit("a.tar").id: "a.tar: broken"}
    assert world.gc().num_objects == 0
    world.age()
    assert kinds(world.gc()) == {"failures": 1}
    assert list_failures(world.store) == []
    assert read_failures(world.store, hints) == {}, "listed before, and read after"


def test_gc_keeps_objects_younger_than_older_than_days(world: World) -> None:
    assert world.store.put_if_absent("x", b"")
    assert kinds(full(world).gc(keep_last=1, older_than_days=9)) == {}


@pytest.mark.parametrize("days", [1.9, 0, -1])
def test_gc_rejects_older_than_days_below_two(world: World, days: float) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        full(world).gc(older_than_days=days)


def test_gc_puts_back_a_manifest_that_is_published_meanwhile(world: World) -> None:
    """The pointer comes after the last look at it, and before the manifest goes."""
    full(world)
    data = world.store.read_bytes("manifests/00000001.json")
    delete_many, num_times = Store.delete_many, []

    def publish_then_delete(store: Store, paths: list[str], *args: Any) -> None:
        if not num_times:
            num_times.append(publish(world.url, 1))
        delete_many(store, paths, *args)

    with patch.object(Store, "delete_many", publish_then_delete):
        deleted = world.gc(keep_last=1)
    assert num_times
    assert 1 in deleted.kept
    assert world.store.read_bytes("manifests/00000001.json") == data
    for number in deleted.kept:
        assert verify(world.url, number, quick=True).ok


def test_publish_fails_for_a_manifest_that_gc_deletes_meanwhile(world: World) -> None:
    publish(full(world).url, 4)
    put = Store.put

    def put_then_delete(store: Store, path: str, data: bytes) -> None:
        put(store, path, data)
        store.delete("manifests/00000001.json")

    with patch.object(Store, "put", put_then_delete), pytest.raises(DatasetError, match="no manif"):
        publish(world.url, 1, force=True)
    assert json.loads(world.store.read_bytes(PUBLISHED_PATH))["manifest"] == 4


def test_gc_keeps_files_of_a_receipt_that_the_listing_lacks(world: World) -> None:
    """It is put after the files were listed, or the listing lacks it: each is read by its name."""
    world.commit("b.tar")
    world.write()
    unit = world.unit("a.tar")
    record = world.upload(unit, 0)
    world.age()
    receipt = Receipt(record, CONTRACT.fingerprint, Statistics.empty(4))
    read_receipts, num_late = gc_module.read_receipts, []

    def put_then_read(*args: Any, **options: Any) -> list[Receipt]:
        num_late.append(world.store.put_if_absent(receipt.path, receipt.to_bytes()))
        return read_receipts(*args, **options)

    with patch.object(gc_module, "read_receipts", put_then_read):
        deleted = world.gc()
    assert num_late == [True]
    assert deleted.num_objects == 0
    world.write()
    assert verify(world.url, list_manifests(world.store)[-1], quick=True).ok
    assert f"{unit.id}-0" in world.names_in(list_manifests(world.store)[-1])


class Killed(BaseException):
    """kill -9."""


@pytest.mark.slow
def test_gc_killed_at_any_change_can_be_run_again(tmp_path: Path) -> None:
    undisturbed = full(World(tmp_path / "undisturbed"))
    undisturbed.gc(keep_last=1)
    left = shape_of(undisturbed)
    for when in range(1000):
        world = full(World(tmp_path / str(when)))
        was_killed = kill_at(when, world)
        for lease in (world.folder / "runs").glob("*"):
            lease.unlink()  # ten minutes later
        for number in list_manifests(world.store):
            assert verify(world.url, number, quick=True).ok, when
        world.gc(keep_last=1)
        assert shape_of(world) == left
        for number in list_manifests(world.store):
            assert verify(world.url, number, quick=True).ok, when
        if not was_killed:
            break
    assert when > 20


def shape_of(world: World) -> list[Any]:
    """What is left, but for attempts, which are random."""
    paths = ["/".join(path.split("-")[0].split("/")[:3]) for path in world.files()]
    reports = list((world.folder / "qa").glob("report-*"))
    names = sorted(list_receipt_names(world.store))
    return [sorted(paths), names, list_manifests(world.store), reports]


def kill_at(when: int, world: World) -> bool:
    """Let `gc` die before its n-th change to the store; False if it has fewer."""
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


@pytest.mark.parametrize(
    ("is_gc", "message"), [(False, "a run is active"), (True, "another gc is active")]
)
def test_gc_stops_if_a_run_or_another_gc_is_active(world: World, is_gc: bool, message: str) -> None:
    full(world)
    before = world.files()
    with Lease(world.store, 1, is_gc=is_gc) as lease:
        with pytest.raises(IncompleteRun, match=rf"{message} .*{lease.run}\.json if it died"):
            world.gc()
        assert collect_unreferenced(world.url).num_objects, "a dry run changes nothing"
    assert world.files() == before
    assert world.gc().num_objects


def test_gc_writes_its_lease_before_it_lists_others(world: World) -> None:
    """So a run that does the same sees it, if it does not see the run."""
    full(world)
    require_exclusive, leases = Lease.require_exclusive, []

    def record_leases(lease: Lease) -> None:
        leases.extend((world.folder / "runs").iterdir())
        require_exclusive(lease)

    with patch.object(Lease, "require_exclusive", record_leases):
        world.gc()
    assert [path.name[:3] for path in leases] == ["gc-"]


def test_frozen_gc_stops_and_a_run_meanwhile_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(world)
    delete_many, frozen_s = Store.delete_many, [0.0]
    boot_time_s = clock.boot_time_s
    monkeypatch.setattr(clock, "boot_time_s", lambda: boot_time_s() + frozen_s[-1])
    monkeypatch.setattr(gc_module, "_BATCH", 5)

    def delete_then_freeze(store: Store, paths: list[str]) -> None:
        delete_many(store, paths)
        if len(frozen_s) == 1:
            frozen_s.append(STALE_AFTER_S)
            world.change("a.tar")  # back to what the plan is about to delete
            world.commit("a.tar")
            world.write()

    with (
        patch.object(Store, "delete_many", delete_then_freeze),
        pytest.raises(IncompleteRun, match="the lease of gc expired; run gc again"),
    ):
        world.gc(keep_last=1)
    assert len(frozen_s) == 2
    assert world.gc(keep_last=1).num_objects
    newest = list_manifests(world.store)[-1]
    assert f"{world.unit('a.tar').id}-1" in world.names_in(newest)
    for number in list_manifests(world.store):
        assert verify(world.url, number, quick=True).ok


def test_gc_ignores_files_with_unknown_names(world: World) -> None:
    full(world)
    strange = ["data/readme.txt", "data/x/1-2.parquet", "qa/notes.txt", "rejects/a.parquet"]
    strange.append(f"data/{'0' * 32}/007-{'1' * 32}-8x8.parquet")
    for path in strange:
        world.store.put(path, b"mine")
        world.set_age(world.folder / path)
    world.gc(keep_last=1)
    assert all(world.store.exists(path) for path in strange)


def test_manifest_numbers_are_not_reused_after_gc(world: World) -> None:
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
    assert world.gc(keep_last=1).kept == [3]
    world.change("b.tar")
    world.write(late)
    assert list_manifests(world.store) == [3, 4]
    assert verify(world.url, 4, quick=True).ok
