"""What is checked of a grid before hours of training: flags, λ, and names of files and columns."""

import argparse
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath

import utils
from analysis.study.commands import check_quantization, check_training
from analysis.study.grid import (
    CONTROL,
    TRUNK,
    TUNING,
    Grid,
    choice_name,
    lambda_text,
    quantized_name,
    training_name,
)
from analysis.study.settings import MIN_EPOCHS, epoch_names
from engine.system.errors import FileError
from engine.training.resume import MUST_MATCH_INIT_FROM

# Flags that the study gives each training, each one of a λ that it chooses, and each quantization.
OF_TRAININGS = set(
    "run_name save_file resume init_from init_weights seed n_epochs holdout wandb_group".split()
)
# Those that all trainings cannot have in common, as the first epochs are without a penalty.
OF_VARIANTS = set(
    "allow_changed_settings regularizer lmbda first_regularized_epoch no_activation_gradients "
    "freeze_bn_from save_preregularized_model lmbda_warmup penalty_every penalty_gradient "
    "penalty_step fold_bn detach_step".split()
)
OF_LAMBDAS = {"lmbda", "first_regularized_epoch"}
OF_QUANTIZATIONS = {"output", "holdout", "wandb_group"}
ANY = {**epoch_names(MIN_EPOCHS), "lmbda": 1}  # to fill in where it is not known yet
ANY_IMAGES = {"bn_images": 1000}


def check_grid(grid: Grid, source: str) -> None:
    """Raise FileError, in one line, where a study cannot be made of the grid in a file `source`."""
    try:
        _check(grid)
    except ValueError as error:
        raise FileError(f"{source} is no grid of a study: {error}") from error


def _check(grid: Grid) -> None:
    """Raise ValueError where a study cannot be made of the grid."""
    _check_parts(grid)
    with _naming("training"):
        shared = shlex.split(grid.training.format(**ANY))
        check_training(shared, [], OF_TRAININGS | OF_VARIANTS)
    for name, variant in grid.variants.items():
        with _naming(f"variants.{name}"):
            _check_lambdas(grid, name)
            own = shlex.split(variant.flags.format(**ANY))
            reserved = OF_TRAININGS | (OF_LAMBDAS if variant.lmbdas else set())
            if "--allow_changed_settings" not in own:  # what the shared epochs have, it has too
                reserved = reserved | MUST_MATCH_INIT_FROM
            check_training(own, shared, reserved)
    _check_columns(grid)
    _check_files(grid)


@contextmanager
def _naming(part: str) -> Iterator[None]:
    """Context manager in which a ValueError, and what flags lead to, begins with the part."""
    try:
        yield
    except (LookupError, ValueError, argparse.ArgumentTypeError) as error:
        reason = f"{{{error.args[0]}}}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{part}: {' '.join(reason.split())}") from error


def _check_parts(grid: Grid) -> None:
    """Raise ValueError where the grid lacks something that every study has."""
    if CONTROL not in grid.variants:
        raise ValueError(f"there is no variant {CONTROL!r}, which others are compared with")
    if TUNING not in grid.quantizations:
        raise ValueError(f"there is no quantization {TUNING!r}, which λ is chosen by")
    sources = [name for name, each in grid.quantizations.items() if each.full_precision]
    if len(sources) != 1:
        raise ValueError("one quantization has full_precision = true, not " + str(sources))


def _check_lambdas(grid: Grid, name: str) -> None:
    """Raise ValueError where it is not clear which λ a variant has, or one is no number."""
    variant = grid.variants[name]
    for number in (*variant.lmbdas, variant.cost):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"λ and cost are finite and not negative, not {number}")
    source = variant.lambda_from
    if source and source not in grid.variants:
        raise ValueError(f"lambda_from: there is no variant {source!r}")
    if source and variant.lmbdas:
        raise ValueError("it has lmbdas and lambda_from: leave out one of them")
    if source and not grid.variants[source].lmbdas:
        raise ValueError(f"lambda_from: {source!r} has no lmbdas of its own")


def _check_columns(grid: Grid) -> None:
    """Raise ValueError for bad flags of quantizations, or where two have one column in tables."""
    owners: dict[tuple, str] = {}
    for name, how in grid.quantizations.items():
        with _naming(f"quantizations.{name}"):
            columns = _columns(how.flags.format(**ANY_IMAGES))
            _check_names(how.names, list(dict.fromkeys(scheme for scheme, *_ in columns)))
            if name == TUNING:
                _check_tuning(columns)
        for scheme, *bits in [] if name == TUNING else columns:
            column = how.names.get(scheme, scheme), *bits
            if (owner := owners.setdefault(column, name)) != name:
                raise ValueError(
                    f"quantizations.{owner} and quantizations.{name} both have "
                    f"{column[0]!r} with {bits[0]} bits (activations: {bits[1]}): give one of them "
                    f"names = {{ {scheme} = … }}"
                )
    for network, flags in grid.tuning.items():
        with _naming(f"tuning.{network}"):
            _check_tuning(_columns(flags))


def _columns(flags: str) -> list[tuple]:
    """Return scheme and bits of every row that quant_inference.py has with these flags."""
    args = check_quantization(shlex.split(flags), OF_QUANTIZATIONS)
    return [
        (scheme, n_bits, act_bits)
        for scheme in dict.fromkeys(args.schemes)
        for n_bits in args.bits
        for act_bits in utils.act_bit_widths(n_bits, args)
    ]


def _check_names(names: Mapping[str, str], schemes: Sequence[str]) -> None:
    """Raise ValueError where names are of no scheme of a quantization, or two schemes share one."""
    if unknown := names.keys() - set(schemes):
        raise ValueError(f"names: {min(unknown)!r} is none of its schemes, {', '.join(schemes)}")
    owners: dict[str, str] = {}
    for scheme in schemes:
        name = names.get(scheme, scheme)
        if (owner := owners.setdefault(name, scheme)) != scheme:
            raise ValueError(f"names: {owner} and {scheme} are both called {name!r} in tables")


def _check_tuning(columns: list[tuple]) -> None:
    if len(columns) != 1:
        raise ValueError("λ is chosen by one scheme at one number of bits")


def _check_files(grid: Grid) -> None:
    """Raise ValueError where a name is that of no file, or two jobs would have the same files."""
    for name in (*grid.variants, *grid.quantizations):
        if PurePosixPath(name).name != name or "\\" in name or not name.isprintable():
            raise ValueError(f"{name!r} is not the name of a file: choose another")
    owners: dict[str, str] = {}
    for file, owner in _files(grid):
        other = owners.setdefault(file.lower(), owner)  # some systems and --only know no case
        if other is not owner:
            raise ValueError(f"{other} and {owner} have the same files, {file}: rename one of them")


def _files(grid: Grid) -> Iterator[tuple[str, str]]:
    """Yield the files and folders of all jobs of a seed, names of variants, and whose each is."""
    yield TRUNK, "the training that all variants share"
    for name, variant in grid.variants.items():
        yield name, f"variant {name!r}"
        for lmbda in grid.variants[variant.lambda_from or name].lmbdas or (None,):
            training, owner = training_name(name, lmbda), f"variant {name!r}"
            if lmbda is not None:
                owner += f" with λ = {lambda_text(lmbda)}"
                yield training, owner
            for quantization in grid.quantizations:
                folder = quantized_name(training, quantization)
                yield f"{folder}/", f"{owner}, quantized as {quantization!r}"
        if variant.lmbdas:
            yield choice_name(name), f"the choice of λ of {name!r}"
