"""Runs the jobs of a study: several in parallel, each once, until none is left or it is stopped."""

import os
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from analysis.study.executors import Executor, RunningJob
from analysis.study.jobs import Job
from engine.system.progress import LINE_SECONDS

POLL_SECONDS = 0.05  # between looks at whether a job has ended


@dataclass
class JobRunner:
    """Runs jobs with an `executor`, until `next_job` returns none.

    `next_job` takes the targets that must not be started; `on_success` is called with each job that
    succeeds and the seconds that it ran (None where it went on from a checkpoint); the targets of
    others are added to `failed`.
    """

    next_job: Callable[[Set[Path]], Job | None]
    on_success: Callable[[Job, float | None], None]
    executor: Executor
    failed: set[Path]
    bar: tqdm
    running: list[RunningJob] = field(default_factory=list)
    shown_at: float = field(default_factory=time.monotonic)  # when progress was last printed

    def run(self) -> None:
        """Run all jobs. However this ends, those that still run are stopped, with a checkpoint."""
        try:
            while True:
                succeeded = self._finish_ended()
                self._start_ready()
                for job, seconds in succeeded:  # while the next ones run
                    self.on_success(job, seconds)
                if not self.running:
                    break
                self._show_progress()
                time.sleep(POLL_SECONDS)
        finally:
            for each in self.running:
                each.stop()
            for each in self.running:
                self._succeeded(each.job, each.result()[0])

    def _start_ready(self) -> None:
        """Start jobs until enough are running or none is ready."""
        while self.executor.has_room(self.running):
            job = self.next_job({each.job.target for each in self.running} | self.failed)
            if job is None:
                break
            job.target.parent.mkdir(parents=True, exist_ok=True)
            self.running.append(self.executor.start(job, self.running))
            self.bar.set_description(", ".join(each.job.title for each in self.running))

    def _finish_ended(self) -> list[tuple[Job, float | None]]:
        """Return the jobs that have ended well since the last call, with the seconds they ran."""
        ended = [each for each in self.running if each.ended()]
        self.running = [each for each in self.running if each not in ended]
        succeeded: list[tuple[Job, float | None]] = []
        for each in ended:
            result = each.result()
            if self._succeeded(each.job, result.ended_well):
                tqdm.write(f"done: {each.job.line}")
                succeeded.append((each.job, result.seconds))
            else:
                self.failed.add(each.job.target)
                tqdm.write(f"FAILED: {each.job.line}\n  see {each.job.log}")
            self.bar.update(each.job.seconds)
        return succeeded

    def _succeeded(self, job: Job, ended_well: bool) -> bool:
        """Return whether all targets are there; if not, rename a half-made one."""
        if ended_well and job.done:
            return True
        if job.target.exists():
            os.replace(job.target, f"{job.target}.partial")
        return False

    def _show_progress(self) -> None:
        """Print how far each job is, now and then, where there is no terminal for the bar."""
        if self.bar.disable and time.monotonic() - self.shown_at > LINE_SECONDS:
            self.shown_at = time.monotonic()
            for each in self.running:
                if each.job.log.exists():  # it may wait for room
                    log = each.job.log.read_text(encoding="utf-8", errors="replace")
                    for line in log.splitlines()[-1:]:  # none where it has just begun
                        print(f"{each.job.title}: {line}", flush=True)
