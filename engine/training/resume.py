"""Which settings must be the same for a run to continue from a checkpoint."""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.step.gradients import DIFFERENCE_STEP
from engine.system.errors import FileError
from engine.training.checkpoints import load_checkpoint, validate_structure

# Settings that do not change the weights; all others must stay as they are on --resume.
MAY_CHANGE_ON_RESUME = {
    "run_name", "save_file", "save_preregularized_model", "watch", "watch_freq", "data_dir",
    "no_test_penalty", "track", "checkpoint_every", "checkpoint_minutes", "wandb_project",
    "wandb_entity", "wandb_group", "wandb_tags", "wandb_notes", "log_model", "workers",
    "cache_images", "cuda_graph",
}  # fmt: skip
# Settings of --init_from's checkpoint that the new run must share: they shaped what is in it.
MUST_MATCH_INIT_FROM = {
    "model", "width", "criterion", "label_smoothing", "lr", "scheduler", "momentum",
    "weight_decay", "dataset", "train_subset", "image_size", "holdout", "batch_size", "seed",
    "precision",
}  # fmt: skip
AUTO = "auto"  # a setting that the hardware decides, or the checkpoint
LEGACY_NAMES = {"hold_step": "detach_step", "override": "allow_changed_settings"}
LEGACY_DEFAULTS = {  # of settings that older checkpoints do not have
    "sync_bn": True, "width": 1.0, "memory_format": "channels_last", "image_size": 224,
    "workers": 2, "cache_images": 4.0, "penalty_every": 1, "penalty_gradient": "exact",
    "penalty_step": DIFFERENCE_STEP,
}  # fmt: skip


def load_for_resume(
    args: argparse.Namespace, out: Path, schedule: Iterable[str]
) -> dict[str, Any] | None:
    """Return this run's checkpoint, None where there is none; FileError if settings differ.

    `schedule` are the settings that the learning-rate schedule depends on: n_epochs may change
    where it is not among them.
    """
    checkpoint = load_checkpoint(Path(f"{out}.ckpt"), repair=True)
    if checkpoint is None:
        print(f"{out}.ckpt: no checkpoint yet, this is the beginning")
        return None
    names = vars(args).keys() - {"resume", "allow_changed_settings"}
    free = {"n_epochs", "gamma", "milestones"} - set(schedule)
    check_settings(args, checkpoint, f"{out}.ckpt", names - free)
    return checkpoint


def load_init_from(args: argparse.Namespace, schedule: Iterable[str]) -> dict[str, Any] | None:
    """Return the checkpoint of --init_from; FileError where it does not fit.

    The run is then the same, bit for bit, as if it had trained those epochs itself with that run's
    kernels, processes and penalty. `schedule` are the settings that the learning-rate schedule
    depends on, besides those in MUST_MATCH_INIT_FROM.
    """
    if not args.init_from:
        return None
    checkpoint = load_checkpoint(Path(args.init_from))
    if checkpoint is None:
        raise FileError(f"--init_from {args.init_from}: there is no such checkpoint")
    check_settings(args, checkpoint, args.init_from, MUST_MATCH_INIT_FROM | set(schedule))
    return {**checkpoint, "run_id": None}


def read_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint under today's names."""
    saved = {LEGACY_NAMES.get(name, name): value for name, value in checkpoint["settings"].items()}
    return {**LEGACY_DEFAULTS, **saved}


def check_settings(
    args: argparse.Namespace, checkpoint: dict[str, Any], path: str, names: Iterable[str]
) -> None:
    """Print which of the settings differ from the checkpoint's; FileError where that matters."""
    validate_structure(checkpoint, {"settings": dict, "run_id": str, "seconds": float}, path)
    current, saved = vars(args), read_settings(checkpoint)
    for name, value in saved.items():
        values = value if isinstance(value, list) else [value]
        validate_structure([name], [str], f"{path}: settings")
        validate_structure(values, [int | float | str | None], f"{path}: settings")
    if not (checkpoint["run_id"].isalnum() and math.isfinite(checkpoint["seconds"])):
        raise FileError(f"{path}: run_id or seconds is not what a run would have saved")
    changed = sorted(
        name
        for name in names
        if (current[name] or None) != (saved.get(name) or None)
        and AUTO not in (current[name], saved.get(name))
    )
    for name in changed:
        print(f"--{name} is {current[name]!r}, was {saved.get(name)!r} in {path}", file=sys.stderr)
    matter = [f"--{name}" for name in changed if name not in MAY_CHANGE_ON_RESUME]
    if matter and not args.allow_changed_settings:
        raise FileError(
            f"{path} is of a run with other settings ({', '.join(matter)}): give it those, or "
            "--allow_changed_settings"
        )
