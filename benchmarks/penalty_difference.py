"""How well a difference of gradients gives the gradient of a penalty of gradients.

Prints the cosine between the difference and the exact gradient in float32, over all parameters, and
the ratio of their norms: by penalty, kind of difference, relative step and precision. "one batch"
is the median over the batches of 128 training images, "mean" is of the means over all batches. For
a network that is trained so many epochs without a penalty (--epochs, learning rate --lr), and for
those in --weights. The last line is one JSON object.

    python benchmarks/penalty_difference.py [--epochs 0 1 9] [--weights weights/control.pt]
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import _root  # noqa: F401
import torch
from bf16_cosine import cosine, first_batches, gradient, train_loader
from torch import nn

import data
import flags
import train
import utils
from engine.system import cli, hardware
from engine.system.io import load_weights
from engine.training import train_state

PENALTIES = ("L1Grad", "L2Grad")
KINDS = {"one-sided": (1,), "central": (1, -1)}  # the steps of which the mean is taken


def networks(
    args: argparse.Namespace, dataset: data.ImageDataset
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the networks that the flags name, each with what it is."""
    torch.manual_seed(args.seed)
    net = utils.make_net(args.model, dataset.num_classes, args.device, args.width)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, 0.9, weight_decay=5e-4)
    scheduler = utils.make_scheduler("none", optimizer, 1.0, "default", 1)
    state, loader = train_state.TrainState(net, optimizer, scheduler), train_loader(dataset, args)
    config = train.FitConfig(
        max(args.epochs, default=0), dtype=hardware.resolve_precision("auto", args.device)
    )
    for n_epochs in sorted(args.epochs):
        while state.progress.epoch < n_epochs:
            for _ in train.run_epoch(state, loader, train.Phase(0), config):
                pass
            state.progress.next_epoch()
        yield f"{n_epochs} epochs", net
    for path in args.weights:
        load_weights(net, path)
        yield path.stem, net


def compare(net: nn.Module, penalty: str, batches: list, args: argparse.Namespace) -> Iterator:
    """Yield (kind, step, precision, cosine of one batch, cosine of the mean, ratio of norms)."""
    exact = [gradient(net, penalty, x, y, torch.float32).double() for x, y in batches]
    for precision, step, kind in product(args.precisions, args.steps, args.kinds):
        dtype = hardware.resolve_precision(precision, args.device)
        differences = [
            sum(gradient(net, penalty, x, y, dtype, sign * step).double() for sign in KINDS[kind])
            for x, y in batches
        ]
        cosines = [cosine(a, b) for a, b in zip(differences, exact, strict=True)]
        mean, exact_mean = sum(differences) / len(KINDS[kind]), sum(exact)
        ratio = (mean.norm() / exact_mean.norm()).item()
        yield kind, step, precision, statistics.median(cosines), cosine(mean, exact_mean), ratio


def main() -> None:
    """Print a table and one JSON line."""
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    count = cli.bounded_number(int, at_least=0)
    parser.add_flags(flags.NETWORK)
    add("--epochs", type=count, nargs="*", default=[0, 1, 9], help="epochs to train before")
    add("--lr", type=cli.bounded_number(float, above=0), default=0.1, help="learning rate there")
    add("--weights", type=Path, nargs="+", default=[], help=".pt files of trained networks")
    add("--batches", type=cli.bounded_number(int, at_least=1), default=6, help="how many")
    add(
        "--steps",
        type=cli.bounded_number(float, above=0),
        nargs="+",
        default=[0.001, 0.003, 0.01, 0.03, 0.1],
        help="relative steps",
    )
    add("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="which")
    add("--kinds", nargs="+", default=[*KINDS], choices=KINDS, help="of differences")
    add("--penalties", nargs="+", default=[*PENALTIES], help="names of regularizers")
    parser.add_flags(flags.DATA)
    args = parser.parse_args()
    dataset = data.load(args.dataset, args.data_dir, args.seed)
    batches = first_batches(dataset, args)
    result = {}
    print(f"{'network':<12}{'penalty':<8}{'kind':<11}{'step':<7}{'':<6}one batch  mean   norms")
    for name, net in networks(args, dataset):
        net.train()
        for penalty in args.penalties:
            for *what, one, mean, ratio in compare(net, penalty, batches, args):
                kind, step, precision = what
                result[f"{name}, {penalty}, {kind}, {step:g}, {precision}"] = [
                    round(value, 4) for value in (one, mean, ratio)
                ]
                print(
                    f"{name:<12}{penalty:<8}{kind:<11}{step:<7g}{precision:<6}{one:>9.4f}"
                    f"{mean:>7.4f}{ratio:>7.3f}",
                    flush=True,
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
