"""What the scripts share: their common flags, and the parts that flags name."""

import argparse
import os
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler

import data
from engine.images.loader import Loader
from engine.networks.batch_norm import has_batch_norms
from engine.networks.fast_layers import use_fast_layers
from engine.quantization.bit_widths import parse_bits
from engine.step.gradients import DIFFERENCE_STEP
from engine.system import distributed
from engine.system.cli import (
    Requirement,
    add_alias,
    add_choice,
    bounded_number,
    choice_ignoring_case,
    file_name,
)
from engine.system.errors import DataError
from engine.system.hardware import MEMORY_FORMATS, PRECISIONS, default_device, parse_device
from engine.training.averaging import MAX_BN_IMAGES
from models import MODELS, TORCHVISION, find_model, has_width, make_model
from regularizers import Regularizer, accepted_options, make_regularizer, regularizer_options

CRITERIA: dict[str, Callable[..., nn.Module]] = {"CE": nn.CrossEntropyLoss}

# The epochs, of a run of n, at which multistep multiplies the learning rate by γ.
MILESTONES: dict[str, Callable[[int], list[int]]] = {
    "default": lambda n: sorted({max(1, n // 2), max(1, n * 5 // 6)}),
    "halfway": lambda n: [max(1, n // 2)],
    "fixed": lambda n: [25, 50],
}

PENALTY_GRADIENTS = ("exact", "difference")

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


# --- flags -----------------------------------------------------------------------------------


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for data and machine that training and quantization share."""
    group = parser.add_argument_group("data and machine")
    add = group.add_argument
    positive = bounded_number(int, at_least=1)
    add_choice(group, "--dataset", data.DATASETS, "CIFAR10", "data set to train and test on")
    add("--data_dir", default="./data", help="folder that holds the data, or that it is put into")
    add(
        "--image_size",
        type=parse_image_size,
        default=data.IMAGE_SIZE,
        metavar="PIXELS",
        help="ImageFolder: height and width that images are cropped and resized to",
    )
    add(
        "--workers",
        type=bounded_number(int, at_least=0),
        default=data.WORKERS,
        metavar="N",
        help="ImageFolder: processes that decode images, beside each training process; 0: itself",
    )
    add(
        "--cache_images",
        type=bounded_number(float, at_least=0),
        default=data.CACHE_GB,
        metavar="GB",
        help="ImageFolder: keep decoded images in memory where those for training, or those for "
        "testing, take at most so many gigabytes a process; otherwise decode them in each epoch",
    )
    add("--batch_size", type=positive, default=128, help="images per step")
    add(
        "--holdout",
        type=positive,
        metavar="N",
        help="test on the last N training images, which are then not trained on, in place of the "
        "test set: for choices that must not see it",
    )
    add("--device", type=parse_device, default=default_device(), help="cpu, cuda, cuda:1, mps")
    add_choice(
        group,
        "--memory_format",
        MEMORY_FORMATS,
        "channels_last",
        "order of images and activations in memory; channels_last is faster with most networks",
    )
    add("--seed", type=bounded_number(int, at_least=0), default=242, help="random seed")


def add_network_arguments(group: argparse._ArgumentGroup, help: str) -> None:
    """Add the flags that say which network; `help` is what it is for."""
    group.add_argument(
        "--model",
        type=network_name,
        default="ConvNet",
        metavar="{" + ",".join([*MODELS, f"{TORCHVISION}NAME"]) + "}",
        help=f"{help}; {TORCHVISION}resnet50 and so on are torchvision's classifiers",
    )
    group.add_argument(
        "--width",
        type=parse_width,
        default=1.0,
        metavar="FACTOR",
        help=f"of the channels of {', '.join(filter(has_width, MODELS))}",
    )


def network_name(text: str) -> str:
    """Return the name of a network as it is written in MODELS: an argparse type."""
    try:
        return find_model(text)[0]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a training that do not say which regularizer works when."""
    add_run_arguments(parser.add_argument_group("run"))
    add_checkpoint_arguments(parser.add_argument_group("start, checkpoints and resuming"))
    add_optimization_arguments(parser.add_argument_group("training"))
    add_precision_arguments(parser.add_argument_group("precision and batch norm"))
    add_averaging_arguments(parser.add_argument_group("average of the weights"))
    add_quantization_arguments(parser.add_argument_group("quantization-aware training"))


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for names, files and histograms."""
    add = group.add_argument
    positive = bounded_number(int, at_least=1)
    add("--run_name", help="name of the run; None: made of model, data set and penalty")
    add("--save_file", help="file to save to, .pt is added; None: the run's name")
    add(
        "--save_preregularized_model",
        action="store_true",
        help="save the weights just before regularization begins, too, in <…>_preregul.pt",
    )
    add("--watch", action="store_true", help="log histograms of every parameter and gradient")
    add(
        "--watch_freq",
        type=positive,
        default=1,
        metavar="N",
        help="with --watch, log histograms every N batches",
    )


def add_checkpoint_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for checkpoints and for where a run starts."""
    add = group.add_argument
    positive = bounded_number(int, at_least=1)
    add(
        "--checkpoint_every",
        type=positive,
        default=1,
        metavar="N",
        help="epochs between checkpoints, which are written to <…>.ckpt",
    )
    add(
        "--checkpoint_minutes",
        type=bounded_number(float, above=0),
        default=10.0,
        metavar="M",
        help="minutes between checkpoints inside an epoch",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from this run's checkpoint, from the beginning where there is none",
    )
    add(
        "--init_from",
        type=file_name,
        metavar="CKPT",
        help="start from another run's checkpoint: its weights, momentum, schedule and epoch",
    )
    add(
        "--init_weights",
        type=file_name,
        metavar="PT",
        help="start from the weights in a .pt file, at epoch 0",
    )
    add(
        "--allow_changed_settings",
        action="store_true",
        help="continue from a checkpoint although settings have changed since",
    )
    add_alias(group, "--override", "allow_changed_settings")


def add_optimization_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for network, loss, SGD and learning-rate schedule."""
    add = group.add_argument
    positive, non_negative = bounded_number(float, above=0), bounded_number(float, at_least=0)
    add_network_arguments(group, "network to train")
    add_choice(group, "--criterion", CRITERIA, "CE", "loss, without the penalty")
    add(
        "--label_smoothing",
        type=bounded_number(float, at_least=0, below=1),
        default=0.0,
        metavar="E",
        help="part of each label that is shared out evenly to all classes, in the loss of training "
        "and of testing",
    )
    add("--n_epochs", type=bounded_number(int, at_least=1), default=25, help="epochs to train")
    add("--lr", type=positive, default=0.1, help="learning rate at the start")
    add_choice(
        group,
        "--scheduler",
        SCHEDULERS,
        "none",
        "learning-rate schedule; none: constant; cosine: to 0 over the run",
    )
    add(
        "--gamma",
        type=positive,
        default=0.99,
        help="factor of the learning rate, each epoch (exponential) or milestone (multistep)",
    )
    add(
        "--milestones",
        type=parse_milestones,
        default="default",
        metavar="{" + ",".join(MILESTONES) + ",EPOCH[,EPOCH…]}",
        help="epochs at which multistep lowers the learning rate: after 1/2 and 5/6 of the run, "
        "after 1/2, at 25 and 50, or the epochs given, as in 6,8",
    )
    add("--momentum", type=non_negative, default=0.9, help="momentum of SGD")
    add("--weight_decay", type=non_negative, default=5e-4, help="weight decay of SGD")
    add(
        "--train_subset",
        type=bounded_number(int, at_least=1),
        metavar="N",
        help="train on the first N images only, for a quick look",
    )


def add_precision_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for precision, kernels, batch norm and the penalty on the test set."""
    add = group.add_argument
    add_choice(
        group,
        "--precision",
        PRECISIONS,
        "auto",
        "precision of convolutions; auto: bf16 where the hardware is fast at it",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the element-wise kernels where a compiler is present",
    )
    add(
        "--cuda_graph",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="launch the kernels of a step at once, as a CUDA graph, where that can be captured; "
        "nobody has tried it on a GPU yet",
    )
    add(
        "--sync_bn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="under torchrun, take batch-norm statistics over all processes",
    )
    add(
        "--freeze_bn_from",
        type=bounded_number(int, at_least=1),
        metavar="N",
        help="from epoch N on batch norms use and keep their running statistics, as the quantized "
        "network does: gradients are then those of the network that is quantized",
    )
    add(
        "--no_test_penalty",
        action="store_true",
        help="do not measure the penalty on the test set after each epoch",
    )


def add_averaging_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for the exponential average of the weights."""
    add = group.add_argument
    add(
        "--ema",
        type=bounded_number(float, at_least=0, below=1),
        metavar="DECAY",
        help="also average the weights exponentially, with this decay a step, such as 0.999, and "
        "save the average in <…>_ema.pt; None: no average",
    )
    add(
        "--recalibrate_bn_images",
        type=bounded_number(int, at_least=2),
        metavar="N",
        help="with --ema, estimate the batch-norm statistics of the averaged weights on N training "
        f"images; None: {MAX_BN_IMAGES}, or all where there are fewer",
    )


def add_quantization_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags for training with learned step sizes."""
    add = group.add_argument
    add(
        "--qat_bits",
        type=parse_qat_bits,
        metavar="W[,A]",
        help="train with weights rounded to W bits, and inputs of layers to A bits, each from 2 to "
        "16, with learned step sizes (LSQ); without A inputs keep full precision; None: no "
        "rounding",
    )
    add(
        "--qat_from",
        type=bounded_number(int, at_least=0),
        default=0,
        metavar="N",
        help="with --qat_bits, train N epochs in full precision first",
    )
    add(
        "--keep_first_last",
        action="store_true",
        help="with --qat_bits, round the first and the last layer to 8 bits where the others have "
        "fewer",
    )


def parse_qat_bits(text: str) -> str:
    """Return bits of weights and, after a comma, of inputs, such as "4,8": an argparse type."""
    try:
        numbers = [parse_bits(number) for number in text.split(",", 1)]
    except ValueError as error:
        message = f"{text!r} is not W or W,A, bits from 2 to 16, as in 4,4"
        raise argparse.ArgumentTypeError(message) from error
    return ",".join(map(str, numbers))


def qat_bit_widths(text: str) -> tuple[int, int | None]:
    """Return the bits of weights and of inputs that --qat_bits means; None: full precision."""
    weight_bits, _, act_bits = text.partition(",")
    return int(weight_bits), int(act_bits) if act_bits else None


def add_regularizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of any regularizer, and those that the regularizers themselves declare."""
    group = parser.add_argument_group("options of regularizers")
    add = group.add_argument
    add(
        "--lmbda_warmup",
        type=bounded_number(float, at_least=0),
        default=0.0,
        metavar="EPOCHS",
        help="epochs over which λ rises linearly from 0, batch by batch, at the start of a phase",
    )
    add_penalty_price_arguments(group)
    add(
        "--track",
        type=regularizer_name,
        nargs="+",
        default=[],
        metavar="NAME",
        help="log the value of these regularizers, too, without penalizing them: with λ = 1, after "
        "each epoch, on one fixed batch in evaluation mode",
    )
    for name, option in regularizer_options().items():
        kind = {"action": "store_true", "default": None}
        if option.kind is not bool:
            kind = {"type": bounded_number(option.kind), "metavar": "N"}
        owners = ", ".join(option.regularizer_names)
        defaults = ", ".join(dict.fromkeys(map(str, option.defaults)))
        add(f"--{name}", **kind, help=f"{owners}: {option.help}; None: {defaults}")
    add_alias(group, "--hold_step", "detach_step")


def add_penalty_price_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that make penalties cheaper."""
    add = group.add_argument
    add(
        "--penalty_every",
        type=bounded_number(int, at_least=1),
        default=1,
        metavar="K",
        help="add the penalty in every K-th batch of an epoch only, from the first on, times K",
    )
    add_choice(
        group,
        "--penalty_gradient",
        PENALTY_GRADIENTS,
        "exact",
        "how a penalty of gradients is differentiated: twice, or by the difference of the loss's "
        "gradients here and one step further, which costs one plain step and is an estimate",
    )
    add(
        "--penalty_step",
        type=bounded_number(float, above=0),
        default=DIFFERENCE_STEP,
        metavar="EPS",
        help="with --penalty_gradient difference, the step: no weight tensor or activation moves "
        "by more than this part of its norm",
    )


def add_wandb_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where a run is logged in Weights & Biases, and what beside numbers."""
    group = parser.add_argument_group("Weights & Biases (offline where no key is configured)")
    add = group.add_argument
    add("--wandb_project", default="RegulQuant", help="project to log to")
    add("--wandb_entity", help="user or team that owns the project")
    add("--wandb_group", type=label(128), metavar="NAME", help="runs that belong together")
    add(
        "--wandb_tags",
        type=label(64),
        nargs="+",
        default=[],
        metavar="TAG",
        help="words by which runs are filtered",
    )
    add("--wandb_notes", type=label(10_000), metavar="TEXT", help="what the run is for")
    add(
        "--log_model",
        action="store_true",
        help="log the weights, too, as an artifact: the output of a training, the input of a "
        "quantization",
    )


def label(longest: int) -> Callable[[str], str]:
    """Return an argparse type for 1 to `longest` printable characters, spaces among them."""

    def parse(text: str) -> str:
        if not (0 < len(text) <= longest and "".join(text.split()).isprintable()):
            raise argparse.ArgumentTypeError(f"{text!r} is not 1 to {longest} printable characters")
        return text

    return parse


def wandb_requirements() -> list[Requirement]:
    """Return what the flags for Weights & Biases need for an effect, for `warn_unused_flags`."""
    is_logged = os.environ.get("WANDB_MODE") != "disabled"
    flags = ("wandb_group", "wandb_tags", "wandb_notes", "log_model")
    return [(flag, "another WANDB_MODE than disabled", is_logged) for flag in flags]


def regularizer_name(text: str) -> str:
    """Return the name of a regularizer as it is logged: an argparse type."""
    try:
        return make_regularizer(text, 1.0).name
    except (AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regularizer") from error


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


# --- options of regularizers -----------------------------------------------------------------


def regularizer_options_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return the regularizers' own options that the flags give."""
    options = {name: getattr(args, name) for name in regularizer_options()}
    return {name: value for name, value in options.items() if value is not None}


def training_requirements(
    args: argparse.Namespace, names: Sequence[str], has_gradient_penalty: bool
) -> list[Requirement]:
    """Return what the flags of a training need for an effect, for `warn_unused_flags`.

    `names` are the regularizers that the run trains with; `has_gradient_penalty` is whether any of
    them is differentiated through gradients.
    """
    declared, options = regularizer_options(), regularizer_options_from(args)
    uses_difference = has_gradient_penalty and args.penalty_gradient == "difference"
    continues = args.resume or args.init_from or distributed.is_restart_here()
    quantizes = args.qat_bits is not None and args.qat_from < args.n_epochs
    requirements = [
        ("gamma", "--scheduler exponential or multistep", "gamma" in schedule_settings(args)),
        ("milestones", "--scheduler multistep", args.scheduler == "multistep"),
        ("watch_freq", "--watch", args.watch),
        ("allow_changed_settings", "--resume or --init_from", continues),
        ("lmbda_warmup", "a regularizer", names),
        ("penalty_every", "a regularizer", names),
        ("penalty_gradient", "a regularizer of gradients", has_gradient_penalty),
        ("penalty_step", "--penalty_gradient difference", uses_difference),
        ("save_preregularized_model", "a regularizer", names),
        ("cuda_graph", "--device cuda", torch.device(args.device).type == "cuda"),
        ("cuda_graph", "one process", not distributed.several_started()),
        ("recalibrate_bn_images", "--ema", args.ema is not None),
        ("qat_bits", "a longer run", args.qat_from < args.n_epochs),
        ("qat_from", "--qat_bits in a longer run", quantizes),
        ("keep_first_last", "--qat_bits in a longer run", quantizes),
        ("freeze_bn_from", "a longer run", (args.freeze_bn_from or 0) < args.n_epochs),
        *wandb_requirements(),
        *data_requirements(args),
        width_requirement([args.model]),
    ]
    for option in options:
        users = [*names, *(args.track if declared[option].tracked else ())]
        accepted = any(option in accepted_options(name, options) for name in users)
        owners = " or ".join(declared[option].regularizer_names)
        requirements.append((option, f"--regularizer {owners}", accepted))
    return requirements


def data_requirements(args: argparse.Namespace) -> list[Requirement]:
    """Return what the flags of data sets need for an effect, for `warn_unused_flags`."""
    takers = {
        option: [name for name in data.DATASETS if data.accepts(name, option)]
        for option in data.OPTIONS
    }
    return [
        (option, f"--dataset {' or '.join(names)}", args.dataset in names)
        for option, names in takers.items()
    ]


def width_requirement(models: Iterable[str]) -> Requirement:
    """Return what --width needs for an effect on one of the models, for `warn_unused_flags`."""
    needed = f"--model {' or '.join(filter(has_width, MODELS))}"
    return "width", needed, any(map(has_width, models))


def make_tracked_regularizers(args: argparse.Namespace) -> list[Regularizer]:
    """Make the regularizers that --track names; ValueError for an option with a bad value."""
    declared = regularizer_options()
    options = {k: v for k, v in regularizer_options_from(args).items() if declared[k].tracked}
    return [make_regularizer(name, 1.0, **accepted_options(name, options)) for name in args.track]


# --- what the flags name ---------------------------------------------------------------------


def load_dataset(args: argparse.Namespace) -> data.ImageDataset:
    """Return the data set that the flags say; DataError where it cannot be had."""
    options = {option: getattr(args, option) for option in data.OPTIONS}
    with distributed.local_rank0_first():  # it may have to fetch it
        dataset = data.load(args.dataset, args.data_dir, args.seed, **options)
    restrictions = (
        ("holdout", data.use_holdout_as_test),
        ("train_subset", data.subset),
        ("test_subset", data.test_subset),
    )
    for flag, restrict in restrictions:
        if n := getattr(args, flag, None):
            try:
                dataset = restrict(dataset, n)
            except ValueError as error:
                raise DataError(f"--{flag} {n}: {error}") from error
    return dataset


def loader_maker(args: argparse.Namespace, dataset: data.ImageDataset) -> Callable[..., Loader]:
    """Return the data set's `make_loader` with what data set and flags say of all its loaders.

    What is left to give are images, labels and how they are drawn.
    """
    return partial(
        dataset.make_loader,
        batch_size=args.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=args.device,
        memory_format=MEMORY_FORMATS[args.memory_format],
    )


def make_criterion(name: str, label_smoothing: float = 0.0) -> nn.Module:
    """Make the loss of that name in CRITERIA: a mean over the batch."""
    return CRITERIA[name](label_smoothing=label_smoothing)


def print_unfolded(net: nn.Module, n_left: int, model: str) -> None:
    """Print that there is nothing to fold or, if any do, how many batch norms stay unfolded."""
    if not has_batch_norms(net):
        print(f"--fold_bn has no effect: {model} has no batch norms")
    if n_left:
        print(f"{n_left} batch norms of {model} do not follow a convolution alone: they stay")


def make_net(
    name: str,
    num_classes: int,
    device: str,
    width: float = 1.0,
    memory_format: str = "channels_last",
) -> nn.Module:
    """Make the network of that name, as `make_model` does, with fast layers, on the device."""
    net = use_fast_layers(make_model(name, num_classes, width))
    return net.to(device, memory_format=MEMORY_FORMATS[memory_format])


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
    """Return the milestones that lie beyond the run, where they were given as epochs."""
    if args.scheduler != "multistep" or args.milestones in RELATIVE_MILESTONES:
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
