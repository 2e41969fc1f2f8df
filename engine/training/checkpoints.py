"""Checkpoints: everything a training needs to resume with the same bits, written when it is due."""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch

from engine.system import distributed
from engine.system.errors import FileError
from engine.system.io import atomic_write, torch_load, torch_save, warn_on_error
from engine.system.signals import GracefulShutdown, StoppedBySignal

SIGNAL_SYNC_INTERVAL = 8  # batches after which the processes tell each other about signals
CHECKPOINT_VERSION = 1  # to be raised when older ones can no longer be read


def backup_path(path: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return path.with_name(path.name + ".previous")


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, with all random states, and keep the one before it.

    One of the two is whole at every moment. Raises OSError where it cannot be written.
    """
    content = {"format": CHECKPOINT_VERSION, "random": get_rng_state(), **content}
    atomic_write(path, lambda temporary: torch_save(content, temporary), backup=backup_path(path))


def load_checkpoint(path: Path, repair: bool = False) -> dict[str, Any] | None:
    """Read the last whole checkpoint, None where there is none.

    With `repair`, for the run that will write there, a damaged one is renamed: it must not become
    the backup when the next is written. Raises FileError where there are checkpoints and none is
    whole.
    """
    problems = []
    for candidate in filter(Path.exists, (path, backup_path(path))):
        try:
            content = _read_checkpoint(candidate)
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


def _read_checkpoint(path: Path) -> dict[str, Any]:
    content = torch_load(path)
    if not (isinstance(content, dict) and "format" in content):
        raise FileError(
            f"{path} is not a checkpoint (.ckpt); weights alone (.pt) go with --init_weights"
        )
    validate_structure(content, {"format": int}, str(path))
    if content["format"] != CHECKPOINT_VERSION:
        raise FileError(f"{path} is not a checkpoint of this version")
    return content


# --- random states ---------------------------------------------------------------------------


def get_rng_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global random streams."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(states: dict[str, Any]) -> None:
    """Restore what get_rng_state returned; FileError where it cannot have returned that."""
    template = {**get_rng_state(), "python": (int, tuple, object), "cuda": [object]}
    validate_structure(states, template, "random")
    kind, keys, position, *rest = states["numpy"]
    try:
        if not (0 <= position <= len(keys) and isinstance(states["python"][2], float | None)):
            raise ValueError("not a state of NumPy or Python")
        random.setstate(states["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))
        torch.set_rng_state(states["torch"])
        for i, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)  # there may have been more devices
    except Exception as error:  # each library raises its own kinds
        raise FileError(f"random: {str(error).splitlines()[0]}") from error


# --- content ---------------------------------------------------------------------------------


def validate_structure(value: Any, template: Any, where: str) -> None:
    """Raise FileError, naming the place, unless value has the template's types, keys and shapes.

    In a template a list has one item, which stands for any number; a dict has the keys that there
    must be at least; a type stands for its instances, anything else for its own type.
    """
    if isinstance(template, torch.Tensor):
        fits = type(value) is torch.Tensor and not value.is_meta
        fits = fits and (value.layout, value.dtype, value.shape) == (
            torch.strided,
            template.dtype,
            template.shape,
        )
    elif isinstance(template, type | UnionType):
        fits = isinstance(value, template) and not (isinstance(value, int) and abs(value) >= 2**63)
    else:
        fits = isinstance(value, type(template))
        if fits and isinstance(template, dict):
            fits = template.keys() <= value.keys()
        elif fits and isinstance(template, tuple):
            fits = len(template) == len(value)
        elif fits and not isinstance(template, list):
            return validate_structure(value, type(template), where)
    if not fits:
        raise FileError(f"{where}: not what this run would have saved")
    if isinstance(template, dict):
        for key in template:
            validate_structure(value[key], template[key], f"{where}.{key}")
    elif isinstance(template, tuple | list):
        items = template if isinstance(template, tuple) else template * len(value)
        for item, item_template in zip(value, items, strict=True):
            validate_structure(item, item_template, where)


# --- when ------------------------------------------------------------------------------------


class Checkpointer:
    """Saves when it is due, and stops the run where a signal asked for that.

    Args:
        path: file that is written.
        get_content: returns what to save; raises where that is not worth saving.
        every: epochs between checkpoints.
        minutes: between checkpoints inside an epoch.
        shutdown: where signals are noted.
    """

    def __init__(
        self,
        path: Path,
        get_content: Callable[[], dict[str, Any]],
        every: int,
        minutes: float,
        shutdown: GracefulShutdown,
    ) -> None:
        """Start the clock."""
        self.path, self.get_content, self.every, self.minutes = path, get_content, every, minutes
        self.shutdown, self.saved_at, self.n_batches = shutdown, time.monotonic(), 0

    def after_batch(self) -> None:
        """Save if the minutes are over; save and raise StoppedBySignal if a signal came."""
        self.n_batches += 1
        is_due = time.monotonic() - self.saved_at > 60 * self.minutes
        self._save_or_stop(is_due, sync_signals=self.n_batches % SIGNAL_SYNC_INTERVAL == 0)

    def after_epoch(self, n_done: int, is_last: bool) -> None:
        """Save if n_done epochs are a multiple of `every` or all; stop as after a batch."""
        is_due = n_done % self.every == 0 or is_last
        is_due = is_due or time.monotonic() - self.saved_at > 60 * self.minutes
        self._save_or_stop(is_due, sync_signals=True)

    def _save_or_stop(self, is_due: bool, sync_signals: bool) -> None:
        """Several processes compare signals now and then, to stop after the same batch."""
        number = self.shutdown.signal or 0  # one that comes from now on waits
        if distributed.get_world_size() > 1:
            number = distributed.all_reduce_max(number) if sync_signals else 0
        if number or is_due:
            self.save()
        if number:
            raise StoppedBySignal(128 + number)

    def save(self) -> None:
        """Write the checkpoint; where that fails, print a warning and keep the last one."""
        content = self.get_content()
        with warn_on_error("no checkpoint was written, the last one stays"):
            save_checkpoint(content, self.path)
        self.saved_at = time.monotonic()
