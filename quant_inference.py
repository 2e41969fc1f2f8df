"""Quantize saved weights with every scheme at every bit-width and report the accuracy drop.

`sweep` is the loop over schemes and bit-widths for one network; `run` loads the networks, sweeps
each of them and reports. The quantizers are in quant_utils.py, the flags in flags.py, and what is
worked out for one network in analysis/measured_network.py.
"""

import argparse
import inspect
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from tqdm import tqdm

import flags
import quant_utils as qu
import utils
from analysis import dashboard, distributions, figures, report
from analysis.measured_network import Conditions, Images, MeasuredNetwork, Quantization
from analysis.quantization_plan import COLUMNS as PLAN_COLUMNS
from analysis.quantization_plan import plan_rows
from analysis.report import FLOAT_BITS, UNQUANTIZED, Results, Row
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
from engine.deploy.integer_layers import with_integers
from engine.networks.exported import export_network, layers, weights, write_back
from engine.networks.folding import batch_norms, fold_batch_norms, foldable
from engine.networks.outputs import check_network
from engine.quantization.equalization import equalize
from engine.system import distributed
from engine.system.cli import Parser, exit_codes, refuse_flags, warn_unused_flags
from engine.system.errors import DataError, FileError, NetworkError
from engine.system.hardware import MEMORY_FORMATS, print_device, resolve_precision, use_ieee_float32
from engine.system.io import check_writable, load_weights
from engine.system.progress import StepDisplay
from engine.system.signals import GracefulShutdown
from engine.training.learned_steps import LearnedSteps, read_steps
from flags import FILE_FLAGS, INTEGER_FLAGS
from models import is_model, make_model

FLAGS_OF_RECORDS = [*flags.NETWORK[1:], *flags.DATA[1:]]  # known when records have been read
LEARNED = "lsq"  # as a row's scheme: the step sizes that --steps_from gives
CALIBRATION_BATCH = 64  # images: ranges must not depend on --batch_size
ROUNDING_BATCH = 32  # images: what is learned must not depend on --batch_size
MAX_ACCURACY_CHANGE = 0.01  # of accuracy since training: more than bfloat16 or another machine does


class LoadedNetwork(NamedTuple):
    """A network in evaluation mode on the CPU, its graph, and the file of its weights."""

    net: nn.Module
    graph: fx.GraphModule  # folded and equalized where that is asked for
    model: str  # its name
    file: WeightsFile


# --- the sweep -------------------------------------------------------------------------------


def sweep(
    network: MeasuredNetwork, quantizations: Sequence[Quantization], steps: LearnedSteps | None
) -> Iterator[Row]:
    """Yield the rows of one network: unquantized, then every quantization."""
    full = network.unquantized
    if not math.isfinite(full.loss):
        raise ValueError(f"its loss is {full.loss} without quantizing: no trained network's")
    yield report.make_row(network.name, UNQUANTIZED, FLOAT_BITS, [full], full.accuracy)
    for how in quantizations:
        trials = [network.trial(how, trial) for trial in range(how.n_trials)]
        yield report.make_row(
            network.name,
            how.scheme,
            how.n_bits,
            trials,
            full.accuracy,
            levels=how.n_levels,
            act_bits=how.act_bits,
            coverage=network.coverage(how.act_bits),
        )
    if steps:
        yield report.make_row(
            network.name,
            LEARNED,
            steps.weight_bits,
            [network.learned(steps)],
            full.accuracy,
            levels=2**steps.weight_bits,
            act_bits=steps.act_bits or FLOAT_BITS,
            coverage=network.learned_coverage(steps),
        )


def make_quantizations(args: argparse.Namespace) -> list[Quantization]:
    """Return every scheme with every bit-width of weights and of inputs, with their options."""
    learners = utils.learned_schemes(args)
    correction = qu.bias_correction if args.bias_correction else None
    correction = qu.mean_correction if args.mean_correction else correction
    return [
        Quantization(
            scheme,
            n_bits,
            act_bits,
            make_quantizer=partial(bind_options, qu.QUANTIZERS[scheme], vars(args)),
            n_trials=args.trials if qu.is_stochastic(scheme) else 1,
            bias_range=qu.bias_range(scheme, args.biases, args.fold_bn),
            correction=correction,
            learns=scheme in learners,
            n_levels=qu.n_levels(scheme, n_bits, args.overlapping),
        )
        for scheme in args.schemes
        for n_bits in args.bits
        for act_bits in utils.act_bit_widths(n_bits, args)
    ]


