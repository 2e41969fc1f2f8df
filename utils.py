"""What every script needs: flags, factories, seeding and precision."""

import argparse
import ctypes
import math
import os
import platform
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import data
import distributed
import quant_utils as qu
from models import MODELS
from regularizers import Regularizer, make_regularizer, regularizer_options, taken_by

CRITERIA: dict[str, Callable[[], nn.Module]] = {"CE": nn.CrossEntropyLoss}
PRECISIONS = ("auto", "bf16", "fp32")


# --- flags -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit code 2, and nothing else."""

    def __init__(self, description: str) -> None:
        """Show the defaults in --help."""
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.given: set[str] = set()  # flags of the last command line

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as ever, and note which flags are given, be it with their default."""
        unset = object()
        marked = argparse.Namespace(**{action.dest: unset for action in self._actions})
        known = vars(super().parse_known_args(args, marked)[0])
        self.given = {name for name, value in known.items() if value is not unset}
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2; all processes find the same error, one tells it."""
        distributed.leave_it_to_main()
        self.stop(2, f"error: {' '.join(message.split())}", common=True)

    def stop(self, code: int, message: str, common: bool = False) -> NoReturn:
        """Print the message and exit with the code; what is common to all ranks, rank 0 tells."""
        rank = distributed.rank()
        told = f"{self.prog}: {f'rank {rank}: ' if rank else ''}{message}\n"
        self.exit(code, None if common and rank else told)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Return an argparse type that takes any of the names in upper or lower case."""
    canonical = {name.lower(): name for name in names}

    def parse(text: str) -> str:
        if text.lower() not in canonical:
            allowed = ", ".join(canonical.values())
            raise argparse.ArgumentTypeError(f"unknown value {text!r}: choose {allowed}")
        return canonical[text.lower()]

    return parse


def number(
    kind: type, *, at_least: float = -math.inf, above: float = -math.inf, below: float = 2**63
) -> Callable[[str], float]:
    """Return an argparse type for a number of that kind within bounds; give one lower bound."""
    noun = {int: "a whole number", float: "a finite number"}[kind]
    if above > -math.inf:
        noun += f" above {above:g}"
    elif at_least > -math.inf:
        noun += f" of at least {at_least:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value >= below:
            raise argparse.ArgumentTypeError(f"{text!r} is not below {below:g}")
        if not (value >= at_least and value > above):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}")
        return value

    return parse


def add_choice(
    group: argparse._ArgumentGroup, flag: str, names: Iterable[str], default: str, help: str
) -> None:
    """Add a flag that takes one of the names, in upper or lower case."""
    names = list(names)
    group.add_argument(
        flag, type=one_of(names), default=default, metavar="{" + ",".join(names) + "}", help=help
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for data and machine that training and quantization share."""
    group = parser.add_argument_group("data and machine")
    add_choice(group, "--dataset", data.DATASETS, "CIFAR10", "what to train and test on")
    group.add_argument("--data_dir", default="./data", help="where the data is, or is put")
    group.add_argument(
        "--batch_size", type=number(int, at_least=1), default=128, help="images a step"
    )
    group.add_argument(
        "--holdout", type=number(int, at_least=1), metavar="N",
        help="the last N training images take the place of the test set, for choices that must "
        "not see it; nothing is trained on them",
    )
    group.add_argument(
        "--device", type=parse_device, default=default_device(), help="cpu, cuda, cuda:1, …"
    )
    group.add_argument("--seed", type=number(int, at_least=0), default=242, help="random seed")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a training that do not say which regularizer works when."""
    group = parser.add_argument_group("run")
    group.add_argument("--run_name", help="name of the run; None: made of model, data, penalty")
    group.add_argument("--save_file", help="file to save to, .pt added; None: the run's name")
    group.add_argument(
        "--save_preregularized_model", action="store_true",
        help="also save the weights just before regularization begins, in <…>_preregul.pt",
    )
    group.add_argument(
        "--checkpoint_every", type=number(int, at_least=1), default=1, metavar="N",
        help="epochs between checkpoints, in <…>.ckpt",
    )
    group.add_argument(
        "--checkpoint_minutes", type=number(float, above=0), default=10.0, metavar="M",
        help="minutes between checkpoints inside an epoch",
    )
    group.add_argument(
        "--resume", action="store_true",
        help="go on from the checkpoint; from the beginning where there is none",
    )
    group.add_argument(
        "--init_from", metavar="CKPT",
        help="begin where that checkpoint of another run is: weights, momentum, schedule, epoch",
    )
    group.add_argument(
        "--override", action="store_true", help="go on although settings have changed"
    )
    group.add_argument(
        "--watch", action="store_true", help="log histograms of every parameter and gradient"
    )
    group.add_argument(
        "--watch_freq", type=number(int, at_least=1), default=100, help="batches between them"
    )
    group = parser.add_argument_group("training")
    add_choice(group, "--model", MODELS, "ConvNet", "network")
    add_choice(group, "--criterion", CRITERIA, "CE", "loss, without the penalty")
    group.add_argument("--n_epochs", type=number(int, at_least=1), default=25, help="epochs")
    group.add_argument("--lr", type=number(float, above=0), default=0.1, help="learning rate")
    add_choice(group, "--scheduler", SCHEDULERS, "exponential", "learning-rate schedule")
    group.add_argument(
        "--gamma", type=number(float, above=0), default=0.99,
        help="factor of the learning rate, each epoch (exponential) or milestone (multistep)",
    )
    group.add_argument(
        "--milestones", type=milestones, default="default",
        metavar="{" + ",".join(MILESTONES) + ",EPOCH[,EPOCH…]}",
        help="of multistep: after 1/2 and 5/6 of the run, after 1/2, at epochs 25 and 50, or at "
        "those given, as in 6,8",
    )
    group.add_argument("--momentum", type=number(float, at_least=0), default=0.9, help="of SGD")
    group.add_argument(
        "--weight_decay", type=number(float, at_least=0), default=5e-4, help="of SGD"
    )
    group.add_argument(
        "--train_subset", type=number(int, at_least=1), metavar="N",
        help="train on the first N images only, for a quick look",
    )
    add_choice(
        group, "--precision", PRECISIONS, "auto",
        "of the convolutions; auto: bf16 where the hardware is fast at it",
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True,
        help="compile the element-wise kernels where a compiler is present",
    )
    group.add_argument(
        "--sync_bn", action=argparse.BooleanOptionalAction, default=True,
        help="under torchrun, take batch-norm statistics over all processes",
    )
    group.add_argument(
        "--freeze_bn_from", type=number(int, at_least=1), metavar="N",
        help="from epoch N on batch norms use and keep their running statistics, as the quantized "
        "network does: gradients are then those of the network that is quantized",
    )
    group.add_argument(
        "--no_test_penalty", action="store_true",
        help="do not measure the penalty on the test set after each epoch",
    )


def add_regularizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of any regularizer, and those that the regularizers themselves declare."""
    group = parser.add_argument_group("of any regularizer")
    group.add_argument(
        "--lmbda_warmup", type=number(float, at_least=0), default=0.0, metavar="EPOCHS",
        help="λ rises linearly from 0, batch by batch, over the first EPOCHS of each phase",
    )
    group.add_argument(
        "--track", type=regularizer_name, nargs="+", default=[], metavar="NAME",
        help="also log the value of these, with λ = 1, after each epoch, of one fixed batch in "
        "evaluation mode; of the weights themselves, also beside --fold_bn",
    )
    for name, option in regularizer_options().items():
        kind = {"action": "store_true", "default": None}
        if option.kind is not bool:
            kind = {"type": number(option.kind), "metavar": "N"}
        takers = ", ".join(option.takers)
        group.add_argument(
            f"--{name}", **kind, help=f"{option.help}; of {takers}; None: {option.default}"
        )


