"""Train a network with a regularizer that should make it survive quantization."""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import data
import distributed
import files
import fused
import utils
from checkpoints import Checkpointer, Stopped, StopRequest, inherited, resumable
from regularizers import REGULARIZERS, Regularizer, make_regularizer, taken_by
from state import NotFiniteError, State, Training, measure, summarize
from step import first_order, loss_change, takes_gradients, update_gradients
from tracking import Tracker, describe_environment, new_run_id, sweep_run_id

LOOK_EVERY = 20  # batches, in a run of several processes


@dataclass(frozen=True)
class Phase:
    """From epoch `start` on (the first is 0), train with `regularizer`; None is the loss alone.

    With save_as, the weights are written there just before the phase begins. With a warmup, the
    penalty's factor rises linearly, batch by batch, from 0 to 1 over that many epochs.
    """

    start: int
    regularizer: Regularizer | None = None
    save_as: Path | None = None
    warmup: float = 0.0

    def strength(self, epochs: float) -> float:
        """Return the factor of the penalty when that many epochs of the whole run are done."""
        return min(1.0, (epochs - self.start) / self.warmup) if self.warmup else 1.0


# --- epochs ----------------------------------------------------------------------------------


def run_epoch(
    net: nn.Module, criterion: nn.Module, regularizer: Regularizer | None,
    optimizer: torch.optim.Optimizer, loader: data.Loader, state: State, dtype: torch.dtype,
    after_batch: Callable[[State], None], strength: Callable[[float], float] = lambda epochs: 1.0,
    freeze_bn: bool = False,
) -> dict[str, float]:
    """Train on the rest of the epoch; return its mean loss, penalty and accuracy.

    `strength` maps the epochs done, in fractions, to the penalty's factor. What a regularizer draws
    from torch's stream is a pure function of (seed, epoch, batch). With `freeze_bn` batch norms
    use their running statistics, and keep them.
    """
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(not freeze_bn)
    began, shown = time.perf_counter() - state.epoch_seconds, 0.0
    with tqdm(
        total=len(loader), initial=state.batch, desc=f"epoch {state.epoch}", unit="batch",
        disable=None if distributed.rank() == 0 else True, leave=False,
    ) as bar:
        for x, y in loader.batches(state.epoch, state.batch):
            torch.manual_seed(hash((loader.seed, state.epoch, state.batch)))
            factor = strength(state.epoch + state.batch / len(loader))
            n = loader.size(state.batch)  # of all processes
            with distributed.sharded(n):
                values = update_gradients(net, criterion, regularizer, x, y, dtype, factor)
            distributed.average(fused.own_statistics(net))
            state.rows.append(measure(net, n, *values))
            if x.device.type == "cpu" and not state.rows[-1].isfinite().all():
                summarize(net, regularizer, state)  # raises, before the weights are spoilt
            optimizer.step()
            state.batch += 1
            state.epoch_seconds = time.perf_counter() - began
            due = state.epoch_seconds - shown > 0.5
            if distributed.world_size() > 1:  # all look at the same batch: it may raise
                due = state.batch % LOOK_EVERY == 0
            if due:  # to look is to wait for the device
                shown = state.epoch_seconds
                bar.set_postfix(summarize(net, regularizer, state), refresh=False)
            bar.update()
            after_batch(state)
    return summarize(net, regularizer, state)


def evaluate(
    net: nn.Module, criterion: nn.Module, loader: data.Loader, dtype: torch.dtype = torch.float32,
    regularizer: Regularizer | None = None,
) -> dict[str, float]:
    """Return the loss and accuracy over the loader in evaluation mode, and the mean penalty.

    A penalty of gradients costs a first-order pass a batch; no graph of second order is made. What
    a regularizer draws from torch's stream is a pure function of the batch. Each of several
    processes takes every so many-th batch.
    """
    net.eval()
    inputs = regularizer.inputs if regularizer else ()
    folded = utils.folded_weights(net) if "folded_weights" in inputs else []
    totals = torch.zeros(3, dtype=torch.float64, device=loader.labels.device)
    first, step = distributed.rank(), distributed.world_size()
    for number, (x, y) in enumerate(loader.batches(0, first, step)):
        torch.manual_seed(first + number * step)
        if takes_gradients(regularizer):
            done = first_order(net, criterion, inputs, x, y, dtype)
            loss, n_correct, fed = done.loss, done.n_correct, done.tensors
        else:
            with torch.inference_mode(), utils.autocast(x.device, dtype):
                logits, _ = net(x)
                loss, n_correct = criterion(logits, y), (logits.argmax(dim=1) == y).sum()
            fed = {"weights": utils.penalized_weights(net)}
        penalty = torch.zeros_like(loss)
        if regularizer:
            fed["loss_change"] = partial(loss_change, net, criterion, x, y, dtype, loss, ())
            fed["folded_weights"] = folded
            with torch.no_grad():
                penalty = regularizer(*(fed[name] for name in inputs))
        totals += torch.stack([len(x) * loss, n_correct, len(x) * penalty])
    means = (distributed.total(totals) / loader.n_images).tolist()
    names = ["loss", "accuracy", *([regularizer.name] if regularizer else [])]
    return dict(zip(names, means, strict=False))


