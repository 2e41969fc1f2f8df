"""What the commands of a study's jobs mean, read by the parsers of their scripts."""

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import combined_protocol
import flags
import train
from engine.system.cli import Parser, refuse_flags
from engine.training.resume import MAY_CHANGE_ON_RESUME

TRAIN, PROTOCOL, QUANTIZE = "train.py", "combined_protocol.py", "quant_inference.py"
PARSERS: dict[str, Callable[[], Parser]] = {
    TRAIN: train.make_parser,
    PROTOCOL: combined_protocol.make_parser,
    QUANTIZE: lambda: flags.make_parser("", flags.QUANTIZATION),
}
# Settings that change no number: files, and what may change on --resume.
NO_MATTER = {"checkpoints", "init_from", "output", "resume", "allow_changed_settings", "no_plots"}
NO_MATTER |= MAY_CHANGE_ON_RESUME


def script_of(words: Sequence[str]) -> str:
    """Return the script that takes these flags of a training."""
    return PROTOCOL if "--phases" in words else TRAIN


@cache
def _parser(script: str) -> Parser:
    """Return the script's parser, whose errors are ValueErrors here."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser = PARSERS[script]()
    parser.error = refuse
    return parser


def settings_of(command: Sequence[str]) -> dict[str, Any]:
    """Return by name the settings of a command that its numbers depend on.

    Raises LookupError or ValueError where the scripts of today do not take it.
    """
    script, *words = command
    args, unknown = _parser(script).parse_known_args(words)
    if unknown:
        raise ValueError(f"unknown: {unknown[0]}")
    return {name: value for name, value in vars(args).items() if name not in NO_MATTER}


def check_training(own: Sequence[str], shared: Sequence[str], reserved: set[str]) -> None:
    """Raise ValueError where a training does not take its own flags with those that all share.

    And where one of its own is reserved.
    """
    script = script_of(own)
    _parse(script, own, reserved)
    args = _parse(script, [*shared, *own], set())
    if script == PROTOCOL:
        penalties = [phase.regularizer for phase in combined_protocol.make_phases(args)]
    else:
        penalties = [train.make_penalty(args)]
    penalties = [each for each in penalties if each]
    _refuse(script, args, regularizers=penalties, models=[args.model], has_checkpoint=True)


def check_quantization(words: Sequence[str], reserved: set[str]) -> argparse.Namespace:
    """Return what flags of a quantization mean; raises ValueError as `check_training` does."""
    args = _parse(QUANTIZE, ["weights.pt", *words], reserved)
    args.bits = [args.budget_bits] if args.budget_bits else sorted(set(args.bits))
    _refuse(QUANTIZE, args)
    return args


def _parse(script: str, words: Sequence[str], reserved: set[str]) -> argparse.Namespace:
    parser = _parser(script)
    args = parser.parse_args(words)
    if given := parser.explicit_flags & reserved:
        raise ValueError(f"--{min(given)} is set by the study and cannot be given here")
    return args


def _refuse(script: str, args: argparse.Namespace, **facts: Any) -> None:
    refuse_flags(_parser(script), args, _parser(script).flags, **facts)
