"""Quantize saved weights with every scheme at every bit-width and report the accuracy drop.

`sweep` is the loop over schemes and bit-widths for one network; `run` loads the networks, sweeps
each of them and reports. The quantizers are in quant_utils.py, the flags in flags.py, and what is
worked out for one network in analysis/measured_network.py.
"""

import engine.system.early_interrupt  # noqa: F401, first: what follows takes seconds

# isort: split
import argparse
import inspect
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn

import flags
import quant_utils as qu
import utils
from analysis import checks, dashboard, distributions, figures, report
from analysis.measured_network import Conditions, Images, MeasuredNetwork, Quantization
from analysis.quantization_plan import COLUMNS as PLAN_COLUMNS
from analysis.quantization_plan import plan_rows
from analysis.report import FLOAT_BITS, LEARNED, UNQUANTIZED, Results, Row
from analysis.weights_files import WeightsFile, find_weights, warn_of_holdout
from data import ImageDataset, is_seeded
from engine.deploy import deployed_files, page, verify
from engine.deploy.integer_layers import with_integers
from engine.deploy.onnx_emitter import FileForm
from engine.images.loader import Loader
from engine.networks.export import export_network, write_back
from engine.networks.folding import fold_batch_norms, foldable
from engine.networks.graph import layers, weights
from engine.networks.layers import check_loaded_weights, not_finite
from engine.networks.outputs import check_network
from engine.quantization.activations import quantize_activations
from engine.quantization.bit_allocation import BIT_CHOICES
from engine.quantization.equalization import equalize
from engine.system import distributed
from engine.system.cli import Parser, exit_codes, refuse_flags, warn_unused_flags
from engine.system.errors import FileError, NetworkError
from engine.system.hardware import MEMORY_FORMATS, print_device, resolve_precision, use_ieee_float32
from engine.system.io import load_weights
from engine.system.progress import StepDisplay
from engine.system.signals import GracefulShutdown
from engine.training.learned_steps import FIRST_LAST_BITS, LearnedSteps
from flags import FILE_FLAGS, INTEGER_FLAGS
from models import make_model

FLAGS_OF_RECORDS = [*flags.NETWORK[1:], *flags.DATA[1:]]  # known when records have been read
CALIBRATION_BATCH = 64  # images: ranges must not depend on --batch_size
ROUNDING_BATCH = 32  # images: what is learned must not depend on --batch_size


class LoadedNetwork(NamedTuple):
    """A network in evaluation mode on the CPU, its graph, and the file of its weights."""

    net: nn.Module
    graph: fx.GraphModule  # folded and equalized where that is asked for
    model: str  # its name
    file: WeightsFile

    def describe(
        self, how: Quantization, settings: Mapping[str, Any], dataset: ImageDataset
    ) -> dict[str, str]:
        """Return the metadata of a file to deploy."""
        is_random = qu.is_stochastic(how.scheme) or is_seeded(settings["dataset"])
        return deployed_files.describe_source(
            self.file.path,
            settings,
            how,
            self.model,
            dataset.classes,
            settings["seed"] if is_random else None,
        )


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
            layer_bits=network.weight_bits(how),
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
            layer_bits=steps.bits_of_layers(),
        )


def make_quantizations(args: argparse.Namespace) -> list[Quantization]:
    """Return every scheme with every bit-width of weights and of inputs, with their options."""
    learners, is_mixed = utils.learned_schemes(args), args.budget_bits is not None
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
            n_levels=None if is_mixed else qu.n_levels(scheme, n_bits, args.overlapping),
            is_mixed=is_mixed,
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
        args.output_bias_correction,
        args.rounding_steps,
        by_blocks=args.rounding == "qdrop",
        in_integers=any(getattr(args, flag) for flag in INTEGER_FLAGS),
        avg_in_layer=args.avg_in_layer,
        tick=display.step,
    )


