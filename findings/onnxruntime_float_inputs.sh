#!/usr/bin/env bash
# ONNX Runtime rounds the inputs of a linear layer to 8 bits where only its weight is quantized.
#
# One would guess: DequantizeLinear → MatMul, or → Gemm, with codes of the weight alone in the file, computes x · (codes · scale) in
# float32. Whoever quantizes weights only, as GPTQ, AWQ or NNCF's compression do, then gets the accuracy that was measured in PyTorch.
# What happens: by default the pair becomes MatMulNBits with accuracy_level 4, which quantizes each 32 values of x to int8 as they
# come. The file says nothing of that, and no warning is printed; errors are thousands of times those of float32. It is
# the same for int4 and int8 weights, with one scale, a scale for each channel or for each block, and with a bias. A convolution
# with the same weights is exact. The session option session.qdq_matmulnbits_accuracy_level = "1" turns it off, as does a QuantizeLinear
# before x, which is then all that rounds it. Seen on x86 with AVX2; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

print(*(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "numpy")))
KIND = "session.qdq_matmulnbits_accuracy_level"
chance = np.random.default_rng(0)
inputs, outputs, block = 256, 64, 32
codes = chance.integers(-8, 8, (inputs, outputs))
x = chance.standard_normal((16, inputs)).astype(np.float32)


def error(operator, dtype, scales, accuracy_level=None):
    """Return the largest error of x · Ŵ over the largest value, and the operators that ran."""
    shape = {"one": (), "channel": (outputs,), "block": (inputs // block, outputs)}[scales]
    scale = chance.uniform(0.01, 0.02, shape).astype(np.float32)
    options = {"one": {}, "channel": {"axis": 1}, "block": {"axis": 0, "block_size": block}}
    weight, axes = codes, [inputs, outputs]
    if operator == "Conv":  # of 1×1: (outputs, inputs, 1, 1), and one scale
        weight, axes = codes.T, [outputs, inputs, 1, 1]
    tensors = [
        helper.make_tensor("codes", dtype, axes, weight.ravel().tolist()),
        numpy_helper.from_array(scale, "scale"),
        numpy_helper.from_array(np.zeros(outputs, np.float32), "bias"),
    ]
    bias = [] if operator == "MatMul" else ["bias"]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], **options[scales]),
        helper.make_node(operator, ["x", "w", *bias], ["y"]),
    ]
    images = x.reshape(16, inputs, 1, 1) if operator == "Conv" else x
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, size, *images.shape[2:]])]
        for name, size in (("x", inputs), ("y", outputs))
    ]
    graph = helper.make_graph(nodes, "g", *ends, tensors if bias else tensors[:2])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = "optimized.onnx"
    settings.log_severity_level = 3  # but for the remark that a saved graph is for this machine
    if accuracy_level is not None:
        settings.add_session_config_entry(KIND, accuracy_level)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    y = session.run(None, {"x": images})[0].reshape(16, outputs)
    rows = np.repeat(scale, block, 0) if scales == "block" else scale
    expected = x.astype(np.float64) @ (codes * rows.astype(np.float64))
    operators = [node.op_type for node in onnx.load("optimized.onnx").graph.node]
    return np.abs(y - expected).max() / np.abs(expected).max(), operators


INT4, INT8 = TensorProto.INT4, TensorProto.INT8
for operator, dtype, scales, accuracy_level, is_exact in (
    ("MatMul", INT4, "block", None, False),
    ("MatMul", INT8, "channel", None, False),
    ("MatMul", INT8, "one", None, False),
    ("Gemm", INT8, "channel", None, False),
    ("Gemm", INT4, "one", None, False),
    ("Gemm", INT8, "channel", "1", True),
    ("MatMul", INT4, "block", "1", True),
    ("Conv", INT8, "one", None, True),
):
    found, operators = error(operator, dtype, scales, accuracy_level)
    name = TensorProto.DataType.Name(dtype)
    level = "default" if accuracy_level is None else f"accuracy_level {accuracy_level}"
    print(f"{operator}, {name}, scales: {scales}, {level}: error {found:.1e}, {', '.join(operators)}")
    assert found < 1e-5 if is_exact else 1e-3 < found < 0.05, "this has changed"
PYTHON
echo "as described"
