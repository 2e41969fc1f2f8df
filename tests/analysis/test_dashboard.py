import json
from pathlib import Path

import pytest
from wandb_log import read_log

import combined_protocol
import flags as all_flags
import quant_inference
import study
import train
from analysis import dashboard, report
from analysis.weights_files import WeightsFile, find_weights, read_record
from engine.system import wandb_logger
from engine.system.cli import Parser
from engine.system.environment import describe_code
from engine.system.io import save_weights
from engine.training.resume import MAY_CHANGE_ON_RESUME
from models import ConvNet

MAINS = (train, combined_protocol, quant_inference)


def make_rows():
    """The full network, two bit-widths with full activations, and one with 8-bit ones."""
    trials = {
        ("none", 32, 32): 0.9,
        ("uniform", 4, 32): 0.5,
        ("uniform", 3, 32): 0.25,
        ("pwlq", 4, 32): 0.75,
        ("uniform", 4, 8): 0.4,
    }
    return [
        report.make_row("a/net", scheme, bits, [report.Trial(x, 1.0, 2.0)], 0.9, act_bits=act_bits)
        for (scheme, bits, act_bits), x in trials.items()
    ]


def test_the_summary_has_a_column_for_every_scheme_and_bit_width():
    summary = dashboard.summary(make_rows())
    assert {k: v for k, v in summary.items() if k.startswith("accuracy/")} == {
        "accuracy/full": 0.9,
        "accuracy/uniform/4": 0.5,
        "accuracy/uniform/3": 0.25,
        "accuracy/pwlq/4": 0.75,
        "accuracy/uniform/4,8": 0.4,
    }
    assert summary["accuracy_drop/uniform/3"] == pytest.approx(0.65)
    assert summary["squared_error/pwlq/4"] == 2.0 and "accuracy_drop/full" not in summary


def test_curves_are_against_bits_with_one_for_each_number_of_activation_bits():
    three, four = dashboard.curves(make_rows(), [32, 8])
    assert (three["bits"], four["bits"]) == (3, 4)
    assert three["accuracy/uniform"] == 0.25 and "accuracy/pwlq" not in three
    assert four["accuracy/uniform"] == 0.5 and four["accuracy/uniform/act_8"] == 0.4
    assert four["accuracy_drop/pwlq"] == pytest.approx(0.15)
    same = [row | {"act_bits": row["bits"]} for row in make_rows()[:3]]
    points = dashboard.curves(same, ["same", 4])  # a point of both is on both curves
    assert [point["accuracy/uniform/act_same"] for point in points] == [0.25, 0.5]
    assert [point.get("accuracy/uniform/act_4") for point in points] == [None, 0.5]
    assert [*dashboard.curves(same[1:2], [])[0]][1] == "accuracy/uniform/act_4"


def test_configs_have_no_empty_entries():
    config = {"a": None, "b": [], "c": "", "d": {"e": None}, "f": 0, "g": False, "h": [0], "i": ()}
    assert wandb_logger.without_empty(config) == {"f": 0, "g": False, "h": [0]}