def active(phases: Sequence[Phase], epoch: int) -> Phase:
    """Return the phase that the epoch belongs to; before the first one there is no regularizer."""
    return [Phase(0), *(p for p in phases if p.start <= epoch)][-1]


def fit(
    net: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler, train_loader: data.Loader,
    test_loader: data.Loader, phases: Sequence[Phase], n_epochs: int, *,
    dtype: torch.dtype = torch.float32, test_penalty: bool = True,
    freeze_bn_from: int | None = None, state: State | None = None,
    after_batch: Callable[[State], None] = lambda state: None,
    after_epoch: Callable[[State], None] = lambda state: None,
) -> list[dict[str, Any]]:
    """Train until n_epochs are done, from `state` on; return the history, one entry an epoch.

    Args:
        net: returns (logits, activations).
        criterion: (logits, labels) -> mean loss.
        optimizer: steps once a batch.
        scheduler: steps once an epoch.
        train_loader: gives the batches of an epoch.
        test_loader: what `test_…` is measured on after every epoch.
        phases: in the order of their start.
        n_epochs: the whole run's length.
        dtype: of the convolutions; weights, statistics, losses and norms stay float32.
        test_penalty: whether to measure the penalty on the test set too.
        freeze_bn_from: the epoch from which on batch norms keep their running statistics.
        state: where to go on; None is the beginning.
        after_batch: called with the state after every batch.
        after_epoch: called with the state after every epoch, its history entry included.

    Raises:
        NotFiniteError: as soon as a loss, penalty or gradient that is not finite is seen.
    """
    state = state or State()
    while state.epoch < n_epochs:
        phase = active(phases, state.epoch)
        if phase.save_as and phase.start == state.epoch and state.batch == 0:
            files.save_weights(net, phase.save_as)
        lr = optimizer.param_groups[0]["lr"]
        began = time.perf_counter() - state.epoch_seconds
        train = run_epoch(
            net, criterion, phase.regularizer, optimizer, train_loader, state, dtype, after_batch,
            phase.strength, freeze_bn_from is not None and state.epoch >= freeze_bn_from,
        )
        images_per_second = train_loader.n_images / state.epoch_seconds
        test = evaluate(
            net, criterion, test_loader, dtype, phase.regularizer if test_penalty else None
        )
        if phase.regularizer and test_penalty:
            test[phase.regularizer.name] *= phase.strength(state.epoch + 1)
        for key, value in test.items():
            if not math.isfinite(value):
                raise NotFiniteError(f"epoch {state.epoch}: the test {key} is {value}")
        scheduler.step()
        state.history.append({
            "epoch": state.epoch,
            "lr": lr,
            **{f"train_{key}": value for key, value in train.items()},
            **{f"test_{key}": value for key, value in test.items()},
            "images_per_second": images_per_second,
            "epoch_seconds": time.perf_counter() - began,
        })
        state.epoch, state.batch, state.rows, state.epoch_seconds = state.epoch + 1, 0, [], 0.0
        after_epoch(state)
    return state.history


# --- the script ------------------------------------------------------------------------------


