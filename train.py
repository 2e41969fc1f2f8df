"""Train a network with a regularizer that should make it survive quantization.

`run_epoch` is the loop over batches, `fit` the loop over epochs; `run` goes through them, logs,
saves and stops. The step itself, ∇L + ∇R, is `engine.step.gradients.compute_gradients`.
"""

import engine.system.early_interrupt  # noqa: F401, first: what follows takes seconds

# isort: split
import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import flags
import utils
from analysis.weights_files import WeightsFile, read_record, warn_of_holdout
from data import ImageDataset
from engine.images.loader import Loader
from engine.networks.batch_norm import count_batch_norms, describe_unfolded, freeze_batch_norms
from engine.networks.compiling import set_compile
from engine.networks.fast_batch_norm import set_sync_bn, unsynced_norm_buffers
from engine.networks.layers import (
    check_loaded_weights,
    computed_weights,
    image_dtype,
    not_finite,
    penalized_weights,
    trainable_parameters,
    unpenalized_parameters,
)
from engine.networks.outputs import check_network
from engine.quantization.coverage import first_names
from engine.step.compiled_step import CompiledStep
from engine.step.evaluation import evaluate
from engine.step.gradients import compute_gradients
from engine.step.metrics import batch_metrics_row, epoch_means
from engine.step.penalty_inputs import needs_double_backward
from engine.step.trial import check_criterion, check_derivatives, check_penalty
from engine.system import distributed, hardware, io
from engine.system.cli import Parser, exit_codes, refuse_flags, warn_unused_flags
from engine.system.environment import describe_environment
from engine.system.errors import NetworkError, NotFiniteError, SetupError
from engine.system.progress import EpochDisplay, epoch_line
from engine.system.signals import GracefulShutdown, StoppedBySignal
from engine.system.wandb_logger import WandbLogger, how_to_open, new_run_id, sweep_run_id
from engine.training.averaging import MAX_BN_IMAGES, averaged_network, make_average
from engine.training.checkpoints import CheckpointClock, save_checkpoint
from engine.training.learned_steps import make_steps, parameter_groups
from engine.training.phases import Phase, describe_plan, phase_at
from engine.training.resume import continue_from, find_checkpoint, settled, settled_precision
from engine.training.train_state import TrainProgress, TrainState
from regularizers import Regularizer, accepted_options, make_regularizer

DIVERGED_LOSS_RATIO = 10.0  # times the loss of guessing: beyond it a training counts as diverged


# --- the loops -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitConfig:
    """How long and how `fit` trains."""

    n_epochs: int
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)  # logits, labels → mean loss
    dtype: torch.dtype = torch.float32  # of the convolutions; all else stays float32
    test_penalty: bool = True  # measure the penalty on the test set, too
    difference_step: float | None = None  # for penalties of gradients, see compute_gradients
    freeze_bn_from: int | None = None  # epoch from which on batch norms keep their statistics
    compiled_step: CompiledStep | None = None  # in place of compute_gradients


def fit(
    state: TrainState,
    train_loader: Loader,
    test_loader: Loader,
    phases: Sequence[Phase],
    config: FitConfig,
) -> Iterator[TrainProgress]:
    """Train from where `state` is until all epochs are done.

    Yields the progress after each batch and, with `batch` 0 again and one more entry in `history`,
    after each epoch. The phases are in the order of their start. Raises NotFiniteError as soon as a
    loss, penalty or gradient that is not finite is seen.
    """
    progress = state.progress
    while progress.epoch < config.n_epochs:
        phase = phase_at(phases, progress.epoch)
        if phase.save_as and phase.start == progress.epoch and progress.batch == 0:
            io.save_weights(state.net, phase.save_as)
        lr = state.optimizer.param_groups[0]["lr"]
        started_at = time.perf_counter() - progress.epoch_seconds
        with state.quantized():
            yield from run_epoch(state, train_loader, phase, config)
            train = summarize(state, phase.regularizer)
            state.check()
            images_per_second = train_loader.n_images / progress.epoch_seconds
            test = evaluate_epoch(state, test_loader, phase, config)
        state.scheduler.step()
        entry = {"epoch": progress.epoch, "lr": lr}
        entry |= {f"train_{key}": value for key, value in train.items()}
        entry |= {f"test_{key}": value for key, value in test.items()}
        seconds = time.perf_counter() - started_at
        entry |= {"images_per_second": images_per_second, "epoch_seconds": seconds}
        progress.history.append(entry)
        progress.next_epoch()
        yield progress


