"""Command lines: argparse types, errors of one line, and the exit codes that all scripts share.

0: done. 1: bad data, files or numbers. 2: bad flags. 128 + n: stopped by signal n.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from engine.system import distributed, hardware
from engine.system.errors import ReportedError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit code 2.

    `flags` are those that `add_flags` added, `explicit_flags` the names of those that the last
    command line gave, with their default value or another.
    """

    def __init__(self, description: str) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)
        self.flags: list[Flag] = []
        self.explicit_flags: set[str] = set()
        self.ignored: dict[str, str] = {}  # flags of earlier versions, and why they do nothing

    def add_flags(self, table: Iterable["str | Flag"]) -> None:
        """Add flags; a text begins a group of --help with that title."""
        group = self
        for entry in table:
            if isinstance(entry, str):
                group = self.add_argument_group(entry)
            else:
                entry.add_to(group)
                self.flags.append(entry)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse the command line and record `explicit_flags`."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a console without λ shows its code
                stream.reconfigure(errors="backslashreplace")
        words = {word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)}
        self.explicit_flags = {a.dest for a in self._actions if words & set(a.option_strings)}
        self.ignored.clear()
        parsed = super().parse_args(args, namespace)
        if distributed.get_rank() == 0:
            for flag, reason in self.ignored.items():
                print(f"{self.prog}: {flag} is ignored: {reason}", file=sys.stderr)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with 2; of several processes rank 0 prints."""
        distributed.wait_for_rank0_exit()
        self.exit_with(2, f"error: {' '.join(message.split())}", silent=distributed.get_rank() > 0)

    @contextmanager
    def reporting_value_errors(self, prefix: str = "") -> Iterator[None]:
        """Context manager in which a ValueError ends the program as a bad flag does."""
        try:
            yield
        except ValueError as error:
            self.error(f"{prefix}{error}")

    def exit_with(self, code: int, message: str, silent: bool = False) -> NoReturn:
        """Exit with the code; print the message with the script's name unless `silent`."""
        rank = distributed.get_rank()
        line = f"{self.prog}: {f'rank {rank}: ' if rank else ''}{message}\n"
        self.exit(code, None if silent else line)


@contextmanager
def exit_codes(parser: Parser, hint: Callable[[], str] = str) -> Iterator[None]:
    """Context manager that ends the script with one line for an error that the user can correct.

    `hint()`, by default "", is added to that line where the run can be continued: after a signal, a
    failed write, a lost process or where memory ran out. Errors in the program itself stay
    tracebacks.
    """
    try:
        yield
    except ReportedError as error:
        if error.reported_by == "rank 0":
            distributed.wait_for_rank0_exit()
        reporters = {
            "rank 0": distributed.get_rank() == 0,
            "local rank 0": distributed.is_local_rank0(),
            "every rank": True,
        }
        end = hint() if error.reported_by == "every rank" else ""
        silent = not reporters[error.reported_by]
        parser.exit_with(error.exit_code, f"error: {error}{end}", silent)
    except OSError as error:
        parser.exit_with(1, f"error: {error}{hint()}")
    except (MemoryError, RuntimeError) as error:
        if not hardware.is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        advice = "a smaller --batch_size takes less"
        parser.exit_with(1, f"error: memory ran out: {reason}; {advice}{hint()}")
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if not isinstance(code, int) or code <= 128:  # not a signal: an exit that was asked for
            raise
        parser.exit_with(code, f"stopped{hint()}", silent=distributed.get_rank() > 0)


@contextmanager
def argument_errors(message: str = "") -> Iterator[None]:
    """Context manager for argparse types, whose errors argparse shows: `message`, or their own."""
    try:
        yield
    except (AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(message or str(error)) from error


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
    kind: type,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = 2**63,
    at_most: float = math.inf,
) -> Callable[[str], float]:
    """Return an argparse type for an int or float within bounds; give one lower bound."""
    noun = {int: "a whole number", float: "a finite number"}[kind]
    if above > -math.inf:
        noun += f" above {above:g}"
    elif at_least > -math.inf:
        noun += f" of at least {at_least:g}"
    if at_most < math.inf:
        noun += f" and at most {at_most:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value >= below:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}, below {below:g}")
        if not (at_least <= value <= at_most and value > above):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}")
        return value

    return parse


def file_name(text: str) -> str:
    """Return the text, unless it is empty as an unset shell variable is: an argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return text


def label(longest: int) -> Callable[[str], str]:
    """Return an argparse type for 1 to `longest` printable characters, spaces among them."""

    def parse(text: str) -> str:
        if not (0 < len(text) <= longest and "".join(text.split()).isprintable()):
            raise argparse.ArgumentTypeError(f"{text!r} is not 1 to {longest} printable characters")
        return text

    return parse


def project_name(text: str) -> str:
    """Return the text if it can name a project in Weights & Biases: an argparse type."""
    label(128)(text)
    if found := [character for character in "/\\#?%:" if character in text]:
        raise argparse.ArgumentTypeError(f"{text!r} has a {found[0]}, which no project's name has")
    return text


class StoreFlat(argparse.Action):
    """Stores all values in one list; for some of them a flag's type may return a list itself."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001, D102
        lists = (value if isinstance(value, list) else [value] for value in values)
        setattr(namespace, self.dest, [item for items in lists for item in items])


