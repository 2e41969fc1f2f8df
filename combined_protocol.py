"""Train in phases, each with its own regularizers.

By default the published combined protocol: nothing, then VarianceNorm, then VarianceNorm and L2Grad
of the weights together. The loop is train.py's.
"""

import engine.system.early_interrupt  # noqa: F401, first: what follows takes seconds

# isort: split
import argparse
import re
from collections.abc import Sequence
from functools import reduce
from typing import Any

import flags
import train
import utils
from engine.system.cli import Parser
from flags import PHASE_SYNTAX
from regularizers import CombinedReg, Regularizer, accepted_options, make_regularizer


def published_protocol(args: argparse.Namespace) -> list[str]:
    """Return the phases of the published protocol with the epochs, λs and P of the flags."""
    variance = f"VarianceNorm={args.variance_lmbda}"
    gradient = f"L{args.P}Grad{'' if args.activation_gradients else '@weights'}"
    return [
        *(["0:none"] if args.first_variance_epoch else []),
        f"{args.first_variance_epoch}:{variance}",
        f"{args.first_gradient_epoch}:{variance}+{gradient}={args.gradient_lmbda}",
    ]


def parse_phase(text: str, **options: Any) -> train.Phase:
    """Return the phase written as PHASE_SYNTAX, with the options that its regularizers accept.

    Raises ValueError if it is not written so.
    """
    epoch, _, terms = text.partition(":")
    if not (epoch.isdecimal() and terms):
        raise ValueError(f"{text!r} is not {PHASE_SYNTAX}")
    if terms.lower() == "none":
        return train.Phase(int(epoch))
    single_terms = re.split(r"\+(?=[^\d.])", terms)  # not inside 1e+2, which is one λ
    regularizers = [parse_term(term, **options) for term in single_terms]
    return train.Phase(int(epoch), reduce(CombinedReg, regularizers))


def parse_term(text: str, **options: Any) -> Regularizer:
    """Return the regularizer written as NAME=λ or NAME@weights=λ; ValueError if it is not one."""
    name, _, lmbda = text.partition("=")
    name, _, restriction = name.partition("@")
    if restriction not in ("", "weights"):
        raise ValueError(f"@{restriction} is not @weights")
    try:
        value = float(lmbda)
    except ValueError as error:
        raise ValueError(f"{text!r} is not NAME=λ with a number for λ") from error
    if restriction:
        options["only_weight_grads"] = True
        if not accepted_options(name, {"only_weight_grads": True}):
            raise ValueError(f"{name}@weights: only L<P>Grad has gradients of activations")
    regularizer = make_regularizer(name, value, **accepted_options(name, options))
    if regularizer is None:
        raise ValueError("none stands alone")
    return regularizer


def make_parser() -> Parser:
    """Make the parser of combined_protocol.py: the defaults are the published protocol's."""
    schedule = {"scheduler": "multistep", "gamma": 0.15, "milestones": "fixed"}
    table = [*flags.TRAINING, *flags.PHASES, *flags.common()]
    description = "Train in phases; by default the published combined protocol."
    return flags.make_parser(description, table, n_epochs=110, **schedule)


def make_phases(args: argparse.Namespace) -> list[train.Phase]:
    """Return what --phases says; ValueError where one is no phase."""
    options = utils.regularizer_options_from(args)
    return [parse_phase(text, **options) for text in args.phases]


def main(argv: Sequence[str] | None = None) -> None:
    """Train in the phases that the flags say."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.run_name = args.run_name or train.default_name(args, "combined")
    epoch_flags = "--phases" if args.phases else "--first_variance_epoch or --first_gradient_epoch"
    args.phases = args.phases or published_protocol(args)
    with parser.reporting_value_errors("argument --phases: "):
        phases = make_phases(args)
    starts = [phase.start for phase in phases]
    if starts != sorted(set(starts)):
        parser.error(f"{epoch_flags}: phases start at epochs {starts}, not each after the last")
    train.validate_and_run(parser, args, phases, epoch_flags)


if __name__ == "__main__":
    main()
