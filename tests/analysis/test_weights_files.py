import json
import math
from pathlib import Path

import pytest
import torch

import data
import quant_inference as qi
from analysis.weights_files import common_image_size, find_weights, read_record
from engine.system.errors import DataError
from engine.system.io import save_weights
from engine.training.checkpoints import save_checkpoint
from models import MODELS, ConvNet

SETTINGS = {"model": "ConvNet", "dataset": "Synthetic", "regularizer": "L2Grad", "lmbda": 0.01}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder, and a Synthetic data set of a few images."""
    small = data.subset(data.subset(data.synthetic(), 32), 10, "test")
    monkeypatch.setitem(data.DATASETS, "Synthetic", lambda data_dir, seed: small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name, **settings):
    """Save a network and its record."""
    torch.manual_seed(0)
    save_weights(ConvNet(), Path(f"{name}.pt"))
    record = {"settings": SETTINGS | {"seed": 7} | settings, "run_id": "abc"}
    Path(f"{name}.json").write_text(json.dumps(record))


def main(*arguments):
    """Quantize to 8 bits; return the exit code and the rows."""
    with pytest.raises(SystemExit) as caught:
        flags = ("--bits", 8, "--schemes", "uniform", "--no_plots", "--output", "out")
        qi.main(list(map(str, (*arguments, *flags))))
    path = Path("out/results.json")
    return caught.value.code, json.loads(path.read_text())["rows"] if path.exists() else []


def test_globs_and_names(folder):
    for path in ("a/net.pt", "b/net.pt", "b/[1].pt", "net.1", "net.2"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    files = find_weights(["*/net.pt", "a/net.pt", "b/[1].pt", "c*.pt", "net.[12]"])
    assert {name: file.path for name, file in files.items()} == {
        "a/net.pt": Path("a/net.pt"),
        "b/net.pt": Path("b/net.pt"),
        "[1]": Path("b/[1].pt"),
        "c*": Path("c*.pt"),
        "net.1": Path("net.1"),
        "net.2": Path("net.2"),
    }
    assert len(find_weights(["x.pt", "d/x.pt", "x.pt.pt"])) == 3  # one's name, the other's path


def test_the_record_gives_data_set_model_and_provenance(folder, monkeypatch):
    class Other(ConvNet):
        pass

    monkeypatch.setitem(MODELS, "Other", Other)
    save("a", model="Other")
    save("b", regularizer="none")
    made = []
    real = qi.make_model
    monkeypatch.setattr(
        qi, "make_model", lambda name, *rest: made.append(name) or real(name, *rest)
    )
    code, rows = main("a.pt", "b.pt")
    assert code == 0 and set(made) == {"Other", "ConvNet"}
    expected = [("abc", "L2Grad", 0.01, 7)] * 2 + [("abc", "none", None, 7)] * 2
    assert [(r["run_id"], r["regularizer"], r["lmbda"], r["seed"]) for r in rows] == expected
    assert {(r["per_channel"], r["fold_bn"]) for r in rows} == {(False, False)}


def test_a_data_set_other_than_that_of_the_training_is_told(folder, capsys):
    save("a", dataset="CIFAR10")
    assert main("a.pt", "--dataset", "Synthetic")[0] == 0
    assert "a.pt was trained on CIFAR10, not on Synthetic" in capsys.readouterr().err
    save("b")
    assert main("a.pt", "b.pt")[0] == 1
    assert "a.pt on CIFAR10, b.pt on Synthetic: quantize them one" in capsys.readouterr().err
    save("c", dataset="Fantasia")
    assert main("c.pt")[0] == 1
    assert "c.pt was trained on Fantasia, which is not here" in capsys.readouterr().err


def test_images_of_another_folder_were_not_trained_on(folder):
    save("a", dataset="ImageFolder", data_dir="mine")
    [file] = find_weights(["a.pt"]).values()
    assert file.n_trained_on("ImageFolder", "./mine", 5, n_before=27) == 5
    assert file.n_trained_on("ImageFolder", "others", 5, n_before=27) == 0


@pytest.mark.parametrize(
    ("settings", "n_trained_on"),
    [
        ({}, 5),
        ({"holdout": 2}, 3),
        ({"holdout": 5}, 0),
        ({"holdout": 9}, 0),
        ({"train_subset": 27}, 0),  # of 32
        ({"train_subset": 30}, 3),
        ({"train_subset": 30, "holdout": 4}, 1),
        ({"dataset": "CIFAR10"}, 0),
        ({"holdout": "x"}, 5),
    ],
)
def test_held_out_images_that_were_trained_on_are_told(folder, settings, n_trained_on, capsys):
    save("a", **settings)
    [file] = find_weights(["a.pt"]).values()
    assert file.n_trained_on("Synthetic", "data", 5, n_before=27) == n_trained_on
    if settings.get("holdout") == 2:
        assert main("a.pt", "--holdout", 5)[0] == 0
        assert "a.pt was trained on 3 of the 5 images that --hold" in capsys.readouterr().err
        assert main("a.pt", "--holdout", 2)[0] == 0
        assert "trained on" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--test_subset", 5)])
def test_a_baseline_other_than_the_record_says_is_told(folder, capsys, flags):
    save("a")
    record = json.loads(Path("a.json").read_text())
    Path("a.json").write_text(json.dumps(record | {"final_accuracy": 0.95}))
    assert main("a.pt", *flags)[0] == 0
    assert ("its record says 95.00%" in capsys.readouterr().err) == (not flags)


def test_the_size_of_images_is_taken_from_the_records(folder):
    for name, size in {"a": 64, "b": 64, "c": 32}.items():
        save(name, image_size=size, dataset="ImageFolder")
    save("d", image_size="x", dataset="CIFAR10")
    files = find_weights([f"{name}.pt" for name in "abcd"])
    assert common_image_size([files[name] for name in "abd"], "ImageFolder") == 64
    assert common_image_size([files["d"]], "CIFAR10") is None
    with pytest.raises(DataError, match="32 and 64 pixels: choose --image_size"):
        common_image_size(files.values(), "ImageFolder")


def test_a_size_without_effect_is_ignored(folder, capsys):
    save("a")
    assert main("a.pt", "--image_size", "64")[0] == 0
    assert "--image_size (needs --dataset ImageFolder)" in capsys.readouterr().err


def test_a_checkpoint_is_quantized_as_its_weights_are(folder):
    save("a")
    content = {"net": torch.load("a.pt"), "settings": SETTINGS, "run_id": "xyz"}
    save_checkpoint(content, Path("b.ckpt"))
    code, rows = main("a.pt", "b.ckpt")
    assert code == 0 and [r["checkpoint"] for r in rows] == ["a", "a", "b.ckpt", "b.ckpt"]
    assert [r["loss"] for r in rows[:2]] == [r["loss"] for r in rows[2:]]
    assert rows[3]["run_id"] == "xyz" and rows[3]["regularizer"] == "L2Grad"


def test_hostile_settings_are_left_out(folder):
    save("a", model=["ConvNet"], seed={"a": 1}, run_name="x")
    content = {"net": {}, "settings": {3: "x", "seed": torch.ones(3), "lmbda": 2.0}, "run_id": "r"}
    save_checkpoint(content, Path("b.ckpt"))
    a, b = find_weights(["a.pt", "b.ckpt"]).values()
    assert a.setting("model") is None and a.setting("seed") is None and a.setting("run_name") == "x"
    assert b.record["settings"] == {"lmbda": 2.0} and b.record["run_id"] == "r"


@pytest.mark.parametrize("width", ["x", -1, math.nan, math.inf, 1e9, True])
def test_a_width_that_no_network_has_is_refused(folder, width, capsys):
    save("a", model="VGGSmall", width=width)
    assert main("a.pt")[0] == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "error: the record of a.pt: width '" in message


@pytest.mark.parametrize("content", ["", "[1]", '{"settings": 3}', "\x00", "[" * 100_000])
def test_what_is_no_record_is_none_and_said(folder, content, capsys):
    Path("a.json").write_text(content)
    assert read_record(Path("a.pt")) == {} == read_record(Path("missing.ckpt"))
    assert "a.json is ignored: it is damaged, or no record" in capsys.readouterr().err


def test_the_network_of_the_record_decides_whether_width_has_an_effect(folder, capsys):
    torch.manual_seed(0)
    save_weights(MODELS["VGGSmall"](width=0.02), Path("a.pt"))
    for settings, flags in (
        ({"width": 0.02}, []),
        ({"width": 0.02}, ["--model", "vggsmall"]),
        ({"width": 1.0}, ["--width", 0.02]),
        ({}, ["--width", 0.02]),
    ):
        record = {"settings": SETTINGS | {"model": "VGGSmall"} | settings}
        Path("a.json").write_text(json.dumps(record))
        assert main("a.pt", *flags)[0] == 0
        assert "without effect" not in capsys.readouterr().err
    save("b")
    assert main("b.pt", "--width", 0.02)[0] == 0
    assert "without effect: --width (needs --model" in capsys.readouterr().err


def test_another_size_of_images_is_warned_about(folder, monkeypatch, capsys):
    small = data.DATASETS["Synthetic"]("", 0)
    monkeypatch.setitem(data.DATASETS, "Sized", lambda data_dir, seed, image_size: small)
    save("a", dataset="Sized", image_size=48)
    assert main("a.pt", "--image_size", 32)[0] == 0
    assert "a.pt was trained on images of 48 pixels, not of 32" in capsys.readouterr().err
    save("a", dataset="Synthetic", image_size=224)  # which Synthetic has not
    assert main("a.pt", "--dataset", "Sized", "--image_size", 32)[0] == 0
    told = capsys.readouterr().err
    assert "a.pt was trained on Synthetic, not on Sized" in told and "pixels" not in told


def test_a_size_that_no_image_has_is_refused(folder, monkeypatch, capsys):
    small = data.DATASETS["Synthetic"]("", 0)
    monkeypatch.setitem(data.DATASETS, "Sized", lambda data_dir, seed, image_size: small)
    save("a", dataset="Sized", image_size=10**9)
    assert main("a.pt")[0] == 1
    assert "the record's image_size '1000000000' is not a whole" in capsys.readouterr().err
