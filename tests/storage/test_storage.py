"""Stores: put exactly once among many writers, and tell plainly what is wrong."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache.errors import DiskFull, ObjectNotFound, StorageError
from latentcache.storage import Store, backend, s3, split_url
from latentcache.storage_options import StorageOptions
from servers import (
    DEADLINE_S,
    Exchange,
    FaultyProxy,
    Reply,
    S3Server,
    cut_halfway,
    free_port,
    lose_reply,
    refuse,
    slow_down,
)

# What people name files, and what trips those who take a path for a URL.
NAMES = st.text(st.sampled_from("ab0 .-_%#?&+=~:'()[]é—"), min_size=1, max_size=12).filter(
    lambda name: name.strip(" .") == name and name[0] != "-"
)


@pytest.fixture(params=["folder", "moto", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "folder":
        return Store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue(request.param)
    return Store(f"{bucket_of(server)}/{tmp_path.name}", server.options)


def bucket_of(server: S3Server) -> str:
    if not any(b["Name"] == "stores" for b in server.client.list_buckets()["Buckets"]):
        server.make_bucket("stores")
    return "s3://stores"


@pytest.fixture(params=["folder", "moto"])
def conditional(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store that can tell who was first."""
    if request.param == "folder":
        return Store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("moto")
    return Store(f"{bucket_of(server)}/{tmp_path.name}", server.options)


def test_put_list_info_read_and_delete(store: Store, tmp_path: Path) -> None:
    assert store.list("deep/down") == []
    assert not store.exists("deep/down/b")
    store.put("deep/down/b", b"bb")
    assert store.put_if_absent("deep/down/a", b"a")
    local = tmp_path / "local"
    local.write_bytes(bytes(3))
    store.put_file(local, "deep/down/c")
    store.put("deep/down/deeper/not listed", b"")

    listed = store.list("deep/down")
    assert [(info.path, info.size_bytes) for info in listed] == [
        ("deep/down/a", 1),
        ("deep/down/b", 2),
        ("deep/down/c", 3),
    ]
    for info in listed:  # rclone tells the time of change to the second in one, finer in the other
        asked = store.info(info.path)
        assert (asked.path, asked.size_bytes, asked.version) == (
            info.path,
            info.size_bytes,
            info.version,
        )
    assert store.read_bytes("deep/down/b") == b"bb"
    with store.open("deep/down/c") as file:
        assert file.read() == bytes(3)
    store.delete("deep/down/b")
    store.delete("deep/down/b")
    assert not store.exists("deep/down/b")


def test_put_changes_the_version(store: Store) -> None:
    store.put("a", b"one")
    before = store.info("a")
    store.put("a", b"two")
    assert store.info("a").version != before.version


def test_a_missing_object_raises_object_not_found_with_its_url(store: Store) -> None:
    store.put("folder/file", b"")
    actions: list[Callable[[str], object]] = [store.read_bytes, store.info, store.open]
    for action in actions:
        with pytest.raises(ObjectNotFound) as caught:
            action("folder/none")
        assert store.url_of("folder/none") in str(caught.value)
    with pytest.raises(ObjectNotFound):
        store.info("folder")


def test_get_file_writes_in_place_and_checks_the_size(store: Store, tmp_path: Path) -> None:
    data, local = os.urandom(20_000_000), tmp_path / "local"  # several blocks
    store.put("deep/a", data)
    local.write_bytes(bytes(30_000_000))
    inode = local.stat().st_ino
    store.get_file("deep/a", local, len(data))
    assert local.read_bytes() == data
    assert local.stat().st_ino == inode, "locks on the file would be lost"
    for path, size_bytes in (("deep/none", 1), ("deep/a", 1), ("deep/a", len(data) + 1)):
        with pytest.raises(ObjectNotFound, match=store.url_of(path)):
            store.get_file(path, local, size_bytes)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_get_file_onto_a_full_disk_names_the_local_path(store: Store, tmp_path: Path) -> None:
    store.put("a", b"1")
    with pytest.raises(DiskFull, match="no room left to write /dev/full"):
        store.get_file("a", Path("/dev/full"), 1)
    with pytest.raises(StorageError, match=f"cannot use {tmp_path / 'none'}/a") as caught:
        store.get_file("a", tmp_path / "none" / "a", 1)
    assert not isinstance(caught.value, ObjectNotFound)