def run_epoch(
    state: TrainState, loader: Loader, phase: Phase, config: FitConfig
) -> Iterator[TrainProgress]:
    """Train on the rest of the epoch; yield the progress after each batch.

    Random numbers that a regularizer draws are a pure function of (seed, epoch, batch).
    """
    net, progress, criterion = state.net, state.progress, config.criterion
    take_step = config.compiled_step or compute_gradients
    net.train()
    if config.freeze_bn_from is not None and progress.epoch >= config.freeze_bn_from:
        freeze_batch_norms(net)
    started_at = time.perf_counter() - progress.epoch_seconds
    with EpochDisplay(progress, len(loader), loader.n_images) as display:
        for x, y in loader.batches(progress.epoch, progress.batch):  # (b, 3, H, W), (b,)
            hardware.seed_rng(hash((loader.seed, progress.epoch, progress.batch)), x.device)
            scale = phase.every * phase.penalty_scale(progress.epoch + progress.batch / len(loader))
            n_images = loader.n_images_in_batch(progress.batch)  # of all processes
            regularizer = phase.regularizer if progress.batch % phase.every == 0 else None
            with distributed.sharded(n_images):  # sets .grad to ∇L + ∇R
                loss, penalty, n_correct = take_step(
                    net, criterion, regularizer, x, y, config.dtype, scale, config.difference_step
                )
            distributed.all_reduce_mean_(unsynced_norm_buffers(net))
            row = batch_metrics_row(net, n_images, loss, penalty, n_correct)
            progress.batch_metrics.append(row)
            if x.device.type == "cpu" and not row.isfinite().all():
                summarize(state, phase.regularizer)  # raises, before the weights are spoilt
            state.step()
            progress.batch += 1
            progress.epoch_seconds = time.perf_counter() - started_at
            if display.is_due():  # reading the numbers waits for the device
                display.show(summarize(state, phase.regularizer))
            display.bar.update()
            yield progress


def summarize(state: TrainState, regularizer: Regularizer | None) -> dict[str, float]:
    """Return the epoch's means so far; NotFiniteError if a number is not finite."""
    progress = state.progress
    return epoch_means(state.net, regularizer, progress.epoch, progress.batch_metrics)


def evaluate_epoch(
    state: TrainState, loader: Loader, phase: Phase, config: FitConfig
) -> dict[str, float]:
    """Return loss, accuracy and penalty on the test set; NotFiniteError if one is not finite."""
    epoch = state.progress.epoch
    penalized = phase.regularizer if config.test_penalty else None
    means = evaluate(state.net, config.criterion, loader, config.dtype, penalized)
    if penalized:
        means[penalized.name] *= phase.penalty_scale(epoch + 1)
    for key, value in means.items():
        if not math.isfinite(value):
            is_penalty = penalized and key == penalized.name
            hint = "; --no_test_penalty does without it" if is_penalty else ""
            raise NotFiniteError(f"epoch {epoch}: the test {key} is {value}{hint}")
    return means


# --- a run -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training that is set up, and where it is logged and saved."""

    args: argparse.Namespace
    out: Path  # <out>.pt, <out>.json and <out>.ckpt are written
    started_at: float  # of the clock, had the run never been interrupted
    state: TrainState
    config: FitConfig
    loaders: "Loaders"
    record: dict[str, Any]  # settings, versions and machine
    logger: WandbLogger


