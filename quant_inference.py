"""Quantize saved weights with every scheme at every bit-width and report the accuracy drop.

`sweep` is the loop over schemes and bit-widths for one network; `run` loads the networks, sweeps
each of them and reports. The quantizers are in quant_utils.py.
"""

import argparse
import copy
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import quant_utils as qu
import utils
from analysis import dashboard, deployment, distributions, figures, report, verification
from analysis.quantization_plan import COLUMNS as PLAN_COLUMNS
from analysis.quantization_plan import plan_rows
from analysis.report import FLOAT_BITS, UNQUANTIZED, Results, Row, Trial
from analysis.taylor import parameter_change, taylor_terms
from analysis.weights_files import WeightsFile, common_dataset, find_paths, find_weights
from data import DATASETS, ImageDataset
from engine import distributed
from engine.adaround import learn_rounding
from engine.batch_norm import check_folding, fold_batch_norm, recalibrate_batch_norm
from engine.cli import (
    Parser,
    Requirement,
    StoreFlat,
    add_alias,
    add_choice,
    bounded_number,
    choice_ignoring_case,
    exit_codes,
    refuse_unused_flags,
    warn_unused_flags,
)
from engine.equalization import equalize
from engine.errors import DataError, FileError, NetworkError
from engine.evaluation import evaluate
from engine.hardware import MEMORY_FORMATS, PRECISIONS, resolve_precision, use_ieee_float32
from engine.integer_layers import make_grid, make_integer_layer, with_integers
from engine.integer_network import IntegerNetwork, build, shared_ranges
from engine.io import check_writable, load_weights
from engine.layers import quantizable_layers
from engine.learned_steps import FIRST_LAST_BITS, LearnedSteps, read_steps
from engine.loader import Loader
from engine.network_graph import trace
from engine.networks import BATCH_NORMS, check_network
from engine.progress import StepDisplay
from engine.signals import GracefulShutdown
from models import is_model

PUBLISHED_SCHEMES = ("uniform", "dorefa", "pwlq")  # the default of --schemes
LEARNED = "lsq"  # as a row's scheme: the steps that --steps_from gives
N_IMAGES = 512  # default of --calibration_images and --per_layer_images
FILE_FLAGS = ("export", "verify", "save_quantized", "save_integers")  # of one quantized network
CALIBRATION_BATCH = 64  # images: ranges must not depend on --batch_size
N_ROUNDING_IMAGES, N_ROUNDING_STEPS = 1024, 500
ROUNDING_BATCH = 32  # images: what is learned must not depend on --batch_size
ROUNDINGS = ("nearest", "adaround")
BIASES = ("published", "weight", "full")  # see --biases
MAX_BASELINE_CHANGE = 0.01  # of accuracy since training: more than bfloat16 or another machine does


class LoadedNetwork(NamedTuple):
    """A network in eval mode on the CPU, and the file that its weights come from."""

    net: nn.Module
    model: str  # its name
    file: WeightsFile
    is_foldable: bool  # its batch norms


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
    rounding: Loader | None  # for learning to round weights
    fold: bool  # batch norms, before the network is evaluated: same outputs in half the time
    on_step: Callable[[], Any]  # called after each quantized network is measured
    # The last of `learned_rounding`: activations of all bit-widths and files to deploy share it.
    learned: dict[tuple[nn.Module, str, int], dict[str, Tensor]] = field(default_factory=dict)

    def prepare(self, net: nn.Module) -> nn.Module:
        """Return a copy of the network as it is evaluated."""
        return prepare_for_eval(net, self.args.device, self.fold, self.args.memory_format)

    def first_images(self, n: int) -> Tensor:
        """Return n test images on the CPU, for finding out which operations run."""
        return next(image_batches(self.test))[:n].cpu()


