"""What a training changes as it goes, and how a checkpoint of it is made and restored."""

import json
import math
import warnings
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from engine.networks.layers import not_finite, trainable_parameters, unsaved_buffers
from engine.step.metrics import epoch_means
from engine.system import distributed
from engine.system.errors import FileError, NotFiniteError
from engine.system.io import file_boundary, load_tensors
from engine.training.checkpoints import NOT_OURS, set_all_rng_states
from engine.training.learned_steps import LearnedSteps


@dataclass
class TrainProgress:
    """Where a training is: the batch to do next, and what has been measured."""

    epoch: int = 0
    batch: int = 0
    batch_metrics: list[Tensor] = field(default_factory=list)  # one row per batch of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per finished epoch
    epoch_seconds: float = 0.0  # spent in this epoch so far

    @property
    def epochs_started(self) -> int:
        """How many epochs have begun."""
        return self.epoch + (self.batch > 0)

    def next_epoch(self) -> None:
        """Move to the beginning of the next epoch."""
        self.epoch += 1
        self.batch = 0
        self.batch_metrics = []
        self.epoch_seconds = 0.0

    def best_epoch(self) -> dict[str, float]:
        """Return the highest test accuracy so far, and the first epoch that has it."""
        best = max(self.history, key=lambda entry: entry["test_accuracy"])
        return {"best_accuracy": best["test_accuracy"], "best_epoch": best["epoch"]}

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
    infinite: Sequence[str] = ()  # tensors that may be not finite, such as a mask of attention

    def quantized(self) -> AbstractContextManager[None]:
        """Context manager in which the network runs as this epoch trains it."""
        if self.steps is None or self.progress.epoch < self.steps.first_epoch:
            return nullcontext()
        return self.steps.quantized(self.net)

    def step(self) -> None:
        """Update the weights by their gradients, and the average by the new weights.

        The fused SGD of PyTorch 2.14.1 reads both by position in memory, see findings/.
        """
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            if p.grad is not None and _layout(p.grad) != _layout(p):
                p.grad = torch.empty_like(p).copy_(p.grad)
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
        """Return the content of a checkpoint; NotFiniteError where something is no longer finite.

        `regularizer` is that of the current epoch, None for none.
        """
        progress = self.progress
        if progress.batch_metrics:
            epoch_means(self.net, regularizer, progress.epoch, progress.batch_metrics)
        if names := not_finite(self.net, self.infinite):
            raise NotFiniteError(f"epoch {progress.epoch}: {names[0]} is no longer finite")
        parts = {"net": self.net, "optimizer": self.optimizer, "state": progress}
        parts |= {"average": self.average, "steps": self.steps}
        content = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return content | {"unsaved_buffers": unsaved_buffers(self.net)}

    def load_state_dict(self, content: dict[str, Any], n_epochs: int, n_batches: int) -> None:
        """Restore a checkpoint of a run of n_epochs of n_batches, random states included.

        Learning rate and schedule are not read but derived from settings and epoch. An average that
        the checkpoint lacks begins with its weights. Raises FileError where the checkpoint does not
        fit.
        """
        with file_boundary("the checkpoint:", NOT_OURS):
            if self.steps is not None and "steps" in content:
                self._drop_unsaved_inputs(self.steps, content["steps"])
            self.progress = self._read_progress(content["state"], n_epochs, n_batches)
            with file_boundary("the checkpoint", "is of another network"):
                load_tensors(self.net, content["net"])
                _check_loaded(content["net"], self.net.state_dict(), self.infinite)
                self._load_unsaved_buffers(content.get("unsaved_buffers", {}))
            if self.average is not None:
                self._load_average(self.average, content)
            if self.steps is not None:
                self._load_steps(self.steps, content)
            self._load_momenta(content["optimizer"]["state"], "steps" in content)
            # after the last batch of an epoch, the schedule rightly steps before the optimizer does
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(self.progress.epoch):
                self.scheduler.step()
            set_all_rng_states(content["random"])

    def _read_progress(self, saved: dict[str, Any], n_epochs: int, n_batches: int) -> TrainProgress:
        with file_boundary("the checkpoint.state.history:", NOT_OURS):
            json.dumps(saved["history"])  # raises unless it is of plain values, as in a record
            for entry in saved["history"]:
                math.hypot(entry["epoch"], entry["test_accuracy"])  # numbers, which a run reads
        row = torch.zeros(4 + len(trainable_parameters(self.net)))
        if not torch.stack([row, *saved["rows"]]).isfinite().all():  # raises for other shapes
            raise ValueError("rows are not finite")
        device = next(self.net.parameters()).device
        progress = TrainProgress(
            epoch=int(saved["epoch"]),
            batch=int(saved["batch"]),
            batch_metrics=[row.to(device) for row in saved["rows"]],
            history=list(saved["history"]),
            epoch_seconds=float(saved["epoch_seconds"]),
        )
        if not (
            len(progress.history) == progress.epoch <= n_epochs
            and len(progress.batch_metrics) == progress.batch <= n_batches
            and 0 <= progress.epoch_seconds < math.inf
            and (progress.batch == 0 or progress.epoch_seconds > 0)
        ):
            raise FileError(
                f"the checkpoint is not of a run of {n_epochs} epochs of {n_batches} batches"
            )
        return progress

    def _load_unsaved_buffers(self, saved: dict[str, Tensor]) -> None:
        """Restore buffers that the state_dict lacks; earlier versions' checkpoints have none.

        Of several processes all have rank 0's. One whose shape has changed is put in its place.
        """
        for name, buffer in unsaved_buffers(self.net).items():
            value = saved[name].to(buffer.device) if name in saved else buffer
            if torch.equal(value, buffer):  # most are constants
                continue
            is_alike = value.shape == buffer.shape and value.dtype == buffer.dtype
            if is_alike and 0 not in _layout(buffer):  # not one number many times
                buffer.copy_(value)
            else:
                module, _, key = name.rpartition(".")
                self.net.get_submodule(module)._buffers[key] = value

    def _load_average(self, average: AveragedModel, content: dict[str, Any]) -> None:
        if "average" not in content:
            average.module.load_state_dict(self.net.state_dict())
            return
        with file_boundary("the checkpoint.average:", NOT_OURS):
            saved = {key: content["average"][key] for key in average.state_dict()}
            load_tensors(average, saved)
            infinite = {f"module.{name}" for name in self.infinite}
            _check_loaded(saved, average.state_dict(), infinite)
            if average.n_averaged < 0:
                raise ValueError(f"an average of {average.n_averaged} steps")

    def _drop_unsaved_inputs(self, steps: LearnedSteps, saved: dict[str, Tensor]) -> None:
        dropped = {id(step) for step in steps.drop_unsaved_inputs(self.net, saved)}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in dropped]

    def _load_steps(self, steps: LearnedSteps, content: dict[str, Any]) -> None:
        n_started = self.progress.epochs_started
        if "steps" in content:
            with file_boundary("the checkpoint.steps:", NOT_OURS):
                steps.load_state_dict(content["steps"], n_started)
                _check_loaded(content["steps"], steps.state_dict())
        elif n_started > steps.first_epoch:
            raise FileError(
                f"the checkpoint has {n_started} epochs begun and no learned steps: --qat_from "
                f"{steps.first_epoch} is over"
            )

    def _load_momenta(self, saved: dict[int, dict[str, Tensor]], has_steps: bool) -> None:
        """Restore SGD's momenta; there are none before the first step, or with --momentum 0.

        Learned steps are the optimizer's second group, and begin without where they have none.
        """
        with file_boundary("the checkpoint.optimizer:", NOT_OURS):
            groups = self.optimizer.param_groups[: None if has_steps else 1]
            params = [p for group in groups for p in group["params"]]
            state = {}
            for i, p in enumerate(params if saved else ()):
                buffer = saved[i]["momentum_buffer"]
                if buffer.shape != p.shape or not buffer.isfinite().all():
                    raise ValueError(f"momentum {i} is of another shape or not finite")
                # laid out as the parameter is: the fused kernel reads both by position
                state[i] = {"momentum_buffer": torch.empty_like(p).copy_(buffer)}
            own_groups = self.optimizer.state_dict()["param_groups"]  # the flags', not the file's
            self.optimizer.load_state_dict({"state": state, "param_groups": own_groups})


def _layout(t: Tensor) -> list[int]:
    """Return the strides of the dimensions that have any."""
    return [stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def _check_loaded(
    saved: Mapping[str, Tensor], loaded: Mapping[str, Tensor], infinite: Container[str] = ()
) -> None:
    """Raise ValueError, naming it, where a tensor was converted on its way in, or is not finite.

    Those named in `infinite` need not be.
    """
    for name, t in loaded.items():
        if saved[name].dtype != t.dtype or not (name in infinite or t.isfinite().all()):
            raise ValueError(f"{name} is of another dtype or not finite")
