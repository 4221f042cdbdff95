"""Contracts, receipts and manifests over any sequence of events, against a model of the rules.

The model knows sources, versions and receipts, and nothing of parts, `removed`, files or JSON.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from latentcache import clock
from latentcache.dataset import state as state_module
from latentcache.dataset.contract import (
    CONTRACT_PATH,
    Contract,
    contract_diff,
    establish_contract,
    read_contract,
    require_same,
)
from latentcache.dataset.manifest import (
    Manifest,
    list_manifests,
    newest_manifest,
    read_manifest,
    read_records,
)
from latentcache.dataset.manifest_parts import ManifestPart, put_part, read_parts
from latentcache.dataset.receipts import (
    PUT_WITHIN_S,
    DataFile,
    Receipt,
    Unit,
    UnitRecord,
    new_attempt,
    read_receipts,
)
from latentcache.dataset.state import State, remove_units, write_next
from latentcache.dataset.statistics import Statistics
from latentcache.errors import ContractMismatch, DatasetError, IncompleteRun, SourceError
from latentcache.storage import ObjectInfo, Store
from makers import make_contract, tree_digest

CONTRACT = "c" * 64
NAMES = [f"{index:02d}.tar" for index in range(40)]

Version = tuple[str, str]  # source, version
Visible = dict[str, tuple[str, int]]  # source -> (version, generation)


def values_of(version: Version, generation: int) -> np.ndarray:
    """The latents, float32 [N, 1, 1, 2], that a receipt stands for; N may be 0."""
    rng = np.random.default_rng([*f"{version}{generation}".encode()])
    return rng.normal(0, 9, (int(rng.integers(0, 4)), 1, 1, 2)).astype(np.float32)


def unit_of(version: Version) -> Unit:
    return Unit.of(version[0], 10, version[1], CONTRACT)


def receipt_of(version: Version, generation: int) -> Receipt:
    """A receipt with as many rows as `values_of`, one reject a generation, and no objects."""
    unit, attempt, values = unit_of(version), new_attempt(), values_of(version, generation)
    num_rows = len(values)
    stem = f"data/{unit.id}/{generation}-{attempt}-8x8"
    files = [DataFile(f"{stem}.safetensors", 9, "0" * 64, num_rows, "8x8")]
    files += [DataFile(f"{stem}.rows.parquet", 9, "1" * 64, num_rows, "8x8")]
    rejects = DataFile(
        f"rejects/{unit.id}/{generation}-{attempt}.parquet", 9, "2" * 64, generation, ""
    )
    record = UnitRecord(
        unit=unit,
        generation=generation,
        attempt=attempt,
        num_samples=num_rows + generation,
        num_rows=num_rows,
        num_rejects=generation,
        files=tuple(files) if num_rows else (),
        rejects=rejects if generation else None,
    )
    statistics = Statistics.of(values) if num_rows else Statistics.empty(1)
    return Receipt(record, CONTRACT, statistics)


@dataclass
class Snapshot:
    """What the model says of one manifest."""

    visible: Visible
    stale: list[str]
    complete: bool
    removed: set[tuple[Version, int]] = field(default_factory=set)


@dataclass
class Driver:
    """A driver as the model sees it: the manifest it last read, and the receipts it knows.

    `known` maps a version to its highest generation. `snapshot` is the one that it wrote a manifest
    from last: the same again, if the source has not changed since.
    """

    state: State
    base: int = 0
    known: dict[Version, int] = field(default_factory=dict)
    snapshot: dict[str, list[Unit]] = field(default_factory=dict)

    def list(self, listed: dict[str, str]) -> dict[str, list[Unit]]:
        snapshot = {source: [unit_of((source, version))] for source, version in listed.items()}
        if snapshot != self.snapshot:
            self.snapshot = snapshot
        return self.snapshot


class Refused(Exception):
    """The model expects that `drop` rejects a snapshot with so few sources."""


class Manifests(RuleBasedStateMachine):
    """Two drivers on one output, a source that changes under them, and repairs."""

    @initialize(num_sources=st.sampled_from([0, 1, 2, 12]), committed=st.booleans())
    def begin(self, num_sources: int, committed: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(str(self.folder))
        self.listed: dict[str, str] = {}
        self.receipts: Counter[Version] = Counter()  # number of generations
        self.history = [Snapshot({}, [], False)]  # by number; 0: before the first
        self.drivers = [Driver(State(self.store)), Driver(State(self.store))]
        for index in range(num_sources):
            self.appear(0)
            if committed:
                self.commit(0, index)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # What happens to the source.

    @rule(pick=st.integers(0, 2))
    def appear(self, pick: int) -> None:
        """A source is new, or back again in the version that it had first."""
        absent = [name for name in NAMES if name not in self.listed]
        self.listed[absent[pick]] = "v1"

    @rule(pick=st.integers(0, 99), version=st.sampled_from(["v1", "v2", "v3"]))
    def change(self, pick: int, version: str) -> None:
        """A source changes, or goes back to what it was."""
        if self.listed:
            self.listed[self.source(pick)] = version

    @rule(pick=st.integers(0, 99))
    def vanish(self, pick: int) -> None:
        if self.listed:
            del self.listed[self.source(pick)]

    def source(self, pick: int) -> str:
        return sorted(self.listed)[pick % len(self.listed)]

    # What the drivers do.

    @rule(who=st.integers(0, 1), pick=st.integers(0, 99))
    def commit(self, who: int, pick: int) -> None:
        """Encode a unit, for the first time or again, at the generation the driver thinks next.

        Another driver may have put that receipt already: then its receipt is taken.
        """
        if not self.listed:
            return
        driver, source = self.drivers[who], self.source(pick)
        version = (source, self.listed[source])
        generation = driver.known.get(version, -1) + 1
        assert driver.state.generation(unit_of(version).id) + 1 == generation
        assert generation <= self.receipts[version]
        receipt = receipt_of(version, generation)
        won = self.store.put_if_absent(receipt.path, receipt.to_bytes())
        assert won == (generation == self.receipts[version])
        if won:
            self.receipts[version] += 1
        else:
            (receipt,) = read_receipts(self.store, [receipt.record.name])
        driver.state.add(receipt)
        driver.known[version] = generation

    @rule(pick=st.integers(0, 99))
    def repair(self, pick: int) -> None:
        """`verify --repair` removes a unit that the newest manifest shows."""
        newest = self.history[-1]
        if not newest.visible:
            return
        source = sorted(newest.visible)[pick % len(newest.visible)]
        number, generation = newest.visible[source]
        version = (source, number)
        name = f"{unit_of(version).id}-{generation}"
        assert remove_units(self.store, {name, f"{'0' * 32}-0"}) == {name}
        assert remove_units(self.store, {name}) == set(), "once"
        visible = {name: shown for name, shown in newest.visible.items() if name != source}
        stale = [name for name in newest.stale if name != source]
        removed = newest.removed | {(version, generation)}
        self.history.append(Snapshot(visible, stale, False, removed))

    @rule(who=st.integers(0, 1), missed=st.sets(st.integers(0, 40), max_size=6))
    def restart(self, who: int, missed: set[int]) -> None:
        """A driver starts again; its list of receipts may lack some that exist."""
        self.drivers[who] = self.fresh(missed)

    def fresh(self, missed: set[int] = frozenset()) -> Driver:
        class Forgetful(Store):
            def list(self, folder: str = "") -> list[ObjectInfo]:
                infos = super().list(folder)
                if folder != "commits":
                    return infos
                return [info for index, info in enumerate(infos) if index not in missed]

        listed = {info.path for info in Forgetful.list(self.store_as(Forgetful), "commits")}
        state = State(self.store_as(Forgetful))
        state.store = self.store
        known: dict[Version, int] = {}
        for version, num_generations in self.receipts.items():
            for generation in range(num_generations):
                name = f"commits/{unit_of(version).id}-{generation}.json"
                is_removed = (version, generation) in self.history[-1].removed
                if name in listed or is_removed or self.was_shown(version, generation):
                    known[version] = generation
        return Driver(state, len(self.history) - 1, known)

    def store_as(self, kind: type[Store]) -> Store:
        return kind(str(self.folder))

    def was_shown(self, version: Version, generation: int) -> bool:
        """Whether any manifest so far named these rows: its parts tell a new driver."""
        shown = (version[1], generation)
        return any(then.visible.get(version[0]) == shown for then in self.history)

    @rule(
        who=st.integers(0, 1),
        on_missing=st.sampled_from(["keep", "keep", "drop"]),
        may_complete=st.sampled_from([True, True, True, False]),
    )
    def write(self, who: int, on_missing: str, may_complete: bool) -> None:
        driver = self.drivers[who]
        try:
            expected = self.expected(driver, on_missing, may_complete)
        except Refused:
            expected = None
        snapshot = driver.list(self.listed)
        before = tree_digest(self.folder / "manifests")

        def write() -> Manifest | None:
            driver.state, manifest = write_next(
                driver.state,
                CONTRACT,
                1,
                lambda: snapshot,
                on_missing=on_missing,
                may_complete=may_complete,
            )
            return manifest

        if expected is None:
            with pytest.raises(SourceError, match="no longer listed"):
                write()
            # A lost race may have refreshed its state before the refusal; start both again.
            self.drivers[who] = self.fresh()
        else:
            number, named = expected
            manifest = write()
            if number == len(self.history):
                self.history.append(named)
            driver.base = number
            assert (manifest.number if manifest else 0) == number
        after = tree_digest(self.folder / "manifests")
        assert after.items() >= before.items(), "a manifest is never rewritten"
        assert len(after) == len(self.history) - 1

    def expected(self, driver: Driver, on_missing: str, may_complete: bool) -> tuple[int, Snapshot]:
        """DESIGN §4: the number of the manifest that the driver ends with, and what it names."""
        while True:
            base = self.history[driver.base]
            chosen = self.select(driver, base, on_missing)
            chosen.complete = chosen.complete and may_complete
            chosen.removed = self.removed(driver, base, chosen)
            nothing_yet = driver.base == 0 and not chosen.visible and not chosen.complete
            if chosen == base or nothing_yet:
                return driver.base, base
            if driver.base == len(self.history) - 1:
                return driver.base + 1, chosen
            driver.base = len(self.history) - 1
            driver.known = self.fresh().known

    def select(self, driver: Driver, base: Snapshot, on_missing: str) -> Snapshot:
        chosen = Snapshot({}, [], True)
        for source, version in self.listed.items():
            generation = driver.known.get((source, version), -1)
            if generation >= 0 and ((source, version), generation) not in base.removed:
                chosen.visible[source] = (version, generation)
                continue
            chosen.complete = False
            if source in base.visible:
                chosen.visible[source] = base.visible[source]
                chosen.stale.append(source)
        gone = base.visible.keys() - self.listed.keys()
        if gone and on_missing == "drop":
            if not self.listed or len(gone) * 10 > len(base.visible):
                raise Refused
        else:
            chosen.visible |= {source: base.visible[source] for source in gone}
        chosen.stale.sort()
        return chosen

    def removed(self, driver: Driver, base: Snapshot, chosen: Snapshot) -> set[tuple[Version, int]]:
        """Return what never counts again.

        These are the rows that go, and receipts of other versions of their sources that no
        manifest has named.
        """
        removed = set(base.removed)
        for source in base.visible.keys() | chosen.visible.keys():
            before, after = base.visible.get(source), chosen.visible.get(source)
            if before == after:
                continue
            if before:
                removed.add(((source, before[0]), before[1]))
            for version, generation in driver.known.items():
                shown = (version[1], generation)
                was_shown = any(
                    then.visible.get(source) == shown for then in self.history[: driver.base + 1]
                )
                if version[0] == source and shown != after and not was_shown:
                    removed.add((version, generation))
        return removed

    # What anybody may read, at any time.

    @invariant()
    def the_newest_manifest_is_as_the_model_says(self) -> None:
        if hasattr(self, "history") and len(self.history) > 1:
            assert list_manifests(self.store) == list(range(1, len(self.history)))
            self.check(len(self.history) - 1)

    @rule(pick=st.integers(0, 99))
    def an_old_manifest_reads_as_ever(self, pick: int) -> None:
        if len(self.history) > 1:
            self.check(pick % (len(self.history) - 1) + 1)

    def check(self, number: int) -> None:
        manifest, snapshot = read_manifest(self.store, number), self.history[number]
        records = read_records(self.store, manifest)
        assert {r.unit.source: (r.unit.version, r.generation) for r in records} == snapshot.visible
        assert [r.unit.source for r in records] == sorted(snapshot.visible)
        assert list(manifest.stale) == snapshot.stale
        assert manifest.complete == snapshot.complete
        removed = {
            f"{unit_of(version).id}-{generation}" for version, generation in snapshot.removed
        }
        assert list(manifest.removed) == sorted(removed)
        parts = [values_of((s, v), g) for s, (v, g) in sorted(snapshot.visible.items())]
        values = np.concatenate(parts) if parts else np.empty((0, 1, 1, 2), np.float32)
        num_rejects = sum(generation for _, generation in snapshot.visible.values())
        assert manifest.num_units == len(snapshot.visible)
        assert manifest.num_rows == len(values)
        assert manifest.num_rejects == num_rejects
        assert manifest.num_samples == len(values) + num_rejects
        assert manifest.buckets == ({"8x8": len(values)} if len(values) else {})
        stats = manifest.statistics
        assert stats.count == values.size
        if values.size:
            np.testing.assert_allclose(stats.mean, [values.mean(dtype=np.float64)], atol=1e-9)
            np.testing.assert_allclose(stats.std, [values.std(dtype=np.float64)], atol=1e-9)
            assert (stats.minimum[0], stats.maximum[0]) == (values.min(), values.max())
            np.testing.assert_array_equal(stats.histogram, Statistics.of(values).histogram)


Manifests.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, print_blob=True
)
TestManifests = Manifests.TestCase
TestManifests.pytestmark = [pytest.mark.slow]


# The same rules, one by one, where a random walk seldom comes.


class Output:
    """An output that one driver at a time works on."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder))

    def commit(self, version: Version, generation: int = 0) -> None:
        receipt = receipt_of(version, generation)
        assert self.store.put_if_absent(receipt.path, receipt.to_bytes())

    def write(self, *versions: Version, on_missing: str = "keep") -> Manifest:
        snapshot = {version[0]: [unit_of(version)] for version in versions}
        _, manifest = write_next(
            State(self.store), CONTRACT, 1, lambda: snapshot, on_missing=on_missing
        )
        assert manifest
        return manifest

    def shown(self, manifest: Manifest) -> list[tuple[str, str, int]]:
        records = read_records(self.store, manifest)
        return [(r.unit.source, r.unit.version, r.generation) for r in records]


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path)