def regularizer_name(text: str) -> str:
    """Return the name of a regularizer as it is logged: an argparse type."""
    try:
        return make_regularizer(text, 1.0).name
    except (AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regularizer") from error


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the regularizers' own options that the flags give."""
    options = {name: getattr(args, name) for name in regularizer_options()}
    return {name: value for name, value in options.items() if value is not None}


def check_options(parser: Parser, args: argparse.Namespace, names: Iterable[str]) -> None:
    """End the program where an option is given that none of these takes, nor what is tracked."""
    known = regularizer_options()
    for option in (options := given_options(args)):
        able = [*names, *(args.track if known[option].tracked else ())]
        if not any(option in taken_by(name, options) for name in able):
            parser.error(f"--{option}: {', '.join(able)} does not take it")


def check_effect(parser: Parser, needs: Iterable[tuple[str, str, object]]) -> None:
    """End the program where a flag is given that would be without effect.

    `needs` are (flag, what it needs in words, whether that is there).
    """
    for flag, needed, there in needs:
        if flag in parser.given and not there:
            parser.error(f"--{flag} needs {needed}")


def tracked(args: argparse.Namespace) -> list[Regularizer]:
    """Make the regularizers that --track names; ValueError for an option with a bad value."""
    known, options = regularizer_options(), given_options(args)
    options = {option: value for option, value in options.items() if known[option].tracked}
    return [make_regularizer(name, 1.0, **taken_by(name, options)) for name in args.track]


def add_wandb_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where a run is logged in Weights & Biases."""
    group = parser.add_argument_group("Weights & Biases (offline where no key is configured)")
    group.add_argument("--wandb_project", default="regulquant", help="project to log to")
    group.add_argument("--wandb_entity", help="user or team that owns the project")


def default_device() -> str:
    """Return the name of the accelerator where there is one with float64, else "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found and found.type != "mps" else "cpu"


def parse_device(text: str) -> str:
    """Return the device's name if it can add up in float64, as means are: an argparse type."""
    text = text.lower()
    try:
        torch.zeros(1, dtype=torch.float64, device=text).sum().item()  # "meta" and "mps" cannot
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"no device {text!r} with float64 here: try cpu or cuda"
        ) from error
    return text


