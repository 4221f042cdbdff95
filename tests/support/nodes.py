"""A Ray cluster of several nodes on this machine, which a test may add and take away."""

from __future__ import annotations

import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from servers import DEADLINE_S, SCRIPTS, Exchange


class Nodes:
    """The nodes besides the head, which has no CPU and so holds no actor."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self.workers: dict[int, Any] = {}
        """By the process id of the raylet, which is the parent of all workers of its node."""

    def add(self, **options: Any) -> int:
        """Add a node, by default with a CPU; return the id of its raylet."""
        node = self._cluster.add_node(**options)
        (raylet,) = node.all_processes["raylet"]
        self.workers[raylet.process.pid] = node
        return int(raylet.process.pid)

    def status(self) -> str:
        """What `ray status` says, which is what an autoscaler sees."""
        command = [str(SCRIPTS / "ray"), "status", f"--address={self.address}"]
        return subprocess.run(command, capture_output=True, text=True).stdout

    def kill(self, raylet: int) -> None:
        """Kill all processes of a node."""
        self._cluster.remove_node(self.workers.pop(raylet), allow_graceful=False)


@contextmanager
def ray_nodes(folder: Path) -> Iterator[Nodes]:
    """Start a cluster of a head alone.

    Args:
        folder: for Ray's own files; short, because Unix sockets lie below it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        nodes = Nodes(cluster)
        try:
            yield nodes
        finally:
            for raylet in list(nodes.workers):
                nodes.kill(raylet)
            cluster.remove_node(cluster.head_node, allow_graceful=False)


def parent_of(pid: int) -> int:
    """The process that started another."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_actor(pid: int) -> bool:
    return b"_EncoderActor" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _living_actor(exchange: Exchange) -> int | None:
    """The actor that a request comes from; None for others, and for one that is dead by now."""
    try:
        pid = exchange.client_pid
        return pid if is_actor(pid) else None
    except (AssertionError, OSError):  # neither its connection nor itself is there
        return None


class Turnstile:
    """A fault that holds what actors ask for until it lets them pass, one by one or for good.

    `num_begun` counts what they asked for: attempts, where each unit takes one request.
    """

    def __init__(self) -> None:
        self.num_begun = 0
        self._changed = threading.Condition()
        self._waiting: dict[int, list[Exchange]] = defaultdict(list)
        self._passes: set[Exchange] = set()
        self._dead: set[int] = set()
        self._is_open = False

    def __call__(self, exchange: Exchange) -> None:
        pid = _living_actor(exchange)
        with self._changed:
            if pid and pid not in self._dead:
                self.num_begun += 1
                self._waiting[pid].append(exchange)
                self._changed.notify_all()
                done = self._changed.wait_for(
                    lambda: self._is_open or exchange in self._passes, DEADLINE_S
                )
                assert done, "the turnstile did not open in time"
        exchange.send(exchange.forward())

    def wait_for_actors(self, num_actors: int) -> list[int]:
        """Wait until `num_actors` actors wait here; return their process ids.

        The actor with the most waiting requests is first.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: len(self._waiting) >= num_actors, DEADLINE_S)
            assert done, f"only {len(self._waiting)} actors are waiting"
            return sorted(self._waiting, key=lambda pid: -len(self._waiting[pid]))

    def let_one_pass(self) -> None:
        """Let the request of some living actor pass."""
        with self._changed:
            pid = max(self._waiting, key=lambda pid: len(self._waiting[pid]))
            self._passes.add(self._waiting[pid].pop())
            if not self._waiting[pid]:
                del self._waiting[pid]
            self._changed.notify_all()

    def forget(self, pid: int) -> int:
        """Let the requests of a dead actor pass; return how many there were."""
        with self._changed:
            self._dead.add(pid)
            requests = self._waiting.pop(pid, [])
            self._passes.update(requests)
            self._changed.notify_all()
        return len(requests)

    def open(self) -> None:
        """Hold nothing any more."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