def committed(output: Output, num_sources: int) -> list[Version]:
    versions = [(name, "v1") for name in NAMES[:num_sources]]
    for version in versions:
        output.commit(version)
    return versions


def test_no_manifest_is_written_before_the_first_commit(output: Output, tmp_path: Path):
    snapshot = {"a.tar": [unit_of(("a.tar", "v1"))]}
    _, manifest = write_next(State(output.store), CONTRACT, 1, lambda: snapshot, on_missing="keep")
    assert manifest is None
    assert not list(tmp_path.iterdir())


def test_drop_accepts_that_a_tenth_of_the_sources_is_missing_and_no_more(output: Output):
    versions = committed(output, 20)
    assert len(output.shown(output.write(*versions))) == 20
    with pytest.raises(SourceError, match=r"3 of 20 sources .*, such as 00\.tar"):
        output.write(*versions[3:], on_missing="drop")
    assert list_manifests(output.store) == [1]
    dropped = output.write(*versions[2:], on_missing="drop")
    assert dropped.complete
    assert [source for source, *_ in output.shown(dropped)] == NAMES[2:20]


def test_drop_rejects_an_empty_snapshot(output: Output):
    output.write(*committed(output, 1))
    with pytest.raises(SourceError, match="check the URLs of the config's `source`"):
        output.write(on_missing="drop")


