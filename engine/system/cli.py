"""Command lines: argparse types, errors of one line, and the exit codes that all scripts share.

0: done. 1: bad data, files or numbers. 2: bad flags. 128 + n: stopped by signal n.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from engine.system import distributed
from engine.system.errors import ReportedError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit code 2.

    `explicit_flags` are the names of the flags that the last command line gave, with their default
    value or another.
    """

    def __init__(self, description: str) -> None:
        """Make a parser that shows defaults in --help and takes no abbreviated flags."""
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.explicit_flags: set[str] = set()

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse the command line and record `explicit_flags`."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a console without λ shows its code
                stream.reconfigure(errors="backslashreplace")
        words = {word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)}
        self.explicit_flags = {a.dest for a in self._actions if words & set(a.option_strings)}
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with 2; of several processes rank 0 prints."""
        distributed.wait_for_rank0_exit()
        self.exit_with(2, f"error: {' '.join(message.split())}", silent=distributed.get_rank() > 0)

    def exit_with(self, code: int, message: str, silent: bool = False) -> NoReturn:
        """Exit with the code; print the message with the script's name unless `silent`."""
        rank = distributed.get_rank()
        line = f"{self.prog}: {f'rank {rank}: ' if rank else ''}{message}\n"
        self.exit(code, None if silent else line)


def no_hint() -> str:
    """Return the end of a message that has nothing to add."""
    return ""


@contextmanager
def exit_codes(parser: Parser, hint: Callable[[], str] = no_hint) -> Iterator[None]:
    """Context manager that ends the script with one line for an error that the user can correct.

    `hint()` is added to that line where the run can be continued: after a signal, a failed write
    or a lost process. Errors in the program itself stay tracebacks.
    """
    try:
        yield
    except ReportedError as error:
        if error.reported_by == "rank 0":
            distributed.wait_for_rank0_exit()
        silent = {
            "rank 0": distributed.get_rank() > 0,
            "local rank 0": not distributed.is_local_rank0(),
            "every rank": False,
        }[error.reported_by]
        can_continue = error.reported_by == "every rank"
        message = f"error: {error}{hint() if can_continue else ''}"
        parser.exit_with(error.exit_code, message, silent)
    except OSError as error:
        parser.exit_with(1, f"error: {error}{hint()}")
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if not isinstance(code, int) or code <= 128:  # not a signal: an exit that was asked for
            raise
        parser.exit_with(code, f"stopped{hint()}", silent=distributed.get_rank() > 0)


def choice_ignoring_case(names: Iterable[str]) -> Callable[[str], str]:
    """Return an argparse type that accepts any of the names in upper or lower case."""
    canonical = {name.lower(): name for name in names}

    def parse(text: str) -> str:
        if text.lower() not in canonical:
            allowed = ", ".join(canonical.values())
            raise argparse.ArgumentTypeError(f"unknown value {text!r}: choose {allowed}")
        return canonical[text.lower()]

    return parse


def bounded_number(
    kind: type, *, at_least: float = -math.inf, above: float = -math.inf, below: float = 2**63
) -> Callable[[str], float]:
    """Return an argparse type for an int or float within bounds; give one lower bound."""
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
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}, below {below:g}")
        if not (value >= at_least and value > above):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}")
        return value

    return parse


def file_name(text: str) -> str:
    """Return the text, unless it is empty as an unset shell variable is: an argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return text


class StoreFlat(argparse.Action):
    """Stores the lists that a flag's type returns for each of its values, joined to one list."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001, D102
        setattr(namespace, self.dest, [item for value in values for item in value])


def add_choice(
    group: argparse._ArgumentGroup, flag: str, names: Iterable[str], default: str, help: str
) -> None:
    """Add a flag that takes one of the names, in upper or lower case."""
    names = list(names)
    group.add_argument(
        flag,
        type=choice_ignoring_case(names),
        default=default,
        metavar="{" + ",".join(names) + "}",
        help=help,
    )


def add_alias(
    group: argparse._ArgumentGroup,
    old_flag: str,
    dest: str,
    action: str = "store_true",
    **kind: Any,
) -> None:
    """Add the old spelling of the flag `dest`, which comes first and whose default it has.

    --help does not show it.
    """
    group.add_argument(
        old_flag, dest=dest, action=action, default=None, help=argparse.SUPPRESS, **kind
    )


Requirement = tuple[str, str, object]  # flag, what it needs in words, whether that is there


def warn_unused_flags(
    parser: Parser, args: argparse.Namespace, requirements: Iterable[Requirement]
) -> None:
    """Print one warning line for flags that have no effect, and set them to their defaults.

    Loops and sweeps give every flag every time: a flag with its default value is not mentioned.
    """
    unused: dict[str, str] = {}
    for flag, needed, is_met in requirements:
        if getattr(args, flag) != parser.get_default(flag) and not is_met:
            unused.setdefault(flag, f"--{flag} (needs {needed})")
    for flag in unused:
        setattr(args, flag, parser.get_default(flag))
        parser.explicit_flags.discard(flag)
    if unused and distributed.get_rank() == 0:
        print(
            f"{parser.prog}: ignored, without effect: {', '.join(unused.values())}", file=sys.stderr
        )


def refuse_unused_flags(parser: Parser, requirements: Iterable[Requirement]) -> None:
    """End the program where a flag is given that has no effect."""
    for flag, needed, is_met in requirements:
        if flag in parser.explicit_flags and not is_met:
            parser.error(f"--{flag} needs {needed}")
