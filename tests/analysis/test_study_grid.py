"""A study of other variants, of several networks, and how long it would take."""

import json
from pathlib import Path

import pytest
from test_study import draw_figures, main, scripts  # noqa: F401 (a fixture)

import study
import train
from analysis.study import figures as study_figures
from analysis.study.estimate import measure_epoch_seconds
from analysis.study.grid import lambda_text
from engine.system.errors import FileError

GRID = """
training = "--lr 0.1 --milestones {first},{last}"
[variants.control]
flags = "--regularizer none"
[variants.noise]
flags = "--regularizer StepNoise"
lmbdas = [1, 0.01]
cost = 2
[quantizations.tuning]
flags = "--bits 4 --schemes uniform"
seconds = 1
[quantizations.weights]
flags = "--bits 4 2 --schemes uniform"
seconds = 1
full_precision = true
[quantizations.channel]
flags = "--bits 4 2 --schemes uniform --per_channel"
seconds = 1
names = { uniform = "uniform per channel" }
"""
MORE_WEIGHTS = """
[quantizations.more_weights]
flags = "--bits 8 --schemes uniform"
seconds = 1
"""
SECOND = '[variants.second]\nflags = ""\n'
THIRD = '[variants.third]\nflags = ""\nlambda_from = "noise"\n'


def test_jobs_of_two_quantizations_do_not_share_a_folder(tmp_path):
    path = tmp_path / "grid.toml"
    grid = GRID.replace("variants.noise", "variants.control_more")
    path.write_text(grid.replace("lmbdas = [1, 0.01]", "") + MORE_WEIGHTS)
    with pytest.raises(FileError, match="have the same files, control_more_weights/: rename one"):
        study.read_grid(str(path))


@pytest.mark.parametrize("lmbda", [0.1, 1e-5, 0.00015, 5.0, 20, 0.12345678, 0.1000001, 1e7])
def test_lambda_is_written_with_all_its_digits(lmbda):
    assert float(lambda_text(lmbda)) == lmbda
    is_short = float(f"{lmbda:g}") == lmbda
    assert (lambda_text(lmbda) == f"{lmbda:g}") == is_short


def test_the_grid_of_a_file_is_run_for_every_network(scripts, capsys):  # noqa: F811
    tuning = '\n[tuning]\n"resnet20@0.50" = "--bits 3 --schemes uniform"\n'
    Path("grid.toml").write_text(GRID + tuning)
    flags = ["--grid", "grid.toml", "--seeds", "0"]
    assert main(*flags, "--models", "ConvNet", "ResNet20@0.5", "ConvNet") == 0
    trained = scripts()
    for network in ("ConvNet", "ResNet20@0.5"):
        page = Path("out", network, "tables.md").read_text(encoding="utf-8")
        assert "## uniform per channel\n" in page
        command = "--model ConvNet" if network == "ConvNet" else "--model ResNet20 --width 0.5"
        assert command in page and f"out/{network}/tuning/noise_0.01" in trained
        results = json.loads(Path(f"out/{network}/tuning/control_tuning/results.json").read_text())
        assert results["rows"][1]["bits"] == (4 if network == "ConvNet" else 3)
    lines = Path("out/networks.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[:4] for line in lines[4:8]] == [
        ["| ConvNet", "control", "", "1"],
        ["| ConvNet", "noise", "0.01", "1"],
        ["| ResNet20@0.5", "control", "", "1"],
        ["| ResNet20@0.5", "noise", "0.01", "1"],
    ]
    capsys.readouterr()
    assert main("--seeds", "0") == 0 and scripts() == trained  # all networks, nothing again
    assert main("--models", "MobileNetV2@0.25", "--only", "control", "--seeds", "0") == 0
    assert scripts()[-1] == "out/MobileNetV2@0.25/seed0/control"
    saved = json.loads(Path("out/study.json").read_text())["models"]
    assert saved == "ConvNet ResNet20@0.5 MobileNetV2@0.25"
    page = Path("out/networks.md").read_text(encoding="utf-8").splitlines()
    assert page[:8] == lines[:8] and page[8].startswith("| MobileNetV2@0.25 | control |")
    Path("out/networks.md").unlink()
    study.main(["--out", "out", "--tables", "--models", "ConvNet", "ResNet20@0.5"])
    assert Path("out/networks.md").read_text(encoding="utf-8").splitlines() == page
    Path("grid.toml").write_text(GRID + tuning.replace("3", "2"))
    capsys.readouterr()
    assert main("--plan", "--seeds", "0") == 2
    again = "--models ResNet20@0.5 --forget tuning/control_tuning/results.json "
    assert again in capsys.readouterr().err  # and nothing of the other networks