def test_keep_keeps_the_rows_of_a_source_that_is_no_longer_listed(output: Output):
    versions = committed(output, 3)
    assert output.write(*versions).number == 1
    kept = output.write(*versions[:1])
    assert (kept.number, kept.complete, kept.stale) == (1, True, ())


def test_dropped_source_that_is_listed_again_needs_a_new_generation(output: Output):
    versions = committed(output, 11)
    first = output.write(*versions)
    dropped = output.write(*versions[1:], on_missing="drop")
    gone = unit_of(versions[0]).id
    assert dropped.removed == (f"{gone}-0",)
    back = output.write(*versions, on_missing="drop")
    assert (back.number, back.complete, back.removed) == (3, False, dropped.removed)
    state = State(output.store)
    assert state.current(gone) is None
    assert state.generation(gone) == 0
    output.commit(versions[0], 1)
    again = output.write(*versions, on_missing="drop")
    assert again.complete
    assert output.shown(again)[0] == (*versions[0], 1)
    assert output.shown(again)[1:] == output.shown(first)[1:]
    assert again.removed == dropped.removed


def test_receipt_of_an_older_version_that_no_manifest_listed_is_removed(output: Output):
    output.commit(("b.tar", "v1"))
    output.write(("b.tar", "v1"))
    output.commit(("a.tar", "v1"))
    output.commit(("a.tar", "v2"))
    manifest = output.write(("a.tar", "v2"), ("b.tar", "v1"))
    assert manifest.removed == (f"{unit_of(('a.tar', 'v1')).id}-0",)
    assert output.shown(manifest) == [("a.tar", "v2", 0), ("b.tar", "v1", 0)]
    state = State(output.store)
    assert not state.outside
    assert state.generation(unit_of(("a.tar", "v1")).id) == 0