def run(
    args: argparse.Namespace, phases: Sequence[Phase], out: Path, shutdown: GracefulShutdown
) -> None:
    """Train as the flags and phases say; write <out>.pt and <out>.json, and log the run.

    <out>.ckpt is written as the training goes: when it is due, and before a signal stops the run.
    """
    training = set_up(args, phases, out)
    state, loaders, logger = training.state, training.loaders, training.logger
    clock = CheckpointClock(args.checkpoint_every, args.checkpoint_minutes, args.n_epochs)
    n_batches = len(loaders.train)
    try:
        with shutdown.deferred():
            for progress in fit(state, loaders.train, loaders.test, phases, training.config):
                n_done = progress.epoch * n_batches + progress.batch
                if progress.batch == 0:  # the epoch before it is done
                    log_epoch(training, phase_at(phases, progress.epoch - 1))
                if args.watch and progress.batch and n_done % args.watch_freq == 0:
                    logger.log_histograms(state.net, n_done / n_batches)
                signal = shutdown.requested(progress.batch)
                if signal or clock.is_due(progress.epoch, progress.batch):
                    content = state.state_dict(phase_at(phases, progress.epoch).regularizer)
                    seconds = time.perf_counter() - training.started_at
                    about = {"settings": vars(training.args), "run_id": training.record["run_id"]}
                    save_checkpoint({**content, **about, "seconds": seconds}, Path(f"{out}.ckpt"))
                    clock.restart()
                if signal:
                    raise StoppedBySignal(128 + signal)
        finish(training)
    except BaseException as error:
        logger.fail(error)
        raise
    finally:
        loaders.close()
        logger.close()
        print(how_to_open([logger]), flush=True)


def set_up(args: argparse.Namespace, phases: Sequence[Phase], out: Path) -> TrainingRun:
    """Make network, loaders, optimizer and schedule, or restore them from a checkpoint."""
    started_at = time.perf_counter()
    hardware.tune_glibc_malloc()
    hardware.use_ieee_float32()
    utils.seed_everything(args.seed)
    begun_from = read_init_weights(args)
    if args.step == "compiled" and distributed.get_world_size() > 1:
        raise SetupError("--step compiled is for one process: leave out --step or torchrun")
    schedule = utils.schedule_settings(args)
    checkpoint, is_own = distributed.run_on_rank0_and_broadcast(
        lambda: find_checkpoint(args, out, schedule)
    )
    args.precision = settled_precision(args.precision, args.device, checkpoint)
    args.winograd = settled("winograd", args.winograd, checkpoint)
    dataset = utils.load_dataset(args)
    n_before = math.inf if args.train_subset else len(dataset.train_images)  # inf: not known
    warn_of_holdout(begun_from, args, n_before)
    loaders = make_loaders(dataset, args)
    config = make_config(args, loaders.train.n_images_in_batch(0), dataset.num_classes)
    set_compile(False)  # what is tried out on two images compiles nothing
    state = make_state(args, dataset, phases)
    compiled = utils.choose_kernels(args)
    run_id = new_run_id()
    if checkpoint:
        continue_from(checkpoint, state, args, phases, len(loaders.train), is_own)
        run_id = checkpoint["run_id"] or run_id
        started_at -= checkpoint["seconds"]
    elif args.init_weights:
        load_init_weights(args, state, dataset.num_classes)
    if not is_own:
        distributed.run_on_rank0_and_broadcast(lambda: keep_older_files(args, out))

    plan = describe_plan(args, phases, state.steps, config.dtype, compiled, state.net)
    settings = {**vars(args), "plan": plan}
    logger = WandbLogger(args, "train", args.run_name, settings, run_id)
    print(f"{args.run_name}: {args.model} on {args.dataset}; {plan}", flush=True)
    record = {"settings": settings, "run_id": run_id, "classes": dataset.classes}
    return TrainingRun(
        args=args,
        out=out,
        started_at=started_at,
        state=state,
        config=config,
        loaders=loaders,
        record=record | describe_environment(),
        logger=logger,
    )


