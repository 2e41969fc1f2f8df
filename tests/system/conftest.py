"""What tests of faults and of hostile input share."""

import signal

import pytest
from tiny_runs import RUNS, OneRun, run_uninterrupted


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    """Has started a run before, which waits for all imports."""
    runs = OneRun()
    assert runs.run("train.py", ["--help"], tmp_path_factory.mktemp("imports")) == 0
    return runs


@pytest.fixture(scope="session")
def uninterrupted(launcher, tmp_path_factory):
    """The results of the uninterrupted RUNS, and how long each takes."""
    folders = [tmp_path_factory.mktemp("uninterrupted") for _ in RUNS]
    return [run_uninterrupted(launcher, *each) for each in zip(RUNS, folders, strict=True)]


@pytest.fixture
def alarm():
    """Call it before each case: a case that hangs for 20 s raises."""

    def hang(*_):
        raise TimeoutError("this case hangs")

    before = signal.signal(signal.SIGALRM, hang)
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
