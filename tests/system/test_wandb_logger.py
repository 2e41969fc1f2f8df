import atexit
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock, call

import fork_server
import pytest
import torch
from wandb_log import read_log

import train
from engine.system import environment, wandb_logger
from models import ResNet20

EPOCHS = Path(train.__file__).with_name("results") / "distributions" / "epochs.py"
FAST = (
    "--dataset Synthetic --train_subset 32 --holdout 32 --batch_size 16 --precision fp32 "
    "--no-compile --n_epochs 1 --model ResNet20 --width 0.25"
).split()


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_keys_are_found_where_wandb_looks(no_key, monkeypatch, tmp_path):
    assert not wandb_logger.has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert wandb_logger.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not wandb_logger.has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_logger.has_key()


def in_a_fork(argv, cwd):
    return fork_server.call(run_to_the_end, argv, cwd=cwd)


def run_to_the_end(argv):
    fork_server.command(argv)
    atexit._run_exitfuncs()  # as an interpreter would: there wandb waits


def in_an_interpreter(argv, cwd):
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


@pytest.mark.parametrize(
    "run", [in_a_fork, pytest.param(in_an_interpreter, marks=pytest.mark.slow)]
)
def test_a_run_without_key_terminal_or_mode_is_recorded_offline(run, no_key, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))  # a copy of the weights goes there
    flags = [*FAST, "--regularizer", "L2Grad", "--watch", "--watch_freq", 2, "--n_epochs", 2]
    flags += ["--wandb_group", "g", "--wandb_tags", "a", "b", "--wandb_notes", "why", "--log_model"]
    completed = run([train.__file__, *map(str, flags)], tmp_path)  # epochs of two batches
    assert completed.returncode == 0, completed.stderr
    assert "wandb leet" in completed.stdout and "wandb sync" in completed.stdout
    [log] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    logged = read_log(log)
    rows = logged["history"]
    check_columns(logged, json.loads(Path(tmp_path, "ResNet20_Synthetic_L2Grad.json").read_text()))
    epoch, _ = [row for row in rows if "train_loss" in row]
    assert {
        "train_loss",
        "test_loss",
        "train_accuracy",
        "test_accuracy",
        "train_L2Grad",
        "test_L2Grad",
        "lr",
        "epoch_seconds",
        "epoch",
    } <= epoch.keys()
    every = [row for row in rows if "parameters/classifier.bias" in row]
    assert [row["epoch"] for row in every] == [1, 2]  # the last batch of an epoch once
    watched = every[-1]
    for name, p in ResNet20(width=0.25).named_parameters():
        for kind in ("parameters", "gradients"):
            histogram = watched[f"{kind}/{name}"]
            assert histogram["_type"] == "histogram" and sum(histogram["values"]) == p.numel()
            assert len(histogram["bins"]) == len(histogram["values"]) + 1
    _, drawn = runpy.run_path(EPOCHS)["logged_histograms"](str(log), "classifier.bias")
    histogram = watched["parameters/classifier.bias"]
    assert (drawn.epoch, [*drawn.edges]) == (watched["epoch"], histogram["bins"])
    assert [*drawn.counts] == histogram["values"]


def check_columns(logged, record):
    """Of a training: what its runs are grouped, filtered, sorted and linked by."""
    names = {"job_type": "train", "group": "g", "tags": ["a", "b"], "notes": "why"}
    assert names.items() <= logged["run"].items() and logged["run"]["id"] == record["run_id"]
    settings = {k: v for k, v in record["settings"].items() if v not in (None, [], "")}
    assert settings.items() <= logged["config"].items()
    assert set(logged["config"]) - set(settings) <= {"git_commit", "git_uncommitted_changes"}
    assert logged["config"].get("git_commit") == record["git_commit"]
    accuracies = [entry["test_accuracy"] for entry in record["history"]]
    expected = {
        "final_accuracy": record["final_accuracy"],
        "best_accuracy": max(accuracies),
        "best_epoch": accuracies.index(max(accuracies)),
        "total_seconds": record["seconds"],
    }
    assert expected.items() <= logged["summary"].items()
    [weights] = logged["artifacts"]
    assert {key: weights[key] for key in ("name", "digest")} == record["artifact"]
    assert weights["name"] == f"weights-{record['run_id']}" and weights["run_id"] in weights["name"]


