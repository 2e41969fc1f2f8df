"""Quantize saved weights with every scheme at every bit-width and report what it costs."""

import argparse
import copy
import glob
import inspect
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from tqdm import tqdm

import data
import quant_utils as qu
import utils
from analysis import report
from analysis.report import COLUMNS, LAYER_COLUMNS, UNQUANTIZED, Row
from engine import distributed
from engine.batch_norm import (
    check_folding,
    disable_bn_folding,
    fold_batch_norm,
    recalibrate_batch_norm,
)
from engine.cli import (
    Parser,
    add_choice,
    bounded_number,
    choice_ignoring_case,
    exit_codes,
    refuse_unused_flags,
)
from engine.environment import describe_environment
from engine.errors import DataError, FileError, NetworkError, PeerLostError
from engine.evaluation import evaluate
from engine.hardware import PRECISIONS, resolve_precision
from engine.io import backup_existing, check_writable, load_weights, save_json
from engine.layers import quantizable_layers
from engine.loader import Loader
from engine.tracking import WandbLogger, new_run_id
from models import MODELS

N_IMAGES = 512  # for calibration and for the expansion of the loss, where there are so many
CALIBRATION_BATCH = 64  # images
# What is kept of earlier results in the same folder, beside the plots of weights: (name, suffix).
RESULTS = (("results", ".csv"), ("results", ".json"), ("per_layer", ".csv"), ("accuracy", ".png"))


# --- evaluation ------------------------------------------------------------------------------


def make_loader(
    dataset: data.ImageDataset, args: argparse.Namespace, n_train: int = 0, batch_size: int = 0
) -> Loader:
    """Return the test images, or the first n_train training images, normalised once and kept."""
    images, labels = dataset.test_images, dataset.test_labels
    if n_train:
        images, labels = dataset.train_images[:n_train], dataset.train_labels[:n_train]
    return Loader(
        images,
        labels,
        batch_size or args.batch_size,
        dataset.mean,
        dataset.std,
        device=args.device,
        memory_format=torch.channels_last,
        cache=True,
    )


def prepare_for_eval(
    net: nn.Module, device: str, act_bits: int = 0, ranges: dict | None = None
) -> nn.Module:
    """Return a copy to evaluate: on the device, batch norms folded, which halves the time.

    Folding what is quantized already changes no output. `act_bits`: quantize activations, too.
    """
    try:
        net = fold_batch_norm(net)
    except ValueError:  # there is nothing to fold
        net = copy.deepcopy(net)
    net = net.to(device, memory_format=torch.channels_last)
    if act_bits:
        qu.quantize_activations(net, act_bits, ranges)
    return net


