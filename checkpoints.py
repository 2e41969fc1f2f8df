"""Checkpoints: all that a training needs to go on, bit for bit, and signals that wait for them."""

import argparse
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, UnionType
from typing import Any, Self

import numpy as np
import torch

import distributed
import utils
from files import FileError, told, torch_load, torch_save, write_file

ASK_EVERY = 8  # batches between questions of the processes to each other
FORMAT = 1  # of a checkpoint; to be raised when older ones can no longer be read


def previous(path: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return path.with_name(path.name + ".previous")


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, with all random states, and keep the one before it.

    One of the two is whole at every moment. Raises OSError where it cannot be written.
    """
    content = {"format": FORMAT, "random": random_states(), **content}
    write_file(path, lambda temporary: torch_save(content, temporary), keep=previous(path))


def load_checkpoint(path: Path, repair: bool = False) -> dict[str, Any] | None:
    """Read the last whole checkpoint, None where there is none.

    With `repair`, for the run that will write there, a damaged one is renamed: it must not be the
    one that is kept when the next is written. Raises FileError where there are checkpoints and
    none is whole.
    """
    problems = []
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            content = torch_load(candidate)
            if not (isinstance(content, dict) and "format" in content):
                raise FileError(f"{candidate} is not a checkpoint: weights alone, a .pt, are none")
            check(content, {"format": int}, str(candidate))
            if content["format"] != FORMAT:
                raise FileError(f"{candidate} is not a checkpoint of this version")
        except FileError as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"{problems[0]}; the one before it is taken", file=sys.stderr)
            if repair:
                os.replace(path, path.with_name(path.name + ".damaged"))
        return content
    if problems:
        raise FileError("; ".join(problems))
    return None


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global streams."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what random_states returned; FileError where it cannot have."""
    now = random_states()
    check(states, {**now, "python": (int, tuple, object), "cuda": [object]}, "random")
    kind, keys, position, *rest = states["numpy"]
    try:
        if not (0 <= position <= len(keys) and isinstance(states["python"][2], float | None)):
            raise ValueError("not a state of NumPy or Python")
        random.setstate(states["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))
        torch.set_rng_state(states["torch"])
        for i, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)  # there may have been more
    except Exception as error:  # each library raises its own kinds
        raise FileError(f"random: {str(error).splitlines()[0]}") from error


def check(value: Any, pattern: Any, where: str) -> None:
    """Raise FileError, naming the place, unless the value fits the pattern.

    A pattern is a type; a tensor, for its dtype and shape; {str: pattern} for printable keys;
    another dict, for these keys at least; a tuple of patterns; [pattern] for a list of any length.
    Anything else stands for its own type.
    """
    items: list[tuple[Any, Any, str]] = []  # what is inside, its patterns, and where
    if isinstance(pattern, torch.Tensor):
        fits = type(value) is torch.Tensor and value.layout == torch.strided
        fits = fits and not value.is_meta and value.dtype == pattern.dtype
        fits = fits and value.shape == pattern.shape
    elif isinstance(pattern, dict):
        fits = isinstance(value, dict)
        if fits and str in pattern:
            fits = all(isinstance(key, str) and key.isprintable() for key in value)
            items = [(v, pattern[str], where) for v in value.values()]
        elif fits and (fits := pattern.keys() <= value.keys()):
            items = [(value[key], p, f"{where}.{key}") for key, p in pattern.items()]
    elif isinstance(pattern, list):
        fits = isinstance(value, list)
        items = [(v, pattern[0], where) for v in value] if fits else []
    elif isinstance(pattern, tuple):
        fits = isinstance(value, tuple) and len(value) == len(pattern)
        items = [(v, p, where) for v, p in zip(value, pattern, strict=True)] if fits else []
    else:
        kind = pattern if isinstance(pattern, type | UnionType) else type(pattern)
        fits = isinstance(value, kind) and not (isinstance(value, int) and abs(value) >= 2**63)
    if not fits:
        raise FileError(f"{where}: not what this run would have saved")
    for item in items:
        check(*item)


# --- which settings go with it ----------------------------------------------------------------


# Settings that leave the weights as they are; the others may not change under a checkpoint.
HARMLESS = {
    "run_name", "save_file", "save_preregularized_model", "watch", "watch_freq", "data_dir",
    "no_test_penalty", "track", "checkpoint_every", "checkpoint_minutes", "wandb_project",
    "wandb_entity",
}


OLDER = {"sync_bn": True}  # settings that older checkpoints do not have, and what they did


def resumable(args: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, None where there is none; FileError if it differs."""
    checkpoint = load_checkpoint(Path(f"{out}.ckpt"), repair=True)
    if checkpoint is None:
        print(f"{out}.ckpt: no checkpoint yet, this is the beginning")
        return None
    compare(args, checkpoint, f"{out}.ckpt", vars(args).keys() - {"resume", "override"})
    return checkpoint


# Settings that --init_from takes over: in the checkpoint itself, or of what it was trained on.
INHERITED = {
    "model", "criterion", "lr", "scheduler", "gamma", "momentum", "weight_decay", "dataset",
    "train_subset", "holdout", "batch_size", "seed", "precision",
}


def inherited(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the checkpoint of --init_from for a run of its own; FileError where it does not fit.

    The run is then the same, bit for bit, as if it had trained those epochs itself, in the way of
    that run: with its kernels and processes, and what it penalized, if anything.
    """
    if not args.init_from:
        return None
    checkpoint = load_checkpoint(Path(args.init_from))
    if checkpoint is None:
        raise FileError(f"--init_from {args.init_from}: there is no such checkpoint")
    schedule = {"milestones"} if args.scheduler == "multistep" else set()
    if schedule and args.milestones in utils.MILESTONES:  # else epochs, whatever the length
        schedule |= {"n_epochs"}
    compare(args, checkpoint, args.init_from, INHERITED | schedule)
    return {**checkpoint, "run_id": None}


def compare(
    args: argparse.Namespace, checkpoint: dict[str, Any], path: str, keys: Iterable[str]
) -> None:
    """Say which of the settings differ from the checkpoint's; FileError where that matters."""
    check(checkpoint, {"settings": {str: object}, "run_id": str, "seconds": float}, path)
    now, then = vars(args), {**OLDER, **checkpoint["settings"]}
    values = sum(([v] if not isinstance(v, list) else v for v in then.values()), [])
    check(values, [int | float | str | None], f"{path}: settings")
    if not (checkpoint["run_id"].isalnum() and math.isfinite(checkpoint["seconds"])):
        raise FileError(f"{path}: run_id or seconds is not what a run would have saved")
    changed = [key for key in keys if (now[key] or None) != (then.get(key) or None)]
    for key in sorted(changed):
        print(f"--{key} is {now[key]!r}, was {then.get(key)!r} in {path}", file=sys.stderr)
    if set(changed) - HARMLESS and not args.override:
        names = ", ".join(f"--{key}" for key in sorted(set(changed) - HARMLESS))
        raise FileError(
            f"{path} is of a run with other settings ({names}): give it those, or --override"
        )


# --- signals ---------------------------------------------------------------------------------


class Stopped(SystemExit):
    """The run was asked to stop by a signal. Exits with 128 + signal."""


class StopRequest:
    """Within it, SIGTERM, SIGINT and SIGHUP raise Stopped: at once, or where deferred() says."""

    signal: int | None = None
    waits = False

    def __enter__(self) -> Self:
        """Take over the signals, but for those that are ignored, as under nohup."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._before = {
            number: signal.signal(number, self._note)
            for number in numbers if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, a signal only sets `signal`, for check(); a second SIGINT stops at once."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        self.check()

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.signal:
            raise Stopped(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if not self.waits:
            raise Stopped(128 + number)
        with suppress(OSError):  # the terminal may be what is gone
            os.write(2, b"\nfinishing this batch and writing a checkpoint; Ctrl-C stops at once\n")


class Checkpointer:
    """Saves when it is time to, and stops the run when a signal asked for it.

    Args:
        path: of the checkpoint.
        snapshot: returns what to save; raises where that is not worth keeping.
        every: epochs between checkpoints.
        minutes: between checkpoints inside an epoch.
        stop: where signals are noted.
    """

    def __init__(
        self, path: Path, snapshot: Callable[[], dict[str, Any]], every: int, minutes: float,
        stop: StopRequest,
    ) -> None:
        """Start the clock."""
        self.path, self.snapshot, self.every, self.minutes = path, snapshot, every, minutes
        self.stop, self.saved_at, self.n_calls = stop, time.monotonic(), 0

    def after_batch(self) -> None:
        """Save if the minutes are over; save and raise Stopped if a signal came.

        Several processes ask each other now and then, to stop after the same batch.
        """
        self.n_calls += 1
        number = self.stop.signal or 0  # one that comes from now on waits
        if distributed.world_size() > 1:
            number = distributed.largest(number) if self.n_calls % ASK_EVERY == 0 else 0
        if number or time.monotonic() - self.saved_at > 60 * self.minutes:
            self.save()
        if number:
            raise Stopped(128 + number)

    def after_epoch(self, n_done: int, is_last: bool) -> None:
        """Save if n_done epochs are a multiple of `every` or all; then as after a batch."""
        if (n_done % self.every == 0 or is_last) and not self.stop.signal:
            self.save()
        self.after_batch()

    def save(self) -> None:
        """Write the checkpoint; where that fails, say so and keep the one there is."""
        content = self.snapshot()
        with told("no checkpoint was written, the last one stays"):
            save_checkpoint(content, self.path)
        self.saved_at = time.monotonic()
