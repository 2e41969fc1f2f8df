#!/usr/bin/env bash
# QONNX loses signs: weights below 0 that are stored as uint8, codes above 7 of unsigned 4 bits in int8.
#
# One would guess: `QCDQToQuant` of QONNX, the reader of quantized ONNX files for FPGAs, turns DequantizeLinear
# of weights, and the chain QuantizeLinear, Clip, DequantizeLinear, into `Quant` nodes that give the same numbers,
# or leaves them as they are; its own executor then agrees with ONNX Runtime.
# What happens: weights are made anew as (codes − zero_point) · scale in the codes' own 8 bits, which wrap:
# of uint8 codes with the zero point 128 every weight below 0 becomes 0; of int8 codes with another zero point than 0,
# those that leave int8 are wrong. And the width of a Clip is counted while its sign is taken from the type:
# int8 codes with Clip(0, 15), a ReLU's of 4 bits, become a signed grid of −8 … 7. Nothing is told.
# int8 weights with the zero point 0, and unsigned codes in uint8, are read right. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 qonnx==1.0.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnxruntime
import qonnx.core.onnx_exec
from onnx import TensorProto, helper, numpy_helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.transformation.qcdq_to_qonnx import QCDQToQuant

print(*(f"{name} {version(name)}" for name in ("qonnx", "onnx", "onnxruntime", "numpy")))


def run_both(nodes, tensors, x):
    """Return the output y of the nodes for x, in ONNX Runtime and, as Quant nodes, in QONNX."""
    graph = helper.make_graph(
        [helper.make_node(*node) for node in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    read = ModelWrapper(model).transform(InferShapes()).transform(QCDQToQuant())
    assert "Quant" in {node.op_type for node in read.graph.node}
    return expected, qonnx.core.onnx_exec.execute_onnx(read, {"x": x})["y"]


def weights(codes, zero_point):
    """Return (codes − zero_point) / 2 as both have it: what an identity matrix is multiplied by."""
    tensors = {"codes": codes[:, None], "scale": np.float32(0.5), "zero_point": zero_point}
    nodes = [("DequantizeLinear", [*tensors], ["w"]), ("MatMul", ["x", "w"], ["y"])]
    return run_both(nodes, tensors, np.eye(len(codes), dtype=np.float32))


def clipped(dtype):
    """Return numbers from 0 to 15 on a grid of 4 bits without a sign, as both have it."""
    tensors = {"scale": np.float32(1), "zero_point": dtype(0), "low": dtype(0), "high": dtype(15)}
    grid = ["scale", "zero_point"]
    nodes = [("QuantizeLinear", ["x", *grid], ["q"]), ("Clip", ["q", "low", "high"], ["c"])]
    nodes.append(("DequantizeLinear", ["c", *grid], ["y"]))
    return run_both(nodes, tensors, np.arange(16, dtype=np.float32)[None])


int8 = np.arange(-127, 128).astype(np.int8)
uint8 = np.arange(1, 256).astype(np.uint8)
for title, (expected, found), n_others in (
    ("int8 weights, zero point 0", weights(int8, np.int8(0)), 0),
    ("uint8 weights, zero point 128", weights(uint8, np.uint8(128)), 127),
    ("int8 weights, zero point -100", weights(int8, np.int8(-100)), 100),
    ("4-bit codes in uint8", clipped(np.uint8), 0),
    ("4-bit codes in int8", clipped(np.int8), 8),
):
    n = int((expected != found).sum())
    ranges = " … ".join(f"{v:g}" for v in (expected.min(), expected.max())), found.min(), found.max()
    print(f"{title}: {n} of {found.size} differ; {ranges[0]} became {ranges[1]:g} … {ranges[2]:g}")
    assert n == n_others, "QONNX's reading has changed"
PYTHON
echo "as described"
