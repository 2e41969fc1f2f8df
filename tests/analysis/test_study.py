import csv
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import scipy.stats
from fork_server import launcher

import combined_protocol
import quant_inference
import study
import train
from analysis.study import executors
from analysis.study import figures as study_figures
from analysis.study import jobs as study_jobs
from analysis.study import report as study_report
from analysis.study import results as study_results
from analysis.study import runner as study_runner
from analysis.study import tables as study_tables
from analysis.study.figures import draw_figures
from analysis.study.jobs import Job, next_ready_job, pending
from analysis.study.lambda_choice import Choice, HoldoutAccuracy, select_lambda
from engine.system.io import run_lock
from study import make_parser

# Stand-ins for the scripts: the same flags and files, no training. The "weights" are the settings.
FAKE_TRAINING = """
import argparse, json, os, signal, sys, time
from pathlib import Path
p = argparse.ArgumentParser()
p.add_argument("--run_name"); p.add_argument("--save_file"); p.add_argument("--init_from")
p.add_argument("--regularizer", default="none"); p.add_argument("--lmbda", type=float, default=0)
p.add_argument("--seed", type=int); p.add_argument("--n_epochs", type=int)
p.add_argument("--resume", action="store_true")
args, _ = p.parse_known_args()
with open("calls", "a") as file: print(args.save_file, file=file)
if args.save_file in os.environ.get("FAILS", "").split(): sys.exit("not finite")
assert not args.init_from or Path(args.init_from).exists()
resumed = args.resume and Path(args.save_file + ".ckpt").exists()
Path(args.save_file + ".ckpt").write_text("checkpoint")
def stop(*_): Path("stopped").touch(); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
meet, end = os.environ.get("MEET", "").split(), time.monotonic() + 60
Path(args.save_file + ".here").touch()
while args.save_file in meet and not all(Path(name + ".here").exists() for name in meet):
    time.sleep(0.01)
    if time.monotonic() > end: sys.exit("alone")
if args.save_file == os.environ.get("SLOW") and not resumed: time.sleep(60)
settings = {**vars(args), "resumed": resumed}
machine = {"threads": int(os.environ["OMP_NUM_THREADS"])}
history = [{"epoch": i, "epoch_seconds": 1 + args.lmbda, "track_L2Grad": (i + 1) * args.seed,
            "track_StepNoise": -args.lmbda} for i in range(args.n_epochs)]
Path(args.save_file + ".pt").write_text(json.dumps(settings))
command = [Path(sys.argv[0]).name, *sys.argv[1:]]
record = {"settings": settings, "command": command, "machine": machine, "history": history}
Path(args.save_file + ".json").write_text(json.dumps(record))
"""
FAKE_QUANTIZATION = """
import argparse, json, os, sys
from pathlib import Path
p = argparse.ArgumentParser()
p.add_argument("weights"); p.add_argument("--output"); p.add_argument("--holdout")
p.add_argument("--bits", nargs="+", type=int); p.add_argument("--schemes", nargs="+")
p.add_argument("--act_bits")
args, _ = p.parse_known_args()
net = json.loads(Path(args.weights).read_text())
full = 0.9 + net["seed"] / 100 - net["lmbda"] / 4
row = {"accuracy_change": 0, "squared_error": 0, "levels": 1}
rows = [{**row, "scheme": "none", "bits": 32, "act_bits": 32, "accuracy": full}]
for scheme in args.schemes:
    for bits in args.bits:
        accuracy = full - (1 - 8 * net["lmbda"]) / 2**bits + net["lmbda"] * net["seed"] / 10
        rows.append({**row, "scheme": scheme, "bits": bits, "accuracy": accuracy,
                     "act_bits": bits if args.act_bits else 32})
Path(args.output).mkdir(exist_ok=True)
if args.output == os.environ.get("HALF"): rows = rows[:1]
settings = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": {"threads": int(os.environ["OMP_NUM_THREADS"])}}
part = Path(args.output, "part")  # as the script does: the study reads what is there at any time
part.write_text(json.dumps({"settings": settings, "rows": rows}))
os.replace(part, Path(args.output, "results.json"))
sys.exit(130 if len(rows) == 1 else 0)
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Work in an empty folder, with the stand-ins; call it to see which trainings were run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").mkdir()
    for name, text in (
        ("train.py", FAKE_TRAINING),
        ("combined_protocol.py", FAKE_TRAINING),
        ("quant_inference.py", FAKE_QUANTIZATION),
    ):
        (tmp_path / "scripts" / name).write_text(text)
    monkeypatch.setattr(study, "SCRIPTS", tmp_path / "scripts")
    monkeypatch.setattr(study_runner, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(study_figures, "draw_figures", lambda *_: None)  # it takes a second
    l2grad = study.Variant("--regularizer L2Grad", (0.01, 0.03, 0.1), 3.3)
    monkeypatch.setitem(study.VARIANTS, "l2grad", l2grad)
    before = signal.getsignal(signal.SIGTERM)
    yield lambda: Path("calls").read_text().split() if Path("calls").exists() else []
    signal.signal(signal.SIGTERM, before)


def main(*flags):
    """Run the study in `out`; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        study.main(["--out", "out", "--n_epochs", "6", *flags])
    return caught.value.code


def run_once(folder, *variants):
    """Run a study of the variants with one seed, or copy it where it was run; with its `calls`."""
    if not folder.exists():
        assert main("--only", *variants, "--seeds", "0") == 0
        half = folder.with_suffix(".half")
        shutil.copytree("out", half / "out")
        shutil.copy("calls", half)
        half.rename(folder)
    shutil.copytree(folder, ".", dirs_exist_ok=True)


@pytest.fixture
def finished(scripts, tmp_path_factory):
    """A study of the control and L2Grad with one seed in `out`."""
    run_once(tmp_path_factory.getbasetemp() / "finished", "control", "l2grad")


@pytest.fixture
def finished_control(scripts, tmp_path_factory):
    """A study of the control alone with one seed in `out`."""
    run_once(tmp_path_factory.getbasetemp() / "finished_control", "control")


def make_plan(*flags):
    parser = make_parser()
    return study.make_plans(parser, parser.parse_args(["--out", "out", *flags]))[0][0]


def final_names():
    return make_plan().final_quantizations


