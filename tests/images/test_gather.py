"""Tars with links, and tars whose samples are scattered: nothing is lost, whatever the order."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache.images import tar_source as tar_module
from latentcache.images.source import (
    NotGrouped,
    RejectedSample,
    Sample,
    list_shards,
    read_shard,
)
from latentcache.storage_options import StorageOptions

IMAGE, KEEP = ("jpg", "png"), ("txt", "json")


def read(path: Path) -> tuple[list[Sample | RejectedSample], bool]:
    """Read as a unit does: in gather mode if the tar needs it; says whether it did."""
    (shard,) = list_shards(str(path), StorageOptions())
    try:
        options = StorageOptions()
        return list(read_shard(shard, image=IMAGE, keep=KEEP, options=options)), False
    except NotGrouped:
        results = list(read_shard(shard, image=IMAGE, keep=KEEP, options=options, gather=True))
        return results, True


def write(path: Path, members: list[tuple[str, bytes | str]], kind: str = "w") -> Path:
    """Write a tar; a member of type str is a hard link to that member."""
    with tarfile.open(path, kind) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            if isinstance(data, str):
                header.type, header.linkname = tarfile.LNKTYPE, data
                tar.addfile(header)
            else:
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def reasons(results: list[Sample | RejectedSample]) -> list[tuple[str | None, str]]:
    return [(s.key, "ok" if isinstance(s, Sample) else s.reject.reason) for s in results]


@pytest.mark.parametrize("kind", ["w", "w:gz"])
def test_captions_after_all_images_are_joined_to_their_images(tmp_path: Path, kind: str):
    members = [(f"{i}.jpg", b"image %d" % i) for i in range(50)]
    members += [(f"{i}.txt", b"caption %d" % i) for i in reversed(range(50))]
    results, gathered = read(write(tmp_path / "x.tar", members, kind))
    assert gathered
    assert results == [
        Sample(f"{i}", b"image %d" % i, {"txt": b"caption %d" % i}) for i in range(50)
    ]


def test_hard_and_symbolic_links_are_followed(tmp_path: Path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"image")
    (folder / "b.jpg").hardlink_to(folder / "a.jpg")
    (folder / "c.jpg").symlink_to("a.jpg")
    (folder / "sub").mkdir()
    (folder / "sub" / "d.jpg").symlink_to("../c.jpg")
    (folder / "e.jpg").symlink_to("/nowhere/e.jpg")
    (folder / "f.jpg").symlink_to("f.jpg")
    (folder / "g.txt").write_bytes(b"caption")
    (folder / "c.txt").symlink_to("g.txt")
    command = ["tar", "--sort=name", "-cf", str(tmp_path / "x.tar"), "d"]
    subprocess.run(command, cwd=tmp_path, check=True)
    results, gathered = read(tmp_path / "x.tar")
    assert gathered
    assert sorted(reasons(results)) == [
        ("d/a", "ok"),
        ("d/b", "ok"),
        ("d/c", "ok"),
        ("d/e", "link_target"),
        ("d/f", "link_target"),
        ("d/g", "no_image"),
        ("d/sub/d", "ok"),
    ]
    rows = {sample.key: sample for sample in results if isinstance(sample, Sample)}
    assert {sample.image for sample in rows.values()} == {b"image"}
    assert rows["d/c"].fields == {"txt": b"caption"}
    assert sum(sample.num_images for sample in results) == 6


def test_a_sparse_member_is_a_reject_and_is_not_read(tmp_path: Path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**30)
        file.seek(2**20)
        file.write(b"x")
    (tmp_path / "b.jpg").write_bytes(b"image")
    for version in ("gnu", "0.0", "0.1", "1.0"):
        form = ["--format=gnu"] if version == "gnu" else ["--format=pax"]
        form += [] if version == "gnu" else [f"--sparse-version={version}"]
        command = ["tar", "-S", *form, "-cf", "x.tar", "a.jpg", "b.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert (tmp_path / "x.tar").stat().st_size < 2**20
        results, _ = read(tmp_path / "x.tar")
        assert reasons(results) == [("a", "sparse_member"), ("b", "ok")], version


def test_a_sample_whose_fields_exceed_the_gather_window_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tar_module, "WINDOW_BYTES", 1000)
    members: list[tuple[str, bytes | str]] = [(f"{i}.jpg", b"image") for i in range(3)]
    members += [("0.txt", bytes(900)), ("1.txt", bytes(200)), ("2.txt", bytes(50))]
    results, _ = read(write(tmp_path / "x.tar", members))
    assert sorted(reasons(results)) == [("0", "ok"), ("1", "not_grouped"), ("2", "ok")]
    (reject,) = [s for s in results if isinstance(s, RejectedSample)]
    assert "not grouped by key" in reject.reject.message


def test_a_scattered_tar_with_too_many_members_is_one_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tar_module, "MAX_MEMBERS", 5)
    members = [(f"{i}.jpg", b"image") for i in range(3)] + [(f"{i}.txt", b"c") for i in range(3)]
    results, _ = read(write(tmp_path / "x.tar", members))
    assert reasons(results) == [(None, "not_grouped")]


def test_a_truncated_scattered_tar_loses_only_the_cut_sample(tmp_path: Path):
    members = [(f"{i}.jpg", bytes([i]) * 600) for i in range(4)]
    members += [(f"{i}.txt", bytes([65 + i]) * 600) for i in range(4)]
    path = write(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[: 4 * 1536 + 2 * 1536 + 512 + 100])  # within 2.txt
    results, _ = read(path)
    assert sorted(reasons(results), key=str) == [
        ("0", "ok"),
        ("1", "ok"),
        ("3", "ok"),
        (None, "truncated_shard"),
    ]
    assert sum(sample.num_images for sample in results) == 4


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.jpg", "a.npy", "a.jpg"],
        ["a.jpg", "a.JPG", "a.txt"],
        ["a.jpg", "b.jpg", "a.jpg", "a.txt"],
    ],
)
def test_a_late_field_of_an_earlier_sample_is_read(tmp_path: Path, names: list[str]):
    results, _ = read(write(tmp_path / "x.tar", [(name, name.encode()) for name in names]))
    (row,) = [s for s in results if isinstance(s, Sample) and s.key == "a"]
    assert row.image == b"a.jpg"
    assert row.fields == ({"txt": b"a.txt"} if "a.txt" in names else {})


fields = st.sampled_from(["jpg", "png", "txt", "json", "npy", "mask.png", "JPG"])
members = st.lists(st.tuples(st.sampled_from("abcdef"), fields), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(
    members=members,
    seed=st.integers(0, 99),
    links=st.booleans(),
    kind=st.sampled_from(["w", "w:gz"]),
)
def test_any_order_of_members_gives_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, str]],
    seed: int,
    links: bool,
    kind: str,
):
    folder, rng = tmp_path_factory.mktemp("any"), random.Random(seed)
    names = list(dict.fromkeys(f"{key}.{name}" for key, name in members))
    written: list[tuple[str, bytes | str]] = []
    for name in names:
        regular = [other for other, data in written if isinstance(data, bytes)]
        is_link = links and regular and rng.random() < 0.3
        written.append((name, rng.choice(regular) if is_link else name.encode()))
    path = write(folder / "x.tar", written, kind)
    contents = dict(written)
    expected: dict[str, dict[str, bytes]] = {}
    for name, data in written:  # the first of `jpg` and `JPG` counts
        key, _, ending = name.partition(".")
        content = contents[data] if isinstance(data, str) else data
        expected.setdefault(key, {}).setdefault(ending.lower(), content)
    results, _ = read(path)
    num_images = sum(name.lower().endswith(("jpg", "png")) for name in names)
    assert sum(sample.num_images for sample in results) == num_images
    rows = {sample.key: sample for sample in results if isinstance(sample, Sample)}
    for key, has in expected.items():
        image = has.get("jpg", has.get("png"))
        if image is None:
            assert key not in rows
        else:
            assert rows[key].image == image
            kept = {name: has[name] for name in KEEP if name in has}
            assert rows[key].fields == kept
