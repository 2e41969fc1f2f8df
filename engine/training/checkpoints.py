"""Checkpoints: everything a training needs to resume with the same bits, written when it is due."""

import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.system.errors import FileError
from engine.system.io import atomic_write, file_boundary, torch_load, torch_save, warn_on_error

CHECKPOINT_VERSION = 1  # to be raised when older ones can no longer be read
NOT_OURS = "not what this run would have saved"  # of a part of a checkpoint, in an error


@dataclass
class CheckpointClock:
    """Says when the next checkpoint is due; minutes count from `restart`, after one was written."""

    every: int  # epochs between checkpoints
    minutes: float  # between checkpoints inside an epoch
    n_epochs: int  # of the run, whose end is saved, too
    saved_at: float = field(default_factory=lambda: time.monotonic())

    def is_due(self, epoch: int, batch: int) -> bool:
        """Return whether to save with so many epochs done, and so many batches of the next."""
        is_last = batch == 0 and (epoch % self.every == 0 or epoch == self.n_epochs)
        return is_last or time.monotonic() - self.saved_at > 60 * self.minutes

    def restart(self) -> None:
        """Count minutes from now."""
        self.saved_at = time.monotonic()


def backup_path(path: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return path.with_name(path.name + ".previous")


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, with all random states, and keep the one before it.

    One of the two is whole at every moment. Where writing fails, a warning is printed.
    """
    content = {"format": CHECKPOINT_VERSION, "random": get_all_rng_states(), **content}
    with warn_on_error("no checkpoint was written, the last one stays"):
        atomic_write(path, lambda temporary: torch_save(content, temporary), backup_path(path))


def load_checkpoint(path: Path, repair: bool = False) -> dict[str, Any] | None:
    """Read the last whole checkpoint, None where there is none; FileError where none is whole.

    With `repair`, for the run that will write there, a damaged one is renamed: it must not become
    the backup when the next is written.
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
    with file_boundary(path):
        if content["format"] != CHECKPOINT_VERSION:
            raise FileError(f"{path} is not a checkpoint of this version")
    return content


# --- random states ---------------------------------------------------------------------------


def get_all_rng_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global random streams."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_all_rng_states(states: dict[str, Any]) -> None:
    """Restore what get_all_rng_states returned; FileError where it cannot have returned that."""
    with file_boundary("the checkpoint.random:", NOT_OURS):
        kind, keys, position, has_gauss, gauss = states["numpy"]
        n_keys = len(np.random.get_state()[1])
        # what the libraries themselves would take, and trip over later
        if keys.shape != (n_keys,) or not 0 <= int(position) <= n_keys:
            raise ValueError("not a state of NumPy")
        if not isinstance(states["python"][2], float | None):
            raise ValueError("not a state of Python")
        random.setstate(states["python"])
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state((kind, keys, int(position), int(has_gauss), float(gauss)))
        torch.set_rng_state(states["torch"])
        for i, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)  # there may have been more devices
