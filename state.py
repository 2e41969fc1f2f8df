"""Where a training is: what it has done and measured, and all that a checkpoint of it holds."""

import argparse
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

import files
import utils
from checkpoints import check, set_random_states
from regularizers import Regularizer


class NotFiniteError(RuntimeError):
    """A loss, penalty or gradient became NaN or infinite; the message says which and when."""


@dataclass
class State:
    """Where a training is: the batch to do next, and what has been measured."""

    epoch: int = 0
    batch: int = 0
    rows: list[Tensor] = field(default_factory=list)  # one a batch of this epoch, see measure()
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry a finished epoch
    epoch_seconds: float = 0.0  # spent in this epoch so far

    @property
    def n_begun(self) -> int:
        """How many epochs have begun."""
        return self.epoch + (self.batch > 0)


def measure(net: nn.Module, n: int, loss: Tensor, penalty: Tensor, n_correct: Tensor) -> Tensor:
    """Return one batch's row, without waiting for the device.

    Columns: batch size, loss, penalty, number correct, and the norm of each parameter's gradient.
    """
    norms = [torch.linalg.vector_norm(p.grad) for p in net.parameters()]
    return torch.stack([torch.full_like(loss, n), loss, penalty, n_correct.to(loss.dtype), *norms])


def summarize(net: nn.Module, regularizer: Regularizer | None, state: State) -> dict[str, float]:
    """Return the epoch's means so far; NotFiniteError names the batch and term that broke."""
    rows = torch.stack(state.rows).double().cpu()
    if not rows.isfinite().all():
        batch, column = (~rows.isfinite()).nonzero()[0].tolist()
        terms = ["", "loss", f"penalty {regularizer.name}" if regularizer else "penalty", ""]
        terms += [f"gradient of {name}" for name, _ in net.named_parameters()]
        raise NotFiniteError(
            f"epoch {state.epoch}, batch {batch}: the {terms[column]} is {rows[batch, column]}; "
            "a smaller --lr or --lmbda, or a later --first_regularized_epoch, may help"
        )
    n = rows[:, 0]
    values = {"loss": (n * rows[:, 1]).sum() / n.sum(), "accuracy": rows[:, 3].sum() / n.sum()}
    if regularizer:
        values[regularizer.name] = (n * rows[:, 2]).sum() / n.sum()
    return {key: value.item() for key, value in values.items()}


@dataclass
class Training:
    """All that a training changes: what a checkpoint holds."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    state: State = field(default_factory=State)

    @classmethod
    def begin(cls, args: argparse.Namespace, num_classes: int) -> Self:
        """Make the network, optimizer and schedule that the flags say."""
        net = utils.make_net(args.model, num_classes, args.device)
        optimizer = torch.optim.SGD(
            net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
        )
        scheduler = utils.make_scheduler(
            args.scheduler, optimizer, args.gamma, args.milestones, args.n_epochs
        )
        return cls(net, optimizer, scheduler)

    def snapshot(self, regularizer: Regularizer | None) -> dict[str, Any]:
        """Return the content of a checkpoint; NotFiniteError if it is not worth keeping."""
        if self.state.rows:
            summarize(self.net, regularizer, self.state)
        for name, p in self.net.state_dict().items():
            if not p.isfinite().all():
                raise NotFiniteError(f"epoch {self.state.epoch}: {name} is no longer finite")
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "state": vars(self.state),
        }

    def restore(self, content: dict[str, Any], n_epochs: int, n_batches: int) -> None:
        """Put a checkpoint back, random states too; FileError where it does not fit.

        The learning rate is not read but worked out again: it follows from settings and epoch.
        """
        params = list(self.net.parameters())
        check(content, {
            "net": self.net.state_dict(),
            "optimizer": {"state": dict},
            "state": {
                **vars(State()), "rows": [torch.empty(4 + len(params))],
                "history": [{str: int | float}],
            },
            "random": dict,
        }, "the checkpoint")
        momenta = content["optimizer"]["state"]
        if momenta:  # there are none before the first step, or with --momentum 0
            pattern = {i: {"momentum_buffer": p} for i, p in enumerate(params)}
            check(momenta, pattern, "the checkpoint.optimizer")
        state = State(**{key: content["state"][key] for key in vars(State())})
        if not (len(state.history) == state.epoch <= n_epochs
                and len(state.rows) == state.batch <= n_batches
                and 0 <= state.epoch_seconds < math.inf
                and (state.batch == 0 or state.epoch_seconds > 0)):
            raise files.FileError(f"the checkpoint is not of a run of {n_epochs} epochs of "
                                  f"{n_batches} batches")
        try:
            self.net.load_state_dict(content["net"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise files.FileError(f"the checkpoint is of another network: {reason}") from error
        for i, p in enumerate(params if momenta else []):
            buffer = torch.empty_like(p).copy_(momenta[i]["momentum_buffer"])
            self.optimizer.state[p]["momentum_buffer"] = buffer
        # after the last batch of an epoch, the schedule rightly steps before the optimizer does
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(state.epoch):
            self.scheduler.step()
        state.rows = [row.to(params[0].device) for row in state.rows]
        self.state = state
        set_random_states(content["random"])