@pytest.mark.parametrize("content", [None, "", "[", "[1]", '{"settings": 3}', "[" * 100_000])
def test_a_record_that_is_none_names_no_training(content, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert dashboard.describe_training(read_record(tmp_path / "a.pt")) == {}


@pytest.mark.parametrize("module", MAINS)
def test_the_flags_are_the_same_in_every_script(module, capsys):
    flags = ["x.pt"] if module is quant_inference else []
    given = ["--wandb_group", "my study", "--wandb_tags", "a", "b", "--wandb_notes", "why\nhow"]
    args = module.make_parser().parse_args([*flags, *given, "--log_model"])
    assert (args.wandb_group, args.wandb_tags, args.wandb_notes, args.log_model) == (
        "my study", ["a", "b"], "why\nhow", True
    )  # fmt: skip
    for flag, value in (("--wandb_tags", "x" * 65), ("--wandb_group", ""), ("--wandb_tags", "\0")):
        with pytest.raises(SystemExit):
            module.make_parser().parse_args([*flags, flag, value])
        assert f"{value!r} is not 1 to" in capsys.readouterr().err


def test_a_resumed_run_may_be_logged_elsewhere_and_otherwise():
    parser = Parser("")
    parser.add_flags(all_flags.WANDB)
    flags = vars(parser.parse_args([])).keys()
    assert {"wandb_group", "log_model"} <= flags <= MAY_CHANGE_ON_RESUME


def test_flags_without_effect_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(train, "run", lambda args, *_: started.append(args))
    flags = ["--wandb_group", "g", "--wandb_tags", "t", "--wandb_notes", "n", "--log_model"]
    train.main(flags)  # WANDB_MODE is disabled in tests
    [line] = capsys.readouterr().err.splitlines()
    assert "without effect" in line and not started[0].log_model
    assert all(flag in line for flag in flags if flag.startswith("--"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    train.main(flags)
    assert capsys.readouterr().err == "" and started[1].log_model


def test_jobs_of_a_study_have_its_name_as_group(tmp_path, capsys):
    flags = ["--plan", "--epoch_seconds", "1", "--only", "l2grad", "--seeds", "0"]
    study.main([*flags, "--out", str(tmp_path / "mine")])
    jobs = [line for line in capsys.readouterr().out.splitlines() if "python" in line]
    assert jobs and all(line.endswith("--wandb_group mine") for line in jobs)


def test_a_quantization_names_its_training_and_uses_its_weights(monkeypatch, tmp_path):
    import wandb

    wandb.teardown()  # else it keeps the folder of an earlier test of this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(wandb_logger.WandbLogger, "failed_modes", set())
    Path("net.pt").write_bytes(b"weights")
    settings = {"run_name": "n", "regularizer": "L2Grad", "lmbda": 0.1, "init_from": None}
    record = {"settings": settings, "run_id": "abc123", "final_accuracy": 0.5, "history": []}
    Path("net.json").write_text(json.dumps(record))
    flags = ["net.pt", "--wandb_group", "g", "--wandb_tags", "q", "--log_model"]
    args = quant_inference.make_parser().parse_args(flags)
    origin = {"checkpoint": "net", **dict.fromkeys(report.PROVENANCE)}
    rows = [row | origin for row in make_rows()]
    lines = dashboard.log_quantizations(
        args, vars(args), find_weights(["net.pt"]), report.Results(rows), {}
    )

    [folder] = tmp_path.glob("wandb/offline-run-*")
    assert f"wandb sync {folder.relative_to(tmp_path)}" in lines
    run = read_log(folder)
    expected = {"job_type": "quantize", "group": "g", "tags": ["q"], "name": "quantize_net"}
    assert expected.items() <= run["run"].items()
    training = {k: v for k, v in settings.items() if v is not None}
    assert run["config"]["training"] == training | {"run_id": "abc123", "final_accuracy": 0.5}
    assert run["config"]["checkpoints"] == ["net.pt"]
    assert run["config"].get("git_commit") == describe_code()["git_commit"]
    assert not [key for key, value in run["config"].items() if value in (None, "", [], {})]
    assert dashboard.summary(rows).items() <= run["summary"].items()
    assert run["summary"]["results"]["nrows"] == len(rows)
    curves = {name for point in dashboard.curves(rows, []) for name in point}
    assert not curves & run["summary"].keys()  # each would be a key for the last bit-width
    for logged, point in zip(run["history"], dashboard.curves(rows, []), strict=False):
        assert point.items() <= logged.items()
    [used] = [each for each in run["artifacts"] if each["type"] == "model"]
    assert used["name"] == "weights-abc123" and used["use_after_commit"] and used["user_created"]


def test_weights_that_were_changed_are_not_linked(monkeypatch, capsys, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    save_weights(ConvNet(), tmp_path / "net.pt")
    logger, linked = object.__new__(wandb_logger.WandbLogger), []

    class OfflineRun:
        disabled, offline = False, True

        def _log_artifact(self, artifact, **options):
            linked.append(artifact.name)

    logger.wandb, logger.run, logger.log_model, logger.healthy = wandb, OfflineRun(), False, True
    draft = logger._draft_artifact(tmp_path / "net.pt", "weights-x")
    record = {"artifact": {"name": "weights-x", "digest": draft.digest}}
    dashboard.use_weights(logger, WeightsFile(tmp_path / "net.pt", record))
    assert linked == ["weights-x"] and capsys.readouterr().err == ""
    dashboard.use_weights(
        logger, WeightsFile(tmp_path / "net.pt", {"run_id": "x"})
    )  # not logged, no flag
    save_weights(ConvNet(), tmp_path / "net.pt")
    dashboard.use_weights(logger, WeightsFile(tmp_path / "net.pt", record))
    assert linked == ["weights-x"]
    assert "net.pt is no longer what its training logged" in capsys.readouterr().err