# --- λ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ({0.1: (0.90, 0.50), 1.0: (0.895, 0.70)}, 1.0),  # the best 4-bit accuracy
        ({0.1: (0.90, 0.50), 1.0: (0.889, 0.70)}, 0.1),  # but not at the cost of a point
        ({0.1: (0.90, 0.50), 1.0: (0.89, 0.70)}, 0.1),  # exactly a point is too much, also
        ({0.1: (0.90, 0.50), 1.0: (0.9 - 50 / 5000, 0.70)}, 0.1),  # as floats have it
        ({0.1: (0.70, 0.50), 1.0: (0.60, 0.55)}, 0.1),  # all cost too much: the least
        ({1.0: (0.90, 0.50), 0.1: (0.95, 0.50)}, 0.1),  # equal: the smallest
        ({1.0: (0.70, 0.60), 0.1: (0.70, 0.50)}, 0.1),
    ],
)
def test_the_rule_for_lambda(candidates, best):
    assert select_lambda(candidates, control=0.9) == best


# --- jobs ------------------------------------------------------------------------------------


def test_pending_is_what_is_missing_with_what_it_needs(tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    trunk = Job("trunk", (a, tmp_path / "checkpoint"), ("x",), 1.0)
    first, second = Job("b", (b,), ("x",), 1.0, (trunk,)), Job("c", (c,), ("x",), 1.0, (trunk,))
    last = Job("d", (d,), ("x",), 1.0, (second,))
    assert pending([first, last]) == [trunk, first, second, last]
    a.touch()
    assert pending([first, last])[0] == trunk  # what others go on from is gone
    assert (
        next_ready_job([first, last], set()) == trunk and next_ready_job([first, last], {a}) is None
    )
    (tmp_path / "checkpoint").touch()
    assert pending([first, last]) == [first, second, last]
    assert (
        next_ready_job([first, last], {b}) == second
        and next_ready_job([first, last], {b, c}) is None
    )
    assert last.blocked({a}) is False and last.blocked({c}) and last.blocked({d})  # a is there
    d.touch()
    assert pending([first, last]) == [first]  # not second: only the last one needed it


def test_seeds_share_nothing_and_variants_share_their_trunk():
    jobs = pending(
        make_plan().final("l2grad", [0, 1], 0.1) + make_plan().final("l1grad", [0, 1], 0.1)
    )
    trunks = [str(job.target) for job in jobs if job.kind == "trunk"]
    assert trunks == ["out/seed0/trunk.pt", "out/seed1/trunk.pt"]
    each = 1 + len(final_names())  # of each variant and seed a training and its quantizations
    assert len(jobs) == 2 + 2 * 2 * each


@pytest.mark.parametrize("name", study.VARIANTS)
@pytest.mark.sampled(4)
def test_every_command_of_the_plan_is_what_the_scripts_take(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("tuning", "seed1"):
        Path("out", folder).mkdir(parents=True)
        Path("out", folder, "trunk.ckpt").touch()
    started = []
    monkeypatch.setattr(
        train, "run", lambda args, phases, out, stop: started.append((args, phases))
    )
    tuned = study.VARIANTS[study.VARIANTS[name].lambda_from or name]
    lmbda = tuned.lmbdas[0] if tuned.lmbdas else None
    jobs = pending([*make_plan().tuning(name).values(), *make_plan().final(name, [1], lmbda)])
    assert {job.kind for job in jobs} >= {"trunk", name, *(f"quantize {x}" for x in final_names())}
    for job in jobs:
        script, *flags = job.command
        if script == "quant_inference.py":
            parser = quant_inference.make_parser()
            args = parser.parse_args(flags)
            quant_inference.check_flags(parser, args)
            assert Path(args.checkpoints[0]) == job.needs[0].target
            assert Path(args.output) / "results.json" == job.target
        else:
            {"train.py": train, "combined_protocol.py": combined_protocol}[script].main(flags)
            args, phases = started[-1]
            assert args.n_epochs == (6 if job.kind == "trunk" else 9)
            assert args.milestones == "6,8"
            assert bool(args.init_from) == (job.kind != "trunk")
            assert all(p.start >= 6 for p in phases if p.regularizer)
        if job.kind == name and tuned.lmbdas:  # the one that gives the file its name
            lmbda = float(job.target.stem.rpartition("_")[2])
            assert lmbda in {
                getattr(r, "lmbda", None)
                for p in phases
                if p.regularizer
                for r in p.regularizer.modules()
            }
        in_tuning = job.target.is_relative_to("out/tuning")
        assert args.holdout == (5000 if in_tuning else None)
    assert [p.regularizer is None for p in phases][-1] == (name in ("control", "control_frozen"))


def test_the_plan_runs_nothing(scripts, capsys):
    study.main(
        [
            "--out",
            "out",
            "--plan",
            "--only",
            "L2Grad",
            "control",
            "--seeds",
            "4",
            "4",  # which is one
            "--epoch_seconds",
            "90",
        ]
    )
    output = capsys.readouterr().out
    assert not Path("out").exists() and not scripts()
    assert output.count("--run_name study_tuning_trunk ") == 1
    assert output.count("--run_name study_seed4_trunk ") == 1
    training = (6 + 3 + 3 * 3 * 3.3) + (6 + 3 + 3 * 3.3)  # epochs of the control
    seconds = 90 * training + 4 * 20 + 2 * (40 + 20 + 60 + 8 + 12)
    assert f"about {study.duration(seconds)}, with 90 s an epoch of the control" in output
    assert "1 network(s), 1 seed(s): about" in output
    assert "--run_name study_seed4_l2grad_0.01 " in output


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--only", "l3grad"], "l3grad"),
        (["--seeds", "-1"], "-1"),
        (["--n_epochs", "2"], "'2'"),
        (["--train_flags", "it's"], "No closing quotation"),
        (["--plan", "--tables"], "--tables"),
        (["--out", "file"], "file"),
        (["--tables"], "no results in results/study yet"),
    ],
)
def test_bad_flags(flags, reason, scripts, capsys):
    Path("file").touch()
    with pytest.raises(SystemExit) as refused:
        study.main(flags)
    output = capsys.readouterr().err
    assert refused.value.code in (1, 2) and output.count("\n") == 1 and reason in output
    assert not scripts()


def test_what_cannot_be_resumed_is_not_said_to(scripts, capsys):
    Path("file").touch()
    assert main("--out", "file") == 2
    printed = capsys.readouterr().err
    assert "file is not a folder" in printed and "resumes" not in printed
    assert main("--out", "none", "--forget", "seed0/*") == 1 and not Path("none").exists()
    assert "there is no study in none" in capsys.readouterr().err


def test_flags_without_effect_are_named_and_ignored(finished, capsys):
    flags = ["--jobs", "2", "--seeds", "5", "--epoch_seconds", "9"]
    study.main(["--out", "out", "--tables", *flags])
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "renewed the tables" in printed.out
    assert all(flag in printed.err for flag in flags if flag.startswith("--"))


@pytest.mark.slow
def test_without_a_terminal_it_prints_how_far_each_job_is(scripts, capsys, monkeypatch):
    monkeypatch.setattr(study_runner, "LINE_SECONDS", 0)
    assert main("--only", "control", "--seeds", "0") == 0
    assert "seed0/trunk: $ python train.py --lr 0.1" in capsys.readouterr().out


