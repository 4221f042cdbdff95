"""`diff` against sets of units, and `published.json` as publishers and readers meet it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from history import CONTRACT, SOURCES, World
from latentcache import diff_manifests, open_dataset, publish
from latentcache.dataset.diff import Counts, SourceDiff
from latentcache.dataset.manifest import (
    Manifest,
    list_manifests,
    put_manifest,
    read_manifest,
    read_records,
)
from latentcache.dataset.publish import find_manifest, read_published
from latentcache.dataset.receipts import UnitRecord
from latentcache.dataset.state import State, write_next
from latentcache.engine.status import read_status
from latentcache.errors import CheckFailed, ConfigError, DatasetError
from latentcache.storage import ObjectInfo, Store
from latentcache.storage_options import StorageOptions
from makers import tree_digest


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def nights(world: World) -> World:
    """1: a, b. 2: a replaced, c new. 3: b gone. 4: a replaced, b back, c encoded again."""
    world.commit("a.tar")
    world.commit("b.tar")
    world.write(without="c.tar")
    world.change("a.tar")
    world.commit("a.tar")
    world.commit("c.tar")
    world.write()
    world.write(without="b.tar", drop=True)
    world.change("a.tar")
    for source in SOURCES:
        world.commit(source)
    world.write()
    assert list_manifests(world.store) == [1, 2, 3, 4]
    return world


def by_source(diffs: tuple[SourceDiff, ...]) -> dict[str, tuple[list[str], list[str]]]:
    def names(side: str, diff: SourceDiff) -> list[str]:
        return sorted(f"{unit.unit}-{unit.generation}" for unit in getattr(diff, side))

    return {diff.source: (names("before", diff), names("after", diff)) for diff in diffs}


def test_diff_lists_the_units_that_only_one_of_two_manifests_has(world: World) -> None:
    nights(world)
    shown: dict[int, dict[str, UnitRecord]] = {
        number: {r.name: r for r in read_records(world.store, read_manifest(world.store, number))}
        for number in (1, 2, 3, 4)
    }
    for before in shown:
        for after in shown:
            result = diff_manifests(world.url, before, after)
            gone = shown[before].keys() - shown[after].keys()
            come = shown[after].keys() - shown[before].keys()
            sides: dict[str, tuple[list[str], list[str]]] = {}
            for side, names in enumerate((gone, come)):
                for name in sorted(names):
                    source = shown[after if side else before][name].unit.source
                    sides.setdefault(source, ([], []))[side].append(name)
            assert (
                by_source(result.added) | by_source(result.replaced) | by_source(result.removed)
                == sides
            )
            assert all(not diff.before for diff in result.added)
            assert all(diff.before and diff.after for diff in result.replaced)
            assert all(not diff.after for diff in result.removed)
            counts = result.counts
            for name in ("num_units", "num_rows", "num_rejects"):
                moved = [
                    getattr(getattr(counts, kind), name)
                    for kind in ("before", "added", "removed", "replaced", "replacing", "after")
                ]
                assert moved[0] + moved[1] - moved[2] - moved[3] + moved[4] == moved[5]


def test_diff_compares_the_last_two_complete_manifests_by_default(world: World) -> None:
    nights(world)
    newest = read_manifest(world.store, 4)
    world.change("b.tar")
    world.write()
    assert not read_manifest(world.store, 5).complete
    result = diff_manifests(world.url)
    assert (result.before, result.after) == (3, newest.number)
    assert set(by_source(result.added)) == {"b.tar"}
    assert set(by_source(result.replaced)) == {"a.tar", "c.tar"}
    assert result.counts.replaced == Counts(2, 2, 2)
    assert diff_manifests(world.url, 1).after == 4
    publish(world.url, 2)
    assert diff_manifests(world.url, "published").before == 2
    assert diff_manifests(world.url, after="published").before == 1
    with pytest.raises(DatasetError, match="no complete manifest before 1"):
        diff_manifests(world.url, after=1)


def test_diff_reads_no_part_that_both_manifests_list_with_equal_removals(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in SOURCES:  # a manifest part each
        world.commit(source)
        world.write(without="" if source == "c.tar" else "c.tar")
    read: list[str] = []
    read_bytes = Store.read_bytes
    monkeypatch.setattr(
        Store, "read_bytes", lambda self, path: read.append(path) or read_bytes(self, path)
    )
    numbers = list_manifests(world.store)
    diff_manifests(world.url, numbers[-2], numbers[-1])
    parts = [path for path in read if path.startswith("parts/")]
    old = {s.path for s in read_manifest(world.store, numbers[-2]).parts}
    new = {s.path for s in read_manifest(world.store, numbers[-1]).parts}
    assert old < new
    assert set(parts) == new - old


# published.json


def test_published_opens_the_published_manifest(world: World) -> None:
    nights(world)
    assert read_published(world.store) is None
    assert read_status(world.url, StorageOptions()).published is None
    with pytest.raises(DatasetError, match="run `latentcache publish`"):
        open_dataset(world.url, "published")
    published = publish(world.url, 2)
    tree = json.loads((world.folder / "published.json").read_text())
    assert tree == {
        "manifest": 2,
        "published_at": published.published_at,
        "contract": CONTRACT.fingerprint,
        "format_version": 3,
    }
    assert open_dataset(world.url, "published").manifest.number == 2
    assert open_dataset(world.url).manifest.number == 4
    assert read_status(world.url, StorageOptions()).published == 2
    assert publish(world.url).manifest == 4


def test_publishing_the_same_manifest_again_writes_nothing(world: World) -> None:
    publish(nights(world).url, 3)
    before = tree_digest(world.folder)
    assert publish(world.url, 3).manifest == 3
    assert tree_digest(world.folder) == before


def test_publish_goes_back_to_an_older_manifest_only_with_force(world: World) -> None:
    publish(nights(world).url, 3)
    with pytest.raises(ConfigError, match="manifest 3 published, which is newer than 2: use"):
        publish(world.url, 2)
    assert publish(world.url, 2, force=True).manifest == 2


def test_publish_rejects_incomplete_and_missing_manifests(world: World) -> None:
    nights(world)
    world.change("b.tar")
    world.write()
    with pytest.raises(CheckFailed, match="is not complete: finish the run"):
        publish(world.url, 5)
    with pytest.raises(DatasetError, match="no manifest 9; it has 1 to 5"):
        publish(world.url, 9)
    assert not (world.folder / "published.json").exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"[]", b"{}", b'{"format_version": 4}', b'{"format_version": 3, "manifest": "x"}'],
)
def test_damaged_published_json_is_a_named_error(world: World, damage: bytes) -> None:
    nights(world)
    (world.folder / "published.json").write_bytes(damage)
    with pytest.raises(DatasetError, match=r"published\.json (is damaged|has format version 4)"):
        open_dataset(world.url, "published")


def test_published_json_that_changes_while_its_manifest_is_read_is_read_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(nights(world).url, 1)
    read_bytes = Store.read_bytes
    moved: list[str] = []

    def move_on(store: Store, path: str) -> bytes:
        if path == "manifests/00000001.json" and not moved:
            moved.append(path)
            publish(world.url, 4)
            store.delete(path)  # as `gc` does
        return read_bytes(store, path)

    monkeypatch.setattr(Store, "read_bytes", move_on)
    assert find_manifest(world.store, "published").number == 4
    assert moved
    (world.folder / "manifests" / "00000004.json").unlink()
    with pytest.raises(DatasetError, match="no manifest 4"):
        find_manifest(world.store, "published")


def test_open_dataset_rejects_other_manifest_names(world: World) -> None:
    nights(world)
    name: Any = "publish"
    with pytest.raises(ConfigError, match="'publish': give its number, or 'published'"):
        open_dataset(world.url, name)


def test_put_manifest_rejects_a_number_that_is_not_the_highest(world: World) -> None:
    nights(world)
    newest = read_manifest(world.store, 4)
    (world.folder / "manifests" / "00000003.json").unlink()
    assert not put_manifest(world.store, renumbered(newest, 3))
    assert not put_manifest(world.store, renumbered(newest, 4))
    assert put_manifest(world.store, renumbered(newest, 5))


def renumbered(manifest: Manifest, number: int) -> Manifest:
    tree = json.loads(manifest.to_bytes()) | {"number": number}
    return Manifest.from_bytes(json.dumps(tree).encode(), "here")


def test_generation_that_only_removed_lists_is_not_reused(world: World) -> None:
    """No part has the receipt; no list of receipts is needed."""
    world.commit("a.tar")
    unit = world.unit("a.tar")
    world.commit("b.tar")
    world.commit("c.tar")
    world.write()
    world.commit("a.tar")
    manifest = read_manifest(world.store, 1)
    tree = json.loads(manifest.to_bytes()) | {"number": 2, "removed": [f"{unit.id}-1"]}
    assert put_manifest(world.store, Manifest.from_bytes(json.dumps(tree).encode(), "here"))

    class Blind(Store):
        def list(self, folder: str = "") -> list[ObjectInfo]:
            return [] if folder == "commits" else super().list(folder)

    state = State(Blind(world.url))
    assert state.current(unit.id) is None
    assert state.generation(unit.id) == 1
    assert [u.unit_id for u in state.live["a.tar"]] == [unit.id], "its rows stand until then"
    world.commit("a.tar")
    world.write()
    newest = read_manifest(world.store, 3)
    assert newest.complete
    assert f"{unit.id}-2" in world.names_in(3)
    assert (
        write_next(
            State(world.store),
            CONTRACT.fingerprint,
            4,
            lambda: {source: [world.unit(source)] for source in SOURCES},
            on_missing="keep",
        )[1].number
        == 3
    )
