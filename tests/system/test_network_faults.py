"""Faults in runs of the real networks: signals and failing writes, then --resume to the same bits.

`make faults` runs them, a thousand in an hour: each is a training of seconds on images made in
memory.
"""

import os
import pickle
import random
import signal
import subprocess
import sys
from contextlib import suppress

import fork_server
import pytest
import test_distributed
import tiny_scripts
from image_folder import write_image_folder
from tiny_runs import (
    OneRun,
    run_uninterrupted,
    signals_line,
    survive_signals,
    survives_broken_write,
)

pytestmark = pytest.mark.faults
COMMON = "--device cpu --precision fp32 --lr 0.01 --run_name r --checkpoint_minutes 0.005".split()
COMMON += ["--no_test_penalty"]  # it takes longer than the training
SMALL = "--dataset Synthetic --train_subset 24 --batch_size 8 --holdout 16 --n_epochs 2".split()
RESNET = "--model ResNet20 --width 0.25 --no-compile".split()
N_MOMENTS = 56  # of each signal, in a run that starts at once
N_MOMENTS_OF_COMMANDS = 8  # in one that takes seconds to start
RUNS = {
    "ResNet20, EMA": [*RESNET, *SMALL, *"--ema 0.9 --regularizer L2Grad".split()],
    "ResNet20, LSQ": [*RESNET, *SMALL, *"--qat_bits 4,4 --qat_from 1".split()],
    "ResNet20, difference in every 2nd batch": [
        *RESNET,
        *SMALL,
        *"--regularizer L1Grad --penalty_gradient difference --penalty_every 2".split(),
    ],
    "ResNet20, compiled": [*RESNET[:-1], *SMALL, *"--regularizer L2Grad".split()],
    "ConvNet": ["--no-compile", *SMALL, *"--regularizer KurtosisNorm --fold_bn".split()],
    "ImageFolder, 2 workers": [
        *RESNET,
        *"--dataset ImageFolder --data_dir IMAGES --image_size 32 --workers 2".split(),
        *"--batch_size 8 --n_epochs 12 --regularizer L2Grad".split(),
    ],
}
RUNS["ResNet20, EMA, two processes"] = RUNS["ResNet20, EMA"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of image files of two classes."""
    folder = tmp_path_factory.mktemp("images")
    write_image_folder(folder, "ab", 12, 4, 40, 40)
    return folder


class OwnProcess(OneRun):
    """Starts runs as OneRun does, as commands: forks of the launcher may start no processes."""

    def start(self, script, argv, cwd, inject=None):
        assert inject is None
        command = [sys.executable, tiny_scripts.__file__, script, *argv]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (cwd / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return self.process.pid

    def wait(self):
        return self.process.wait(timeout=400)


class TwoProcesses(OneRun):
    """Starts runs of two ranks, of which one at random is the victim."""

    chance = random.Random(0)

    def start(self, script, argv, cwd, inject=None):
        assert inject is None
        self.cwd = cwd
        self.ranks = test_distributed.Ranks(2, test_distributed.run, cwd, script, *argv)
        self.victim = self.chance.randrange(2)
        return self.ranks.pids[self.victim]

    def wait(self):
        """Return the victim's exit code; torchrun would end the other, which may wait for it."""
        forks, pids = fork_server.launcher(), self.ranks.pids
        code = forks.wait(pids[self.victim])
        with suppress(subprocess.TimeoutExpired):  # it is killed then
            forks.wait(pids[1 - self.victim], 60)
        if code == 0:
            code = pickle.loads(self.ranks.files[self.victim].read_bytes())
        logs = [self.cwd / f"log{rank}" for rank in range(2)]
        text = "".join(log.read_text() for log in logs if log.exists())
        (self.cwd / "log").write_text(text)
        for log in logs:
            log.unlink(missing_ok=True)
        return code


LAUNCHERS = {
    "ResNet20, compiled": OwnProcess,
    "ImageFolder, 2 workers": OwnProcess,
    "ResNet20, EMA, two processes": TwoProcesses,
}
IN_FORKS = [name for name in RUNS if name not in LAUNCHERS]


@pytest.fixture
def run(request, launcher, images, tmp_path):
    """A run's name, what starts it, script and flags, its result, and how many seconds it takes."""
    if request.param in LAUNCHERS:
        launcher = LAUNCHERS[request.param]()
    argv = [str(images) if word == "IMAGES" else word for word in RUNS[request.param]]
    run = "train.py", [*COMMON, *argv]
    whole = tmp_path / "whole"
    whole.mkdir()
    return request.param, launcher, run, *run_uninterrupted(launcher, run, whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_a_network_survives_a_signal_at_any_moment(number, run, tmp_path):
    name, launcher, command, expected, seconds = run
    chance = random.Random(number)
    n_moments = N_MOMENTS_OF_COMMANDS if name in LAUNCHERS else N_MOMENTS
    moments = survive_signals(
        launcher, command, expected, seconds, number, n_moments, tmp_path / "n", chance
    )
    print(signals_line(number, moments, f", {name}"))


@pytest.mark.parametrize("mode", ["fail", "die"])
@pytest.mark.parametrize("run", IN_FORKS, indirect=True)
def test_a_network_survives_writes_that_break(mode, run, tmp_path):
    name, launcher, command, expected, _ = run
    n_broken = 0
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        if survives_broken_write(launcher, command, expected, number, mode, folder) is None:
            break
        n_broken += 1
    assert n_broken
    print(f"\nwrites that {mode}, {name}: {n_broken}, 0 runs lost, 0 bits different")
