"""Jobs of the study: commands that need each other's files, several in parallel, that can stop."""

import ctypes
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.system.io import warn_on_error
from engine.system.progress import LINE_SECONDS

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.05  # between looks at whether a job has ended


@dataclass(frozen=True)
class Job:
    """A command and the files that are there when it is done."""

    kind: str  # jobs of one kind take about as long
    targets: tuple[Path, ...]  # the first one gives the job its name and its log
    command: tuple[str, ...]  # a script of this project and its flags
    seconds: float  # estimated, on the whole machine
    needs: tuple["Job", ...] = ()
    recorded: bool = False  # its result is in the study's records: done without the files

    @property
    def target(self) -> Path:
        """The file that the job is there for."""
        return self.targets[0]

    @property
    def record(self) -> Path:
        """The JSON file that the job writes about itself."""
        return self.target.with_suffix(".json")

    @property
    def log(self) -> Path:
        """The file that takes the job's output."""
        return self.target.with_suffix(".log")

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.recorded or all(target.exists() for target in self.targets)

    def blocked(self, failed: Set[Path]) -> bool:
        """Return whether its target, or that of a job it needs, is among the failed ones."""
        has_failed = self.target in failed or any(job.blocked(failed) for job in self.needs)
        return has_failed and not self.done

    @property
    def line(self) -> str:
        """The command as one can paste it."""
        return "python " + shlex.join(self.command)

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        return self.target.parent.name + "/" + self.target.stem