def test_a_folder_holds_one_study(finished_control, capsys):
    for flags in (["--n_epochs", "9"], ["--train_flags=--lr 0.2"], ["--holdout", "7"]):
        for mode in ([], ["--plan"], ["--tables"]):
            with pytest.raises(SystemExit) as refused:
                study.main(["--out", "out", *flags, *mode])
            assert refused.value.code == 2
            assert "choose another --out" in capsys.readouterr().err
    study.main(["--out", "out", "--tables"])  # with the length that it has
    assert "--n_epochs 6 " in Path("out/tables.md").read_text(encoding="utf-8")
    with run_lock(Path("out/study")):
        assert main("--only", "control", "--seeds", "1") == 1
    output = capsys.readouterr().err
    assert "out/study" in output and "another --out" in output and not Path("out/seed1").exists()
    for old in (study.TRAINING, "--lr 0.3"):
        settings = json.loads(Path("out/study.json").read_text())
        Path("out/study.json").write_text(json.dumps({**settings, "TRAINING": old}))
        assert old.format(first=4, last=5) in make_plan().branch("control", 0, None).line
        assert ("continues with" in capsys.readouterr().out) == (old != study.TRAINING)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"n_epochs": 2}, "'2'"),
        ({"n_epochs": "9"}, "n_epochs"),
        ({"n_epochs": 9.5}, "'9.5'"),
        ({"holdout": "many"}, "'many'"),
        ({"holdout": None}, "'None'"),
        ({"more": 1}, "TRAINING"),
        ({"TRAINING": 3}, "TRAINING"),
        ({"TRAINING": "--lr {much}"}, "--lr {much}"),
        ({"TRAINING": "--lr '1"}, "No closing"),
        ({"train_flags": "it's"}, "No closing"),
        ({"data_flags": None}, "data_flags"),
        (None, "TRAINING"),
        ("not JSON", "Expecting value"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--plan"], ["--tables"]])
def test_a_settings_file_that_holds_something_else(changed, reason, mode, scripts, capsys):
    Path("out").mkdir()
    content = json.dumps({**study.SETTINGS, **changed} if isinstance(changed, dict) else changed)
    Path("out/study.json").write_text("not JSON" if changed == "not JSON" else content)
    with pytest.raises(SystemExit) as refused:
        study.main(["--out", "out", *mode])
    output = capsys.readouterr().err
    assert refused.value.code == 2 and output.count("\n") == 1
    assert "out/study.json: error: " in output and reason in output and not scripts()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--train_flags=--bogus 1", "--bogus"),
        ("--train_flags=--lr much", "'much'"),
        ("--train_flags=--seed 7", "--train_flags: --seed"),
        ("--train_flags=--allow_changed_settings", "--train_flags: --allow_changed_settings"),
        ("--train_flags=--override", "--train_flags: --allow_changed_settings"),
        ("--train_flags=--seed 242", "--train_flags: --seed"),  # the default of train.py
        ("--train_flags=--lmbda_warmup 1", "--lmbda_warmup"),  # the trunk has no regularizer
        ("--train_flags=--penalty_every 4", "--penalty_every"),
        ("--train_flags=--regularizer L2Grad", "--regularizer"),
        ("--train_flags=--fold_bn", "--fold_bn"),
        ("--train_flags=--hold_step", "--detach_step"),
        ("--train_flags=--model ConvNet --dataset Synthetic", "--dataset"),
        ("--data_flags=--holdout 9", "--data_flags: --holdout"),
        ("--data_flags=--lr 1", "--lr"),
        ("--data_flags=--model VGGSmall --models ResNet20", "--data_flags: --model"),
        ("--data_flags=--width 0.5 --models ResNet20", "--data_flags: --width"),
    ],
)
def test_flags_that_are_not_for_the_jobs_leave_no_study(flags, reason, scripts, capsys):
    flags, *models = flags.split(" --models ")
    assert main(flags, *(f"--models={model}" for model in models)) == 2
    output = capsys.readouterr().err
    assert (
        output.count("\n") == 1 and reason in output and not Path("out").exists() and not scripts()
    )


CHOICE = '{"control": [0.9, 0.8], "candidates": {"0.03": %s}, "lmbda": %s}'
TEXT_FOR_NUMBER = json.dumps(
    {
        "rows": [
            {
                "scheme": "uniform",
                "bits": 4,
                "act_bits": 32,
                "levels": 16,
                "accuracy": "much",
                "accuracy_change": 0,
                "squared_error": 0,
            }
        ]
    }
)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("seed0/trunk.json", None),
        ("seed0/control.json", "{}"),
        ("seed0/control.json", "[]"),
        ("seed0/control_weights/results.json", ""),
        ("tuning/l2grad_choice.json", '{"control": '),
        ("seed0/control_weights/results.json", TEXT_FOR_NUMBER),
        ("tuning/l2grad_choice.json", CHOICE % ('"much"', 0.03)),
        ("tuning/l2grad_choice.json", CHOICE % ("null", 0.03)),
        ("tuning/l2grad_choice.json", CHOICE % ("[0.9, 0.8]", 0.04)),
        ("seed0/control_folded/results.json", '{"rows": [{"scheme": "uniform"}]}'),
    ],
)
def test_a_result_that_cannot_be_read_is_reported_in_a_line(path, content, finished, capsys):
    if content is None:
        Path("out", path).unlink()
        Path("out/records.jsonl.gz").unlink()  # which has it, too
    else:
        Path("out", path).write_text(content)
    assert main("--tables") == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and f"out/{path}" in output


@pytest.mark.slow
def test_tables_keep_a_lambda_chosen_from_other_candidates(finished, scripts, monkeypatch):
    page = Path("out/tables.md").read_text(encoding="utf-8")
    other = study.Variant("--regularizer L2Grad", (0.02, 0.03), 3.3)
    monkeypatch.setitem(study.VARIANTS, "l2grad", other)
    Path("out/seed00").mkdir()
    study.main(["--out", "out", "--tables"])
    assert Path("out/tables.md").read_text(encoding="utf-8") == page
    choice = Path("out/tuning/l2grad_choice.json")
    assert main("--only", "l2grad", "--seeds", "0") == 0  # only then it is chosen again
    assert list(json.loads(choice.read_text())["candidates"]) == ["0.02", "0.03"]
    choice.unlink()
    study.main(["--out", "out", "--plan"])
    assert not choice.exists()


# --- runs ------------------------------------------------------------------------------------


