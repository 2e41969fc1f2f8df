"""Train in phases, each with its own regularizers.

By default the published combined protocol: nothing, then VarianceNorm, then VarianceNorm and L2Grad
of the weights together.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import train
import utils
from engine.cli import Parser, bounded_number
from regularizers import CombinedReg, Regularizer, accepted_options, make_regularizer

PHASES_HELP = """any list of phases instead, each EPOCH:none or EPOCH:NAME=λ[+NAME=λ…], where
L<P>Grad@weights leaves the gradients of activations out: 0:none 10:L1Grad=0.01
20:VarianceNorm=1.25+L1Grad@weights=0.05"""


def parse_phase(text: str, **options: Any) -> train.Phase:
    """Return the phase written as EPOCH:none or EPOCH:NAME=λ[+NAME=λ…]; ValueError if it is not.

    Each regularizer gets those of the options that it takes.
    """
    epoch, _, terms = text.partition(":")
    if not (epoch.isdecimal() and terms):
        raise ValueError(f"{text!r} is not EPOCH:none or EPOCH:NAME=λ[+NAME=λ…]")
    if terms.lower() == "none":
        return train.Phase(int(epoch))
    made = map(partial(parse_term, **options), re.split(r"\+(?=[^\d.])", terms))  # 1e+2 is one λ
    return train.Phase(int(epoch), reduce(CombinedReg, made))


def parse_term(text: str, **options: Any) -> Regularizer:
    """Return the regularizer written as NAME=λ or NAME@weights=λ; ValueError if it is not one."""
    name, _, lmbda = text.partition("=")
    name, _, only = name.partition("@")
    if only not in ("", "weights"):
        raise ValueError(f"@{only} is not @weights")
    try:
        value = float(lmbda)
    except ValueError as error:
        raise ValueError(f"{text!r} is not NAME=λ with a number for λ") from error
    options = accepted_options(name, options)
    if only:
        without = accepted_options(name, {"only_weight_grads": True})
        if not without:
            raise ValueError(f"{name}@weights: only L<P>Grad has gradients of activations")
        options |= without
    regularizer = make_regularizer(name, value, **options)
    if regularizer is None:
        raise ValueError("none stands alone")
    return regularizer


def protocol(args: argparse.Namespace) -> list[str]:
    """Return the published protocol with the epochs, λs and P of the flags."""
    variance = f"VarianceNorm={args.variance_lmbda}"
    gradient = f"L{args.P}Grad{'' if args.activation_gradients else '@weights'}"
    return [
        *(["0:none"] if args.first_variance_epoch else []),
        f"{args.first_variance_epoch}:{variance}",
        f"{args.first_gradient_epoch}:{variance}+{gradient}={args.gradient_lmbda}",
    ]


def make_parser() -> Parser:
    """Make the parser of combined_protocol.py: the defaults are the published protocol's."""
    parser = Parser(__doc__)
    utils.add_training_arguments(parser)
    parser.set_defaults(n_epochs=110, scheduler="multistep", gamma=0.15, milestones="fixed")
    group = parser.add_argument_group("phases")
    epoch, lmbda = bounded_number(int, at_least=0), bounded_number(float, at_least=0)
    add = group.add_argument
    add("--first_variance_epoch", type=epoch, default=70, help="when VarianceNorm begins")
    add("--variance_lmbda", type=lmbda, default=1.25, help="its λ")
    add("--first_gradient_epoch", type=epoch, default=90, help="when L<P>Grad joins it")
    add("--gradient_lmbda", type=lmbda, default=0.05, help="its λ")
    add("--P", type=bounded_number(int, at_least=1), default=2, help="its order")
    add("--activation_gradients", action="store_true", help="penalize those of activations too")
    add("--phases", nargs="+", metavar="PHASE", help=PHASES_HELP)
    utils.add_regularizer_arguments(parser)
    utils.add_data_arguments(parser)
    utils.add_wandb_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train in the phases that the flags say."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.run_name = args.run_name or train.default_name(args, "combined")
    flags = (
        "first_variance_epoch",
        "variance_lmbda",
        "first_gradient_epoch",
        "gradient_lmbda",
        "P",
        "activation_gradients",
    )
    changed = [f"--{name}" for name in flags if getattr(args, name) != parser.get_default(name)]
    if args.phases and changed:
        parser.error(f"--phases says it all: it does not go with {', '.join(changed)}")
    args.phases = args.phases or protocol(args)
    try:
        phases = [parse_phase(text, **utils.regularizer_options_from(args)) for text in args.phases]
    except ValueError as error:
        parser.error(f"argument --phases: {error}")
    names = [name for p in phases if p.regularizer for name in p.regularizer.name.split("+")]
    utils.check_options(parser, args, names or ["none"])
    starts = [p.start for p in phases]
    if starts != sorted(set(starts)):
        parser.error(f"the phases start at epochs {starts}: each must start after the one before")
    train.validate_and_run(parser, args, phases)


if __name__ == "__main__":
    main()
