"""Forms of exported files, and the runtimes that run them."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_integer_network import quantize, small_net
from test_onnx_export import MEAN, STD, normalized, pixels
from test_residual_export import residual_net
from torch import nn

import flags
from engine.deploy import deployed_files, onnx_session, runtimes
from engine.deploy.onnx_emitter import FileForm
from engine.networks.graph import set_tensor
from engine.system.errors import FileError, SetupError

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
WHOLE = FileForm(may_saturate=True)


def to_onnx(net, form, images=None):
    images = pixels() if images is None else images
    return deployed_files.to_onnx(net, images.shape[1:], MEAN, STD, {}, form)


class Grouped(nn.Module):
    """A depthwise convolution, one in two groups, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.c, self.d = nn.Conv2d(8, 6, 1, groups=2), nn.Linear(6, 9)
        self.e = nn.Linear(9, 4)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3))
        return self.e(self.d(x).relu()), []


def networks():
    torch.manual_seed(0)
    return small_net(), Grouped().eval()


@pytest.mark.parametrize(
    ("n_bits", "per_channel"),
    [
        *((2, False), (3, True), (4, False), (8, True)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, True), (3, False), (4, True), (8, False))
        ),
    ],
)
@pytest.mark.sampled(2)
def test_every_form_gives_the_logits_of_the_simulation(n_bits, per_channel):
    for float_net in networks():
        net, *_ = quantize(float_net, normalized(pixels(8)), n_bits, n_bits, "uniform", per_channel)
        expected = net(normalized(pixels()))[0]
        plain = Counter(onnx_session.optimized_nodes(to_onnx(net, WHOLE), "m").values())
        sizes = {}
        for form in (FileForm(), FileForm(4), FileForm(2), FileForm(signed_codes=True), WHOLE):
            model = to_onnx(net, form)
            constants = onnx.load_from_string(model).graph.initializer
            sizes[form] = sum(len(each.raw_data) for each in constants)
            logits = onnx_session.open_session(model, "m")(pixels())
            torch.testing.assert_close(logits, expected, rtol=0, atol=0)
            operators = Counter(onnx_session.optimized_nodes(model, "m").values())
            for name in ("QLinearConv", "QGemm", "QLinearGlobalAveragePool"):
                assert form.signed_codes or operators[name] == plain[name]
        if n_bits == 2:
            assert sizes[FileForm(2)] < sizes[FileForm(4)] < sizes[FileForm()]
        if n_bits == 8:
            assert sizes[FileForm(2)] == sizes[FileForm()] > sizes[WHOLE]


def largest_pair(model):
    """Return the largest |sum of two products| of uint8 and int8 that the model may compute.

    Out of all pairs of weights of an output channel; read from the file alone.
    """
    nodes = {node.output[0]: node for node in model.graph.node}
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    most = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        codes = constants[nodes[node.input[1]].input[0]]
        if codes.dtype == "int8":
            rows = torch.from_numpy(codes.reshape(len(codes), -1).astype("int64"))
            for row in rows:
                sums = (row[:, None] + row[None, :]).fill_diagonal_(0)
                most = max(most, 255 * sums.abs().max().item())
    return most


def test_no_sum_of_two_products_leaves_16_bits():
    for float_net in networks():
        net, *_ = quantize(float_net, normalized(pixels(8)), 8, 8)
        assert any(layer.can_saturate for layer in net.integers().values())
        assert largest_pair(onnx.load_from_string(to_onnx(net, FileForm()))) <= 2**15 - 1
        assert largest_pair(onnx.load_from_string(to_onnx(net, WHOLE))) > 2**15
        seven, *_ = quantize(float_net, normalized(pixels(8)), 7, 8)
        assert not any(layer.can_saturate for layer in seven.integers().values())
        assert to_onnx(seven, FileForm()) == to_onnx(seven, WHOLE)


@pytest.mark.parametrize("name", ["openvino", "reference", "onnxruntime", "tract", "tvm"])
def test_a_runtime_gives_the_logits_of_the_simulation(name):
    if name in ("openvino", "tract", "tvm"):
        pytest.importorskip(name, reason="its requirements file is not installed")
    images = pixels(40)
    for float_net in (*networks(), residual_net("padded", 0)):
        net, *_ = quantize(float_net, normalized(images[:8]), 4, 4)
        for form in (FileForm(), FileForm(4)):
            model = to_onnx(net, form)
            simulated = net(normalized(images))[0]
            if name in ("tract", "tvm") and form.packed_bits == 4:
                with pytest.raises(FileError, match=f"{name} refuses it: .*(Int|int)4"):
                    runtimes.run_model(name, model, images)
                continue
            found = runtimes.compare_runtime(
                name, model, images, simulated, net, normalized(images[:4])
            )
            assert found["differing_logits"] == 0 and found["n_logits"] == simulated.numel()


def test_the_first_operation_whose_codes_differ_is_named():
    images = pixels(16)
    net, quantized, _ = quantize(small_net(), normalized(images), 4, 4)
    set_tensor(quantized, "conv2.weight", -quantized.get_buffer("conv2.weight"))
    other, *_ = quantize(small_net(), normalized(images), 4, 3)
    model = to_onnx(net, FileForm())
    x = normalized(images)
    assert "where they are outputs" in runtimes.first_difference(
        "onnxruntime", model, images, net, x
    )
    found = runtimes.first_difference("onnxruntime", to_onnx(other, FileForm()), images, net, x)
    assert found.startswith("input_codes: ")


def test_all_runtimes_can_be_asked_for():
    assert tuple(runtimes.RUNTIMES) == flags.RUNTIMES


def test_a_missing_runtime_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SetupError, match="needs Node.js and, in this folder: npm install --no-save onnxr"
    ):
        runtimes.RUNTIMES["onnxruntime-web"].load()
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(SetupError, match="-r requirements-runtimes.txt"):
        runtimes.RUNTIMES["openvino"].load()


PACKAGE = """
exports.Tensor = class {
  constructor(type, data, dims) { Object.assign(this, { type, data, dims }); }
};
exports.InferenceSession = { create: async (model) => {
  if (model.length < 9) throw new Error("too short");
  return { outputNames: ["logits"], run: async ({ images }) => {
    const size = images.data.length / images.dims[0];
    const sums = Float32Array.from({ length: images.dims[0] }, (_, i) =>
      images.data.slice(i * size, (i + 1) * size).reduce((a, b) => a + b, 0));
    return { logits: { type: "float32", data: sums } };
  } };
} };
"""


@pytest.mark.skipif(not shutil.which("node"), reason="Node.js is not installed")
def test_a_package_of_node_gets_all_images_in_batches(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = Path("node_modules", "onnxruntime-web")
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": "1.2.3", "main": "index.js"}))
    (folder / "index.js").write_text(PACKAGE)
    images = pixels(230)
    version, outputs = runtimes.run_model("onnxruntime-web", b"0123456789", images)
    assert version == "1.2.3"
    sums = torch.from_numpy(outputs["logits"].copy()).flatten()
    assert torch.equal(sums, images.flatten(1).float().sum(1))
    with pytest.raises(FileError, match="onnxruntime-web refuses it: Error: too short"):
        runtimes.run_model("onnxruntime-web", b"0", images)
