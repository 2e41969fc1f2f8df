"""Runs of the scripts with a tiny network that faults are injected into, and their results."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import fork_server
import pytest
import tiny_scripts
import torch

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

    def start(self, script, argv, cwd, broken=None):
        self.pid = fork_server.launcher().start(tiny_scripts.run_logged, script, argv, cwd, broken)
        return self.pid

    def wait(self):
        return fork_server.launcher().wait(self.pid, 60)

    def run(self, script, argv, cwd, broken=None):
        self.start(script, argv, cwd, broken)
        return self.wait()


def read_log(folder):
    return (folder / "log").read_text()


def result(folder):
    """Weights as bytes, and history without timings."""
    weights = torch.load(folder / "r.pt", weights_only=True)
    history = json.loads((folder / "r.json").read_text())["history"]
    return (
        {name: (t.shape, t.numpy().tobytes()) for name, t in weights.items()},
        [{key: value for key, value in entry.items() if "second" not in key} for entry in history],
    )


def run_here(script, argv):
    """Return the exit code and what a terminal would show of stderr."""
    errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with redirect_stderr(errors), redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        code = tiny_scripts.run(script, argv)
    return code, errors.buffer.getvalue().decode()