def make_images(args: argparse.Namespace, dataset: ImageDataset) -> Images:
    """Make the loaders of the images that the flags ask for, normalized once and cached."""
    make = partial(utils.loader_maker(args, dataset), cache=True)

    def first(is_needed: bool, n: int | None, batch_size: int = args.batch_size) -> Loader | None:
        images = dataset.train_images[:n], dataset.train_labels[:n]
        return make(*images, batch_size=batch_size) if is_needed else None

    n_bn = args.recalibrate_bn_images
    n_bn = n_bn and utils.without_single_image(n_bn, args.batch_size)
    is_calibrated = bool(flags.CALIBRATES.is_met(args))
    return Images(
        make(dataset.test_images, dataset.test_labels),
        first(is_calibrated, args.calibration_images, CALIBRATION_BATCH),
        first(n_bn is not None, n_bn),
        first(args.per_layer, args.per_layer_images),
        first(args.rounding != "nearest", args.rounding_images, ROUNDING_BATCH),
    )


recorded_network = partial(checks.find_recorded_network, parse_width=utils.parse_width)


def load_networks(
    files: Mapping[str, WeightsFile],
    args: argparse.Namespace,
    explicit_flags: Set[str],
    dataset: ImageDataset,
) -> dict[str, LoadedNetwork]:
    """Return the networks that can be read and quantized; for the others an error is printed.

    Without --model a network is the one that the file's record names, in its width.
    """
    loaded = {}
    programs = defaultdict(list)  # by model and width: tracing a network takes seconds
    for name, file in files.items():
        try:
            model, width = recorded_network(file, args, explicit_flags)
            model = utils.model_of_file(model, file)
            net = make_model(model, dataset.num_classes, width)
            net.eval()
            image_shape = dataset.test_images.shape[1:]
            check_network(net, image_shape, dataset.num_classes)
            masks = not_finite(net)
            load_weights(net, file.path)
            check_loaded_weights(net, file.path, masks)
            graph = export_network(net, image_shape, programs[model, width])
            graph = prepare_graph(graph, file.path, args)
        except FileError as error:
            checks.print_error(error)
        except NetworkError as error:
            checks.print_error(NetworkError(f"{file.path}: {error}"))
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
        checks.check_folding(graph, path)
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
        checks.print_warning(f"{path}: --equalize has no effect: {equalization}")
    return graph


def run(parser: Parser, args: argparse.Namespace, folder: Path) -> bool:
    """Measure every file and report into the folder; return whether all could be measured."""
    explicit_flags = parser.explicit_flags
    files, results = find_weights(args.checkpoints), Results()
    if not any(file.path.exists() for file in files.values()):
        raise FileError(f"{', '.join(str(file.path) for file in files.values())}: no such file")
    checks.choose_dataset(files.values(), args, explicit_flags, utils.parse_image_size)
    models = [recorded_network(f, args, explicit_flags | {"width"})[0] for f in files.values()]
    warn_unused_flags(parser, args, FLAGS_OF_RECORDS, models=models)
    dataset = utils.load_dataset(args)
    checks.check_n_images(args, explicit_flags, len(dataset.train_images))
    warn_of_holdout(files.values(), args, len(dataset.train_images))
    use_ieee_float32()
    # Each process reads the files, as graphs lose their names when they are sent; rank 0 prints.
    with redirect_stdout(None if distributed.get_rank() else sys.stdout):
        loaded = load_networks(files, args, explicit_flags, dataset)
    if args.layers and loaded:
        checks.check_layers([network.graph for network in loaded.values()], args.layers)
    steps = record = None
    if args.steps_from and loaded:
        [network] = loaded.values()
        steps, record = checks.read_learned_steps(
            Path(args.steps_from), network.net, network.graph, network.file
        )
    quantizations = make_quantizations(args)
    if isinstance(args.verify, str):
        check_file_to_verify(loaded, quantizations[0], args, dataset)
    networks = {}
    try:
        total = n_measurements(quantizations, loaded, args) + bool(steps)
        with StepDisplay(total, "network") as display:
            conditions = make_conditions(args, display)
            images = make_images(args, dataset)
            for name, each in loaded.items():
                display.describe(name)
                network = MeasuredNetwork(name, each.graph, each.net, conditions, images)
                networks[name] = network
                measure_network(network, each.file, quantizations, steps, record, args, results)
    finally:  # an interruption loses nothing that was measured before it
        if results.rows and distributed.get_rank() == 0:
            report_results(results, loaded, networks, quantizations, args, folder)
    is_complete = distributed.get_rank() > 0 or results.checkpoints() == files.keys()
    if is_complete and any(getattr(args, flag) for flag in FILE_FLAGS):
        [(name, network)] = networks.items()
        return deploy(network, loaded[name], quantizations[0], args, dataset)
    return is_complete


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
    if not network.conditions.in_integers:
        net_q, reason = write_back(network.net, graph_q)
        deployed_files.write_files(vars(args), net_q)
        checks.check_written(network.net, net_q, reason, args)
        return True
    integers = network.integers(how)
    source = loaded.describe(how, vars(args), dataset)
    graph_int = with_integers(graph_q, integers.integers())
    net_q, _ = write_back(network.net, graph_int)  # folded: docs/deploy.md says what it is of
    test = network.images.test
    form = FileForm.named(args.pack_weights, args.export_for)
    deployed_files.write_files(vars(args), net_q, integers, dataset, source, form)
    if args.export or args.page:
        checks.report_form(integers, form, network, how)
    if args.page:
        page.write_page(Path(args.page), network.graph, integers, form, test, dataset, source)
    if not args.verify:
        return True
    simulations = {
        name: quantize_activations(graph, network.grids(how.act_bits))
        for name, graph in (("float32", graph_int), ("float32, biases not rounded", graph_q))
    }
    compared = verify.Compared(integers, simulations, graph_q, network.graph, network.net)
    path = Path(args.export if args.verify is True else args.verify)
    others = [name for name in args.runtimes if name != "onnxruntime"]  # which is always run
    return verify.verify_file(
        path, compared, test=test, dataset=dataset, source=source, runtimes=others
    )


