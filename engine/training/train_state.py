"""What a training changes as it goes, and how a checkpoint of it is made and restored."""

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from engine.networks.layers import trainable_parameters
from engine.step.metrics import epoch_means
from engine.system import distributed
from engine.system.errors import FileError, NotFiniteError
from engine.training.checkpoints import set_rng_state, validate_structure
from engine.training.learned_steps import LearnedSteps


@dataclass
class TrainProgress:
    """Where a training is: the batch to do next, and what has been measured."""

    epoch: int = 0
    batch: int = 0
    batch_metrics: list[Tensor] = field(default_factory=list)  # a row a batch of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry a finished epoch
    epoch_seconds: float = 0.0  # spent in this epoch so far

    @property
    def epochs_started(self) -> int:
        """How many epochs have begun."""
        return self.epoch + (self.batch > 0)

    def next_epoch(self) -> None:
        """Move to the beginning of the next epoch."""
        self.epoch, self.batch, self.batch_metrics, self.epoch_seconds = self.epoch + 1, 0, [], 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the fields under their names in a checkpoint."""
        fields = dict(vars(self))
        return {"rows": fields.pop("batch_metrics"), **fields}


@dataclass
class TrainState:
    """Everything that training changes: what a checkpoint holds."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: TrainProgress = field(default_factory=TrainProgress)
    average: AveragedModel | None = None  # of the weights
    steps: LearnedSteps | None = None  # of quantization-aware training

    def quantized(self) -> AbstractContextManager[None]:
        """Context manager in which the network runs as this epoch trains it."""
        if self.steps is None or self.progress.epoch < self.steps.first_epoch:
            return nullcontext()
        return self.steps.quantized(self.net)

    def step(self) -> None:
        """Update the weights by their gradients, and the average by the new weights."""
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.net)

    def check(self) -> None:
        """Raise RanksDifferError or StepSizeError where the state is not what it must be."""
        distributed.check_replicated(self.net.state_dict())
        if self.average is not None:
            distributed.check_replicated(self.average.module.state_dict())
        if self.steps is not None:
            distributed.check_replicated(self.steps.state_dict())
            self.steps.check()

    def state_dict(self, regularizer: nn.Module | None) -> dict[str, Any]:
        """Return the content of a checkpoint; NotFiniteError if it is not worth saving.

        `regularizer` is that of the current epoch, None for none.
        """
        progress = self.progress
        if progress.batch_metrics:
            epoch_means(self.net, regularizer, progress.epoch, progress.batch_metrics)
        for name, t in self.net.state_dict().items():
            if not t.isfinite().all():
                raise NotFiniteError(f"epoch {progress.epoch}: {name} is no longer finite")
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "state": progress.state_dict(),
            **({} if self.average is None else {"average": self.average.state_dict()}),
            **({} if self.steps is None else {"steps": self.steps.state_dict()}),
        }

    def load_state_dict(self, content: dict[str, Any], n_epochs: int, n_batches: int) -> None:
        """Restore a checkpoint of a run of n_epochs of n_batches, random states included.

        The learning rate is not read but derived from settings and epoch. An average that the
        checkpoint lacks begins with its weights. Raises FileError where the checkpoint does not
        fit.
        """
        row = torch.empty(4 + len(trainable_parameters(self.net)))
        entry = {"epoch": int, "test_accuracy": int | float}  # what a run reads of it
        template = {
            "net": self.net.state_dict(),
            "optimizer": {"state": dict},
            "state": {**TrainProgress().state_dict(), "rows": [row], "history": [entry]},
            "random": dict,
        }
        validate_structure(content, template, "the checkpoint")
        self.progress = self._read_progress(content["state"], n_epochs, n_batches)
        try:
            self.net.load_state_dict(dict(content["net"]))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise FileError(f"the checkpoint is of another network: {reason}") from error
        if self.average is not None:
            self._load_average(content)
        if self.steps is not None:
            self._load_steps(content)
        self._load_momenta(content["optimizer"]["state"], "steps" in content)
        # after the last batch of an epoch, the schedule rightly steps before the optimizer does
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(self.progress.epoch):
            self.scheduler.step()
        set_rng_state(content["random"])

    def _read_progress(self, saved: dict[str, Any], n_epochs: int, n_batches: int) -> TrainProgress:
        for entry in saved["history"]:
            validate_structure([*entry], [str], "the checkpoint.state.history")
            validate_structure([*entry.values()], [int | float], "the checkpoint.state.history")
        device = next(self.net.parameters()).device
        rows = [row.to(device) for row in saved["rows"]]
        names = vars(TrainProgress()).keys() - {"batch_metrics"}
        progress = TrainProgress(batch_metrics=rows, **{name: saved[name] for name in names})
        if not (
            len(progress.history) == progress.epoch <= n_epochs
            and len(rows) == progress.batch <= n_batches
            and 0 <= progress.epoch_seconds < math.inf
            and (progress.batch == 0 or progress.epoch_seconds > 0)
        ):
            raise FileError(
                f"the checkpoint is not of a run of {n_epochs} epochs of {n_batches} batches"
            )
        return progress

    def _load_average(self, content: dict[str, Any]) -> None:
        if "average" not in content:
            self.average.module.load_state_dict(self.net.state_dict())
            return
        saved, template, where = (
            content["average"],
            self.average.state_dict(),
            "the checkpoint.average",
        )
        validate_structure(saved, template, where)
        saved = {key: saved[key] for key in template}
        if saved["n_averaged"] < 0 or not all(t.isfinite().all() for t in saved.values()):
            raise FileError(f"{where}: not what this run would have saved")
        self.average.load_state_dict(saved)

    def _load_steps(self, content: dict[str, Any]) -> None:
        n_started = self.progress.epochs_started
        if "steps" in content:
            template = self.steps.state_dict()
            validate_structure(content["steps"], template, "the checkpoint.steps")
            self.steps.load_state_dict(content["steps"], n_started)
        elif n_started > self.steps.first_epoch:
            raise FileError(
                f"the checkpoint has {n_started} epochs begun and no learned steps: --qat_from "
                f"{self.steps.first_epoch} is over"
            )

    def _load_momenta(self, momenta: dict[int, dict[str, Tensor]], has_steps: bool) -> None:
        """Restore SGD's momenta; there are none before the first step, or with --momentum 0.

        Learned steps are the optimizer's second group, and begin without where they have none.
        """
        groups = self.optimizer.param_groups[: None if has_steps else 1]
        params = [p for group in groups for p in group["params"]]
        if not momenta:
            return
        template = {i: {"momentum_buffer": p} for i, p in enumerate(params)}
        validate_structure(momenta, template, "the checkpoint.optimizer")
        for i, p in enumerate(params):
            buffer = torch.empty_like(p).copy_(momenta[i]["momentum_buffer"])
            self.optimizer.state[p]["momentum_buffer"] = buffer
