#!/usr/bin/env bash
# NNCF quantizes the first layer's weights to 7 bits where all are to have 8, on every processor and without a word.
#
# One would guess: `nncf.quantize(model, data)` gives the weights of every convolution and linear layer a symmetric grid of 8 bits a
# channel, so that the largest weight of each channel has the code 127 or −127.
# What happens: so in all layers but the first. Its step is max|w| / 63.5, twice as wide; the largest weight of each channel is half a
# step off, and the squared error more than four times that of 8 bits. It keeps the 16-bit sums of processors without VNNI from
# saturating, but no processor is asked, and file and log are silent.
# `AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE)` gives 8 bits. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet nncf==3.4.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>warnings.log <<'PYTHON' || { cat warnings.log >&2; exit 1; }
import nncf
import numpy as np
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from onnx import TensorProto, helper, numpy_helper

print("nncf", nncf.__version__, "onnx", onnx.__version__)
generator = np.random.default_rng(0)
n_channels = (3, 256, 16, 16)
weights = {
    f"weight{i}": generator.normal(size=(n_channels[i + 1], n_channels[i], 3, 3)).astype(np.float32)
    for i in range(3)
}
nodes, tensor = [], "images"
for name in weights:
    nodes.append(helper.make_node("Conv", [tensor, name], [f"{name}_sum"], pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("Relu", [f"{name}_sum"], [f"{name}_out"]))
    tensor = f"{name}_out"
graph = helper.make_graph(
    nodes,
    "three_convolutions",
    [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 16, 16])],
    [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [1, 16, 16, 16])],
    [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
images = [{"images": generator.random((1, 3, 16, 16), dtype=np.float32)} for _ in range(300)]


def largest_codes(parameters):
    """Quantize the model; return each layer's largest |code|, step and squared error, both in those of 8 bits."""
    quantized = nncf.quantize(model, nncf.Dataset(images), advanced_parameters=parameters)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    results = []
    for node in quantized.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            codes, scale = tensors[node.input[0]].astype(np.float64), tensors[node.input[1]]
            weight = weights[f"weight{len(results)}"]
            eight_bits = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
            error = np.square(codes * scale.reshape(-1, 1, 1, 1) - weight).sum()
            least = np.square(np.round(weight / eight_bits) * eight_bits - weight).sum()
            step = (scale.reshape(-1, 1, 1, 1) / eight_bits).mean()
            results.append((int(np.abs(codes).max()), step, error / least))
    return results


default = largest_codes(None)
disabled = largest_codes(AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE))
for title, results in (("as it comes", default), ("overflow_fix disabled", disabled)):
    print(title)
    for i, (code, step, error) in enumerate(results):
        print(f"  layer {i}: largest code {code}, step × {step:.3f}, squared error × {error:.2f}")
assert [code for code, _, _ in default] == [64, 127, 127], "the first layer has other codes now"
assert [code for code, _, _ in disabled] == [127, 127, 127], "disabling it gives other codes now"
assert abs(default[0][1] - 2) < 0.01 and 4 < default[0][2] < 5, "the first layer's grid is another now"
assert abs(disabled[0][1] - 1) < 0.01 and 0.9 < disabled[0][2] < 1.1, "disabling it gives another grid now"
PYTHON
echo "as described"
