import csv
import json
import math
import os
import signal
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

import data
import models
import quant_inference as qi
import quant_utils as qu
from analysis import measured_network
from analysis.measured_network import Conditions, Images, MeasuredNetwork
from engine.networks import layers
from engine.networks.export import export_network
from engine.networks.folding import batch_norms
from engine.quantization.weights import model_error, quantize_model, quantize_weights
from engine.system import progress
from engine.system.errors import NetworkError
from engine.system.io import save_weights
from models import ConvNet

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Work in an empty folder with 48 test and 96 training images and a small ConvNet.

    On one thread.
    """
    monkeypatch.setattr(ConvNet, "BLOCKS", ((3, 8, 1), (8, 8, 2), (8, 16, 1), (16, 16, 2)))
    whole = data.synthetic()
    small = data.ImageDataset(
        whole.train_images[:96],
        whole.train_labels[:96],
        whole.test_images[:48],
        whole.test_labels[:48],
        mean=whole.mean,
        std=whole.std,
    )
    monkeypatch.setitem(data.DATASETS, "Synthetic", lambda data_dir, seed: small)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield small
    torch.set_num_threads(threads)


def make_net(seed=0):
    torch.manual_seed(seed)
    net = ConvNet().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.05, 0.3)
    return net


def main(*arguments, plots=False):
    """Run the script in this process; return its exit code."""
    common = ["--dataset", "synthetic", "--device", "cpu", *["--no_plots"] * (not plots)]
    with pytest.raises(SystemExit) as caught:
        qi.main([*map(str, arguments), *common])
    return caught.value.code


def results(folder="."):
    return json.loads(Path(folder, "results.json").read_text())


# --- from end to end -------------------------------------------------------------------------


def test_train_then_quantize(script, tmp_path):
    common = ["--dataset", "Synthetic", "--device", "cpu"]
    trained = script(
        "train.py",
        "--run_name",
        "control",
        "--n_epochs",
        1,
        "--train_subset",
        128,
        "--model",
        "VGGSmall",
        "--width",
        0.125,
        "--no-compile",
        *common,
    )
    assert trained.returncode == 0, trained.stderr
    done = script(
        "quant_inference.py",
        "control.pt",
        "--n_epochs",
        1,
        "--lr",
        0.1,
        "--bits",
        8,
        4,
        "--schemes",
        "uniform",
        "PWLQ",
        "--output",
        "out",
        *common,
    )
    assert done.returncode == 0, done.stderr
    assert "--n_epochs is ignored" in done.stderr and "--lr is ignored" in done.stderr
    assert "Traceback" not in done.stderr

    rows = results(tmp_path / "out")["rows"]
    assert [(r["scheme"], r["bits"], r["levels"]) for r in rows] == [
        ("none", 32, None),
        ("uniform", 4, 16),
        ("uniform", 8, 256),
        ("pwlq", 4, 31),
        ("pwlq", 8, 511),
    ]
    record = json.loads((tmp_path / "control.json").read_text())
    assert rows[0]["accuracy"] == pytest.approx(record["final_accuracy"], abs=0.003)
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        in_csv = list(csv.DictReader(file))
    assert [float(r["accuracy"]) for r in in_csv] == [r["accuracy"] for r in rows]
    assert done.stdout.index("none") < done.stdout.index("uniform") < done.stdout.index("pwlq")
    for name in ("accuracy.png", "weights_control.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)


def test_rows_are_what_the_quantizers_say(tiny, capsys):
    save_weights(make_net(), Path("a.pt"))
    flags = ["a.pt", "--bits", 3, "--trials", 2, "--seed", 5]
    assert main(*flags) == 0
    rows = results()["rows"]
    assert [r["scheme"] for r in rows] == ["none", "uniform", "dorefa", "pwlq"]
    for row in rows[1:]:
        assert row["accuracy_change"] == row["accuracy"] - rows[0]["accuracy"]
        assert (row["accuracy_std"] is None) == (row["scheme"] != "dorefa")
        assert row["trials"] == (2 if row["scheme"] == "dorefa" else 1)
    for row, quantizer, source in ((rows[1], qu.uniform, "weight"), (rows[3], qu.pwlq, "own")):
        net_q, layers = quantize_model(make_net(), quantizer, 3, bias_range=source)
        assert row["squared_error"] == model_error(layers)
        images = tiny.test_images / 255
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (tiny.mean, tiny.std))
        with torch.no_grad():
            logits, _ = net_q((images - mean) / std)
        n_correct = (logits.argmax(1) == tiny.test_labels).sum().item()
        assert row["accuracy"] == n_correct / len(images)
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, tiny.test_labels).item(), 1e-4)
    first = capsys.readouterr().out
    assert main(*flags) == 0
    assert results()["rows"] == rows and capsys.readouterr().out == first


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_channel"],
        ["--overlapping"],
        ["--distribution", "laplace"],
        ["--approximate"],
        ["--distribution", "search"],
        ["--fold_bn"],
        ["--bias_correction"],
        ["--mean_correction"],
        ["--avg_in_layer"],
        ["--act_bits", "3"],
        ["--act_bits", "same", "--calibration", "percentile"],
        ["--biases", "full"],
        ["--biases", "weight"],
        ["--act_bits", "3", "--calibration", "minmax", "--calibration_images", "70"],
        ["--recalibrate_bn_images", "64"],
    ],
    ids=" ".join,
)
@pytest.mark.sampled(3)
def test_every_option_changes_the_result(tiny, flags):
    save_weights(make_net(), Path("a.pt"))
    common = ["a.pt", "--bits", 4, "--schemes", "pwlq"]
    assert main(*common) == 0
    plain = results()["rows"]
    assert main(*common, *flags) == 0
    changed = results()["rows"]
    assert plain[0]["accuracy"] == changed[0]["accuracy"]
    of_other_values = ("--act_bits", "--recalibrate_bn_images", "--biases")
    key = "loss" if flags[0] in of_other_values else "squared_error"
    assert plain[1][key] != changed[1][key] and math.isfinite(changed[1]["loss"])


def test_biases_as_published_keep_full_precision_or_stay_on_the_weights_grid(tiny, capsys):
    net = make_net()
    net.classifier.bias.data.normal_()
    save_weights(net, Path("a.pt"))
    graph, quantized = export_network(net, (3, 32, 32)), {}
    for biases in ("published", "weight", "full"):
        flags = ["a.pt", "--biases", biases, "--bits", "3", "--schemes", "dorefa", "pwlq"]
        for how in qi.make_quantizations(qi.make_parser().parse_args(flags)):
            graph_q, _ = quantize_weights(
                graph, how.make_quantizer(0), how.n_bits, **how.layer_options()
            )
            quantized[biases, how.scheme] = graph_q.classifier.bias
    b, w = net.classifier.bias.detach(), net.classifier.weight
    assert all(torch.equal(quantized["full", scheme], b) for scheme in ("dorefa", "pwlq"))
    assert torch.equal(quantized["published", "pwlq"], qu.pwlq(b, 3))
    assert torch.equal(quantized["weight", "pwlq"], qu.pwlq(b, 3, range_source=w))
    assert torch.equal(quantized["published", "dorefa"], quantized["weight", "dorefa"])
    largest = quantized["published", "dorefa"].abs().max()
    assert largest <= (1 + 1e-6) * w.abs().max() < b.abs().max()
    assert main("a.pt", "--bits", 8, "--schemes", "dorefa", "pwlq") == 0
    said = "biases: on their weights' grids (dorefa); with a range of their own (pwlq)"
    assert said in capsys.readouterr().out


def test_ranges_of_bits_and_several_bits_of_activations(tiny):
    save_weights(make_net(), Path("a.pt"))
    flags = ["--bits", "3-4", 8, "--act_bits", "same", 8, "--schemes", "uniform"]
    assert main("a.pt", *flags, plots=True) == 0
    pairs = [(row["bits"], row["act_bits"]) for row in results()["rows"][1:]]
    assert pairs == [(3, 3), (3, 8), (4, 4), (4, 8), (8, 8)]
    assert Path("accuracy.png").read_bytes().startswith(PNG)


def test_without_a_terminal_it_prints_how_far_it_is(tiny, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", "--bits", 4, "--schemes", "uniform") == 0
    device, *lines = capsys.readouterr().out.splitlines()
    assert device == "device: cpu"
    assert lines[0].startswith("a: network 1 of 2, ") and lines[0].endswith(" s left")
    assert lines[1].startswith("a: network 2 of 2, 0 s left")


def test_what_is_counted_after_the_end_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with progress.StepDisplay(1, "network") as display:
        display.step()
    display.step()  # --export measures once more
    assert capsys.readouterr().out.count("network") == 1


def test_the_first_test_images_are_enough_for_a_quick_look(tiny, capsys):
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", "--bits", 4, "--schemes", "uniform", "--test_subset", 5) == 0
    n_correct = [5 * row["accuracy"] for row in results()["rows"]]
    assert n_correct == pytest.approx([round(n) for n in n_correct])
    assert main("a.pt", "--test_subset", 49) == 2
    assert "--test_subset 49: choose 1 to 48 images" in capsys.readouterr().err


def test_bfloat16_convolutions_only_blur_the_loss(tiny):
    save_weights(make_net(), Path("a.pt"))
    rows = {}
    for precision in ("fp32", "bf16"):
        flags = ["--bits", 4, "--schemes", "uniform", "--precision", precision]
        assert main("a.pt", *flags) == 0
        rows[precision] = results()["rows"]
    for full, half in zip(rows["fp32"], rows["bf16"], strict=True):
        assert half["squared_error"] == full["squared_error"]
        assert half["loss"] != full["loss"] == pytest.approx(half["loss"], rel=0.01)


def test_16_bits_everywhere_are_as_good_as_none(tiny):
    save_weights(make_net(), Path("a.pt"))
    flags = ["--act_bits", 16, "--calibration", "minmax", "--fold_bn", "--per_channel"]
    assert main("a.pt", "--bits", 16, *flags) == 0
    full, *rows = results()["rows"]
    assert all(row["loss"] == pytest.approx(full["loss"], abs=1e-3) for row in rows)
    assert {row["act_bits"] for row in rows} == {16} and full["act_bits"] == 32


def test_folding_for_evaluation_after_quantizing_changes_no_output(tiny):
    net, _ = quantize_model(make_net(), qu.uniform, 3)
    x = torch.randn(4, 3, 32, 32)
    graph = export_network(net, (3, 32, 32))
    conditions = Conditions("cpu")
    network = MeasuredNetwork("a", graph, net, conditions, Images(test=None))
    with torch.no_grad():
        torch.testing.assert_close(network.prepared(graph)(x), net(x)[0], rtol=1e-4, atol=1e-4)
    assert batch_norms(graph) and not batch_norms(network.prepared(graph))


# --- files -----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_network_that_cannot_run_gets_a_line_and_the_others_are_evaluated(
    tiny, capsys, monkeypatch
):
    def failing(network, *rest):
        if network.name == "a":
            raise NetworkError("it cannot run")
        return sweep(network, *rest)

    sweep = qi.sweep
    monkeypatch.setattr(qi, "sweep", failing)
    for name in "ab":
        save_weights(make_net(), Path(f"{name}.pt"))
    assert main("a.pt", "b.pt", "--bits", 4, "--schemes", "uniform") == 1
    assert "a.pt: it cannot run" in capsys.readouterr().err
    assert {row["checkpoint"] for row in results()["rows"]} == {"b"}


def test_bad_files_get_a_line_each_and_the_others_are_evaluated(tiny, capsys):
    net = make_net()
    save_weights(net, Path("good.pt"))
    whole = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("not a checkpoint")
    Path("empty.pt").touch()
    Path("folder.pt").mkdir()
    torch.save(nn.Linear(3, 2).state_dict(), "other.pt")
    torch.save({"weights": Evil()}, "evil.pt")
    torch.save([1, 2], "list.pt")
    net.layer3[0].weight.data[0, 0, 0, 0] = math.nan
    save_weights(net, Path("nan.pt"))
    broken = make_net().state_dict()
    torch.save({**broken, "layer0.1.running_var": torch.full((8,), -1.0)}, "variance.pt")
    torch.save({**broken, "classifier.bias": torch.zeros(10, dtype=torch.cfloat)}, "complex.pt")
    bad = ["variance", "complex"]
    bad += ["cut", "text", "empty", "folder", "other", "evil", "list", "nan", "missing"]
    assert main("good.pt", *(f"{name}.pt" for name in bad), "--bits", 4) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == len(bad)
    assert all(f"{name}.pt" in line for name, line in zip(bad, lines, strict=True))
    assert "layer3.0.weight" in lines[bad.index("nan")]
    assert {row["checkpoint"] for row in results()["rows"]} == {"good"}
    assert not Path("executed").exists()


class Masked(nn.Sequential):
    """It has an infinite mask, and a `train` as many people write it."""

    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    def train(self, mode=True):
        super().train(mode)


def test_a_network_may_have_an_infinite_mask_and_a_train_that_returns_nothing(tiny, monkeypatch):
    monkeypatch.setitem(models.MODELS, "Masked", Masked)
    save_weights(Masked(10), Path("m.pt"))
    assert main("m.pt", "--model", "Masked", "--bits", 4, "--schemes", "uniform") == 0


def test_a_network_that_cannot_be_quantized_leaves_the_others(tiny, capsys, monkeypatch):
    plain, calls = qi.export_network, []

    def export(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise NetworkError("ConvNet cannot be exported")
        return plain(*arguments)

    monkeypatch.setattr(qi, "export_network", export)
    for name in "ab":
        save_weights(make_net(), Path(f"{name}.pt"))
    assert main("a.pt", "b.pt", "--bits", 4, "--schemes", "uniform") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "error: a.pt: ConvNet cannot be exported" in message
    assert [row["checkpoint"] for row in results()["rows"]] == ["b", "b"]


def test_calibration_does_not_depend_on_the_batch_size(tiny):
    save_weights(make_net(), Path("w.pt"))
    tables = []
    for batch_size in (7, 48):
        assert (
            main(
                "w.pt",
                "--bits",
                4,
                "--schemes",
                "uniform",
                "--act_bits",
                3,
                "--calibration_images",
                70,
                "--batch_size",
                batch_size,
            )
            == 0
        )
        tables.append([row["accuracy"] for row in results()["rows"]])
    assert tables[0] == tables[1]


def test_an_error_or_an_interruption_keeps_all_other_results(tiny, capsys, monkeypatch):
    for name in ("first", "second", "third"):
        save_weights(make_net(), Path(f"{name}.pt"))
    plain, calls = measured_network.evaluate, []

    def evaluate(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # the second file, quantized
            raise ValueError("layer3.0: cannot quantize")
        if len(calls) == 6:  # the third
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(measured_network, "evaluate", evaluate)
    flags = ("--bits", 4, "--schemes", "uniform")
    assert main("first.pt", "second.pt", "third.pt", *flags) == 130
    captured = capsys.readouterr().err
    assert "second.pt: layer3.0: cannot quantize" in captured and "stopped" in captured
    assert [(row["checkpoint"], row["scheme"]) for row in results()["rows"]] == [
        ("first", "none"),
        ("first", "uniform"),
        ("third", "none"),
    ]


def test_interrupted_before_anything_is_quantized(tiny, capsys, monkeypatch):
    save_weights(make_net(), Path("a.pt"))
    plain, calls = measured_network.evaluate, []

    def evaluate(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(measured_network, "evaluate", evaluate)
    assert main("a.pt", "--bits", 4, plots=True) == 130
    assert [row["scheme"] for row in results()["rows"]] == ["none"]
    assert "stopped" in capsys.readouterr().err and not Path("accuracy.png").exists()


def test_without_one_good_file_nothing_is_written(tiny, capsys):
    assert main("missing.pt") == 1
    assert "missing.pt" in capsys.readouterr().err and not list(Path(".").iterdir())


def test_a_name_with_and_without_suffix_is_two_files(tiny, capsys):
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", "a", "x" * 300, "--bits", 4, "--schemes", "uniform") == 1
    message = capsys.readouterr().err
    assert "a: No such file" in message and "x: File name too long" in message
    assert [row["checkpoint"] for row in results()["rows"]] == ["a.pt", "a.pt"]


def test_a_network_that_does_not_fold_is_evaluated_as_it_is(tiny, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "Reordered", reference.Reordered)
    torch.manual_seed(0)
    net = reference.Reordered(10).eval()
    net.norm.running_mean.fill_(-1.5)
    net.norm.running_var.fill_(0.01)
    save_weights(net, Path("a.pt"))
    flags = ["a.pt", "--model", "Reordered", "--bits", 8, "--schemes", "uniform"]
    assert main(*flags) == 0
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (tiny.mean, tiny.std))
    logits, _ = net((tiny.test_images / 255 - mean) / std)
    loss = F.cross_entropy(logits, tiny.test_labels).item()
    assert results()["rows"][0]["loss"] == pytest.approx(loss, rel=1e-4)
    capsys.readouterr()
    assert main(*flags, "--fold_bn") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--fold_bn: no batch norm after a convolution" in message


def test_earlier_results_are_renamed(tiny, capsys):
    save_weights(make_net(), Path("a.pt"))
    flags = ["a.pt", "--bits", 4, "--schemes", "uniform"]
    assert main(*flags, "--per_layer", "--per_layer_images", 8) == 0
    first = results()
    assert main(*flags, "--per_channel") == 0
    assert "kept as results_old1" in capsys.readouterr().err
    assert json.loads(Path("results_old1.json").read_text(encoding="utf-8")) == first
    assert Path("per_layer_old1.csv").exists() and not Path("per_layer.csv").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--recalibrate_bn_images", 97],
        ["--act_bits", 8, "--calibration_images", 97],
        ["--per_layer", "--per_layer_images", 97],
        ["--act_bits", 8, "--calibration_images", 512],
    ],
)
def test_more_images_than_there_are(tiny, capsys, flags):
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", *flags) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{flags[-2]} {flags[-1]}: there are 96 training images" in message


def test_tables_without_plots(tiny, capsys):
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", "--bits", 4, "--schemes", "uniform") == 0
    assert "plots:" not in capsys.readouterr().out and not list(Path(".").glob("*.png"))


def test_levels_of_overlapping_regions_are_unknown(tiny):
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", "--bits", 3, "--schemes", "uniform", "pwlq", "--overlapping") == 0
    assert [row["levels"] for row in results()["rows"]] == [None, 8, None]


def test_constant_and_zero_layers_give_finite_results(tiny):
    net = make_net()
    net.layer2[0].weight.data.zero_()
    net.layer3[0].weight.data.fill_(0.01)
    save_weights(net, Path("a.pt"))
    assert (
        main(
            "a.pt",
            "--bits",
            2,
            "--schemes",
            "pwlq",
            "--per_channel",
            "--bias_correction",
            "--per_layer",
            "--per_layer_images",
            8,
        )
        == 0
    )
    record = results()
    for row in record["rows"] + record["per_layer"]:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row


# --- flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schemes", "uniform", "--overlapping"], "--overlapping (needs pwlq among --schemes)"),
        (["--distribution", "search", "--approximate"], "--approximate (needs --distribution"),
        (["--schemes", "uniform", "--trials", "5"], "--trials (needs a stochastic scheme)"),
        (["--calibration", "minmax"], "--calibration (needs --act_bits)"),
        (["--bn_images", "64", "--fold_bn"], "--recalibrate_bn_images (needs batch norms"),
        (["--biases", "weight", "--fold_bn"], "--biases (needs no --fold_bn)"),
        (["--absolute_weights", "--no_plots"], "--absolute_weights (needs no --no_plots)"),
        (["--layers", "conv", "--no_plots"], "--layers (needs no --no_plots)"),
    ],
)
def test_flags_without_effect_are_named_and_ignored(flags, message, capsys):
    parser = qi.make_parser()
    args = parser.parse_args(["x.pt", *flags])
    qi.check_flags(parser, args)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed
    name = message.split()[0][2:]
    assert vars(args)[name] == parser.get_default(name)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bits", "1"], "2 to 16"),
        (["--bits", "17"], "2 to 16"),
        (["--bits", "4.5"], "2 to 16"),
        (["--bits", "8-4"], "a range of them such as 4-8"),
        (["--bits", "4-"], "a range of them such as 4-8"),
        (["--bits", "2-99999999999"], "a range of them such as 4-8"),
        (["--width", "1e9"], "--width: '1e9' is not a finite number above 0, below 100"),
        (["--bits", "1-4"], "2 to 16"),
        (["--schemes", "ternary"], "uniform, dorefa, pwlq"),
        (["--act_bits", "1"], "2 to 16"),
        (["--calibration", "mean"], "topk_median"),
        (["--trials", "0"], "at least 1"),
        (["--precision", "bf16", "--act_bits", "8"], "--act_bits needs --precision fp32"),
        (["--precision", "bf16", "--per_layer"], "--per_layer needs --precision fp32"),
        (["--dataset", "MNIST"], "CIFAR10"),
        (["--model", "VGG"], "ConvNet"),
        (["--output", "a.pt/out"], "--output"),
    ],
)
def test_bad_flags_end_with_one_line(tiny, capsys, flags, expected):
    Path("a.pt").touch()
    with pytest.raises(SystemExit) as caught:
        qi.main(["a.pt", *flags])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1 and expected in message


def test_the_old_spelling_of_a_renamed_flag_works():
    parser = qi.make_parser()
    assert parser.parse_args(["a.pt", "--bn_images", "64"]).recalibrate_bn_images == 64
    assert parser.explicit_flags == {"recalibrate_bn_images"}


def test_a_quantizer_gets_the_flags_that_it_takes(monkeypatch):
    def clipped(w, n_bits, *, per_channel=False, seed=0):
        return w.clamp(-seed, seed) if per_channel else w

    monkeypatch.setitem(qu.QUANTIZERS, "clipped", clipped)
    args = qi.make_parser().parse_args(["a.pt", "--per_channel", "--seed", "3"])
    bound = qi.bind_options(clipped, vars(args))
    assert bound.keywords == {"per_channel": True, "seed": 3}
    assert not qu.is_stochastic("clipped")


def test_no_files_end_with_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        qi.main([])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1 and "FILE" in message


# --- layer by layer --------------------------------------------------------------------------


def test_per_layer(tiny, capsys):
    save_weights(make_net(), Path("a.pt"))
    flags = ["--schemes", "uniform", "--bits", 9, "--per_layer", "--per_layer_images", 48]
    assert main("a.pt", *flags, plots=True) == 0
    rows = results()["per_layer"]
    assert [row["layer"] for row in rows] == list(layers.penalized_layers(ConvNet()))
    for row in rows:
        assert abs(row["first_order"]) <= row["first_order_bound"]
    total = sum(abs(row["loss_change"]) for row in rows)
    missed = sum(abs(row["loss_change"] - row["first_order"] - row["second_order"]) for row in rows)
    assert missed < 0.1 * total
    assert "one layer at a time" in capsys.readouterr().out
    assert len(Path("per_layer.csv").read_text().splitlines()) == 6
    assert Path("per_layer.png").read_bytes().startswith(PNG)


def test_layers_that_were_measured_are_kept_where_their_expansion_is_interrupted(
    tiny, monkeypatch, capsys
):
    def stop(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(measured_network, "taylor_terms", stop)
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", "--schemes", "uniform", "--bits", 4, "--per_layer") == 128 + signal.SIGINT
    rows = results()["per_layer"]
    assert len(rows) == 5 and all(row["first_order"] is None for row in rows)
    assert all(math.isfinite(row["loss_change"]) for row in rows)
    assert len(Path("per_layer.csv").read_text().splitlines()) == 6


def test_a_network_that_cannot_be_differentiated_twice_has_layers_without_an_expansion(
    tiny, monkeypatch, capsys
):
    class Gated(ConvNet):
        def forward(self, x):
            logits, activations = super().forward(x)
            return logits * F.hardsigmoid(logits), activations

    monkeypatch.setitem(models.MODELS, "ConvNet", Gated)
    save_weights(make_net(), Path("a.pt"))
    assert main("a.pt", "--schemes", "uniform", "--bits", 4, "--per_layer") == 0
    error = capsys.readouterr().err
    assert "--per_layer: a: no terms of its loss, it cannot be differentiated twice" in error
    assert len(results()["rows"]) == 2 and len(results()["per_layer"]) == 5
    assert all(row["second_order"] is None for row in results()["per_layer"])


def test_sums_that_are_not_there_and_layers_that_are_not_are_told(tiny, capsys):
    save_weights(make_net(), Path("a.pt"))
    flags = ["a.pt", "--bits", 4, "--schemes", "uniform"]
    assert main(*flags, "--act_bits", 4, "--quantize_sums") == 0
    assert "a.pt: --quantize_sums has no effect" in capsys.readouterr().err
    assert main(*flags, "--layers", "layer99", plots=True) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--layers layer99: choose among layer0.0" in message


def test_a_network_without_a_finite_loss_is_refused(tiny, capsys):
    net = make_net()
    net.classifier.weight.data.fill_(3e38)
    save_weights(net, Path("a.pt"))
    assert main("a.pt", "--bits", 4, "--schemes", "uniform") == 1
    assert "a.pt: its loss is nan without quantizing" in capsys.readouterr().err


def test_figures_of_weights_are_kept(tiny):
    save_weights(make_net(), Path("a.pt"))
    for _ in range(2):
        assert main("a.pt", "--bits", 4, "--schemes", "uniform", plots=True) == 0
    names = {path.name for path in Path().glob("*.png")}
    assert names == {"accuracy.png", "weights_a.png", "accuracy_old1.png", "weights_a_old1.png"}


@pytest.mark.parametrize("flag", ["--export", "--steps_from", "--verify"])
def test_an_empty_name_of_a_file_is_refused(flag, tiny, capsys):
    assert main("a.pt", flag, "") == 2
    assert f"argument {flag}: the name of the file is empty" in capsys.readouterr().err