def test_manifest_put_after_its_deadline_is_put_again_with_a_new_part(
    output: Output, monkeypatch: pytest.MonkeyPatch
):
    """A driver is frozen for a day between the upload of its part and the manifest."""
    output.commit(("a.tar", "v1"))
    frozen_s, boot_time_s = [0.0], clock.boot_time_s
    monkeypatch.setattr(clock, "boot_time_s", lambda: boot_time_s() + frozen_s[-1])

    def put_then_freeze(*args: Any) -> ManifestPart:
        part = put_part(*args)
        if len(frozen_s) == 1:
            frozen_s.append(PUT_WITHIN_S + 1)
        return part

    monkeypatch.setattr(state_module, "put_part", put_then_freeze)
    manifest = output.write(("a.tar", "v1"))
    assert len(frozen_s) == 2
    assert (manifest.number, manifest.num_units) == (1, 1)
    parts = {info.path: info.version for info in output.store.list("parts")}
    assert len(parts) == 2
    assert manifest.parts[0].path == max(parts, key=lambda path: parts[path])


def test_remove_units_tries_again_after_other_writers(
    output: Output, monkeypatch: pytest.MonkeyPatch
):
    output.commit(("a.tar", "v1"))
    output.write(("a.tar", "v1"))
    bad = f"{unit_of(('a.tar', 'v1')).id}-0"
    put_manifest, num_left = state_module.put_manifest, [2]

    def put_after_another(store: Store, manifest: Manifest, *args: Any) -> bool:
        if num_left[0]:
            num_left[0] -= 1
            version = (f"b{num_left[0]}.tar", "v1")
            output.commit(version)
            with monkeypatch.context() as patch:
                patch.setattr(state_module, "put_manifest", put_manifest)
                output.write(version)
        return put_manifest(store, manifest, *args)

    monkeypatch.setattr(state_module, "put_manifest", put_after_another)
    assert remove_units(output.store, {bad}) == {bad}
    assert num_left == [0]
    newest = read_manifest(output.store, 4)
    assert (newest.removed, newest.complete) == ((bad,), False)
    assert [source for source, *_ in output.shown(newest)] == ["b0.tar", "b1.tar"]
    num_left[0] = 99
    with pytest.raises(IncompleteRun, match="try again later"):
        remove_units(output.store, {f"{unit_of(('b0.tar', 'v1')).id}-0"})


