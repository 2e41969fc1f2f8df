"""Progress: a bar on a terminal, elsewhere a line now and then."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from tqdm import tqdm

from engine.system import distributed

BAR_SECONDS = 0.5  # between looks at the numbers on a terminal; a look waits for the device
LINE_SECONDS = 30.0  # between lines where there is no terminal
SYNC_INTERVAL = 20  # batches between looks in a run of several processes


class _Display(AbstractContextManager):
    """Context manager with a bar, which rank 0 shows where there is a terminal."""

    def __init__(self, **bar: Any) -> None:
        hidden = None if distributed.get_rank() == 0 else True  # None: where there is no terminal
        self.bar = tqdm(disable=hidden, leave=False, **bar)
        self.started_at = self.shown_at = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.shown_at = math.inf  # what is counted later is no part of it

    def _print_when_due(self, line: Callable[[float], str]) -> None:
        """Without a terminal, print `line(seconds since the start)` now and then."""
        now = time.monotonic()
        is_printed = self.bar.disable and distributed.get_rank() == 0
        if is_printed and now - self.shown_at > LINE_SECONDS:
            self.shown_at = now
            print(line(now - self.started_at), flush=True)


class StepDisplay(_Display):
    """Context manager that shows how many of `total` steps are done; rank 0 shows."""

    def __init__(self, total: int, unit: str) -> None:
        super().__init__(total=total, unit=unit)
        self.total = total
        self.unit = unit
        self.n_done = 0
        self.name = ""

    def describe(self, name: str) -> None:
        """Name what the next steps are of."""
        self.name = name
        self.bar.set_description(name)

    def step(self) -> None:
        """Count a step."""
        self.n_done += 1
        self.bar.update()
        self._print_when_due(self._line)

    def _line(self, seconds: float) -> str:
        left = seconds / self.n_done * (self.total - self.n_done)
        return f"{self.name}: {self.unit} {self.n_done} of {self.total}, {left:.0f} s left"


class EpochDisplay(_Display):
    """Context manager that shows how far an epoch of so many batches and images is; rank 0 shows.

    `progress` has the `epoch` and the `batch`, which is not 0 where an earlier process began it.
    """

    def __init__(self, progress: Any, n_batches: int, n_images: int) -> None:
        name = f"epoch {progress.epoch}"
        super().__init__(total=n_batches, initial=progress.batch, desc=name, unit="batch")
        self.progress = progress
        self.n_batches = n_batches
        self.n_images = n_images
        self.first_batch = progress.batch

    def is_due(self) -> bool:
        """Tell whether to look at the numbers; all processes look after the same batch."""
        if distributed.get_world_size() > 1:
            return self.progress.batch % SYNC_INTERVAL == 0
        interval = LINE_SECONDS if self.bar.disable else BAR_SECONDS
        return time.monotonic() - self.shown_at > interval

    def show(self, means: dict[str, float]) -> None:
        """Show the epoch's means so far."""
        self.bar.set_postfix(means, refresh=False)
        self._print_when_due(partial(self._line, means))
        if not self.bar.disable:
            self.shown_at = time.monotonic()

    def _line(self, means: dict[str, float], seconds: float) -> str:
        n_done = self.progress.batch
        batches_per_second = (n_done - self.first_batch) / seconds
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        images_per_second = batches_per_second * self.n_images / self.n_batches
        return (
            f"epoch {self.progress.epoch}  batch {n_done}/{self.n_batches}  {numbers}  "
            f"{images_per_second:.0f} images/s  "
            f"{(self.n_batches - n_done) / batches_per_second:.0f} s left in this epoch"
        )


def epoch_line(entry: dict[str, Any], penalty: str | None) -> str:
    """Return an epoch's history entry as a line of text, with the penalty of that name."""
    shown = f"  {penalty} {entry[f'train_{penalty}']:.4g}" if penalty else ""
    return (
        f"epoch {entry['epoch']}  lr {entry['lr']:.4g}"
        f"  train loss {entry['train_loss']:.4f}{shown}  accuracy {entry['train_accuracy']:.2%}"
        f"  test loss {entry['test_loss']:.4f}  accuracy {entry['test_accuracy']:.2%}"
        f"  {entry['images_per_second']:.0f} images/s  {entry['epoch_seconds']:.1f} s"
    )
