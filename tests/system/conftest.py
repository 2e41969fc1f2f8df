"""What tests of faults and of hostile input share."""

import math
import signal
import time

import pytest
from tiny_runs import RUNS, OneRun, read_log, result


@pytest.fixture(scope="session")
def launcher():
    return OneRun()


@pytest.fixture(scope="session")
def uninterrupted(launcher, tmp_path_factory):
    """The results of the uninterrupted RUNS, and how long each takes."""
    results = []
    for script, argv in RUNS:
        folder, seconds = tmp_path_factory.mktemp("uninterrupted"), math.inf
        for _ in range(2):
            started_at = time.monotonic()
            assert launcher.run(script, argv, folder) == 0, read_log(folder)
            seconds = min(seconds, time.monotonic() - started_at)
        results.append((result(folder), seconds))
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
