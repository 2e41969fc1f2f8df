"""Train a network with a regularizer that should make it survive quantization.

`run_epoch` is the loop over batches, `fit` the loop over epochs; `set_up`, `fit` and `finish` make
a run. The step itself, ∇L + ∇R, is `engine.step.gradients.compute_gradients`.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import flags
import utils
from data import ImageDataset
from engine.images.loader import Loader
from engine.networks.batch_norm import check_folding, freeze_batch_norms
from engine.networks.compiling import set_compile
from engine.networks.fast_batch_norm import set_sync_bn, unsynced_bn_buffers
from engine.networks.layers import penalized_weights, trainable_parameters
from engine.networks.outputs import check_movable_activations, check_network
from engine.step.evaluation import evaluate
from engine.step.gradients import compute_gradients
from engine.step.metrics import batch_metrics_row, epoch_means
from engine.system import distributed
from engine.system.cli import Parser, exit_codes, refuse_flags, warn_unused_flags
from engine.system.environment import describe_environment
from engine.system.errors import DataError, FileError, NetworkError, NotFiniteError, SetupError
from engine.system.hardware import (
    choose_precision,
    print_device,
    resolve_precision,
    seed_rng,
    tune_glibc_malloc,
    use_ieee_float32,
)
from engine.system.io import (
    RUN_FILE_SUFFIXES,
    backup_existing,
    check_writable,
    load_weights,
    run_lock,
    save_json,
    save_weights,
    warn_on_error,
)
from engine.system.progress import EpochDisplay
from engine.system.signals import GracefulShutdown
from engine.system.wandb_logger import WandbLogger, new_run_id, sweep_run_id
from engine.training.averaging import MAX_BN_IMAGES, averaged_network, make_average
from engine.training.checkpoints import Checkpointer
from engine.training.learned_steps import LearnedSteps, make_steps, parameter_groups
from engine.training.resume import load_for_resume, load_init_from, read_settings
from engine.training.train_state import TrainProgress, TrainState
from regularizers import Regularizer, accepted_options, make_regularizer

DIVERGED_LOSS_RATIO = 10.0  # times the loss of guessing: beyond it a training counts as diverged


@dataclass(frozen=True)
class Phase:
    """From epoch `start` on (the first is 0), train with `regularizer`; None is the loss alone.

    With `save_as`, the weights are written there just before the phase begins. With a `warmup`, the
    penalty's factor rises linearly, batch by batch, from 0 to 1 over that many epochs. The penalty
    is part of every `every`-th batch of an epoch, the first among them, and counts `every` times.
    """

    start: int
    regularizer: Regularizer | None = None
    save_as: Path | None = None
    warmup: float = 0.0
    every: int = 1

    def regularizer_at(self, batch: int) -> Regularizer | None:
        """Return the regularizer where that batch of an epoch, from 0, is penalized, else None."""
        return self.regularizer if batch % self.every == 0 else None

    def penalty_scale(self, epochs: float) -> float:
        """Return the factor of the penalty after that many epochs of the whole run."""
        return min(1.0, (epochs - self.start) / self.warmup) if self.warmup else 1.0


def phase_at(phases: Sequence[Phase], epoch: int) -> Phase:
    """Return the phase that the epoch belongs to; before the first one there is no regularizer."""
    return [Phase(0), *(p for p in phases if p.start <= epoch)][-1]


# --- the loops -------------------------------------------------------------------------------


def no_callback(progress: TrainProgress) -> None:
    """Do nothing after a batch or epoch."""


@dataclass(frozen=True)
class FitConfig:
    """How long and how `fit` trains."""

    n_epochs: int
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)  # logits, labels → mean loss
    dtype: torch.dtype = torch.float32  # of the convolutions; all else stays float32
    test_penalty: bool = True  # measure the penalty on the test set, too
    difference_step: float | None = None  # for penalties of gradients, see compute_gradients
    freeze_bn_from: int | None = None  # epoch from which on batch norms keep their statistics
    compute_gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = compute_gradients
    after_batch: Callable[[TrainProgress], None] = no_callback
    after_epoch: Callable[[TrainProgress], None] = no_callback  # history entry included


def run_epoch(
    state: TrainState, loader: Loader, phase: Phase, config: FitConfig
) -> dict[str, float]:
    """Train on the rest of the epoch; return its mean loss, accuracy and penalty.

    Random numbers that a regularizer draws are a pure function of (seed, epoch, batch).
    """
    net, progress, regularizer = state.net, state.progress, phase.regularizer
    net.train()
    if config.freeze_bn_from is not None and progress.epoch >= config.freeze_bn_from:
        freeze_batch_norms(net)
    started_at = time.perf_counter() - progress.epoch_seconds
    with EpochDisplay(progress, len(loader), loader.n_images) as display:
        for x, y in loader.batches(progress.epoch, progress.batch):  # (b, 3, H, W), (b,)
            seed_rng(hash((loader.seed, progress.epoch, progress.batch)), x.device)
            scale = phase.every * phase.penalty_scale(progress.epoch + progress.batch / len(loader))
            n_images = loader.n_images_in_batch(progress.batch)  # of all processes
            with distributed.sharded(n_images):
                loss, penalty, n_correct = config.compute_gradients(  # sets .grad to ∇L + ∇R
                    net,
                    config.criterion,
                    phase.regularizer_at(progress.batch),
                    x,
                    y,
                    config.dtype,
                    scale,
                    config.difference_step,
                )
            distributed.all_reduce_mean_(unsynced_bn_buffers(net))
            row = batch_metrics_row(net, n_images, loss, penalty, n_correct)
            progress.batch_metrics.append(row)
            if x.device.type == "cpu" and not row.isfinite().all():
                summarize(state, regularizer)  # raises, before the weights are spoilt
            state.step()
            progress.batch += 1
            progress.epoch_seconds = time.perf_counter() - started_at
            if display.is_due():
                display.show(summarize(state, regularizer))
            display.bar.update()
            config.after_batch(progress)
    return summarize(state, regularizer)


def summarize(state: TrainState, regularizer: Regularizer | None) -> dict[str, float]:
    """Return the epoch's means so far; NotFiniteError if a number is not finite."""
    progress = state.progress
    return epoch_means(state.net, regularizer, progress.epoch, progress.batch_metrics)


