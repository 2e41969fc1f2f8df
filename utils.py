"""What the scripts share: the parts that flags name, and the types and meaning of flags."""

import argparse
import inspect
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import lr_scheduler

import data
import quant_utils as qu
from analysis.report import FLOAT_BITS
from analysis.weights_files import WeightsFile
from engine.images.loader import Loader
from engine.networks.compiling import set_compile
from engine.networks.fast_layers import plain_copy, use_fast_layers
from engine.networks.layers import moved
from engine.networks.outputs import check_network, is_near, trial_logits
from engine.networks.winograd import set_winograd
from engine.quantization.bit_widths import parse_bits
from engine.step.penalty_inputs import OF_WEIGHTS
from engine.system import distributed
from engine.system.cli import argument_errors, bounded_number, choice_ignoring_case
from engine.system.errors import SetupError
from engine.system.hardware import MEMORY_FORMATS
from models import find_model, make_model, model_of_record
from regularizers import Regularizer, accepted_options, make_regularizer, regularizer_options

CRITERIA: dict[str, Callable[..., nn.Module]] = {"CE": nn.CrossEntropyLoss}

# The epochs, of a run of n, at which multistep multiplies the learning rate by γ.
MILESTONES: dict[str, Callable[[int], list[int]]] = {
    "default": lambda n: sorted({max(1, n // 2), max(1, n * 5 // 6)}),
    "halfway": lambda n: [max(1, n // 2)],
    "fixed": lambda n: [25, 50],
}

parse_image_size = bounded_number(int, at_least=1, below=4097)  # height and width
parse_width = bounded_number(float, above=0, below=100)  # a factor of all channels

RELATIVE_MILESTONES = ("default", "halfway")  # those that depend on n

# Of (optimizer, γ, milestones, number of epochs); each steps once an epoch.
SCHEDULERS: dict[str, Callable[..., lr_scheduler.LRScheduler]] = {
    "none": lambda optimizer, *_: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0),
    "exponential": lambda optimizer, gamma, *_: lr_scheduler.ExponentialLR(optimizer, gamma),
    "multistep": lambda optimizer, gamma, epochs, _: lr_scheduler.MultiStepLR(
        optimizer, epochs, gamma
    ),
    "cosine": lambda optimizer, gamma, epochs, n: lr_scheduler.CosineAnnealingLR(optimizer, n),
}
# The settings that each schedule depends on, besides its name.
SCHEDULE_SETTINGS = {
    "none": set(),
    "exponential": {"gamma"},
    "multistep": {"gamma", "milestones"},
    "cosine": {"n_epochs"},
}


# --- types of flags --------------------------------------------------------------------------


def network_name(text: str) -> str:
    """Return the name of a network as it is written in MODELS: an argparse type."""
    with argument_errors():
        return find_model(text)[0]


def regularizer_name(text: str) -> str:
    """Return the name of a regularizer as it is logged: an argparse type."""
    with argument_errors():
        regularizer = make_regularizer(text, 1.0)
        if regularizer is None:
            raise ValueError(f"{text!r} is no regularizer")
        return regularizer.name


def parse_milestones(text: str) -> str:
    """Return a name in MILESTONES, or epochs as in "6,8": an argparse type."""
    words = text.split(",")
    if all(word.isdecimal() for word in words):
        epochs = list(map(int, words))
        if epochs == sorted(set(epochs)) and epochs[0] > 0:
            return ",".join(map(str, epochs))
        raise argparse.ArgumentTypeError(f"{text!r}: give epochs from 1 on, each after the last")
    try:
        return choice_ignoring_case(MILESTONES)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or epochs as in 6,8") from error


def parse_qat_bits(text: str) -> str:
    """Return bits of weights and, after a comma, of inputs, such as "4,8": an argparse type."""
    with argument_errors(f"{text!r} is not W or W,A, bits from 2 to 16, as in 4,4"):
        return ",".join(str(parse_bits(number)) for number in text.split(",", 1))


def qat_bit_widths(text: str) -> tuple[int, int | None]:
    """Return the bits of weights and of inputs that --qat_bits means; None: full precision."""
    weight_bits, _, act_bits = text.partition(",")
    return int(weight_bits), int(act_bits) if act_bits else None


def act_bit_widths(n_bits: int, args: argparse.Namespace) -> list[int]:
    """Return the bit-widths of activations beside weights of n_bits."""
    numbers = args.act_bits or [FLOAT_BITS]
    return list(dict.fromkeys(n_bits if bits == "same" else bits for bits in numbers))


def act_bits(args: argparse.Namespace) -> list[int]:
    """Return the bits of activations beside each of --bits."""
    return [bits for n_bits in args.bits for bits in act_bit_widths(n_bits, args)]


def learned_schemes(args: argparse.Namespace) -> list[str]:
    """Return those of the schemes whose rounding of weights is learned."""
    takers = [scheme for scheme in args.schemes if "round_up" in qu.quantizer_options(scheme)]
    return takers if args.rounding != "nearest" else []


# --- options of regularizers -----------------------------------------------------------------


def regularizer_options_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return the regularizers' own options that the flags give."""
    options = {name: getattr(args, name) for name in regularizer_options()}
    return {name: value for name, value in options.items() if value is not None}


def is_option_used(option: str, args: argparse.Namespace) -> bool:
    """Tell whether one of `args.regularizers`, or of those of --track, takes the option."""
    names = [name for regularizer in args.regularizers for name in regularizer.name.split("+")]
    names += args.track if regularizer_options()[option].tracked else []
    return any(accepted_options(name, {option: None}) for name in names)


def difference_step(args: argparse.Namespace) -> float | None:
    """Return the relative size of differences of gradients, None where penalties are exact."""
    return args.penalty_step if args.penalty_gradient == "difference" else None


def beyond_weights(args: argparse.Namespace) -> list[str]:
    """Return the names of those of `args.regularizers` that are not functions of weights alone."""
    return [r.name for r in args.regularizers if not OF_WEIGHTS.issuperset(r.inputs)]


def make_tracked_regularizers(args: argparse.Namespace) -> list[Regularizer]:
    """Make the regularizers that --track names; ValueError for an option with a bad value."""
    declared = regularizer_options()
    options = {k: v for k, v in regularizer_options_from(args).items() if declared[k].tracked}
    return [make_regularizer(name, 1.0, **accepted_options(name, options)) for name in args.track]


# --- what the flags name ---------------------------------------------------------------------


def load_dataset(args: argparse.Namespace) -> data.ImageDataset:
    """Return the data set that the flags say.

    Raises DataError where it cannot be had, SetupError where it has fewer images than they ask for.
    """
    options = {option: getattr(args, option) for option in data.OPTIONS}
    with distributed.local_rank0_first():  # it may have to fetch it
        dataset = data.load(args.dataset, args.data_dir, args.seed, **options)
    data.check_dataset(args.dataset, dataset)
    restrictions = {
        "holdout": data.use_holdout_as_test,
        "train_subset": data.subset,
        "test_subset": partial(data.subset, part="test"),
    }
    for flag, restrict in restrictions.items():
        if n := getattr(args, flag, None):
            try:
                dataset = restrict(dataset, n)
            except ValueError as error:
                raise SetupError(f"--{flag} {n}: {error}") from error
    return dataset


def loader_maker(args: argparse.Namespace, dataset: data.ImageDataset) -> Callable[..., Loader]:
    """Return the data set's `make_loader` with what data set and flags say of all its loaders."""
    return partial(
        dataset.make_loader,
        batch_size=args.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=args.device,
        memory_format=MEMORY_FORMATS[args.memory_format],
    )


def without_single_image(n_images: int, batch_size: int) -> int:
    """Return how many of so many images to estimate statistics of batch norms on.

    A last batch of one image is left out: where maps have one pixel, it has no variance.
    """
    return n_images - (n_images > n_images % batch_size == 1)


def make_criterion(name: str, label_smoothing: float = 0.0) -> nn.Module:
    """Make the loss of that name in CRITERIA; SetupError where it has no --label_smoothing."""
    smooths = "label_smoothing" in inspect.signature(CRITERIA[name]).parameters
    if label_smoothing and not smooths:
        raise SetupError(f"--label_smoothing: the loss {name} has none")
    return CRITERIA[name](**({"label_smoothing": label_smoothing} if smooths else {}))


def make_net(
    name: str,
    num_classes: int,
    device: str,
    width: float = 1.0,
    memory_format: str = "channels_last",
    image_shape: Sequence[int] = (),
) -> nn.Module:
    """Make the network of that name, as `make_model` does, with fast layers, on the device.

    Lazy modules get their sizes from images of `image_shape` (3, H, W). Where that is given and the
    network computes something else with fast layers, it keeps PyTorch's own, and a line says so.
    """
    net = make_model(name, num_classes, width)
    if any(map(is_lazy, net.parameters())):
        check_network(net, image_shape, num_classes)
    before = trial_logits(net, image_shape) if image_shape else None
    net = use_fast_layers(net)
    if image_shape and not is_near(trial_logits(net, image_shape), before):
        plain = plain_copy(net)
        if is_near(trial_logits(plain, image_shape), before):  # else it differs each time
            print(
                f"{name}: trained with PyTorch's own layers, which is slower: with ours in their "
                "place it computes something else, as a network does that compares types of its "
                "modules"
            )
            net = plain
    return moved(net, device, MEMORY_FORMATS[memory_format])


def choose_kernels(args: argparse.Namespace) -> bool:
    """Use the kernels that the flags of train.py say; return whether those are compiled ones."""
    # not Winograd's for learned steps, which quant_inference.py measures to the bit with PyTorch's,
    # and not in a compiled step: of its many small operations compiling would take minutes
    uses_winograd = args.winograd != "off" and not args.qat_bits and args.step != "compiled"
    set_winograd(uses_winograd, args.device)
    return set_compile(args.compile, args.device)


def model_of_file(name: str, file: WeightsFile) -> str:
    """Return the network that the file is of; print it where that is not the one of the name."""
    recorded = model_of_record(name, file.setting("model"))
    if recorded != name:
        why = "its record says so" if file.setting("model") else "no record says how it was trained"
        print(f"{file.path}: read as {recorded}, as torchvision's own weights are: {why}")
    return recorded


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, gamma: float, milestones: str, n_epochs: int
) -> lr_scheduler.LRScheduler:
    """Make the schedule of that name in SCHEDULERS; it steps once an epoch."""
    return SCHEDULERS[name](optimizer, gamma, milestone_epochs(milestones, n_epochs), n_epochs)


def milestone_epochs(milestones: str, n_epochs: int) -> list[int]:
    """Return the epochs that --milestones means in a run of n_epochs."""
    if milestones in MILESTONES:
        return MILESTONES[milestones](n_epochs)
    return list(map(int, milestones.split(",")))


def late_milestones(args: argparse.Namespace) -> list[int]:
    """Return the milestones that lie beyond the run: the rate is never lowered there."""
    if args.scheduler != "multistep":
        return []
    epochs = milestone_epochs(args.milestones, args.n_epochs)
    return [epoch for epoch in epochs if epoch >= args.n_epochs]


def schedule_settings(args: argparse.Namespace) -> set[str]:
    """Return which settings, besides its name, the learning-rate schedule depends on."""
    needs_length = args.scheduler == "multistep" and args.milestones in RELATIVE_MILESTONES
    return SCHEDULE_SETTINGS[args.scheduler] | ({"n_epochs"} if needs_length else set())


def seed_everything(seed: int) -> None:
    """Seed every global random stream, and ask for kernels that repeat to the last bit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