def keep_older_files(args: argparse.Namespace, out: Path) -> None:
    """Rename what an earlier run left under this one's names, which is about to begin.

    With --resume only where weights are there: else this run itself may have been stopped early.
    """
    if not args.resume or Path(f"{out}.pt").exists():
        files = [(name, suffix) for name in run_names(args, out) for suffix in io.RUN_FILE_SUFFIXES]
        io.backup_existing(files)


def read_init_weights(args: argparse.Namespace) -> list[WeightsFile]:
    """Return the file of --init_weights, if it is given, whose network may be the run's."""
    if not args.init_weights:
        return []
    file = WeightsFile(Path(args.init_weights), read_record(Path(args.init_weights)))
    args.model = utils.model_of_file(args.model, file)
    return [file]


def load_init_weights(args: argparse.Namespace, state: TrainState, num_classes: int) -> None:
    """Read the file of --init_weights into the network; FileError where it does not fit."""
    weights = Path(args.init_weights)
    io.load_weights(state.net, weights, num_classes, args.new_head)
    check_loaded_weights(state.net, weights, state.infinite)


def log_epoch(training: TrainingRun, phase: Phase) -> None:
    """Log and print the epoch that is done, which was one of that phase, and write the record."""
    state, config, logger = training.state, training.config, training.logger
    history = state.progress.history
    entry = history[-1]
    for regularizer in utils.make_tracked_regularizers(training.args):
        fixed_batch = training.loaders.fixed_batch
        means = evaluate(state.net, config.criterion, fixed_batch, config.dtype, regularizer)
        entry[f"track_{regularizer.name}"] = means[regularizer.name]
    logger.log(entry)
    logger.summarize(state.progress.best_epoch())
    with io.warn_on_error(f"{training.out}.json was not written, training continues"):
        tqdm.write(epoch_line(entry, phase.regularizer and phase.regularizer.name))
        # the weights of a finished run that this one extends keep their record until it has its own
        if not Path(f"{training.out}.pt").exists():
            io.save_json({**training.record, "history": history}, Path(f"{training.out}.json"))
    if training.args.watch and state.progress.epoch == 1 and logger.histogram_seconds:
        tqdm.write(
            f"histograms took {logger.histogram_seconds:.1f} s of this epoch's "
            f"{entry['epoch_seconds']:.1f} s: --watch_freq N logs them every N batches only"
        )


def finish(training: TrainingRun) -> None:
    """Save the weights and the record with the final accuracy, which is float32's, and log it."""
    state, out, test_loader = training.state, training.out, training.loaders.test
    measured = evaluate(state.net, training.config.criterion, test_loader)
    final = {f"final_{key}": value for key, value in measured.items()}
    io.save_weights(state.net, Path(f"{out}.pt"))
    if state.average is not None:
        final |= finish_average(training)
    learned = {}
    if state.steps is not None:
        learned = {"learned_steps": state.steps.record()}
        with state.steps.quantized(state.net):
            measured = evaluate(state.net, training.config.criterion, test_loader)
        print(f"quantized with the learned steps: accuracy {measured['accuracy']:.2%}")
        final |= {f"quantized_{key}": value for key, value in measured.items()}
    seconds = time.perf_counter() - training.started_at
    history = state.progress.history
    record = {**training.record, **final, **learned, "seconds": seconds, "history": history}
    io.save_json(record, Path(f"{out}.json"))
    training.logger.log({"epoch": training.config.n_epochs, **final})
    training.logger.summarize({**state.progress.best_epoch(), "total_seconds": seconds})
    if artifact := training.logger.log_weights(Path(f"{out}.pt")):
        io.save_json({**record, "artifact": artifact}, Path(f"{out}.json"))
    images = "held-out" if training.args.holdout else "test"
    print(f"{images} accuracy {final['final_accuracy']:.2%} in float32; {seconds:.1f} s in all")
    print(f"saved {out}.pt and {out}.json")
    chance = math.log(training.loaders.num_classes)  # the loss of equal probabilities
    if measured["loss"] > DIVERGED_LOSS_RATIO * chance:  # of the network as it was trained
        print(
            f"the training diverged: the loss is {measured['loss']:.3g}, that of guessing is "
            f"{chance:.3g}; a smaller learning rate or λ may help"
        )