def make_setup(
    args: argparse.Namespace, dataset: ImageDataset, on_step: Callable[[], Any]
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
        rounding=(
            loader(args.rounding_images, ROUNDING_BATCH) if args.rounding == "adaround" else None
        ),
        fold=False,
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
    make = utils.loader_maker(args, dataset)
    return make(images, labels, batch_size=batch_size or args.batch_size, cache=True)


def image_batches(loader: Loader) -> Iterator[Tensor]:
    """Yield the loader's batches without labels."""
    return (x for x, _ in loader.batches(0))


# --- the sweep -------------------------------------------------------------------------------


class Quantization(NamedTuple):
    """One of the quantizations that the flags ask for; FLOAT_BITS are bits of full precision."""

    scheme: str
    n_bits: int
    act_bits: int = FLOAT_BITS


def sweep(name: str, net: nn.Module, setup: Setup) -> Iterator[Row]:
    """Yield the rows of one network: unquantized, then every quantization."""
    args = setup.args
    steps = read_steps(Path(args.steps_from), net) if args.steps_from else None
    full = measure(setup.prepare(net), setup.test, args)
    setup.on_step()
    yield report.make_row(name, UNQUANTIZED, FLOAT_BITS, [Trial(**full)], full["accuracy"])
    ranges = activation_ranges(net, setup)
    if args.show_plan and distributed.get_rank() == 0:
        print(report.table(plan(name, net, ranges, setup), PLAN_COLUMNS), end="\n\n")
    for quantization in quantizations(args):
        scheme, n_bits, act_bits = quantization
        trials = [
            run_trial(net, quantization, trial, ranges[act_bits], setup)
            for trial in range(n_trials(scheme, args))
        ]
        yield report.make_row(
            name,
            scheme,
            n_bits,
            trials,
            full["accuracy"],
            levels=qu.n_levels(scheme, n_bits, args.overlapping),
            act_bits=act_bits,
        )
    if steps:
        trial = run_learned(net, steps, setup)
        yield report.make_row(
            name,
            LEARNED,
            steps.weight_bits,
            [trial],
            full["accuracy"],
            levels=2**steps.weight_bits,
            act_bits=steps.act_bits or FLOAT_BITS,
        )


def run_learned(net: nn.Module, steps: LearnedSteps, setup: Setup) -> Trial:
    """Measure the network with the learned steps of its training, as the training ran it.

    Batch norms are not folded: rounding would then see activations that differ in their last bits.
    """
    errors = [
        qu.LayerError(name, (w_q - w).double().square().sum().item(), w.numel())
        for name, w, w_q in steps.quantized_weights(net)
    ]
    net = replace(setup, fold=False).prepare(net)
    with steps.quantized(net):
        measured = measure(net, setup.test, setup.args)
    setup.on_step()
    return Trial(**measured, squared_error=qu.model_error(errors, setup.args.avg_in_layer))


def run_trial(
    net: nn.Module,
    quantization: Quantization,
    trial: int,
    ranges: Mapping[str, qu.Range],
    setup: Setup,
) -> Trial:
    """Quantize a copy of the network and measure it on the test images."""
    args = setup.args
    net_q, errors = quantize_weights(net, quantization, trial, setup)
    if setup.recalibration:
        net_q = net_q.to(args.device, memory_format=MEMORY_FORMATS[args.memory_format])
        recalibrate_batch_norm(net_q, image_batches(setup.recalibration))
    net_q = setup.prepare(net_q)
    if runs_in_integers(args):
        net_q = integer_network(net, quantization, trial, ranges, setup)
    elif ranges:
        act_bits = quantization.act_bits
        qu.quantize_activations(net_q, act_bits, ranges, layer_bits(net, act_bits, setup))
    measured = measure(net_q, setup.test, args)
    setup.on_step()
    return Trial(**measured, squared_error=qu.model_error(errors, args.avg_in_layer))


def quantize_weights(
    net: nn.Module, quantization: Quantization, trial: int, setup: Setup
) -> tuple[nn.Module, list[qu.LayerError]]:
    """Return a copy of the network with quantized weights, and the error of each layer."""
    args, (scheme, n_bits, _) = setup.args, quantization
    quantizer, options = make_quantizer(scheme, args, trial), layer_options(scheme, args)
    bits, round_up = layer_bits(net, n_bits, setup), learned_rounding(net, quantization, setup)
    return qu.quantize_model(net, quantizer, n_bits, **options, layer_bits=bits, round_up=round_up)


def learned_rounding(
    net: nn.Module, quantization: Quantization, setup: Setup
) -> Mapping[str, Tensor]:
    """Return where weights are rounded up, by the name of their layer; none: all go to nearest.

    Activations are not quantized while it is learned, as in the paper: one result serves them all.
    """
    args, (scheme, n_bits, _) = setup.args, quantization
    if not learns_rounding(scheme, args):
        return qu.NO_EXCEPTIONS
    quantizer, bits = make_quantizer(scheme, args), layer_bits(net, n_bits, setup)

    def quantize_layer(name: str, round_up: Tensor | int | None) -> nn.Module:
        layer, options = copy.deepcopy(net.get_submodule(name)), layer_options(scheme, args)
        qu.quantize_layer(layer, quantizer, bits.get(name, n_bits), **options, round_up=round_up)
        return layer

    def batches() -> Iterator[Tensor]:
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        return (x for x, _ in setup.rounding.batches(0, rank, world_size))

    if (key := (net, scheme, n_bits)) not in setup.learned:
        layers = qu.running_layers(net, setup.first_images(1))
        setup.learned.clear()
        setup.learned[key] = learn_rounding(
            net, layers, quantize_layer, batches, args.rounding_steps, args.device
        )
    return setup.learned[key]


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


def activation_ranges(net: nn.Module, setup: Setup) -> dict[int, dict[str, qu.Range]]:
    """Return the range of each module's input, by bits of activations and by name.

    None where activations stay as they are. Bits matter to the ranges of least error only.
    """
    args = setup.args
    widths = sorted({quantization.act_bits for quantization in quantizations(args)})
    if setup.calibration is None:
        return {n_bits: {} for n_bits in widths}
    full, images = setup.prepare(net), partial(image_batches, setup.calibration)
    ranges = qu.calibrate(full, images(), args.calibration, args.quantize_sums)
    by_bits = dict.fromkeys(widths, ranges)
    if qu.CALIBRATIONS[args.calibration].least_error:
        for n_bits in widths:
            exceptions = layer_bits(net, n_bits, setup)
            by_bits[n_bits] = qu.least_error_ranges(full, images(), ranges, n_bits, exceptions)
    if runs_in_integers(args):
        graph = trace(net, setup.first_images(2))
        by_bits = {n_bits: shared_ranges(graph, ranges) for n_bits, ranges in by_bits.items()}
    return by_bits


# --- what is quantized ------------------------------------------------------------------------


def layer_bits(net: nn.Module, n_bits: int, setup: Setup) -> dict[str, int]:
    """Return the bits of layers, by name, that have others than n_bits: --keep_first_last."""
    if not setup.args.keep_first_last:
        return {}
    names = qu.first_and_last(net, setup.first_images(1))
    return dict.fromkeys(names, max(n_bits, FIRST_LAST_BITS))


def plan(
    name: str, net: nn.Module, ranges: Mapping[int, Mapping[str, qu.Range]], setup: Setup
) -> list[dict[str, Any]]:
    """Return what is quantized of the network, as rows: --show_plan.

    `ranges` are those of inputs, by bits of activations and by name.
    """
    args = setup.args
    inputs = next(iter(ranges.values())).keys()
    shapes = qu.input_shapes(net, setup.first_images(1), args.quantize_sums)

    def all_bits(names: Iterable[str], numbers: Sequence[int]) -> dict[str, list[int]]:
        other = [layer_bits(net, n, setup) for n in numbers]
        return {key: [o.get(key, n) for o, n in zip(other, numbers, strict=True)] for key in names}

    return plan_rows(
        name,
        net,
        shapes,
        all_bits(quantizable_layers(net), args.bits),
        all_bits(inputs, list(ranges)),
        {key: [of_inputs[key] for of_inputs in ranges.values()] for key in inputs},
        biases=any(bias_range(scheme, args) for scheme in args.schemes),
        per_channel=args.per_channel,
    )


# --- what the flags say about a quantization -------------------------------------------------


def quantizations(args: argparse.Namespace) -> Iterator[Quantization]:
    """Yield every scheme with every bit-width of weights and of activations."""
    for scheme, n_bits in itertools.product(args.schemes, args.bits):
        for act_bits in act_bit_widths(n_bits, args):
            yield Quantization(scheme, n_bits, act_bits)


def act_bit_widths(n_bits: int, args: argparse.Namespace) -> list[int]:
    """Return the bit-widths of activations beside weights of n_bits."""
    given = args.act_bits or [FLOAT_BITS]
    return list(dict.fromkeys(n_bits if bits == "same" else bits for bits in given))


def quantizer_options(scheme: str) -> Set[str]:
    """Return the names of the arguments that the scheme's quantizer takes."""
    return inspect.signature(qu.QUANTIZERS[scheme]).parameters.keys()


def is_stochastic(scheme: str) -> bool:
    """Tell whether the scheme's quantizer draws random numbers."""
    return "generator" in quantizer_options(scheme)


def learns_rounding(scheme: str, args: argparse.Namespace) -> bool:
    """Tell whether the rounding of the scheme's weights is learned."""
    return args.rounding == "adaround" and "round_up" in quantizer_options(scheme)


def rounding_of(scheme: str, args: argparse.Namespace) -> str | None:
    """Return how a row's weights are rounded: "nearest", "stochastic" or "adaround"."""
    if scheme == UNQUANTIZED:
        return None
    rounding = "adaround" if learns_rounding(scheme, args) else "nearest"
    return "stochastic" if is_stochastic(scheme) else rounding


def n_trials(scheme: str, args: argparse.Namespace) -> int:
    """Return how often a quantization is repeated: stochastic schemes only."""
    return args.trials if is_stochastic(scheme) else 1


def make_quantizer(scheme: str, args: argparse.Namespace, trial: int = 0) -> qu.Quantizer:
    """Return the scheme's quantizer with those flags that it takes; each trial has its own seed."""
    return bind_options(qu.QUANTIZERS[scheme], args, trial)


def bind_options(function: Callable[..., Any], args: argparse.Namespace, trial: int = 0) -> partial:
    """Bind those flags that the function takes, and a generator, which depends on the trial."""
    options = {**vars(args), "generator": torch.Generator().manual_seed(args.seed + trial)}
    names = options.keys() & inspect.signature(function).parameters.keys()
    return partial(function, **{name: options[name] for name in names})


def layer_options(scheme: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `quantize_layer` and `quantize_model`."""
    correction = qu.bias_correction if args.bias_correction else None
    correction = qu.mean_correction if args.mean_correction else correction
    return {"bias_range": bias_range(scheme, args), "correction": correction}


def bias_range(scheme: str, args: argparse.Namespace) -> str | None:
    """Return the `bias_range` of `quantize_layer`: None, "weight" or "own"."""
    if args.fold_bn or args.biases == "full":
        return None
    is_own = args.biases == "published" and scheme in qu.OWN_BIAS_RANGE
    return "own" if is_own else "weight"


# --- integers --------------------------------------------------------------------------------


def runs_in_integers(args: argparse.Namespace) -> bool:
    """Tell whether the quantized network is simulated as an integer engine runs it."""
    return bool(args.export or args.verify or args.save_integers)


def integer_network(
    net: nn.Module,
    quantization: Quantization,
    trial: int,
    ranges: Mapping[str, qu.Range],
    setup: Setup,
) -> IntegerNetwork:
    """Return the folded network in integer arithmetic, with biases on the int32 grid.

    Raises NetworkError for a layer that has no integer form, and ValueError, naming the layer,
    where quantized weights are on no uniform grid.
    """
    args, (scheme, n_bits, act_bits) = setup.args, quantization
    make_parts = bind_options(qu.UNIFORM_PARTS.get(scheme, qu.QUANTIZERS[scheme]), args, trial)
    w_bits, x_bits = layer_bits(net, n_bits, setup), layer_bits(net, act_bits, setup)
    grids = {
        name: make_grid(*qu.activation_grid(x_bits.get(name, act_bits), *limits))
        for name, limits in ranges.items()
    }
    integers, round_up = {}, learned_rounding(net, quantization, setup)
    for name, layer in quantizable_layers(net).items():
        rounding = qu.rounding_option(round_up.get(name))
        parts = make_parts(layer.weight.detach(), w_bits.get(name, n_bits), **rounding)
        if name not in grids:  # it never runs
            continue
        parts = parts if isinstance(parts, tuple) else (parts,)
        try:
            integers[name] = make_integer_layer(parts, layer.bias, grids[name], args.per_channel)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return build(trace(net, setup.first_images(2)), grids, integers)


def deploy(network: LoadedNetwork, setup: Setup, dataset: ImageDataset) -> bool:
    """Write the files of the one network that the flags ask for, and verify the ONNX file.

    Returns whether engine and simulation agree. Raises FileError where the file to verify is not
    of this network and these flags.
    """
    args, net = setup.args, network.net
    [quantization] = quantizations(args)
    _, n_bits, act_bits = quantization
    net_q, _ = quantize_weights(net, quantization, 0, setup)
    if not runs_in_integers(args):
        deployment.write_files(args, net_q)
        return True
    ranges = activation_ranges(net, setup)[act_bits]
    integers = integer_network(net, quantization, 0, ranges, setup)
    source = {
        "model": network.model,
        **deployment.describe_source(network.file.path, args, n_bits, act_bits, dataset),
    }
    net_int = with_integers(net_q, integers.integers())
    deployment.write_files(args, net_int, integers, dataset, source)
    if not args.verify:
        return True
    x_bits = layer_bits(net, act_bits, setup)
    for simulation in (net_q, net_int):
        qu.quantize_activations(simulation, act_bits, ranges, x_bits)
    simulations = {"float32": net_int, "float32, biases not rounded": net_q}
    compared = verification.Compared(integers, simulations, net)
    return verification.verify_file(args, compared, setup.test, dataset, source)


# --- layer by layer --------------------------------------------------------------------------


def per_layer(name: str, net: nn.Module, setup: Setup) -> list[Row]:
    """Quantize the weights of one layer at a time; return a row for each quantization and layer.

    `accuracy_change` is on test images. `loss_change` is measured on training images; beside it are
    the terms of its Taylor expansion there, see analysis/taylor.py.
    """
    args = setup.args
    full = setup.prepare(net)
    accuracy = measure(full, setup.test, args)["accuracy"]
    loss = measure(full, setup.expansion, args)["loss"]
    rows, deltas = [], []
    for scheme, n_bits, layer in itertools.product(
        args.schemes, args.bits, quantizable_layers(net)
    ):
        net_q, error = quantize_one_layer(net, layer, scheme, n_bits, args)
        deltas.append(parameter_change(net_q, net, layer))
        net_q = setup.prepare(net_q)
        row = {"checkpoint": name, "scheme": scheme, "bits": n_bits, "layer": layer}
        row["accuracy_change"] = measure(net_q, setup.test, args)["accuracy"] - accuracy
        row["squared_error"] = error
        row["loss_change"] = measure(net_q, setup.expansion, args)["loss"] - loss
        rows.append(row)
        setup.on_step()
    expansions = taylor_terms(copy.deepcopy(net).to(args.device), setup.expansion, deltas)
    return [row | terms._asdict() for row, terms in zip(rows, expansions, strict=True)]


def quantize_one_layer(
    net: nn.Module, name: str, scheme: str, n_bits: int, args: argparse.Namespace
) -> tuple[nn.Module, float]:
    """Return a copy of the network with one layer quantized, and the squared error."""
    net_q = copy.deepcopy(net)
    layer = net_q.get_submodule(name)
    quantizer, options = make_quantizer(scheme, args), layer_options(scheme, args)
    error = qu.quantize_layer(layer, quantizer, n_bits, **options)
    layers = [qu.LayerError(name, error, layer.weight.numel())]
    return net_q, qu.model_error(layers, args.avg_in_layer)


# --- files -----------------------------------------------------------------------------------


def load_networks(
    files: Mapping[str, WeightsFile],
    args: argparse.Namespace,
    explicit_flags: Set[str],
    dataset: ImageDataset,
) -> dict[str, LoadedNetwork]:
    """Return the networks of all files that can be read; for the others an error is printed.

    Without --model a network is the one that the file's record names. Raises NetworkError as
    `is_foldable` does.
    """
    loaded, foldable = {}, {}
    for name, file in files.items():
        own = with_recorded_network(file, args, explicit_flags)
        model = own.model, own.width
        if model not in foldable:
            foldable[model] = is_foldable(own, dataset)
        try:
            net = load_network(file.path, own, dataset, foldable[model])
        except FileError as error:
            print_error(error)
        else:
            loaded[name] = LoadedNetwork(net, own.model, file, foldable[model])
    return loaded


def with_recorded_network(
    file: WeightsFile, args: argparse.Namespace, explicit_flags: Set[str]
) -> argparse.Namespace:
    """Return the flags with the network that the file's record names, unless --model is given."""
    model, width = file.setting("model"), file.setting("width")
    if "model" in explicit_flags or not is_model(model):
        return args
    return argparse.Namespace(**{**vars(args), "model": model, "width": width or args.width})


def is_foldable(args: argparse.Namespace, dataset: ImageDataset) -> bool:
    """Tell whether batch norms of the model can be folded.

    Raises NetworkError where they cannot, with --fold_bn, or have to be, without.
    """
    net = utils.make_net(args.model, dataset.num_classes, "cpu", args.width)
    check_network(net, dataset.test_images.shape[1:], dataset.num_classes)
    has_batch_norms = any(isinstance(m, BATCH_NORMS) for m in net.modules())
    if args.equalize and has_batch_norms and not args.fold_bn:
        raise NetworkError(f"--equalize needs --fold_bn: {args.model} has batch norms")
    try:
        n_left = check_folding(net, dataset.test_images.shape[1:])
    except NetworkError:
        if args.fold_bn:
            raise
        return False
    if args.fold_bn:
        utils.print_unfolded(n_left, args.model)
    return True


def load_network(
    path: Path, args: argparse.Namespace, dataset: ImageDataset, foldable: bool
) -> nn.Module:
    """Return the network with the file's weights in eval mode on the CPU.

    It is folded with --fold_bn, then equalized with --equalize, which a line reports. Quantizing on
    the CPU gives the same grids whatever the device. Raises FileError where the file does not hold
    weights of this network, or they are not finite, folded or not.
    """
    net = utils.make_net(args.model, dataset.num_classes, "cpu", args.width).eval()
    load_weights(net, path)
    for key, value in net.state_dict().items():
        if not value.isfinite().all():
            raise FileError(f"{path}: {key} holds NaN or infinite values")
    if foldable:
        folded = fold_batch_norm(net)
        if not all(p.isfinite().all() for p in folded.parameters()):
            raise FileError(
                f"{path}: folding overflows: a batch norm has a negative or vast "
                "variance, or weights are vast"
            )
        net = folded if args.fold_bn else net
    if args.equalize:
        # A file to deploy holds weights only: no network of others has a bound for each channel.
        across_relu6 = not any(getattr(args, flag) for flag in FILE_FLAGS)
        net, equalization = equalize(net, dataset.test_images.shape[1:], across_relu6)
        print(f"{path}: {equalization}")
    return net


def choose_dataset(
    files: Mapping[str, WeightsFile], args: argparse.Namespace, explicit_flags: Set[str]
) -> None:
    """Set --dataset to what the files were trained on, unless it is given: then warn of others."""
    if "dataset" not in explicit_flags:
        args.dataset = common_dataset(files.values(), DATASETS) or args.dataset
    for file in files.values():
        trained_on = file.setting("dataset") or args.dataset
        if trained_on != args.dataset:
            print_warning(f"{file.path} was trained on {trained_on}, not on {args.dataset}")


def check_baseline(row: Row, file: WeightsFile, args: argparse.Namespace) -> None:
    """Warn where the unquantized network is not as accurate as it was when it had been trained."""
    is_whole = not (args.holdout or args.test_subset)
    expected = file.expected_accuracy(args.dataset, is_whole)
    if expected is not None and abs(row["accuracy"] - expected) > MAX_BASELINE_CHANGE:
        print_warning(
            f"{file.path}: accuracy {row['accuracy']:.2%} without quantizing, but its record "
            f"says {expected:.2%}: are these its data and weights?"
        )


def check_n_images(args: argparse.Namespace, explicit_flags: Set[str], n_train: int) -> None:
    """Raise DataError where a flag asks for more training images than there are.

    A default that does is lowered to their number.
    """
    flags = ("recalibrate_bn_images", "calibration_images", "per_layer_images", "rounding_images")
    for flag in flags:
        n_images = getattr(args, flag)
        if n_images and n_images > n_train:
            if flag in explicit_flags:
                raise DataError(f"--{flag} {n_images}: there are {n_train} training images")
            setattr(args, flag, n_train)


def print_error(message: object) -> None:
    """Print one line about a file on rank 0; the others are evaluated all the same."""
    print_warning(f"error: {message}")


def print_warning(message: str) -> None:
    """Print one line about a file on rank 0."""
    if distributed.get_rank() == 0:
        tqdm.write(f"quant_inference.py: {message}", file=sys.stderr)


# --- a run -----------------------------------------------------------------------------------


def run(args: argparse.Namespace, explicit_flags: Set[str], folder: Path) -> bool:
    """Measure every file and report into the folder; return whether all could be measured."""
    files, results = find_weights(args.checkpoints), Results()
    if not any(file.path.exists() for file in files.values()):
        raise FileError(f"{', '.join(str(file.path) for file in files.values())}: no such file")
    choose_dataset(files, args, explicit_flags)
    dataset = utils.load_dataset(args)
    check_n_images(args, explicit_flags, len(dataset.train_images))
    use_ieee_float32()
    loaded = distributed.run_on_rank0_and_broadcast(
        lambda: load_networks(files, args, explicit_flags, dataset)
    )
    total = sum(n_steps(network.net, args) for network in loaded.values())
    try:
        with StepDisplay(total, "network") as display:
            setup = make_setup(args, dataset, display.step)
            for name, network in loaded.items():
                display.describe(name)
                measure_network(name, network, setup, results)
    finally:  # an interruption loses nothing that was measured before it
        if results.rows and distributed.get_rank() == 0:
            report_results(results, loaded, args, folder)
    is_complete = distributed.get_rank() > 0 or results.checkpoints() == files.keys()
    if is_complete and (runs_in_integers(args) or args.save_quantized):
        [network] = loaded.values()
        return deploy(network, setup, dataset)
    return is_complete


def n_steps(net: nn.Module, args: argparse.Namespace) -> int:
    """Return how often `on_step` is called for the network."""
    steps = 1 + sum(n_trials(quantization.scheme, args) for quantization in quantizations(args))
    steps += args.steps_from is not None
    if args.per_layer:
        steps += len(args.schemes) * len(args.bits) * len(quantizable_layers(net))
    return steps


def measure_network(name: str, network: LoadedNetwork, setup: Setup, results: Results) -> None:
    """Add the rows of one network to the results; if it cannot be quantized, print why instead."""
    net, _, file, is_foldable = network
    args = setup.args
    # What is folded already is not folded again.
    setup = replace(setup, fold=is_foldable and not args.fold_bn)
    common = file.provenance()
    common |= {flag: getattr(args, flag) for flag in ("per_channel", "fold_bn", "equalize")}
    try:
        for row in sweep(name, net, setup):
            if row["scheme"] == UNQUANTIZED:
                check_baseline(row, file, args)
            results.rows.append(row | common | {"rounding": rounding_of(row["scheme"], args)})
        if args.per_layer:
            results.layer_rows += per_layer(name, net, setup)
    except ValueError as error:
        results.discard(name)
        print_error(f"{file.path}: {error}")


def report_results(
    results: Results, loaded: Mapping[str, LoadedNetwork], args: argparse.Namespace, folder: Path
) -> None:
    """Print the tables, write files and plots into the folder, and log all to the dashboard."""
    rows, layer_rows = results.rows, results.layer_rows
    nets = {name: loaded[name].net for name in loaded if name in results.checkpoints()}
    print(report.table(rows, report.PRINTED_COLUMNS + ("act_bits",) * bool(args.act_bits)))
    print(f"biases: {describe_biases(args)}")
    if layer_rows:
        print(f"\none layer at a time; loss on {args.per_layer_images} training images")
        print(report.table(layer_rows, report.LAYER_COLUMNS))
    settings = {**vars(args), "output": str(folder)}
    report.save_tables(rows, layer_rows, settings, folder)
    plots = draw_distributions(nets, args, folder) if len(nets) > 1 or args.layers else {}
    if not args.no_plots:
        plots |= draw_plots(results, nets, args, folder)
    print(f"\nresults: {folder / 'results.csv'}, {folder / 'results.json'}")
    if plots:
        print("plots:   " + ", ".join(map(str, plots.values())))
    files = {name: loaded[name].file for name in nets}
    print(dashboard.log_quantizations(args, settings, files, results, plots))


def describe_biases(args: argparse.Namespace) -> str:
    """Return how biases are quantized, as the report says it."""
    words = {
        None: "in full precision",
        "weight": "on their weights' grids",
        "own": "with a range of their own",
    }
    schemes: dict[str, list[str]] = {}
    for scheme in args.schemes:
        schemes.setdefault(words[bias_range(scheme, args)], []).append(scheme)
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in schemes.items())


def draw_distributions(
    nets: Mapping[str, nn.Module], args: argparse.Namespace, folder: Path
) -> dict[str, Path]:
    """Compare how the networks' weights are distributed; return the figure's path, by title.

    Writes distributions.csv with every layer, and distributions.png with some.
    """
    weights = distributions.layer_weights(nets)
    rows = distributions.statistics(weights)
    report.save_csv(rows, distributions.COLUMNS, folder / "distributions.csv")
    try:
        layers = distributions.choose_layers(rows, args.layers)
    except ValueError as error:
        print_warning(f"no distributions.png: {error}")
        return {}
    if args.no_plots:
        return {}
    path = folder / "distributions.png"
    distributions.distributions_plot(weights, layers, args.absolute_weights, path)
    return {"distributions": path}


def draw_plots(
    results: Results, nets: Mapping[str, nn.Module], args: argparse.Namespace, folder: Path
) -> dict[str, Path]:
    """Draw the plots into the folder and return their paths by title."""
    plots = {}
    if any(row["scheme"] != UNQUANTIZED for row in results.rows):  # else it was interrupted before
        plots["accuracy"] = folder / "accuracy.png"
        figures.accuracy_plot(results.rows, plots["accuracy"])
    if results.layer_rows:
        plots["per_layer"] = folder / "per_layer.png"
        figures.per_layer_plot(results.layer_rows, plots["per_layer"])
    n_bits = 4 if 4 in args.bits else min(args.bits)
    quantizers = {scheme: make_quantizer(scheme, args) for scheme in args.schemes}
    for name, net in nets.items():
        path = plots[f"weights/{name}"] = folder / f"weights_{name.replace('/', '_')}.png"
        figures.weights_plot(name, net, quantizers, n_bits, args.per_channel, path)
    return plots


# --- flags -----------------------------------------------------------------------------------


def bit_widths(text: str) -> list[int]:
    """Return the bit-widths that a number or a range such as "4-8" means: an argparse type."""
    first, _, last = text.partition("-")
    try:
        widths = list(range(int(first), int(last or first) + 1))
        for n_bits in widths or [0]:
            qu.check_bits(n_bits)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from 2 to 16, or a range of them such as 4-8"
        ) from error
    return widths


