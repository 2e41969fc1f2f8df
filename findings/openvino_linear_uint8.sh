#!/usr/bin/env bash
# OpenVINO rounds the input of a quantized linear layer a second time where its weight is uint8.
#
# One would guess: in an ONNX model of QuantizeLinear/DequantizeLinear pairs, all grids are given, so
# int8 weights and the same numbers as uint8 with a zero point of 128 give the same outputs, but for
# the last bits of float32.
# What happens: with int8, exact. With uint8 and a zero point, OpenVINO takes the weight for the
# compressed one of a network in float32 and quantizes the input dynamically, in groups of channels:
# errors are thousands of times those of float32. DYNAMIC_QUANTIZATION_GROUP_SIZE=0 turns that off. It is
# on by default and nothing says so. Seen on x86 with AVX-512 and VNNI; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 onnx==1.23.2 openvino==2026.4.1
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import openvino
from onnx import TensorProto, helper, numpy_helper

print("openvino", openvino.__version__)
generator = np.random.default_rng(0)
N, IN, OUT = 64, 256, 10
x = generator.random((N, IN), dtype=np.float32)
codes = generator.integers(-127, 128, (OUT, IN))
scale_x, scale_w = np.float32(1 / 255), np.float32(0.01)
x_q = np.clip(np.rint(x / scale_x), 0, 255)
expected = (x_q @ codes.T).astype(np.float64) * scale_x * scale_w  # whole numbers: exact


def model(dtype, zero_point):
    constants = {
        "sx": scale_x,
        "zx": np.uint8(0),
        "w": (codes + zero_point).astype(dtype),
        "sw": scale_w,
        "zw": dtype(zero_point),
    }
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        node("DequantizeLinear", ["xq", "sx", "zx"], ["xf"]),
        node("DequantizeLinear", ["w", "sw", "zw"], ["wf"]),
        node("Gemm", ["xf", "wf"], ["y"], transB=1),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", IN])],
        [info("y", TensorProto.FLOAT, ["n", OUT])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def error(content, **options):
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", options)
    y = compiled(x)[compiled.output(0)]
    return np.abs(y - expected).max() / np.abs(expected).max()


as_int8 = error(model(np.int8, 0))
as_uint8 = error(model(np.uint8, 128))
switched_off = error(model(np.uint8, 128), DYNAMIC_QUANTIZATION_GROUP_SIZE="0")
print(f"largest error, relative: int8 {as_int8:.1e}, uint8 with a zero point {as_uint8:.1e}, ")
print(f"the latter with DYNAMIC_QUANTIZATION_GROUP_SIZE=0 {switched_off:.1e}")
assert as_int8 < 1e-5 and switched_off < 1e-5, "a correct path is no longer exact"
assert as_uint8 > 1e-4, "uint8 weights are exact now: this finding has ended"
PYTHON
echo "as described"