def finish_average(training: TrainingRun) -> dict[str, float]:
    """Save the averaged weights and record; return "ema_loss" and "ema_accuracy", in float32."""
    out, average, loaders = f"{training.out}_ema", training.state.average, training.loaders
    net = averaged_network(average, (x for x, _ in loaders.bn.batches(0)))
    measured = evaluate(net, training.config.criterion, loaders.test)
    io.save_weights(net, Path(f"{out}.pt"))
    final = {f"final_{key}": value for key, value in measured.items()}
    steps = {"averaged_steps": average.n_averaged.item(), "bn_images": loaders.bn.n_images}
    io.save_json({**training.record, **final, **steps}, Path(f"{out}.json"))
    print(f"saved {out}.pt and {out}.json: averaged weights, accuracy {measured['accuracy']:.2%}")
    return {f"ema_{key}": value for key, value in measured.items()}


# --- what a run is made of -------------------------------------------------------------------


def make_config(args: argparse.Namespace, n_images: int, num_classes: int) -> FitConfig:
    """Return what the flags say of the loop, whose batches have `n_images`, the last one fewer.

    Raises SetupError for a loss that cannot be trained with, or not in several processes.
    """
    criterion = utils.make_criterion(args.criterion, args.label_smoothing)
    if not check_criterion(args.criterion, criterion, num_classes):
        no_mean = f"--criterion {args.criterion} is no mean over images"
        if distributed.get_world_size() > 1:
            raise SetupError(f"{no_mean}, of which each process has some: train in one process")
        print(f"{no_mean}: losses of an epoch and of the test set are means over batches")
    return FitConfig(
        n_epochs=args.n_epochs,
        criterion=criterion.to(args.device),
        dtype=hardware.resolve_precision(args.precision, args.device),
        test_penalty=not args.no_test_penalty,
        difference_step=utils.difference_step(args),
        freeze_bn_from=args.freeze_bn_from,
        compiled_step=CompiledStep(n_images) if args.step == "compiled" else None,
    )


def run_names(args: argparse.Namespace, out: Path) -> list[Path]:
    """Return the run's files without their suffixes: with --ema the average has a name, too."""
    return [out] if args.ema is None else [out, Path(f"{out}_ema")]


@dataclass(frozen=True)
class Loaders:
    """The batches of a run, of the training images as they are but for `train`."""

    train: Loader  # augmented and shuffled; of several processes, this one's share
    test: Loader
    fixed_batch: Loader  # of the first training images: what --track is measured on
    bn: Loader | None  # for the batch-norm statistics of averaged weights
    num_classes: int

    def close(self) -> None:
        """End their processes."""
        for loader in filter(None, (self.train, self.test, self.fixed_batch, self.bn)):
            loader.close()


