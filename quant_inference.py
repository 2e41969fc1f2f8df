"""Quantize saved weights with every scheme at every bit-width and report the accuracy drop.

`sweep` is the loop over schemes and bit-widths for one network; `run` loads the networks, sweeps
each of them and reports. The quantizers are in quant_utils.py, the flags in flags.py.
"""

import argparse
import copy
import inspect
import itertools
import math
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

import flags
import quant_utils as qu
import utils
from analysis import dashboard, distributions, figures, report
from analysis.quantization_plan import COLUMNS as PLAN_COLUMNS
from analysis.quantization_plan import plan_rows
from analysis.report import FLOAT_BITS, UNQUANTIZED, Results, Row, Trial
from analysis.taylor import parameter_change, taylor_terms
from analysis.weights_files import (
    WeightsFile,
    common_dataset,
    common_image_size,
    find_paths,
    find_weights,
    read_record,
    read_training_record,
)
from data import DATASETS, ImageDataset, accepts
from engine.deploy import deployed_files, verify
from engine.deploy.integer_layers import make_grid, make_integer_layer, with_integers
from engine.deploy.integer_network import IntegerNetwork, build, shared_ranges
from engine.images.loader import Loader
from engine.networks.batch_norm import (
    check_folding,
    fold_batch_norm,
    has_batch_norms,
    recalibrate_batch_norm,
)
from engine.networks.graph import trace
from engine.networks.layers import quantizable_layers
from engine.networks.outputs import check_network
from engine.quantization.adaround import learn_rounding
from engine.quantization.equalization import equalize
from engine.step.evaluation import evaluate
from engine.system import distributed
from engine.system.cli import Parser, exit_codes, refuse_flags, warn_unused_flags
from engine.system.errors import DataError, FileError, NetworkError
from engine.system.hardware import MEMORY_FORMATS, print_device, resolve_precision, use_ieee_float32
from engine.system.io import check_writable, load_weights
from engine.system.progress import StepDisplay
from engine.system.signals import GracefulShutdown
from engine.training.learned_steps import FIRST_LAST_BITS, LearnedSteps, read_steps
from flags import FILE_FLAGS, INTEGER_FLAGS
from models import is_model

FLAGS_OF_RECORDS = [*flags.NETWORK[1:], *flags.DATA[1:]]  # known when records have been read
LEARNED = "lsq"  # as a row's scheme: the steps that --steps_from gives
CALIBRATION_BATCH = 64  # images: ranges must not depend on --batch_size
ROUNDING_BATCH = 32  # images: what is learned must not depend on --batch_size
MAX_ACCURACY_CHANGE = 0.01  # of accuracy since training: more than bfloat16 or another machine does


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


# --- what the flags say about a quantization ---------------------------------------------------


class Quantization(NamedTuple):
    """One of the quantizations that the flags ask for; FLOAT_BITS are bits of full precision."""

    scheme: str
    n_bits: int
    act_bits: int = FLOAT_BITS


def quantizations(args: argparse.Namespace) -> Iterator[Quantization]:
    """Yield every scheme with every bit-width of weights and of activations."""
    for scheme, n_bits in itertools.product(args.schemes, args.bits):
        for act_bits in utils.act_bit_widths(n_bits, args):
            yield Quantization(scheme, n_bits, act_bits)


def rounding_of(scheme: str, args: argparse.Namespace) -> str | None:
    """Return how a row's weights are rounded: "nearest", "stochastic" or "adaround"."""
    if scheme not in qu.QUANTIZERS:  # unquantized, or with learned steps
        return None
    rounding = "adaround" if scheme in utils.learned_schemes(args) else "nearest"
    return "stochastic" if qu.is_stochastic(scheme) else rounding


def n_trials(scheme: str, args: argparse.Namespace) -> int:
    """Return how often a quantization is repeated: stochastic schemes only."""
    return args.trials if qu.is_stochastic(scheme) else 1


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


def runs_in_integers(args: argparse.Namespace) -> bool:
    """Tell whether the quantized network is simulated as an integer engine runs it."""
    return any(getattr(args, flag) for flag in INTEGER_FLAGS)


# --- the sweep -------------------------------------------------------------------------------