_READ_AFTER_FORK = """
import os, sys
from latentcache.storage import Store
from latentcache.storage_options import StorageOptions
store = Store(sys.argv[1], StorageOptions(endpoint_url=sys.argv[2]))
assert store.read_bytes("a") == b"1"
child = os.fork()
if child == 0:
    os._exit(0 if store.read_bytes("a") == b"1" else 1)
assert os.waitpid(child, 0)[1] == 0
assert store.read_bytes("a") == b"1"
"""


def test_a_store_made_before_a_fork_works_after_it(moto: S3Server, tmp_path: Path) -> None:
    url = f"{bucket_of(moto)}/{tmp_path.name}"
    Store(url, moto.options).put("a", b"1")
    # A process of its own, which may be forked though a client's thread runs in it.
    command = [sys.executable, "-c", _READ_AFTER_FORK, url, moto.endpoint_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr


def test_put_if_absent_never_replaces(store: Store) -> None:
    assert store.put_if_absent("a", b"mine")
    assert not store.put_if_absent("a", b"another's")
    assert store.put_if_absent("a", b"mine"), "put again by who won, as after a lost reply"
    assert store.read_bytes("a") == b"mine"


def test_probe_conditional_detects_stores_without_conditional_writes(
    store: Store, request: pytest.FixtureRequest
) -> None:
    is_conditional = "rclone" not in request.node.name
    store.put("probe", b"same")
    assert store.probe_conditional("probe", b"same") == is_conditional
    assert store.read_bytes("probe") == b"same"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (refuse(412, "PreconditionFailed", "as Ceph does, without its condition"), "yes"),
        (refuse(409, "ConditionalRequestConflict"), "yes"),
        (refuse(409, "OperationAborted"), "yes"),
        (refuse(400, "InvalidArgument"), "unknown"),
        (refuse(403, "AccessDenied"), "unknown"),
        (refuse(500, "InternalError"), "unknown"),
        (refuse(501, "NotImplemented"), "unknown"),
        (slow_down, "unknown"),
        (lambda exchange: exchange.cut(), "unknown"),
    ],
    ids=["412", "409", "409 other", "400", "403", "500", "501", "503", "cut"],
)
def test_probe_conditional_accepts_only_a_failed_precondition(
    fault: Callable[[Exchange], None], expected: str, faulty: Store, proxy: FaultyProxy
) -> None:
    faulty.put("probe", b"same")
    met = proxy.on("PUT", "/probe$", fault, times=100)
    assert faulty.probe_conditional("probe", b"same") == (expected == "yes")
    assert faulty.conditional == expected
    assert met.num_fired > 0
    assert faulty.read_bytes("probe") == b"same"


def race(store: Store, path: str, names: list[bytes]) -> list[bytes]:
    """Let a thread for each name put it, all at the same time; returns the winners."""
    barrier = Barrier(len(names))

    def put(name: bytes) -> bool:
        barrier.wait()
        return store.put_if_absent(path, name)

    with ThreadPoolExecutor(len(names)) as pool:
        return [name for name, won in zip(names, pool.map(put, names), strict=True) if won]


def test_put_if_absent_has_one_winner_among_threads(conditional: Store) -> None:
    for number in range(5):
        path = f"race/{number}"
        (winner,) = race(conditional, path, [f"thread {n}".encode() for n in range(12)])
        assert conditional.read_bytes(path) == winner
    assert len(conditional.list("race")) == 5, "something was left behind"


def _race_in_process(url: str, options: StorageOptions, process: int) -> list[list[bytes]]:
    store = Store(url, options)
    names = [f"process {process} thread {n}".encode() for n in range(4)]
    return [race(store, f"race/{number}", names) for number in range(10)]