def bind_options(
    quantizer: qu.Quantizer, options: Mapping[str, Any], trial: int = 0
) -> qu.Quantizer:
    """Bind those options that the quantizer takes, and a generator, which depends on the trial."""
    generator = torch.Generator().manual_seed(options["seed"] + trial)
    options = {**options, "generator": generator}
    names = options.keys() & inspect.signature(quantizer).parameters.keys()
    return partial(quantizer, **{name: options[name] for name in names})


def make_conditions(args: argparse.Namespace, display: StepDisplay) -> Conditions:
    """Return how the flags say that networks are quantized and measured."""
    return Conditions(
        args.device,
        resolve_precision(args.precision, args.device),
        MEMORY_FORMATS[args.memory_format],
        args.calibration,
        args.quantize_sums,
        args.act_symmetry == "asymmetric",
        args.keep_first_last,
        args.rounding_steps,
        in_integers=any(getattr(args, flag) for flag in INTEGER_FLAGS),
        avg_in_layer=args.avg_in_layer,
        tick=display.step,
    )


def make_images(args: argparse.Namespace, dataset: ImageDataset) -> Images:
    """Make the loaders of the images that the flags ask for, normalized once and cached."""
    make = partial(utils.loader_maker(args, dataset), cache=True)

    def first(n: int | None, batch_size: int = args.batch_size):  # noqa: ANN202
        images = dataset.train_images[:n], dataset.train_labels[:n]
        return make(*images, batch_size=batch_size) if n else None

    return Images(
        make(dataset.test_images, dataset.test_labels),
        first(args.act_bits and args.calibration_images, CALIBRATION_BATCH),
        first(args.recalibrate_bn_images),
        first(args.per_layer and args.per_layer_images),
        first(args.rounding == "adaround" and args.rounding_images, ROUNDING_BATCH),
    )


# --- networks --------------------------------------------------------------------------------


def load_networks(
    files: Mapping[str, WeightsFile],
    args: argparse.Namespace,
    explicit_flags: Set[str],
    dataset: ImageDataset,
) -> dict[str, LoadedNetwork]:
    """Return the networks of all files that can be read; for the others an error is printed.

    Without --model a network is the one that the file's record names, in its width. Raises
    NetworkError for a network that cannot be quantized.
    """
    loaded = {}
    for name, file in files.items():
        try:
            model, width = recorded_network(file, args.model, args.width, explicit_flags)
            net = make_model(model, dataset.num_classes, width).eval()
            image_shape = dataset.test_images.shape[1:]
            check_network(net, image_shape, dataset.num_classes)
            load_weights(net, file.path)
            for key, value in net.state_dict().items():
                if not value.isfinite().all():
                    raise FileError(f"{file.path}: {key} holds NaN or infinite values")
            graph = prepare_graph(export_network(net, image_shape), file.path, args)
        except FileError as error:
            print_error(error)
        else:
            loaded[name] = LoadedNetwork(net, graph, model, file)
    return loaded


def prepare_graph(graph: fx.GraphModule, path: Path, args: argparse.Namespace) -> fx.GraphModule:
    """Return the graph with batch norms folded (--fold_bn), then with channels equalized.

    Quantizing on the CPU gives the same grids whatever the device. Raises FileError where folding
    overflows, be it after quantizing.
    """
    folded = fold_batch_norms(graph)
    if not all(t.isfinite().all() for t in weights(folded).values()):
        raise FileError(
            f"{path}: folding overflows: a batch norm has a negative or vast variance, or weights "
            "are vast"
        )
    if args.fold_bn:
        print_unfolded(graph, path)
        graph = folded
    if not args.equalize:
        return graph
    if foldable(graph):
        raise NetworkError(f"--equalize needs --fold_bn: {path} has batch norms")
    # A file to deploy holds weights only: no network of others has a bound for each channel.
    across_relu6 = not any(getattr(args, flag) for flag in FILE_FLAGS)
    graph, equalization = equalize(graph, across_relu6)
    if equalization.n_pairs:
        print(f"{path}: {equalization}")
    else:
        print_warning(f"{path}: --equalize has no effect: {equalization}")
    return graph


def print_unfolded(graph: fx.GraphModule, path: Path) -> None:
    """Print that there is nothing to fold or, if any do, which batch norms stay unfolded."""
    norms = batch_norms(graph)
    folded = [norm for _, norm in foldable(graph)]
    left = [norm.meta["path"] for norm in norms if norm not in folded]
    if not norms:
        print(f"--fold_bn has no effect: {path} has no batch norms")
    if left:
        some = ", ".join(left[:3]) + ", …" * (len(left) > 3)
        print(f"{path}: {len(left)} batch norms do not follow a layer alone: they stay ({some})")


