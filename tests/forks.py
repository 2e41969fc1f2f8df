"""Processes that start in milliseconds, where an interpreter takes seconds to load torch.

They are forks of a server that has loaded other people's packages, and none of our own modules.
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
FORKS.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure", "wandb"])


def call(
    function: Callable[..., None], *arguments: object, cwd: Path,
    env: Mapping[str, str] = os.environ,
) -> subprocess.CompletedProcess:
    """Call a function of a module in a process of its own, with nothing to read on stdin."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        fork = FORKS.Process(target=_work, args=(function, arguments, cwd, dict(env), paths))
        fork.start()
        fork.join(300)
        if fork.exitcode is None:
            fork.kill()
            fork.join()
        out, err = (path.read_text() if path.exists() else "" for path in paths)
        return subprocess.CompletedProcess(arguments, fork.exitcode, out, err)


def _work(function, arguments, cwd, env, paths):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    function(*arguments)


def command(argv: Sequence[str]) -> None:
    """Do what `python argv…` does, on one thread."""
    import torch

    torch.set_num_threads(1)
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")
