"""Real servers for the tests: two S3 servers, a Ray cluster, and a proxy that fails on demand.

moto's server honours `If-None-Match` and checks no credentials; rclone's checks them and has no
conditional writes. Both run as processes of their own and are killed when their context ends.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3

from latentcache.storage_options import StorageOptions

SCRIPTS = Path(sysconfig.get_path("scripts"))

# rclone refuses shorter ones.
ACCESS_KEY, SECRET_KEY = "latentcachekey", "latentcachesecret"

# Nothing here takes this long; what does has hung.
DEADLINE_S = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Poll for something outside this process that gives no sign of its own."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s in vain for {what}"
        time.sleep(0.02)


@contextmanager
def _process(
    command: list[str], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a session of its own, so that all it starts ends with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        assert process.poll() is None, f"the server ended: {log.read_text()}"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers, f"port {port}")


@dataclass(frozen=True)
class S3Server:
    """A running S3 server, seen by a plain boto3 client that shares no code with the package."""

    name: str
    endpoint_url: str
    client: Any

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(endpoint_url=self.endpoint_url)

    def make_bucket(self, bucket: str, objects: dict[str, bytes] | None = None) -> str:
        """Make a bucket and fill it; returns its URL."""
        self.client.create_bucket(Bucket=bucket)
        for key, data in (objects or {}).items():
            self.client.put_object(Bucket=bucket, Key=key, Body=data)
        return f"s3://{bucket}"

    def listing(self, bucket: str) -> dict[str, tuple[int, str, Any]]:
        """Every object of a bucket, with size, ETag and the time of its last change."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {
            entry["Key"]: (entry["Size"], entry["ETag"], entry["LastModified"])
            for page in pages
            for entry in page.get("Contents", ())
        }

    def read(self, bucket: str, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data


@contextmanager
def _s3_server(name: str, port: int, command: list[str], folder: Path) -> Iterator[S3Server]:
    log = folder / f"{name}.log"
    with _process(command, log) as process:
        _wait_for_port(port, process, log)
        url = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        try:
            yield S3Server(name, url, client)
        finally:
            client.close()


@contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    port = free_port()
    command = [str(SCRIPTS / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with _s3_server("moto", port, command, folder) as server:
        yield server


@contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    port = free_port()
    (folder / "rclone").mkdir()
    command = [
        *(str(SCRIPTS / "rclone"), "serve", "s3", "--config", str(folder / "rclone.conf")),
        *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--addr", f"127.0.0.1:{port}"),
        str(folder / "rclone"),
    ]
    with _s3_server("rclone", port, command, folder) as server:
        yield server


@contextmanager
def ray_cluster(folder: Path, *options: str) -> Iterator[str]:
    """A one-node cluster, which claims to have a GPU; yields its address.

    Args:
        folder: for Ray's own files; short, because Unix sockets lie below it.
        options: more, for `ray start`.
    """
    port = free_port()
    command = [
        *(str(SCRIPTS / "ray"), "start", "--head", "--block", f"--port={port}"),
        *("--node-ip-address=127.0.0.1", "--num-cpus=8", "--num-gpus=1"),
        *("--include-dashboard=false", "--object-store-memory=100000000"),
        *("--disable-usage-stats", f"--temp-dir={folder / 'ray'}"),
        *options,
    ]
    log = folder / "ray.log"
    with _process(command, log) as process:

        def is_up() -> bool:
            text = log.read_text()
            assert process.poll() is None, f"Ray ended: {text}"
            return "Ray runtime started" in text

        wait_until(is_up, "Ray")
        yield f"127.0.0.1:{port}"


@dataclass(frozen=True, slots=True)
class JobServer:
    """A cluster that takes jobs; `env` is the environment that reaches it."""

    url: str
    address: str
    env: dict[str, str]


@contextmanager
def job_server(folder: Path, env: dict[str, str]) -> Iterator[JobServer]:
    """A one-node cluster with a dashboard; all of its processes are gone when the context ends.

    Args:
        folder: for Ray's own files, and its home; short, because Unix sockets lie below it.
        env: on top of this process's; `RAY_AUTH_MODE` and what goes with it.
    """
    port, dashboard_port = free_port(), free_port()
    command = [
        *(str(SCRIPTS / "ray"), "start", "--head", "--block", f"--port={port}"),
        *("--node-ip-address=127.0.0.1", "--num-cpus=4", "--object-store-memory=100000000"),
        *("--include-dashboard=true", f"--dashboard-port={dashboard_port}"),
        *("--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0"),
        *("--disable-usage-stats", f"--temp-dir={folder / 'ray'}"),
    ]
    log = folder / "ray.log"
    mark = f"JOB_SERVER={folder}"
    # As on a cluster: `python` and `latentcache` are found, and nothing of who started it.
    inherited = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "HOME": str(folder)}
    with _process(command, log, inherited | env | dict([mark.split("=")])) as process:

        def is_up() -> bool:
            assert process.poll() is None, f"Ray ended: {log.read_text()}"
            return "Ray runtime started" in log.read_text()

        wait_until(is_up, "Ray")
        _wait_for_port(dashboard_port, process, log)
        yield JobServer(f"http://127.0.0.1:{dashboard_port}", f"127.0.0.1:{port}", env)
    wait_until(lambda: not _processes_with(mark), "the cluster's processes to end")


def _processes_with(variable: str) -> list[int]:
    """Which processes have `NAME=value` in their environment."""
    actual = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # of another user, or gone by now
            if variable.encode() in environ.read_bytes().split(b"\0"):
                actual.append(int(environ.parts[2]))
    return actual


def _process_at(port: int, peer_port: int) -> int:
    """Which process holds the local end of a connection on this machine."""
    ends, inodes = (f"0100007F:{port:04X}", f"0100007F:{peer_port:04X}"), set[str]()
    for _ in range(10):  # a table that changes while it is read may lack a row, or have it twice
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        if inodes := {row[9] for row in rows if (row[1], row[2]) == ends}:
            break
    assert len(inodes) == 1, f"connections from port {port}: {inodes}"
    (inode,) = inodes
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == f"socket:[{inode}]":
                return int(link.parts[2])
        except OSError:  # a process, or a file of it, that is gone by now
            continue
    raise AssertionError(f"no process holds port {port}")


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange:
    """One request on its way through the proxy, in the hands of a fault."""

    def __init__(self, proxy: FaultyProxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self._proxy, self._handler, self._body = proxy, handler, body
        self.method = handler.command
        self.path = unquote(urlsplit(handler.path).path)

    @property
    def client_pid(self) -> int:
        """Which process sent the request."""
        here = self._handler.connection.getsockname()
        return _process_at(self._handler.client_address[1], here[1])

    def forward(self) -> Reply:
        """Let the server have the request."""
        handler = self._handler
        upstream = http.client.HTTPConnection(self._proxy.upstream, timeout=DEADLINE_S)
        try:
            headers = {k: v for k, v in handler.headers.items() if k.lower() != "expect"}
            upstream.request(self.method, handler.path, self._body, headers)
            response = upstream.getresponse()
            reply = Reply(response.status, response.getheaders(), response.read())
        finally:
            upstream.close()
        self._proxy.note(self.method, self.path, reply.status)
        return reply

    def begin(self, reply: Reply) -> None:
        """Send status and headers, which promise the whole body."""
        self._handler.send_response_only(reply.status)
        dropped = {"connection", "transfer-encoding"}
        if self.method != "HEAD":
            dropped.add("content-length")
            self._handler.send_header("Content-Length", str(len(reply.body)))
        for name, value in reply.headers:
            if name.lower() not in dropped:
                self._handler.send_header(name, value)
        self._handler.end_headers()

    def write(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self._handler.wfile.flush()

    def send(self, reply: Reply) -> None:
        self.begin(reply)
        self.write(reply.body)

    def cut(self) -> None:
        """Close the connection, whatever was promised."""
        self._handler.close_connection = True
        self._handler.connection.shutdown(socket.SHUT_RDWR)


Fault = Callable[[Exchange], None]


@dataclass(slots=True)
class Rule:
    """Which requests meet a fault, how many of them at most, and how many have."""

    method: str
    path: re.Pattern[str]
    fault: Fault
    times: int
    num_fired: int = 0


class FaultyProxy:
    """Hands HTTP requests on to a server, but for those that a test wants to go wrong.

    Use it as a context manager. `log` holds (method, path, status) of all that the server answered.
    """

    def __init__(self, upstream_url: str) -> None:
        self.upstream = urlsplit(upstream_url).netloc
        self.log: list[tuple[str, str, int]] = []
        self.errors: list[BaseException] = []
        self._rules: list[Rule] = []
        self._gates: list[Gate] = []
        self._changed = threading.Condition()
        self._server = _ProxyServer(self)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self._gates:
            gate.open()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        assert not self.errors, f"the proxy itself failed: {self.errors}"

    def on(self, method: str, path: str, fault: Fault, times: int = 1) -> Rule:
        """Let the next requests of that method, with a path that the pattern is found in, fail."""
        rule = Rule(method, re.compile(path), fault, times)
        with self._changed:
            self._rules.append(rule)
        return rule

    def gate(self, path: str) -> Gate:
        """Let one download stop halfway until the gate is opened."""
        gate = Gate()
        self._gates.append(gate)
        self.on("GET", path, gate)
        return gate

    def note(self, method: str, path: str, status: int) -> None:
        with self._changed:
            self.log.append((method, path, status))
            self._changed.notify_all()

    def count(self, method: str, path: str) -> int:
        """How many requests of that kind the server has granted."""
        actual = (m == method and re.search(path, p) and s < 300 for m, p, s in self.log)
        return sum(map(bool, actual))

    def wait_for(self, method: str, path: str, times: int = 1) -> None:
        """Wait until the server has granted so many requests of that kind."""
        with self._changed:
            done = self._changed.wait_for(lambda: self.count(method, path) >= times, DEADLINE_S)
        assert done, f"no {method} {path} in {DEADLINE_S:.0f} s"

    def fault_for(self, exchange: Exchange) -> Fault | None:
        with self._changed:
            for rule in self._rules:
                matches = rule.method == exchange.method and rule.path.search(exchange.path)
                if matches and rule.num_fired < rule.times:
                    rule.num_fired += 1
                    return rule.fault
        return None


class _ProxyServer(ThreadingHTTPServer):
    block_on_close = False  # idle keep-alive connections would hold it up

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error and not isinstance(error, ConnectionError):  # the client may die: some are killed
            self.proxy.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _handle(self) -> None:
        assert "chunked" not in self.headers.get("Transfer-Encoding", "")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        assert isinstance(server, _ProxyServer)
        exchange = Exchange(server.proxy, self, body)
        fault = server.proxy.fault_for(exchange)
        if fault is None:
            exchange.send(exchange.forward())
        else:
            fault(exchange)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815


def lose_reply(exchange: Exchange) -> None:
    """The server does what it is asked to, but its answer never comes."""
    exchange.forward()
    exchange.cut()


def cut_halfway(exchange: Exchange) -> None:
    """The connection breaks in the middle of the answer."""
    reply = exchange.forward()
    exchange.begin(reply)
    exchange.write(reply.body[: len(reply.body) // 2])
    exchange.cut()


def slow_down(exchange: Exchange) -> None:
    """The server is too busy."""
    body = (
        b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )
    exchange.send(Reply(503, [("Content-Type", "application/xml")], body))


def refuse(status: int, code: str, message: str = "") -> Fault:
    """The server refuses, and says why in S3's words."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    def fault(exchange: Exchange) -> None:
        exchange.send(Reply(status, [("Content-Type", "application/xml")], body))

    return fault


def overwrite(server: S3Server, bucket: str, key: str, data: bytes) -> Fault:
    """Replace an object right after the answer to a request for it."""

    def fault(exchange: Exchange) -> None:
        reply = exchange.forward()
        server.client.put_object(Bucket=bucket, Key=key, Body=data)
        exchange.send(reply)

    return fault


class Gate:
    """A fault that holds a download in its middle: the reader waits until the gate opens."""

    def __init__(self) -> None:
        self.client_pid = 0
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        reply = exchange.forward()
        half = len(reply.body) // 2
        exchange.begin(reply)
        exchange.write(reply.body[:half])
        self.client_pid = exchange.client_pid
        self._reached.set()
        assert self._opened.wait(DEADLINE_S), "the gate did not open in time"
        exchange.write(reply.body[half:])

    @property
    def is_reached(self) -> bool:
        return self._reached.is_set()

    def open(self) -> None:
        self._opened.set()
