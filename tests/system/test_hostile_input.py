"""Mutated files and command lines: some in `make test`, thousands, counted, in `make faults`."""

import argparse
import gzip
import itertools
import os
import random
import re
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import tiny_scripts
import torch
from image_folder import write_image_folder
from mutations import BYTES, JSON, MUTATIONS, cut, flip, splice
from tiny_runs import RUNS, SIZES, result, run_here

import quant_inference
import study
import train
from analysis.study import figures as study_figures
from engine.deploy import runtimes
from engine.training import checkpoints

ROOT = Path(__file__).parents[2]


class NoTracker:
    run = None

    def __init__(self, *_):
        pass

    def log(self, values):
        pass

    summarize = log_weights = fail = log

    def close(self):
        pass


@pytest.mark.filterwarnings("ignore")  # torch's, of the strangest files
@pytest.mark.parametrize("size", SIZES)
def test_mutated_checkpoints_are_refused_or_run(
    size, launcher, uninterrupted, tmp_path, monkeypatch, alarm
):
    """In this process: read, compare with the flags, restore, train to the end."""
    monkeypatch.chdir(tmp_path)
    script, argv = RUNS[0]
    assert (
        launcher.run(script, argv, tmp_path, partial(tiny_scripts.break_write, 50, "die"))
        == -signal.SIGKILL
    )
    argv = [*argv, "--checkpoint_minutes", "9"]
    os.replace("r.ckpt.previous", "r.ckpt")
    raw, tree = Path("r.ckpt").read_bytes(), checkpoints.load_checkpoint(Path("r.ckpt"))
    monkeypatch.setattr(train, "describe_environment", dict)
    monkeypatch.setattr(train, "WandbLogger", NoTracker)
    n, outcomes = {"short": 20, "long": 6000}[size], Counter()
    for seed in range(n):
        chance = random.Random(seed)
        mutate = chance.choice(MUTATIONS)
        Path("r.ckpt").write_bytes(mutate(chance, raw, tree))
        Path("r.ckpt.previous").unlink(missing_ok=True)
        alarm()
        code, error = run_here(script, [*argv, "--resume", *["--override"] * (seed % 2)])
        lines = error.splitlines()
        assert code in (0, 1) and "Traceback" not in error, f"{seed} {mutate}\n{error}"
        assert sum("error:" in line for line in lines) == code, (seed, mutate, lines)
        assert not Path("trace").exists(), (seed, mutate)
        if mutate in (flip, cut, splice) and code == 0:  # in bytes that mean nothing
            assert result(tmp_path) == uninterrupted[0][0], (seed, mutate)
        outcomes[f"{mutate.__name__} {('accepted', 'refused')[code]}"] += 1
    print(
        f"\nmutated checkpoints: {n}, 0 crashes, 0 hangs, 0 times code was run; "
        f"{dict(sorted(outcomes.items()))}"
    )


# --- command lines ---------------------------------------------------------------------------

VALUES = [
    "",
    "0",
    "1",
    "-1",
    "2.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    str(2**63),
    "9" * 400,
    "9" * 5000,
    "٣",
    "x",
    "r",
    "/",
    "..",
    "a/b",
    "x" * 300,
    "é\n",
    "\udcff",
    "none",
    "L2Grad",
    "l1grad",
    "L0Grad",
    "L-1Grad",
    "L" + "9" * 400 + "Grad",
    "Variance",
    "VarianceNorm",
    "cpu",
    "cuda:99",
    "meta",
    "cpu:7",
    "0:none",
    "1:L2Grad=1",
    "1:=",
    "0:L1Grad@weights=1+VarianceNorm=1",
    "3:VarianceNorm=-1",
    "--",
    "-",
    "=",
    "@",
    "%s",
    "%(prog)s",
    "{}",
    "\x1b[2J",
    "CIFAR10",
    "synthetic",
    "bf16",
    "FP32",
    "CE",
    "tiny",
]
STUBBED = {  # script: what does the work once flags are read, and returns that it went well
    "train.py": (train, "run", None),
    "combined_protocol.py": (train, "run", None),
    "quant_inference.py": (quant_inference, "run", True),
    "study.py": (study, "run_mode", 0),
}
PARSERS = {name: tiny_scripts.MODULES[name].make_parser() for name in STUBBED}


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    """A folder with r.pt and what --page needs, and scripts that read their flags and end."""
    monkeypatch.chdir(tmp_path)
    Path("node_modules", runtimes.WEB_PACKAGE).mkdir(parents=True)
    Path("r.pt").touch()
    Path("r.ckpt").touch()
    for module, function, returned in STUBBED.values():
        monkeypatch.setattr(module, function, lambda *_, returned=returned: returned)


