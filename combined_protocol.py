"""Train in phases, each with its own regularizers.

By default the published combined protocol: nothing, then VarianceNorm, then VarianceNorm and L2Grad
of the weights together. The loop is train.py's.
"""

import argparse
import re
from collections.abc import Sequence
from functools import reduce
from typing import Any

import train
import utils
from engine.system.cli import Parser, bounded_number
from regularizers import CombinedReg, Regularizer, accepted_options, make_regularizer

PHASE_SYNTAX = "EPOCH:none or EPOCH:NAME=λ[+NAME=λ…]"
PROTOCOL_FLAGS = (
    "first_variance_epoch", "variance_lmbda", "first_gradient_epoch", "gradient_lmbda", "P",
    "activation_gradients",
)  # fmt: skip


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
    """Return the phase written as PHASE_SYNTAX says; ValueError if it is not written so.

    Each regularizer gets those of the options that it accepts.
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
    parser = Parser("Train in phases; by default the published combined protocol.")
    utils.add_training_arguments(parser)
    parser.set_defaults(n_epochs=110, scheduler="multistep", gamma=0.15, milestones="fixed")
    add = parser.add_argument_group("phases").add_argument
    epoch, lmbda = bounded_number(int, at_least=0), bounded_number(float, at_least=0)
    add("--first_variance_epoch", type=epoch, default=70, help="epoch when VarianceNorm begins")
    add("--variance_lmbda", type=lmbda, default=1.25, help="λ of VarianceNorm")
    add(
        "--first_gradient_epoch",
        type=epoch,
        default=90,
        help="epoch from which L<P>Grad is added to VarianceNorm",
    )
    add("--gradient_lmbda", type=lmbda, default=0.05, help="λ of L<P>Grad")
    add("--P", type=bounded_number(int, at_least=1), default=2, help="order of L<P>Grad's norm")
    add(
        "--activation_gradients",
        action="store_true",
        help="L<P>Grad: penalize the gradients of activations, too",
    )
    add(
        "--phases",
        nargs="+",
        metavar="PHASE",
        help=f"any list of phases instead, each {PHASE_SYNTAX}, where L<P>Grad@weights leaves the "
        "gradients of activations out: 0:none 10:L1Grad=0.01 20:VarianceNorm=1+L1Grad@weights=0.05",
    )
    utils.add_regularizer_arguments(parser)
    utils.add_data_arguments(parser)
    utils.add_wandb_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train in the phases that the flags say."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.run_name = args.run_name or train.default_name(args, "combined")
    requirements = [(flag, "no --phases", not args.phases) for flag in PROTOCOL_FLAGS]
    epoch_flags = "--phases" if args.phases else "--first_variance_epoch or --first_gradient_epoch"
    args.phases = args.phases or published_protocol(args)
    try:
        phases = [parse_phase(text, **utils.regularizer_options_from(args)) for text in args.phases]
    except ValueError as error:
        parser.error(f"argument --phases: {error}")
    starts = [phase.start for phase in phases]
    if starts != sorted(set(starts)):
        parser.error(f"the phases start at epochs {starts}: each must start after the one before")
    train.validate_and_run(parser, args, phases, epoch_flags, requirements)


if __name__ == "__main__":
    main()