def measure(
    net: nn.Module, loader: Loader, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Return accuracy and mean cross entropy over the images; convolutions are in dtype."""
    means = evaluate(net, nn.CrossEntropyLoss(), loader, dtype)
    return means["accuracy"], means["loss"]


# --- the sweep -------------------------------------------------------------------------------


def is_stochastic(scheme: str) -> bool:
    """Tell whether the scheme's quantizer draws random numbers."""
    return "generator" in inspect.signature(qu.QUANTIZERS[scheme]).parameters


def make_quantizer(scheme: str, args: argparse.Namespace, trial: int = 0) -> qu.Quantizer:
    """Return the scheme's quantizer with the options of the command line; a trial is a seed."""
    options: dict[str, Any] = {"per_channel": args.per_channel}
    if scheme == "pwlq":
        options |= {name: getattr(args, name) for name in ("distribution", "approximate")}
        options["overlapping"] = args.overlapping
    if is_stochastic(scheme):
        options["generator"] = torch.Generator().manual_seed(args.seed + trial)
    return partial(qu.QUANTIZERS[scheme], **options)


def make_correction(args: argparse.Namespace) -> qu.Correction | None:
    """Return what is made of quantized weights, None for nothing."""
    if args.mean_correction:
        return qu.mean_correction
    return qu.bias_correction if args.bias_correction else None


def scheme_bit_pairs(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield every scheme with every bit-width."""
    return itertools.product(args.schemes, args.bits)


def n_trials(scheme: str, args: argparse.Namespace) -> int:
    """Return how often a case is repeated: stochastic schemes only."""
    return args.trials if is_stochastic(scheme) else 1


def activation_bits(n_bits: int, args: argparse.Namespace) -> int:
    """Return the bits of activations beside weights of n_bits; 0 leaves them as they are."""
    return n_bits if args.act_bits == "same" else args.act_bits or 0


def sweep(
    name: str,
    net: nn.Module,
    args: argparse.Namespace,
    dataset: data.ImageDataset,
    test_loader: Loader,
    tick: Callable[[], Any],
) -> Iterator[Row]:
    """Yield the rows of one checkpoint: first as it is, then every case. `tick` after each."""
    dtype = resolve_precision(args.precision, args.device)
    plain = measure(prepare_for_eval(net, args.device), test_loader, dtype)
    accuracy, loss = plain
    tick()
    yield {
        "checkpoint": name,
        "scheme": UNQUANTIZED,
        "bits": 32,
        "levels": None,
        "accuracy": accuracy,
        "accuracy_change": 0.0,
        "squared_error": 0.0,
        "accuracy_std": None,
        "trials": 1,
        "loss": loss,
        "act_bits": 32,
    }
    ranges = {}
    if args.act_bits:
        images = make_loader(dataset, args, args.calibration_images, CALIBRATION_BATCH)
        batches = (x for x, _ in images.batches(0))
        ranges = qu.calibrate(prepare_for_eval(net, args.device), batches, args.calibration)
    bn_loader = make_loader(dataset, args, args.bn_images) if args.bn_images else None
    for scheme, n_bits in scheme_bit_pairs(args):
        found, act_bits = [], activation_bits(n_bits, args)
        for trial in range(n_trials(scheme, args)):
            net_q, layers = qu.quantize_model(
                net,
                make_quantizer(scheme, args, trial),
                n_bits,
                biases=not args.fold_bn,
                correct=make_correction(args),
            )
            error = qu.model_error(layers, args.avg_in_layer)
            if bn_loader:
                net_q = net_q.to(args.device, memory_format=torch.channels_last)
                recalibrate_batch_norm(net_q, (x for x, _ in bn_loader.batches(0)))
            net_q = prepare_for_eval(net_q, args.device, act_bits, ranges)
            found.append((*measure(net_q, test_loader, dtype), error))
            tick()
        accuracies, losses, errors = zip(*found, strict=True)
        mean = statistics.fmean(accuracies)
        yield {
            "checkpoint": name,
            "scheme": scheme,
            "bits": n_bits,
            "levels": qu.n_levels(scheme, n_bits, args.overlapping),
            "accuracy": mean,
            "accuracy_change": mean - accuracy,
            "squared_error": statistics.fmean(errors),
            "accuracy_std": statistics.stdev(accuracies) if len(found) > 1 else None,
            "trials": len(found),
            "loss": statistics.fmean(losses),
            "act_bits": act_bits or 32,
        }


# --- layer by layer --------------------------------------------------------------------------


def per_layer(
    name: str,
    net: nn.Module,
    args: argparse.Namespace,
    dataset: data.ImageDataset,
    test_loader: Loader,
    tick: Callable[[], Any],
) -> list[Row]:
    """Quantize the weights of one layer at a time; return a row for each case and layer.

    `accuracy_change` is on test images. `loss_change` is measured on training images; beside it are
    the terms of its expansion there, with g the gradient, H the Hessian and Δ the change of the
    layer's parameters: g·Δ, its bound ‖g‖₁·‖Δ‖_∞, and ½·ΔᵀHΔ.
    """
    train_loader = make_loader(dataset, args, args.per_layer_images)
    plain = prepare_for_eval(net, args.device)
    (accuracy, _), (_, loss) = measure(plain, test_loader), measure(plain, train_loader)
    rows, deltas = [], []
    for (scheme, n_bits), layer in itertools.product(
        scheme_bit_pairs(args), quantizable_layers(net)
    ):
        net_q = copy.deepcopy(net)
        error = qu.quantize_layer(
            net_q.get_submodule(layer),
            make_quantizer(scheme, args),
            n_bits,
            biases=not args.fold_bn,
            correct=make_correction(args),
        )
        changed = net_q.get_submodule(layer).named_parameters(layer)
        deltas.append({key: (p - net.get_parameter(key)).detach() for key, p in changed})
        n_weights = net_q.get_submodule(layer).weight.numel()
        net_q = prepare_for_eval(net_q, args.device)
        rows.append(
            {
                "checkpoint": name,
                "scheme": scheme,
                "bits": n_bits,
                "layer": layer,
                "accuracy_change": measure(net_q, test_loader)[0] - accuracy,
                "squared_error": error / (n_weights if args.avg_in_layer else 1),
                "loss_change": measure(net_q, train_loader)[1] - loss,
            }
        )
        tick()
    expanded = taylor_terms(copy.deepcopy(net).to(args.device), train_loader, deltas)
    names = ("first_order", "first_order_bound", "second_order")
    return [
        row | dict(zip(names, terms, strict=True))
        for row, terms in zip(rows, expanded, strict=True)
    ]


def taylor_terms(
    net: nn.Module, loader: Loader, deltas: Sequence[dict[str, Tensor]]
) -> list[tuple[float, float, float]]:
    """Return g·Δ, ‖g‖₁·‖Δ‖_∞ and ½·ΔᵀHΔ of the mean loss for each Δ, tensors by parameter name.

    The network is in eval mode: the loss is a mean over images. H is never formed: HΔ is the
    gradient of g·Δ, a double backward through the parameters that Δ changes.
    """
    params = dict(net.named_parameters())
    deltas = [{key: d.to(params[key].device) for key, d in delta.items()} for delta in deltas]
    g = {key: torch.zeros_like(p) for key, p in params.items()}
    curvatures = [0.0] * len(deltas)
    for x, y in loader.batches(0, distributed.get_rank(), distributed.get_world_size()):
        loss = F.cross_entropy(net(x)[0], y, reduction="sum") / loader.n_images
        grads = grad(loss, list(params.values()), create_graph=True)
        of = dict(zip(params, grads, strict=True))
        for i, delta in enumerate(deltas):
            slope = sum((of[key] * d).sum() for key, d in delta.items())
            product = grad(slope, [params[key] for key in delta], retain_graph=True)
            curvatures[i] += sum(
                (h * d).sum().item() / 2 for h, d in zip(product, delta.values(), strict=True)
            )
        for key in g:
            g[key] += of[key].detach()
    g = {key: distributed.all_reduce_sum(part) for key, part in g.items()}
    curvatures = distributed.all_reduce_sum(
        torch.tensor(curvatures, dtype=torch.float64, device=loader.labels.device)
    ).tolist()
    first = [sum((g[key] * d).sum().item() for key, d in delta.items()) for delta in deltas]
    bounds = [
        sum(g[key].abs().sum().item() for key in delta)
        * max(d.abs().max().item() for d in delta.values())
        for delta in deltas
    ]
    return list(zip(first, bounds, curvatures, strict=True))


# --- the script ------------------------------------------------------------------------------


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
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="FILE", help=".pt files, also globs")
    group = parser.add_argument_group("what is quantized, and how")
    add_choice(group, "--model", MODELS, "ConvNet", "network that the files are of")
    group.add_argument(
        "--bits", type=bit_width, nargs="+", default=[4, 5, 6, 7, 8], help="of a weight: 2 to 16"
    )
    group.add_argument(
        "--schemes",
        type=choice_ignoring_case(qu.QUANTIZERS),
        nargs="+",
        default=list(qu.QUANTIZERS),
        metavar="{" + ",".join(qu.QUANTIZERS) + "}",
        help="dorefa is stochastic; pwlq has the levels of one more bit",
    )
    group.add_argument(
        "--trials", type=bounded_number(int, at_least=1), default=3, help="repeats of dorefa"
    )
    group.add_argument("--per_channel", action="store_true", help="a range an output channel")
    group.add_argument(
        "--fold_bn",
        action="store_true",
        help="fold batch norms into the convolutions first; biases then keep full precision",
    )
    only_one = group.add_mutually_exclusive_group()
    only_one.add_argument(
        "--mean_correction",
        action="store_true",
        help="shift each output channel of the quantized weights to the mean that it had",
    )
    only_one.add_argument(
        "--bias_correction",
        action="store_true",
        help="that, then scale each to the standard deviation that it had",
    )
    group.add_argument(
        "--bn_images",
        type=bounded_number(int, at_least=2),
        metavar="N",
        help="after quantizing, estimate batch-norm statistics again, on N training images",
    )
    group.add_argument(
        "--avg_in_layer",
        action="store_true",
        help="squared error: divide each layer's sum by its number of weights",
    )
    group.add_argument(
        "--per_layer",
        action="store_true",
        help="also quantize the weights of one layer at a time, with the expansion of the loss; "
        "there nothing but weights changes, whatever --act_bits and --bn_images say",
    )
    group.add_argument(
        "--per_layer_images",
        type=bounded_number(int, at_least=1),
        default=N_IMAGES,
        metavar="N",
        help="training images for that expansion",
    )
    add_choice(
        group,
        "--precision",
        PRECISIONS,
        "fp32",
        "of the convolutions that measure accuracy; bf16 is several times faster on new hardware",
    )
    add_pwlq_arguments(parser)
    add_activation_arguments(parser)
    utils.add_data_arguments(parser)
    parser.set_defaults(batch_size=500)
    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="DIR", help="folder; None: beside the first file")
    group.add_argument("--no_plots", action="store_true", help="tables only")
    utils.add_wandb_arguments(parser)
    group = parser.add_argument_group("of earlier versions, ignored")
    group.add_argument("--n_epochs", help="nothing is trained here")
    group.add_argument("--lr", help="nothing is trained here")
    return parser


def add_pwlq_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of piecewise linear quantization."""
    group = parser.add_argument_group("pwlq")
    add_choice(
        group,
        "--distribution",
        [*qu.DISTRIBUTIONS, "search"],
        "norm",
        "breakpoint: of least expected error if weights are so distributed, or of least measured",
    )
    group.add_argument(
        "--approximate", action="store_true", help="the paper's closed form of the breakpoint"
    )
    group.add_argument(
        "--overlapping", action="store_true", help="tails on the uniform grid of the whole range"
    )


def add_activation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of activation quantization."""
    group = parser.add_argument_group("activations")
    group.add_argument(
        "--act_bits",
        type=act_bit_width,
        metavar="{2..16,same}",
        help="quantize the inputs of layers and pooling, too; same: with the weights' bits",
    )
    add_choice(group, "--calibration", qu.CALIBRATIONS, "topk_median", "how their range is found")
    group.add_argument(
        "--calibration_images",
        type=bounded_number(int, at_least=1),
        default=N_IMAGES,
        metavar="N",
        help="training images for that",
    )


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """End with one line where a flag would be without effect."""
    in_full = args.precision == "fp32"  # another precision would round beside what is measured
    refuse_unused_flags(
        parser,
        (
            ("act_bits", "--precision fp32", in_full),
            ("per_layer", "--precision fp32", in_full),
            ("bn_images", "batch norms: leave out --fold_bn", not args.fold_bn),
            ("approximate", "pwlq among --schemes", "pwlq" in args.schemes),
            ("overlapping", "pwlq among --schemes", "pwlq" in args.schemes),
            ("distribution", "pwlq among --schemes", "pwlq" in args.schemes),
            ("approximate", "--distribution norm or laplace", args.distribution != "search"),
            ("trials", "a stochastic scheme", any(map(is_stochastic, args.schemes))),
            ("calibration", "--act_bits", args.act_bits),
            ("calibration_images", "--act_bits", args.act_bits),
            ("per_layer_images", "--per_layer", args.per_layer),
        ),
    )
    args.bits, args.schemes = sorted(set(args.bits)), list(dict.fromkeys(args.schemes))


def resolve_paths(patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files that the patterns mean, by a short name without .pt, or where two share
    that by their path.

    What matches nothing stays as it is, to be missed by name later.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        found += map(Path, matches or [pattern])
    found = list(dict.fromkeys(found))
    names = [path.name.removesuffix(".pt") for path in found]
    return {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, found, strict=True)
    }


def is_foldable(args: argparse.Namespace, dataset: data.ImageDataset) -> bool:
    """Tell whether batch norms of the model can be folded; NetworkError if not, with --fold_bn."""
    net = utils.make_net(args.model, dataset.num_classes, "cpu")
    try:
        check_folding(net, dataset.test_images.shape[1:])
    except NetworkError:
        if args.fold_bn:
            raise
        return False
    return True


def load(
    path: Path, args: argparse.Namespace, dataset: data.ImageDataset, foldable: bool
) -> nn.Module:
    """Return the network with the weights of the file, in eval mode on the CPU.

    There everything is quantized: the grids are the same on every device. Raises FileError, in one
    line, where the file is not such weights, and where they are not finite.
    """
    net = utils.make_net(args.model, dataset.num_classes, "cpu").eval()
    load_weights(net, path)
    for key, value in net.state_dict().items():
        if not value.isfinite().all():
            raise FileError(f"{path}: {key} holds NaN or infinite values")
    if not foldable:
        disable_bn_folding(net)
        return net
    folded = fold_batch_norm(net)
    if not all(p.isfinite().all() for p in folded.parameters()):
        raise FileError(
            f"{path}: folding overflows: a batch norm has a negative or vast "
            "variance, or weights are vast"
        )
    return folded if args.fold_bn else net


def check_images(args: argparse.Namespace, given: Set[str], n_train: int) -> None:
    """Raise DataError where a flag that is given asks for more training images than there are.

    A default becomes the number there are.
    """
    for flag in ("bn_images", "calibration_images", "per_layer_images"):
        n_images = getattr(args, flag)
        if n_images and n_images > n_train:
            if flag in given:
                raise DataError(f"--{flag} {n_images}: there are {n_train} training images")
            setattr(args, flag, n_train)


def load_all(
    found: dict[str, Path], args: argparse.Namespace, dataset: data.ImageDataset
) -> dict[str, nn.Module]:
    """Load the files, by name, and tell which cannot be; NetworkError as is_foldable."""
    foldable, nets = is_foldable(args, dataset), {}
    for name, path in found.items():
        try:
            nets[name] = load(path, args, dataset, foldable)
        except FileError as error:
            print(f"quant_inference.py: error: {error}", file=sys.stderr)
    return nets


def run(args: argparse.Namespace, given: Set[str], folder: Path) -> bool:
    """Evaluate every file and report; return whether all could be evaluated.

    `given` are the flags of the command line, without dashes.
    KeyboardInterrupt or a process that is lost: what was measured until then is reported first.
    """
    dataset = utils.load_dataset(args)
    check_images(args, given, len(dataset.train_images))
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    test_loader, found = make_loader(dataset, args), resolve_paths(args.checkpoints)
    nets = distributed.run_on_rank0_and_broadcast(lambda: load_all(found, args, dataset))
    if not nets:
        return False
    first, net = next(iter(nets.items()))
    settings = {**vars(args), "output": str(folder)}
    n_passes = 1 + sum(n_trials(scheme, args) for scheme, _ in scheme_bit_pairs(args))
    if args.per_layer:
        n_passes += len(list(scheme_bit_pairs(args))) * len(quantizable_layers(net))
    rows, layer_rows, failed, interrupted = [], [], set(), None
    disable = None if distributed.get_rank() == 0 else True
    with tqdm(total=len(nets) * n_passes, unit="pass", disable=disable, leave=False) as bar:
        try:
            for name, net in nets.items():
                bar.set_description(name)
                try:
                    rows.extend(sweep(name, net, args, dataset, test_loader, bar.update))
                    if args.per_layer:
                        layer_rows += per_layer(name, net, args, dataset, test_loader, bar.update)
                except ValueError as error:
                    failed.add(name)
                    if distributed.get_rank() == 0:
                        print(f"quant_inference.py: error: {found[name]}: {error}", file=sys.stderr)
        except (KeyboardInterrupt, PeerLostError) as error:
            interrupted = error
    if distributed.get_rank():
        if interrupted:
            raise interrupted
        return not failed
    nets = {name: net for name, net in nets.items() if name not in failed}
    rows = [row for row in rows if row["checkpoint"] in nets]
    if not rows:
        if interrupted:
            raise interrupted
        return False
    show(rows, layer_rows, args)
    drawn = save(rows, layer_rows, nets, settings, args, folder)
    tracker = WandbLogger(
        args.wandb_project, args.wandb_entity, f"quantize_{first}", settings, new_run_id()
    )
    report.log(tracker, rows, layer_rows, drawn)
    print(tracker.finish())
    if interrupted:
        raise interrupted
    return len(nets) == len(found)


def show(rows: Sequence[Row], layer_rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print the tables."""
    print(report.table(rows, COLUMNS[:7] + ("act_bits",) * bool(args.act_bits)))
    if layer_rows:
        print(f"\none layer at a time; loss on {args.per_layer_images} training images")
        print(report.table(layer_rows, LAYER_COLUMNS))


def save(
    rows: Sequence[Row],
    layer_rows: Sequence[Row],
    nets: dict[str, nn.Module],
    settings: Row,
    args: argparse.Namespace,
    folder: Path,
) -> dict[str, Path]:
    """Write CSV, JSON and plots into the folder, say where, and return the plots by title.

    What is there of earlier results is kept.
    """
    backup_existing([(folder / stem, suffix) for stem, suffix in RESULTS])
    report.save_csv(rows, COLUMNS, folder / "results.csv")
    record = {"settings": {**settings, **describe_environment()}, "rows": rows}
    if layer_rows:
        report.save_csv(layer_rows, LAYER_COLUMNS, folder / "per_layer.csv")
        record["per_layer"] = layer_rows
    save_json(record, folder / "results.json")
    drawn = {} if args.no_plots else draw(rows, nets, args, folder)
    print(f"\nresults: {folder / 'results.csv'}, {folder / 'results.json'}")
    if drawn:
        print("plots:   " + ", ".join(map(str, drawn.values())))
    return drawn


def draw(
    rows: Sequence[Row], nets: dict[str, nn.Module], args: argparse.Namespace, folder: Path
) -> dict[str, Path]:
    """Draw the plots into the folder and return their paths by title."""
    drawn = {}
    if any(row["scheme"] != UNQUANTIZED for row in rows):  # it was not interrupted before
        drawn["accuracy"] = folder / "accuracy.png"
        report.accuracy_plot(rows, drawn["accuracy"])
    n_bits = 4 if 4 in args.bits else min(args.bits)
    quantizers = {scheme: make_quantizer(scheme, args) for scheme in args.schemes}
    for name, net in nets.items():
        weights = {key: m.weight.detach() for key, m in quantizable_layers(net).items()}
        title = f"{name}: weights, and the values that quantization leaves"
        if args.per_channel:
            weights = {f"{key}[0]": w[:1] for key, w in weights.items()}
            title += " (first output channel of each layer)"
        drawn[f"weights/{name}"] = folder / f"weights_{name.replace('/', '_')}.png"
        report.histogram_plot(weights, quantizers, n_bits, title, drawn[f"weights/{name}"])
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, run, and exit with 1 if a file could not be evaluated."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    for flag in ("n_epochs", "lr"):
        if getattr(args, flag) is not None:
            print(f"--{flag} is ignored: nothing is trained here")
    paths = list(resolve_paths(args.checkpoints).values())
    beside = next(filter(os.path.exists, paths), Path("."))
    folder = Path(args.output) if args.output else beside.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "results.csv")
    except (OSError, ValueError) as error:
        parser.error(f"--output: {error}")
    with exit_codes(parser), distributed.process_group(args.device):
        is_complete = run(args, parser.explicit_flags, folder)
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    main()