def test_a_run_chooses_lambda_tests_once_and_is_not_repeated(finished, scripts):
    tuning = [
        f"out/tuning/{x}" for x in ("trunk", "control", "l2grad_0.01", "l2grad_0.03", "l2grad_0.1")
    ]
    # λ = 0.1 loses 2.5 points; of the other two the larger one is better at 4 bits
    final = [f"out/seed0/{x}" for x in ("trunk", "control", "l2grad_0.03")]
    assert sorted(scripts()) == sorted(tuning + final)
    assert not list(Path("out").glob("*/l2grad*.ckpt")) and Path("out/seed0/trunk.ckpt").exists()
    assert main("--only", "control", "l2grad", "--seeds", "0") == 0
    assert len(scripts()) == len(tuning + final)
    assert main("--only", "l2grad", "--seeds", "2") == 0
    assert scripts()[-2:] == ["out/seed2/trunk", "out/seed2/l2grad_0.03"]
    rows = list(csv.DictReader(open("out/results.csv", encoding="utf-8")))
    assert {(row["variant"], row["seed"]) for row in rows} == {
        ("control", "0"),
        ("l2grad", "0"),
        ("l2grad", "2"),
    }


def test_jobs_share_out_the_visible_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(executors.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert executors.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a")
    executor = executors.LocalExecutor(4, tmp_path, executors.visible_gpus())
    started = []
    monkeypatch.setattr(
        executors.subprocess, "Popen", lambda command, env, **_: started.append(env)
    )
    running = []
    for name in "abc":
        job = Job("a", (tmp_path / name,), ("train.py",), 1.0)
        running.append(executor.start(job, running))
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["5", "GPU-a", "5"]


@pytest.mark.slow
def test_several_jobs_at_once_are_the_same_study(scripts, monkeypatch):
    monkeypatch.setenv("MEET", "out/seed0/l2grad_0.03 out/seed1/l2grad_0.03")
    monkeypatch.setattr(executors.torch, "get_num_threads", lambda: 8)
    assert main("--only", "control", "l2grad", "--seeds", "0", "1", "--jobs", "3") == 0
    seeds = [f"out/seed{s}/{x}" for s in (0, 1) for x in ("trunk", "control", "l2grad_0.03")]
    tuning = [
        f"out/tuning/{x}" for x in ("trunk", "control", "l2grad_0.01", "l2grad_0.03", "l2grad_0.1")
    ]
    assert sorted(scripts()) == sorted(tuning + seeds)  # each once
    page = Path("out/tables.md").read_text(encoding="utf-8")
    assert page.count("\nOMP_NUM_THREADS=2 python train.py ") == 2 * 2 * 2


def test_a_row_has_the_command_that_it_was_run_with(finished_control, monkeypatch):
    before = Path("out/tables.md").read_text(encoding="utf-8")
    monkeypatch.setitem(study.VARIANTS, "control", study.Variant("--regularizer none --watch"))
    study.main(["--out", "out", "--tables"])
    assert Path("out/tables.md").read_text(encoding="utf-8") == before


def test_results_of_flags_that_were_changed_are_named_and_can_be_made_again(
    finished, scripts, monkeypatch, capsys
):
    page = Path("out/tables.md").read_text(encoding="utf-8")
    flags = ["--only", "l2grad", "--seeds", "0", "1"]
    changed = study.Variant("--regularizer L1Grad", (0.01, 0.03, 0.1), 3.3)
    monkeypatch.setitem(study.VARIANTS, "l2grad", changed)
    n_trainings = len(scripts())
    for mode in ([], ["--plan"]):
        assert main(*flags, *mode) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "tuning/l2grad_0.01.json (--regularizer was" in line
        assert "choose another --out" in line and len(scripts()) == n_trainings
    study.main(["--out", "out", "--tables"])
    assert "jobs in out ran with other flags" in capsys.readouterr().err
    assert Path("out/tables.md").read_text(encoding="utf-8") == page
    study.main(["--out", "out", "--plan", "--only", "control"])  # which is what it was
    assert main("--forget", *shlex.split(line.partition("--forget ")[2])) == 0
    study.main(["--out", "out", "--plan", *flags])
    planned = capsys.readouterr().out
    assert all(f"_tuning_l2grad_{lmbda} " in planned for lmbda in ("0.01", "0.03", "0.1"))
    assert "--regularizer L1Grad" in planned and not list(Path("out").glob("*/l2grad*.pt"))


def test_another_way_of_choosing_lambda_is_named_with_the_choices(finished, monkeypatch, capsys):
    other = study.Quantization("--bits 3 --schemes uniform", 20.0)
    monkeypatch.setitem(study.QUANTIZATIONS, "tuning", other)
    assert main("--only", "l2grad", "--seeds", "1") == 2
    line = capsys.readouterr().err
    assert "tuning/control_tuning/results.json (--bits was [4], is [3])" in line
    assert "seed" not in line and "trunk" not in line and "l2grad_0.1.json" not in line
    assert main("--forget", *shlex.split(line.partition("--forget ")[2])) == 0
    printed = capsys.readouterr().out
    assert "\ntuning/l2grad_choice.json, which rests on tuning/control_tuning/results" in printed


def test_only_the_seeds_that_ran_with_other_flags_are_made_again(finished_control, capsys):
    assert main("--only", "control", "--seeds", "1", "2") == 0
    patterns = []
    for seed in (1, 2, 0):
        path = Path(f"out/seed{seed}/control.json")
        path.write_text(path.read_text().replace('"--lr", "0.1"', '"--lr", "0.3"'))
        capsys.readouterr()
        assert main("--only", "control") == 2
        patterns.append(capsys.readouterr().err.split(" --forget ")[1].split())
    assert patterns[:2] == [["seed1/control.json"], ["seed1/control.json", "seed2/control.json"]]
    assert patterns[2] == ["'seed*/control.json'"]


def test_seeds_that_lack_a_new_quantization_are_said_to_be_left_out(
    finished_control, monkeypatch, capsys
):
    new = study.Quantization("--bits 6 --schemes dorefa", 20.0, {"dorefa": "other"})
    monkeypatch.setitem(study.QUANTIZATIONS, "new", new)
    assert main("--tables") == 1
    printed = capsys.readouterr()
    line = "left out of the tables: out/seed0/control is not quantized as new yet\n"
    assert line in printed.out and "there are no results in out yet" in printed.err


def test_jobs_that_were_run_predict_how_long_the_next_ones_take(finished_control):
    with open("out/jobs.jsonl", "ab") as file:
        file.write(b'{}\n7\n\xff\n{"kind": "trunk", "seconds": 1, "at_once": 0}\n{"kind": "tru')
    seconds = study_jobs.job_seconds(Path("out"))
    assert set(seconds) == {"trunk", "control", *(f"quantize {how}" for how in final_names())}
    assert make_plan().trunk(7, tuning=False).seconds == seconds["trunk"] < 60
    assert make_plan("--epoch_seconds", "100").trunk(7, tuning=False).seconds == 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_parallel", "failing", "taken"),
    [
        ("1", "0.01", 0.03),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("1", "0.03", 0.01),
                ("3", "0.03", 0.01),
                ("1", "0.1", 0.03),
                ("3", "0.01", 0.03),
                ("3", "0.1", 0.03),
            )
        ),
    ],
)
def test_a_candidate_that_fails_is_left_out_and_reported(
    failing, taken, max_parallel, scripts, monkeypatch, capsys
):
    monkeypatch.setenv("FAILS", f"out/tuning/l2grad_{failing} out/seed1/trunk")
    flags = ["--only", "l2grad", "--seeds", "0", "1"]
    assert main(*flags, "--jobs", max_parallel) == 1
    output = capsys.readouterr().out
    training = study.TRAINING.format(first=4, last=5)
    assert f"FAILED: python train.py {training} --run_name study_tuning_l2grad_{failing}" in output
    assert f"not run, for it needs what failed: seed1/l2grad_{taken}" in output
    assert "not finite" in Path(f"out/tuning/l2grad_{failing}.log").read_text()
    tables = Path("out/tables.md").read_text(encoding="utf-8")
    assert "| l2grad | " + failing + " | failed | – |  |" in tables
    study.main(["--out", "out", "--tables"])  # which has not seen it fail
    assert Path("out/tables.md").read_text(encoding="utf-8") == tables
    before = len(scripts())
    monkeypatch.delenv("FAILS")
    assert main(*flags) == 0  # what is done with is not tried again
    assert scripts()[before:] == ["out/seed1/trunk", f"out/seed1/l2grad_{taken}"]
    output = capsys.readouterr().out
    assert f"λ = {failing} failed and is left out; to try it again, remove out/tuning/" in output


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["out/tuning/l2grad_0.03_tuning", "out/seed0/control_weights"])
@pytest.mark.sampled(2)
def test_half_a_quantization_does_not_count(folder, scripts, monkeypatch):
    monkeypatch.setenv("HALF", folder)
    flags = ["--only", "control", "l2grad", "--seeds", "0"]
    assert main(*flags) == 1
    assert Path(folder, "results.json.partial").exists()
    assert not Path(folder, "results.json").exists()
    monkeypatch.delenv("HALF")
    if "seed0" in folder:  # else λ was chosen without it
        assert main(*flags) == 0 and Path(folder, "results.json").exists()


