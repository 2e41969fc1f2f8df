import json
import re
import sys
from pathlib import Path

import deploy_table
import pytest
import torch
from image_folder import write_image_folder
from torch import nn

import data
import models
import quant_inference as qi
from analysis import measured_network
from engine.deploy import deployed_files, runtimes, verify
from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms
from engine.system.io import save_weights, torch_load

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")


class Folding(nn.Module):
    """A small network with batch norms."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return self.classifier(self.pool(x).flatten(1)), []


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Work in an empty folder with 40 images for each purpose and a small network's weights."""
    whole = data.synthetic()
    small = data.ImageDataset(
        whole.train_images[:40, :, :12, :12].clone(),
        whole.train_labels[:40],
        whole.test_images[:40, :, :12, :12].clone(),
        whole.test_labels[:40],
        classes=tuple("abcdefghij"),
    )
    monkeypatch.setitem(data.DATASETS, "Synthetic", lambda data_dir, seed: small)
    monkeypatch.setitem(models.MODELS, "Folding", Folding)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(Folding(), Path("net.pt"))


FLAGS = "--bits 4 --act_bits 4 --fold_bn --schemes uniform --no_plots"


def main(flags):
    """Run the script in this process; return its exit code."""
    words = ["net.pt", "--model", "Folding", "--dataset", "Synthetic", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        qi.main([*words, *flags.split()])
    return caught.value.code


def test_export_and_verify(tiny, capsys):
    files = "--export net.onnx --verify --save_quantized q.pt --save_integers net.safetensors"
    pytest.importorskip("safetensors", reason="requirements-export.txt is not installed")
    assert main(f"{FLAGS} {files}") == 0
    printed = capsys.readouterr()
    assert "simulated (integer): " in printed.out and "0 of 40 predictions differ" in printed.out
    assert "warning" not in printed.err
    found = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))
    assert found["differing_predictions"]["integer"] == 0
    assert found["largest_logit_difference"]["integer"] == 0
    assert found["inexact_layers"] == [] and found["runtimes"] == {}
    row = json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"][1]
    assert row["accuracy"] == found["accuracy"]["engine"]
    assert set(found["images_per_second"]["1"]) == {
        "engine",
        "float32 ONNX Runtime",
        "float32 PyTorch",
    }
    row = "| net | 4 | 4 | uniform |"
    assert row in deploy_table.table(deploy_table.read_records(Path(".")))
    assert found["bytes"]["file"] == Path("net.onnx").stat().st_size
    metadata = {p.key: p.value for p in onnx.load("net.onnx").metadata_props}
    assert json.loads(metadata["class_names"]) == list("abcdefghij")
    assert (metadata["bits"], metadata["act_bits"], metadata["checkpoint"]) == ("4", "4", "net.pt")
    assert len(metadata["checkpoint_sha256"]) == 64
    folded = fold_batch_norms(export_network(Folding(), (3, 12, 12)))
    folded.load_state_dict(torch_load(Path("q.pt")))
    assert folded.conv1.weight.unique().numel() <= 16