def fit(
    state: TrainState,
    train_loader: Loader,
    test_loader: Loader,
    phases: Sequence[Phase],
    config: FitConfig,
) -> list[dict[str, Any]]:
    """Train from where `state` is until all epochs are done; return the history, an entry each.

    The phases are in the order of their start. Raises NotFiniteError as soon as a loss, penalty or
    gradient that is not finite is seen.
    """
    progress = state.progress
    while progress.epoch < config.n_epochs:
        phase = phase_at(phases, progress.epoch)
        if phase.save_as and phase.start == progress.epoch and progress.batch == 0:
            save_weights(state.net, phase.save_as)
        lr = state.optimizer.param_groups[0]["lr"]
        started_at = time.perf_counter() - progress.epoch_seconds
        with state.quantized():
            train = run_epoch(state, train_loader, phase, config)
            state.check()
            images_per_second = train_loader.n_images / progress.epoch_seconds
            test = evaluate_epoch(state, test_loader, phase, config)
        state.scheduler.step()
        progress.history.append(
            {
                "epoch": progress.epoch,
                "lr": lr,
                **{f"train_{key}": value for key, value in train.items()},
                **{f"test_{key}": value for key, value in test.items()},
                "images_per_second": images_per_second,
                "epoch_seconds": time.perf_counter() - started_at,
            }
        )
        progress.next_epoch()
        config.after_epoch(progress)
    return progress.history


def evaluate_epoch(
    state: TrainState, loader: Loader, phase: Phase, config: FitConfig
) -> dict[str, float]:
    """Return loss, accuracy and penalty on the test set; NotFiniteError if one is not finite."""
    epoch, regularizer = state.progress.epoch, phase.regularizer
    penalized = regularizer if config.test_penalty else None
    means = evaluate(state.net, config.criterion, loader, config.dtype, penalized)
    if penalized:
        means[penalized.name] *= phase.penalty_scale(epoch + 1)
    for key, value in means.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"epoch {epoch}: the test {key} is {value}")
    return means