def sweep(name: str, net: nn.Module, setup: Setup) -> Iterator[Row]:
    """Yield the rows of one network: unquantized, then every quantization."""
    args = setup.args
    steps = learned_steps(net, setup)
    if runs_in_integers(args):
        check_integer_form(net, setup)
    full = measure(setup.prepare(net), setup.test, args)
    if not math.isfinite(full["loss"]):
        raise ValueError(f"its loss is {full['loss']} without quantizing: no trained network's")
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


def learned_steps(net: nn.Module, setup: Setup) -> LearnedSteps | None:
    """Return the steps of --steps_from, None without it; FileError where they do not fit."""
    if not setup.args.steps_from:
        return None
    path = Path(setup.args.steps_from)
    steps = read_steps(path, net)
    if steps.layers.keys() != set(qu.running_layers(net, setup.first_images(1))):
        raise FileError(f"{path}: its learned steps are not of the layers of this network")
    return steps


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
    if scheme not in utils.learned_schemes(args):
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


# --- integers --------------------------------------------------------------------------------


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


def check_integer_form(net: nn.Module, setup: Setup) -> None:
    """Raise NetworkError where a call of the network has no integer form; nothing is measured."""
    names = qu.input_shapes(net, setup.first_images(1), setup.args.quantize_sums)
    [(_, _, act_bits)] = quantizations(setup.args)
    bits = dict.fromkeys(names, act_bits) | layer_bits(net, act_bits, setup)
    grids = {name: make_grid(*qu.activation_grid(n, 0.0, 1.0)) for name, n in bits.items()}
    build(trace(net, setup.first_images(2)), grids, {})


def describe_source(
    network: LoadedNetwork, args: argparse.Namespace, dataset: ImageDataset
) -> dict[str, str]:
    """Return the metadata of a file to deploy."""
    [(_, n_bits, act_bits)] = quantizations(args)
    described = deployed_files.describe_source(network.file.path, args, n_bits, act_bits, dataset)
    return {"model": network.model, **described}


def deploy(network: LoadedNetwork, setup: Setup, dataset: ImageDataset) -> bool:
    """Write the files of the one network that the flags ask for, and verify the ONNX file.

    Returns whether engine and simulation agree. Raises FileError where the file to verify is not
    of this network and these flags.
    """
    args, net = setup.args, network.net
    [quantization] = quantizations(args)
    act_bits = quantization.act_bits
    net_q, _ = quantize_weights(net, quantization, 0, setup)
    if not runs_in_integers(args):
        deployed_files.write_files(args, net_q)
        return True
    ranges = activation_ranges(net, setup)[act_bits]
    integers = integer_network(net, quantization, 0, ranges, setup)
    source = describe_source(network, args, dataset)
    net_int = with_integers(net_q, integers.integers())
    deployed_files.write_files(args, net_int, integers, dataset, source)
    if not args.verify:
        return True
    x_bits = layer_bits(net, act_bits, setup)
    for simulation in (net_q, net_int):
        qu.quantize_activations(simulation, act_bits, ranges, x_bits)
    simulations = {"float32": net_int, "float32, biases not rounded": net_q}
    compared = verify.Compared(integers, simulations, net)
    return verify.verify_file(args, compared, setup.test, dataset, source)


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
        try:
            own = with_recorded_network(file, args, explicit_flags)
            model = own.model, own.width
            if model not in foldable:
                foldable[model] = is_foldable(own, dataset)
            net = load_network(file.path, own, dataset, foldable[model])
        except FileError as error:
            print_error(error)
        else:
            loaded[name] = LoadedNetwork(net, own.model, file, foldable[model])
    return loaded


def recorded_model(file: WeightsFile, args: argparse.Namespace, explicit_flags: Set[str]) -> str:
    """Return the name of the network that the file's record names, unless --model is given."""
    recorded = file.setting("model")
    return recorded if "model" not in explicit_flags and is_model(recorded) else args.model


def parse_recorded(parse: Callable[[str], float], value: object, place: str) -> float:
    """Return a number of a record as the flag's type reads it; FileError where that refuses it."""
    try:
        return parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise FileError(f"{place} {error}") from error


def with_recorded_network(
    file: WeightsFile, args: argparse.Namespace, explicit_flags: Set[str]
) -> argparse.Namespace:
    """Return the flags with the file's network, see `recorded_model`, and its width.

    That is --width or, where the record names this network, the record's. Raises FileError for a
    width that no network can have.
    """
    model, width = recorded_model(file, args, explicit_flags), args.width
    recorded = file.setting("width")
    if "width" not in explicit_flags and file.setting("model") == model and recorded is not None:
        width = parse_recorded(utils.parse_width, recorded, f"the record of {file.path}: width")
    return argparse.Namespace(**{**vars(args), "model": model, "width": width})