@pytest.mark.slow
def test_without_a_control_no_lambda_is_chosen(scripts, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "out/tuning/control")
    assert main("--only", "l2grad", "--seeds", "0") == 1
    assert not Path("out/seed0").exists() and "no λ to choose" in capsys.readouterr().out


def test_a_study_that_was_killed_resumes(scripts, monkeypatch):
    monkeypatch.setenv("SLOW", "out/seed0/control")

    def kill():
        wait_for("out/seed0/control.ckpt")
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=kill)
    killer.start()
    assert main("--only", "control", "--seeds", "0") == 128 + signal.SIGTERM
    killer.join()
    assert not Path("out/seed0/control.pt").exists()
    assert main("--only", "control", "--seeds", "0") == 0  # no longer slow: it resumes
    assert scripts() == ["out/seed0/trunk", "out/seed0/control", "out/seed0/control"]
    assert json.loads(Path("out/seed0/control.json").read_text())["settings"]["resumed"]
    assert "control" not in study_jobs.job_seconds(Path("out"))  # half of it is no measure


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.01)


def run_control(folder):
    """Run a study of the control in the folder, with the stand-ins."""
    os.chdir(folder)
    study.SCRIPTS = folder / "scripts"
    study.main("--out out --n_epochs 6 --only control --seeds 0".split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the job trains on")
def test_a_job_stops_when_the_study_dies_at_once(scripts, monkeypatch):
    monkeypatch.setenv("SLOW", "out/seed0/control")
    pid = launcher().start(run_control, Path.cwd())
    try:
        wait_for("out/seed0/control.ckpt")
        time.sleep(0.2)  # until it sleeps
    finally:
        os.kill(pid, signal.SIGKILL)
    launcher().wait(pid)
    wait_for("stopped")
    assert main("--only", "control", "--seeds", "0") == 0
    assert scripts() == ["out/seed0/trunk", "out/seed0/control", "out/seed0/control"]


def test_jobs_are_started_apart_from_the_study_on_every_system(monkeypatch):
    assert executors.detached_process()["process_group"] == 0
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(executors, "os", SimpleNamespace(name="nt"))
    assert executors.detached_process() == {"creationflags": 512}  # Windows knows no others


@pytest.mark.parametrize(
    ("flags", "holdout"),
    [([], 200), (["--holdout", "64"], 64), (["--data_flags=--dataset CIFAR10"], 5000)],
)
def test_a_small_data_set_limits_the_number_of_images(flags, holdout, capsys):
    plan = make_plan("--data_flags=--dataset Synthetic", *flags)
    output = capsys.readouterr().out
    small = holdout != 5000
    assert plan.holdout == holdout
    bn_flags = f"--recalibrate_bn_images {2000 if small else 4000} "
    assert bn_flags in plan.quantizations["recalibrated"].flags
    assert output.count("Synthetic has 2000 training images") == small + (holdout == 200)


def test_more_held_out_images_than_there_are_leave_no_study(scripts, capsys):
    assert main("--data_flags=--dataset Synthetic", "--holdout", "2000") == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "2000: Synthetic has 2000 training images" in output
    assert not Path("out").exists() and not scripts()


# --- records ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_clone(finished):
    """The finished study as a fresh clone has it: its folders of jobs are not there."""
    for name in ("seed0", "tuning"):
        shutil.rmtree(Path("out", name))


def test_a_fresh_clone_renews_its_tables_and_knows_what_is_done(fresh_clone, scripts, capsys):
    tables = sorted({*Path("out").glob("*.csv"), *Path("out").glob("*.md")})
    before = {path: path.read_bytes() for path in tables}
    assert len(before) >= 5
    for path in tables:
        path.unlink()
    study.main(["--out", "out", "--tables"])
    assert {path: path.read_bytes() for path in tables} == before
    capsys.readouterr()
    flags = ["--only", "control", "l2grad", "--seeds", "0"]
    study.main(["--out", "out", "--plan", *flags])
    assert (
        "nothing to run: all of it is done" in capsys.readouterr().out
        and not Path("out/seed0").exists()
    )
    n_trainings = len(scripts())
    assert main(*flags) == 0 and len(scripts()) == n_trainings
    assert main(*flags, "1") == 0  # another seed has the λ that was chosen
    seed1 = [f"out/seed1/{name}" for name in ("trunk", "control", "l2grad_0.03")]
    assert scripts()[n_trainings:] == seed1


@pytest.mark.slow
def test_a_fresh_clone_trains_again_where_a_job_needs_the_weights(fresh_clone, scripts, capsys):
    study.main(["--out", "out", "--plan", "--only", "control", "--seeds", "0"])
    assert "trained again" not in capsys.readouterr().out  # nothing is missing
    assert main("--forget", "seed0/control_weights/*") == 0
    assert "seed0/control_weights/results.json" in capsys.readouterr().out
    n_trainings = len(scripts())
    assert main("--only", "control", "--seeds", "0") == 0
    assert scripts()[n_trainings:] == ["out/seed0/trunk", "out/seed0/control"]
    assert sorted(path.name for path in Path("out/seed0").glob("*/")) == ["control_weights"]
    output = capsys.readouterr().out
    assert "because their weights are not here: seed0/trunk, seed0/control\n" in output


@pytest.mark.slow
def test_what_is_forgotten_is_made_again(finished, scripts, capsys):
    page = Path("out/tables.md").read_text(encoding="utf-8")
    assert main("--forget", "tuning/l2grad_0.03*", "tuning/*_choice.json", "seed0/l2grad*") == 0
    assert not list(Path("out/tuning").glob("l2grad_0.03.pt"))
    n_trainings = len(scripts())
    assert main("--only", "l2grad", "--seeds", "0") == 0
    assert scripts()[n_trainings:] == ["out/tuning/l2grad_0.03", "out/seed0/l2grad_0.03"]
    assert Path("out/tables.md").read_text(encoding="utf-8") == page
    assert main("--forget", "seed0/*") == 0
    assert not list(Path("out/seed0").glob("*.ckpt*"))  # or a trunk would be done already
    assert main("--forget", "no/such/*") == 1
    assert "no record in out matches no/such/*" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "resting", "again"),
    [
        ("seed0/control.json", "seed0/control_*/*", ["seed0/control"]),
        ("tuning/l2grad_*_tuning/*", "tuning/*choice.json", []),
        ("tuning/control.json", "tuning/control_* tuning/*choice.json", ["tuning/control"]),
        (
            "tuning/l2grad_0.1.json",
            "tuning/l2grad_0.1_* tuning/*choice.json",
            ["tuning/l2grad_0.1"],
        ),
        ("seed0/trunk.json", "seed0/*", ["seed0/trunk", "seed0/control", "seed0/l2grad_0.03"]),
    ],
)
def test_what_rests_on_what_is_forgotten_is_made_again(
    pattern, resting, again, finished, scripts, capsys
):
    records = list(Path("out").glob("*/**/*.json"))
    gone = {path for each in (pattern, *resting.split()) for path in Path("out").glob(each)}
    gone = {path for path in records if gone & {path, path.parent}}
    page = Path("out/tables.md").read_text(encoding="utf-8")
    flags = ["--only", "control", "l2grad", "--seeds", "0"]
    n_trainings = len(scripts())
    assert main("--forget", pattern) == 0
    printed = capsys.readouterr().out
    assert {path for path in records if not path.exists()} == gone
    assert all(path.relative_to("out").as_posix() in printed for path in gone)
    assert main(*flags) == 0
    assert scripts()[n_trainings:] == [f"out/{name}" for name in again]
    assert Path("out/tables.md").read_text(encoding="utf-8") == page


