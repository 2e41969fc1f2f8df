"""Every flag of every script, out of the tables that parsers and checks are made from."""

import argparse
import inspect
from types import SimpleNamespace
from typing import Annotated

import pytest

import combined_protocol
import flags
import quant_inference
import study
import train
from engine.system import cli
from engine.system.cli import Flag, Parser, read_need, refuse_flags, switch, warn_unused_flags
from regularizers import Regularizer, make_regularizer

SCRIPTS = {
    "train": train,
    "combined_protocol": combined_protocol,
    "quant_inference": quant_inference,
    "study": study,
}
ALL = [
    pytest.param(name, flag, id=f"{name}-{flag.name}")
    for name, script in SCRIPTS.items()
    for flag in script.make_parser().flags
]
# What makes a flag useless, where that takes more than leaving all others at their defaults.
USELESS_BESIDE = {
    ("combined_protocol", flag.name): ["--phases", "0:none"]
    for flag in flags.PHASES
    if isinstance(flag, Flag)
} | {
    ("quant_inference", "recalibrate_bn_images"): ["--fold_bn"],
    ("quant_inference", "biases"): ["--fold_bn"],
    ("quant_inference", "absolute_weights"): ["--no_plots"],
    ("quant_inference", "layers"): ["--no_plots"],
    ("quant_inference", "approximate"): ["--distribution", "search"],
    ("quant_inference", "distribution"): ["--schemes", "uniform"],
    ("quant_inference", "overlapping"): ["--schemes", "uniform"],
    ("quant_inference", "step_size"): ["--schemes", "pwlq"],
    ("quant_inference", "trials"): ["--schemes", "uniform"],
    ("quant_inference", "rounding"): ["--schemes", "pwlq"],
    ("combined_protocol", "gamma"): ["--scheduler", "none"],
    ("combined_protocol", "milestones"): ["--scheduler", "none"],
    ("train", "qat_bits"): ["--qat_from", "1000"],
    ("combined_protocol", "qat_bits"): ["--qat_from", "1000"],
    ("study", "only"): ["--tables"],
    ("study", "seeds"): ["--tables"],
    ("study", "jobs"): ["--tables"],
    ("study", "ray"): ["--tables"],
}
SAMPLES = ("7", "0.5", "1000", "2,8", "L2Grad", "words")  # a value of each kind


def other_value(parser, flag):
    """Words of a command line that give the flag another value than its default."""
    default = parser.get_default(flag.name)
    if flag.kind is bool:
        return [f"--no-{flag.name}" if default else f"--{flag.name}"]
    samples = ("1000",) if flag.name == "freeze_bn_from" else SAMPLES
    for text in flag.kind if not callable(flag.kind) else samples:
        parse = flag.kind if callable(flag.kind) else cli.choice_ignoring_case(flag.kind)
        try:
            value = parse(text)
        except argparse.ArgumentTypeError:
            continue
        if value not in (default, [default]) and [value] != default:
            return [f"--{flag.name}", text]
    raise AssertionError(f"no other value of --{flag.name}")


@pytest.mark.parametrize(("script", "flag"), [p for p in ALL if p.values[1].needs])
def test_a_useless_flag_is_named_once_and_ignored(script, flag, capsys):
    parser = SCRIPTS[script].make_parser()
    words = ["x.pt"] if script == "quant_inference" else []
    given = other_value(parser, flag)
    args = parser.parse_args([*words, *given, *USELESS_BESIDE.get((script, flag.name), [])])
    warn_unused_flags(parser, args, [flag], regularizers=[], models=["ConvNet"])
    [line] = capsys.readouterr().err.splitlines()
    assert f"ignored, without effect: {given[0]} (needs " in line
    assert getattr(args, flag.name) == parser.get_default(flag.name)
    assert flag.name not in parser.explicit_flags
    warn_unused_flags(parser, args, [flag], regularizers=[], models=["ConvNet"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("script", "flag"), ALL)
def test_help_says_what_each_flag_is_and_its_default(script, flag):
    parser = SCRIPTS[script].make_parser()
    help_text = " ".join(parser.format_help().split())
    if flag.ignored:
        assert f"--{flag.name}" not in help_text or script == "study"
        return
    text = flag.help() if callable(flag.help) else flag.help
    assert len(text) > 3
    default = parser.get_default(flag.name)
    shown = text % {} if "%%" in text else text
    is_shown = default is not argparse.SUPPRESS and not flag.is_positional
    expected = shown if not is_shown else f"{shown} (default: {default})"
    assert "".join(expected.split()) in "".join(help_text.split())
    assert f"--{flag.was}" not in help_text.split() or not flag.was


@pytest.mark.parametrize("name", ["lr", "help", "dataset", "hold_step"])
def test_an_option_that_is_called_as_a_flag_is_refused_in_one_line(name, registry, capsys):
    class MyNorm(Regularizer):
        def forward(self, weights):
            return 0

    option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, "x"])
    MyNorm.__signature__ = inspect.Signature([option])
    for script in ("train", "combined_protocol"):
        with pytest.raises(SystemExit) as refused:
            SCRIPTS[script].make_parser()
        [line] = capsys.readouterr().err.splitlines()
        assert refused.value.code == 2 and f"MyNorm: an option cannot be called {name}: " in line