def is_foldable(args: argparse.Namespace, dataset: ImageDataset) -> bool:
    """Tell whether batch norms of the model can be folded.

    Raises NetworkError where they cannot, with --fold_bn, or have to be, without.
    """
    net = utils.make_net(args.model, dataset.num_classes, "cpu", args.width)
    check_network(net, dataset.test_images.shape[1:], dataset.num_classes)
    if args.equalize and has_batch_norms(net) and not args.fold_bn:
        raise NetworkError(f"--equalize needs --fold_bn: {args.model} has batch norms")
    try:
        n_left = check_folding(net, dataset.test_images.shape[1:])
    except NetworkError:
        if args.fold_bn:
            raise
        return False
    if args.fold_bn:
        utils.print_unfolded(net, n_left, args.model)
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
        if equalization.n_pairs:
            print(f"{path}: {equalization}")
        else:
            print_warning(f"{path}: --equalize has no effect: {equalization}")
    return net


def choose_dataset(
    files: Mapping[str, WeightsFile], args: argparse.Namespace, explicit_flags: Set[str]
) -> None:
    """Set --dataset to what the files were trained on, unless it is given: then warn of others.

    And --image_size to that of their images.
    """
    if "dataset" not in explicit_flags:
        args.dataset = common_dataset(files.values(), DATASETS) or args.dataset
    if "image_size" not in explicit_flags:
        size = common_image_size(files.values(), args.dataset) or args.image_size
        args.image_size = parse_recorded(utils.parse_image_size, size, "the record's image_size")
    for file in files.values():
        trained_on = file.setting("dataset") or args.dataset
        if trained_on != args.dataset:
            print_warning(f"{file.path} was trained on {trained_on}, not on {args.dataset}")
        size = file.image_size() or args.image_size
        if size != args.image_size and accepts(args.dataset, "image_size"):
            pixels = f"images of {size} pixels, not of {args.image_size}"
            print_warning(f"{file.path} was trained on {pixels}: --image_size")


def check_steps_record(file: WeightsFile, steps: WeightsFile) -> None:
    """Warn where the record of --steps_from is of another training than the weights."""
    ids = file.record.get("run_id"), steps.record.get("run_id")
    if None not in ids and ids[0] != ids[1]:
        print_warning(f"{steps.path} has the steps of another training than that of {file.path}")


def check_layers(loaded: Mapping[str, LoadedNetwork], layers: Sequence[str]) -> None:
    """Raise NetworkError where a layer to show is not in all of the networks."""
    names = [quantizable_layers(network.net) for network in loaded.values()]
    try:
        distributions.shared_layers(names, layers)
    except ValueError as error:
        raise NetworkError(str(error)) from error


def check_sums(net: nn.Module, setup: Setup, file: WeightsFile) -> None:
    """Warn where --quantize_sums finds no sum to quantize."""
    if not setup.args.quantize_sums:
        return
    names = qu.input_shapes(net, setup.first_images(1), sums=True)
    if not any(map(qu.is_of_sum, names)):
        print_warning(f"{file.path}: --quantize_sums has no effect: the network adds nothing up")