def test_put_if_absent_has_one_winner_among_processes(conditional: Store) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, context) as pool:
        jobs = [
            pool.submit(_race_in_process, conditional.url, conditional.options, process)
            for process in range(3)
        ]
        wins = [job.result(timeout=60) for job in jobs]
    for number in range(10):
        (winner,) = [name for process in wins for name in process[number]]
        assert conditional.read_bytes(f"race/{number}") == winner


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES, st.binary(max_size=20)), max_size=4))
def test_local_store_keeps_any_object_name(puts: list[tuple[str, str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for root in (f"{folder}/{name}" for name in {name for name, _, _ in puts}):
            model: dict[str, bytes] = {}
            store = Store(root)
            for _, name, data in puts:
                assert store.put_if_absent(f"in/{name}", data) == (
                    model.setdefault(f"in/{name}", data) == data
                )
            again = Store(store.url)
            assert {info.path: again.read_bytes(info.path) for info in again.list("in")} == model
            assert all((Path(root) / path).read_bytes() == data for path, data in model.items())


@settings(max_examples=12, deadline=None)
@given(name=NAMES)
def test_s3_store_reads_any_object_name(name: str, moto: S3Server) -> None:
    bucket_of(moto)
    moto.client.put_object(Bucket="stores", Key=f"names/{name}", Body=name.encode())
    folder, last = split_url(f"s3://stores/names/{name}")
    store = Store(folder, moto.options)
    assert store.read_bytes(last) == name.encode()
    assert last in {info.path for info in store.list()}


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("s3://b/d/x.tar", "s3://b/d", "x.tar"),
        ("s3://b/x.tar", "s3://b", "x.tar"),
        ("/d/x.tar", "/d", "x.tar"),
        ("/x.tar", "/", "x.tar"),
        ("x.tar", ".", "x.tar"),
        ("file:///d/x.tar", "file:///d", "x.tar"),
    ],
)
def test_split_url_returns_folder_and_name(url: str, folder: str, name: str) -> None:
    assert split_url(url) == (folder, name)


def test_list_during_writes_is_complete_and_has_no_partial_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("d/stays", b"1")

    def come_and_go(name: str) -> None:
        for _ in range(150):
            store.put_if_absent(f"d/{name}", bytes(1000))
            store.delete(f"d/{name}")

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(come_and_go, name) for name in ("a", "b", "c")]
        while not all(writer.done() for writer in writers):
            listed = {info.path: info.size_bytes for info in store.list("d")}
            assert listed.pop("d/stays") == 1
            assert set(listed.values()) <= {1000}
            assert listed.keys() <= {"d/a", "d/b", "d/c"}
        for writer in writers:
            writer.result()


