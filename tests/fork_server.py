"""Processes that start in milliseconds, where an interpreter takes seconds to load torch.

They are forks of a server that has loaded other people's packages, and none of our own modules. So
a module that uses one of these packages without importing it is not detected.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
SECONDS = 300
FORKS.set_forkserver_preload(
    ["torch", "torchvision", "matplotlib.figure", "pandas", "scipy.stats", "wandb"]
)


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
        fork = FORKS.Process(
            target=_work, args=(function, arguments, cwd, dict(env), paths), daemon=True
        )
        fork.start()
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
