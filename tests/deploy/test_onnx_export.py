import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_integer_network import Small, folded, quantize, small_net

from engine.deploy import deployed_files, onnx_session, verify
from engine.deploy.integer_layers import with_integers
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.integer_operations import Layer
from engine.deploy.onnx_emitter import RELU, UNBOUNDED
from engine.images.loader import Loader
from engine.networks.graph import set_tensor
from engine.system.errors import FileError

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)


def pixels(n=64):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (n, 3, 12, 12), generator=generator).to(torch.uint8)


def normalized(pixels):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    scale, shift = (1 / (255 * std)).float(), (-mean / std).float()
    return pixels.float() * scale + shift


def exported(scheme="uniform", n_bits=4, act_bits=4, per_channel=False):
    net, *_ = quantize(small_net(), normalized(pixels(8)), n_bits, act_bits, scheme, per_channel)
    return net, deployed_files.to_onnx(net, (3, 12, 12), MEAN, STD, {})


# --- the engine ------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("scheme", "n_bits", "act_bits"),
    [
        ("uniform", 8, 8),
        ("uniform", 6, 6),
        ("uniform", 4, 4),
        ("uniform", 4, 8),
        ("uniform", 2, 3),
        ("pwlq", 4, 4),
        ("pwlq", 8, 8),
    ],
)
@pytest.mark.sampled(4)
def test_every_logit_of_the_engine_is_that_of_the_simulation(scheme, n_bits, act_bits, per_channel):
    net, model = exported(scheme, n_bits, act_bits, per_channel)
    logits = onnx_session.open_session(model, "m")(pixels())
    torch.testing.assert_close(logits, net(normalized(pixels()))[0], rtol=0, atol=0)
    assert logits.unique().numel() > 10
    assert onnx_session.inexact_operations(net, model) == []


def test_a_relu_after_max_pooling_is_part_of_the_layer_before_it():
    class PoolsFirst(Small):
        def forward(self, x):
            x = self.conv2(F.relu(self.shrink(self.conv1(x))))
            return self.classifier(self.pool(F.relu(x)).flatten(1)), []

    torch.manual_seed(0)
    net, *_ = quantize(PoolsFirst().eval(), normalized(pixels(8)), 4, 4)
    model = deployed_files.to_onnx(net, (3, 12, 12), MEAN, STD, {})
    logits = onnx_session.open_session(model, "m")(pixels())
    torch.testing.assert_close(logits, net(normalized(pixels()))[0], rtol=0, atol=0)
    bounds = [each.bounds for each in net.operations if isinstance(each, Layer)]
    assert bounds == [RELU, RELU, UNBOUNDED]


def test_all_products_are_summed_by_integer_kernels():
    for scheme, conv in (("uniform", "QLinearConv"), ("pwlq", "ConvInteger")):
        operators = list(onnx_session.optimized_nodes(exported(scheme)[1], "m").values())
        assert operators.count(conv) == (2 if scheme == "uniform" else 4)
        assert not onnx_session.FLOAT_KERNELS & set(operators)
        assert {"QGemm", "MatMulInteger"} & set(operators)


def test_the_first_part_alone_has_half_the_products():
    net, model = exported("pwlq")
    first = deployed_files.to_onnx(verify.first_parts(net, False), (3, 12, 12), MEAN, STD, {})
    operators = list(onnx_session.optimized_nodes(first, "m").values())
    assert operators.count("ConvInteger") == 2 and len(first) < len(model)


def test_the_float_network_is_the_same_in_onnx():
    net, x = small_net(), normalized(pixels())
    model = deployed_files.to_onnx(
        IntegerNetwork.from_graph(folded(net)), (3, 12, 12), MEAN, STD, {}
    )
    with torch.no_grad():
        torch.testing.assert_close(
            onnx_session.open_session(model, "m")(pixels()), net(x), rtol=1e-4, atol=1e-5
        )


def test_operations_that_are_not_exact_are_noticed(monkeypatch):
    net, model = exported(n_bits=8, act_bits=8)
    plain = onnx_session.open_session

    def wrong(model, name, optimized=None):
        run = plain(model, name, optimized)
        return lambda *x: -run(*x) if name == "conv2" else run(*x)

    monkeypatch.setattr(onnx_session, "open_session", wrong)
    assert onnx_session.inexact_operations(net, model) == ["conv2"]


