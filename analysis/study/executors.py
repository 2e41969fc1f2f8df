"""Where the jobs of a study run: as processes of this machine, or on a Ray cluster."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from analysis.study.jobs import Job
from engine.system.errors import FileError, SetupError
from engine.system.extras import require
from engine.system.io import run_lock

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork
PR_SET_PDEATHSIG = 1
PROJECT = Path(__file__).resolve().parents[2]  # where workers of a cluster find this module
LOST_WORKERS = 5  # how often a job is started again because its machine was lost
CONNECT_SECONDS = 20  # to reach a cluster
POLL_SECONDS = 0.5  # between looks at whether a job on a cluster has ended
STOP_SECONDS = 60  # that a job on a cluster has to write its checkpoint


class JobResult(NamedTuple):
    """How a job ended."""

    ended_well: bool  # with exit code 0
    seconds: float | None  # that it ran; None if it went on from a checkpoint, or did not run


class RunningJob(Protocol):
    """A job that was started."""

    job: Job

    def ended(self) -> bool:
        """Return whether it has ended; do not wait."""

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""

    def result(self) -> "JobResult":
        """Wait; return how it ended."""


class Executor(Protocol):
    """Starts jobs."""

    jobs_per_machine: int  # that share its cores: recorded beside the times

    def has_room(self, running: Sequence[RunningJob]) -> bool:
        """Return whether one more job can be started beside those running."""

    def start(self, job: Job, running: Sequence[RunningJob]) -> RunningJob:
        """Start the job; its output goes to `job.log`."""


# --- a job as a process ----------------------------------------------------------------------


class JobProcess:
    """A job as a process of this machine; its output goes to `job.log`."""

    def __init__(
        self, job: Job, scripts: Path, folder: Path, threads: int, gpu: str | None = None
    ) -> None:
        """Start the job, a script in `scripts`, in the working directory `folder`.

        It sees the one `gpu` alone; None: what this process sees.
        """
        self.job = job
        self.gpu = gpu
        self.began = time.perf_counter()
        self.goes_on = (folder / job.target).with_suffix(".ckpt").exists()
        own_gpu = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with open(folder / job.log, "a", encoding="utf-8") as log:
            print(f"$ {job.line}", file=log, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, scripts / job.command[0], *job.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **own_gpu, "OMP_NUM_THREADS": str(threads)},
                **detached_process(),
            )

    def ended(self) -> bool:  # noqa: D102 (see RunningJob)
        return self.process.poll() is not None

    def stop(self) -> None:  # noqa: D102
        self.process.terminate()

    def result(self) -> JobResult:  # noqa: D102
        ended_well = self.process.wait() == 0
        seconds = time.perf_counter() - self.began
        return JobResult(ended_well, None if self.goes_on else seconds)


def detached_process() -> dict[str, Any]:
    """Return arguments of Popen that keep Ctrl-C from a job: the study stops its jobs itself.

    On Linux a job is stopped, too, when the study is killed without a chance to do so.
    """
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    stop_with_parent = LIBC and partial(LIBC.prctl, PR_SET_PDEATHSIG, signal.SIGTERM)
    return {"process_group": 0, "preexec_fn": stop_with_parent}


# --- on this machine -------------------------------------------------------------------------


class LocalExecutor:
    """Runs at most `max_parallel` jobs at a time, each with its share of the cores.

    They are children of the thread that this is used in: on Linux the system stops them when that
    one ends, which a pool of threads would do too early.
    """

    def __init__(self, max_parallel: int, scripts: Path, gpus: Sequence[str] = ()) -> None:
        """Each job sees that one of the `gpus` which has the fewest jobs; (): all of them."""
        self.jobs_per_machine = max_parallel
        self.scripts = scripts
        self.gpus = gpus

    def has_room(self, running: Sequence[JobProcess]) -> bool:  # noqa: D102 (see Executor)
        return len(running) < self.jobs_per_machine

    def start(self, job: Job, running: Sequence[JobProcess]) -> JobProcess:  # noqa: D102
        used = Counter(each.gpu for each in running)
        gpu = min(self.gpus, key=lambda gpu: used[gpu], default=None)
        threads = max(1, torch.get_num_threads() // self.jobs_per_machine)
        return JobProcess(job, self.scripts, Path(), threads, gpu)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    n_gpus = torch.cuda.device_count()  # touches none
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:n_gpus] if names else [str(i) for i in range(n_gpus)]


# --- on a Ray cluster ------------------------------------------------------------------------


def run_here(job: Job, scripts: Path, folder: Path, threads: int) -> JobResult:
    """Run the job on the machine that Ray has chosen, until it ends or `stop_file` is there.

    Where the worker before this one was lost, its process may still be writing its checkpoint.
    """
    stop = folder / stop_file(job)
    with suppress(FileError), run_lock((folder / job.target).with_suffix(""), wait=STOP_SECONDS):
        pass
    process = JobProcess(job, scripts, folder, threads)
    try:
        while not (process.ended() or stop.exists()):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    process.stop()  # nothing, where it has ended
    stop.unlink(missing_ok=True)
    return process.result()


def stop_file(job: Job) -> Path:
    """Return the file that asks a job on a cluster to stop.

    Ray's own way, an interrupt, does nothing where the cluster was started in the background of a
    script or with nohup: shells have such processes ignore it (Ray 2.60).
    """
    return job.target.with_suffix(".stop")


class RayJob:
    """A job as a task of a Ray cluster, waiting for room there or running."""

    def __init__(self, job: Job, ray: Any, task: Any) -> None:
        self.job = job
        self.ray = ray
        self.task = task

    def ended(self) -> bool:  # noqa: D102 (see RunningJob)
        return bool(self.ray.wait([self.task], timeout=0)[0])

    def stop(self) -> None:  # noqa: D102
        stop_file(self.job).touch()
        self.ray.cancel(self.task)  # where it waits for room

    def result(self) -> JobResult:  # noqa: D102
        try:
            return self.ray.get(self.task, timeout=STOP_SECONDS)
        except self.ray.exceptions.RayError as error:  # lost too often, or stopped before it began
            with open(self.job.log, "a", encoding="utf-8") as log:
                print(f"Ray: {type(error).__name__}: {error}", file=log)
            return JobResult(False, None)
        finally:
            stop_file(self.job).unlink(missing_ok=True)


def check_reachable(address: str) -> None:
    """Raise SetupError where nothing answers at HOST:PORT, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise SetupError(f"--ray {address}: there is no cluster: {error}") from error


