"""The study on a Ray cluster: two nodes of this machine. `make test-cluster` installs Ray.

Nothing may be lost or done twice when a worker, the driver or a whole node dies.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_study import main, scripts, wait_for  # noqa: F401 (a fixture)
from test_study_faults import check_survives, folder_of_study

pytestmark = pytest.mark.cluster
SLOW = "out/seed0/control"
PROJECT = Path(__file__).parents[2]
N_MOMENTS = int(os.environ.get("RAY_MOMENTS", "4"))  # of each signal
DRIVER = """
import sys
from pathlib import Path
import study
study.SCRIPTS = Path("scripts").resolve()
study.main(sys.argv[1:])
"""


@pytest.fixture
def slow_job(monkeypatch):
    """Nodes that are started after this take a minute for the control, unless it goes on."""
    monkeypatch.setenv("SLOW", SLOW)


@pytest.fixture
def cluster():
    """A cluster whose head runs no jobs, and two nodes of one core each: `nodes`."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    import ray

    ray.shutdown()
    made.shutdown()


def start_driver(cluster, *flags):
    """Start the study of the control in a process of its own, in the working directory."""
    command = [sys.executable, "-c", DRIVER, "--out", "out", "--n_epochs", "6", "--only", "control"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        [*command, "--seeds", "0", "--ray", cluster.address, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_until_gone(word, seconds=120):
    """Wait until no process has the word in its command line."""
    end = time.monotonic() + seconds
    while any(word.encode() in line for line in command_lines()):
        assert time.monotonic() < end, f"{word} still runs after {seconds} s"
        time.sleep(0.2)


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            yield path.read_bytes()


def test_jobs_of_two_nodes_are_the_same_study(cluster, scripts):  # noqa: F811
    flags = ["--only", "control", "l2grad", "--seeds", "0", "1", "--ray", cluster.address]
    assert main(*flags, "--cpus_per_job", "1") == 0
    names = {f"out/seed{s}/{x}" for s in (0, 1) for x in ("trunk", "control", "l2grad_0.03")}
    tuning = ("trunk", "control", "l2grad_0.01", "l2grad_0.03", "l2grad_0.1")
    names |= {f"out/tuning/{x}" for x in tuning}
    assert sorted(scripts()) == sorted(names)  # each once
    page = Path("out/tables.md").read_text(encoding="utf-8")
    assert page.count("\nOMP_NUM_THREADS=1 python train.py ") == 2 * 2 * 2
    times = Path("out/jobs.jsonl").read_text().splitlines()
    assert all(json.loads(line)["at_once"] == 1 for line in times)


def test_a_job_whose_node_is_lost_goes_on_elsewhere(slow_job, cluster, scripts):  # noqa: F811
    driver = start_driver(cluster)
    wait_for(f"{SLOW}.ckpt", 120)
    for node in cluster.nodes:  # the job's is one of them
        cluster.remove_node(node)
    cluster.nodes = [cluster.add_node(num_cpus=1)]
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    assert scripts() == ["out/seed0/trunk", SLOW, SLOW]
    assert json.loads(Path(f"{SLOW}.json").read_text())["settings"]["resumed"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_dies_loses_nothing(number, slow_job, cluster, scripts):  # noqa: F811
    driver = start_driver(cluster)
    wait_for(f"{SLOW}.ckpt", 120)
    second = start_driver(cluster)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 1 and "another run is writing to out/study" in output
    driver.send_signal(number)
    driver.wait(timeout=120)
    wait_until_gone(SLOW)  # the job: Ray kills it, or it has stopped with a checkpoint
    again = start_driver(cluster)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert scripts() == ["out/seed0/trunk", SLOW, SLOW]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_survives_a_signal_at_any_moment(number, cluster, scripts, tmp_path, monkeypatch):  # noqa: F811
    def begin(name, moments):
        folder = folder_of_study(tmp_path, name)
        monkeypatch.chdir(folder)
        driver = start_driver(cluster, "--seeds", "0", "1", "--cpus_per_job", "1")

        def wait():
            output, _ = driver.communicate(timeout=240)
            return driver.returncode, output

        return folder, driver.pid, wait

    check_survives(number, N_MOMENTS, begin, "to the driver of a cluster")


def test_no_cluster_at_the_address_is_a_line(scripts, capsys):  # noqa: F811
    pytest.importorskip("ray")
    assert main("--only", "control", "--ray", "127.0.0.1:1") == 2
    output = capsys.readouterr().err
    assert "--ray 127.0.0.1:1: there is no cluster" in output and not scripts()