# --- factories -------------------------------------------------------------------------------


def load_dataset(args: argparse.Namespace) -> data.Data:
    """Return the data set that the flags say; DataError where that cannot be had."""
    with distributed.one_first():  # it may have to fetch them
        dataset = data.load(args.dataset, args.data_dir, args.seed)
    for flag, change in (("holdout", data.holdout), ("train_subset", data.subset)):
        if n := getattr(args, flag, None):
            try:
                dataset = change(dataset, n)
            except ValueError as error:
                raise data.DataError(f"--{flag} {n}: {error}") from error
    return dataset


def make_criterion(name: str) -> nn.Module:
    """Make the loss of that name in CRITERIA: a mean over the batch."""
    return CRITERIA[name]()


class NetworkError(RuntimeError):
    """A network cannot do what the flags ask for; the message is one line."""


def check_folding(net: nn.Module, dataset: data.Data) -> None:
    """Raise NetworkError where the network's batch norms cannot be folded."""
    try:
        qu.check_folding(net, dataset.test_images.shape[1:])
    except ValueError as error:
        raise NetworkError(f"--fold_bn: {error}") from error


def make_net(name: str, num_classes: int, device: str) -> nn.Module:
    """Make the network of that name in MODELS, in the layout that convolutions are fastest in."""
    return MODELS[name](num_classes).to(device, memory_format=torch.channels_last)


# The epochs, of a run of n, at which multistep multiplies the learning rate by γ.
MILESTONES: dict[str, Callable[[int], list[int]]] = {
    "default": lambda n: sorted({max(1, n // 2), max(1, n * 5 // 6)}),
    "halfway": lambda n: [max(1, n // 2)],
    "fixed": lambda n: [25, 50],
}

SCHEDULERS: dict[str, Callable[..., lr_scheduler.LRScheduler]] = {
    "exponential": lambda optimizer, gamma, _: lr_scheduler.ExponentialLR(optimizer, gamma),
    "multistep": lambda optimizer, gamma, at: lr_scheduler.MultiStepLR(optimizer, at, gamma),
}


def milestones(text: str) -> str:
    """Return a name in MILESTONES, or epochs as in "6,8": an argparse type."""
    epochs = text.split(",")
    if all(epoch.isdecimal() for epoch in epochs):
        if (at := list(map(int, epochs))) == sorted(set(at)) and at[0] > 0:
            return ",".join(map(str, at))
        raise argparse.ArgumentTypeError(f"{text!r}: give epochs from 1 on, each after the last")
    try:
        return one_of(MILESTONES)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or epochs as in 6,8") from error


def milestone_epochs(text: str, n_epochs: int) -> list[int]:
    """Return the epochs that such text stands for in a run of n_epochs."""
    if text in MILESTONES:
        return MILESTONES[text](n_epochs)
    return list(map(int, text.split(",")))


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, gamma: float, milestones: str, n_epochs: int
) -> lr_scheduler.LRScheduler:
    """Make the schedule of that name in SCHEDULERS; it steps once an epoch."""
    return SCHEDULERS[name](optimizer, gamma, milestone_epochs(milestones, n_epochs))


def penalized_weights(net: nn.Module) -> list[nn.Parameter]:
    """Return W_l: the weight of every Conv2d and Linear in module order."""
    return [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def folded_weights(net: nn.Module) -> list[Tensor]:
    """Return Ŵ_l: penalized_weights with the batch norms folded in, W_l where none follows.

    Raises ValueError for a batch norm without running statistics.
    """
    folded = qu.folded_weights(net)
    return [folded.get(w, w) for w in penalized_weights(net)]


# --- the machine -----------------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Have the C library reuse large freed blocks, not hand them back to the system at once.

    Each step takes and frees the same blocks, and a fresh one costs a page fault every 4 KB: a
    tenth of a step on two threads. Returns False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, max_of_mmapped, trim_threshold = ctypes.CDLL(None).mallopt, -4, -1  # as in malloc.h
    return bool(mallopt(max_of_mmapped, 0) and mallopt(trim_threshold, 2**31 - 1))


# --- randomness and precision ----------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed every global stream, and ask for kernels that repeat bit for bit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def resolve_precision(precision: str, device: str) -> torch.dtype:
    """Return the dtype of the convolutions; "auto" is bfloat16 where the hardware is fast at it."""
    if precision == "auto":
        if torch.device(device).type == "cpu":
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        else:
            fast = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8
        precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 convolutions, or none for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