def make_loaders(dataset: data.Data, args: argparse.Namespace) -> Sequence[data.Loader]:
    """Return the loaders of the training set, augmented, of the test set, and of one fixed batch.

    The fixed batch, of the first training images as they are, is what --track is measured on.
    """
    common = {
        "batch_size": args.batch_size, "mean": dataset.mean, "std": dataset.std,
        "device": args.device, "memory_format": torch.channels_last,
    }
    train_loader = data.Loader(
        dataset.train_images, dataset.train_labels, seed=args.seed, augment=True, shuffle=True,
        rank=distributed.rank(), world_size=distributed.world_size(), **common,
    )
    if (smallest := train_loader.size(len(train_loader) - 1)) < distributed.world_size():
        raise distributed.SetupError(
            f"a batch of {smallest} images, the last of an epoch, for {distributed.world_size()} "
            "processes: choose another --batch_size or --train_subset")
    n = args.batch_size
    return (
        train_loader,
        data.Loader(dataset.test_images, dataset.test_labels, cache=True, **common),
        data.Loader(dataset.train_images[:n], dataset.train_labels[:n], cache=True, **common),
    )


def describe(
    args: argparse.Namespace, phases: Sequence[Phase], dtype: torch.dtype, compiled: bool
) -> str:
    """Return what will be done, as text: "no regularizer; from epoch 5: L2Grad; …"."""
    names = [p.regularizer.name if p.regularizer else "no regularizer" for p in phases]
    parts = [f"from epoch {p.start}: {name}" if p.start else name
             for p, name in zip(phases, names, strict=True)]
    parts.append(f"{str(dtype).removeprefix('torch.')} convolutions and "
                 f"{'compiled' if compiled else 'eager'} kernels on {args.device}")
    if args.holdout:
        parts.append(f"tested on {args.holdout} training images, held out")
    if (n := distributed.world_size()) > 1:
        whose = "the whole batch" if args.sync_bn else "each one's share"
        parts.append(f"{n} processes, batch-norm statistics of {whose}")
    return "; ".join(parts)


def summary_line(entry: dict[str, Any], penalty: str | None) -> str:
    """Return an epoch's history entry as a line of text, with the penalty of that name."""
    shown = f"  {penalty} {entry[f'train_{penalty}']:.4g}" if penalty else ""
    return (
        f"epoch {entry['epoch']}  lr {entry['lr']:.4g}"
        f"  train loss {entry['train_loss']:.4f}{shown}  accuracy {entry['train_accuracy']:.2%}"
        f"  test loss {entry['test_loss']:.4f}  accuracy {entry['test_accuracy']:.2%}"
        f"  {entry['images_per_second']:.0f} images/s  {entry['epoch_seconds']:.1f} s"
    )