def recorded_network(
    file: WeightsFile, model: str, width: float, explicit_flags: Set[str]
) -> tuple[str, float]:
    """Return name and width of the network in the file's record, unless the flags are given.

    The width is the record's where that names this network. Raises FileError for one that no
    network can have.
    """
    recorded, recorded_width = file.setting("model"), file.setting("width")
    if "model" not in explicit_flags and is_model(recorded):
        model = recorded
    if "width" not in explicit_flags and recorded == model and recorded_width is not None:
        place = f"the record of {file.path}: width"
        width = parse_recorded(utils.parse_width, recorded_width, place)
    return model, width


def parse_recorded(parse, value: object, place: str) -> float:  # noqa: ANN001
    """Return a number of a record as the flag's type reads it; FileError where that refuses it."""
    try:
        return parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise FileError(f"{place} {error}") from error


# --- what is said before and beside the numbers ------------------------------------------------


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


def check_n_images(args: argparse.Namespace, explicit_flags: Set[str], n_train: int) -> None:
    """Raise DataError where a flag asks for more training images than there are.

    A default that does is lowered to their number.
    """
    for flag in ("recalibrate_bn", "calibration", "per_layer", "rounding"):
        name = f"{flag}_images"
        n_images = getattr(args, name)
        if n_images and n_images > n_train:
            if name in explicit_flags:
                raise DataError(f"--{name} {n_images}: there are {n_train} training images")
            setattr(args, name, n_train)


def check_layers(loaded: Mapping[str, LoadedNetwork], names: Sequence[str]) -> None:
    """Raise NetworkError where a layer to show is not in all of the networks."""
    try:
        distributions.shared_layers([layers(network.graph) for network in loaded.values()], names)
    except ValueError as error:
        raise NetworkError(str(error)) from error


def check_coverage(
    network: MeasuredNetwork, quantizations: Sequence[Quantization], strict: bool
) -> None:
    """Print what stays in float, if anything does; with --strict that is a NetworkError."""
    for act_bits in dict.fromkeys(how.act_bits == FLOAT_BITS for how in quantizations):
        covered = network.coverage(FLOAT_BITS if act_bits else 8)
        if covered.is_whole:
            continue
        if strict:
            raise ValueError(f"--strict: {covered}")
        print_warning(f"{network.name}: {covered}")


def check_accuracy(row: Row, file: WeightsFile, dataset: str, is_whole_test_set: bool) -> None:
    """Warn where a row is not as accurate as the network was when it had been trained.

    That is known of the unquantized network, and of one with the steps that it has learned.
    """
    key = {UNQUANTIZED: "final_accuracy", LEARNED: "quantized_accuracy"}.get(row["scheme"])
    expected = file.expected_accuracy(dataset, is_whole_test_set, key) if key else None
    if expected is not None and abs(row["accuracy"] - expected) > MAX_ACCURACY_CHANGE:
        how = "without quantizing" if key == "final_accuracy" else "with the learned steps"
        print_warning(
            f"{file.path}: accuracy {row['accuracy']:.2%} {how}, but its record "
            f"says {expected:.2%}: are these its data and weights?"
        )