def test_a_variant_with_a_longer_name_does_not_rest_on_the_shorter_one(finished):
    for name in ("control_frozen.json", "control_frozen_weights/results.json", "half.ckpt"):
        Path("out/seed0", name).parent.mkdir(exist_ok=True)
        Path("out/seed0", name).write_text("{}")
    records = make_plan().records
    assert len(records.forget(["seed0/control.json"])) == 1 + len(final_names())
    assert records.forget(["tuning/trunk.json"])["tuning/l2grad_choice.json"]
    assert records.forget(["seed0/trunk.json"])["seed0/control_frozen_weights/results.json"]
    assert not Path("out/seed0/half.ckpt").exists()  # it would go on from another trunk


def test_the_same_records_are_the_same_bytes(finished):
    archive = Path("out/records.jsonl.gz")
    before = archive.read_bytes()
    archive.unlink()
    time.sleep(1.1)  # a time stamp would differ
    assert main("--only", "control", "--seeds", "0") == 0
    assert archive.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not gzip", gzip.compress(b'{"path": 1}\n', mtime=0)])
@pytest.mark.parametrize("mode", [[], ["--plan"], ["--tables"]])
def test_damaged_records_are_reported_in_a_line(content, mode, finished, scripts, capsys):
    Path("out/records.jsonl.gz").write_bytes(content)
    n_trainings = len(scripts())
    assert main(*mode) == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "out/records.jsonl.gz is damaged" in output
    assert len(scripts()) == n_trainings


def test_a_wrong_record_is_reported_in_a_line(fresh_clone, capsys):
    archive = Path("out/records.jsonl.gz")
    lines = map(json.loads, gzip.decompress(archive.read_bytes()).splitlines())
    changed = [{**r, "content": []} if r["path"] == "seed0/control.json" else r for r in lines]
    archive.write_bytes(gzip.compress("\n".join(map(json.dumps, changed)).encode()))
    assert main("--tables") == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "out/seed0/control.json in out/records.jsonl.gz" in output


# --- tables ----------------------------------------------------------------------------------


def test_paired_differences_are_those_of_scipy():
    a = {0: 0.81, 1: 0.84, 2: 0.80, 5: 0.79}
    b = {0: 0.80, 1: 0.80, 2: 0.81, 4: 0.10, 5: 0.77}
    paired = pd.DataFrame({"a − b": pd.Series(a) - pd.Series(b)})
    interval = study_results.mean_intervals(paired).loc["a − b"]
    expected = scipy.stats.ttest_rel([a[s] for s in (0, 1, 2, 5)], [b[s] for s in (0, 1, 2, 5)])
    assert interval["n"] == 4
    assert (interval["low"], interval["high"]) == pytest.approx(expected.confidence_interval(0.95))
    one = pd.DataFrame({"a − b": pd.Series({0: 1.0}) - pd.Series({0: 1.0, 1: 1.0})})
    assert study_results.mean_intervals(one).empty