def run(
    args: argparse.Namespace, phases: Sequence[Phase], out: Path, stop: StopRequest
) -> None:
    """Train as the flags and phases say; write <out>.pt and <out>.json, and log the run."""
    began = time.perf_counter()
    utils.keep_freed_memory()
    utils.seed_everything(args.seed)
    is_own, checkpoint = distributed.from_main(lambda: earlier(args, out))
    dataset = utils.load_dataset(args)
    train_loader, test_loader, fixed_batch = make_loaders(dataset, args)
    dtype = utils.resolve_precision(args.precision, args.device)
    compiled = fused.set_compile(args.compile)
    criterion = utils.make_criterion(args.criterion)
    training = Training.begin(args, dataset.num_classes)
    net, run_id = training.net, new_run_id()
    if any(p.regularizer and "folded_weights" in p.regularizer.inputs for p in phases):
        utils.check_folding(net, dataset)
    if distributed.world_size() > 1:
        fused.set_sync(net, args.sync_bn)
    if checkpoint:
        training.restore(checkpoint, args.n_epochs, len(train_loader))
        if not is_own:
            check_branch(training.state, phases, args)
        for p in phases if is_own else ():
            if p.save_as and p.start < training.state.n_begun and not p.save_as.exists():
                print(f"{p.save_as} cannot be saved any more: that epoch has begun")
        run_id, began = checkpoint["run_id"] or run_id, began - checkpoint["seconds"]
    if not args.resume:
        distributed.from_main(lambda: files.set_aside([(out, s) for s in files.SUFFIXES]))

    plan = describe(args, phases, dtype, compiled)
    settings = {**vars(args), "plan": plan}
    record = {"settings": settings, **describe_environment()}
    tracker = Tracker(args.wandb_project, args.wandb_entity, args.run_name, settings, run_id)
    print(f"{args.run_name}: {args.model} on {args.dataset}; {plan}", flush=True)

    def snapshot() -> dict[str, Any]:
        regularizer = active(phases, training.state.epoch).regularizer
        return {
            **training.snapshot(regularizer), "settings": vars(args), "run_id": run_id,
            "seconds": time.perf_counter() - began,
        }

    def after_batch(state: State) -> None:
        n_done = state.epoch * len(train_loader) + state.batch
        if args.watch and n_done % args.watch_freq == 0:
            tracker.log_histograms(net, state.epoch + state.batch / len(train_loader))
        checkpointer.after_batch()

    def after_epoch(state: State) -> None:
        for regularizer in utils.tracked(args):
            values = evaluate(net, criterion, fixed_batch, dtype, regularizer)
            state.history[-1][f"track_{regularizer.name}"] = values[regularizer.name]
        tracker.log(state.history[-1])
        regularizer = active(phases, state.epoch - 1).regularizer
        with files.told(f"{out}.json was not written, the training goes on"):
            tqdm.write(summary_line(state.history[-1], regularizer and regularizer.name))
            files.save_json({**record, "history": state.history}, Path(f"{out}.json"))
        checkpointer.after_epoch(state.epoch, is_last=state.epoch == args.n_epochs)

    checkpointer = Checkpointer(
        Path(f"{out}.ckpt"), snapshot, args.checkpoint_every, args.checkpoint_minutes, stop
    )
    try:
        with stop.deferred():
            history = fit(
                net, criterion, training.optimizer, training.scheduler, train_loader, test_loader,
                phases, args.n_epochs, dtype=dtype, test_penalty=not args.no_test_penalty,
                freeze_bn_from=args.freeze_bn_from, state=training.state,
                after_batch=after_batch, after_epoch=after_epoch,
            )
        final = evaluate(net, criterion, test_loader)  # in float32, whatever the training used
        final = {f"final_{key}": value for key, value in final.items()}
        files.save_weights(net, Path(f"{out}.pt"))
        seconds = time.perf_counter() - began
        files.save_json(
            {**record, **final, "seconds": seconds, "history": history}, Path(f"{out}.json")
        )
        tracker.log({"epoch": args.n_epochs, **final})
        where = "held-out" if args.holdout else "test"
        print(f"{where} accuracy {final['final_accuracy']:.2%} in float32; {seconds:.1f} s in all")
        print(f"saved {out}.pt and {out}.json")
    finally:
        print(tracker.finish(), flush=True)


def earlier(args: argparse.Namespace, out: Path) -> tuple[bool, dict[str, Any] | None]:
    """Return the checkpoint to go on from, if any, and whether it is of this very run."""
    own = resumable(args, out) if args.resume else None
    return own is not None, own or inherited(args)


def check_branch(state: State, phases: Sequence[Phase], args: argparse.Namespace) -> None:
    """Raise FileError where the checkpoint of --init_from lies beyond what is still to be done."""
    n_begun = state.n_begun
    where = f"{args.init_from} has {n_begun} epochs {'begun' if state.batch else 'done'}"
    if state.epoch >= args.n_epochs:
        raise files.FileError(f"{where}: --n_epochs {args.n_epochs} leaves nothing to train")
    for p in phases:
        if p.regularizer and p.start < n_begun:
            raise files.FileError(f"{where}: a regularizer cannot begin at epoch {p.start}")
    if args.freeze_bn_from and args.freeze_bn_from < n_begun:
        raise files.FileError(f"{where}: --freeze_bn_from {args.freeze_bn_from} is over")


