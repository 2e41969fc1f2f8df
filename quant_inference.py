"""Quantize saved weights with every scheme at every bit-width and report the accuracy drop.

`sweep` is the loop over schemes and bit-widths for one network; `run` loads the networks, sweeps
each of them and reports. The quantizers are in quant_utils.py.
"""

import argparse
import copy
import glob
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import quant_utils as qu
import utils
from analysis import figures, report
from analysis.quantization_plan import COLUMNS as PLAN_COLUMNS
from analysis.quantization_plan import plan_rows
from analysis.report import UNQUANTIZED, Results, Row, Trial
from analysis.taylor import parameter_change, taylor_terms
from data import ImageDataset
from engine import distributed
from engine.batch_norm import check_folding, fold_batch_norm, recalibrate_batch_norm
from engine.cli import (
    Parser,
    add_alias,
    add_choice,
    bounded_number,
    choice_ignoring_case,
    exit_codes,
    refuse_unused_flags,
    warn_unused_flags,
)
from engine.errors import DataError, FileError, NetworkError
from engine.evaluation import evaluate
from engine.hardware import MEMORY_FORMATS, PRECISIONS, resolve_precision
from engine.io import check_writable, load_weights
from engine.layers import quantizable_layers
from engine.loader import Loader
from engine.networks import check_network
from engine.signals import GracefulShutdown
from engine.tracking import WandbLogger, new_run_id

N_IMAGES = 512  # default of --calibration_images and --per_layer_images
FIRST_LAST_BITS = 8  # at least, with --keep_first_last
CALIBRATION_BATCH = 64  # images: ranges must not depend on --batch_size


@dataclass(frozen=True)
class Setup:
    """What every network of a run is measured with.

    The loaders of training images are None where the flags do not ask for them.
    """

    args: argparse.Namespace
    test: Loader
    calibration: Loader | None  # for the ranges of activations
    recalibration: Loader | None  # for batch-norm statistics of the quantized network
    expansion: Loader | None  # for the loss, one layer at a time
    fold: bool  # batch norms, before a network is evaluated: same outputs in half the time
    on_step: Callable[[], Any]  # called after each quantized network is measured


def make_setup(
    args: argparse.Namespace, dataset: ImageDataset, fold: bool, on_step: Callable[[], Any]
) -> Setup:
    """Make the loaders of the images that the flags ask for."""
    loader = partial(make_loader, args, dataset)
    n_bn_images = args.recalibrate_bn_images
    return Setup(
        args,
        test=loader(),
        calibration=loader(args.calibration_images, CALIBRATION_BATCH) if args.act_bits else None,
        recalibration=loader(n_bn_images) if n_bn_images else None,
        expansion=loader(args.per_layer_images) if args.per_layer else None,
        fold=fold,
        on_step=on_step,
    )


def make_loader(
    args: argparse.Namespace,
    dataset: ImageDataset,
    n_train: int | None = None,
    batch_size: int | None = None,
) -> Loader:
    """Return the test images, or the first n_train training images, normalized once and cached."""
    images, labels = dataset.test_images, dataset.test_labels
    if n_train is not None:
        images, labels = dataset.train_images[:n_train], dataset.train_labels[:n_train]
    return Loader(
        images,
        labels,
        batch_size or args.batch_size,
        dataset.mean,
        dataset.std,
        device=args.device,
        memory_format=MEMORY_FORMATS[args.memory_format],
        cache=True,
    )


def image_batches(loader: Loader) -> Iterator[Tensor]:
    """Yield the loader's batches without labels."""
    return (x for x, _ in loader.batches(0))


# --- the sweep -------------------------------------------------------------------------------