@pytest.mark.parametrize("may_saturate", [False, True])
def test_layers_are_tried_with_weights_as_the_file_has_them(may_saturate, monkeypatch):
    net, _ = exported(n_bits=8, act_bits=8)
    form = onnx_session.FileForm(may_saturate=may_saturate)
    model = deployed_files.to_onnx(net, (3, 12, 12), MEAN, STD, {}, form)
    plain, tried = onnx_session.open_session, []
    monkeypatch.setattr(
        onnx_session, "open_session", lambda model, name: tried.append(model) or plain(model, name)
    )
    onnx_session.inexact_operations(net, model)
    operators = {node.op_type for each in tried for node in onnx.load_from_string(each).graph.node}
    assert ("Concat" in operators) != may_saturate


def test_everything_that_is_not_as_it_should_be_is_one_line():
    found = {
        "nodes": {"conv1": "FusedConv", "conv2": "QLinearConv"},
        "n_images": 5,
        "inexact_layers": ["add"],
        "disagreement": "conv3: differs",
        "differing_predictions": {"integer": 3},
        "runtimes": {
            "reference": {"differing_predictions": 0},
            "openvino": {"differing_predictions": 2, "first_difference": "conv2: 1 of 9"},
        },
    }
    in_float, inexact, disagreement, differing, openvino = verify.warnings(found)
    assert "conv1" in in_float and "conv2" not in in_float
    assert inexact == "add: not computed exactly on this processor"
    assert openvino == "openvino: 2 predictions differ; conv2: 1 of 9"
    assert disagreement == "conv3: differs"
    assert differing.startswith("3 of 5 predictions differ")


# --- a whole file ----------------------------------------------------------------------------


class Images:
    """What is needed of data.ImageDataset."""

    test_images, mean, std, classes = pixels(40), MEAN, STD, ("a", "b", "c", "d")


SETTINGS = {
    "rounding": "nearest",
    "per_channel": True,
    "keep_first_last": False,
    "equalize": False,
    "clip_p": 2.4,
    "distribution": "norm",
    "approximate": False,
    "overlapping": True,
    "calibration": "minmax",
    "calibration_images": 8,
    "quantize_sums": False,
    "dataset": "Synthetic",
}


@pytest.mark.parametrize("scheme", ["uniform", "pwlq"])
def test_a_file_is_written_and_verified(scheme, tmp_path, capsys):
    net = small_net()
    integers, quantized, _ = quantize(net, normalized(pixels(8)), 4, 4, scheme, per_channel=True)
    checkpoint, path = tmp_path / "net.pt", tmp_path / "net.onnx"
    checkpoint.write_bytes(b"weights")
    how = SimpleNamespace(scheme=scheme, n_bits=4, act_bits=4)
    source = deployed_files.describe_source(checkpoint, SETTINGS, how, "Small", Images.classes)
    rounded = with_integers(quantized, integers.integers())
    deployed_files.write_files({"export": str(path)}, rounded, integers, Images, source)
    test = Loader(Images.test_images, torch.zeros(40, dtype=torch.long), 16, MEAN, STD)
    simulations = {"float32": rounded}
    compared = verify.Compared(integers, simulations, quantized, folded(net), net)
    options = {"test": test, "dataset": Images, "source": source}
    assert verify.verify_file(path, compared, **options)
    record = path.with_suffix(".verified.json")
    measured = json.loads(record.read_text(encoding="utf-8"))
    assert measured["disagreement"] is None and measured["inexact_layers"] == []
    assert measured["largest_logit_difference"]["integer"] == 0
    capsys.readouterr()
    first = quantized.get_buffer("conv1.weight")
    set_tensor(quantized, "conv1.weight", first + 0.3 * first.abs().max())
    assert not verify.verify_file(path, compared, **options)
    [line] = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert "conv1: its integers are not those of its quantized weights" in line
    with pytest.raises(FileError, match="was made with bits 4, and this is 5"):
        deployed_files.read_model(path, source | {"bits": "5"}, (3, 10, 10))
    size = tuple(Images.test_images.shape[1:])
    with pytest.raises(FileError, match=r"should be images of \[3, 48, 48\] to logits"):
        deployed_files.read_model(path, source, (3, 48, 48))
    with pytest.raises(FileError, match="made of other weights than these, of "):
        other = source | {"checkpoint_sha256": "0"}
        deployed_files.read_model(path, other, size)
    renamed = onnx.load(path)
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "out"
    onnx.save(renamed, path)
    with pytest.raises(FileError, match="to out: it should be images of"):
        deployed_files.read_model(path, source, size)
