"""Local and mounted disks: without hard links, full, read-only, and with killed writers."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

import latentcache
from latentcache.engine import run as run_module
from latentcache.errors import AccessDenied, DiskFull, ObjectNotFound, StorageError
from latentcache.storage import Store, local_files, retries
from makers import config_tree, png, write_tar
from servers import DEADLINE_S
from thread_cluster import ThreadCluster

pytestmark = pytest.mark.slow

UNSUPPORTED = ("EPERM", "ENOSYS", "EOPNOTSUPP", "EXDEV", "EMLINK", "EINVAL", "EACCES")


class Refusal:
    """A system call that always fails; counts how often it was asked."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.num_fired = 0

    def __call__(self, *_: object, **__: object) -> int:
        self.num_fired += 1
        raise OSError(self.code, os.strerror(self.code), "x")


def refuse_links(patch: pytest.MonkeyPatch, code: int = errno.EPERM) -> Refusal:
    """As on a file system without hard links."""
    refusal = Refusal(code)
    patch.setattr(os, "link", refusal)
    return refusal


def refuse_exclusive_renames(patch: pytest.MonkeyPatch) -> None:
    """As on one that knows no flags of renameat2(2), as FUSE mounts do not."""
    patch.setattr(local_files, "_rename", lambda temp, target: False)


@pytest.mark.parametrize("code", UNSUPPORTED)
@pytest.mark.parametrize("has_renames", [True, False])
def test_put_if_absent_without_hard_links_puts_once_and_does_not_retry(
    code: str, has_renames: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = refuse_links(monkeypatch, getattr(errno, code))
    if not has_renames:
        refuse_exclusive_renames(monkeypatch)
    store = Store(str(tmp_path / "out"))
    assert store.put_if_absent("d/a", b"mine")
    assert not store.put_if_absent("d/a", b"another's")
    assert store.put_if_absent("d/a", b"mine")
    assert store.read_bytes("d/a") == b"mine"
    assert refusal.num_fired == 3
    assert os.listdir(tmp_path / "out" / "d") == ["a"]
    assert store.probe_conditional("d/a", b"mine") == has_renames
    assert store.conditional == ("yes" if has_renames else "no")
    assert not list(store.temp_files())


def test_a_disk_with_hard_links_is_conditional(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "new" / "out"))
    assert store.probe_conditional("a", b"")
    assert os.listdir(tmp_path / "new" / "out") == []


def _race(folder: str, process: int) -> list[list[int]]:
    """Let four threads put each of ten names; gives the winners of each."""
    with pytest.MonkeyPatch.context() as patch:
        refuse_links(patch)
        refuse_exclusive_renames(patch)
        store = Store(folder)
        barrier = Barrier(4)

        def put(thread: int) -> list[bool]:
            won = []
            for number in range(10):
                barrier.wait()
                won.append(store.put_if_absent(f"race/{number}", f"{process}.{thread}".encode()))
            return won

        with ThreadPoolExecutor(4) as pool:
            wins = list(pool.map(put, range(4)))
    return [[thread for thread in range(4) if wins[thread][number]] for number in range(10)]


def test_put_if_absent_by_lock_has_one_winner_among_processes(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_race, str(tmp_path), process) for process in range(2)]
        wins = [job.result(timeout=DEADLINE_S) for job in jobs]
    for number in range(10):
        (winner,) = [f"{p}.{thread}" for p in range(2) for thread in wins[p][number]]
        assert (tmp_path / "race" / str(number)).read_text() == winner
    assert len(os.listdir(tmp_path / "race")) == 10


# Forks for each step, which a process without threads may do.
_KILL_AT_EACH_STEP = """
import io, json, os, signal, sys
from latentcache.storage import local_files as local

def killing(function, before):
    def call(*arguments, **options):
        try:
            if not before:
                function(*arguments, **options)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return call

def refuse(*arguments):
    raise PermissionError(1, "no links here")

steps = {
    "link": [(os, "open"), (os, "fsync"), (os, "link"), (os, "unlink")],
    "rename": [(os, "open"), (os, "fsync"), (local, "_rename"), (os, "unlink")],
    "lock": [(os, "open"), (os, "fsync"), (local.fcntl, "flock"), (os, "rename"), (os, "unlink")],
}
reports = []
for method, places in steps.items():
    if method != "link":
        os.link = refuse
    if method == "lock":
        local._rename = lambda temp, target: False
    for module, name in places:
        for before in (True, False):
            folder = os.path.join(sys.argv[1], f"{method}-{name}-{before}")
            target = os.path.join(folder, "a")
            child = os.fork()
            if child == 0:
                setattr(module, name, killing(getattr(module, name), before))
                local.create_file(target, io.BytesIO(b"first" * 1000))
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            there = os.path.exists(target) and open(target, "rb").read()
            won = local.create_file(target, io.BytesIO(b"second" * 1000))
            after = open(target, "rb").read()
            names = [n for n in os.listdir(folder) if not n.startswith(local.TEMP_PREFIX)]
            reports.append({
                "step": f"{method} {name} {before}", "was_killed": status == signal.SIGKILL,
                "there": there and there.decode(), "won": won, "after": after.decode(),
                "names": names,
            })
print(json.dumps(reports))
"""