def test_tables_of_means_deviations_and_commands(finished):
    assert main("--only", "control", "l2grad", "--seeds", "0", "1", "2") == 0
    page = Path("out/tables.md").read_text(encoding="utf-8")
    lines = page.splitlines()
    assert lines[2] == (
        "|  | λ | seeds | full precision | uniform 4 | uniform 3 | uniform 2 | "
        "uniform (4,4) | epoch time |"
    )
    # full precision 90, 91 and 92 %; at 2 bits a quarter of 1 less
    control = next(line for line in lines if line.startswith("| control "))
    cells = [cell.strip() for cell in control.strip("|").split("|")]
    assert cells[:4] == ["control", "", "3", "91.00 ± 1.00"] and cells[-1] == "1.00"
    assert cells[6] == "66.00 ± 1.00"
    assert cells[7] == "84.75 ± 1.00"  # (4,4)
    corrected = page[page.index("## corrected\n") : page.index("## corrected pwlq\n")]
    assert "| corrected 2 | corrected (4,4) |" in corrected
    assert "| 66.00 ± 1.00 | 84.75 ± 1.00 | 1.00 |" in corrected
    assert "| control |  | 3 | 91.00 ± 1.00 | 84.75 ± 1.00 | 1.00 |" in page  # PWLQ, (4,4)
    l2grad = next(line for line in lines if line.startswith("| l2grad "))
    cells = [cell.strip() for cell in l2grad.strip("|").split("|")]
    assert cells[:4] == ["l2grad", "0.03", "3", "90.25 ± 1.00"] and cells[-1] == "1.03"
    # 0.75 points less at full precision; at 4 bits 8·0.03/2⁴ − 0.75 % + 0.3 % · seed more
    half = scipy.stats.t.ppf(0.975, 2) * 0.3 / 3**0.5
    assert f"| l2grad − control | 3 | -0.75 ± 0.00 | +1.05 ± {half:.2f} |" in page
    assert "--run_name study_seed1_l2grad_0.03 " in page and "mkdir -p out/seed1\n" in page
    assert "| l2grad | 0.03 | 89.25 | 84.50 | taken |" in page  # held out, seed 0
    summary = list(csv.DictReader(open("out/summary.csv", encoding="utf-8")))
    [entry] = [
        r
        for r in summary
        if (r["variant"], r["scheme"], r["act_bits"]) == ("l2grad", "uniform", "4")
    ]
    assert float(entry["mean"]) == pytest.approx(0.9025 - 0.76 / 16 + 0.003)
    assert float(entry["std"]) == pytest.approx(0.013)
    # six epochs times the mean of the seeds
    assert "| l2grad | 6 | -0.03 | 0 |" in page and "| control | 6 | 0 | 0 |" in page
    tracked = list(csv.DictReader(open("out/tracked.csv", encoding="utf-8")))
    assert len(tracked) == 2 * 3 * 6 * 2
    plan = make_plan()
    results = [
        result
        for name in ("control", "l2grad")
        for result in study_report.finished_results(plan, name, plan.chosen_lambda(name))
    ]
    tables = study_results.read_results(
        results, plan.records, plan.quantizations, plan.epochs["first"]
    )
    choices = {"l2grad": plan.saved_choice("l2grad")}
    statistics = study_results.Statistics(*tables)
    draw_figures(Path("out"), statistics, choices, plan.epochs["first"], n_classes=100)
    for plot in ("overview.png", "accuracy.png", "tracked.png", "choice.png", "answer.png"):
        assert Path("out", plot).stat().st_size > 10_000
    answer = Path("out/answer.md").read_text(encoding="utf-8").splitlines()
    assert answer[0] == lines[2] and answer[2:] == [
        line for line in lines[4:6] if line.startswith(("| control |", "| l2grad |"))
    ]
    Path("out/tables.md").unlink()
    study.main(["--out", "out", "--n_epochs", "6", "--tables"])
    assert Path("out/tables.md").read_text(encoding="utf-8") == page


def row_table(rows):
    return pd.DataFrame(rows, columns=study_results.ROW_COLUMNS)


def test_a_setting_of_fewer_seeds_takes_no_cell_from_the_others():
    common = {"variant": "control", "act_bits": 32, "lmbda": None, "epoch_seconds": 1.0}
    rows = [
        {**common, "seed": seed, "scheme": scheme, "bits": bits, "accuracy": 0.9 - seed / 100}
        for scheme, bits, n in (("none", 32, 3), ("uniform", 4, 2), ("uniform", 3, 1))
        for seed in range(n)
    ]
    tracked = pd.DataFrame([], columns=study_results.TRACKED_COLUMNS)
    statistics = study_results.Statistics(row_table(rows), tracked)
    table = study_tables.accuracy_table(statistics, study_results.SUMMARY_SETTINGS[:3])
    cells = "| 3 | 89.00 ± 1.00 | 89.50 ± 0.71 (n = 2) | 90.00 (n = 1) | 1.00 |"
    assert table.splitlines()[2:] == [f"| control |  {cells}"]


def accuracies_of(rows):
    table = row_table(rows)
    return study_results.pivot(table, study_results.NETWORK, study_results.SETTING, "accuracy")


def network_values(values):
    """A number of each network as a column, from {(variant, seed): number}."""
    index = pd.MultiIndex.from_tuples(values, names=study_results.NETWORK)
    return pd.Series(list(values.values()), index)


def test_what_was_not_tracked_or_ended_earlier_is_no_trouble():
    tracked = [
        {"variant": variant, "seed": 0, "epoch": epoch, "name": name, "value": value}
        for variant, epoch, name, value in (
            ("control", 5, "L2Grad", 900.0),
            ("control", 6, "L2Grad", 1234.4),
            ("mynorm", 5, "L2Grad", 0.12345),
            ("mynorm", 5, "MyNorm", -7.0),
        )
    ]
    values = study_results.final_values(pd.DataFrame(tracked), row_table([]))
    lines = study_tables.tracked_table(values).splitlines()
    assert lines[0] == "|  | L2Grad | MyNorm |"
    assert lines[2:] == ["| control | 1234 | – |", "| mynorm | 0.123 | -7 |"]


def test_rank_correlations_are_those_of_scipy():
    x, y = [3.0, 1.0, 2.0, 2.0, 9.0], [0.1, 0.3, 0.2, 0.1, -5.0]
    assert study_results.rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert study_results.rank_correlation(x, [1.0] * 5) is None
    rows = [
        {
            "variant": variant,
            "seed": seed,
            "scheme": scheme,
            "bits": bits,
            "act_bits": 32,
            "accuracy": 0.9 - drop,
            "squared_error": drop,
        }
        for variant, seed, drop_4 in (("control", 0, 0.3), ("control", 1, 0.2), ("a", 0, 0.1))
        for scheme, bits, drop in (("none", 32, 0.0), ("uniform", 4, drop_4))
    ]
    tracked = [
        {
            "variant": row["variant"],
            "seed": row["seed"],
            "epoch": 5,
            "name": "L2Grad",
            "value": -row["squared_error"],
        }
        for row in rows
        if row["bits"] == 4
    ]
    values = study_results.final_values(pd.DataFrame(tracked), row_table(rows))
    drops = study_results.network_drops(accuracies_of(rows))
    expected = {("control", 0): 0.3, ("control", 1): 0.2, ("a", 0): 0.1}
    assert drops["uniform", 4, 32].to_dict() == pytest.approx(expected)
    settings = [("uniform", 4, 32), ("uniform", 3, 32)]
    table = study_tables.prediction_table(values, drops.reindex(columns=settings))
    assert table.splitlines()[2:] == ["| L2Grad | -1.00 | – |", "| squared error | +1.00 | – |"]


