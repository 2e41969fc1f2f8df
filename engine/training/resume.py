"""Continuing from a checkpoint, and which settings must be the same for that."""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.step.gradients import DIFFERENCE_STEP
from engine.system.errors import FileError
from engine.system.hardware import choose_precision
from engine.system.io import file_boundary
from engine.training.checkpoints import load_checkpoint
from engine.training.phases import Phase
from engine.training.train_state import TrainProgress, TrainState

# Settings that do not change the weights; all others must stay as they are on --resume.
MAY_CHANGE_ON_RESUME = {
    "run_name", "save_file", "save_preregularized_model", "watch", "watch_freq", "data_dir",
    "no_test_penalty", "track", "checkpoint_every", "checkpoint_minutes", "wandb_project",
    "wandb_entity", "wandb_group", "wandb_tags", "wandb_notes", "log_model", "workers",
    "cache_images", "cuda_graph",
}  # fmt: skip
# Settings of --init_from's checkpoint that the new run must share: they shaped what is in it.
# `check_init_from` has those that do so from an epoch on.
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
    "penalty_step": DIFFERENCE_STEP, "winograd": "off", "step": "eager",
}  # fmt: skip


def find_checkpoint(
    args: argparse.Namespace, out: Path, schedule: Iterable[str]
) -> tuple[dict[str, Any] | None, bool]:
    """Return the checkpoint to continue from, None without one, and whether it is this run's own.

    `schedule` are the settings that the learning-rate schedule depends on: n_epochs may change on
    --resume where it is not among them. After --init_from the run is the same, bit for bit, as if
    it had trained those epochs itself with that run's kernels, processes and penalty. Raises
    FileError where the checkpoint is of a run with other settings.
    """
    if args.resume:
        checkpoint = load_checkpoint(Path(f"{out}.ckpt"), repair=True)
        if checkpoint:
            free = {"n_epochs", "gamma", "milestones"} - set(schedule)
            names = vars(args).keys() - {"resume", "allow_changed_settings"} - free
            check_settings(args, checkpoint, f"{out}.ckpt", names)
            return checkpoint, True
        print(f"{out}.ckpt: no checkpoint yet, this is the beginning")
    if not args.init_from:
        return None, False
    checkpoint = load_checkpoint(Path(args.init_from))
    if checkpoint is None:
        raise FileError(f"--init_from {args.init_from}: there is no such checkpoint")
    check_settings(args, checkpoint, args.init_from, MUST_MATCH_INIT_FROM | set(schedule))
    return {**checkpoint, "run_id": None}, False


def settled_precision(precision: str, device: str, checkpoint: dict[str, Any] | None) -> str:
    """Return what "auto" means: the checkpoint's precision, or what the device is fast at."""
    return choose_precision(settled("precision", precision, checkpoint), device)


def settled(name: str, value: str, checkpoint: dict[str, Any] | None) -> str:
    """Return the value of a setting, of an "auto" the checkpoint's where there is one."""
    if value == AUTO and checkpoint:
        return read_settings(checkpoint).get(name, AUTO)
    return value


def read_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint under today's names."""
    saved = {LEGACY_NAMES.get(name, name): value for name, value in checkpoint["settings"].items()}
    return {**LEGACY_DEFAULTS, **saved}


def check_settings(
    args: argparse.Namespace, checkpoint: dict[str, Any], path: str, names: Iterable[str]
) -> None:
    """Print which of the settings differ from the checkpoint's; FileError where that matters."""
    current = vars(args)
    with file_boundary(path):
        json.dumps(checkpoint["settings"])  # raises unless they are plain values, to compare
        saved = read_settings(checkpoint)
        if not re.fullmatch("[^\\W_]+", checkpoint["run_id"]):
            raise ValueError("a run_id that is none")
        if not (isinstance(checkpoint["seconds"], float) and math.isfinite(checkpoint["seconds"])):
            raise ValueError("seconds that are none")
    matter = []
    for name in sorted(names):
        now = current[name]
        before = saved.get(name)
        if (now or None) != (before or None) and AUTO not in (now, before):
            print(f"--{name} is {now!r}, was {before!r} in {path}", file=sys.stderr)
            if name not in MAY_CHANGE_ON_RESUME:
                matter.append(f"--{name}")
    if matter and not args.allow_changed_settings:
        raise FileError(
            f"{path} is of a run with other settings ({', '.join(matter)}): give it those, or "
            "--allow_changed_settings"
        )


def continue_from(
    checkpoint: dict[str, Any],
    state: TrainState,
    args: argparse.Namespace,
    phases: Sequence[Phase],
    n_batches: int,
    is_own: bool,
) -> None:
    """Restore the state from the checkpoint, and print where it continues; FileError if unfit."""
    if not is_own and read_settings(checkpoint).get("ema") != args.ema:
        checkpoint = {key: value for key, value in checkpoint.items() if key != "average"}
    state.load_state_dict(checkpoint, args.n_epochs, n_batches)
    progress = state.progress
    if not is_own:
        check_init_from(progress, phases, args, read_settings(checkpoint))
    for p in phases if is_own else ():
        if p.save_as and p.start < progress.epochs_started and not p.save_as.exists():
            print(f"{p.save_as} cannot be saved any more: that epoch has begun")
    if state.average is not None and "average" not in checkpoint:
        print("the average of the weights begins here: the checkpoint has none with this --ema")
    if progress.epoch == args.n_epochs:
        print(f"all {args.n_epochs} epochs are done: nothing left to train")
    else:
        how = "resuming" if is_own else f"continuing {args.init_from}"
        print(f"{how} at epoch {progress.epoch}, batch {progress.batch}")


def check_init_from(
    progress: TrainProgress,
    phases: Sequence[Phase],
    args: argparse.Namespace,
    settings: Mapping[str, Any],
) -> None:
    """Raise FileError where the checkpoint of --init_from has passed what is still to be done.

    `settings` are those of its training.
    """
    n_started = progress.epochs_started
    where = f"{args.init_from} has {n_started} epochs {'begun' if progress.batch else 'done'}"
    if progress.epoch >= args.n_epochs:
        raise FileError(f"{where}: --n_epochs {args.n_epochs} leaves nothing to train")
    for p in phases:
        if p.regularizer and p.start < n_started:
            raise FileError(f"{where}: a regularizer cannot begin at epoch {p.start}")
    if settings.get("qat_bits") and settings["qat_from"] < n_started:
        raise FileError(
            f"{where}, with --qat_bits {settings['qat_bits']} from epoch {settings['qat_from']} "
            "on: its weights are of a quantized network; --resume continues that run"
        )
    if args.qat_bits and args.qat_from < n_started:
        raise FileError(f"{where}: --qat_from {args.qat_from} is over")
    before, now = settings.get("freeze_bn_from"), args.freeze_bn_from
    if min(before or n_started, n_started) != min(now or n_started, n_started):
        raise FileError(f"{where}, with --freeze_bn_from {before}: it cannot be {now} any more")
