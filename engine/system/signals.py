"""Stopping on a signal: at once, or after the batch with a checkpoint."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

from engine.system import distributed

SIGNAL_SYNC_INTERVAL = 8  # batches after which the processes tell each other about signals
STOP_SIGNALS = [  # Windows has no SIGHUP
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]


class StoppedBySignal(SystemExit):
    """The run was asked to stop by a signal. Exits with 128 + signal."""


class GracefulShutdown:
    """Context manager in which a stop signal raises StoppedBySignal: at once, or when deferred."""

    signal: int | None = None  # the last one that came
    deferring = False

    def __enter__(self) -> Self:
        """Take over the stop signals, except ignored ones, as under nohup."""
        numbers = [each for each in STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
        self._handlers_before = {each: signal.signal(each, self._on_signal) for each in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager in which a signal only sets `signal`; a second SIGINT stops at once."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.signal:
            raise StoppedBySignal(128 + self.signal)

    def requested(self, batch: int) -> int:
        """Return the number of the signal that asks the run to stop here, 0 for none.

        Several processes compare theirs now and then, to stop after the same one of an epoch's
        batches; `batch` 0 is the end of an epoch, where they always do.
        """
        number = self.signal or 0  # one that comes from now on waits
        if distributed.get_world_size() > 1:
            is_compared = batch % SIGNAL_SYNC_INTERVAL == 0
            number = distributed.all_reduce_max(number) if is_compared else 0
        return number

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if not self.deferring:
            raise StoppedBySignal(128 + number)
        with suppress(OSError):  # the terminal may be what is gone
            os.write(2, b"\nfinishing this batch and writing a checkpoint; Ctrl-C stops at once\n")