# --- a run -----------------------------------------------------------------------------------


@dataclass
class TrainingRun:
    """A training that is set up, and where it is logged and saved."""

    args: argparse.Namespace
    out: Path  # <out>.pt, <out>.json and <out>.ckpt are written
    phases: Sequence[Phase]
    state: TrainState
    config: FitConfig
    train_loader: Loader
    test_loader: Loader
    fixed_batch: Loader  # what --track is measured on
    bn_loader: Loader | None  # of images for the batch-norm statistics of averaged weights
    num_classes: int
    record: dict[str, Any]  # settings, versions and machine
    run_id: str
    started_at: float
    logger: WandbLogger
    checkpointer: Checkpointer | None = None
    histogram_seconds: float = 0.0  # spent on --watch in this process

    def after_batch(self, progress: TrainProgress) -> None:
        """Log histograms and write a checkpoint where they are due."""
        n_batches = len(self.train_loader)
        n_done = progress.epoch * n_batches + progress.batch
        if self.args.watch and n_done % self.args.watch_freq == 0:
            started_at = time.perf_counter()
            self.logger.log_histograms(self.state.net, progress.epoch + progress.batch / n_batches)
            self.histogram_seconds += time.perf_counter() - started_at
        self.checkpointer.after_batch()

    def after_epoch(self, progress: TrainProgress) -> None:
        """Log and print the epoch, and write the record and the checkpoint."""
        entry = progress.history[-1]
        for regularizer in utils.make_tracked_regularizers(self.args):
            means = evaluate(
                self.state.net,
                self.config.criterion,
                self.fixed_batch,
                self.config.dtype,
                regularizer,
            )
            entry[f"track_{regularizer.name}"] = means[regularizer.name]
        self.logger.log(entry)
        self.logger.summarize(best_epoch(progress.history))
        regularizer = phase_at(self.phases, progress.epoch - 1).regularizer
        with warn_on_error(f"{self.out}.json was not written, training continues"):
            tqdm.write(summary_line(entry, regularizer and regularizer.name))
            save_json({**self.record, "history": progress.history}, Path(f"{self.out}.json"))
        if self.histogram_seconds and progress.epoch == 1:
            tqdm.write(
                f"histograms took {self.histogram_seconds:.1f} s of this epoch's "
                f"{entry['epoch_seconds']:.1f} s: --watch_freq N logs them every N batches only"
            )
        is_last = progress.epoch == self.config.n_epochs
        self.checkpointer.after_epoch(progress.epoch, is_last)

    def close(self) -> None:
        """End the processes of the loaders, and print where the run is logged."""
        loaders = (self.train_loader, self.test_loader, self.fixed_batch, self.bn_loader)
        for loader in filter(None, loaders):
            loader.close()
        print(self.logger.finish(), flush=True)

    def checkpoint_content(self) -> dict[str, Any]:
        """Return what a checkpoint holds; NotFiniteError where it is not worth saving."""
        regularizer = phase_at(self.phases, self.state.progress.epoch).regularizer
        return {
            **self.state.state_dict(regularizer),
            "settings": vars(self.args),
            "run_id": self.run_id,
            "seconds": time.perf_counter() - self.started_at,
        }


def run(
    args: argparse.Namespace, phases: Sequence[Phase], out: Path, shutdown: GracefulShutdown
) -> None:
    """Train as the flags and phases say; write <out>.pt and <out>.json, and log the run."""
    training = set_up(args, phases, out, shutdown)
    try:
        with shutdown.deferred():
            fit(
                training.state, training.train_loader, training.test_loader, phases, training.config
            )
        finish(training)
    except BaseException as error:
        training.logger.fail(error)
        raise
    finally:
        training.close()


