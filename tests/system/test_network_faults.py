"""Faults in runs of the real networks: signals and failing writes, then --resume to the same bits.

`make faults` runs them: each is a training of seconds on images made in memory.
"""

import os
import random
import signal
import subprocess
import sys

import pytest
import tiny_scripts
import torch
import torchvision
from tiny_runs import (
    assert_resumes,
    read_log,
    result,
    run_uninterrupted,
    signals_line,
    survive_signals,
)

pytestmark = pytest.mark.faults
COMMON = "--device cpu --precision fp32 --lr 0.01 --run_name r --checkpoint_minutes 0.005".split()
COMMON += ["--no_test_penalty"]  # it takes longer than the training
SMALL = "--dataset Synthetic --train_subset 96 --batch_size 32 --n_epochs 2".split()
RESNET = "--model ResNet20 --width 0.25 --no-compile".split()
N_MOMENTS = 4  # of each signal
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
IN_FORKS = [name for name in RUNS if "workers" not in name and "compiled" not in name]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with `images`."""
    folder = tmp_path_factory.mktemp("networks")
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", 12), ("val", 4)):
        for label in "ab":
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(n):
                image = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=generator)
                path = folder / "images" / part / label / f"{i}.png"
                torchvision.io.write_png(image, str(path))
    return folder


class OwnProcess:
    """Starts runs as OneRun does, as commands: forks of the launcher may start no processes."""

    def start(self, script, argv, cwd):
        command = [sys.executable, tiny_scripts.__file__, script, *argv]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (cwd / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return self.process.pid

    def wait(self):
        return self.process.wait(timeout=400)

    def run(self, script, argv, cwd):
        self.start(script, argv, cwd)
        return self.wait()


@pytest.fixture
def run(request, launcher, base, tmp_path):
    """What starts a run, its script and flags, its result, and how many seconds it takes."""
    launcher = launcher if request.param in IN_FORKS else OwnProcess()
    argv = [str(base / "images") if word == "IMAGES" else word for word in RUNS[request.param]]
    run = "train.py", [*COMMON, *argv]
    whole = tmp_path / "whole"
    whole.mkdir()
    return launcher, run, *run_uninterrupted(launcher, run, whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_a_network_survives_a_signal_at_any_moment(number, run, tmp_path, request):
    launcher, command, expected, seconds = run
    chance = random.Random(number)
    moments = survive_signals(
        launcher, command, expected, seconds, number, N_MOMENTS, tmp_path / "n", chance
    )
    print(signals_line(number, moments, f", {request.node.callspec.params['run']}"))


@pytest.mark.parametrize("mode", ["fail", "die"])
@pytest.mark.parametrize("run", IN_FORKS, indirect=True)
def test_a_network_survives_writes_that_break(mode, run, tmp_path, request):
    launcher, (script, argv), expected, _ = run
    n_broken = 0
    for number in range(1, 1000, 9):
        folder = tmp_path / str(number)
        folder.mkdir()
        code = launcher.run(script, argv, folder, (number, mode))
        log = read_log(folder)
        if "write breaks" not in log:
            break  # there are fewer writes than that
        n_broken += 1
        assert code in ((0, 1) if mode == "fail" else (-signal.SIGKILL,)), log
        assert "Traceback" not in log, log
        assert code != 1 or "error:" in log.splitlines()[-1], log
        if code == 0:
            assert result(folder) == expected
        assert_resumes(launcher, (script, argv), folder, expected)
    assert n_broken
    name = request.node.callspec.params["run"]
    print(f"\nwrites that {mode}, {name}: {n_broken}, 0 runs lost, 0 bits different")