def sweep(name: str, net: nn.Module, setup: Setup) -> Iterator[Row]:
    """Yield the rows of one network: unquantized, then every scheme at every bit-width."""
    args = setup.args
    full = measure(
        prepare_for_eval(net, args.device, setup.fold, args.memory_format), setup.test, args
    )
    setup.on_step()
    yield report.make_row(name, UNQUANTIZED, 32, [Trial(**full)], full["accuracy"])
    ranges = activation_ranges(net, setup)
    if args.show_plan and distributed.get_rank() == 0:
        print(report.table(plan(name, net, ranges, setup), PLAN_COLUMNS), end="\n\n")
    for scheme, n_bits in scheme_bit_pairs(args):
        trials = [
            run_trial(net, scheme, n_bits, trial, ranges, setup)
            for trial in range(n_trials(scheme, args))
        ]
        yield report.make_row(
            name,
            scheme,
            n_bits,
            trials,
            full["accuracy"],
            levels=qu.n_levels(scheme, n_bits, args.overlapping),
            act_bits=activation_bits(n_bits, args) or 32,
        )


def run_trial(
    net: nn.Module,
    scheme: str,
    n_bits: int,
    trial: int,
    ranges: Mapping[str, qu.Range],
    setup: Setup,
) -> Trial:
    """Quantize a copy of the network and measure it on the test images."""
    args = setup.args
    quantizer = make_quantizer(scheme, args, trial)
    options = {**layer_options(args), "layer_bits": layer_bits(net, n_bits, setup)}
    net_q, errors = qu.quantize_model(net, quantizer, n_bits, **options)
    if setup.recalibration:
        net_q = net_q.to(args.device, memory_format=MEMORY_FORMATS[args.memory_format])
        recalibrate_batch_norm(net_q, image_batches(setup.recalibration))
    net_q = prepare_for_eval(net_q, args.device, setup.fold, args.memory_format)
    if ranges:
        act_bits = activation_bits(n_bits, args)
        qu.quantize_activations(net_q, act_bits, ranges, layer_bits(net, act_bits, setup))
    measured = measure(net_q, setup.test, args)
    setup.on_step()
    return Trial(**measured, squared_error=qu.model_error(errors, args.avg_in_layer))


def prepare_for_eval(
    net: nn.Module, device: str, fold: bool, memory_format: str = "channels_last"
) -> nn.Module:
    """Return a copy on the device, with batch norms folded into convolutions if `fold`.

    Folding weights that are quantized already changes no output, and halves the time.
    """
    net = fold_batch_norm(net) if fold else copy.deepcopy(net)
    return net.to(device, memory_format=MEMORY_FORMATS[memory_format])


def measure(net: nn.Module, loader: Loader, args: argparse.Namespace) -> dict[str, float]:
    """Return the mean "loss" (cross entropy) and the "accuracy" over the images."""
    dtype = resolve_precision(args.precision, args.device)
    return evaluate(net, nn.CrossEntropyLoss(), loader, dtype)


def activation_ranges(net: nn.Module, setup: Setup) -> dict[str, qu.Range]:
    """Return the range of each module's input, by name; none where activations stay as they are."""
    if setup.calibration is None:
        return {}
    args = setup.args
    net = prepare_for_eval(net, args.device, setup.fold, args.memory_format)
    return qu.calibrate(net, image_batches(setup.calibration), args.calibration, args.quantize_sums)


# --- what is quantized ------------------------------------------------------------------------


def one_image(setup: Setup) -> Tensor:
    """Return a batch of one image on the CPU, for finding out which layers run."""
    return next(image_batches(setup.test))[:1].cpu()


def layer_bits(net: nn.Module, n_bits: int, setup: Setup) -> dict[str, int]:
    """Return the bits of layers, by name, that have others than n_bits: --keep_first_last."""
    if not setup.args.keep_first_last:
        return {}
    return dict.fromkeys(qu.first_and_last(net, one_image(setup)), max(n_bits, FIRST_LAST_BITS))


