"""The connection to Ray: a private cluster of this process, or the one at RAY_ADDRESS.

No other user or machine can run code in a private cluster. Calls into Ray block without end, or
abort the process after a minute, once the processes that they call are dead. So each connection
watches those processes, and `require_alive` reports a loss.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

import ray
from ray._private import ray_constants, ray_logging, services, worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import RayError

from latentcache.errors import ClusterError, first_line
from latentcache.startup import start_process

# Ray's Unix sockets are at <folder>/session_<date>_<time>_<µs>_<pid>/sockets/plasma_store, which is
# 64 bytes with a process id of seven digits. A socket's path has 107 bytes at most (unix(7)), and
# a private folder has 14 more than its parent, which this limits.
_MAX_FOLDER_BYTES = 107 - 64 - 14
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

# The processes that a node needs; the other processes of Ray only report.
_VITAL = ("gcs_server", "raylet")

# A cluster counts as lost when it has not answered for this long. Ray itself aborts after 60 s.
_LOST_AFTER_S = 15.0
_PROBE_EVERY_S = 2.0
_PROBE_TIMEOUT_S = 5.0

# The interval at which a thread that waits for Ray checks whether Ray is alive.
_CHECK_EVERY_S = 0.5

# The bytes with which a client opens an HTTP/2 connection (RFC 9113, 3.4), which gRPC uses.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = 4

# Variables for the workers of a private cluster, unless set already; see infra/README.md.
WORKER_ENVIRONMENT = {
    # By default glibc gives each thread a heap, and each heap keeps memory of large images:
    # hundreds of MiB with 16 threads.
    "MALLOC_ARENA_MAX": "2",
    # Torch requests large pages: with small ones an encoder on a CPU loses a fifth of its time.
    "THP_MEM_ALLOC_ENABLE": "1",
}

T = TypeVar("T")

_Address = tuple[str, int]


def connect() -> Connection:
    """Start a private cluster, or join the one at RAY_ADDRESS, or raise a `ClusterError`."""
    start_process()
    # Ray reads this variable on import, which may have been before `start_process` set it.
    ray_logging.RAY_DEDUP_LOGS = ray_constants.env_bool("RAY_DEDUP_LOGS", True)
    if ray.is_initialized():
        raise ClusterError("this process is connected to Ray already: call ray.shutdown() first")
    address = os.environ.get("RAY_ADDRESS") or "local"
    return PrivateCluster() if address == "local" else JoinedCluster(address)


class Connection(ExitStack):
    """A connection to Ray; `close` leaves the cluster, and ends a private one."""

    def require_alive(self) -> None:
        """Raise a `ClusterError` that names the cause if a process of Ray itself is lost."""
        if loss := self._loss():
            raise ClusterError(f"{loss}; committed units are kept; run again")

    def _loss(self) -> str | None:
        raise NotImplementedError

    def ask(self, function: Callable[[], T]) -> T:
        """Return the result of a function that calls the head of the cluster; see `require_alive`.

        The function runs on a thread, because such a call does not return once the head is dead.
        """
        self.require_alive()
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:  # noqa: BLE001 - for the thread that waits
                answer.set_exception(error)

        threading.Thread(target=run, name="ray-ask", daemon=True).start()
        while not wait([answer], timeout=_CHECK_EVERY_S).done:
            self.require_alive()
        try:
            return answer.result()
        except RayError as error:
            raise ClusterError(f"Ray does not answer: {first_line(error)}") from error


class PrivateCluster(Connection):
    """A cluster of this process alone, on loopback addresses, behind a random token."""

    def __init__(self) -> None:
        super().__init__()
        folder = _make_folder()
        self.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            self.enter_context(_private_environment())
            self.callback(ray.shutdown)
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
                _temp_dir=f"{folder}/r",  # Ray opens it to all users, not its parent
            )
            node = worker._global_node
            if node.node_ip_address != "127.0.0.1":
                raise ClusterError(f"Ray listens on {node.node_ip_address}, not on 127.0.0.1 alone")
            self._processes = [
                (kind, info.process) for kind in _VITAL for info in node.all_processes[kind]
            ]
        except BaseException as error:
            self.close()
            # Ray raises a bare Exception if one of its own processes does not start.
            if isinstance(error, ClusterError) or not isinstance(error, Exception):
                raise
            raise ClusterError(
                f"cannot start Ray with its files in {os.path.dirname(folder)}: {first_line(error)}"
            ) from error

    def _loss(self) -> str | None:
        for kind, process in self._processes:
            if (code := process.poll()) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                return f"Ray's {kind} of this run {how}, perhaps because memory ran out"
        return None


@contextmanager
def _private_environment() -> Iterator[None]:
    """Set a random token and the variables of workers, which all processes of Ray inherit."""
    variables = {name: v for name, v in WORKER_ENVIRONMENT.items() if name not in os.environ}
    # In the environment, because every user of the machine can read a command line.
    variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ[name] for name in variables if name in os.environ}
    is_cluster_enabled = ray_constants.ENABLE_RAY_CLUSTER
    try:
        os.environ.update(variables)
        # Else Ray replaces a loopback address by one that others can reach. In its terms a cluster
        # is one that other machines reach. It reads its variable for this on import, which may
        # have been earlier.
        ray_constants.ENABLE_RAY_CLUSTER = False
        _forget_authentication()
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
        ray_constants.ENABLE_RAY_CLUSTER = is_cluster_enabled
        _forget_authentication()


def _forget_authentication() -> None:
    """Make Ray read its authentication from the environment again; by default it does so once."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _make_folder() -> str:
    """Create a private folder for Ray's files, with a path that is short enough for its sockets."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        folder = os.environ.get(name)
        if folder is None or (name == "TMPDIR" and not folder):  # tempfile treats it as unset
            continue
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            raise ClusterError(
                f"{name} is {folder!r}, which is not a writable folder: create it, or unset {name}"
            )
    named = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    tried = []
    for folder in (os.path.abspath(named), *_SHORT_FOLDERS, os.environ.get("XDG_RUNTIME_DIR")):
        if folder and len(os.fsencode(folder)) <= _MAX_FOLDER_BYTES:
            try:
                return tempfile.mkdtemp(prefix="lc-", dir=folder)
            except OSError as error:
                tried.append(f"{folder} ({error.strerror})")
    reasons = f"; tried {', '.join(tried)}" if tried else ""
    raise ClusterError(
        f"Ray needs a writable folder with a path of at most {_MAX_FOLDER_BYTES} bytes: set "
        f"RAY_TMPDIR to one{reasons}"
    )


class JoinedCluster(Connection):
    """An existing cluster, which is probed regularly."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._name = f"the Ray cluster at {address} (RAY_ADDRESS)"
        self._lost: str | None = None
        self._closed = threading.Event()
        # Ray's client (`ray://`) has its own timeout and connection.
        watched = [] if "://" in address else [self._probe_head(address)]
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            self.callback(ray.shutdown)
            self.callback(self._closed.set)
        except Exception as error:  # Ray raises bare ones too
            raise ClusterError(f"cannot join {self._name}: {first_line(error)}") from error
        if watched:
            watched += _own_raylet()
            threading.Thread(
                target=self._watch, args=(watched,), name="ray-watch", daemon=True
            ).start()

    def _loss(self) -> str | None:
        return f"{self._name} is lost: {self._lost}" if self._lost else None

    def _probe_head(self, address: str) -> _Address:
        """Return the address of the head; raise within seconds if it does not answer."""
        try:
            resolved = services.canonicalize_bootstrap_address(address)
            if not resolved:
                raise ConnectionError("no Ray cluster runs on this machine")
            host, _, port = resolved.rpartition(":")
            head = (host.strip("[]"), int(port))
            _probe(head)
            return head
        except (OSError, ValueError, OverflowError) as error:
            raise ClusterError(
                f"cannot join {self._name}: {_reason(error)}; correct RAY_ADDRESS, or unset it to "
                "run without a cluster"
            ) from error

    def _watch(self, addresses: Sequence[_Address]) -> None:
        answered_at = dict.fromkeys(addresses, time.monotonic())
        while not self._closed.wait(_PROBE_EVERY_S):
            for address in addresses:
                try:
                    _probe(address)
                    answered_at[address] = time.monotonic()
                except OSError as error:
                    if time.monotonic() - answered_at[address] >= _LOST_AFTER_S:
                        host, port = address
                        self._lost = f"{host}:{port} does not answer ({_reason(error)})"
                        return


def _own_raylet() -> list[_Address]:
    """Return the address of the raylet that this driver is connected to; empty if unknown."""
    with suppress(RayError):
        own = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == own:
                return [(node["NodeManagerAddress"], node["NodeManagerPort"])]
    return []


def _probe(address: _Address) -> None:
    """Raise an `OSError` unless a gRPC server answers at the address within seconds."""
    with socket.create_connection(address, timeout=_PROBE_TIMEOUT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(_HTTP2_PREFACE)
        with connection.makefile("rb") as stream:
            header = stream.read(9)
    if len(header) < 9 or header[3] != _HTTP2_SETTINGS:
        raise ConnectionError("the process that listens there is not a Ray cluster")


def _reason(error: Exception) -> str:
    return "it does not answer" if isinstance(error, TimeoutError) else first_line(error)