class Ignore(argparse.Action):
    """Notes a flag of an earlier version, which is answered by one line that says why: `const`."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001, D102
        parser.ignored[option_string] = self.const


# --- flags, and what they need ---------------------------------------------------------------


class Need(NamedTuple):
    """What a flag needs: in words, and whether it is there.

    Functions are given the flags, and what else is known of the run, in one namespace.
    """

    words: str | Callable[[argparse.Namespace], str]
    is_met: Callable[[argparse.Namespace], object]


def read_need(text: str) -> Need:
    """Return the need that a text says.

    It is "--flag", "--flag VALUE or VALUE", "VALUE or VALUE among --flag", "no --flag" or "leave
    out --flag"; an explanation may stand before or after it, behind a colon.
    """
    [rule] = [part for part in text.split(": ") if "--" in part]
    words = rule.removeprefix("no ").removeprefix("leave out ").split()
    [flag] = [word.removeprefix("--") for word in words if word.startswith("--")]
    values = {word for word in words if not word.startswith("--")} - {"or", "among"}
    should_be = rule.startswith(("--", *values))

    def is_met(run: argparse.Namespace) -> bool:
        value = getattr(run, flag)
        chosen = set(value if isinstance(value, list) else [value])
        is_there = bool(chosen & values) if values else value is not None and value is not False
        return is_there == should_be

    return Need(text, is_met)


Needs = Need | str | list[Need | str] | None


@dataclass(frozen=True)
class Flag:
    """A flag of a script.

    Attributes:
        name: without dashes; the value is the attribute of that name.
        kind: an argparse type; or names, one of which is given in upper or lower case; or bool, for
            a switch that is given without a value, as --no-… where the default is True.
        metavar: what stands for the value in --help: its unit or its syntax. N unless given.
        needs: where one of these is not met the flag is ignored with a warning, see
            `warn_unused_flags`. Each is a Need, or a text that `read_need` reads.
        requires: where one of these is not met the program ends, see `refuse_flags`.
        also: another spelling.
        was: an old spelling, which --help does not show.
        ignored: why a flag of an earlier version does nothing; it is hidden and has no value.
        nargs, const: as `add_argument` takes them.
    """

    name: str
    kind: Callable[[str], Any] | Iterable[str] = str
    default: Any = None
    help: str | Callable[[], str] = ""
    metavar: str | None = None
    needs: Needs = None
    requires: Needs = None
    also: str = ""
    was: str = ""
    ignored: str = ""
    nargs: str | None = None
    const: Any = None
    is_positional: bool = False

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add the flag to a group of a parser."""
        if self.ignored:
            options = {"action": Ignore, "nargs": 0 if self.kind is bool else None}
            options |= {"const": self.ignored, "default": argparse.SUPPRESS}
            opposite = [f"--no-{self.name}"] if self.kind is bool else []
            group.add_argument(f"--{self.name}", *opposite, help=argparse.SUPPRESS, **options)
            return
        if self.kind is bool:
            options = {"action": argparse.BooleanOptionalAction if self.default else "store_true"}
        else:
            is_type = callable(self.kind)
            parse = self.kind if is_type else choice_ignoring_case(self.kind)
            shown = "N" if is_type else "{" + ",".join(self.kind) + "}"
            metavar = self.metavar or (None if self.kind is str else shown)
            options = {"type": parse, "metavar": metavar, "nargs": self.nargs}
            options |= {"const": self.const, "action": StoreFlat if self.nargs == "+" else "store"}
        spellings = [f"--{name}" for name in (self.name, self.also) if name]
        names = [self.name] if self.is_positional else spellings
        text = self.help() if callable(self.help) else self.help
        group.add_argument(*names, help=text, default=self.default, **options)
        if self.was:  # the first spelling has the default
            options |= {"default": None, "dest": self.name, "help": argparse.SUPPRESS}
            group.add_argument(f"--{self.was}", **options)


def switch(name: str, help: str, needs: Needs = None, default: bool = False, **more: Any) -> Flag:
    """Return a flag that is given without a value."""
    return Flag(name, bool, default, help, needs=needs, **more)


def unmet_need(needs: Needs, run: argparse.Namespace) -> str | None:
    """Return the first of a flag's needs that is not met, in words; None where all are."""
    for need in needs if isinstance(needs, list) else [needs]:
        words, is_met = read_need(need) if isinstance(need, str) else need
        if not is_met(run):
            return words if isinstance(words, str) else words(run)
    return None


def warn_unused_flags(
    parser: Parser, args: argparse.Namespace, flags: Iterable[Flag], **facts: Any
) -> None:
    """Print one warning line for those flags that have no effect, and set them to their defaults.

    `facts` are what a Need is told besides the flags. A flag with its default value is not
    mentioned: loops and sweeps give every flag every time.
    """
    run = argparse.Namespace(**{**vars(args), **facts}, explicit_flags=parser.explicit_flags)
    unused = {}
    for flag in flags:
        is_changed = flag.needs and getattr(args, flag.name) != parser.get_default(flag.name)
        if is_changed and (need := unmet_need(flag.needs, run)):
            given = f"--no-{flag.name}" if flag.default is True else f"--{flag.name}"
            unused[flag.name] = f"{given} (needs {need})"
    for name in unused:
        setattr(args, name, parser.get_default(name))
        parser.explicit_flags.discard(name)
    if unused and distributed.get_rank() == 0:
        words = ", ".join(unused.values())
        print(f"{parser.prog}: ignored, without effect: {words}", file=sys.stderr)


def refuse_flags(
    parser: Parser, args: argparse.Namespace, flags: Iterable[Flag], **facts: Any
) -> None:
    """End the program where one of those flags is given without what it requires."""
    run = argparse.Namespace(**{**vars(args), **facts}, explicit_flags=parser.explicit_flags)
    for flag in flags:
        is_given = flag.requires and flag.name in parser.explicit_flags
        if is_given and (need := unmet_need(flag.requires, run)):
            is_against = need.startswith("no --")
            how = f"does not go with {need[3:]}" if is_against else f"needs {need}"
            parser.error(f"--{flag.name} {how}")