def test_older_generation_that_no_manifest_listed_never_counts(output: Output):
    version = ("a.tar", "v1")
    output.commit(version, 0)
    output.commit(version, 1)
    manifest = output.write(version)
    assert output.shown(manifest) == [("a.tar", "v1", 1)]
    output.commit(("b.tar", "v1"))
    after = output.write(version, ("b.tar", "v1"))
    assert output.shown(after) == [("a.tar", "v1", 1), ("b.tar", "v1", 0)]


def test_changed_source_is_stale_until_it_is_encoded(output: Output):
    output.commit(("a.tar", "v1"))
    output.write(("a.tar", "v1"))
    stale = output.write(("a.tar", "v2"))
    assert (stale.stale, stale.complete) == (("a.tar",), False)
    assert output.shown(stale) == [("a.tar", "v1", 0)]
    output.commit(("a.tar", "v2"))
    fresh = output.write(("a.tar", "v2"))
    assert (fresh.stale, fresh.complete) == ((), True)
    assert output.shown(fresh) == [("a.tar", "v2", 0)]
    assert output.shown(read_manifest(output.store, 1)) == [("a.tar", "v1", 0)]


def test_driver_that_loses_the_manifest_number_reads_everything_again(output: Output):
    versions = committed(output, 2)
    snapshot = {version[0]: [unit_of(version)] for version in versions}
    late = State(output.store)
    output.commit(("02.tar", "v1"))
    output.write(*versions, ("02.tar", "v1"))
    asked = []

    def list_again() -> dict[str, list[Unit]]:
        asked.append(len(asked))
        return snapshot if len(asked) == 1 else snapshot | {"02.tar": [unit_of(("02.tar", "v1"))]}

    state, manifest = write_next(late, CONTRACT, 1, list_again, on_missing="keep")
    assert state is not late
    assert len(asked) == 2
    assert manifest
    assert (manifest.number, manifest.num_units) == (1, 3)


