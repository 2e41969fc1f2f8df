"""Jobs of the study: commands that need each other's files, several at once, that can be killed."""

import ctypes
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from engine.io import warn_on_error

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork
PR_SET_PDEATHSIG = 1
SCRIPTS = Path(__file__).parent.parent  # folder of the scripts that jobs run


@dataclass(frozen=True)
class Job:
    """A command and the files that are there when it is done."""

    kind: str  # jobs of one kind take about as long
    targets: tuple[Path, ...]  # the first one gives the job its name and its log
    command: tuple[str, ...]  # a script of this project and its flags
    seconds: float  # estimated, of the whole machine
    needs: tuple["Job", ...] = ()

    @property
    def target(self) -> Path:
        """The file that the job is there for."""
        return self.targets[0]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return all(target.exists() for target in self.targets)

    def blocked(self, failed: Set[Path]) -> bool:
        """Tell whether its target is among the failed ones, or one of what it needs."""
        return not self.done and (
            self.target in failed or any(job.blocked(failed) for job in self.needs)
        )

    @property
    def line(self) -> str:
        """The command as one can paste it."""
        return "python " + shlex.join(self.command)

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        return self.target.parent.name + "/" + self.target.stem


def pending(jobs: Iterable[Job]) -> list[Job]:
    """Return what is to be run, in order: nothing that is done, nor what only that needed."""
    found: dict[Path, Job] = {}
    for job in jobs:
        if not job.done:
            found |= {needed.target: needed for needed in pending(job.needs)}
            found[job.target] = job
    return list(found.values())


def next_ready_job(jobs: Iterable[Job], started: Set[Path]) -> Job | None:
    """Return the first job that is to be run, not started yet, and has what it needs."""
    for job in pending(jobs):
        if job.target not in started and all(needed.done for needed in job.needs):
            return job
    return None


# --- running ---------------------------------------------------------------------------------


class RunningJob:
    """A job that was started: its output goes to <target>.log."""

    def __init__(self, job: Job, at_once: int) -> None:
        """Start the job with its share of the cores; when this program is killed, it is stopped."""
        self.job, self.at_once = job, at_once
        job.target.parent.mkdir(parents=True, exist_ok=True)
        self.started_fresh = not job.target.with_suffix(
            ".ckpt"
        ).exists()  # nothing of an earlier attempt
        self.began = time.perf_counter()
        threads = max(1, torch.get_num_threads() // at_once)
        with open(job.target.with_suffix(".log"), "a", encoding="utf-8") as log:
            print(f"$ {job.line}", file=log, flush=True)
            script = SCRIPTS / job.command[0]
            self.process = subprocess.Popen(
                [sys.executable, script, *job.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=stop_with_parent,
                process_group=0,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.process.poll() is not None

    def succeeded(self) -> bool:
        """Wait, and return whether all targets are there; else what is there is set aside."""
        if self.process.wait() == 0 and self.job.done:
            return True
        if self.job.target.exists():
            os.replace(self.job.target, f"{self.job.target}.partial")
        return False

    def finish(self, out: Path) -> bool:
        """Note the time of a job that is over, clear up, and return whether it succeeded."""
        job, seconds = self.job, time.perf_counter() - self.began
        if not self.succeeded():
            return False
        if self.started_fresh:
            record_duration(out, job, seconds, self.at_once)
        if job.needs:  # nothing goes on from its checkpoint, as from a trunk's
            for suffix in (".ckpt", ".ckpt.previous"):
                job.target.with_suffix(suffix).unlink(missing_ok=True)
        return True


def stop_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the one that started it dies; Linux only."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run(
    next_job: Callable[[Set[Path]], Job | None],
    at_once: int,
    out: Path,
    failed: set[Path],
    bar: tqdm,
    renew: Callable[[Job], None],
) -> None:
    """Run what next_job(targets not to be started) returns, so many at once, until that is None.

    `failed` grows by the targets of jobs that fail; after each other one comes `renew`. However
    this ends, the jobs that then still run are stopped, each with a checkpoint.
    """
    running: list[RunningJob] = []
    try:
        while True:
            over = [each for each in running if each.ended]
            running = [each for each in running if each not in over]
            for each in over:
                if each.finish(out):
                    tqdm.write(f"done: {each.job.line}")
                else:
                    failed.add(each.job.target)
                    log = each.job.target.with_suffix(".log")
                    tqdm.write(f"FAILED: {each.job.line}\n  see {log}")
                bar.update(each.job.seconds)
            while len(running) < at_once:
                job = next_job({each.job.target for each in running} | failed)
                if job is None:
                    break
                running.append(RunningJob(job, at_once))
                bar.set_description(", ".join(each.job.title for each in running))
            for each in over:  # while the next ones run
                if each.job.target not in failed:
                    renew(each.job)
            if not running:
                break
            time.sleep(0.05)
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.succeeded()


# --- times -----------------------------------------------------------------------------------


def record_duration(out: Path, job: Job, seconds: float, at_once: int) -> None:
    """Add a job that was run at one go, beside others, to <out>/jobs.jsonl."""
    line = {"kind": job.kind, "seconds": round(seconds, 1), "at_once": at_once, "command": job.line}
    with warn_on_error("the job's time was not noted"):
        with open(out / "jobs.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)


def job_seconds(out: Path) -> dict[str, float]:
    """Return, by kind, the median time that <out>/jobs.jsonl knows: a share of it if beside others.

    A line that a killed program left half-written counts for nothing.
    """
    found: dict[str, list[float]] = {}
    path = out / "jobs.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else ()
    for line in lines:
        with suppress(ValueError, LookupError, TypeError, ArithmeticError):
            job = json.loads(line)
            found.setdefault(job["kind"], []).append(job["seconds"] / job["at_once"])
    return {kind: statistics.median(seconds) for kind, seconds in found.items()}