def test_a_writer_killed_at_any_step_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILL_AT_EACH_STEP, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert len(reports) == 26
    for step in reports:
        assert step["was_killed"], step["step"]
        assert step["there"] in (False, "first" * 1000), step["step"]
        assert step["won"] == (step["there"] is False), step["step"]
        assert step["after"] == ("second" if step["won"] else "first") * 1000
        assert step["names"] == ["a"]
    assert {step["won"] for step in reports} == {True, False}


def test_put_if_absent_wins_if_the_answer_of_link_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an NFS client that asks again for what its server has done already."""
    link, num_lost = os.link, 0

    def lose(source: str, target: str) -> None:
        nonlocal num_lost
        link(source, target)
        num_lost += 1
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)

    monkeypatch.setattr(os, "link", lose)
    assert Store(str(tmp_path)).put_if_absent("a", b"mine")
    assert num_lost == 1


@pytest.mark.parametrize("name", ["fsync", "link", "replace"])
def test_a_failed_put_leaves_no_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Refusal(errno.ENOSPC)
    monkeypatch.setattr(os, name, full)
    store = Store(str(tmp_path))
    put = store.put if name == "replace" else store.put_if_absent
    with pytest.raises(DiskFull, match="no room left to write"):
        put("a", b"mine")
    assert full.num_fired == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENAMETOOLONG, errno.EOPNOTSUPP])
def test_final_errors_are_not_retried(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    assert store.put_if_absent("before", b"")
    refusal = Refusal(code)
    monkeypatch.setattr(os, "fsync", refusal)
    actions: list[Callable[[str, bytes], object]] = [store.put, store.put_if_absent]
    for action in actions:
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:
            action("a", b"1")
        assert "credentials" not in str(caught.value)
    assert refusal.num_fired == 2


def test_a_stale_file_handle_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_PAUSES_S", (0.0, 0.0))
    fsync, num_stale = os.fsync, 0

    def stale(handle: int) -> None:
        nonlocal num_stale
        num_stale += 1
        if num_stale < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", stale)
    assert Store(str(tmp_path)).put_if_absent("a", b"1")
    assert num_stale == 3
    assert os.listdir(tmp_path) == ["a"]


def test_put_onto_a_folder_names_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(ObjectNotFound, match="/a is a folder, not a file"):
        store.put("a", b"1")
    with pytest.raises(StorageError, match=r"/a: .*File exists"):
        store.put_if_absent("a", b"1")
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that this process, for as long as the test lasts, may neither read nor write."""
    with tempfile.TemporaryDirectory(prefix="lc-closed-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for name in ("closed", "src"):
            write_tar(folder / name / "0.tar", [("a.png", png(70, 64, 0))])
        (folder / "closed").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder / "closed"
        finally:
            if is_root:
                os.seteuid(0)
            (folder / "closed").chmod(0o755)


def test_a_local_permission_error_does_not_mention_credentials(closed_folder: Path) -> None:
    store = Store(str(closed_folder))
    actions: list[Callable[[], object]] = [
        lambda: store.put("a", b"1"),
        lambda: store.put_if_absent("a", b"1"),
        lambda: store.read_bytes("0.tar"),
        lambda: store.info("0.tar"),
        lambda: store.list(),
    ]
    for action in actions:
        with pytest.raises(AccessDenied) as caught:
            action()
        message = str(caught.value)
        assert str(closed_folder) in message
        assert "check the permissions" in message
        assert "credentials" not in message
        assert "\n" not in message


@pytest.mark.parametrize("what", ["source", "output", "checkpoint"])
def test_a_run_names_the_path_without_permission(what: str, closed_folder: Path) -> None:
    section = {
        "source": {"source": {"shards": f"{closed_folder}/0.tar"}},
        "output": {"output": {"url": f"{closed_folder}/out"}},
        "checkpoint": {"vae": {"checkpoint": f"{closed_folder}/vae.safetensors"}},
    }[what]
    tree = config_tree(closed_folder.parent, **section)
    with pytest.raises(latentcache.LatentCacheError, match="Permission denied") as caught:
        latentcache.make_plan(latentcache.parse_config(tree))
    assert str(closed_folder) in str(caught.value)
    assert "check the permissions" in str(caught.value)
    assert "credentials" not in str(caught.value)


def test_a_run_on_a_disk_without_hard_links_completes_under_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "Cluster", ThreadCluster)
    write_tar(tmp_path / "src" / "0.tar", [("a.png", png(70, 64, 0)), ("a.txt", b"x")])
    config = latentcache.parse_config(config_tree(tmp_path))
    refusal = refuse_links(monkeypatch)
    refuse_exclusive_renames(monkeypatch)
    assert latentcache.run(config).status == "complete"
    assert refusal.num_fired > 0
    assert "has no conditional writes: one run at a time, by lease" in capfd.readouterr().err
    assert latentcache.verify(str(tmp_path / "out")).ok
    assert latentcache.run(config, quiet=True).num_committed == 0
