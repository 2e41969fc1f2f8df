"""Phases of a training, each with its own penalty, and the whole plan in words."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.networks.winograd import may_be_used_by
from engine.system import distributed
from engine.system.hardware import MEMORY_FORMATS
from engine.training.learned_steps import LearnedSteps


@dataclass(frozen=True)
class Phase:
    """From epoch `start` on (the first is 0), train with `regularizer`; None is the loss alone.

    With `save_as`, the weights are written there just before the phase begins. With a `warmup`, the
    penalty's factor rises linearly, batch by batch, from 0 to 1 over that many epochs. The penalty
    is part of every `every`-th batch of an epoch, the first among them, and counts `every` times.
    """

    start: int
    regularizer: nn.Module | None = None
    save_as: Path | None = None
    warmup: float = 0.0
    every: int = 1

    def penalty_scale(self, epochs: float) -> float:
        """Return the factor of the penalty after that many epochs of the whole run."""
        return min(1.0, (epochs - self.start) / self.warmup) if self.warmup else 1.0


def phase_at(phases: Sequence[Phase], epoch: int) -> Phase:
    """Return the phase that the epoch belongs to; before the first one there is no regularizer."""
    return [Phase(0), *(p for p in phases if p.start <= epoch)][-1]


def describe_plan(
    args: argparse.Namespace,
    phases: Sequence[Phase],
    steps: LearnedSteps | None,
    dtype: torch.dtype,
    compiled: bool,
    net: nn.Module,
) -> str:
    """Return what will be done, as text: "no regularizer; from epoch 5: L2Grad λ=0.01; …"."""
    parts = []
    for p in phases:
        label = p.regularizer.label if p.regularizer else "no regularizer"
        parts.append(f"from epoch {p.start}: {label}" if p.start else label)
    if args.lmbda_warmup:
        parts.append(f"λ rises from 0 over the first {args.lmbda_warmup:g} epochs of a phase")
    if args.penalty_every > 1:
        parts.append(f"the penalty in one of {args.penalty_every} batches")
    if args.penalty_gradient == "difference":
        parts.append(f"its gradient by a difference, step {args.penalty_step:g}")
    if args.freeze_bn_from:
        parts.append(f"batch norms keep their statistics from epoch {args.freeze_bn_from} on")
    if steps is not None:
        inputs = f"inputs of {steps.act_bits}" if steps.act_bits else "inputs in full precision"
        ends = ", 8 in the first and the last layer" if args.keep_first_last else ""
        parts.append(
            f"from epoch {steps.first_epoch} quantized with learned steps: weights of "
            f"{steps.weight_bits} bits, {inputs}{ends}"
        )
    if args.label_smoothing:
        parts.append(f"labels smoothed by {args.label_smoothing:g}")
    if args.ema is not None:
        parts.append(f"weights averaged with decay {args.ema:g}")
    precision = str(dtype).removeprefix("torch.")
    kernels = "compiled" if compiled else "eager"
    if compiled and args.step == "compiled":
        parts.append("a step compiled as one function")
    parts.append(f"{precision} convolutions and {kernels} kernels on {args.device}")
    if may_be_used_by(net, dtype, MEMORY_FORMATS[args.memory_format]):
        parts.append("wide convolutions by Winograd's algorithm")
    if args.holdout:
        parts.append(f"tested on {args.holdout} training images, held out")
    if (n := distributed.get_world_size()) > 1:
        images = "the whole batch" if args.sync_bn else "each one's share"
        parts.append(f"{n} processes, batch-norm statistics of {images}")
    return "; ".join(parts)