def set_up(
    args: argparse.Namespace, phases: Sequence[Phase], out: Path, shutdown: GracefulShutdown
) -> TrainingRun:
    """Make network, loaders, optimizer and schedule, or restore them from a checkpoint."""
    started_at = time.perf_counter()
    tune_glibc_malloc()
    use_ieee_float32()
    utils.seed_everything(args.seed)
    checkpoint, is_own = distributed.run_on_rank0_and_broadcast(lambda: find_checkpoint(args, out))
    args = with_settled_precision(args, checkpoint)
    dataset = utils.load_dataset(args)
    train_loader, test_loader, fixed_batch = make_loaders(dataset, args)
    bn_loader = None if args.ema is None else make_bn_loader(dataset, args)
    config = make_config(args)
    compiled = set_compile(args.compile, args.device)
    state, run_id = make_state(args, dataset, phases), new_run_id()
    if checkpoint:
        continue_from(checkpoint, state, args, phases, len(train_loader), is_own)
        run_id, started_at = checkpoint["run_id"] or run_id, started_at - checkpoint["seconds"]
    elif args.init_weights:
        load_weights(state.net, Path(args.init_weights))
    if not args.resume:
        files = [(name, suffix) for name in run_names(args, out) for suffix in RUN_FILE_SUFFIXES]
        distributed.run_on_rank0_and_broadcast(lambda: backup_existing(files))

    plan = describe_plan(args, phases, config.dtype, compiled)
    settings = {**vars(args), "plan": plan}
    record = {
        "settings": settings,
        "run_id": run_id,
        "classes": dataset.classes,
        **describe_environment(),
    }
    logger = WandbLogger(args, "train", args.run_name, settings, run_id)
    print(f"{args.run_name}: {args.model} on {args.dataset}; {plan}", flush=True)
    training = TrainingRun(
        args, out, phases, state, config, train_loader, test_loader, fixed_batch,
        bn_loader, dataset.num_classes, record, run_id, started_at, logger,
    )  # fmt: skip
    training.config = replace(
        config, after_batch=training.after_batch, after_epoch=training.after_epoch
    )
    training.checkpointer = Checkpointer(
        Path(f"{out}.ckpt"),
        training.checkpoint_content,
        args.checkpoint_every,
        args.checkpoint_minutes,
        shutdown,
    )
    return training


def with_settled_precision(
    args: argparse.Namespace, checkpoint: Mapping[str, Any] | None
) -> argparse.Namespace:
    """Return the flags with the precision that "auto" means: the checkpoint's, or this device's.

    So a run that goes on with another machine keeps its precision.
    """
    precision = args.precision
    if precision == "auto" and checkpoint:
        precision = read_settings(checkpoint).get("precision", "auto")
    precision = choose_precision(precision, args.device)
    return argparse.Namespace(**{**vars(args), "precision": precision})


def make_config(args: argparse.Namespace) -> FitConfig:
    """Return what the flags say of the loop, without its callbacks."""
    return FitConfig(
        args.n_epochs,
        utils.make_criterion(args.criterion, args.label_smoothing),
        resolve_precision(args.precision, args.device),
        not args.no_test_penalty,
        args.penalty_step if args.penalty_gradient == "difference" else None,
        args.freeze_bn_from,
    )


def run_names(args: argparse.Namespace, out: Path) -> list[Path]:
    """Return the run's files without their suffixes: with --ema the average has a name, too."""
    return [out] if args.ema is None else [out, Path(f"{out}_ema")]