def read_learned_steps(
    path: str | None, loaded: Mapping[str, LoadedNetwork]
) -> tuple[LearnedSteps | None, WeightsFile | None]:
    """Return the step sizes of --steps_from and the record they are in; None without the flag.

    Raises FileError where they do not fit the one network, and warns where the record is of another
    training than its weights.
    """
    if not path or not loaded:
        return None, None
    [network] = loaded.values()
    steps = read_steps(Path(path), network.net, network.graph)
    record = read_training_record(Path(path))
    if steps.layers.keys() != layers(network.graph).keys():
        raise FileError(f"{path}: its learned steps are not of the layers of this network")
    ids = [each.record.get("run_id") for each in (network.file, record)]
    if None not in ids and ids[0] != ids[1]:
        print_warning(f"{path} has the steps of another training than that of {network.file.path}")
    return steps, record


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
    recorded = [recorded_network(f, args.model, 1.0, {"width"}) for f in files.values()]
    warn_unused_flags(parser, args, FLAGS_OF_RECORDS, models=[model for model, _ in recorded])
    dataset = utils.load_dataset(args)
    check_n_images(args, explicit_flags, len(dataset.train_images))
    use_ieee_float32()
    loaded = distributed.run_on_rank0_and_broadcast(
        lambda: load_networks(files, args, explicit_flags, dataset)
    )
    if args.layers and loaded:
        check_layers(loaded, args.layers)
    steps, record = read_learned_steps(args.steps_from, loaded)
    quantizations = make_quantizations(args)
    # That a file to verify fits is known before anything is measured.
    if isinstance(args.verify, str) and args.verify != args.export:
        for network in loaded.values():
            source = describe_source(network, quantizations[0], vars(args), dataset)
            deployed_files.read_model(Path(args.verify), source)
    networks = {}
    try:
        with StepDisplay(n_measurements(args, quantizations, loaded), "network") as display:
            conditions = make_conditions(args, display)
            images = make_images(args, dataset)
            for name, each in loaded.items():
                display.describe(name)
                networks[name] = network = MeasuredNetwork(
                    name, each.graph, each.net, not args.fold_bn, conditions, images
                )
                measure_network(network, each.file, quantizations, steps, record, args, results)
    finally:  # an interruption loses nothing that was measured before it
        if results.rows and distributed.get_rank() == 0:
            report_results(results, loaded, quantizations, args, folder)
    is_complete = distributed.get_rank() > 0 or results.checkpoints() == files.keys()
    if is_complete and any(getattr(args, flag) for flag in FILE_FLAGS):
        [(name, network)] = networks.items()
        return deploy(network, loaded[name], quantizations[0], args, dataset)
    return is_complete


def describe_source(
    network: LoadedNetwork, how: Quantization, settings: Mapping[str, Any], dataset: ImageDataset
) -> dict[str, str]:
    """Return the metadata of a file to deploy."""
    return deployed_files.describe_source(
        network.file.path,
        settings,
        model=network.model,
        scheme=how.scheme,
        n_bits=how.n_bits,
        act_bits=how.act_bits,
        classes=dataset.classes,
    )


def deploy(
    network: MeasuredNetwork,
    loaded: LoadedNetwork,
    how: Quantization,
    args: argparse.Namespace,
    dataset: ImageDataset,
) -> bool:
    """Write the files of the one network that the flags ask for, and verify the ONNX file.

    Returns whether runtime, simulation and float network agree. Raises FileError where the file to
    verify is not of this network and these flags.
    """
    graph_q, _ = network.quantized_weights(how)
    targets = {flag: getattr(args, flag) for flag in ("export", "save_quantized", "save_integers")}
    if not network.conditions.in_integers:
        deployed_files.write_files(net_q=write_back(network.net, graph_q), **targets)
        return True
    integers = network.integers(how)
    source = describe_source(loaded, how, vars(args), dataset)
    graph_int = with_integers(graph_q, integers.integers())
    net_q = write_back(network.net, graph_int)
    deployed_files.write_files(
        net_q=net_q, integers=integers, dataset=dataset, source=source, **targets
    )
    if not args.verify:
        return True
    simulations = {
        name: qu.quantize_activations(graph, network.grids(how.act_bits))
        for name, graph in (("float32", graph_int), ("float32, biases not rounded", graph_q))
    }
    compared = verify.Compared(integers, simulations, graph_q, network.graph)
    path = Path(args.export if args.verify is True else args.verify)
    test = network.images.test
    return verify.verify_file(path, compared, test=test, dataset=dataset, source=source)


def n_measurements(
    args: argparse.Namespace,
    quantizations: Sequence[Quantization],
    loaded: Mapping[str, LoadedNetwork],
) -> int:
    """Return how often a network will be measured."""
    n_each = 1 + sum(how.n_trials for how in quantizations) + bool(args.steps_from)
    n_layers = sum(len(layers(network.graph)) for network in loaded.values())
    by_layer = 2 * len(args.schemes) * len(args.bits) * n_layers + len(loaded)
    return n_each * len(loaded) + (by_layer if args.per_layer else 0)


