"""Runs of the scripts that faults are injected into, with a tiny network, and their results."""

import io
import json
import os
import signal
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import fork_server
import pytest
import tiny_scripts
import torch

from engine.training import checkpoints

FAST = [*tiny_scripts.FLAGS, "--n_epochs", "4", "--checkpoint_minutes", "0.0001"]
RUNS = [
    (
        "train.py",
        [
            *FAST,
            "--regularizer",
            "L2Grad",
            "--first_regularized_epoch",
            "2",
            "--save_preregularized_model",
        ],
    ),
    (
        "combined_protocol.py",
        [
            *FAST,
            "--phases",
            "0:none",
            "1:VarianceNorm=0.1",
            "2:VarianceNorm=0.1+L1Grad@weights=0.01",
        ],
    ),
]
SIZES = [
    pytest.param("short", id="short"),
    pytest.param("long", id="long", marks=pytest.mark.faults),
]


class OneRun:
    """Starts runs of scripts with a tiny network, one at a time."""

    def start(self, script, argv, cwd, inject=None):
        self.pid = fork_server.launcher().start(tiny_scripts.run_logged, script, argv, cwd, inject)
        return self.pid

    def wait(self):
        return fork_server.launcher().wait(self.pid, 60)

    def run(self, script, argv, cwd, inject=None):
        self.start(script, argv, cwd, inject)
        return self.wait()


def read_log(folder):
    return (folder / "log").read_text()


def result(folder):
    """All weights as bytes, and the history without timings."""
    weights = {path.name: torch.load(path, weights_only=True) for path in folder.glob("r*.pt")}
    history = json.loads((folder / "r.json").read_text())["history"]
    return (
        {
            (file, name): (t.shape, t.numpy().tobytes())
            for file, tensors in weights.items()
            for name, t in tensors.items()
        },
        [{key: value for key, value in entry.items() if "second" not in key} for entry in history],
    )


def run_uninterrupted(launcher, run, folder):
    """Return the result of a run, and how many seconds it takes."""
    started_at = time.monotonic()
    assert launcher.run(*run, folder) == 0, read_log(folder)
    return result(folder), time.monotonic() - started_at


def assert_resumes(launcher, run, folder, expected):
    """What is left is whole, and --resume ends as if nothing had happened."""
    script, argv = run
    checkpoints.load_checkpoint(folder / "r.ckpt")  # raises where there are some and none is whole
    assert launcher.run(script, [*argv, "--resume"], folder) == 0, read_log(folder)
    assert result(folder) == expected
    left = {path.name for path in folder.iterdir()} - {"log"}
    weights = {"r.pt", "r_preregul.pt", "r_ema.pt"}
    assert left <= {*weights, "r.json", "r_ema.json", "r.ckpt", "r.ckpt.previous"}


def interrupt(launcher, run, folder, number, seconds):
    """Send signal `number` to a run that has begun so long ago; return at which moment it came."""
    pid = launcher.start(*run, folder)
    time.sleep(seconds)
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    code = launcher.wait()
    assert code in (0, -number, 128 + number), read_log(folder)
    names = {path.name for path in folder.iterdir()}
    if code == 128 + number:
        log = read_log(folder)  # one of several processes may be stopped before they meet
        assert "Traceback" not in log and ("stopped" in log or "another process" in log)
        assert not any(name.endswith((".tmp", ".lock")) for name in names)
    if code == 0:
        return "after the end"
    if any(name.endswith(".tmp") for name in names):
        return "in a write"
    if "r.pt" in names:
        return "while finishing"
    if "r.ckpt" not in names:
        return "before the first checkpoint"
    assert number == signal.SIGKILL or code == 128 + number  # it is told, and stops by itself
    return "while training"


def survive_signals(launcher, run, expected, seconds, number, n_moments, folder, chance):
    """Interrupt a run at n random moments and resume it each time; return the moments."""
    moments = Counter()
    while moments.total() - moments["after the end"] < n_moments:  # those are too late to count
        here = folder / str(moments.total())
        here.mkdir(parents=True)
        moment = interrupt(launcher, run, here, number, chance.uniform(0, 1.05) * seconds)
        # the machine may be busier than it was
        seconds *= 0.9 if moment == "after the end" else 1.02
        assert_resumes(launcher, run, here, expected)
        moments[moment] += 1
    return moments


def survives_broken_write(launcher, run, expected, number, mode, folder):
    """Break a run's write of that number and resume it; return its exit code, None without such."""
    script, argv = run
    folder.mkdir()
    code = launcher.run(script, argv, folder, partial(tiny_scripts.break_write, number, mode))
    log = read_log(folder)
    if "write breaks" not in log:
        return None  # there are fewer writes than that
    assert code in ((-signal.SIGKILL,) if mode == "die" else (0, 1)), log
    assert code != 1 or "error:" in log.splitlines()[-1], log
    assert "Traceback" not in log and log.count("No space") <= (mode == "fail")
    if code == 0:
        assert result(folder) == expected
    assert_resumes(launcher, run, folder, expected)
    return code


def signals_line(number, moments, of=""):
    """Return what survived, as a line."""
    found = ", ".join(f"{n} {moment}" for moment, n in moments.items())
    n_runs, name = moments.total() - moments["after the end"], signal.Signals(number).name
    return f"\n{name}{of}: {n_runs} runs, 0 lost, 0 bits different; {found}"


def run_here(script, argv):
    """Return the exit code and what a terminal would show of stderr."""
    errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with redirect_stderr(errors), redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        code = tiny_scripts.run(script, argv)
    return code, errors.buffer.getvalue().decode()