class CountedSnapshot(dict[str, list[Unit]]):
    """Counts how often it is asked for a source."""

    num_asked = 0

    def __getitem__(self, source: str) -> list[Unit]:
        self.num_asked += 1
        return super().__getitem__(source)


def test_known_snapshot_costs_only_checks_of_new_receipts(output: Output):
    snapshot = CountedSnapshot({name: [unit_of((name, "v1"))] for name in NAMES})
    state = State(output.store)
    costs, shown = [], []
    for names in (NAMES[:10], NAMES[10:13], NAMES[13:14], [], NAMES[14:]):
        for name in names:
            receipt = receipt_of((name, "v1"), 0)
            assert output.store.put_if_absent(receipt.path, receipt.to_bytes())
            state.add(receipt)
        snapshot.num_asked = 0
        state, manifest = write_next(state, CONTRACT, 1, lambda: snapshot, on_missing="keep")
        assert manifest
        costs.append(snapshot.num_asked)
        shown.append((manifest.number, manifest.num_units, manifest.complete))
        assert not state.outside, "what a manifest names is in its part"
    assert costs == [40, 3, 1, 0, 26]
    assert shown == [(1, 10, False), (2, 13, False), (3, 14, False), (3, 14, False), (4, 40, True)]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, print_blob=True)