def check_accuracy(row: Row, file: WeightsFile, args: argparse.Namespace) -> None:
    """Warn where a row is not as accurate as the network was when it had been trained.

    That is known of the unquantized network, and of one with the steps that it has learned.
    """
    key = {UNQUANTIZED: "final_accuracy", LEARNED: "quantized_accuracy"}.get(row["scheme"])
    is_whole = not (args.holdout or args.test_subset)
    expected = file.expected_accuracy(args.dataset, is_whole, key) if key else None
    if expected is not None and abs(row["accuracy"] - expected) > MAX_ACCURACY_CHANGE:
        how = "without quantizing" if key == "final_accuracy" else "with the learned steps"
        print_warning(
            f"{file.path}: accuracy {row['accuracy']:.2%} {how}, but its record "
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


# --- what flags do not allow -------------------------------------------------------------------


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, ignore those without effect; sort bits and schemes.

    What data set and network have to do with waits for the records of the files.
    """
    args.bits, args.schemes = sorted(set(args.bits)), list(dict.fromkeys(args.schemes))
    refuse_flags(parser, args, parser.flags)
    now = [flag for flag in parser.flags if flag not in FLAGS_OF_RECORDS]
    warn_unused_flags(parser, args, now)
    learners = utils.learned_schemes(args)
    if learners and (others := [scheme for scheme in args.schemes if scheme not in learners]):
        print_warning(f"--rounding adaround has no effect on {', '.join(others)}")
    check_deployed_files(parser, args)


def check_deployed_files(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse names of files to deploy that cannot be written, or that another file has."""
    paths = find_paths(args.checkpoints).values()
    taken = {path.resolve(): "the file to quantize" for path in paths}
    for flag in ("export", "save_quantized", "save_integers"):
        if not getattr(args, flag):
            continue
        path = Path(getattr(args, flag))
        try:
            check_writable(path)
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            parser.error(f"--{flag}: {error}")
        target = path.resolve()
        if path.suffix in (".pt", ".ckpt", ".json") and path.exists() and read_record(path):
            taken.setdefault(target, "a file of a training")
        if target in taken:
            parser.error(f"--{flag} {path}: that is {taken[target]}")
        taken[target] = f"the file of --{flag}"


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


# --- messages ---------------------------------------------------------------------------------


def print_error(message: object) -> None:
    """Print one line about a file on rank 0; the others are evaluated all the same."""
    print_warning(f"error: {message}")


def print_warning(message: str) -> None:
    """Print one line about a file on rank 0."""
    if distributed.get_rank() == 0:
        tqdm.write(f"quant_inference.py: {message}", file=sys.stderr)


# --- a run -----------------------------------------------------------------------------------


def run(parser: Parser, args: argparse.Namespace, folder: Path) -> bool:
    """Measure every file and report into the folder; return whether all could be measured."""
    explicit_flags = parser.explicit_flags
    files, results = find_weights(args.checkpoints), Results()
    if not any(file.path.exists() for file in files.values()):
        raise FileError(f"{', '.join(str(file.path) for file in files.values())}: no such file")
    choose_dataset(files, args, explicit_flags)
    models = [recorded_model(file, args, explicit_flags) for file in files.values()]
    warn_unused_flags(parser, args, FLAGS_OF_RECORDS, models=models)
    dataset = utils.load_dataset(args)
    check_n_images(args, explicit_flags, len(dataset.train_images))
    use_ieee_float32()
    loaded = distributed.run_on_rank0_and_broadcast(
        lambda: load_networks(files, args, explicit_flags, dataset)
    )
    if args.layers and loaded:
        check_layers(loaded, args.layers)
    # That a file to verify fits is known before anything is measured.
    if isinstance(args.verify, str) and args.verify != args.export:
        for network in loaded.values():
            deployed_files.read_model(Path(args.verify), describe_source(network, args, dataset))
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
    steps = read_training_record(Path(args.steps_from)) if args.steps_from else None
    if steps:
        check_steps_record(file, steps)
    check_sums(net, setup, file)
    try:
        for row in sweep(name, net, setup):
            check_accuracy(row, steps if row["scheme"] == LEARNED else file, args)
            how = {"rounding": rounding_of(row["scheme"], args)}
            if row["scheme"] == LEARNED:
                how["per_channel"] = False
            results.rows.append(row | common | how)
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
    has_act_bits = any(row["act_bits"] != FLOAT_BITS for row in rows)
    print(report.table(rows, report.PRINTED_COLUMNS + ("act_bits",) * has_act_bits))
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
        path = plots[f"weights/{name}"] = folder / f"{report.weights_figure(name)}.png"
        figures.weights_plot(name, net, quantizers, n_bits, args.per_channel, path)
    return plots


def make_parser() -> Parser:
    """Make the parser of quant_inference.py."""
    description = (
        "Quantize saved weights with every scheme at every bit-width and report the accuracy drop."
    )
    return flags.make_parser(description, flags.QUANTIZATION, batch_size=500)


def main(argv: Sequence[str] | None = None) -> None:
    """Quantize the files of the command line; exit with 1 if one could not be measured."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    folder = make_output_folder(parser, args)
    with exit_codes(parser), GracefulShutdown(), distributed.process_group(args.device):
        print_device(args.device)
        deployed_files.check_run(args)
        is_complete = run(parser, args, folder)
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    main()
