"""Commands in processes that are forked from one which has imported everything already.

Importing torch and starting Ray's actors take most of a short command's time. Here a command has a
process of its own all the same, and its actors are threads: see `thread_cluster`. What a test of
Ray itself, of signals or of the environment needs is `runs.Cli`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import latentcache.cli.runs
from latentcache.engine import forecast, run
from runs import Cli, Result
from servers import DEADLINE_S
from thread_cluster import ThreadCluster

_FORK_SERVER = multiprocessing.get_context("forkserver")


class WarmCli(Cli):
    """`latentcache …` without Ray; `start` and `with_env` give the real one."""

    def __call__(self, *args: str | Path) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            process = _FORK_SERVER.Process(
                target=_run,
                args=([str(arg) for arg in args], dict(os.environ), os.getcwd(), *paths),
            )
            process.start()
            process.join(DEADLINE_S)
            if process.exitcode is None:
                process.kill()
                process.join()
                raise AssertionError(f"it hangs; it said: {Path(paths[1]).read_text()}")
            stdout, stderr = (Path(path).read_text() for path in paths)
        assert "Traceback" not in stderr, stderr
        return Result(process.exitcode, stdout, stderr)


def start_fork_server() -> None:
    """Start the process that commands are forked from, before any thread runs in this one."""
    _FORK_SERVER.set_forkserver_preload([__name__])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which the server does not take over
    try:
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def _run(args: list[str], env: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for fd, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_CREAT),
        (2, stderr, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    run.Cluster = forecast.Cluster = ThreadCluster  # type: ignore[misc, assignment]
    sys.argv = ["latentcache", *args]
    latentcache.cli.main()
