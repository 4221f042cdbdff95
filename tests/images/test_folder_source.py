"""Folders of images: grouped as the files of a tar, and cut so that a file touches one unit."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache import parse_config
from latentcache.errors import ConfigError, SourceChanged, SourceError, StorageError
from latentcache.images import folder_source as folder_module
from latentcache.images.source import (
    RejectedSample,
    Sample,
    SourceShard,
    list_source,
    read_shard,
    relist_source,
)
from latentcache.storage import ObjectInfo, Store
from latentcache.storage_options import StorageOptions
from makers import config_tree

OPTIONS = StorageOptions()
IMAGE = ("jpg", "png")
KEEP = ("txt", "json")


def fill(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def listed(folder: Path, num_units: int = 4, known: Sequence[str] = ()) -> list[SourceShard]:
    tree = config_tree(folder)
    tree["source"] = {"folder": str(folder)}
    return list_source(parse_config(tree).source, num_units, known)


def read(shard: SourceShard) -> list[Sample | RejectedSample]:
    return list(read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS))


def read_all(shards: Sequence[SourceShard]) -> list[Sample | RejectedSample]:
    return [sample for shard in shards for sample in read(shard)]


def by_key(samples: Sequence[Sample | RejectedSample]) -> list[Sample | tuple[str | None, str]]:
    """The samples, and key and message of the rejects, by key."""
    in_order = sorted(samples, key=lambda sample: sample.key or "")
    return [s if isinstance(s, Sample) else (s.key, s.reject.message) for s in in_order]


FILES = {
    "a.jpg": b"a",
    "a.txt": b"caption of a",
    "b/a.PNG": b"b",
    "b/a.json": b"{}",
    "b/a-1.jpg": b"b1",
    "b/a.d/c.jpg": b"between the files of b/a",
    "b/v1.0/x.jpg": b"dots in a folder",
    "only.txt": b"no image",
    "two.jpg": b"the first in the alphabet",
    "two.png": b"two",
}


def test_files_are_grouped_by_their_path_up_to_the_last_dot(tmp_path: Path):
    fill(tmp_path / "images", FILES)
    second = "two.png is a second image of its sample, beside two.jpg: rename one of them"
    for num_units in (1, 3, 64):
        assert by_key(read_all(listed(tmp_path / "images", num_units))) == [
            Sample("a", b"a", {"txt": b"caption of a"}),
            Sample("b/a", b"b", {"json": b"{}"}),
            Sample("b/a-1", b"b1", {}),
            Sample("b/a.d/c", b"between the files of b/a", {}),
            Sample("b/v1.0/x", b"dots in a folder", {}),
            ("only", "has txt, but none of jpg, png"),
            Sample("two", b"the first in the alphabet", {}),
            ("two", second),
        ]


names = st.sampled_from(["a", "b", "a-1", "é", "Z", "d.e", "v1.0", "__m__", ".h"])
endings = st.sampled_from([".jpg", ".JPG", ".txt", ".seg.png", ".png", ".gif", ".json", "", "."])


@settings(max_examples=60, deadline=None)
@given(
    paths=st.sets(
        st.tuples(st.lists(names, min_size=1, max_size=2).map("/".join), endings), max_size=10
    ),
    num_units=st.integers(1, 5),
)
def test_every_image_file_is_a_row_or_a_reject(
    tmp_path_factory: pytest.TempPathFactory, paths: set[tuple[str, str]], num_units: int
):
    folder = tmp_path_factory.mktemp("any") / "images"
    folder.mkdir()
    for name, ending in sorted(paths):
        path = folder / f"{name}{ending}"
        if not path.is_dir() and not any(parent.is_file() for parent in path.parents):
            fill(folder, {f"{name}{ending}": f"{name}{ending}".encode()})
    images = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in (".jpg", ".png", ".gif")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not str(path.relative_to(folder)).startswith("__m__/")
    ]
    if not images:
        with pytest.raises(SourceError, match="holds no image files"):
            listed(folder, num_units)
        return
    results = read_all(listed(folder, num_units))
    assert sum(sample.num_images for sample in results) == len(images)
    rows = [sample for sample in results if isinstance(sample, Sample)]
    assert not any(sample.extra_images for sample in rows)
    assert len({sample.key for sample in rows}) == len(rows)
    for sample in rows:
        path = sample.image.decode()
        assert path in images
        assert path.rpartition(".")[0] == sample.key
    stems = {path.rpartition(".")[0] for path in images if not path.lower().endswith(".gif")}
    assert {sample.key for sample in rows} == stems


def test_hidden_files_and_folders_are_skipped(tmp_path: Path):
    fill(tmp_path, {"a.jpg": b"a", ".b.jpg": b"b", ".git/c.jpg": b"c", "d/.e/f.jpg": b"f"})
    assert [sample.key for sample in read_all(listed(tmp_path))] == ["a"]


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path):
    fill(tmp_path, {"images/a.jpg": b"a", "elsewhere/b.jpg": b"b"})
    (tmp_path / "images" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    results = by_key(read_all(listed(tmp_path / "images")))
    broken = ("broken", "broken.jpg is a link to a file that does not exist")
    assert results == [Sample("a", b"a", {}), broken, Sample("linked", b"b", {})]


def test_a_name_that_is_not_utf8_is_a_reject(tmp_path: Path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (results,) = read_all(listed(tmp_path))
    assert isinstance(results, RejectedSample)
    assert (results.key, results.reject.reason) == ("caf\\xe9", "key_not_utf8")


def changed(before: Sequence[SourceShard], after: Sequence[SourceShard]) -> list[str]:
    versions = {shard.url: shard.version for shard in before}
    return [shard.url for shard in after if versions.get(shard.url) != shard.version]


def test_a_new_replaced_or_deleted_file_changes_one_unit(tmp_path: Path):
    fill(tmp_path, {f"{index:03d}.jpg": b"x" for index in range(100)})
    first = listed(tmp_path, 8)
    assert len(first) == 8
    assert len({shard.url for shard in first}) == 8
    assert listed(tmp_path, 8) == first
    fill(tmp_path, {"new.jpg": b"new"})
    second = listed(tmp_path, 8)
    assert len(changed(first, second)) == 1
    fill(tmp_path, {"new.txt": b"its caption"})
    third = listed(tmp_path, 8)
    assert changed(second, third) == changed(first, second), "a sample lies in one unit"
    fill(tmp_path, {"017.jpg": b"other"})
    fourth = listed(tmp_path, 8)
    assert len(changed(third, fourth)) == 1
    (tmp_path / "017.jpg").unlink()
    fifth = listed(tmp_path, 8)
    assert changed(fourth, fifth) == changed(third, fourth)
    assert len(read_all(fifth)) == 100


def test_the_number_of_units_of_an_output_never_changes(tmp_path: Path):
    fill(tmp_path, {f"{index:03d}.jpg": b"x" for index in range(300)})
    url = Store(str(tmp_path)).url
    tree = config_tree(tmp_path)
    tree["source"] = {"folder": f"{tmp_path}/"}
    source = parse_config(tree).source
    assert {shard.url.rpartition("/")[2] for shard in list_source(source)} == {"64"}
    known = [f"{url}#3/16", f"{url}/deeper#1/4", "file:///other#1/8", f"{url}/x.tar"]
    assert {shard.url.rpartition("/")[2] for shard in list_source(source, None, known)} == {"16"}
    assert list_source(source, 16, known) == list_source(source, None, known)
    with pytest.raises(ConfigError, match=r"num_units is 8, but .* in 16 units"):
        list_source(source, 8, known)


def test_a_folder_without_images_is_an_error(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SourceError, match="holds no image files"):
            listed(folder)
    fill(tmp_path, {"a.txt": b"a caption alone", "README.md": b""})
    with pytest.raises(
        SourceError, match=r"extension of source\.image \(jpg, jpeg, .*source\.folder"
    ):
        listed(tmp_path)


def test_a_file_replaced_or_deleted_after_the_listing_raises_source_changed(tmp_path: Path):
    fill(tmp_path, {f"{index}.jpg": b"x" for index in range(9)})
    (shard,) = listed(tmp_path, 1)
    (tmp_path / "7.jpg").write_bytes(b"y")  # of the same size
    with pytest.raises(SourceChanged, match=r"7\.jpg changed"):
        read(shard)
    (again,) = relist_source(shard.url, OPTIONS)
    assert again.version != shard.version
    assert len(read(again)) == 9
    (tmp_path / "5.jpg").unlink()
    with pytest.raises(SourceChanged, match=r"5\.jpg was deleted"):
        read(again)
    assert len(read(*relist_source(shard.url, OPTIONS))) == 8
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(SourceError, match="holds no image files"):
        relist_source(shard.url, OPTIONS)


def test_relisting_a_slot_without_files_is_an_error(tmp_path: Path):
    fill(tmp_path, {f"{index}.jpg": b"x" for index in range(4)})
    shards = listed(tmp_path, 64)
    assert len(shards) > 1
    for file in shards[0].files:
        (tmp_path / file.path).unlink()
    assert listed(tmp_path, 64) == shards[1:], "a slot without files is not listed"
    with pytest.raises(SourceError, match="no longer has files"):
        relist_source(shards[0].url, OPTIONS)


@pytest.mark.parametrize("fault", ["breaks", "is cut"])
def test_a_failing_connection_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    fill(tmp_path, {f"{index}.jpg": b"image" for index in range(9)})
    (shard,) = listed(tmp_path, 1)
    read_bytes = Store.read_bytes
    fired: list[str] = []

    def fail(self: Store, path: str) -> bytes:
        if path != "6.jpg":
            return read_bytes(self, path)
        fired.append(path)
        if fault == "breaks":
            raise StorageError(f"{path}: gone")
        return read_bytes(self, path)[:-1]

    monkeypatch.setattr(Store, "read_bytes", fail)
    with pytest.raises(StorageError, match=r"6\.jpg: (gone|the connection gave 4 of 5)"):
        read(shard)
    assert fired == ["6.jpg"]


def test_files_are_fetched_in_parallel_in_order_and_within_the_byte_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill(tmp_path, {f"{index:03d}.jpg": bytes([index]) * 1000 for index in range(90)})
    (shard,) = listed(tmp_path, 1)
    monkeypatch.setattr(folder_module, "_MAX_BYTES", 12_000)
    read_bytes = Store.read_bytes
    lock, together = threading.Lock(), threading.Barrier(4)
    began: list[str] = []

    def count(self: Store, path: str) -> bytes:
        with lock:
            began.append(path)
            is_among_the_first = len(began) <= 4
        if is_among_the_first:
            together.wait(60)
        return read_bytes(self, path)

    monkeypatch.setattr(Store, "read_bytes", count)
    reading = read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS)
    for index, sample in enumerate(reading):
        assert sample == Sample(f"{index:03d}", bytes([index]) * 1000, {})
        assert len(began) <= index + 1 + 13
    assert sorted(began) == [f"{index:03d}.jpg" for index in range(90)]


def test_closing_the_reader_early_ends_its_threads(tmp_path: Path):
    fill(tmp_path, {f"{index}.jpg": b"x" for index in range(50)})
    (shard,) = listed(tmp_path, 1)
    before = threading.active_count()
    reading = read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS)
    next(reading)
    del reading
    assert threading.active_count() == before


def test_only_selected_fields_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path, {"a.jpg": bytes(100), "a.npy": bytes(500), "b.jpg": bytes(101)})
    read_bytes = Store.read_bytes
    fetched: list[str] = []
    monkeypatch.setattr(
        Store, "read_bytes", lambda self, path: fetched.append(path) or read_bytes(self, path)
    )
    counts: list[int] = []
    (shard,) = listed(tmp_path, 1)
    reading = read_shard(
        shard, image=IMAGE, keep=KEEP, options=OPTIONS, max_sample_bytes=100, on_read=counts.append
    )
    results = list(reading)
    assert results[0] == Sample("a", bytes(100), {})
    assert isinstance(results[1], RejectedSample)
    assert results[1].reject.reason == "oversized_sample"
    assert (fetched, counts) == (["a.jpg"], [100])


def test_a_folder_in_a_memory_store_is_read(memory_store: None):
    memory = fsspec.filesystem("memory")
    for name in ("a.jpg", "deep/er/b.jpg", "deep/er/b.txt", ".hidden/c.jpg"):
        memory.pipe_file(f"/photos/{name}", name.encode())
    tree = config_tree(Path("/none"))
    tree["source"] = {"folder": "memory://photos"}
    shards = list_source(parse_config(tree).source, 3)
    assert {shard.url.partition("#")[0] for shard in shards} == {"memory://photos"}
    assert by_key(read_all(shards)) == [
        Sample("a", b"a.jpg", {}),
        Sample("deep/er/b", b"deep/er/b.jpg", {"txt": b"deep/er/b.txt"}),
    ]
    memory.rm("/photos", recursive=True)


def test_walk_lists_files_at_any_depth(tmp_path: Path):
    fill(tmp_path, {"a": b"1", "b/c": b"22", "b/d/e": b"333", "other/f": b"4"})
    store = Store(str(tmp_path))

    def seen(infos: list[ObjectInfo]) -> list[tuple[str, int]]:
        return [(info.path, info.size_bytes) for info in infos]

    assert seen(store.walk()) == [("a", 1), ("b/c", 2), ("b/d/e", 3), ("other/f", 1)]
    assert seen(store.walk("b")) == [("b/c", 2), ("b/d/e", 3)]
    assert store.walk("none") == []
    assert store.walk("b")[0] == store.info("b/c")