def act_bit_widths_or_same(text: str) -> list[int | str]:
    """Return bit-widths, or "same": an argparse type."""
    return ["same"] if text.lower() == "same" else bit_widths(text)


def make_parser() -> Parser:
    """Make the parser of quant_inference.py."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="FILE",
        help=".pt files of weights or .ckpt checkpoints, or globs of them",
    )
    group = parser.add_argument_group("what is quantized, and how")
    add_quantizer_arguments(group)
    add_layer_arguments(group)
    add_repair_arguments(parser.add_argument_group("batch norms and corrections"))
    add_rounding_arguments(parser.add_argument_group("rounding of weights"))
    add_pwlq_arguments(parser.add_argument_group("pwlq"))
    add_clip_arguments(parser.add_argument_group("clip"))
    add_learned_arguments(parser.add_argument_group("learned steps"))
    add_activation_arguments(parser.add_argument_group("activations"))
    add_measurement_arguments(parser.add_argument_group("what is measured"))
    utils.add_data_arguments(parser)
    parser.set_defaults(batch_size=500)
    add_output_arguments(parser.add_argument_group("output"))
    add_deployment_arguments(
        parser.add_argument_group("files to deploy: of one FILE, one of --bits, one of --schemes")
    )
    utils.add_wandb_arguments(parser)
    group = parser.add_argument_group("flags of earlier versions, ignored")
    group.add_argument("--n_epochs", help="ignored: nothing is trained here")
    group.add_argument("--lr", help="ignored: nothing is trained here")
    return parser


def add_quantizer_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for network, schemes and bit-widths."""
    add = group.add_argument
    utils.add_network_arguments(
        group,
        "network whose weights the files hold, where the record beside a file does not say it",
    )
    add(
        "--bits",
        type=bit_widths,
        action=StoreFlat,
        nargs="+",
        default=[4, 5, 6, 7, 8],
        metavar="N",
        help="bits of a weight, each from 2 to 16, or ranges such as 4-8",
    )
    add(
        "--schemes",
        type=choice_ignoring_case(qu.QUANTIZERS),
        nargs="+",
        default=list(PUBLISHED_SCHEMES),
        metavar="{" + ",".join(qu.QUANTIZERS) + "}",
        help="quantizers of weights; dorefa rounds at random, pwlq has the levels of one bit more "
        "than it is given, and clip is uniform on the range of least error",
    )
    add(
        "--trials",
        type=bounded_number(int, at_least=1),
        default=3,
        metavar="N",
        help="repeat quantizers that round at random N times, each with a seed of its own",
    )


