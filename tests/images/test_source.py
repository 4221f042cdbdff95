"""Finding and reading source shards, against webdataset's own reader and cut at every place."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from latentcache.errors import ConfigError, SourceChanged, SourceError, StorageError
from latentcache.images.source import (
    RejectedSample,
    Sample,
    SourceShard,
    expand_urls,
    list_shards,
    read_shard,
)
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions
from makers import pair, tar_bytes

OPTIONS = StorageOptions()
IMAGE = ("jpg", "png")
KEEP = ("txt", "json")


def read_bytes(folder: Path, data: bytes, name: str = "x.tar") -> list[Sample | RejectedSample]:
    path = folder / name
    path.write_bytes(data)
    (shard,) = list_shards(str(path), OPTIONS)
    return list(read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS))


def summary(results: list[Sample | RejectedSample]) -> list[tuple[str | None, str]]:
    """(key, "ok" or the reason) for each."""
    for result in results:
        if isinstance(result, RejectedSample):
            assert result.reject.stage == "read"
            (result.key or "").encode()
    return [(r.key, "ok" if isinstance(r, Sample) else r.reject.reason) for r in results]


GOOD = [*pair("a", b"x" * 700), *pair("b/c", b""), ("b/d.json", b"{}"), ("b/d.png", b"y" * 512)]


def test_samples_have_the_selected_fields_in_tar_order(tmp_path: Path):
    members = [("k1.npy", b"dropped"), ("k1.JPG", b"one"), ("k1.png", b"two"), *pair("k2")]
    assert read_bytes(tmp_path, tar_bytes(members)) == [
        Sample("k1", b"one", {}, extra_images=("png",)),
        Sample("k2", b"image", {"txt": b"caption of k2"}),
    ]


def test_a_field_can_be_image_and_kept(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(tar_bytes([("k.png", b"1"), ("k.seg.png", b"2")]))
    (shard,) = list_shards(str(tmp_path / "x.tar"), OPTIONS)
    keep = ("png", "seg.png")
    (sample,) = read_shard(shard, image=("jpg", "png"), keep=keep, options=OPTIONS)
    assert sample == Sample("k", b"1", {"png": b"1", "seg.png": b"2"}, extra_images=("seg.png",))


names = st.lists(
    st.sampled_from(["a", "b", "c", "é", "__m__", "x-1", "Z", "d.e"]), min_size=1, max_size=3
).map("/".join)
endings = st.sampled_from([".jpg", ".JPG", ".txt", ".seg.png", ".png", ".json", "", ".", ".x.y"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(names, endings, st.binary(max_size=600)), max_size=12))
def test_tars_are_read_as_webdataset_reads_them(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, str, bytes]]
):
    members: dict[str, bytes] = {}
    keys: list[str] = []
    for name, ending, data in parts:  # neighbours, and no field twice
        key, _, rest = (name + ending).rpartition("/")
        group = f"{key}/{rest.partition('.')[0]}"
        lower = (name + ending).lower()
        if (group not in keys or keys[-1] == group) and lower not in map(str.lower, members):
            keys = [*keys, group] if group not in keys else keys
            members[name + ending] = data
    folder = tmp_path_factory.mktemp("wds")
    data_of_all = tar_bytes(list(members.items()))
    ours = read_bytes(folder, data_of_all)
    files = tar_file_expander([{"url": "x.tar", "stream": io.BytesIO(data_of_all)}])
    theirs = list(group_by_keys(files))
    assert [r.key for r in ours] == [sample["__key__"] for sample in theirs]
    for result, sample in zip(ours, theirs, strict=True):
        images = [sample[name] for name in IMAGE if name in sample]
        if isinstance(result, Sample):
            assert result.image == images[0]
            assert result.fields == {name: sample[name] for name in KEEP if name in sample}
        else:
            assert (result.reject.reason, images) == ("no_image", [])
    shutil.rmtree(folder)


def expected_after_cut(data: bytes, end: int) -> list[tuple[str | None, str]]:
    """The documented rule, worked out from the layout of the whole tar."""
    if end == 0:
        return [(None, "empty_shard")]
    if end < 512:
        return [(None, "not_a_tar")]
    whole: list[tuple[str, str]] = []
    cut_key = None
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            data_end = member.offset_data + (member.size + 511) // 512 * 512
            key, _, name = member.name.partition(".")
            if end >= data_end:
                whole.append((key, name))
            elif end >= member.offset_data:
                cut_key = key
    keys = list(dict.fromkeys(key for key, _ in whole if key != cut_key))
    rows: list[tuple[str | None, str]] = []
    for key in keys:
        has_image = any(k == key and name in IMAGE for k, name in whole)
        rows.append((key, "ok" if has_image else "no_image"))
    is_whole = end >= data_end + 1024
    return rows if is_whole else [*rows, (None, "truncated_shard")]


def test_a_truncated_tar_keeps_the_samples_before_the_cut(tmp_path: Path):
    data = tar_bytes([*GOOD, ("no-image.txt", b"t"), *pair("z" * 120)])
    near_blocks = {b + d for b in range(0, len(data), 512) for d in (-1, 0, 1, 200)}
    for end in sorted(e for e in near_blocks if 0 <= e <= len(data)):
        results = read_bytes(tmp_path, data[:end])
        assert summary(results) == expected_after_cut(data, end), end
        if lost := [r for r in results if r.key is None and "is lost" in r.reject.message]:
            (reject,) = lost
            assert f"sample {_next_key(results)} is lost" in reject.reject.message


def _next_key(results: list[Sample | RejectedSample]) -> str:
    order = ["a", "b/c", "b/d", "no-image", "z" * 120]
    return order[len(results) - 1]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 1200), min_size=1, max_size=6), st.floats(0, 1))
def test_a_truncated_tar_keeps_the_samples_before_the_cut_for_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], where: float
):
    members = [
        member
        for i, size in enumerate(sizes)
        for member in [(f"{i}.txt", b"c" * (size // 2)), (f"{i}.jpg", b"i" * size)]
    ]
    data = tar_bytes(members)
    end = round(where * (len(tar_bytes(members, end=False)) + 1100))
    folder = tmp_path_factory.mktemp("cut")
    assert summary(read_bytes(folder, data[:end])) == expected_after_cut(data, end)
    shutil.rmtree(folder)


def test_a_cut_within_an_ignored_file_loses_no_sample(tmp_path: Path):
    data = tar_bytes([*pair("a"), ("__stats__", b"s" * 1000)], end=False)
    assert summary(read_bytes(tmp_path, data[:-300])) == [("a", "ok"), (None, "truncated_shard")]


def test_gzipped_tars_are_read_whole_and_truncated(tmp_path: Path):
    plain = tar_bytes(GOOD)
    data = gzip.compress(plain, mtime=0)
    whole = read_bytes(tmp_path, plain)
    assert read_bytes(tmp_path, data, "x.tgz") == whole
    halves = gzip.compress(plain[:1000]) + gzip.compress(plain[1000:])
    assert read_bytes(tmp_path, halves, "x.tgz") == whole
    for end in range(20, len(data)):
        results = read_bytes(tmp_path, data[:end], "x.tgz")
        if results == whole:
            came = zlib.decompressobj(wbits=31).decompress(data[:end])
            assert len(came) >= len(tar_bytes(GOOD, end=False)) + 1024
            continue
        *samples, reject = results
        assert summary([reject])[0][1] in ("truncated_shard", "not_a_tar")
        assert [s.key for s in samples] == [s.key for s in whole[: len(samples)]]
        assert samples[:-1] == whole[: len(samples[:-1])]
        if samples and samples[-1] != whole[len(samples) - 1]:  # only a field, or the image, less
            assert f"last sample, {samples[-1].key}, may lack fields" in reject.reject.message
    damaged = data[:-8] + bytes(8)
    assert summary(read_bytes(tmp_path, damaged))[-1] == (None, "corrupt_shard")
    assert read_bytes(tmp_path, damaged)[:-1] == whole


def test_unsafe_and_duplicate_keys_and_missing_images_are_rejects(tmp_path: Path):
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")
    members = [
        *pair("a"),
        *pair("a", b"again, next to the first"),
        ("only-text.txt", b"t"),
        *pair("../up"),
        *pair("in/../side"),
        *pair("/absolute"),
        *pair(latin),
        *pair("bell\a"),
        ("v1.0\nbeta/x.jpg", b"image"),
        *pair("dots..in.name"),
        *pair("a", b"again, later"),
    ]
    assert summary(read_bytes(tmp_path, tar_bytes(members))) == [
        ("a", "ok"),
        ("a", "duplicate_key"),
        ("only-text", "no_image"),
        ("../up", "unsafe_key"),
        ("in/../side", "unsafe_key"),
        ("/absolute", "unsafe_key"),
        ("caf\\xe9", "key_not_utf8"),
        ("bell\\x07", "unsafe_key"),
        ("v1.0\\x0abeta/x.jpg", "unsafe_key"),
        ("dots", "no_image"),
        ("a", "duplicate_key"),
    ]


def test_a_sample_whose_fields_together_are_too_large_is_a_reject(tmp_path: Path):
    members = [("a.jpg", bytes(600)), ("a.txt", bytes(401)), ("b.npy", bytes(5000))]
    members += [("b.jpg", bytes(600)), ("b.txt", bytes(400)), ("c.png", bytes(900))]
    members += [("c.jpg", bytes(900)), ("d.jpg", bytes(1001))]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    (shard,) = list_shards(str(tmp_path / "x.tar"), OPTIONS)
    reserved: list[int] = []
    results = list(
        read_shard(
            shard,
            image=IMAGE,
            keep=KEEP,
            options=OPTIONS,
            max_sample_bytes=1000,
            reserve=reserved.append,
        )
    )
    assert summary(results) == [
        ("a", "oversized_sample"),
        ("b", "ok"),
        ("c", "ok"),  # of two images only one is held
        ("d", "oversized_sample"),
    ]
    assert max(reserved) == 1000


def test_directories_are_skipped_and_a_device_named_as_an_image_is_a_reject(tmp_path: Path):
    others = []
    for name, kind in (("f.jpg", tarfile.DIRTYPE), ("p.jpg", tarfile.FIFOTYPE)):
        header = tarfile.TarInfo(name)
        header.type = kind
        others.append(header)
    results = summary(read_bytes(tmp_path, tar_bytes([*others, *pair("a")])))
    assert results == [("p", "not_a_file"), ("a", "ok")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", [(None, "empty_shard")]),
        (b"no tar", [(None, "not_a_tar")]),
        (b"no tar, but long" * 1000, [(None, "not_a_tar")]),
        (gzip.compress(b"no tar", mtime=0), [(None, "not_a_tar")]),
        (bytes(10240), []),
        (bytes(512), [(None, "truncated_shard")]),
        (tar_bytes(pair("a"), end=False), [("a", "ok"), (None, "truncated_shard")]),
        (tar_bytes(pair("a")) + tar_bytes(pair("b")), [("a", "ok"), (None, "trailing_data")]),
        (
            tar_bytes(pair("a"), end=False) + b"?" * 2048,
            [("a", "ok"), (None, "corrupt_shard")],
        ),
    ],
)
def test_a_damaged_shard_has_one_keyless_reject(
    tmp_path: Path, data: bytes, expected: list[tuple[str | None, str]]
):
    assert summary(read_bytes(tmp_path, data)) == expected


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(1, 8000), st.binary(min_size=1, max_size=12)), max_size=5))
def test_damage_never_raises_and_leaves_at_most_one_keyless_reject(
    tmp_path_factory: pytest.TempPathFactory, patches: list[tuple[int, bytes]]
):
    data = bytearray(tar_bytes([*GOOD, *pair("z" * 120)]))
    for start, patch in patches:
        data[start : start + len(patch)] = patch
    folder = tmp_path_factory.mktemp("damage")
    assert [r.key for r in read_bytes(folder, bytes(data))].count(None) <= 1
    shutil.rmtree(folder)


@pytest.mark.parametrize("size", [2**33, -512, 2**60])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_with_a_huge_size_uses_bounded_time_and_memory(
    tmp_path: Path, size: int, kind: bytes
):
    header = tarfile.TarInfo("huge.jpg")
    header.type, header.size = kind, size
    data = tar_bytes(pair("a"), end=False) + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    results = summary(read_bytes(tmp_path, data))
    assert results[0] == ("a", "ok")
    assert results[-1][0] is None or results[-1] == ("huge", "oversized_sample")


@pytest.mark.parametrize("magic", [b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh9", b"PK\x03\x04"])
def test_unsupported_compression_is_an_error_with_the_fix(tmp_path: Path, magic: bytes):
    with pytest.raises(SourceError, match=r"x\.tar is compressed by .*repack it as \.tar"):
        read_bytes(tmp_path, magic + bytes(2000))


def test_a_tar_whose_first_name_looks_like_a_compressed_file_is_read(tmp_path: Path):
    assert summary(read_bytes(tmp_path, tar_bytes(pair("BZh9")))) == [("BZh9", "ok")]


def test_a_cut_connection_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tar_bytes(GOOD)
    monkeypatch.setattr(Store, "open", lambda self, path: io.BytesIO(data[:2000]))
    with pytest.raises(StorageError, match="cut after 2000 of"):
        read_bytes(tmp_path, data)


def test_a_failing_read_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 1000:
                raise ConnectionResetError("gone")
            return super().read(size)

    for data in (tar_bytes(GOOD), gzip.compress(tar_bytes([("a.jpg", bytes(10**7))]), 0)):
        monkeypatch.setattr(Store, "_open", lambda *_, data=data: Failing(data))
        with pytest.raises(StorageError, match=r"x\.tar.*gone"):
            read_bytes(tmp_path, data)


def test_a_shard_replaced_or_deleted_while_it_is_read_raises_source_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(GOOD))
    (shard,) = list_shards(str(path), OPTIONS)
    reading = read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS)
    next(reading)
    path.write_bytes(tar_bytes(GOOD))
    with pytest.raises(SourceChanged, match="changed"):
        list(reading)
    monkeypatch.setattr(Store, "open", lambda self, path: io.BytesIO(b"other"))
    with pytest.raises(SourceChanged, match="changed"):  # though it looks like a cut connection
        list(read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS))
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(SourceChanged, match="deleted"):
        list(read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS))


def test_closing_the_reader_early_raises_no_warning(tmp_path: Path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(GOOD))
    (shard,) = list_shards(str(path), OPTIONS)
    reading = read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS)
    next(reading)
    reading.close()


def test_brace_ranges_and_lists_are_expanded():
    assert expand_urls("s3://b/{a,b}/{08..10}.tar") == [
        f"s3://b/{folder}/{number}.tar" for folder in "ab" for number in ("08", "09", "10")
    ]
    assert expand_urls(["x.tar", "y-{0..1}.tar"]) == ["x.tar", "y-0.tar", "y-1.tar"]


@pytest.mark.parametrize(
    "shards",
    [
        "pipe:cat x.tar",
        "-",
        "x.tar; cat y.tar | sh",
        "$(ls).tar",
        "`ls`.tar",
        "${HOME}/x.tar",
        "zip://x.tar::s3://b/y.zip",
        "x-{0..1.tar",
        "x-{0..99999999999}.tar",
        "x.{tar,tar}",
        ["x.tar", "x.tar"],
        [],
        "",
    ],
)
def test_invalid_shard_patterns_are_config_errors(shards: str | list[str]):
    with pytest.raises(ConfigError, match=r"source\.shards: "):
        expand_urls(shards)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b-1.tar", "b-0.tar", "b-2.tgz", "other.txt", "c-0.tar"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    (tmp_path / "sub.tar").mkdir()
    return tmp_path


def listed(shards: str | list[str]) -> list[str]:
    return [shard.url.rpartition("/")[2] for shard in list_shards(shards, OPTIONS)]


def test_shards_are_listed_sorted_with_size_and_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    results = list_shards(f"{folder}/b-{{1,0}}.tar", OPTIONS)
    assert [shard.url for shard in results] == [f"file://{folder}/b-{i}.tar" for i in range(2)]
    assert {shard.size_bytes for shard in results} == {21}
    assert all(shard.version for shard in results)
    monkeypatch.chdir(folder)
    assert list_shards(["b-0.tar", "./b-1.tar"], OPTIONS) == results
    assert list_shards([f"file://{folder}/b-?.tar"], OPTIONS) == results


def test_a_shard_whose_name_is_not_utf8_is_an_error(tmp_path: Path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff.tar")).write_bytes(b"")
    with pytest.raises(SourceError, match=r"x\\xff\.tar has a name that is not UTF-8: rename it"):
        list_shards(f"{tmp_path}/*.tar", OPTIONS)


def test_globs_match_files_of_one_folder(folder: Path):
    assert listed(f"{folder}/*.tar") == ["b-0.tar", "b-1.tar", "c-0.tar"]
    assert listed(f"{folder}/b-[02].t*") == ["b-0.tar", "b-2.tgz"]
    assert listed([f"{folder}/{{b,c}}-*.tar", f"{folder}/b-0.tar"]) == listed(f"{folder}/*.tar")


def test_many_urls_of_a_folder_are_found_by_one_listing(tmp_path: Path):
    for i in range(40):
        (tmp_path / f"{i:02}.tar").write_bytes(bytes(i))
    many = list_shards(f"{tmp_path}/{{00..39}}.tar", OPTIONS)
    assert [shard.size_bytes for shard in many] == list(range(40))
    assert many[:2] == list_shards(f"{tmp_path}/{{00..01}}.tar", OPTIONS)
    with pytest.raises(SourceError, match=r"40\.tar does not exist \(nor do 9 more\)"):
        list_shards(f"{tmp_path}/{{00..49}}.tar", OPTIONS)


@pytest.mark.parametrize(
    ("shards", "error", "text"),
    [
        ("{}/none-*.tar", SourceError, r"none-\*\.tar matches nothing"),
        ("{}/missing/*.tar", SourceError, "matches nothing"),
        ("{}/x.tar", SourceError, r"x\.tar does not exist: "),
        ("{}/sub.tar", ConfigError, r"sub\.tar is a folder: .*source\.folder"),
        ("{}/*", ConfigError, r"\* matches .*other\.txt, which has neither the extension of a tar"),
        ("{}/other.txt", ConfigError, r"other\.txt, which has neither the extension of a tar"),
        ("{}/s*/x.tar", ConfigError, "glob before its last"),
        ("s3://bucket", ConfigError, "names no file"),
    ],
)
def test_shards_that_cannot_be_found_are_errors_that_name_them(
    folder: Path, shards: str, error: type[Exception], text: str
):
    with pytest.raises(error, match=text):
        list_shards(shards.replace("{}", str(folder)), OPTIONS)


def test_one_file_under_two_names_is_a_config_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"b-0\.tar is named twice"):
        list_shards(["b-0.tar", "./b-0.tar"], OPTIONS)


def test_a_shard_in_a_memory_store_is_read(memory_store: None):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shards/x.tar", tar_bytes(GOOD))
    (shard,) = list_shards("memory://shards/*.tar", OPTIONS)
    assert isinstance(shard, SourceShard)
    results = list(read_shard(shard, image=IMAGE, keep=KEEP, options=OPTIONS))
    assert [r.key for r in results] == ["a", "b/c", "b/d"]
    memory.rm("/shards", recursive=True)


def test_memory_stays_bounded_by_a_sample(tmp_path: Path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(60):
            header = tarfile.TarInfo(f"{i}.jpg")
            header.size = 2**20
            tar.addfile(header, io.BytesIO(bytes(2**20)))
    (shard,) = list_shards(str(path), OPTIONS)
    tracemalloc.start()
    for _ in read_shard(shard, image=IMAGE, keep=(), options=OPTIONS):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20