def make_loaders(dataset: ImageDataset, args: argparse.Namespace) -> Loaders:
    """Return the loaders; SetupError where the flags ask for too many images."""
    make_loader = utils.loader_maker(args, dataset)
    images = dataset.train_images
    labels = dataset.train_labels
    world_size = distributed.get_world_size()
    ranks = {"rank": distributed.get_rank(), "world_size": world_size}
    train = make_loader(images, labels, seed=args.seed, augment=True, shuffle=True, **ranks)
    if (smallest := train.n_images_in_batch(len(train) - 1)) < world_size:
        raise SetupError(
            f"a batch of {smallest} images, the last of an epoch, for {world_size} "
            "processes: choose another --batch_size or --train_subset"
        )
    if args.penalty_every > len(train):
        raise SetupError(f"--penalty_every {args.penalty_every}: an epoch has {len(train)} batches")
    n_penalized = math.ceil(len(train) / args.penalty_every)
    if (factor := n_penalized * args.penalty_every / len(train)) > 1.05:
        print(
            f"--penalty_every {args.penalty_every}: in {n_penalized} of the {len(train)} batches "
            f"of an epoch, which is {factor:.3g} times the penalty of every batch"
        )
    n_batches = args.n_epochs * len(train)
    if args.watch and args.watch_freq > n_batches:
        raise SetupError(f"--watch_freq {args.watch_freq}: the run has {n_batches} batches")
    n_bn = args.recalibrate_bn_images or min(MAX_BN_IMAGES, len(images))
    if n_bn > len(images):
        raise SetupError(f"--recalibrate_bn_images {n_bn}: there are {len(images)} training images")
    n_bn = utils.without_single_image(n_bn, args.batch_size)
    n = args.batch_size
    return Loaders(
        train=train,
        test=make_loader(dataset.test_images, dataset.test_labels, cache=True),
        fixed_batch=make_loader(images[:n], labels[:n], cache=True),
        bn=None if args.ema is None else make_loader(images[:n_bn], labels[:n_bn]),
        num_classes=dataset.num_classes,
    )


def make_state(
    args: argparse.Namespace, dataset: ImageDataset, phases: Sequence[Phase]
) -> TrainState:
    """Make the network, SGD and the learning-rate schedule that the flags say."""
    image_shape = dataset.test_images.shape[1:]
    net = utils.make_net(
        args.model, dataset.num_classes, args.device, args.width, args.memory_format, image_shape
    )
    check_trainable(net)
    n_activations = check_network(net, image_shape, dataset.num_classes)
    n_left_over = [len(x) % args.batch_size for x in (dataset.train_images, dataset.test_images)]
    if 1 in n_left_over:
        check_network(net, image_shape, dataset.num_classes, n_images=1)
    if args.freeze_bn_from is not None and not count_batch_norms(net):
        print(f"{args.model}: --freeze_bn_from has no effect: there are no batch norms")
    if penalized := [p.regularizer for p in phases if p.regularizer]:
        check_network_for(penalized, net, image_shape, n_activations, args)
    try_penalties(net, penalized, image_shape, args)
    steps = None
    if args.qat_bits is not None:
        bits = utils.qat_bit_widths(args.qat_bits)
        options = {"keep_first_last": args.keep_first_last, "first_epoch": args.qat_from}
        steps = make_steps(net, image_shape, *bits, **options)
        if steps.float_inputs:
            names = ", ".join(steps.float_inputs)
            print(f"--qat_bits: inputs that no module of their own takes stay in float: {names}")
    decay = args.weight_decay
    groups = parameter_groups(net, steps)
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=decay, fused=True)
    scheduler = utils.make_scheduler(
        args.scheduler, optimizer, args.gamma, args.milestones, args.n_epochs
    )
    if distributed.get_world_size() > 1:
        set_sync_bn(net, args.sync_bn)
    elif not args.sync_bn:
        print("--no-sync_bn has no effect: there is one process")
    average = None if args.ema is None else make_average(net, args.ema)
    infinite = not_finite(net)  # before training, as a mask
    return TrainState(net, optimizer, scheduler, average=average, steps=steps, infinite=infinite)