def plan(
    name: str, net: nn.Module, ranges: Mapping[str, qu.Range], setup: Setup
) -> list[dict[str, Any]]:
    """Return what is quantized of the network, as rows: --show_plan."""
    args = setup.args
    shapes = qu.input_shapes(net, one_image(setup), args.quantize_sums)

    def all_bits(names: Iterable[str], numbers: Sequence[int]) -> dict[str, list[int]]:
        other = [layer_bits(net, n, setup) for n in numbers]
        return {key: [o.get(key, n) for o, n in zip(other, numbers, strict=True)] for key in names}

    return plan_rows(
        name,
        net,
        shapes,
        all_bits(quantizable_layers(net), args.bits),
        all_bits(ranges, [activation_bits(n, args) for n in args.bits] if ranges else []),
        ranges,
        biases=layer_options(args)["biases"],
        per_channel=args.per_channel,
    )


# --- what the flags say about a quantization -------------------------------------------------


def scheme_bit_pairs(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield every scheme with every bit-width."""
    return itertools.product(args.schemes, args.bits)


def quantizer_options(scheme: str) -> Set[str]:
    """Return the names of the arguments that the scheme's quantizer takes."""
    return inspect.signature(qu.QUANTIZERS[scheme]).parameters.keys()


def is_stochastic(scheme: str) -> bool:
    """Tell whether the scheme's quantizer draws random numbers."""
    return "generator" in quantizer_options(scheme)


def n_trials(scheme: str, args: argparse.Namespace) -> int:
    """Return how often a quantization is repeated: stochastic schemes only."""
    return args.trials if is_stochastic(scheme) else 1


def make_quantizer(scheme: str, args: argparse.Namespace, trial: int = 0) -> qu.Quantizer:
    """Return the scheme's quantizer with those flags that it takes; each trial has its own seed."""
    options = {**vars(args), "generator": torch.Generator().manual_seed(args.seed + trial)}
    names = options.keys() & quantizer_options(scheme)
    return partial(qu.QUANTIZERS[scheme], **{name: options[name] for name in names})


def layer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `quantize_layer` and `quantize_model`."""
    correction = qu.bias_correction if args.bias_correction else None
    correction = qu.mean_correction if args.mean_correction else correction
    return {"biases": not args.fold_bn, "correction": correction}


def activation_bits(n_bits: int, args: argparse.Namespace) -> int:
    """Return the bits of activations beside weights of n_bits; 0 leaves them as they are."""
    return n_bits if args.act_bits == "same" else args.act_bits or 0


# --- layer by layer --------------------------------------------------------------------------


def per_layer(name: str, net: nn.Module, setup: Setup) -> list[Row]:
    """Quantize the weights of one layer at a time; return a row for each quantization and layer.

    `accuracy_change` is on test images. `loss_change` is measured on training images; beside it are
    the terms of its Taylor expansion there, see analysis/taylor.py.
    """
    args = setup.args
    full = prepare_for_eval(net, args.device, setup.fold, args.memory_format)
    accuracy = measure(full, setup.test, args)["accuracy"]
    loss = measure(full, setup.expansion, args)["loss"]
    rows, deltas = [], []
    for (scheme, n_bits), layer in itertools.product(
        scheme_bit_pairs(args), quantizable_layers(net)
    ):
        net_q, error = quantize_one_layer(net, layer, make_quantizer(scheme, args), n_bits, args)
        deltas.append(parameter_change(net_q, net, layer))
        net_q = prepare_for_eval(net_q, args.device, setup.fold, args.memory_format)
        row = {"checkpoint": name, "scheme": scheme, "bits": n_bits, "layer": layer}
        row["accuracy_change"] = measure(net_q, setup.test, args)["accuracy"] - accuracy
        row["squared_error"] = error
        row["loss_change"] = measure(net_q, setup.expansion, args)["loss"] - loss
        rows.append(row)
        setup.on_step()
    expansions = taylor_terms(copy.deepcopy(net).to(args.device), setup.expansion, deltas)
    return [row | terms._asdict() for row, terms in zip(rows, expansions, strict=True)]


def quantize_one_layer(
    net: nn.Module, name: str, quantizer: qu.Quantizer, n_bits: int, args: argparse.Namespace
) -> tuple[nn.Module, float]:
    """Return a copy of the network with one layer quantized, and the squared error."""
    net_q = copy.deepcopy(net)
    layer = net_q.get_submodule(name)
    error = qu.quantize_layer(layer, quantizer, n_bits, **layer_options(args))
    layers = [qu.LayerError(name, error, layer.weight.numel())]
    return net_q, qu.model_error(layers, args.avg_in_layer)


# --- files -----------------------------------------------------------------------------------


def resolve_paths(patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files that the patterns mean, by name.

    The name is that of the file without .pt, or its path where two files share that. A pattern
    without a match stays as it is: reading it then says that it is missing.
    """
    paths: list[Path] = []
    for pattern in patterns:
        matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        paths += map(Path, matches or [pattern])
    paths = list(dict.fromkeys(paths))
    stems = [path.name.removesuffix(".pt") for path in paths]
    return {
        stem if stems.count(stem) == 1 else str(path): path
        for stem, path in zip(stems, paths, strict=True)
    }


def load_networks(
    paths: Mapping[str, Path], args: argparse.Namespace, dataset: ImageDataset
) -> tuple[dict[str, nn.Module], bool]:
    """Return the networks of all files that can be read, and whether their batch norms fold.

    For other files an error is printed. Raises NetworkError as `is_foldable` does.
    """
    foldable, nets = is_foldable(args, dataset), {}
    for name, path in paths.items():
        try:
            nets[name] = load_network(path, args, dataset, foldable)
        except FileError as error:
            print_error(error)
    return nets, foldable


def is_foldable(args: argparse.Namespace, dataset: ImageDataset) -> bool:
    """Tell whether batch norms of the model can be folded; NetworkError if not, with --fold_bn."""
    net = utils.make_net(args.model, dataset.num_classes, "cpu", args.width)
    check_network(net, dataset.test_images.shape[1:], dataset.num_classes)
    try:
        n_left = check_folding(net, dataset.test_images.shape[1:])
    except NetworkError:
        if args.fold_bn:
            raise
        return False
    if n_left and args.fold_bn:
        print(f"{n_left} batch norms of {args.model} do not follow a convolution alone: they stay")
    return True


def load_network(
    path: Path, args: argparse.Namespace, dataset: ImageDataset, foldable: bool
) -> nn.Module:
    """Return the network with the file's weights, folded with --fold_bn, in eval mode on the CPU.

    Quantizing on the CPU gives the same grids whatever the device. Raises FileError where the file
    does not hold weights of this network, or they are not finite, folded or not.
    """
    net = utils.make_net(args.model, dataset.num_classes, "cpu", args.width).eval()
    load_weights(net, path)
    for key, value in net.state_dict().items():
        if not value.isfinite().all():
            raise FileError(f"{path}: {key} holds NaN or infinite values")
    if not foldable:
        return net
    folded = fold_batch_norm(net)
    if not all(p.isfinite().all() for p in folded.parameters()):
        raise FileError(
            f"{path}: folding overflows: a batch norm has a negative or vast "
            "variance, or weights are vast"
        )
    return folded if args.fold_bn else net


def check_n_images(args: argparse.Namespace, explicit_flags: Set[str], n_train: int) -> None:
    """Raise DataError where a flag asks for more training images than there are.

    A default that does is lowered to their number.
    """
    for flag in ("recalibrate_bn_images", "calibration_images", "per_layer_images"):
        n_images = getattr(args, flag)
        if n_images and n_images > n_train:
            if flag in explicit_flags:
                raise DataError(f"--{flag} {n_images}: there are {n_train} training images")
            setattr(args, flag, n_train)


def print_error(message: object) -> None:
    """Print one line about a file on rank 0; the others are evaluated all the same."""
    if distributed.get_rank() == 0:
        print(f"quant_inference.py: error: {message}", file=sys.stderr)


# --- a run -----------------------------------------------------------------------------------


def run(args: argparse.Namespace, explicit_flags: Set[str], folder: Path) -> bool:
    """Measure every file and report into the folder; return whether all could be measured."""
    paths, results = resolve_paths(args.checkpoints), Results()
    if not any(path.exists() for path in paths.values()):
        raise FileError(f"{', '.join(map(str, paths.values()))}: no such file")
    dataset = utils.load_dataset(args)
    check_n_images(args, explicit_flags, len(dataset.train_images))
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    nets, foldable = distributed.run_on_rank0_and_broadcast(
        lambda: load_networks(paths, args, dataset)
    )
    total = sum(n_steps(net, args) for net in nets.values())
    hidden = True if distributed.get_rank() else None  # None: where there is no terminal
    try:
        with tqdm(total=total, unit="network", disable=hidden, leave=False) as bar:
            fold = foldable and not args.fold_bn  # what is folded already is not folded again
            setup = make_setup(args, dataset, fold, bar.update)
            for name, net in nets.items():
                bar.set_description(name)
                measure_file(name, net, paths[name], setup, results)
    finally:  # an interruption loses nothing that was measured before it
        if results.rows and distributed.get_rank() == 0:
            report_results(results, nets, args, folder)
    return distributed.get_rank() > 0 or results.checkpoints() == paths.keys()


def n_steps(net: nn.Module, args: argparse.Namespace) -> int:
    """Return how often `on_step` is called for the network."""
    steps = 1 + sum(n_trials(scheme, args) for scheme, _ in scheme_bit_pairs(args))
    if args.per_layer:
        steps += len(list(scheme_bit_pairs(args))) * len(quantizable_layers(net))
    return steps


def measure_file(name: str, net: nn.Module, path: Path, setup: Setup, results: Results) -> None:
    """Add the rows of one network to the results; if it cannot be quantized, print why instead."""
    try:
        for row in sweep(name, net, setup):
            results.rows.append(row)
        if setup.args.per_layer:
            results.layer_rows += per_layer(name, net, setup)
    except ValueError as error:
        results.discard(name)
        print_error(f"{path}: {error}")


def report_results(
    results: Results, nets: Mapping[str, nn.Module], args: argparse.Namespace, folder: Path
) -> None:
    """Print the tables, write files and plots into the folder, and log all to the dashboard."""
    rows, layer_rows = results.rows, results.layer_rows
    print(report.table(rows, report.PRINTED_COLUMNS + ("act_bits",) * bool(args.act_bits)))
    if layer_rows:
        print(f"\none layer at a time; loss on {args.per_layer_images} training images")
        print(report.table(layer_rows, report.LAYER_COLUMNS))
    settings = {**vars(args), "output": str(folder)}
    report.save_tables(rows, layer_rows, settings, folder)
    measured = {name: net for name, net in nets.items() if name in results.checkpoints()}
    plots = {} if args.no_plots else draw_plots(rows, measured, args, folder)
    print(f"\nresults: {folder / 'results.csv'}, {folder / 'results.json'}")
    if plots:
        print("plots:   " + ", ".join(map(str, plots.values())))
    name = f"quantize_{next(iter(nets))}"
    logger = WandbLogger(args.wandb_project, args.wandb_entity, name, settings, new_run_id())
    report.log_results(logger, rows, layer_rows, plots)
    print(logger.finish())


def draw_plots(
    rows: Sequence[Row], nets: Mapping[str, nn.Module], args: argparse.Namespace, folder: Path
) -> dict[str, Path]:
    """Draw the plots into the folder and return their paths by title."""
    plots = {}
    if any(row["scheme"] != UNQUANTIZED for row in rows):  # else it was interrupted before
        plots["accuracy"] = folder / "accuracy.png"
        figures.accuracy_plot(rows, plots["accuracy"])
    n_bits = 4 if 4 in args.bits else min(args.bits)
    quantizers = {scheme: make_quantizer(scheme, args) for scheme in args.schemes}
    for name, net in nets.items():
        path = plots[f"weights/{name}"] = folder / f"weights_{name.replace('/', '_')}.png"
        figures.weights_plot(name, net, quantizers, n_bits, args.per_channel, path)
    return plots


# --- flags -----------------------------------------------------------------------------------


def bit_width(text: str) -> int:
    """Return a number of bits: an argparse type."""
    try:
        n_bits = int(text)
        qu.check_bits(n_bits)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 2 to 16") from error
    return n_bits


def act_bit_width(text: str) -> int | str:
    """Return a number of bits, or "same": an argparse type."""
    return "same" if text.lower() == "same" else bit_width(text)


def make_parser() -> Parser:
    """Make the parser of quant_inference.py."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="FILE", help=".pt files of weights, or globs of them")
    add_quantizer_arguments(parser.add_argument_group("what is quantized, and how"))
    add_repair_arguments(parser.add_argument_group("batch norms and corrections"))
    add_pwlq_arguments(parser.add_argument_group("pwlq"))
    add_activation_arguments(parser.add_argument_group("activations"))
    add_measurement_arguments(parser.add_argument_group("what is measured"))
    utils.add_data_arguments(parser)
    parser.set_defaults(batch_size=500)
    add_output_arguments(parser.add_argument_group("output"))
    utils.add_wandb_arguments(parser)
    group = parser.add_argument_group("flags of earlier versions, ignored")
    group.add_argument("--n_epochs", help="ignored: nothing is trained here")
    group.add_argument("--lr", help="ignored: nothing is trained here")
    return parser


def add_quantizer_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for network, schemes and bit-widths."""
    add = group.add_argument
    utils.add_network_arguments(group, "network whose weights the files hold")
    add(
        "--bits",
        type=bit_width,
        nargs="+",
        default=[4, 5, 6, 7, 8],
        metavar="N",
        help="bits of a weight, each from 2 to 16",
    )
    add(
        "--schemes",
        type=choice_ignoring_case(qu.QUANTIZERS),
        nargs="+",
        default=list(qu.QUANTIZERS),
        metavar="{" + ",".join(qu.QUANTIZERS) + "}",
        help="quantizers of weights; dorefa rounds at random, and pwlq has the levels of one bit "
        "more than it is given",
    )
    add(
        "--trials",
        type=bounded_number(int, at_least=1),
        default=3,
        metavar="N",
        help="repeat quantizers that round at random N times, each with a seed of its own",
    )
    add(
        "--per_channel",
        action="store_true",
        help="one range per output channel; without it one per layer",
    )
    add(
        "--keep_first_last",
        action="store_true",
        help="quantize the first and the last layer, and with --act_bits their inputs, to 8 bits "
        "where the others have fewer, as many papers do",
    )
    add(
        "--show_plan",
        action="store_true",
        help="print, layer by layer, which tensors are quantized, to how many bits, in which range",
    )


def add_repair_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for batch norms and for what repairs quantized weights."""
    add = group.add_argument
    add(
        "--fold_bn",
        action="store_true",
        help="fold batch norms into the convolutions first; biases then keep full precision",
    )
    add(
        "--recalibrate_bn_images",
        type=bounded_number(int, at_least=2),
        metavar="N",
        help="re-estimate batch-norm statistics of the quantized network on N training images; "
        "None: keep those of training",
    )
    add_alias(
        group,
        "--bn_images",
        "recalibrate_bn_images",
        action="store",
        type=bounded_number(int, at_least=2),
    )
    correction = group.add_mutually_exclusive_group()
    correction.add_argument(
        "--mean_correction",
        action="store_true",
        help="restore each output channel's mean after quantizing the weights",
    )
    correction.add_argument(
        "--bias_correction",
        action="store_true",
        help="restore each output channel's mean and standard deviation after quantizing the "
        "weights",
    )


def add_pwlq_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of piecewise linear quantization."""
    add = group.add_argument
    add_choice(
        group,
        "--distribution",
        [*qu.DISTRIBUTIONS, "search"],
        "norm",
        "breakpoint of least expected error for normal or Laplace weights, or of least measured "
        "error (search)",
    )
    add(
        "--approximate",
        action="store_true",
        help="breakpoint from the paper's closed form instead of the exact optimum",
    )
    add(
        "--overlapping",
        action="store_true",
        help="quantize the tails on the uniform grid of the whole range instead of grids of "
        "their own",
    )


def add_activation_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of activation quantization."""
    add = group.add_argument
    add(
        "--act_bits",
        type=act_bit_width,
        metavar="{2..16,same}",
        help="quantize the inputs of layers and pooling to so many bits, or to the weights' bits "
        "(same); None: leave them in full precision",
    )
    add(
        "--quantize_sums",
        action="store_true",
        help="with --act_bits, also quantize both inputs of every residual sum",
    )
    add_choice(
        group,
        "--calibration",
        qu.CALIBRATIONS,
        "topk_median",
        "range of an input: median of its 10 largest and smallest values, or all but 0.01 %% of "
        "values on each side, each averaged over batches, or the extremes",
    )
    add(
        "--calibration_images",
        type=bounded_number(int, at_least=1),
        default=N_IMAGES,
        metavar="N",
        help="training images that the ranges of inputs are taken from",
    )


def add_measurement_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for what is measured of quantized networks."""
    add = group.add_argument
    add(
        "--avg_in_layer",
        action="store_true",
        help="divide each layer's squared error by its number of weights",
    )
    add(
        "--per_layer",
        action="store_true",
        help="also quantize the weights of one layer at a time and expand the loss in their "
        "change; activations and batch-norm statistics then stay as they are",
    )
    add(
        "--per_layer_images",
        type=bounded_number(int, at_least=1),
        default=N_IMAGES,
        metavar="N",
        help="training images on which --per_layer measures and expands the loss",
    )
    add_choice(
        group,
        "--precision",
        PRECISIONS,
        "fp32",
        "precision of convolutions; bf16 is several times faster on new hardware, auto is bf16 "
        "there",
    )


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for files."""
    add = group.add_argument
    add(
        "--output",
        metavar="DIR",
        help="folder for tables and plots; None: that of the first file of weights",
    )
    add("--no_plots", action="store_true", help="write tables only, no plots")


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, ignore those without effect; sort bits and schemes.

    Activations and layers are measured in float32: another precision would round beside them.
    """
    is_fp32, has_pwlq = args.precision == "fp32", "pwlq" in args.schemes
    contradictions = (
        ("act_bits", "--precision fp32", is_fp32),
        ("per_layer", "--precision fp32", is_fp32),
    )
    refuse_unused_flags(parser, contradictions)
    requirements = (
        ("recalibrate_bn_images", "batch norms: leave out --fold_bn", not args.fold_bn),
        ("approximate", "pwlq among --schemes", has_pwlq),
        ("overlapping", "pwlq among --schemes", has_pwlq),
        ("distribution", "pwlq among --schemes", has_pwlq),
        ("approximate", "--distribution norm or laplace", args.distribution != "search"),
        ("trials", "a stochastic scheme", any(map(is_stochastic, args.schemes))),
        ("calibration", "--act_bits", args.act_bits),
        ("quantize_sums", "--act_bits", args.act_bits),
        ("calibration_images", "--act_bits", args.act_bits),
        ("per_layer_images", "--per_layer", args.per_layer),
        utils.width_requirement(args),
    )
    warn_unused_flags(parser, args, requirements)
    args.bits, args.schemes = sorted(set(args.bits)), list(dict.fromkeys(args.schemes))


def make_output_folder(parser: Parser, args: argparse.Namespace) -> Path:
    """Return the folder for results, made where it is missing; end with one line if it cannot be.

    Without --output it is that of the first file that exists.
    """
    paths = resolve_paths(args.checkpoints).values()
    first = next(filter(os.path.exists, paths), Path("."))
    folder = Path(args.output) if args.output else first.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "results.csv")
    except (OSError, ValueError) as error:
        parser.error(f"--output: {error}")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Quantize the files of the command line; exit with 1 if one could not be measured."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    for flag in ("n_epochs", "lr"):
        if getattr(args, flag) is not None:
            print(f"--{flag} is ignored: nothing is trained here")
    folder = make_output_folder(parser, args)
    with exit_codes(parser), GracefulShutdown(), distributed.process_group(args.device):
        is_complete = run(args, parser.explicit_flags, folder)
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    main()