def add_layer_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for what is quantized of a layer, and in which ranges."""
    add = group.add_argument
    add(
        "--per_channel",
        action="store_true",
        help="one range per output channel; without it one per layer",
    )
    add_choice(
        group,
        "--biases",
        BIASES,
        "published",
        "how biases are quantized: as the published scripts do (on the grid of their layer's "
        "weight, with pwlq on a range and breakpoint of their own), always on the weight's grid "
        "(weight), or not at all, as integer engines do (full); folded ones never are",
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
        "--equalize",
        action="store_true",
        help="then scale the channels between each two layers that follow each other, so that the "
        "ranges of both layers' weights are equal and the network computes the same "
        "(cross-layer equalization); with files to deploy not across ReLU6",
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


def add_rounding_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for rounding weights up or down."""
    add_choice(
        group,
        "--rounding",
        ROUNDINGS,
        "nearest",
        "round weights of uniform and clip to nearest, or learn for each whether up or down keeps "
        "its layer's output (AdaRound)",
    )
    group.add_argument(
        "--rounding_images",
        type=bounded_number(int, at_least=1),
        default=N_ROUNDING_IMAGES,
        metavar="N",
        help="training images that adaround learns from",
    )
    group.add_argument(
        "--rounding_steps",
        type=bounded_number(int, at_least=1),
        default=N_ROUNDING_STEPS,
        metavar="N",
        help="steps of adaround in each layer",
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


def add_clip_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flag of the quantizer that searches its range."""
    group.add_argument(
        "--clip_p",
        type=bounded_number(float, at_least=1),
        default=2.4,
        metavar="P",
        help="exponent of the error that the range is chosen by; 2: squared error",
    )


def add_learned_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flag for what quantization-aware training has learned."""
    group.add_argument(
        "--steps_from",
        metavar="JSON",
        help="also quantize FILE with the step sizes that its training with --qat_bits learned and "
        "put into this record: a row of scheme lsq, with the bits of the training",
    )


def add_activation_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of activation quantization."""
    add = group.add_argument
    add(
        "--act_bits",
        type=act_bit_widths_or_same,
        action=StoreFlat,
        nargs="+",
        metavar="{2..16,same}",
        help="quantize the inputs of layers and pooling to so many bits, or to the weights' bits "
        "(same), one after the other; None: leave them in full precision",
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
        "values on each side, each averaged over batches, or the extremes, or, for each number of "
        "bits, the range of least squared error of all recorded values (mse)",
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
        "change, whatever --keep_first_last says; activations and batch-norm statistics then stay "
        "as they are",
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
    add(
        "--test_subset",
        type=bounded_number(int, at_least=1),
        metavar="N",
        help="measure on the first N test images only, for a quick look",
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
    add(
        "--layers",
        nargs="+",
        metavar="LAYER",
        help="layers in distributions.png, such as layer0.0; None: with several files, the five in "
        "which they differ most",
    )
    add(
        "--absolute_weights",
        action="store_true",
        help="in distributions.png, show weights as they are, not in units of their layer's "
        "standard deviation",
    )


def add_deployment_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for files of one quantized network."""
    add = group.add_argument
    add(
        "--export",
        metavar="ONNX",
        help="write the quantized network as an ONNX model of integers: uint8 images to logits; "
        "simulate it in the same integer arithmetic",
    )
    add(
        "--verify",
        nargs="?",
        const=True,
        metavar="ONNX",
        help="run what --export writes, or this file of an earlier --export, in ONNX Runtime: "
        "compare predictions with the simulation, speed and size with float32",
    )
    add(
        "--save_quantized",
        metavar="PT",
        help="write the quantized weights as a state_dict of floats for any PyTorch code",
    )
    add(
        "--save_integers",
        metavar="SAFETENSORS",
        help="write the integers of the weights packed into b bits, with scales and biases",
    )


def check_deployment(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that a file to deploy cannot have."""
    paths = find_paths(args.checkpoints).values()
    single = len(list(quantizations(args))) == len(paths) == 1
    bits = [act_bits for _, _, act_bits in quantizations(args)]
    is_uniform = not ({"mean_correction", "bias_correction"} & parser.explicit_flags)
    fits = "--schemes uniform, or pwlq with --overlapping: others are no integers times a scale"
    requirements = [
        *(
            (flag, "one FILE, one of --bits, one of --act_bits and one of --schemes", single)
            for flag in FILE_FLAGS
        ),
        ("verify", "--export, or the file to verify", args.export or args.verify is not True),
    ]
    for flag in ("export", "verify", "save_integers"):
        requirements += [
            (flag, "--fold_bn", args.fold_bn),
            (flag, "--act_bits from 2 to 8", all(2 <= n <= 8 for n in bits)),
            (flag, "--bits from 2 to 8", max(args.bits) <= 8),
            (flag, "weights without --mean_correction and --bias_correction", is_uniform),
            (flag, fits, "pwlq" not in args.schemes or args.overlapping),
        ]
    refuse_unused_flags(parser, requirements)
    for flag in ("export", "save_quantized", "save_integers"):
        if path := getattr(args, flag):
            try:
                check_writable(Path(path))
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                parser.error(f"--{flag}: {error}")
            if Path(path) in paths:
                parser.error(f"--{flag} {path}: that is the file to quantize")


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, ignore those without effect; sort bits and schemes.

    Activations and layers are measured in float32: another precision would round beside them.
    """
    is_fp32, has_pwlq = args.precision == "fp32", "pwlq" in args.schemes
    learners = [scheme for scheme in args.schemes if learns_rounding(scheme, args)]
    on_grid = "--rounding nearest: it would move weights off the grid that was learned on"
    contradictions = (
        ("act_bits", "--precision fp32", is_fp32),
        ("per_layer", "--precision fp32", is_fp32),
        *steps_requirements(args),
        ("per_layer", "--rounding nearest: adaround learns layers one after another", not learners),
        ("mean_correction", on_grid, not learners),
        ("bias_correction", on_grid, not learners),
    )
    refuse_unused_flags(parser, contradictions)
    requirements = (
        ("recalibrate_bn_images", "batch norms: leave out --fold_bn", not args.fold_bn),
        ("approximate", "pwlq among --schemes", has_pwlq),
        ("overlapping", "pwlq among --schemes", has_pwlq),
        ("distribution", "pwlq among --schemes", has_pwlq),
        ("approximate", "--distribution norm or laplace", args.distribution != "search"),
        ("rounding", "uniform or clip among --schemes", learners),
        ("rounding_images", "--rounding adaround and uniform or clip", learners),
        ("rounding_steps", "--rounding adaround and uniform or clip", learners),
        ("clip_p", "clip among --schemes", "clip" in args.schemes),
        ("trials", "a stochastic scheme", any(map(is_stochastic, args.schemes))),
        ("calibration", "--act_bits", args.act_bits),
        ("quantize_sums", "--act_bits", args.act_bits),
        ("calibration_images", "--act_bits", args.act_bits),
        ("per_layer_images", "--per_layer", args.per_layer),
        ("biases", "no --fold_bn", not args.fold_bn or args.biases == "full"),
        ("absolute_weights", "no --no_plots", not args.no_plots),
        *utils.wandb_requirements(),
        *utils.data_requirements(args),
        utils.width_requirement(args),
    )
    warn_unused_flags(parser, args, requirements)
    if learners and (others := [scheme for scheme in args.schemes if scheme not in learners]):
        print_warning(f"--rounding adaround has no effect on {', '.join(others)}")
    args.bits, args.schemes = sorted(set(args.bits)), list(dict.fromkeys(args.schemes))
    check_deployment(parser, args)


def steps_requirements(args: argparse.Namespace) -> list[Requirement]:
    """Return what --steps_from needs, for `refuse_unused_flags`."""
    flag, has_file = "steps_from", any(getattr(args, flag) for flag in FILE_FLAGS)
    return [
        (flag, "one FILE", len(find_paths(args.checkpoints)) == 1),
        (flag, "--precision fp32", args.precision == "fp32"),
        (flag, "batch norms as they were trained: leave out --fold_bn", not args.fold_bn),
        (flag, "no --recalibrate_bn_images", not args.recalibrate_bn_images),
        (flag, f"none of {', '.join(f'--{name}' for name in FILE_FLAGS)}", not has_file),
    ]


def make_output_folder(parser: Parser, args: argparse.Namespace) -> Path:
    """Return the folder for results, made where it is missing; end with one line if it cannot be.

    Without --output it is that of the first file that exists.
    """
    paths = find_paths(args.checkpoints).values()
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
        deployment.check_run(args)
        is_complete = run(args, parser.explicit_flags, folder)
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    main()