@given(data=st.data())
def test_known_snapshot_gives_the_same_manifests_as_a_new_one(data: st.DataObject):
    """One driver writes manifest after manifest from one snapshot; one starts again for each."""
    names = NAMES[:5]
    changed = data.draw(st.sets(st.sampled_from(names)), "changed")
    before = {name: [unit_of((name, "v1"))] for name in names[:4]}
    after = {name: [unit_of((name, "v2" if name in changed else "v1"))] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        stores = [Store(f"{folder}/{who}") for who in ("knows", "fresh")]
        state = State(stores[0])
        generations: Counter[Version] = Counter()

        def commit(version: Version) -> None:
            receipt = receipt_of(version, generations[version])
            generations[version] += 1
            for store in stores:
                assert store.put_if_absent(receipt.path, receipt.to_bytes())
            state.add(receipt)

        def write(snapshot: dict[str, list[Unit]]) -> list[dict[str, Any]]:
            nonlocal state
            state, known = write_next(state, CONTRACT, 1, lambda: snapshot, on_missing="keep")
            second = write_next(
                State(stores[1]), CONTRACT, 1, lambda: dict(snapshot), on_missing="keep"
            )
            return [tree_of(stores[0], known), tree_of(stores[1], second[1])]

        for name in data.draw(st.sets(st.sampled_from(names[:4])), "first"):
            commit((name, "v1"))
        assert_alike(*write(before))
        for number in range(data.draw(st.integers(1, 5), "manifests")):
            for name in data.draw(st.lists(st.sampled_from(names), max_size=3), f"to {number}"):
                commit((name, after[name][0].version))
            assert_alike(*write(after))


def tree_of(store: Store, manifest: Manifest | None) -> dict[str, Any]:
    """What a manifest says; of its parts what they hold, for no two writers' have one name."""
    if manifest is None:
        return {}
    tree: dict[str, Any] = json.loads(manifest.to_bytes())
    del tree["created_at"]
    tables = read_parts(store, manifest.parts, "the test")
    return tree | {"parts": [table.to_pylist() for table in tables]}


def assert_alike(*trees: dict[str, Any]) -> None:
    sums = [tree.pop("statistics", {}) for tree in trees]
    assert trees[0] == trees[1]
    for name in sums[0]:
        if sums[0][name] is None:
            assert sums[1][name] is None
        else:
            np.testing.assert_allclose(sums[0][name], sums[1][name], atol=1e-9)


def test_replaced_units_cost_reads_of_their_parts_only(
    output: Output, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    read_bytes = Store.read_bytes
    snapshot = {name: [unit_of((name, "v1"))] for name in NAMES}
    for first in range(0, 40, 4):  # ten parts
        committed_now = [(name, "v1") for name in NAMES[first : first + 4]]
        for version in committed_now:
            output.commit(version)
        write_next(State(output.store), CONTRACT, 1, lambda: snapshot, on_missing="keep")
    state = State(output.store)
    monkeypatch.setattr(
        Store, "read_bytes", lambda self, path: read.append(path) or read_bytes(self, path)
    )
    costs = []
    for names in (NAMES[:2], NAMES[2:6], NAMES[6:7], NAMES[:1]):
        for name in names:
            version = (name, "v1")
            receipt = receipt_of(version, state.generation(unit_of(version).id) + 1)
            assert output.store.put_if_absent(receipt.path, receipt.to_bytes())
            state.add(receipt)
        read.clear()
        state, manifest = write_next(state, CONTRACT, 1, lambda: snapshot, on_missing="keep")
        costs.append(sum(path.startswith("parts/") for path in read))
    # At first all but the newest; then those in which a unit is replaced, as long as any is left.
    assert costs == [10, 2, 1, 1]
    assert manifest
    values = [values_of((n, "v1"), state.generation(unit_of((n, "v1")).id)) for n in NAMES]
    assert manifest.num_rows == sum(map(len, values))
    np.testing.assert_array_equal(
        manifest.statistics.histogram, Statistics.of(np.concatenate(values)).histogram
    )


def test_source_of_several_units_counts_when_all_are_committed(output: Output):
    parts = [Unit.of("a.parquet", 10, "v1", CONTRACT, f"{index}/2") for index in range(2)]
    for index, unit in enumerate(parts):
        receipt = receipt_of(("a.parquet", "v1"), 0)
        files = tuple(
            replace(file, path=file.path.replace(receipt.record.unit.id, unit.id))
            for file in receipt.record.files
        )
        receipt = replace(receipt, record=replace(receipt.record, unit=unit, files=files))
        assert output.store.put_if_absent(receipt.path, receipt.to_bytes())
        _, manifest = write_next(
            State(output.store), CONTRACT, 1, lambda: {"a.parquet": parts}, on_missing="keep"
        )
        assert bool(manifest) == (index == 1)
    assert manifest
    assert manifest.num_units == 2
    ranges = {record.unit.id: record.unit.range for record in read_records(output.store, manifest)}
    assert ranges == {unit.id: unit.range for unit in parts}


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff", b'{"format_version": 3}'])
def test_damaged_manifest_or_receipt_is_a_named_error(
    output: Output, tmp_path: Path, damage: bytes
):
    output.commit(("a.tar", "v1"))
    number = output.write(("a.tar", "v1")).number
    (tmp_path / "manifests" / f"{number:08d}.json").write_bytes(damage)
    with pytest.raises(DatasetError, match=r"manifests/00000001\.json"):
        newest_manifest(output.store)
    (receipt,) = (tmp_path / "commits").iterdir()
    receipt.write_bytes(damage)
    with pytest.raises(DatasetError, match=receipt.name):
        read_receipts(output.store, [receipt.stem])


def test_receipt_round_trips_through_json():
    receipt = receipt_of(("a.tar", "v1"), 2)
    back = Receipt.from_bytes(receipt.to_bytes())
    assert back.to_bytes() == receipt.to_bytes()
    assert back.record == receipt.record


def test_unit_id_depends_on_source_size_version_range_and_contract():
    ids = {
        Unit.of(source, size, version, contract, part).id
        for source in ("a", "b")
        for size in (1, 2)
        for version in ("x", "y")
        for contract in ("c", "d")
        for part in (None, "0/2", "1/2")
    }
    assert len(ids) == 48


def test_unit_id_is_the_documented_hash():
    # docs/format.md says how it is made; without a range, by null in its place.
    assert Unit.of("a", 1, "x", "c").id == named(["a", 1, "x", None, "c"])
    assert Unit.of("a", 1, "x", "c", "0/2").id == named(["a", 1, "x", "0/2", "c"])


def named(parts: list[str | int | None]) -> str:
    text = json.dumps(parts, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# The contract.


def test_contract_fingerprint_is_stable():
    # Datasets on disk hold this hash: a change of it makes them unusable.
    assert make_contract().fingerprint == (
        "13dd9101d73a79bb3eff9f104279d8c47d7aad40b3b7da535b28d62771440db7"
    )


def test_contract_round_trips_through_json():
    contract = make_contract(buckets=((64, 128), (128, 64)), posterior="moments")
    vae = replace(contract.vae, latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 1.0, 2.0, 3.0))
    contract = replace(contract, vae=vae)
    back = Contract.from_json(json.loads(json.dumps(contract.to_json())))
    assert back == contract
    assert back.fingerprint == contract.fingerprint
    assert contract.latent_shape((64, 128)) == (8, 16, 8)


def leaves(tree: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def another(path: str, value: object) -> object:
    """Another value that a contract may have at a path."""
    named: dict[str, object] = {
        "latents.posterior": "moments",
        "latents.dtype": "float32",
        "latents.format": "safetensors",
        "latents.precision": "bf16",
        "vae.encoder_fingerprint": "f" * 64,
        "vae.latents_mean": [0.5] * 4,
        "vae.latents_std": [0.5] * 4,
        "vae.pixel_range": [0, 1],
        "vae.downsample_factor": 16,
        "transform.buckets": [[8, 8]],
        "transform.min_side_px": 8,
        "transform.max_upscale": 2.0,
    }
    if path in named:
        return named[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value + 8
    return ["other"] if isinstance(value, list) else "other"


def test_every_field_changes_the_fingerprint_and_is_in_contract_diff():
    contract = make_contract()
    for path, value in leaves(contract.to_json()):
        if path == "format_version":
            continue
        tree = contract.to_json()
        section, names = tree, path.split(".")
        for name in names[:-1]:
            section = section[name]
        section[names[-1]] = another(path, value)
        other = Contract.from_json(tree)
        assert other.fingerprint != contract.fingerprint, path
        (line,) = contract_diff(contract, other)
        assert line.startswith(f"{path}: ")
        assert line == (
            f"{path}: dataset has {json.dumps(value)}, config has {json.dumps(section[names[-1]])}"
        )


def test_establish_contract_keeps_the_first_contract_and_accepts_an_equal_one(tmp_path: Path):
    store = Store(str(tmp_path))
    assert read_contract(store) is None
    first = establish_contract(store, make_contract(), {"checkpoint": "a"})
    again = establish_contract(store, make_contract(), {"checkpoint": "b"})
    assert first == again == (tmp_path / CONTRACT_PATH).read_bytes()
    assert read_contract(store) == make_contract()


def test_contract_mismatch_names_each_field(tmp_path: Path):
    store = Store(str(tmp_path))
    establish_contract(store, make_contract(), {})
    other = make_contract(dtype="float32", buckets=((128, 128),))
    with pytest.raises(
        ContractMismatch, match=r"delete .* to start over, as nothing is committed yet"
    ):
        establish_contract(store, other, {})
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / "0-0.json").touch()
    before = tree_digest(tmp_path)
    with pytest.raises(ContractMismatch) as caught:
        establish_contract(store, other, {})
    first, *lines = str(caught.value).splitlines()
    assert store.url in first
    assert "output.url" in first
    assert [line.strip() for line in lines] == [
        'latents.dtype: dataset has "float16", config has "float32"',
        "transform.buckets: dataset has [[64, 64]], config has [[128, 128]]",
    ]
    assert caught.value.exit_code == 2
    assert tree_digest(tmp_path) == before
    require_same(store, make_contract(), make_contract())


def test_establish_contract_reads_the_contract_of_a_faster_driver(tmp_path: Path):
    """The other driver puts its contract just before this one."""

    class Late(Store):
        def put_if_absent(self, path: str, data: bytes, **options: Any) -> bool:
            establish_contract(Store(str(tmp_path)), make_contract(), {"by": "the other"})
            return super().put_if_absent(path, data, **options)

    data = establish_contract(Late(str(tmp_path)), make_contract(), {"by": "me"})
    assert json.loads(data)["provenance"] == {"by": "the other"}
    with pytest.raises(ContractMismatch):
        establish_contract(Late(str(tmp_path)), make_contract(dtype="float32"), {})


def test_edited_contract_is_rejected(tmp_path: Path):
    store = Store(str(tmp_path))
    establish_contract(store, make_contract(), {})
    path = tmp_path / CONTRACT_PATH
    text = path.read_text()
    path.write_text(text.replace("0.18215", "0.13025"))
    with pytest.raises(DatasetError, match="was edited"):
        read_contract(store)
    path.write_text(text.replace('"format_version": 3', '"format_version": 4'))
    with pytest.raises(DatasetError, match=r"format version 4.* reads 3"):
        read_contract(store)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b"{}", b'{"contract": []}', b'{"contract": {}}'],
)
def test_damaged_contract_is_rejected(tmp_path: Path, damage: bytes):
    (tmp_path / CONTRACT_PATH).write_bytes(damage)
    with pytest.raises(DatasetError, match="contract"):
        read_contract(Store(str(tmp_path)))