def measure_network(
    network: MeasuredNetwork,
    file: WeightsFile,
    quantizations: Sequence[Quantization],
    steps: LearnedSteps | None,
    steps_record: WeightsFile | None,
    args: argparse.Namespace,
    results: Results,
) -> None:
    """Add the rows of one network to the results; if it cannot be quantized, print why instead."""
    common = file.provenance()
    common |= {flag: getattr(args, flag) for flag in ("per_channel", "fold_bn", "equalize")}
    learners = utils.learned_schemes(args)
    try:
        check_coverage(network, quantizations, args.strict)
        if args.show_plan and distributed.get_rank() == 0:
            rows = plan_rows(network, quantizations, args.per_channel)
            print(report.table(rows, PLAN_COLUMNS), end="\n\n")
        for row in sweep(network, quantizations, steps):
            is_learned = row["scheme"] == LEARNED
            is_whole = not (args.holdout or args.test_subset)
            check_accuracy(row, steps_record if is_learned else file, args.dataset, is_whole)
            how = {"rounding": qu.rounding_of(row["scheme"], learners)}
            results.rows.append(row | common | how | ({"per_channel": False} if is_learned else {}))
        if args.per_layer:
            of_weights = {(how.scheme, how.n_bits): how for how in quantizations}
            results.layer_rows += network.per_layer([*of_weights.values()])
    except ValueError as error:
        results.discard(network.name)
        print_error(f"{file.path}: {error}")


def report_results(
    results: Results,
    loaded: Mapping[str, LoadedNetwork],
    quantizations: Sequence[Quantization],
    args: argparse.Namespace,
    folder: Path,
) -> None:
    """Print the tables, write files and plots into the folder, and log all to the dashboard."""
    rows, layer_rows = results.rows, results.layer_rows
    measured = {name: loaded[name] for name in loaded if name in results.checkpoints()}
    layer_weights = {name: weights(network.graph) for name, network in measured.items()}
    has_act_bits = any(row["act_bits"] != FLOAT_BITS for row in rows)
    print(report.table(rows, report.PRINTED_COLUMNS + ("act_bits",) * has_act_bits))
    print(f"biases: {describe_biases(quantizations)}")
    if layer_rows:
        print(f"\none layer at a time; loss on {args.per_layer_images} training images")
        print(report.table(layer_rows, report.LAYER_COLUMNS))
    settings = {**vars(args), "output": str(folder)}
    report.save_tables(rows, layer_rows, settings, folder)
    plots = {}
    if len(measured) > 1 or args.layers:
        plots |= draw_distributions(layer_weights, args, folder)
    if not args.no_plots:
        plots |= draw_plots(results, layer_weights, args, folder)
    print(f"\nresults: {folder / 'results.csv'}, {folder / 'results.json'}")
    if plots:
        print("plots:   " + ", ".join(map(str, plots.values())))
    files = {name: network.file for name, network in measured.items()}
    print(dashboard.log_quantizations(args, settings, files, results, plots))


def describe_biases(quantizations: Sequence[Quantization]) -> str:
    """Return how biases are quantized, as the report says it."""
    words = {
        None: "in full precision",
        "weight": "on their weights' grids",
        "own": "with a range of their own",
    }
    schemes: dict[str, dict[str, None]] = {}
    for how in quantizations:
        schemes.setdefault(words[how.bias_range], {})[how.scheme] = None
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in schemes.items())


def draw_distributions(
    layer_weights: Mapping[str, Mapping[str, torch.Tensor]], args: argparse.Namespace, folder: Path
) -> dict[str, Path]:
    """Compare how the networks' weights are distributed; return the figure's path, by title.

    Writes distributions.csv with every layer, and distributions.png with some.
    """
    flat = distributions.flat_weights(layer_weights)
    rows = distributions.statistics(flat)
    report.save_csv(rows, distributions.COLUMNS, folder / "distributions.csv")
    try:
        chosen = distributions.choose_layers(rows, args.layers)
    except ValueError as error:
        print_warning(f"no distributions.png: {error}")
        return {}
    if args.no_plots:
        return {}
    path = folder / "distributions.png"
    distributions.distributions_plot(flat, chosen, args.absolute_weights, path)
    return {"distributions": path}


def draw_plots(
    results: Results,
    layer_weights: Mapping[str, Mapping[str, torch.Tensor]],
    args: argparse.Namespace,
    folder: Path,
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
    quantizers = {name: bind_options(qu.QUANTIZERS[name], vars(args)) for name in args.schemes}
    for name, of_layers in layer_weights.items():
        path = plots[f"weights/{name}"] = folder / f"{report.weights_figure(name)}.png"
        figures.weights_plot(name, of_layers, quantizers, n_bits, args.per_channel, path)
    return plots


# --- the script ------------------------------------------------------------------------------


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
        deployed_files.check_run([flag for flag in FILE_FLAGS if getattr(args, flag)])
        is_complete = run(parser, args, folder)
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    main()
