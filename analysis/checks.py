"""What is checked and said before and beside the numbers of quant_inference.py."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from torch import fx, nn
from tqdm import tqdm

from analysis import distributions
from analysis.measured_network import MeasuredNetwork, Quantization
from analysis.report import FILES, FLOAT_BITS, LEARNED, UNQUANTIZED, Row
from analysis.weights_files import (
    WeightsFile,
    common_dataset,
    common_image_size,
    find_paths,
    read_record,
    read_training_record,
)
from data import DATASETS, accepts
from engine.deploy.deployed_files import verification_record
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.onnx_emitter import FileForm
from engine.networks.folding import batch_norms, foldable
from engine.networks.graph import adds_infinity, layers, operations
from engine.quantization.adaround import learned_layers
from engine.quantization.coverage import by_reason, first_names
from engine.system import distributed
from engine.system.cli import Parser
from engine.system.errors import FileError, NetworkError, SetupError
from engine.system.io import check_writable
from engine.training.learned_steps import LearnedSteps, read_steps
from models import is_model

MAX_ACCURACY_CHANGE = 0.01  # of accuracy since training: more than bfloat16 or another machine does


def print_error(message: object) -> None:
    """Print one line about a file on rank 0; the others are evaluated all the same."""
    print_warning(f"error: {message}")


def print_warning(message: str) -> None:
    """Print one line about a file on rank 0."""
    if distributed.get_rank() == 0:
        tqdm.write(f"quant_inference.py: {message}", file=sys.stderr)


def check_deployed_files(parser: Parser, args: argparse.Namespace, folder: Path) -> None:
    """Refuse names of files to deploy that cannot be written, or that another file has.

    `folder` is that of the results.
    """
    taken = {(folder / f"{stem}{end}").resolve(): "a file of the results" for stem, end in FILES}
    if args.verify:
        exported = Path(args.export or "").resolve()
        if args.verify is not True and Path(args.verify).resolve() == exported:
            args.verify = True
        model = Path(args.export if args.verify is True else args.verify)
        taken[verification_record(model).resolve()] = "the record of --verify"
        if args.verify is not True:
            taken[model.resolve()] = "the file of --verify"
    taken |= {
        path.resolve(): "the file to quantize" for path in find_paths(args.checkpoints).values()
    }
    for flag in ("export", "save_quantized", "save_integers", "page"):
        if not getattr(args, flag):
            continue
        path = Path(getattr(args, flag))
        make_parent(parser, flag, path)
        target = path.resolve()
        if path.suffix in (".pt", ".ckpt", ".json") and path.exists() and read_record(path):
            taken.setdefault(target, "a file of a training")
        if target in taken:
            parser.error(f"--{flag} {path}: that is {taken[target]}")
        taken[target] = f"the file of --{flag}"


def make_parent(parser: Parser, flag: str, path: Path) -> None:
    """Make the folder that a file of that flag will be in; end with one line if it cannot be."""
    try:
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(f"--{flag}: {error}")


def make_output_folder(parser: Parser, args: argparse.Namespace) -> Path:
    """Return the folder for results, made where it is missing; end with one line if it cannot be.

    Without --output it is that of the first file that exists.
    """
    paths = find_paths(args.checkpoints).values()
    first = next(filter(os.path.exists, paths), Path("."))
    folder = Path(args.output) if args.output else first.parent
    make_parent(parser, "output", folder / "results.csv")
    return folder


def find_recorded_network(
    file: WeightsFile,
    args: argparse.Namespace,
    explicit_flags: Set[str],
    parse_width: Callable[[str], float],
) -> tuple[str, float]:
    """Return name and width of the network in the file's record, unless the flags are given.

    The width is the record's where that names this network. Raises FileError for one that no
    network can have.
    """
    model = args.model
    width = args.width
    recorded, recorded_width = file.setting("model"), file.setting("width")
    if "model" not in explicit_flags and is_model(recorded):
        model = recorded
    if "width" not in explicit_flags and recorded == model and recorded_width is not None:
        place = f"the record of {file.path}: width"
        width = parse_recorded(parse_width, recorded_width, place)
    return model, width


def parse_recorded(parse: Callable[[str], float], value: object, place: str) -> float:
    """Return a number of a record as the flag's type reads it; FileError where that refuses it."""
    try:
        return parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise FileError(f"{place} {error}") from error