class RayExecutor:
    """Runs jobs as tasks of a Ray cluster, whose machines share this working directory.

    Ray places them by the cores and GPUs that each is given, and starts a job again elsewhere when
    its machine is lost: with --resume it goes on from its last checkpoint.
    """

    def __init__(
        self, address: str, max_parallel: int, scripts: Path, cpus: int, gpus: float
    ) -> None:
        """Connect to the cluster at `address`, "local" starts one here; SetupError if that fails.

        A job has so many `cpus`, and that part of a GPU; of this process's environment it gets what
        the logger reads.
        """
        self.ray = require("ray", "--ray", "requirements-cluster.txt")
        self.jobs_per_machine = 1
        self.max_parallel = max_parallel
        self.scripts = scripts.resolve()
        self.cpus = cpus
        own = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        check_reachable(address)
        handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.ray.init(
                address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT), **own}},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SetupError(f"--ray {address}: there is no cluster: {reason}") from error
        finally:
            for number, handler in handlers.items():  # which Ray replaces by its own
                signal.signal(number, handler)
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": LOST_WORKERS}
        self.run = self.ray.remote(**options)(run_here)

    def has_room(self, running: Sequence[RayJob]) -> bool:  # noqa: D102 (see Executor)
        return len(running) < self.max_parallel

    def start(self, job: Job, running: Sequence[RayJob]) -> RayJob:  # noqa: D102
        task = self.run.remote(job, self.scripts, Path.cwd(), self.cpus)
        return RayJob(job, self.ray, task)