def test_local_files_follow_the_umask_and_leave_no_temporary_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    umask = os.umask(0)
    os.umask(umask)
    store.put("a", b"1")
    store.put_if_absent("b", b"1")
    for name in ("a", "b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.fixture
def faulty(proxy: FaultyProxy, moto: S3Server, tmp_path: Path) -> Store:
    options = StorageOptions(endpoint_url=proxy.endpoint_url)
    return Store(f"{bucket_of(moto)}/{tmp_path.name}", options)


def test_put_if_absent_wins_if_only_the_reply_is_lost(faulty: Store, proxy: FaultyProxy) -> None:
    # More often than botocore itself tries: what comes back in the end is "exists already".
    lost = proxy.on("PUT", "/a$", lose_reply, times=4)
    assert faulty.put_if_absent("a", b"mine")
    assert lost.num_fired == 4
    assert not faulty.put_if_absent("a", b"another's")


def test_put_if_absent_retries_a_lost_request(faulty: Store, proxy: FaultyProxy) -> None:
    lost = proxy.on("PUT", "/a$", lambda exchange: exchange.cut(), times=2)
    assert faulty.put_if_absent("a", b"mine")
    assert lost.num_fired == 2
    assert faulty.read_bytes("a") == b"mine"


def test_reads_survive_cut_connections_and_a_busy_store(faulty: Store, proxy: FaultyProxy) -> None:
    data = os.urandom(100_000)
    faulty.put("a", data)
    faults = [proxy.on("GET", "/a$", fault, times=1) for fault in (cut_halfway, slow_down)]
    assert faulty.read_bytes("a") == data
    faults += [proxy.on("GET", "/a$", fault, times=1) for fault in (cut_halfway, slow_down)]
    with faulty.open("a") as file:
        assert file.read() == data
    assert [fault.num_fired for fault in faults] == [1, 1, 1, 1]


def test_get_file_survives_cut_connections_and_a_busy_store(
    faulty: Store, proxy: FaultyProxy, tmp_path: Path
) -> None:
    data, local = os.urandom(100_000), tmp_path / "local"
    faulty.put("a", data)
    faults = [proxy.on("GET", "/a$", fault, times=1) for fault in (cut_halfway, slow_down)]
    faulty.get_file("a", local, len(data))
    assert local.read_bytes() == data
    assert [fault.num_fired for fault in faults] == [1, 1]


@pytest.mark.parametrize("share", [0, 1, 3])
def test_get_file_retries_a_body_of_the_wrong_length(
    share: int, faulty: Store, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """What a middlebox makes of a cut connection: a reply that is whole by its own account."""
    data, local = os.urandom(1000), tmp_path / "local"
    faulty.put("a", data)

    def resize(exchange: Exchange) -> None:
        reply = exchange.forward()
        exchange.send(replace(reply, body=(reply.body * share)[: share * 500]))

    resized = proxy.on("GET", "/a$", resize)
    faulty.get_file("a", local, len(data))
    assert local.read_bytes() == data
    assert resized.num_fired == 1


def test_a_store_that_never_answered_fails_with_its_endpoint() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StorageError, match="cannot reach or use s3://b/a") as caught:
        Store("s3://b", StorageOptions(endpoint_url=url)).read_bytes("a")
    assert url in str(caught.value)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=str(tmp_path / "file")):
        Store(str(tmp_path / "file")).put("a", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_raises_disk_full(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with (
        pytest.raises(DiskFull, match="no room left"),
        store.named("a"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"1")


# What `gc` asks of a store.


def test_iterate_yields_all_objects_below_a_folder(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3.S3Backend, "page_size", 2)
    assert list(store.iterate("data")) == []
    paths = [f"data/{unit}/{name}" for unit in "abc" for name in ("1", "2", "deep/3")]
    for path in (*paths, "data/top", "other/x", "database"):
        store.put(path, path.encode())
    actual = {info.path: info for info in store.iterate("data")}
    assert actual.keys() == {*paths, "data/top"}
    for path, info in actual.items():
        asked = store.info(path)
        assert (info.size_bytes, info.version) == (asked.size_bytes, asked.version)
        assert info.modified_at is not None


def test_delete_many_deletes_in_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3.S3Backend, "page_size", 3)
    paths = [f"data/{number:02d} ü+&%" for number in range(8)]
    for path in (*paths, "data/stays"):
        store.put(path, b"")
    deleted: list[int] = []
    store.delete_many([*paths, "data/none"], deleted.append)
    assert sum(deleted) == 9
    assert [info.path for info in store.list("data")] == ["data/stays"]


def test_delete_many_falls_back_to_single_deletes(faulty: Store, proxy: FaultyProxy) -> None:
    for name in "abc":
        faulty.put(f"data/{name}", b"")
    body = b"<Error><Code>NotImplemented</Code><Message>no</Message></Error>"
    refused = proxy.on("POST", "", lambda exchange: exchange.send(Reply(501, [], body)))
    faulty.delete_many(["data/a", "data/b"])
    assert refused.num_fired == 1
    assert [info.path for info in faulty.list("data")] == ["data/c"]


def test_unfinished_uploads_are_listed_and_aborted(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3.S3Backend, "page_size", 2)
    store = Store(f"{bucket_of(moto)}/{tmp_path.name}", moto.options)
    assert list(store.list_uploads()) == []
    for name in ("a", "b", "b", "c"):
        key = f"{tmp_path.name}/data/{name}"
        moto.client.create_multipart_upload(Bucket="stores", Key=key)
    moto.client.create_multipart_upload(Bucket="stores", Key=f"{tmp_path.name}-other/data/x")
    uploads = store.list_uploads()
    assert sorted(upload.path for upload in uploads) == ["data/a", "data/b", "data/b", "data/c"]
    listed = moto.client.list_multipart_uploads(Bucket="stores")["Uploads"]
    started_at = {upload["UploadId"]: upload["Initiated"].timestamp() for upload in listed}
    assert all(upload.started_at == started_at[upload.id] for upload in uploads)
    for upload in (*uploads, uploads[0]):
        store.abort_upload(upload)
    assert list(store.list_uploads()) == []
    assert list(Store(str(tmp_path)).list_uploads()) == []


def test_list_uploads_is_empty_on_a_store_without_uploads(rclone: S3Server) -> None:
    store = Store(rclone.make_bucket("no-uploads", {"a": b""}), rclone.options)
    assert list(store.list_uploads()) == []


def test_now_is_the_time_of_the_s3_server(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"{bucket_of(moto)}/{tmp_path.name}", moto.options)
    store.put("a", b"")
    for module in (backend, s3):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: 0.0))
    written = store.info("a").modified_at
    assert written is not None
    assert 0 <= store.now() - written < 3600
    assert Store(str(tmp_path)).now() == 0.0


def test_temp_files_lists_files_of_killed_writers(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for path in ("a", "d/.tmp-1", "d/e/.tmp-2", ".tmp-3", "d/tmp-4"):
        store.put(path, b"half")
    assert sorted(info.path for info in store.temp_files()) == [".tmp-3", "d/.tmp-1", "d/e/.tmp-2"]
    assert [info.path for info in store.list("d")] == ["d/tmp-4"]