def choose_dataset(
    files: Iterable[WeightsFile],
    args: argparse.Namespace,
    explicit_flags: Set[str],
    parse_size: Callable[[str], float],
) -> None:
    """Set --dataset to what the files were trained on, unless it is given: then warn of others.

    And --image_size to that of their images.
    """
    if "dataset" not in explicit_flags:
        args.dataset = common_dataset(files, DATASETS) or args.dataset
    if "image_size" not in explicit_flags:
        size = common_image_size(files, args.dataset) or args.image_size
        args.image_size = parse_recorded(parse_size, size, "the record's image_size")
    for file in files:
        trained_on = file.setting("dataset") or args.dataset
        if trained_on != args.dataset:
            print_warning(f"{file.path} was trained on {trained_on}, not on {args.dataset}")
            continue  # its record's --image_size is that of another data set, or of none
        size = file.image_size() or args.image_size
        if size != args.image_size and accepts(args.dataset, "image_size"):
            pixels = f"images of {size} pixels, not of {args.image_size}"
            print_warning(f"{file.path} was trained on {pixels}: --image_size")


def check_n_images(args: argparse.Namespace, explicit_flags: Set[str], n_train: int) -> None:
    """Raise SetupError where a flag asks for more training images than there are.

    A default that does is lowered to their number.
    """
    for flag in ("recalibrate_bn", "calibration", "per_layer", "rounding"):
        name = f"{flag}_images"
        n_images = getattr(args, name)
        if n_images and n_images > n_train:
            if name in explicit_flags:
                raise SetupError(f"--{name} {n_images}: there are {n_train} training images")
            setattr(args, name, n_train)


def check_layers(graphs: Iterable[fx.GraphModule], names: Sequence[str]) -> None:
    """Raise SetupError where a layer to show is not in all of the networks."""
    try:
        distributions.shared_layers(map(layers, graphs), names)
    except ValueError as error:
        raise SetupError(str(error)) from error


def check_coverage(
    network: MeasuredNetwork,
    quantizations: Sequence[Quantization],
    steps: LearnedSteps | None,
    strict: bool,
) -> None:
    """Print what stays in float, with learned steps too; with --strict that is a ValueError.

    Raises ValueError, too, where there is nothing to quantize.
    """
    if not layers(network.graph):
        raise ValueError("the network has no layer with a weight: nothing to quantize")
    are_inputs_float = dict.fromkeys(how.act_bits == FLOAT_BITS for how in quantizations)
    found = [("", network.coverage(FLOAT_BITS if each else 8)) for each in are_inputs_float]
    found += [(f"{LEARNED}: ", network.learned_coverage(steps))] if steps else []
    for scheme, covered in found:
        if covered.in_float and strict:
            raise ValueError(f"--strict: {scheme}{covered}")
        if covered.in_float:
            print_warning(f"{network.name}: {scheme}{covered}")


def report_divergences(network: MeasuredNetwork) -> None:
    """Say which inputs outputs were corrected with, for each quantization that tried several."""
    if distributed.get_rank():
        return
    for (scheme, bits, act_bits), divergences in network.divergences.items():
        taken = min(divergences, key=divergences.get)
        each = ", ".join(f"{inputs} {nats:.4g}" for inputs, nats in divergences.items())
        way = f"{scheme}, {bits} bits" + f", inputs {act_bits}" * (act_bits != FLOAT_BITS)
        print(
            f"{network.name}: {way}: outputs corrected with {taken} inputs; "
            f"divergence of predictions on training images: {each} nats"
        )


def report_form(
    integers: IntegerNetwork, form: FileForm, network: MeasuredNetwork, how: Quantization
) -> None:
    """Say which layers of an ONNX file compute twice as much as they need, and what 7 bits cost."""
    names = [name for name, layer in integers.integers().items() if layer.can_saturate]
    if not names or form.signed_codes:
        return
    if form.may_saturate:
        print_warning(
            f"8-bit sums of {first_names(names)} saturate on x86 processors without VNNI: "
            "the ONNX file is for others (--export_for all is for these, too)"
        )
        return
    line = (
        f"8-bit weights of {first_names(names)} are two halves in the ONNX file, which has twice "
        "their bytes and products: sums of whole ones saturate on x86 processors without VNNI "
        "(--export_for vnni: whole)"
    )
    with_7 = replace(how, n_bits=7)
    if not how.is_mixed and max(network.weight_bits(with_7).values()) == 7:  # as few everywhere
        accuracy = network.trial(with_7, 0).accuracy
        line += f"; with weights of 7 bits, which need no halves, the accuracy is {accuracy:.2%}"
    print(line)


