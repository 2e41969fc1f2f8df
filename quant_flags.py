"""The flags of quant_inference.py: their parser, what goes together, and what they ask for."""

import argparse
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import quant_utils as qu
import utils
from analysis.report import FLOAT_BITS
from analysis.weights_files import find_paths, read_record
from engine.quantization.bit_widths import parse_bits
from engine.system import distributed
from engine.system.cli import (
    Parser,
    Requirement,
    StoreFlat,
    add_alias,
    add_choice,
    bounded_number,
    choice_ignoring_case,
    file_name,
    refuse_unused_flags,
    warn_unused_flags,
)
from engine.system.hardware import PRECISIONS, with_float64
from engine.system.io import check_writable

PUBLISHED_SCHEMES = ("uniform", "dorefa", "pwlq")  # the default of --schemes
N_IMAGES = 512  # default of --calibration_images and --per_layer_images
INTEGER_FLAGS = ("export", "verify", "save_integers")  # of one network in integer arithmetic
FILE_FLAGS = (*INTEGER_FLAGS, "save_quantized")  # of one quantized network
N_ROUNDING_IMAGES, N_ROUNDING_STEPS = 1024, 500
ROUNDINGS = ("nearest", "adaround")
BIASES = ("published", "weight", "full")  # see --biases

# --- the parser ------------------------------------------------------------------------------


def bit_widths(text: str) -> list[int]:
    """Return the bit-widths that a number or a range such as "4-8" means: an argparse type."""
    try:
        bounds = [parse_bits(number) for number in text.split("-", 1)]
        if bounds != sorted(bounds):
            raise ValueError("the first is above the last")
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from 2 to 16, or a range of them such as 4-8"
        ) from error
    return list(range(bounds[0], bounds[-1] + 1))


def act_bit_widths_or_same(text: str) -> list[int | str]:
    """Return bit-widths, or "same": an argparse type."""
    return ["same"] if text.lower() == "same" else bit_widths(text)


def make_parser() -> Parser:
    """Make the parser of quant_inference.py."""
    parser = Parser(
        "Quantize saved weights with every scheme at every bit-width and report the accuracy drop."
    )
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
        type=file_name,
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
        type=file_name,
        metavar="ONNX",
        help="write the quantized network as an ONNX model of integers: uint8 images to logits; "
        "simulate it in the same integer arithmetic",
    )
    add(
        "--verify",
        type=file_name,
        nargs="?",
        const=True,
        metavar="ONNX",
        help="run what --export writes, or this file of an earlier --export, in ONNX Runtime: "
        "compare predictions with the simulation, speed and size with float32",
    )
    add(
        "--save_quantized",
        type=file_name,
        metavar="PT",
        help="write the quantized weights as a state_dict of floats for any PyTorch code",
    )
    add(
        "--save_integers",
        type=file_name,
        metavar="SAFETENSORS",
        help="write the integers of the weights packed into b bits, with scales and biases",
    )


# --- what goes together ----------------------------------------------------------------------


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, ignore those without effect; sort bits and schemes.

    Activations and layers are measured in float32: another precision would round beside them.
    """
    is_fp32, has_pwlq = args.precision == "fp32", "pwlq" in args.schemes
    learners = [scheme for scheme in args.schemes if learns_rounding(scheme, args)]
    on_grid = "--rounding nearest: it would move weights off the grid that was learned on"
    device, float64 = torch.device(args.device), "--device cpu or cuda, which have float64"
    has_float64 = with_float64(device) == device
    contradictions = (
        ("rounding", float64, has_float64 or not learners),
        *((flag, float64, has_float64) for flag in INTEGER_FLAGS),
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
    )
    warn_unused_flags(parser, args, requirements)
    if learners and (others := [scheme for scheme in args.schemes if scheme not in learners]):
        print_warning(f"--rounding adaround has no effect on {', '.join(others)}")
    args.bits, args.schemes = sorted(set(args.bits)), list(dict.fromkeys(args.schemes))
    check_deployment(parser, args)


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
    for flag in INTEGER_FLAGS:
        requirements += [
            (flag, "--fold_bn", args.fold_bn),
            (flag, "--act_bits from 2 to 8", all(2 <= n <= 8 for n in bits)),
            (flag, "--bits from 2 to 8", max(args.bits) <= 8),
            (flag, "weights without --mean_correction and --bias_correction", is_uniform),
            (flag, fits, "pwlq" not in args.schemes or args.overlapping),
        ]
    refuse_unused_flags(parser, requirements)
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


def steps_requirements(args: argparse.Namespace) -> list[Requirement]:
    """Return what --steps_from needs, for `refuse_unused_flags`."""
    flag, has_file = "steps_from", any(getattr(args, flag) for flag in FILE_FLAGS)
    return [
        (flag, "one FILE", len(find_paths(args.checkpoints)) == 1),
        (flag, "--precision fp32", args.precision == "fp32"),
        (flag, "batch norms as they were trained: leave out --fold_bn", not args.fold_bn),
        (flag, "no --recalibrate_bn_images", not args.recalibrate_bn_images),
        (flag, "weights as they were trained: leave out --equalize", not args.equalize),
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


# --- what they say about a quantization -------------------------------------------------------


class Quantization(NamedTuple):
    """One of the quantizations that the flags ask for; FLOAT_BITS are bits of full precision."""

    scheme: str
    n_bits: int
    act_bits: int = FLOAT_BITS


def quantizations(args: argparse.Namespace) -> Iterator[Quantization]:
    """Yield every scheme with every bit-width of weights and of activations."""
    for scheme, n_bits in itertools.product(args.schemes, args.bits):
        for act_bits in act_bit_widths(n_bits, args):
            yield Quantization(scheme, n_bits, act_bits)


def act_bit_widths(n_bits: int, args: argparse.Namespace) -> list[int]:
    """Return the bit-widths of activations beside weights of n_bits."""
    numbers = args.act_bits or [FLOAT_BITS]
    return list(dict.fromkeys(n_bits if bits == "same" else bits for bits in numbers))


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
    if scheme not in qu.QUANTIZERS:  # unquantized, or with learned steps
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


def runs_in_integers(args: argparse.Namespace) -> bool:
    """Tell whether the quantized network is simulated as an integer engine runs it."""
    return any(getattr(args, flag) for flag in INTEGER_FLAGS)


# --- messages ---------------------------------------------------------------------------------


def print_error(message: object) -> None:
    """Print one line about a file on rank 0; the others are evaluated all the same."""
    print_warning(f"error: {message}")


def print_warning(message: str) -> None:
    """Print one line about a file on rank 0."""
    if distributed.get_rank() == 0:
        tqdm.write(f"quant_inference.py: {message}", file=sys.stderr)
