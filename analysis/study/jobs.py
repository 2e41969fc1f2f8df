"""Jobs of the study: commands that need each other's files, and how long they took."""

import json
import shlex
import statistics
from collections.abc import Iterable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


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


def finish(job: Job, seconds: float | None, at_once: int, out: Path) -> None:
    """Add the time of a job that has succeeded to <out>/jobs.jsonl, and remove its checkpoint.

    `at_once` jobs shared the machine. Raises OSError.
    """
    if job.needs:  # nothing continues from it, as from a trunk's
        for suffix in (".ckpt", ".ckpt.previous"):
            job.target.with_suffix(suffix).unlink(missing_ok=True)
    if seconds is not None:
        times = {"seconds": round(seconds, 1), "at_once": at_once}
        with open(out / "jobs.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps({"kind": job.kind, **times, "command": job.line}), file=file)


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
