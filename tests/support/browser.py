"""Headless Chromium over its DevTools pipe: how a page looks, and what it asks for."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servers import DEADLINE_S

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EXECUTABLE = next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A browser with one page after another; use it as a context manager.

    Args:
        folder: where the browser may keep what it likes.
    """

    def __init__(self, folder: Path) -> None:
        assert EXECUTABLE
        (reading, writing), (self._answers, answering) = _pipe(), _pipe()
        self._commands = os.fdopen(writing, "wb", buffering=0)
        # The browser reads from 3 and writes to 4.
        start = (
            f"import os, sys; os.dup2({reading}, 3); os.dup2({answering}, 4); "
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [
            *(sys.executable, "-c", start, EXECUTABLE),
            *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
            *("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"),
            f"--user-data-dir={folder}",
        ]
        self.process = subprocess.Popen(
            command,
            pass_fds=(reading, answering),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reading)
        os.close(answering)
        self._buffer = b""
        self._num_calls = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # its children end when it does
        self.process.wait()
        self._commands.close()
        os.close(self._answers)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        self._num_calls += 1
        number = self._num_calls
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        self._commands.write(json.dumps(message).encode() + b"\0")
        answer = self._read_until(lambda message: message.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def wait_for(self, event: str, session: str) -> None:
        """Wait for an event, unless it has come already."""

        def is_it(message: dict[str, Any]) -> bool:
            return message.get("method") == event and message.get("sessionId") == session

        if not any(map(is_it, self.events)):
            self._read_until(is_it)

    def _read_until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            while b"\0" not in self._buffer:
                left_s = max(0.0, deadline - time.monotonic())
                assert select.select([self._answers], [], [], left_s)[0], "the browser is silent"
                data = os.read(self._answers, 2**20)
                assert data, "the browser has ended"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\0")
            message: dict[str, Any] = json.loads(line)
            if "method" in message:
                self.events.append(message)
            if is_it(message):
                return message

    def open(self, file: Path, *, width_px: int = 1280, scheme: str = "light") -> Page:
        """Open a local file in a new page, and wait until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"], file.as_uri())
        for domain in ("Page", "Network", "Runtime"):
            page.call(f"{domain}.enable")
        page.resize(width_px, 900)
        scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
        page.call("Emulation.setEmulatedMedia", features=[scheme_feature])
        page.call("Page.navigate", url=page.url)
        self.wait_for("Page.loadEventFired", page.session)
        return page


class Page:
    """A page that has loaded."""

    def __init__(self, browser: Browser, session: str, url: str) -> None:
        self.browser = browser
        self.session = session
        self.url = url

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def resize(self, width_px: int, height_px: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, expression: str) -> Any:
        """Run an expression in the page; its value as JSON."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """The URLs of all that the page asked for, but itself and what lies in it.

        What its own policy held back was never asked for.
        """
        events = [e for e in self.browser.events if e.get("sessionId") == self.session]
        held_back = {
            event["params"]["requestId"]
            for event in events
            if event["method"] == "Network.loadingFailed"
            and event["params"].get("blockedReason") == "csp"
        }
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [r["request"]["url"] for r in sent if r["requestId"] not in held_back]
        return [url for url in urls if url != self.url and not url.startswith("data:")]

    @property
    def broken_images(self) -> list[str]:
        """The `alt` of every image that has no pixels."""
        images = "Promise.all([...document.images].map(i => i.decode().then(() => 0, () => i.alt)))"
        actual = self.evaluate(f"{images}.then(alts => alts.filter(alt => alt !== 0))")
        assert isinstance(actual, list)
        return actual

    @property
    def overflow_px(self) -> int:
        """How much wider than the window the page is."""
        width_px = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.evaluate(width_px))

    def screenshot(self, target: Path) -> None:
        """Write the whole page as a PNG."""
        height_px = int(self.evaluate("document.documentElement.scrollHeight"))
        self.resize(int(self.evaluate("innerWidth")), height_px)
        picture = self.call("Page.captureScreenshot", format="png")
        target.write_bytes(base64.b64decode(picture["data"]))


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are none of the first ten descriptors, where the browser wants its own."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends[0], ends[1]