def test_a_mean_of_correlations_has_its_extremes_beside_it():
    x = {("a", 0): 1.0, ("b", 0): 2.0, ("c", 0): 3.0, ("a", 1): 1.0, ("b", 1): 3.0, ("c", 1): 2.0}
    values = pd.DataFrame({"x": network_values(x)})
    drops = pd.DataFrame({("uniform", 4, 32): network_values({**x, ("b", 1): 0.0})})
    grouped = study_results.networks_of_each_seed
    lines = study_tables.prediction_table(values, drops, grouped).splitlines()
    assert lines[2:] == ["| x | +0.25 (-0.50 to +1.00) |"]


def test_networks_are_grouped_by_seed_or_around_their_variant():
    x = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 10.0, ("b", 2): 0.0, ("c", 0): 5.0}
    y = {("a", 0): 4.0, ("a", 1): 2.0, ("b", 0): -1.0, ("c", 0): 7.0, ("d", 0): 0.0}
    pairs = pd.DataFrame({"x": network_values(x), "y": network_values(y)}).dropna()

    def points(grouped):
        return [list(group.itertuples(index=False, name=None)) for group in grouped(pairs)]

    assert points(study_results.all_networks) == [[(1, 4), (3, 2), (10, -1), (5, 7)]]
    assert points(study_results.networks_of_each_seed) == [[(1, 4), (10, -1), (5, 7)], [(3, 2)]]
    assert points(study_results.deviations_within_variants) == [[(-1, 1), (1, -1)]]


def test_means_are_of_the_seeds_that_all_variants_share():
    seeds = {"a": (0, 1, 2, 3), "b": (1, 2), "c": (3,)}
    networks = [(variant, seed) for variant in seeds for seed in seeds[variant]]

    def restricted(networks):
        rows = pd.DataFrame(networks, columns=["variant", "seed"])
        shared = study_results.restrict_to_shared_seeds(rows)
        return list(shared.itertuples(index=False, name=None))

    assert restricted(networks) == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("c", 3)]
    apart = [network for network in networks if network not in {("a", 1), ("a", 2)}]
    assert restricted(apart) == apart


def test_accuracy_drops_are_those_of_the_same_network():
    rows = [
        {
            "variant": "a",
            "seed": seed,
            "scheme": scheme,
            "bits": bits,
            "act_bits": 32,
            "accuracy": accuracy,
        }
        for scheme, bits, accuracies in (("none", 32, (0.9, 0.8)), ("uniform", 4, (0.8, 0.76)))
        for seed, accuracy in enumerate(accuracies)
    ]
    drops = study_results.network_drops(accuracies_of(rows))
    [drop] = study_results.accuracy_drops(drops).to_dict("records")
    half = scipy.stats.t.ppf(0.975, 1) * 0.03
    assert (drop["scheme"], drop["bits"], drop["n"]) == ("uniform", 4, 2)
    assert (drop["mean"], drop["high"]) == pytest.approx((0.07, 0.07 + half), abs=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_choice_of_one_lambda_is_drawn(tmp_path):
    both = HoldoutAccuracy(0.9, 0.8)
    study_figures.choice_plot({"a": Choice(both, {0.1: both}, 0.1)}, tmp_path / "choice.png")


@pytest.mark.parametrize(
    ("record", "n_classes"),
    [
        ({"classes": ["cat", "dog"], "settings": {"dataset": "ImageFolder"}}, 2),
        ({"classes": [], "settings": {"dataset": "Synthetic"}}, None),
        ({"settings": {"dataset": "CIFAR10"}}, 10),  # as in older records
        ({"settings": {}}, None),
    ],
)
def test_guessing_is_drawn_where_the_number_of_classes_is_known(record, n_classes, monkeypatch):
    assert study_results.count_classes(record) == n_classes
    figures = []
    monkeypatch.setattr(study_figures, "save_png", lambda figure, _: figures.append(figure))
    common = {"variant": "control", "seed": 0, "lmbda": None, "epoch_seconds": 1.0}
    rows = [
        {**common, "scheme": scheme, "bits": bits, "act_bits": act_bits, "accuracy": 0.97}
        for scheme, bits, act_bits in (("none", 32, 32), ("uniform", 4, 32), ("uniform", 4, 4))
    ]
    tracked = pd.DataFrame([], columns=study_results.TRACKED_COLUMNS)
    statistics = study_results.Statistics(row_table(rows), tracked)
    study_figures.answer_plot(statistics, n_classes, Path("answer.png"))
    axes = figures[0].axes[0]
    lines = [set(line.get_ydata()) for line in axes.lines]
    assert ({100 / n_classes} in lines) if n_classes else len(lines) == 1
    assert axes.get_ylim() == (0, 100)


def test_labels_of_a_figure_do_not_overlap():
    assert list(study_figures.spread_labels([10, 10, 12, 58], distance=6)) == [10, 16, 22, 58]


@pytest.mark.slow
def test_a_tiny_study_of_real_trainings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = study.Variant("--regularizer StepNoise", (1.0,))
    monkeypatch.setitem(study.VARIANTS, "stepnoise", noise)
    before = signal.getsignal(signal.SIGTERM)
    code = main(
        "--only",
        "control",
        "stepnoise",
        "combined",
        "--seeds",
        "0",
        "--holdout",
        "64",
        "--data_flags=--dataset Synthetic",
        "--train_flags=--train_subset 64 --batch_size 32 --precision fp32 --no-compile",
    )
    signal.signal(signal.SIGTERM, before)
    assert code == 0
    page = Path("out/tables.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in ("control", "stepnoise", "combined"))
    history = json.loads(Path("out/seed0/combined.json").read_text())["history"]
    assert ["train_VarianceNorm" in e for e in history] == [False] * 4 + [True, False]
    assert "train_VarianceNorm+L2Grad" in history[5]
    trunk = json.loads(Path("out/seed0/trunk.json").read_text())["history"]
    assert json.loads(Path("out/seed0/stepnoise_1.json").read_text())["history"][:4] == trunk
