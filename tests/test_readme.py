import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(pattern):
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if re.match(pattern, line)]


@pytest.mark.parametrize("command", commands("python |torchrun "))
def test_every_command_of_the_readme_parses(command):
    words = shlex.split(command, comments=True)
    first = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[first].removesuffix(".py"))
    module.make_parser().parse_args(words[first + 1:])


def test_every_flag_of_the_sweep_parses():
    yaml = pytest.importorskip("yaml")  # comes with wandb
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    parser = importlib.import_module(sweep["program"].removesuffix(".py")).make_parser()
    longest = max(len(of.get("values", [0])) for of in sweep["parameters"].values())
    for i in range(longest):
        flags = []
        for name, of in sweep["parameters"].items():
            values = of.get("values", [of.get("value")])
            value = values[i % len(values)]
            flags += [f"--{name}"] if value is True else [f"--{name}={value}"]
        args = vars(parser.parse_args(flags))
        assert sweep["parameters"].keys() <= args.keys()


def test_make_knows_every_target_of_the_readme():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = {shlex.split(command, comments=True)[1] for command in commands("make ")}
    assert wanted and wanted <= set(targets)


def test_every_file_that_the_readme_names_exists_and_none_is_left_out():
    named = set(re.findall(r"`(\w+\.py)`", README))
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_the_numbers_of_the_study_are_those_of_its_tables():
    answer = README[README.index("## The answer"):README.index("## Two commands")]
    (where,) = set(re.findall(r"`(results/[\w.]+/tables.md)`", answer))
    tables = (ROOT / where).read_text(encoding="utf-8").splitlines()
    quoted = [line for line in answer.splitlines() if line.startswith("|")]
    assert len(quoted) > 3 and all(line in tables for line in quoted)


def test_the_regularizer_of_the_readme_works(monkeypatch):
    import torch

    import regularizers

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [block] = [b for b in blocks if "class MyNorm" in b]
    monkeypatch.setattr(regularizers, "REGULARIZERS", dict(regularizers.REGULARIZERS))
    exec(block, vars(regularizers).copy())
    made = regularizers.make_regularizer("mynorm", 2.0)
    assert made([torch.ones(16)]).item() == pytest.approx(4.0)