def check_trainable(net: nn.Module) -> None:
    """Raise NetworkError where parameters are such as training cannot have."""
    name, dtype = type(net).__name__, image_dtype(net)
    if dtype != torch.float32:
        raise NetworkError(
            f"{name} is of {str(dtype).removeprefix('torch.')}, and images are of float32: build "
            "it in that (--precision bf16 rounds its convolutions)"
        )
    if not trainable_parameters(net):
        raise NetworkError(f"{name}: all parameters are frozen, nothing to train")
    for key, module in net.named_modules():
        is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if is_embedding and module.sparse and module.weight.requires_grad:
            raise NetworkError(f"{name}: {key} has sparse gradients, which SGD here does not take")


def check_network_for(
    penalized: Sequence[Regularizer],
    net: nn.Module,
    image_shape: Sequence[int],
    n_activations: int,
    args: argparse.Namespace,
) -> None:
    """Print what of the network is not penalized; NetworkError where it cannot be trained so."""
    inputs = {name for regularizer in penalized for name in regularizer.inputs}
    if computed := computed_weights(net):
        print(f"{args.model}: computed weights are not penalized: {', '.join(computed)}")
    if others := unpenalized_parameters(net):
        print(
            f"{args.model}: only weights of nn.Conv2d and nn.Linear are penalized, "
            f"not {first_names(others)}"
        )
    if any(map(needs_double_backward, penalized)):
        check_derivatives(net, image_shape, second=utils.difference_step(args) is None)
    if "a_grads" in inputs and n_activations == 0:
        print(
            f"{args.model} has no activation modules, and functions such as F.relu are not seen: "
            "gradients of activations are not penalized"
        )


def try_penalties(
    net: nn.Module,
    penalized: Sequence[Regularizer],
    image_shape: Sequence[int],
    args: argparse.Namespace,
) -> None:
    """Try these and the tracked regularizers; print how many batch norms one cannot fold.

    Raises NetworkError or PenaltyError where one cannot be computed: see `check_penalty`.
    """
    tracked = utils.make_tracked_regularizers(args)
    regularizers = [*penalized, *tracked]
    if regularizers and not penalized_weights(net):
        raise NetworkError(f"{type(net).__name__}: all weights are frozen, nothing to penalize")
    of_folded = [r.name for r in regularizers if "folded_weights" in r.inputs]
    if of_folded and (unfolded := describe_unfolded(net, image_shape, of_folded[0])):
        print(f"{args.model}: {unfolded}")
    for regularizer in penalized:
        step = utils.difference_step(args)
        check_penalty(net, regularizer, image_shape, difference_step=step)
    for regularizer in tracked:
        check_penalty(net, regularizer, image_shape, is_minimized=False)


# --- the script ------------------------------------------------------------------------------


def validate_and_run(
    parser: Parser, args: argparse.Namespace, phases: Sequence[Phase], epoch_flags: str
) -> None:
    """Check what the flags say together, before anything is fetched or trained, and run.

    `epoch_flags` are those that say when phases begin.
    """
    out = output_path(parser, args)
    with parser.reporting_value_errors():
        utils.make_tracked_regularizers(args)
        io.check_writable(Path(f"{out}.pt"))
    of_this_run = {
        "regularizers": [p.regularizer for p in phases if p.regularizer],
        "models": [args.model],
        "has_checkpoint": args.resume and os.path.lexists(f"{out}.ckpt"),  # which has its weights
    }
    warn_unused_flags(parser, args, parser.flags, **of_this_run)
    refuse_flags(parser, args, parser.flags, **of_this_run)
    phases = reachable_phases(parser, args, phases, epoch_flags)
    phases = [replace(p, warmup=args.lmbda_warmup, every=args.penalty_every) for p in phases]
    if args.save_preregularized_model:
        first = next((p for p in phases if p.regularizer), None)
        save_as = Path(f"{out}_preregul.pt")
        phases = [replace(p, save_as=save_as) if p is first else p for p in phases]

    def hint() -> str:
        has_checkpoint = os.path.lexists(f"{out}.ckpt")
        return f"; --resume continues from {out}.ckpt" if has_checkpoint else ""

    with (
        exit_codes(parser, hint),
        GracefulShutdown() as shutdown,
        distributed.process_group(args.device),
        ExitStack() as locks,
    ):
        if distributed.get_rank() == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
        for name in run_names(args, out):
            locks.enter_context(io.run_lock(name))
        hardware.print_device(args.device)
        args.resume = distributed.is_restart_here() or args.resume
        run(args, phases, out, shutdown)