def assert_one_line(code, error, place):
    """A command line is accepted, or refused in one line, after warnings of what is ignored."""
    assert code in (0, 1, 2) and "Traceback" not in error, (place, error)
    errors = [line for line in error.splitlines() if "error:" in line]
    assert len(errors) == bool(code), (place, error)
    assert all(": " in line for line in error.splitlines()), (place, error)  # no more of a message


@pytest.mark.parametrize("size", SIZES)
def test_mutated_command_lines_are_refused_in_one_line(size, no_work, alarm):
    options = {name: list(parser._option_string_actions) for name, parser in PARSERS.items()}
    n, codes = {"short": 300, "long": 10_000}[size], Counter()
    for seed in range(n):
        chance = random.Random(seed)
        script = chance.choice(list(options))
        argv = ["r.pt"] * (script == "quant_inference.py" and chance.random() < 0.9)
        for _ in range(chance.randrange(1, 6)):
            flag = chance.choice(options[script])
            if chance.random() < 0.1:
                flag = flag[: chance.randrange(len(flag))] + chance.choice("-=x é")
            argv += [flag] + chance.choices(VALUES, k=chance.choice([0, 1, 1, 1, 1, 2]))
        alarm()
        code, error = run_here(script, argv)
        assert_one_line(code, error, (seed, argv))
        codes[code] += 1
    print(f"\nmutated command lines: {n}, 0 crashes, 0 hangs; exit codes {dict(codes)}")


def example(flag):
    """Return a valid value of a flag, as words."""
    if flag.kind is bool:
        return []
    if not callable(flag.kind):
        return [str(list(flag.kind)[-1])]
    for value in (*EXAMPLES.get(flag.name, "").split(), "1", "2", "0.5", "x"):
        try:
            flag.kind(value)
        except (argparse.ArgumentTypeError, ValueError):
            continue
        return [value]
    raise AssertionError(f"EXAMPLES needs a value of --{flag.name}")


EXAMPLES = {
    "model": "TinyFused", "models": "ResNet20", "device": "cpu", "milestones": "1,2",
    "qat_bits": "4,4", "bits": "4", "act_bits": "4", "regularizer": "L2Grad", "phases": "0:none",
    "init_weights": "r.pt", "init_from": "r.ckpt", "verify": "net.onnx", "export": "net.onnx",
    "page": "net.html", "save_integers": "net.safetensors", "steps_from": "r.json",
    "track": "L2Grad", "only": "control", "wandb_tags": "a", "n_epochs": "6", "output": "out",
    "recalibrate_bn_images": "8", "budget_bits": "4", "image_size": "8", "grid": "grid.toml",
    "first_gradient_epoch": "95", "save_quantized": "q.pt",
}  # fmt: skip


ONE = "--bits 4 --act_bits 4 --schemes uniform --fold_bn".split()
COMPANIONS = dict.fromkeys(("export", "verify", "page", "save_integers", "save_quantized"), ONE)
COMPANIONS["output_bias_correction"] = ["--fold_bn"]


def words_of(flag, script):
    """Return a flag with a valid value, and with what it cannot be without."""
    if flag.name in ("data_flags", "train_flags"):
        return [f"--{flag.name}=--seed=1"]
    words = [f"--{flag.name}", *example(flag), *COMPANIONS.get(flag.name, ())]
    if (script, flag.name) == ("combined_protocol.py", "qat_bits"):
        words += ["--phases", "0:none"]  # by default there are penalties of gradients
    return words


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("script", STUBBED)
def test_any_two_valid_flags_are_accepted_or_refused_in_one_line(script, size, no_work, alarm):
    flags = [flag for flag in PARSERS[script].flags if not (flag.ignored or flag.is_positional)]
    always = ["r.pt"] if script == "quant_inference.py" else []
    words = [words_of(flag, script) for flag in flags]
    for each in words:  # no flag is refused alone: a pair is about two
        code, error = run_here(script, [*always, *each])
        assert code == 0, (each, error)
    pairs = [*itertools.combinations(words, 2)]
    pairs = pairs[:: {"short": 50, "long": 1}[size]]
    codes = Counter()
    for pair in pairs:
        alarm()
        argv = [*always, *pair[0], *pair[1]]
        code, error = run_here(script, argv)
        assert_one_line(code, error, argv)
        codes[code] += 1
    print(f"\n{script}: {len(pairs)} pairs of flags, 0 crashes; exit codes {dict(codes)}")


# --- files of networks, records, images and studies -------------------------------------------