def finish(training: TrainingRun) -> None:
    """Save the weights and the record with the final accuracy, which is float32's, and log it."""
    state, out = training.state, training.out
    final = evaluate(state.net, training.config.criterion, training.test_loader)
    final = {f"final_{key}": value for key, value in final.items()}
    save_weights(state.net, Path(f"{out}.pt"))
    if state.average is not None:
        final |= finish_average(training)
    learned = {}
    if state.steps is not None:
        learned = {"learned_steps": state.steps.record()}
        final |= evaluate_quantized(training)
    seconds = time.perf_counter() - training.started_at
    history = state.progress.history
    record = {**training.record, **final, **learned, "seconds": seconds, "history": history}
    save_json(record, Path(f"{out}.json"))
    training.logger.log({"epoch": training.config.n_epochs, **final})
    training.logger.summarize({**best_epoch(state.progress.history), "total_seconds": seconds})
    if artifact := training.logger.log_weights(Path(f"{out}.pt")):
        save_json({**record, "artifact": artifact}, Path(f"{out}.json"))
    images = "held-out" if training.args.holdout else "test"
    print(f"{images} accuracy {final['final_accuracy']:.2%} in float32; {seconds:.1f} s in all")
    print(f"saved {out}.pt and {out}.json")
    chance = math.log(training.num_classes)  # the loss of equal probabilities
    loss = final.get("quantized_loss", final["final_loss"])  # of the network that was trained
    if loss > DIVERGED_LOSS_RATIO * chance:
        print(
            f"the training diverged: the loss is {loss:.3g}, that of guessing is "
            f"{chance:.3g}; a smaller --lr or --lmbda may help"
        )


def evaluate_quantized(training: TrainingRun) -> dict[str, float]:
    """Return and print "quantized_loss" and "quantized_accuracy" on the test set, in float32."""
    state = training.state
    with state.steps.quantized(state.net):
        measured = evaluate(state.net, training.config.criterion, training.test_loader)
    print(f"quantized with the learned steps: accuracy {measured['accuracy']:.2%}")
    return {f"quantized_{key}": value for key, value in measured.items()}


def finish_average(training: TrainingRun) -> dict[str, float]:
    """Save the averaged weights and their record; return "ema_loss" and "ema_accuracy".

    Both are measured on the test set, in float32.
    """
    out, average = f"{training.out}_ema", training.state.average
    images = (x for x, _ in training.bn_loader.batches(0))
    net = averaged_network(average, images)
    measured = evaluate(net, training.config.criterion, training.test_loader)
    save_weights(net, Path(f"{out}.pt"))
    final = {f"final_{key}": value for key, value in measured.items()}
    steps = {"averaged_steps": average.n_averaged.item(), "bn_images": training.bn_loader.n_images}
    save_json({**training.record, **final, **steps}, Path(f"{out}.json"))
    print(f"saved {out}.pt and {out}.json: averaged weights, accuracy {measured['accuracy']:.2%}")
    return {f"ema_{key}": value for key, value in measured.items()}


# --- what a run is made of -------------------------------------------------------------------


def make_loaders(dataset: ImageDataset, args: argparse.Namespace) -> Sequence[Loader]:
    """Return the loaders of the training set, augmented, of the test set, and of one fixed batch.

    The fixed batch, of the first training images as they are, is what --track is measured on.
    """
    make_loader = utils.loader_maker(args, dataset)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    train_loader = make_loader(
        dataset.train_images,
        dataset.train_labels,
        seed=args.seed,
        augment=True,
        shuffle=True,
        rank=rank,
        world_size=world_size,
    )
    if (smallest := train_loader.n_images_in_batch(len(train_loader) - 1)) < world_size:
        raise SetupError(
            f"a batch of {smallest} images, the last of an epoch, for {world_size} "
            "processes: choose another --batch_size or --train_subset"
        )
    if args.penalty_every > len(train_loader):
        raise SetupError(
            f"--penalty_every {args.penalty_every}: an epoch has {len(train_loader)} batches"
        )
    n = args.batch_size
    return (
        train_loader,
        make_loader(dataset.test_images, dataset.test_labels, cache=True),
        make_loader(dataset.train_images[:n], dataset.train_labels[:n], cache=True),
    )


def make_bn_loader(dataset: ImageDataset, args: argparse.Namespace) -> Loader:
    """Return the loader of the first training images, as they are: --recalibrate_bn_images."""
    n_train = len(dataset.train_images)
    n = args.recalibrate_bn_images or min(MAX_BN_IMAGES, n_train)
    if n > n_train:
        raise DataError(f"--recalibrate_bn_images {n}: there are {n_train} training images")
    return utils.loader_maker(args, dataset)(dataset.train_images[:n], dataset.train_labels[:n])