def reachable_phases(
    parser: Parser, args: argparse.Namespace, phases: Sequence[Phase], epoch_flags: str
) -> list[Phase]:
    """Return the phases that begin within the run; name later epochs in one warning line.

    Another names those phases that end before --lmbda_warmup does.
    """
    late = [f"{epoch_flags} {p.start}" for p in phases if p.start >= args.n_epochs]
    late += [f"milestone {epoch}" for epoch in utils.late_milestones(args)]
    if (args.freeze_bn_from or 0) >= args.n_epochs:
        late.append(f"--freeze_bn_from {args.freeze_bn_from}")
    if late and distributed.get_rank() == 0:
        reason = f"never reached, the last epoch is {args.n_epochs - 1}"
        print(f"{parser.prog}: {reason}: {', '.join(late)}", file=sys.stderr)
    phases = [p for p in phases if p.start < args.n_epochs] or [Phase(0)]
    ends = [*(p.start for p in phases[1:]), args.n_epochs]
    lengths = [end - p.start for p, end in zip(phases, ends, strict=True) if p.regularizer]
    short = [str(length) for length in lengths if length < args.lmbda_warmup]
    if short and distributed.get_rank() == 0:
        reason = f"never reached, a phase ends after {', '.join(short)} epochs"
        what = f"the whole λ, at the end of --lmbda_warmup {args.lmbda_warmup:g}"
        print(f"{parser.prog}: {reason}: {what}", file=sys.stderr)
    return phases


def output_path(parser: Parser, args: argparse.Namespace) -> Path:
    """Return the run's files without their suffix; end the program where that is no file name."""
    name = (args.save_file or args.run_name).removesuffix(".pt")
    out = Path(name)
    if not name.isprintable() or name.endswith(("/", ".")) or not out.name:
        parser.error(f"{name!r} is not the name of a file")
    if not args.run_name.isprintable():
        parser.error(f"--run_name {args.run_name!r} is not the name of a run")
    return out


def default_name(args: argparse.Namespace, what: str) -> str:
    """Return the name of a run that was given none: in a sweep, one of its own."""
    model = args.model.replace(":", "_")  # which Windows has in no file name
    return "_".join(filter(None, (model, args.dataset, what, sweep_run_id())))


def make_parser() -> Parser:
    """Make the parser of train.py."""
    description = "Train a network with a regularizer that should make it survive quantization."
    return flags.make_parser(description, [*flags.TRAINING, *flags.ONE_PENALTY, *flags.common()])


def make_penalty(args: argparse.Namespace) -> Regularizer | None:
    """Return the regularizer that the flags name, or none; ValueError where there is no such."""
    options = utils.regularizer_options_from(args)
    options["only_weight_grads"] = args.no_activation_gradients
    accepted = accepted_options(args.regularizer, options)
    return make_regularizer(args.regularizer, args.lmbda, **accepted)


def main(argv: Sequence[str] | None = None) -> None:
    """Train with at most two phases: without a regularizer, then with it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.reporting_value_errors("argument --regularizer: "):
        regularizer = make_penalty(args)
    args.regularizer = regularizer.name if regularizer else "none"
    args.run_name = args.run_name or default_name(args, args.regularizer)
    phases = [Phase(args.first_regularized_epoch, regularizer)] if regularizer else [Phase(0)]
    phases = phases if phases[0].start == 0 else [Phase(0), *phases]
    validate_and_run(parser, args, phases, "--first_regularized_epoch")


if __name__ == "__main__":
    main()