def test_a_failed_candidate_is_forgotten_in_one_network(scripts, monkeypatch, capsys):  # noqa: F811
    Path("grid.toml").write_text(GRID)
    monkeypatch.setenv("FAILS", "out/ResNet20/tuning/noise_1")
    assert main("--grid", "grid.toml", "--models", "ConvNet", "ResNet20", "--seeds", "0") == 1
    again = "noise_choice.json with --models ResNet20 --forget tuning/noise_choice.json\n"
    assert again in capsys.readouterr().out


def test_the_grid_of_the_manual_has_figures(scripts, monkeypatch):  # noqa: F811
    manual = Path(study.__file__).with_name("docs") / "studies.md"
    grid = manual.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    Path("grid.toml").write_text(grid.replace("MyNorm", "RangeNorm"), encoding="utf-8")
    monkeypatch.setattr(study_figures, "draw_figures", draw_figures)
    assert main("--grid", "grid.toml", "--seeds", "0") == 0  # no weights alone: no curves
    drawn = {path.name for path in Path("out").glob("*.png")}
    assert drawn == {"overview.png", "tracked.png", "choice.png"}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[variants.control]", "[variants.contrl]", "no variant 'control'"),
        ("[quantizations.tuning]", "[quantizations.tune]", "no quantization 'tuning'"),
        ("full_precision = true", "", "full_precision"),
        ("cost = 2", "price = 2", "variants.noise has 'price': it may have flags, lmbdas, cost"),
        ("cost = 2", 'cost = "much"', "variants.noise: cost cannot be 'much'"),
        ("lmbdas = [1, 0.01]", 'lmbdas = ["a"]', "could not convert"),
        ("StepNoise", "StepNoise {much}", "much"),
        ("seconds = 1", "", "quantizations.tuning has no seconds"),
        ("training = ", "trainings = ", "the file has 'trainings'"),
        ("cost = 2", 'lambda_from = "other"', "no variant 'other'"),
        ("cost = 2", "cost = ", "Invalid value"),
        ("StepNoise", "StepNose", "variants.noise: unknown regularizer 'StepNose'"),
        ("StepNoise", "StepNoise --seed 3", "variants.noise: --seed is set by the study"),
        ("StepNoise", "StepNoise --lmbda 3", "variants.noise: --lmbda is set by the study"),
        ("--lr 0.1", "--lr 0.1 --fold_bn", "training: --fold_bn is set by the study"),
        ("--lr 0.1", "--lr much", "training: argument --lr: 'much'"),
        ("--lr 0.1", "--lr 0.1 --qat_bits 4", "variants.noise: --qat_bits"),
        ("StepNoise", "StepNoise --width 0.5", "variants.noise: --width is set by the study"),
        ("uniform --per", "unifrom --per", "quantizations.channel: argument --schemes"),
        ("uniform --per", "uniform --holdout 9 --per", "quantizations.channel: --holdout is set"),
        ("uniform --per", "uniform --act_bits 4 --precision bf16 --per", "channel: --act_bits"),
        ("uniform --per", "uniform --bits {bits} --per", "quantizations.channel: {bits}"),
        ("--bits 4 --schemes", "--bits 4 5 --schemes", "quantizations.tuning: λ is chosen by one"),
        ("[1, 0.01]", "[1, -0.01]", "variants.noise: λ and cost are finite and not negative"),
        ("[1, 0.01]", "[nan]", "not nan"),
        ("cost = 2", "cost = -2", "not -2"),
        ("cost = 2", 'lambda_from = "control"', "variants.noise: it has lmbdas and lambda_from"),
        ("cost = 2", f'{SECOND}lambda_from = "control"', "lambda_from: 'control' has no lmbdas"),
        ("cost = 2", f'{SECOND}lambda_from = "third"\n{THIRD}', "'third' has no lmbdas of its own"),
        ("[1, 0.01]", "[1, 1.0]", "'noise' with λ = 1 and variant 'noise' with λ = 1 have the"),
        ("variants.noise", "variants.trunk", "variants share and variant 'trunk'"),
        ("variants.noise", "variants.Control", "variant 'control' and variant 'Control' have"),
        ("variants.noise", "variants.'a/b'", "'a/b' is not the name of a file"),
        ("cost = 2", '[variants."noise_0.01"]\nflags = ""', "the same files, noise_0.01: rename"),
        ("cost = 2", '[variants.noise_choice]\nflags = ""', "the choice of λ of 'noise'"),
        ("cost = 2", '[variants.noise_1_tuning]\nflags = ""', ""),  # a file beside a folder
        ("quantizations.channel", "quantizations.1_channel", ""),
        ('names = { uniform = "uniform per channel" }', "", "both have 'uniform' with 2 bits"),
        ('= "uniform per channel"', '= "uniform"', "weights and quantizations.channel both have"),
        ("cost = 2", '[tuning]\nNoNet = ""', "tuning: unknown value 'NoNet': choose ConvNet"),
        ("cost = 2", '[tuning]\n"ResNet20@0" = ""', "tuning: '0' is not a finite number"),
        (
            "cost = 2",
            '[tuning]\nResNet20 = ""\nresnet20 = ""',
            "tuning: one network is there twice",
        ),
        ("cost = 2", "[tuning]\nResNet20 = 4", "tuning cannot be {'ResNet20': 4}"),
        ('= "uniform per channel"', '= ["u"]', "names cannot be {'uniform': ['u']}"),
        ('uniform = "u', 'unifrom = "u', "names: 'unifrom' is none of its schemes, uniform"),
        (
            ' --per_channel"\nseconds = 1\nnames = { uniform',
            ' dorefa --per_channel"\nseconds = 1\nnames = { uniform = "x", dorefa = "x" } #',
            "channel: names: uniform and dorefa are both called 'x'",
        ),
    ],
)
def test_a_grid_that_is_none_is_named_in_a_line(old, new, reason, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace(old, new, 1))
    if not reason:
        study.read_grid(str(path))
        return
    with pytest.raises(FileError) as refused:
        study.read_grid(str(path))
    message = str(refused.value)
    assert reason in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--models", "ResNet20@0"], "'0'"),
        (["--models", "torchvision:resnet18@2"], "has no width"),
        (["--models", "NoNet"], "NoNet"),
        (["--grid", "none.toml"], "none.toml"),
    ],
)
def test_networks_and_grids_that_are_none(flags, reason, scripts, capsys):  # noqa: F811
    assert main(*flags) in (1, 2)
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and reason in output and not scripts()


@pytest.mark.slow
def test_a_study_of_one_network_gets_no_others(scripts, capsys):  # noqa: F811
    assert main("--only", "control", "--seeds", "0") == 0
    assert main("--models", "ResNet20") == 2
    assert "one network alone: choose another --out" in capsys.readouterr().err
    assert main("--grid", "missing.toml") in (1, 2)
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "missing.toml" in output and "choose" not in output


@pytest.mark.slow
def test_an_epoch_is_estimated_from_steps_of_the_network():
    def seconds(*flags):
        args = train.make_parser().parse_args([*flags, "--no-compile", "--batch_size", "8"])
        return measure_epoch_seconds(args, n_images=80)

    assert 0 < seconds("--model", "ResNet20", "--width", "0.25") < seconds("--model", "ConvNet")