def make_state(
    args: argparse.Namespace, dataset: ImageDataset, phases: Sequence[Phase]
) -> TrainState:
    """Make the network, SGD and the learning-rate schedule that the flags say."""
    net = utils.make_net(
        args.model, dataset.num_classes, args.device, args.width, args.memory_format
    )
    check_trainable(net, phases)
    image_shape = dataset.test_images.shape[1:]
    n_activations = check_network(net, image_shape, dataset.num_classes)
    steps = make_learned_steps(net, image_shape, args)
    optimizer = torch.optim.SGD(
        parameter_groups(net, steps),
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    scheduler = utils.make_scheduler(
        args.scheduler, optimizer, args.gamma, args.milestones, args.n_epochs
    )
    if any(p.regularizer and "folded_weights" in p.regularizer.inputs for p in phases):
        utils.print_unfolded(net, check_folding(net, image_shape), args.model)
    if distributed.get_world_size() > 1:
        set_sync_bn(net, args.sync_bn)
    penalized = [p.regularizer for p in phases if p.regularizer]
    of_activations = any("a_grads" in r.inputs for r in penalized)
    if of_activations and args.penalty_gradient == "difference":
        check_movable_activations(net, image_shape)
    if n_activations == 0 and of_activations:
        print(
            f"{args.model} has no activation modules, and functions such as F.relu are not seen: "
            "gradients of activations are not penalized"
        )
    average = None if args.ema is None else make_average(net, args.ema)
    return TrainState(net, optimizer, scheduler, average=average, steps=steps)


def make_learned_steps(
    net: nn.Module, image_shape: Sequence[int], args: argparse.Namespace
) -> LearnedSteps | None:
    """Give the network the step sizes that --qat_bits asks for, in place; None without it."""
    if args.qat_bits is None:
        return None
    bits = utils.qat_bit_widths(args.qat_bits)
    options = {"keep_first_last": args.keep_first_last, "first_epoch": args.qat_from}
    return make_steps(net, image_shape, *bits, **options)


def check_trainable(net: nn.Module, phases: Sequence[Phase]) -> None:
    """Raise NetworkError where everything that would be trained or penalized is frozen."""
    if not trainable_parameters(net):
        raise NetworkError(f"{type(net).__name__}: all parameters are frozen, nothing to train")
    if any(p.regularizer for p in phases) and not penalized_weights(net):
        raise NetworkError(f"{type(net).__name__}: all weights are frozen, nothing to penalize")


def find_checkpoint(args: argparse.Namespace, out: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return the checkpoint to continue from, if any, and whether it is of this very run."""
    schedule = utils.schedule_settings(args)
    own = load_for_resume(args, out, schedule) if args.resume else None
    return own or load_init_from(args, schedule), own is not None


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
    check_phases(state.progress, phases, args, is_own)
    if state.average is not None and "average" not in checkpoint:
        print("the average of the weights begins here: the checkpoint has none with this --ema")
    print(where_it_continues(state.progress, args, is_own))


def where_it_continues(progress: TrainProgress, args: argparse.Namespace, is_own: bool) -> str:
    """Return which batch the run continues at, as a line of text."""
    if progress.epoch == args.n_epochs:
        return f"all {args.n_epochs} epochs are done: nothing left to train"
    how = "resuming" if is_own else f"continuing {args.init_from}"
    return f"{how} at epoch {progress.epoch}, batch {progress.batch}"


def check_phases(
    progress: TrainProgress, phases: Sequence[Phase], args: argparse.Namespace, is_own: bool
) -> None:
    """Check that no phase should have begun before the checkpoint: that would change its meaning.

    Of a run that is resumed, print which weights can no longer be saved.
    """
    if not is_own:
        return check_init_from(progress, phases, args)
    for p in phases:
        if p.save_as and p.start < progress.epochs_started and not p.save_as.exists():
            print(f"{p.save_as} cannot be saved any more: that epoch has begun")


def check_init_from(
    progress: TrainProgress, phases: Sequence[Phase], args: argparse.Namespace
) -> None:
    """Raise FileError where the checkpoint of --init_from lies beyond what is still to be done."""
    n_started = progress.epochs_started
    where = f"{args.init_from} has {n_started} epochs {'begun' if progress.batch else 'done'}"
    if progress.epoch >= args.n_epochs:
        raise FileError(f"{where}: --n_epochs {args.n_epochs} leaves nothing to train")
    for p in phases:
        if p.regularizer and p.start < n_started:
            raise FileError(f"{where}: a regularizer cannot begin at epoch {p.start}")
    if args.qat_bits and args.qat_from < n_started:
        raise FileError(f"{where}: --qat_from {args.qat_from} is over")
    if args.freeze_bn_from and args.freeze_bn_from < n_started:
        raise FileError(f"{where}: --freeze_bn_from {args.freeze_bn_from} is over")


def describe_plan(
    args: argparse.Namespace, phases: Sequence[Phase], dtype: torch.dtype, compiled: bool
) -> str:
    """Return what will be done, as text: "no regularizer; from epoch 5: L2Grad λ=0.01; …"."""
    labels = [p.regularizer.label if p.regularizer else "no regularizer" for p in phases]
    parts = [
        f"from epoch {p.start}: {label}" if p.start else label
        for p, label in zip(phases, labels, strict=True)
    ]
    if args.penalty_every > 1:
        parts.append(f"the penalty in one of {args.penalty_every} batches")
    if args.penalty_gradient == "difference":
        parts.append(f"its gradient by a difference, step {args.penalty_step:g}")
    kernels = "compiled" if compiled else "eager"
    precision = str(dtype).removeprefix("torch.")
    if args.qat_bits is not None:
        weight_bits, act_bits = utils.qat_bit_widths(args.qat_bits)
        inputs = f"inputs of {act_bits}" if act_bits else "inputs in full precision"
        parts.append(
            f"from epoch {args.qat_from} quantized with learned steps: weights of {weight_bits} "
            f"bits, {inputs}{', 8 in the first and the last layer' * args.keep_first_last}"
        )
    if args.label_smoothing:
        parts.append(f"labels smoothed by {args.label_smoothing:g}")
    if args.ema is not None:
        parts.append(f"weights averaged with decay {args.ema:g}")
    parts.append(f"{precision} convolutions and {kernels} kernels on {args.device}")
    if args.holdout:
        parts.append(f"tested on {args.holdout} training images, held out")
    if (n := distributed.get_world_size()) > 1:
        images = "the whole batch" if args.sync_bn else "each one's share"
        parts.append(f"{n} processes, batch-norm statistics of {images}")
    return "; ".join(parts)


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the highest test accuracy of a history, and the first epoch that has it."""
    best = max(history, key=lambda entry: entry["test_accuracy"])
    return {"best_accuracy": best["test_accuracy"], "best_epoch": best["epoch"]}


def summary_line(entry: dict[str, Any], penalty: str | None) -> str:
    """Return an epoch's history entry as a line of text, with the penalty of that name."""
    shown = f"  {penalty} {entry[f'train_{penalty}']:.4g}" if penalty else ""
    return (
        f"epoch {entry['epoch']}  lr {entry['lr']:.4g}"
        f"  train loss {entry['train_loss']:.4f}{shown}  accuracy {entry['train_accuracy']:.2%}"
        f"  test loss {entry['test_loss']:.4f}  accuracy {entry['test_accuracy']:.2%}"
        f"  {entry['images_per_second']:.0f} images/s  {entry['epoch_seconds']:.1f} s"
    )


# --- the script ------------------------------------------------------------------------------


def validate_and_run(
    parser: Parser, args: argparse.Namespace, phases: Sequence[Phase], epoch_flags: str
) -> None:
    """Check what the flags say together, before anything is fetched or trained, and run.

    `epoch_flags` are those that say when phases begin.
    """
    out = output_path(parser, args)
    try:
        utils.make_tracked_regularizers(args)
        check_writable(Path(f"{out}.pt"))
    except ValueError as error:
        parser.error(str(error))
    known = {
        "regularizers": [p.regularizer for p in phases if p.regularizer],
        "models": [args.model],
        "has_checkpoint": args.resume and os.path.lexists(f"{out}.ckpt"),  # and reads no other file
    }
    warn_unused_flags(parser, args, parser.flags, **known)
    refuse_flags(parser, args, parser.flags, **known)
    phases = reachable_phases(parser, args, phases, epoch_flags)
    phases = [replace(p, warmup=args.lmbda_warmup, every=args.penalty_every) for p in phases]
    if args.save_preregularized_model:
        first = next((p for p in phases if p.regularizer), None)
        save_as = Path(f"{out}_preregul.pt")
        phases = [replace(p, save_as=save_as) if p is first else p for p in phases]

    with (
        exit_codes(parser, partial(resume_hint, out)),
        GracefulShutdown() as shutdown,
        distributed.process_group(args.device),
        output_lock(args, out),
    ):
        print_device(args.device)
        args.resume = distributed.restarted() or args.resume
        run(args, phases, out, shutdown)


def resume_hint(out: Path) -> str:
    """Return the end of a message that says how to continue, "" where there is no checkpoint."""
    has_checkpoint = os.path.lexists(f"{out}.ckpt")
    return f"; --resume continues from {out}.ckpt" if has_checkpoint else ""


@contextmanager
def output_lock(args: argparse.Namespace, out: Path) -> Iterator[None]:
    """Context manager that makes the folder of the run's files and holds the locks of its names."""
    if distributed.get_rank() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        for name in run_names(args, out):
            locks.enter_context(run_lock(name))
        yield


def reachable_phases(
    parser: Parser, args: argparse.Namespace, phases: Sequence[Phase], epoch_flags: str
) -> list[Phase]:
    """Return the phases that begin within the run; name later epochs in one warning line."""
    late = [f"{epoch_flags} {p.start}" for p in phases if p.start >= args.n_epochs]
    late += [f"--milestones {epoch}" for epoch in utils.late_milestones(args)]
    if late and distributed.get_rank() == 0:
        last = args.n_epochs - 1
        print(
            f"{parser.prog}: never reached, the last epoch is {last}: {', '.join(late)}",
            file=sys.stderr,
        )
    return [p for p in phases if p.start < args.n_epochs]


def output_path(parser: Parser, args: argparse.Namespace) -> Path:
    """Return the run's files without their suffix; end the program where that is no file name."""
    name = (args.save_file or args.run_name).removesuffix(".pt")
    out = Path(name)
    if not name.isprintable() or name.endswith(("/", ".")) or not out.name:
        parser.error(f"{name!r} is not the name of a file")
    if not args.run_name.isprintable():
        parser.error(f"--run_name {args.run_name!r} is not the name of a run")
    try:
        f"{args.run_name} {out}".encode()  # both will be printed
    except UnicodeError as error:
        parser.error(str(error))
    return out


def default_name(args: argparse.Namespace, what: str) -> str:
    """Return the name of a run that was given none: in a sweep, one of its own."""
    model = args.model.replace(":", "_")  # which Windows has in no file name
    return "_".join(filter(None, (model, args.dataset, what, sweep_run_id())))


def make_parser() -> Parser:
    """Make the parser of train.py."""
    description = "Train a network with a regularizer that should make it survive quantization."
    return flags.make_parser(description, [*flags.TRAINING, *flags.ONE_PENALTY, *flags.common()])


def main(argv: Sequence[str] | None = None) -> None:
    """Train with at most two phases: without a regularizer, then with it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    options = utils.regularizer_options_from(args)
    options["only_weight_grads"] = args.no_activation_gradients
    try:
        accepted = accepted_options(args.regularizer, options)
        regularizer = make_regularizer(args.regularizer, args.lmbda, **accepted)
    except ValueError as error:
        parser.error(f"argument --regularizer: {error}")
    args.regularizer = regularizer.name if regularizer else "none"
    args.run_name = args.run_name or default_name(args, args.regularizer)
    phases = [Phase(args.first_regularized_epoch, regularizer)] if regularizer else [Phase(0)]
    phases = phases if phases[0].start == 0 else [Phase(0), *phases]
    validate_and_run(parser, args, phases, "--first_regularized_epoch")


if __name__ == "__main__":
    main()
