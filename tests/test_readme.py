import csv
import importlib
import re
import shlex
from pathlib import Path

import pytest

import study

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
    module.make_parser().parse_args(words[first + 1 :])


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


ANSWER = README[README.index("## The answer") : README.index("## Two commands")]
STUDY = ROOT / "results" / "study"
QUOTED = [line for line in ANSWER.splitlines() if line.startswith("|")]
VARIANTS = [line.split("|")[1].strip() for line in QUOTED[2:]]


def test_the_table_of_the_answer_is_the_first_of_the_study():
    tables = (STUDY / "tables.md").read_text(encoding="utf-8")
    assert "control" in VARIANTS and f"\n\n{chr(10).join(QUOTED)}\n\n" in tables


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(ANSWER, id="README.md"),
        pytest.param(
            (STUDY / "README.md").read_text(encoding="utf-8"), id="results/study/README.md"
        ),
    ],
)
def test_every_interval_that_is_quoted_is_of_the_study(text):
    known = set()
    for name in ("differences.csv", "losses.csv"):
        with open(STUDY / name, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                mean, low = 100 * float(row["mean"]), 100 * float(row["low"])
                known |= {(f"{mean:z.{n}f}", f"{mean - low:.{n}f}") for n in (0, 1, 2)}
    prose = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    quoted = re.findall(r"([−]?[\d.]+)\s±\s([\d.]*\d)", prose)
    assert len(quoted) > 3
    unknown = [pair for pair in quoted if (pair[0].replace("−", "-"), pair[1]) not in known]
    assert not unknown


def test_the_answer_counts_its_variants_and_has_a_command_for_each():
    [(n, of)] = re.findall(r"(all|\d+)\sof\sthe\sstudy's\s(\d+)\svariants", ANSWER)
    assert (int(of if n == "all" else n), int(of)) == (len(VARIANTS), len(study.VARIANTS))
    again = [
        shlex.split(command)[2:]
        for command in commands("python study.py")
        if "study_again" in command
    ]
    args = map(study.make_parser().parse_args, again)
    assert {name for of in args for name in of.only} == set(VARIANTS)


def correlations(title):
    tables = (STUDY / "tables.md").read_text(encoding="utf-8")
    lines = tables[tables.index(f"\n{title}") :].split("\n\n")[1].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = table[0].index("uniform 3")
    return {row[0]: row[column].split()[0].replace("-", "−").lstrip("+") for row in table[2:]}


def test_correlations_that_are_quoted_are_those_of_the_study():
    between = correlations("Between variants")
    quoted = re.findall(r"(−?0\.\d\d)\sfor\s(\w+)", ANSWER)
    assert len(quoted) > 3 and all(between[name] == rho for rho, name in quoted)
    page = " ".join((STUDY / "README.md").read_text(encoding="utf-8").split())
    for title in ("Between variants", "Between seeds"):
        [text] = re.findall(rf"\*\*{title}.*?\. ", page)
        quoted = re.findall(r"(squared error|\w+) (−?0\.\d\d)", text)
        assert len(quoted) > 3 and all(correlations(title)[name] == rho for name, rho in quoted)


def test_the_regularizer_of_the_readme_works(monkeypatch):
    import torch

    import regularizers

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [block] = [b for b in blocks if "class MyNorm" in b]
    monkeypatch.setattr(regularizers, "REGULARIZERS", dict(regularizers.REGULARIZERS))
    exec(block, vars(regularizers).copy())
    made = regularizers.make_regularizer("mynorm", 2.0)
    assert made([torch.ones(16)]).item() == pytest.approx(4.0)