def pending(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs to run, in order: those not done, each after those it needs."""
    ordered: dict[Path, Job] = {}
    for job in jobs:
        if not job.done:
            ordered |= {needed.target: needed for needed in pending(job.needs)}
            ordered[job.target] = job
    return list(ordered.values())


def next_ready_job(jobs: Iterable[Job], started: Set[Path]) -> Job | None:
    """Return the first pending job that was not started yet and has all it needs, or None."""
    waiting = (job for job in pending(jobs) if job.target not in started)
    return next((job for job in waiting if all(needed.done for needed in job.needs)), None)


# --- running ---------------------------------------------------------------------------------


class RunningJob:
    """A job that was started as a process; its output goes to <target>.log."""

    def __init__(self, job: Job, scripts: Path, max_parallel: int, gpu: str | None = None) -> None:
        """Start the job, a script in the folder `scripts`, with its share of the cores.

        It sees the one `gpu` alone; None: what this process sees.
        """
        self.job = job
        self.max_parallel = max_parallel
        self.gpu = gpu
        job.target.parent.mkdir(parents=True, exist_ok=True)
        # Only then is its time worth recording: nothing of an earlier attempt is there.
        self.started_fresh = not job.target.with_suffix(".ckpt").exists()
        self.began = time.perf_counter()
        threads = max(1, torch.get_num_threads() // max_parallel)
        own_gpu = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with open(job.log, "a", encoding="utf-8") as log:
            print(f"$ {job.line}", file=log, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, scripts / job.command[0], *job.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own_gpu, "OMP_NUM_THREADS": str(threads)},
                **detached_process(),
            )

    def succeeded(self) -> bool:
        """Wait, and return whether all targets are there; if not, rename a half-made one."""
        if self.process.wait() == 0 and self.job.done:
            return True
        if self.job.target.exists():
            os.replace(self.job.target, f"{self.job.target}.partial")
        return False

    def finish(self, out: Path) -> bool:
        """Return whether the job, which is over, succeeded; clean up.

        Adds a line with its time to <out>/jobs.jsonl where it ran without interruption.
        """
        seconds = time.perf_counter() - self.began
        if not self.succeeded():
            return False
        if self.started_fresh:
            times = {"seconds": round(seconds, 1), "at_once": self.max_parallel}
            line = {"kind": self.job.kind, **times, "command": self.job.line}
            with warn_on_error("the job's time was not recorded"):
                with open(out / "jobs.jsonl", "a", encoding="utf-8") as file:
                    print(json.dumps(line), file=file)
        if self.job.needs:  # nothing continues from its checkpoint, as from a trunk's
            for suffix in (".ckpt", ".ckpt.previous"):
                self.job.target.with_suffix(suffix).unlink(missing_ok=True)
        return True


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    n_gpus = torch.cuda.device_count()  # touches none
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:n_gpus] if names else [str(i) for i in range(n_gpus)]


def detached_process() -> dict[str, Any]:
    """Return arguments of Popen that keep Ctrl-C from a job: the study stops its jobs itself.

    On Linux a job is stopped, too, when the study is killed without a chance to do so.
    """
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    stop_with_parent = LIBC and partial(LIBC.prctl, PR_SET_PDEATHSIG, signal.SIGTERM)
    return {"process_group": 0, "preexec_fn": stop_with_parent}


@dataclass
class JobRunner:
    """Runs jobs, at most `max_parallel` at a time, until `next_job` returns none.

    `next_job` takes the targets that must not be started; `on_success` is called with each job that
    succeeds, and the targets of others are added to `failed`.
    """

    next_job: Callable[[Set[Path]], Job | None]
    on_success: Callable[[Job], None]
    max_parallel: int
    scripts: Path  # folder of the scripts that jobs run
    out: Path  # folder of the study
    failed: set[Path]
    bar: tqdm
    gpus: Sequence[str] = ()  # of which each job gets the one with the fewest jobs; (): all of them
    running: list[RunningJob] = field(default_factory=list)
    shown_at: float = field(default_factory=time.monotonic)  # when progress was last printed

    def run(self) -> None:
        """Run all jobs. However this ends, those that still run are stopped, with a checkpoint."""
        try:
            while True:
                succeeded = self._finish_ended()
                self._start_ready()
                for job in succeeded:  # while the next ones run
                    self.on_success(job)
                if not self.running:
                    break
                self._show_progress()
                time.sleep(POLL_SECONDS)
        finally:
            for each in self.running:
                each.process.terminate()
            for each in self.running:
                each.succeeded()

    def _finish_ended(self) -> list[Job]:
        """Return the jobs that have ended well since the last call; print what became of all."""
        ended = [each for each in self.running if each.process.poll() is not None]
        self.running = [each for each in self.running if each not in ended]
        succeeded = []
        for each in ended:
            if each.finish(self.out):
                tqdm.write(f"done: {each.job.line}")
                succeeded.append(each.job)
            else:
                self.failed.add(each.job.target)
                tqdm.write(f"FAILED: {each.job.line}\n  see {each.job.log}")
            self.bar.update(each.job.seconds)
        return succeeded

    def _show_progress(self) -> None:
        """Print how far each job is, now and then, where there is no terminal for the bar."""
        if self.bar.disable and time.monotonic() - self.shown_at > LINE_SECONDS:
            self.shown_at = time.monotonic()
            for each in self.running:
                log = each.job.log.read_text(encoding="utf-8", errors="replace")
                print(f"{each.job.title}: {log.splitlines()[-1]}", flush=True)

    def _start_ready(self) -> None:
        """Start jobs until enough are running or none is ready."""
        while len(self.running) < self.max_parallel:
            job = self.next_job({each.job.target for each in self.running} | self.failed)
            if job is None:
                break
            used = Counter(each.gpu for each in self.running)
            gpu = min(self.gpus, key=lambda gpu: used[gpu], default=None)
            self.running.append(RunningJob(job, self.scripts, self.max_parallel, gpu))
            self.bar.set_description(", ".join(each.job.title for each in self.running))


def job_seconds(out: Path) -> dict[str, float]:
    """Return, by kind, the median time of the jobs in <out>/jobs.jsonl, in seconds.

    That of a job beside others counts by its share of the machine. Half-written lines are skipped.
    """
    seconds: dict[str, list[float]] = {}
    path = out / "jobs.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else ()
    for line in lines:
        with suppress(ValueError, LookupError, TypeError, ArithmeticError):
            job = json.loads(line)
            seconds.setdefault(job["kind"], []).append(job["seconds"] / job["at_once"])
    return {kind: statistics.median(values) for kind, values in seconds.items()}