def check_file_to_verify(
    loaded: Mapping[str, LoadedNetwork],
    how: Quantization,
    args: argparse.Namespace,
    dataset: ImageDataset,
) -> None:
    """Raise FileError, before anything is measured, where the file to verify is not of this."""
    for network in loaded.values():
        source = network.describe(how, vars(args), dataset)
        deployed_files.read_model(Path(args.verify), source, dataset.test_images.shape[1:])


def n_measurements(
    quantizations: Sequence[Quantization],
    loaded: Mapping[str, LoadedNetwork],
    args: argparse.Namespace,
) -> int:
    """Return how often a network will be measured.

    With --per_layer each batch of its images is differentiated for every layer, too.
    """
    n_batches = math.ceil(args.per_layer_images / args.batch_size)
    n_each = 1 + sum(how.n_trials for how in quantizations)
    n_layers = sum(len(layers(network.graph)) for network in loaded.values())
    ways = {(how.scheme, how.n_bits) for how in quantizations}
    n_each += args.per_layer + len(mixed := {how.scheme for how in quantizations if how.is_mixed})
    n_of_layer = args.per_layer * (2 + n_batches) * len(ways) + len(BIT_CHOICES) * len(mixed)
    return n_each * len(loaded) + n_of_layer * n_layers


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
    try:
        checks.check_coverage(network, quantizations, steps, args.strict)
        checks.check_sums(network, file.path)
        learns = checks.check_rounding(network, args.rounding)
        learners = utils.learned_schemes(args) if learns else []
        if network.conditions.in_integers:
            network.check_integer_form(quantizations[0].act_bits)
        if args.show_plan and distributed.get_rank() == 0:
            rows = plan_rows(network, quantizations, args.per_channel)
            print(report.table(rows, PLAN_COLUMNS), end="\n\n")
        bits = {how.scheme: network.weight_bits(how) for how in quantizations if how.is_mixed}
        learned_bits = steps.bits_of_layers() if steps else {}
        if len({*learned_bits.values()}) > 1:
            bits[LEARNED] = learned_bits
        for scheme, of_layers in bits.items():
            checks.report_bits(network, scheme, of_layers)
        for row in sweep(network, quantizations, steps):
            is_learned = row["scheme"] == LEARNED
            is_whole = not (args.holdout or args.test_subset)
            checks.check_accuracy(row, steps_record if is_learned else file, args.dataset, is_whole)
            common["rounding"] = qu.rounding_of(row["scheme"], learners, args.rounding)
            results.rows.append(row | common | ({"per_channel": False} if is_learned else {}))
        checks.report_divergences(network)
    except (ValueError, NetworkError) as error:
        results.discard(network.name)
        checks.print_error(f"{file.path}: {error}")
        return
    if args.per_layer:
        measure_layers(network, quantizations, results)