def test_what_is_no_log_is_refused_in_one_line(tmp_path):
    read = runpy.run_path(EPOCHS)["logged_histograms"]
    log = tmp_path / "x.wandb"
    for _ in range(2):  # without a file, and with one that holds something else
        with pytest.raises(SystemExit, match=r"x\.wandb is not a log") as error:
            read(str(log), "classifier.bias")
        assert "\n" not in str(error.value)
        log.write_bytes(b"not a log")


def test_online_without_a_key_goes_on_offline(script, no_key):
    completed = script("train.py", *FAST, WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert completed.returncode == 0, completed.stderr
    assert "Weights & Biases, online:" in completed.stderr and "saved" in completed.stdout


def test_disabled_writes_nothing(script, tmp_path):
    completed = script("train.py", *FAST, WANDB_MODE="disabled")
    assert completed.returncode == 0 and not (tmp_path / "wandb").exists()


class Broken:
    """A wandb run, and wandb, whose every call raises or hangs."""

    disabled = offline = False
    id = "x"

    def __init__(self, call):
        self.log = self.finish = self.teardown = call


def fail():
    raise ConnectionError("gone")


@pytest.mark.parametrize("call", [lambda *_: fail(), lambda *_: time.sleep(60)])
def test_a_logger_that_breaks_is_told_and_left_in_bounded_time(call, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(wandb_logger, "LOG_SECONDS", 0.2)
    monkeypatch.setattr(wandb_logger, "FINISH_SECONDS", 0.1)
    tracker = object.__new__(wandb_logger.WandbLogger)
    tracker.run = tracker.wandb = Broken(call)
    tracker.healthy, tracker.folder = True, tmp_path / "run-1-x"
    monkeypatch.setattr(tracker, "failed_modes", set(), raising=False)
    tracker.folder.mkdir()
    started_at = time.monotonic()
    for epoch in range(9):
        tracker.log({"epoch": epoch})
    assert capsys.readouterr().err.count("Weights & Biases: ") == 1
    tracker.close()
    opening = wandb_logger.how_to_open([tracker])
    assert f"wandb sync {tracker.folder}" in opening and time.monotonic() - started_at < 5


def test_the_environment_is_described():
    described = environment.describe_environment()
    assert described["versions"]["torch"] == torch.__version__.split("+")[0]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(environment.__file__).parent,
    )
    assert described["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert described["machine"]["threads"] == torch.get_num_threads()
    json.dumps(described)


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.describe_environment()["git_commit"] is None


@pytest.mark.parametrize(
    ("value", "mode", "left", "line"),
    [
        (None, "", None, ""),
        ("", "", None, ""),
        (" Disabled", "disabled", "disabled", ""),
        ("dryrun", "offline", "offline", ""),
        ("of", "", None, "WANDB_MODE='of' is left out: it is none of online, offline, disabled\n"),
    ],
)
def test_a_mode_that_wandb_does_not_know_stops_no_logging(
    value, mode, left, line, monkeypatch, capsys
):
    monkeypatch.delenv("WANDB_MODE")
    if value is not None:
        monkeypatch.setenv("WANDB_MODE", value)
    assert wandb_logger.environment_mode() == mode
    wandb_logger.settle_environment()
    assert (os.environ.get("WANDB_MODE"), capsys.readouterr().err) == (left, line)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--watch", "--watch_freq", "3"], "--watch_freq 3: the run has 2 batches"),
        (["--wandb_project", "a/b"], "'a/b' has a /, which no project's name has"),
        (["--wandb_project", "a" * 129], "is not 1 to 128 printable characters"),
    ],
)
def test_what_would_not_be_logged_is_refused(flags, line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(SystemExit) as end:
        train.main([*FAST, *flags])
    assert end.value.code == 2 and line in capsys.readouterr().err


def test_a_run_that_is_resumed_has_failed_no_more(monkeypatch):
    def summary_after_start(resumed):
        run = Mock(disabled=False, resumed=resumed, dir="wandb/r/files")
        monkeypatch.setattr("wandb.init", lambda **_: run)
        monkeypatch.setattr(wandb_logger.WandbLogger, "failed_modes", set())
        wandb_logger.WandbLogger(train.make_parser().parse_args([]), "train", "r", {}, "id")
        return run.summary.update.call_args_list

    assert summary_after_start(True) == [call({"failure": None})]
    assert summary_after_start(False) == []


def test_a_run_of_a_sweep_has_the_name_the_sweep_gave(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert wandb_logger.new_run_id() != "abc123"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert wandb_logger.new_run_id() == "abc123"
    args = train.make_parser().parse_args([])
    assert train.default_name(args, "L2Grad") == "ConvNet_CIFAR10_L2Grad_abc123"
