"""Processes that start in milliseconds, where an interpreter takes seconds to load torch.

They are forks of a server that has loaded other people's packages, and none of our own modules. So
a module that uses one of these packages without importing it is not detected. Where this does not
matter, a `Launcher` has loaded ours, too.

No fork is one of the test process: its threads, such as those of ONNX Runtime or of tqdm, would not
be in the fork, but the locks that they hold would.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
SECONDS = 300
FORKS.set_forkserver_preload(["preloaded"])


def start(function: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    """Start a function of a module in a fork of the server, which is started if it does not run."""
    folder = str(Path(__file__).parent)
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=folder):  # there it finds `preloaded`
        forkserver.ensure_running()
    fork = FORKS.Process(target=function, args=arguments, daemon=True)
    fork.start()
    return fork


def call(
    function: Callable[..., None],
    *arguments: object,
    cwd: Path,
    env: Mapping[str, str] = os.environ,
) -> subprocess.CompletedProcess:
    """Call a function of a module in a process of its own, with nothing to read on stdin.

    Raises TimeoutExpired after five minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        for path in paths:
            path.touch()
        fork = start(_work, function, arguments, cwd, dict(env), paths)
        try:
            fork.join(SECONDS)
            if fork.exitcode is None:
                raise subprocess.TimeoutExpired(arguments, SECONDS)
        finally:
            fork.kill()
            fork.join()
        out, err = (path.read_text() for path in paths)
        return subprocess.CompletedProcess(arguments, fork.exitcode, out, err)


def _work(function, arguments, cwd, env, paths):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    function(*arguments)


def command(argv: Sequence[str]) -> None:
    """Do what `python argv…` does, on one thread; what it registered with atexit is not called."""
    import torch

    torch.set_num_threads(1)
    sys.argv = list(argv)
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


class Launcher:
    """Starts functions of our modules in forks of a process that has these modules loaded."""

    def __init__(self) -> None:
        self.connection, theirs = FORKS.Pipe()
        start(_launch, theirs)
        theirs.close()

    def start(self, function: Callable[..., int | None], *arguments: object) -> int:
        """Return the pid of a process that calls the function; it exits with what it returns."""
        self.connection.send((_fork, dict(os.environ), function, arguments))
        return self.connection.recv()

    def poll(self, pid: int) -> int | None:
        """Return the exit code, −n where signal n ended it, or None while the process runs."""
        self.connection.send((_poll, pid))
        return self.connection.recv()

    def wait(self, pid: int, seconds: float = SECONDS) -> int:
        """Return the exit code; kill the process and raise TimeoutExpired if it takes longer."""
        deadline = time.monotonic() + seconds
        while (code := self.poll(pid)) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(pid), seconds)
            time.sleep(0.005)
        return code


launcher = cache(Launcher)  # the one of this test process


def _launch(connection):
    """Do what a Launcher asks for until it is gone; then end what still runs."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    running: set[int] = set()
    try:
        while True:
            call, *arguments = connection.recv()  # which imports the function's module
            connection.send(call(running, *arguments))
    except EOFError:
        pass
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def _fork(running, env, function, arguments):
    import torch

    gc.freeze()  # our modules, too, which are loaded by now: see preloaded.py
    if pid := os.fork():
        running.add(pid)
        return pid
    code = 1
    try:
        # makes anew the pool of threads that a fork loses, before two threads do it at once
        torch.set_num_threads(1)
        running.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        code = function(*arguments) or 0
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _poll(running, pid):
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found:
        return None
    running.discard(pid)
    return os.waitstatus_to_exitcode(status)