def check_written(
    net: nn.Module, written: nn.Module, reason: str | None, args: argparse.Namespace
) -> None:
    """Warn where the network itself, loading what was written, would not be what was measured.

    `reason` is why its graph was written in its place.
    """
    if args.fold_bn:  # docs/deploy.md says it
        return
    if reason:
        print_warning(
            f"{args.save_quantized} has the weights of the exported graph, for {reason}: the "
            "network itself cannot load them, or computes something else with them"
        )
    elif written.state_dict().keys() != net.state_dict().keys():
        print_warning(
            f"{args.save_quantized} has weights in place of their parametrizations: remove those "
            "(torch.nn.utils.parametrize) before the network loads it"
        )


def check_sums(network: MeasuredNetwork, path: Path) -> None:
    """Say which sums stay in float with --quantize_sums, and warn where that leaves none."""
    graph = network.graph
    if not network.conditions.sums:
        return
    if masked := [n.meta["path"] or n.name for n in graph.graph.nodes if adds_infinity(graph, n)]:
        print_warning(f"{path}: in float: sums with a mask of −∞ ({first_names(masked)})")
    if not any(each.is_sum for each in operations(graph)):
        print_warning(
            f"{path}: --quantize_sums has no effect: the network adds up nothing but, at most, "
            "vectors, numbers and masks"
        )


def check_rounding(network: MeasuredNetwork, rounding: str) -> bool:
    """Say which layers go to nearest where rounding is learned; return whether any is learned."""
    if rounding == "nearest":
        return False
    learned = learned_layers(network.graph)
    if others := [name for name in layers(network.graph) if name not in learned]:
        effect = "is for" if learned else "has no effect: it is for"
        print_warning(
            f"{network.name}: --rounding {rounding} {effect} 2-d convolutions and linear layers; "
            f"to nearest: {first_names(others)}"
        )
    return bool(learned)


def report_bits(network: MeasuredNetwork, scheme: str, bits: Mapping[str, int]) -> None:
    """Print the bits of the weights of each layer, by name."""
    if distributed.get_rank() == 0:
        each = ", ".join(f"{name} {n}" for name, n in bits.items())
        print(f"{network.name}: {scheme}: {network.mean_bits(bits):.4f} bits per weight: {each}")


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
    path: Path, net: nn.Module, graph: fx.GraphModule, file: WeightsFile
) -> tuple[LearnedSteps, WeightsFile]:
    """Return the step sizes of --steps_from and the record that they are in.

    Raises FileError where they are not of the network, and warns where the record is of another
    training than the weights in `file`.
    """
    steps = read_steps(path, net, graph)
    record = read_training_record(path)
    ids = [each.record.get("run_id") for each in (file, record)]
    if None not in ids and ids[0] != ids[1]:
        print_warning(f"{path} has the steps of another training than that of {file.path}")
    return steps, record


def check_folding(graph: fx.GraphModule, path: Path) -> None:
    """Print that there is nothing to fold or, if any do, which batch norms stay unfolded.

    Raises NetworkError where all do.
    """
    norms = batch_norms(graph)
    folded = [norm for _, norm in foldable(graph)]
    left = [norm.meta["path"] for norm in norms if norm not in folded]
    if not norms:
        print(f"--fold_bn has no effect: {path} has no batch norms")
    elif not folded:
        raise NetworkError(f"--fold_bn: no batch norm after a convolution in {path}: cannot fold")
    if left:
        some = ", ".join(left[:3]) + ", …" * (len(left) > 3)
        print(f"{path}: {len(left)} batch norms do not follow a layer alone: they stay ({some})")


def describe_biases(quantizations: Sequence[Quantization]) -> str:
    """Return how biases are quantized, as the report says it."""
    words = {
        None: "in full precision",
        "weight": "on their weights' grids",
        "own": "with a range of their own",
    }
    schemes = by_reason({how.scheme: words[how.bias_range] for how in quantizations})
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in schemes.items())