def start(parser: utils.Parser, args: argparse.Namespace, phases: Sequence[Phase]) -> None:
    """Check what the flags say together, before anything is fetched or trained, and run.

    Bad flags end the program with exit code 2; bad data, files and numbers with 1; a signal with
    128 + its number. Each is told in one line.
    """
    name = (args.save_file or args.run_name).removesuffix(".pt")
    out = Path(name)
    if not name.isprintable() or name.endswith(("/", ".")) or not out.name:
        parser.error(f"{name!r} is not the name of a file")
    if not args.run_name.isprintable():
        parser.error(f"--run_name {args.run_name!r} is not the name of a run")
    phases = [replace(p, warmup=args.lmbda_warmup) for p in phases]
    first = next((p for p in phases if p.regularizer), None)
    utils.check_effect(parser, (
        ("milestones", "--scheduler multistep", args.scheduler == "multistep"),
        ("watch_freq", "--watch", args.watch),
        ("override", "--resume or --init_from", args.resume or args.init_from),
        ("lmbda_warmup", "a regularizer", first),
    ))
    starts = [("a phase starts at epoch", p.start) for p in phases]
    for what, epoch in [*starts, ("--freeze_bn_from", args.freeze_bn_from or 0)]:
        if epoch >= args.n_epochs:
            parser.error(f"{what} {epoch}: the run has epochs 0 to {args.n_epochs - 1} "
                         f"(--n_epochs {args.n_epochs})")
    if args.save_preregularized_model:
        if first is None:
            parser.error("--save_preregularized_model: no phase has a regularizer")
        before = replace(first, save_as=Path(f"{out}_preregul.pt"))
        phases = [before if p is first else p for p in phases]
    if args.init_from and not os.path.exists(args.init_from):
        parser.error(f"--init_from: there is no file {args.init_from}")
    try:
        f"{args.run_name} {out}".encode()  # will be printed: a UnicodeError is a ValueError
        utils.tracked(args)
        files.check_writable(Path(f"{out}.pt"))
    except ValueError as error:
        parser.error(str(error))
    try:
        with StopRequest() as stop, distributed.processes(args.device), files.only_run(out):
            args.resume = distributed.restarted() or args.resume
            run(args, phases, out, stop)
        return
    except distributed.SetupError as error:
        parser.error(str(error))
    except (files.FileError, utils.NetworkError, NotFiniteError) as error:
        distributed.leave_it_to_main()
        parser.stop(1, f"error: {error}", common=True)
    except data.DataError as error:
        parser.stop(1, f"error: {error}", common=not distributed.is_first_here())
    except (OSError, distributed.LostError) as error:
        code, said, common = 1, f"error: {error}", False
    except (Stopped, KeyboardInterrupt) as stopped:
        code, said, common = getattr(stopped, "code", 130), "stopped", True
    hint = f"; --resume goes on from {out}.ckpt" if os.path.lexists(f"{out}.ckpt") else ""
    parser.stop(code, said + hint, common)


def default_name(args: argparse.Namespace, what: str) -> str:
    """Return the name of a run that was given none: in a sweep, one of its own."""
    return "_".join(filter(None, (args.model, args.dataset, what, sweep_run_id())))


def make_parser() -> utils.Parser:
    """Make the parser of train.py."""
    parser = utils.Parser(__doc__)
    utils.add_training_arguments(parser)
    group = parser.add_argument_group("regularizer")
    names = ", ".join(["none", *REGULARIZERS])
    group.add_argument("--regularizer", default="none", help=f"{names}; <P> is 1, 2, 3, …")
    group.add_argument(
        "--lmbda", "--lambda", type=utils.number(float, at_least=0), default=0.01,
        help="λ, the factor of the penalty",
    )
    group.add_argument(
        "--first_regularized_epoch", type=utils.number(int, at_least=0), default=0, metavar="N",
        help="train N epochs without the penalty first",
    )
    group.add_argument(
        "--no_activation_gradients", action="store_true",
        help="of L<P>Grad: penalize the gradients of the weights only",
    )
    utils.add_regularizer_arguments(parser)
    utils.add_data_arguments(parser)
    utils.add_wandb_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train with at most two phases: without a regularizer, then with it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = utils.given_options(args) | {"only_weight_grads": args.no_activation_gradients}
    try:
        options = taken_by(args.regularizer, given)
        regularizer = make_regularizer(args.regularizer, args.lmbda, **options)
    except ValueError as error:
        parser.error(f"argument --regularizer: {error}")
    utils.check_options(parser, args, [args.regularizer])
    utils.check_effect(parser, [
        ("lmbda", "a --regularizer", regularizer),
        ("first_regularized_epoch", "a --regularizer", regularizer),
        ("no_activation_gradients", "--regularizer L<P>Grad", "only_weight_grads" in options),
    ])
    args.regularizer = regularizer.name if regularizer else "none"
    args.run_name = args.run_name or default_name(args, args.regularizer)
    phases = [Phase(args.first_regularized_epoch, regularizer)]
    start(parser, args, phases if phases[0].start == 0 else [Phase(0), *phases])


if __name__ == "__main__":
    main()
