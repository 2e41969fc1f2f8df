"""Studies that are stopped or killed at random moments, with stand-ins for the scripts.

The same command goes on: nothing is lost, and no job that had ended is done again.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest
import tiny_scripts
from fork_server import launcher
from test_study import scripts, wait_for  # noqa: F401 (a fixture)

import study
from analysis.study import figures as study_figures
from analysis.study import runner as study_runner

N_MOMENTS = 30  # of each signal


def run_study(folder, at_once):
    """Run a study in the folder with the stand-ins, as a process of its own."""
    os.chdir(folder)
    study.SCRIPTS = folder / "scripts"
    study_runner.POLL_SECONDS = 0.005
    study_figures.draw_figures = lambda *_: None
    log = os.open("log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    flags = f"--out out --n_epochs 6 --only control l2grad --seeds 0 --jobs {at_once}"
    return tiny_scripts.run("study.py", flags.split())


def result(folder):
    """What a study found, without times; and how often each training was begun."""
    found = {}
    for path in sorted((folder / "out").rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json" and "study" not in path.name:
            found[name] = json.loads(path.read_text())
            found[name].pop("command", None)  # with --resume
            for key in ("resumed", "resume"):
                found[name].get("settings", {}).pop(key, None)
        elif path.name in ("summary.csv", "differences.csv", "accuracy_drops.csv"):
            found[name] = path.read_text()
    return found, Counter((folder / "calls").read_text().split())


def check_survives(number, n_moments, begin, where):
    """Signal a study at random moments and go on; all results are those of a whole one.

    `begin` starts one in a folder of that name, which may hold what is done of it; it returns the
    folder, the process's id, and a function that waits for the exit code and the output.
    """
    chance, moments = random.Random(number), 0
    began = time.monotonic()
    folder, _, wait = begin("whole", moments)
    code, output = wait()
    assert code == 0, output
    seconds = time.monotonic() - began
    expected, calls = result(folder)
    assert expected and set(calls.values()) == {1}
    while moments < n_moments:
        name = f"{moments}, {seconds}"
        folder, pid, wait = begin(name, moments)
        time.sleep(chance.uniform(0.05, 1) * seconds)
        os.kill(pid, number)  # it is there, if only as one that has ended
        code, output = wait()
        if code == 0:
            seconds *= 0.9  # it was too late
            continue
        assert code in (-number, 128 + number), output
        _, _, wait = begin(name, moments)
        code, output = wait()
        assert code == 0, output
        found, again = result(folder)
        assert found == expected and again.keys() == calls.keys()
        assert again.total() <= calls.total() + 2  # at most the jobs that were interrupted
        moments += 1
    which = signal.Signals(number).name
    print(f"\n{which} {where}: {moments}, 0 jobs lost, 0 results different")


def folder_of_study(tmp_path, name):
    """Make a folder with the stand-ins, where it is not there."""
    folder = tmp_path / name
    shutil.copytree(tmp_path / "scripts", folder / "scripts", dirs_exist_ok=True)
    return folder


@pytest.mark.faults  # test_study.py has one of each kind
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_study_survives_a_signal_at_any_moment(number, scripts, tmp_path):  # noqa: F811
    forks = launcher()

    def begin(name, moments):
        folder = folder_of_study(tmp_path, name)
        pid = forks.start(run_study, folder, 1 + moments % 2)
        wait_for(folder / "log")
        return folder, pid, lambda: (forks.wait(pid), (folder / "log").read_text())

    check_survives(number, N_MOMENTS, begin, "in a study")