def test_no_two_flags_of_a_script_share_a_name():
    for script in SCRIPTS.values():
        names = [flag.name for flag in script.make_parser().flags]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(("script", "flag"), [p for p in ALL if p.values[1].was])
def test_the_old_spelling_of_each_renamed_flag_works(script, flag):
    parser = SCRIPTS[script].make_parser()
    words = ["x.pt"] if script == "quant_inference" else []
    [new, *value] = other_value(parser, flag)
    by_new, by_old = (parser.parse_args([*words, f"--{n}", *value]) for n in (new[2:], flag.was))
    assert vars(by_new) == vars(by_old) and parser.explicit_flags == {flag.name}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (train, ["--cuda_graph"]),
        (combined_protocol, ["--no-cuda_graph"]),
        (quant_inference, ["x.pt", "--lr", "0.1"]),
        (quant_inference, ["x.pt", "--n_epochs", "3"]),
    ],
)
def test_flags_of_earlier_versions_are_answered_by_one_line(script, words, capsys):
    args = script.make_parser().parse_args(words)
    [line] = capsys.readouterr().err.splitlines()
    [flag] = [word for word in words if word.startswith("--")]
    assert f"{flag} is ignored: " in line
    assert vars(args) == vars(script.make_parser().parse_args(["x.pt"] if "x.pt" in words else []))


@pytest.mark.parametrize(
    ("text", "met", "unmet"),
    [
        ("--watch", {"watch": True}, {"watch": False}),
        ("--ema", {"ema": 0.0}, {"ema": None}),
        ("no --phases", {"phases": None}, {"phases": ["0:none"]}),
        ("--kind one or two", {"kind": "two"}, {"kind": "three"}),
        ("one among --kinds", {"kinds": ["two", "one"]}, {"kinds": ["two"]}),
        ("as it was: leave out --fold", {"fold": False}, {"fold": True}),
        ("no --ema: it has none", {"ema": None}, {"ema": 0.5}),
    ],
)
def test_needs_are_read_from_their_words(text, met, unmet):
    need = read_need(text)
    assert need.words == text
    assert need.is_met(SimpleNamespace(**met)) and not need.is_met(SimpleNamespace(**unmet))


def test_a_flag_is_a_line_in_a_table(capsys):
    table = [
        "a title",
        switch("fast", "do it fast"),
        Flag("speed", cli.bounded_number(float, above=0), 1.5, "speed", "KM/H", needs="--fast"),
        Flag("gear", ("First", "Second"), "First", "gear", requires="--speed 2"),
    ]
    parser = flags.make_parser("Drive.", table)
    assert "--speed KM/H" in parser.format_help() and "(default: 1.5)" in parser.format_help()
    args = parser.parse_args(["--speed", "2", "--gear", "second"])
    assert (args.speed, args.gear) == (2.0, "Second")
    warn_unused_flags(parser, args, parser.flags)
    assert args.speed == 1.5 and "--speed (needs --fast)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        refuse_flags(parser, args, parser.flags)
    assert "error: --gear needs --speed 2" in capsys.readouterr().err
    args = parser.parse_args(["--fast", "--speed", "3"])
    warn_unused_flags(parser, args, parser.flags)
    refuse_flags(parser, args, parser.flags)
    assert args.speed == 3.0 and capsys.readouterr().err == ""


def test_a_refusal_says_what_a_flag_does_not_go_with(capsys):
    parser = train.make_parser()
    args = parser.parse_args(["--qat_bits", "4", "--ema", "0.9"])
    with pytest.raises(SystemExit) as refused:
        refuse_flags(parser, args, parser.flags, regularizers=[make_regularizer("L2Grad", 1.0)])
    assert refused.value.code == 2
    assert "error: --qat_bits does not go with --ema: averaged" in capsys.readouterr().err


def test_auto_is_the_device_that_there_is(monkeypatch):
    from engine.system import hardware

    for device in ("cpu", "cuda"):
        monkeypatch.setattr(hardware, "default_device", lambda device=device: device)
        parser = Parser("")
        parser.add_flags(flags.DATA)
        assert parser.parse_args([]).device == device
        assert parser.parse_args(["--device", "AUTO"]).device == device
        assert parser.parse_args(["--device", "cpu"]).device == "cpu"