def measure_layers(
    network: MeasuredNetwork, quantizations: Sequence[Quantization], results: Results
) -> None:
    """Add the rows of one layer at a time; print why some lack something, where they do."""
    of_weights = {(how.scheme, how.n_bits): how for how in quantizations}
    try:
        network.per_layer([*of_weights.values()], results.layer_rows)
    except (ValueError, NetworkError) as error:
        checks.print_warning(f"--per_layer: {error}")


def report_results(
    results: Results,
    loaded: Mapping[str, LoadedNetwork],
    networks: Mapping[str, MeasuredNetwork],
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
    print(f"biases: {checks.describe_biases(quantizations)}")
    if args.keep_first_last:
        print(f"first and last layer: at least {FIRST_LAST_BITS} bits of weights and of inputs")
    if layer_rows:
        print(f"\none layer at a time; loss on {args.per_layer_images} training images")
        print(report.table(layer_rows, report.LAYER_COLUMNS))
    settings = {**vars(args), "output": str(folder)}
    report.save_tables(rows, layer_rows, settings, folder)
    plots = {}
    if len(measured) > 1 or args.layers:
        plots |= draw_distributions(layer_weights, args, folder)
    if not args.no_plots:
        plots |= draw_plots(results, networks, layer_weights, quantizations, args, folder)
    print(f"\nresults: {folder / 'results.csv'}, {folder / 'results.json'}")
    if plots:
        print(f"plots:   {', '.join(map(str, plots.values()))}")
    files = {name: network.file for name, network in measured.items()}
    print(dashboard.log_quantizations(args, settings, files, results, plots))


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
        checks.print_warning(f"no distributions.png: {error}")
        return {}
    if args.no_plots:
        return {}
    path = folder / "distributions.png"
    distributions.distributions_plot(flat, chosen, args.absolute_weights, path)
    return {"distributions": path}


def draw_plots(
    results: Results,
    networks: Mapping[str, MeasuredNetwork],
    layer_weights: Mapping[str, Mapping[str, torch.Tensor]],
    quantizations: Sequence[Quantization],
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
    shown = {how.scheme: how for how in quantizations if how.n_bits == n_bits}
    quantizers = {scheme: how.make_quantizer(0) for scheme, how in shown.items()}
    stems = report.weights_figures(layer_weights)
    for name, of_layers in layer_weights.items():
        path = plots[f"weights/{name}"] = folder / f"{stems[name]}.png"
        bits = {scheme: networks[name].weight_bits(how) for scheme, how in shown.items()}
        figures.weights_plot(name, of_layers, quantizers, bits, args.per_channel, path)
    return plots


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, ignore those without effect; sort bits and schemes.

    What data set and network have to do with waits for the records of the files.
    """
    args.bits, args.schemes = sorted(set(args.bits)), list(dict.fromkeys(args.schemes))
    args.bits = [args.budget_bits] if args.budget_bits else args.bits
    refuse_flags(parser, args, parser.flags)
    now = [flag for flag in parser.flags if flag not in FLAGS_OF_RECORDS]
    warn_unused_flags(parser, args, now)
    learners = utils.learned_schemes(args)
    if learners and (others := [scheme for scheme in args.schemes if scheme not in learners]):
        checks.print_warning(f"--rounding {args.rounding} has no effect on {', '.join(others)}")


def make_parser() -> Parser:
    """Make the parser of quant_inference.py."""
    return flags.make_parser(__doc__.splitlines()[0], flags.QUANTIZATION, batch_size=500)


def main(argv: Sequence[str] | None = None) -> None:
    """Quantize the files of the command line; exit with 1 if one could not be measured."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    folder = checks.make_output_folder(parser, args)
    checks.check_deployed_files(parser, args, folder)
    with exit_codes(parser), GracefulShutdown(), distributed.process_group(args.device):
        print_device(args.device)
        runtimes = args.runtimes if args.verify else ()
        deployed_files.check_run([flag for flag in FILE_FLAGS if getattr(args, flag)], runtimes)
        is_complete = run(parser, args, folder)
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    main()
