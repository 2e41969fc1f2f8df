"""What tests of faults and of hostile input share."""

import signal

import pytest
from tiny_runs import RUNS, OneRun, run_uninterrupted


@pytest.fixture(scope="session")
def launcher():
    return OneRun()


@pytest.fixture(scope="session")
def uninterrupted(launcher, tmp_path_factory):
    """The results of the uninterrupted RUNS, and how long each takes."""
    results = []
    for run in RUNS:
        twice = [
            run_uninterrupted(launcher, run, tmp_path_factory.mktemp("uninterrupted"))
            for _ in range(2)
        ]
        results.append((twice[0][0], min(seconds for _, seconds in twice)))
    return results


@pytest.fixture
def alarm():
    """Call it before each case: a case that hangs for 20 s raises."""

    def hang(*_):
        raise TimeoutError("this case hangs")

    before = signal.signal(signal.SIGALRM, hang)
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