TINY = ["--dataset", "Tiny", "--model", "TinyFused", "--device", "cpu"]
QUANTIZE = ["--bits", "4", "--schemes", "uniform", "--no_plots", "--output", "out"]
INTEGERS = ["--fold_bn", "--act_bits", "4", "--calibration_images", "8"]
TRAIN = [*TINY, "--no-compile", "--n_epochs", "1", "--train_subset", "32", "--run_name", "q"]
IMAGES = ["--dataset", "ImageFolder", "--data_dir", "images", "--image_size", "8"]
TABLES = ["--out", "study", "--tables"]
# What is read: the file, how it is mutated, and the command that reads it.
READERS = {
    "weights": ("r.pt", MUTATIONS, "quant_inference.py", ["r.pt", *TINY, *QUANTIZE]),
    "first weights": ("r.pt", MUTATIONS, "train.py", ["--init_weights", "r.pt", *TRAIN]),
    "record": ("r.json", JSON, "quant_inference.py", ["r.pt", *TINY, *QUANTIZE]),
    "steps": (
        "steps.json",
        JSON,
        "quant_inference.py",
        ["r.pt", *TINY, *QUANTIZE, "--steps_from", "steps.json"],
    ),
    "safetensors": (
        "r.safetensors",
        BYTES,
        "quant_inference.py",
        ["r.safetensors", *TINY, *QUANTIZE],
    ),
    "ONNX": (
        "net.onnx",
        BYTES,
        "quant_inference.py",
        ["r.pt", *TINY, *QUANTIZE, *INTEGERS, "--verify", "net.onnx"],
    ),
    "image": (
        "images/val/b/1.png",
        BYTES,
        "quant_inference.py",
        ["r.pt", *IMAGES, "--model", "TinyFused", "--workers", "0", *QUANTIZE, "--device", "cpu"],
    ),
    "study": ("study/study.json", JSON, "study.py", TABLES),
    "records of a study": ("study/records.jsonl.gz", BYTES, "study.py", TABLES),
}


@pytest.fixture
def files(monkeypatch, tmp_path):
    """One valid file of each kind in the current folder, and files that no command may change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "WandbLogger", NoTracker)
    run = [*TINY, "--no-compile", "--n_epochs", "1", "--run_name", "r", "--qat_bits", "4"]
    assert run_here("train.py", run)[0] == 0
    os.replace("r.json", "steps.json")
    assert run_here("train.py", [*run[:-2]])[0] == 0
    safetensors.torch.save_file(torch.load("r.pt", weights_only=True), "r.safetensors")
    command = ["r.pt", *TINY, *QUANTIZE, *INTEGERS, "--export", "net.onnx"]
    assert run_here("quant_inference.py", command)[0] == 0
    write_image_folder("images", "abcdefghij", 2, 2, 8, 8)  # as many classes as Tiny has
    Path("study").mkdir()
    shutil.copy(ROOT / "results" / "study" / "study.json", "study")
    with gzip.open(ROOT / "results" / "study" / "records.jsonl.gz") as lines:
        few = [
            line
            for line in lines
            if line.startswith((b'{"path":"seed0/control', b'{"path":"seed0/trunk'))
        ]
    Path("study", "records.jsonl.gz").write_bytes(gzip.compress(b"".join(few), mtime=0))
    monkeypatch.setattr(study_figures, "draw_figures", lambda *_: None)
    return tmp_path


def peak_gigabytes(reset=False):
    """Return the most memory that this process has had since the last reset; Linux, else 0."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return 0
    if reset:
        clear.write_text("5")  # of the peak alone: `man proc`
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1e6


def contents(folder, names):
    """Return the bytes of the files."""
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.filterwarnings("ignore")  # torch's, of the strangest files
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", READERS)
def test_mutated_files_are_refused_or_read(kind, size, files, alarm):
    name, mutations, script, argv = READERS[kind]
    inputs = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    inputs = {each for each in inputs if not each.startswith("out/")}
    raw = Path(name).read_bytes()
    tree = torch.load(name, weights_only=True) if name.endswith(".pt") else None
    code, error = run_here(script, argv)
    assert code == 0, error
    table = Path("out/results.csv").read_bytes() if kind == "image" else None
    kept = contents(files, inputs - {name, "study/study.json"})
    before = peak_gigabytes(reset=True)
    n, outcomes = {"short": 2, "long": 500}[size], Counter()
    for seed in range(n):
        chance = random.Random(seed)
        mutate = chance.choice(mutations)
        Path(name).write_bytes(mutate(chance, raw, tree))
        alarm()
        code, error = run_here(script, argv)
        assert code in (0, 1, 2) and "Traceback" not in error, f"{seed} {mutate}\n{error}"
        assert not code or "error:" in error, (seed, mutate, error)
        assert not Path("trace").exists(), (seed, mutate)
        if table and not code:  # bytes that mean nothing: the pixels are the same
            assert Path("out/results.csv").read_bytes() == table, (seed, mutate)
        outcomes[f"{mutate.__name__} {'refused' if code else 'read'}"] += 1
    assert contents(files, kept) == kept
    assert peak_gigabytes() < before + 1
    print(f"\n{kind}: {n} mutated files, 0 crashes, 0 hangs; {dict(sorted(outcomes.items()))}")