class Shared(nn.Module):
    """A convolution that runs three times, and logits that are some of the last layer's outputs."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.num_classes = nn.Linear(8, 2 * num_classes), num_classes

    def forward(self, x):
        x = self.first(x).relu()
        for _ in range(3):
            x = self.again(x).relu()
        return self.last(x.mean((2, 3)))[:, : self.num_classes]


@pytest.mark.parametrize("more", ["", "--per_channel"])
def test_what_is_shared_and_left_out_is_counted_once(tiny, monkeypatch, more, capsys):
    monkeypatch.setitem(models.MODELS, "Folding", Shared)
    save_weights(Shared(), Path("net.pt"))
    batches = []
    monkeypatch.setattr(
        verify,
        "seconds_per_call",
        lambda runs, batch: batches.append(batch) or dict.fromkeys(runs, 1),
    )
    assert main(f"{FLAGS} {more} --export net.onnx --verify") == 0
    capsys.readouterr()
    found = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))
    assert found["bytes"]["float32"] == 4 * sum(p.numel() for p in Shared().parameters())
    assert found["largest_logit_difference"]["integer"] == 0
    assert [len(batch) for batch in batches] == [1, 128]  # of 40 images
    assert found["images_per_second"]["128"]["engine"] == 128
    assert torch.equal(batches[1][40:80], batches[1][:40])


@pytest.mark.parametrize("cache", ["0", "8"])
def test_image_files_are_verified(cache, tiny, capsys):
    write_image_folder("images", "abcdefghij", 2, 3, 20, 16)
    data = "--dataset ImageFolder --data_dir images --image_size 12 --workers 0 --cache_images"
    flags = f"{FLAGS} {data} {cache} --calibration_images 8 --export net.onnx --verify"
    assert main(f"{flags} --runtimes onnxruntime reference") == 0
    printed = capsys.readouterr().out
    assert "0 of 30 predictions differ" in printed and "0 of 300 logits" in printed


def test_a_runtime_that_differs_is_named_with_its_first_operation(tiny, monkeypatch, capsys):
    run = runtimes.run_in_reference

    def wrong(reference, model, images):
        version, outputs = run(reference, model, images)
        return version, {k: v[::-1] for k, v in outputs.items()}  # of other images

    monkeypatch.setitem(
        runtimes.RUNTIMES, "openvino", runtimes.Runtime(lambda: onnx.reference, wrong)
    )
    flags = f"{FLAGS} --export net.onnx --verify --runtimes onnxruntime reference openvino"
    assert main(flags) == 1
    printed = capsys.readouterr()
    assert f"reference {onnx.__version__}: 0 of 40 predictions and 0 of 400 logits" in printed.out
    [line] = [x for x in printed.err.splitlines() if "warning" in x]
    found = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))["runtimes"]
    assert (
        found["reference"]["differing_predictions"]
        == 0
        < (n := found["openvino"]["differing_predictions"])
    )
    assert f"openvino: {n} predictions differ; input_codes: " in line


def test_8_bit_weights_are_halves_unless_the_file_is_for_vnni(tiny, capsys):
    flags = FLAGS.replace("bits 4", "bits 8")
    assert main(f"{flags} --export net.onnx --verify") == 0
    printed = capsys.readouterr()
    assert "two halves" in printed.out and "with weights of 7 bits" in printed.out
    assert "0 of 40 predictions differ" in printed.out and "warning" not in printed.err
    assert main(f"{flags} --export vnni.onnx --export_for vnni") == 0
    printed = capsys.readouterr()
    assert "halves" not in printed.out and "saturate on x86 processors" in printed.err
    assert Path("vnni.onnx").stat().st_size < Path("net.onnx").stat().st_size


def test_flags_of_the_file_without_a_file_have_no_effect(tiny, capsys):
    assert main(f"{FLAGS} --pack_weights int4 --export_for litert --runtimes reference") == 0
    lines = capsys.readouterr().err
    for flag, needed in (
        ("pack_weights", "export"),
        ("export_for", "export"),
        ("runtimes", "verify"),
    ):
        assert re.search(rf"--{flag}\b.*--{needed}", lines)


def test_the_file_names_the_network_of_the_record(tiny):
    record = {"settings": {"model": "Folding"}}
    Path("net.json").write_text(json.dumps(record), encoding="utf-8")
    flags = f"net.pt --dataset Synthetic --device cpu {FLAGS} --export net.onnx"
    with pytest.raises(SystemExit, match="0"):
        qi.main(flags.split())
    metadata = {p.key: p.value for p in onnx.load("net.onnx").metadata_props}
    assert metadata["model"] == "Folding"


def test_without_export_the_simulation_stays_as_it_was(tiny):
    assert main(FLAGS) == 0
    plain = json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"]
    assert main(f"{FLAGS} --save_quantized q.pt") == 0
    assert json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"] == plain
    assert main(f"{FLAGS} --export net.onnx") == 0
    exact = json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"]
    assert exact[0] == plain[0] and exact[1]["loss"] != plain[1]["loss"]


def test_pwlq_reports_what_its_second_sums_cost(tiny, capsys):
    flags = FLAGS.replace("uniform", "pwlq --overlapping")
    assert main(f"{flags} --export net.onnx --verify") == 0
    found = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))
    text = deploy_table.table({"net": found})
    assert "net.pt, batch 1: the time is" in text and "times without the second sums" in text
    graph = onnx.load("net.onnx").graph
    assert {each.name for each in graph.initializer} <= {n for x in graph.node for n in x.input}
    assert {"without the second sums", "one fused convolution a layer"} < set(
        found["images_per_second"]["1"]
    )
    assert "4 ConvInteger" in capsys.readouterr().out


def test_files_that_are_not_of_this_network_get_a_line_each(tiny, capsys):
    assert main(f"{FLAGS} --export net.onnx") == 0
    content = Path("net.onnx").read_bytes()
    Path("cut.onnx").write_bytes(content[: len(content) // 2])
    Path("text.onnx").write_text("no model")
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    foreign = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(foreign), "foreign.onnx")
    cases = [
        ("cut.onnx", FLAGS, "damaged or not an ONNX model"),
        ("text.onnx", FLAGS, "damaged or not an ONNX model"),
        ("missing.onnx", FLAGS, "No such file"),
        ("foreign.onnx", FLAGS, "not one that this version's --export makes"),
        ("net.onnx", FLAGS.replace("--bits 4", "--bits 5"), "was made with bits 4, and this is 5"),
    ]
    for name, flags, message in cases:
        capsys.readouterr()
        assert main(f"{flags} --verify {name}") == 1
        [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
        assert name in line and message in line
    assert main(f"{FLAGS} --verify net.onnx") == 0


def test_another_seed_is_told_where_integers_depend_on_it(tiny, monkeypatch, capsys):
    monkeypatch.setattr(qi, "is_seeded", lambda dataset: False)  # as CIFAR-10 is
    assert main(f"{FLAGS} --export net.onnx") == 0
    assert main(f"{FLAGS} --verify net.onnx --seed 7") == 0  # nothing is random in it
    random = FLAGS.replace("uniform", "dorefa")
    assert main(f"{random} --export net.onnx") == 0
    capsys.readouterr()
    assert main(f"{random} --verify net.onnx --seed 7") == 1
    assert "net.onnx was made with seed 242, and this is 7" in capsys.readouterr().err
    model = onnx.load("net.onnx")  # as an earlier version wrote it, which did not say
    for entry in [p for p in model.metadata_props if p.key in deployed_files.UNKNOWN]:
        model.metadata_props.remove(entry)
    onnx.save(model, "net.onnx")
    assert main(f"{random} --verify net.onnx") == 0


def test_an_unsupported_layer_is_named(tiny, monkeypatch, capsys):
    class Averaging(Folding):
        def forward(self, x):
            x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
            return self.classifier(x.tanh().mean(dim=(2, 3))), []

    monkeypatch.setitem(models.MODELS, "Folding", Averaging)
    # it is refused before anything is measured
    monkeypatch.setattr(measured_network, "evaluate", None)
    assert main(f"{FLAGS} --export net.onnx") == 1
    assert "--export: the network calls tanh, which has no integer form" in capsys.readouterr().err


def test_a_missing_package_is_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(f"{FLAGS} --export net.onnx --verify") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "requirements-export.txt" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bits 4 5 --act_bits 4 --fold_bn --schemes uniform", "one of --bits"),
        ("--bits 4 --act_bits 4 --fold_bn", "one of --schemes"),
        ("--bits 4 --act_bits 4 --schemes uniform", "--export needs --fold_bn"),
        ("--bits 4 --fold_bn --schemes uniform", "--export needs --act_bits from 2 to 8"),
        ("--bits 4 --fold_bn --schemes uniform --act_bits 9", "--act_bits from 2 to 8"),
        ("--bits 9 --fold_bn --schemes uniform --act_bits 8", "--bits from 2 to 8"),
        ("--bits 4 --fold_bn --schemes pwlq --act_bits 8", "--overlapping"),
        ("--bits 8 --fold_bn --schemes dorefa --act_bits 8", "at most 7 bits in each layer"),
        (f"{FLAGS} --schemes dorefa --keep_first_last", "at most 7 bits in each layer"),
        (
            f"{FLAGS} --schemes dorefa --budget_bits 6".replace("--bits 4", ""),
            "at most 7 bits in each layer",
        ),
        (f"{FLAGS} --mean_correction", "--mean_correction"),
        (f"{FLAGS} --export net.pt", "that is the file to quantize"),
        (f"{FLAGS} --save_quantized ../{{here}}/net.pt", "that is the file to quantize"),
        (f"{FLAGS} --save_quantized trained.pt", "that is a file of a training"),
        (f"{FLAGS} --export net.pt/net.onnx", "not a folder"),
        (f"{FLAGS} --save_quantized net.onnx", "that is the file of --export"),
        (f"{FLAGS} --export trained.json", "that is a file of a training"),
        (f"{FLAGS} --export .", "is a folder: give the name of a file"),
        (f"{FLAGS} --verify old.onnx --save_integers old.onnx", "that is the file of --verify"),
        (f"{FLAGS} --verify --save_integers net.verified.json", "that is the record of --verify"),
        (f"{FLAGS} --save_integers results.csv", "that is a file of the results"),
        (f"{FLAGS} --output out --page out/results.json", "that is a file of the results"),
    ],
)
def test_flags_that_no_file_can_have_end_with_one_line(tiny, capsys, flags, message):
    Path("trained.pt").touch()
    Path("trained.json").write_text('{"settings": {}}')
    assert main(f"--export net.onnx {flags.format(here=Path.cwd().name)}") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed


def test_the_exported_file_may_be_spelt_in_two_ways(tiny, capsys):
    assert main(f"{FLAGS} --export net.onnx --verify ./net.onnx") == 0
    assert "0 of 40 predictions differ" in capsys.readouterr().out


def test_verify_needs_a_file(tiny, capsys):
    assert main(f"{FLAGS} --verify") == 2
    assert "--verify needs --export, or the file to verify" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"x"])
def test_a_file_to_verify_is_read_before_anything_is_measured(tiny, content, capsys):
    if content:
        Path("other.onnx").write_bytes(content)
    assert main(f"{FLAGS} --verify other.onnx") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "other.onnx" in message
    assert not Path("results.json").exists()


def test_apples_gpus_have_no_integers_in_float64(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    assert main(f"{FLAGS} --export net.onnx --device mps") == 2
    assert "--export needs --device cpu or cuda, which have float64" in capsys.readouterr().err
