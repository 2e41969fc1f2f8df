#!/usr/bin/env bash
# Values beyond the range of an 8-bit float: PyTorch saturates E4M3, infinity too, but not E5M2; ONNX Runtime saturates both; JAX's numbers neither.
#
# One would guess: a cast to an 8-bit float that overflows does the same in all of these, and in PyTorch the same for both formats: either
# the largest value or the format's infinity or NaN.
# What happens: 1,000 as float8_e4m3fn is 448 in PyTorch and in ONNX Runtime and NaN in ml_dtypes, which JAX takes its numbers from; infinity
# becomes 448 in the first two, so that a layer that overflowed looks like one that did not. 130,000 as float8_e5m2 is infinite in PyTorch
# and ml_dtypes and 57,344 in ONNX Runtime, so that a network with such a cast computes something else when it was exported. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__, "onnxruntime", onnxruntime.__version__)


def in_onnx(values, to):
    """Cast to an 8-bit float and back, in ONNX Runtime."""
    nodes = [helper.make_node("Cast", ["x"], ["q"], to=to), helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [None])] for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "cast", *ends), opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": values})[0]


def casts(name, values):
    """The values after a cast to the format of that name and back, by who does it."""
    values = np.array(values, dtype=np.float32)
    found = {
        "PyTorch": torch.from_numpy(values).to(getattr(torch, name)).float().numpy(),
        "ONNX Runtime": in_onnx(values, getattr(TensorProto, name.replace("_", "").upper())),
        "ml_dtypes": values.astype(getattr(ml_dtypes, name)).astype(np.float32),
    }
    for who, results in found.items():
        print(f"{name}, {who}: {', '.join(f'{a:g} becomes {b:g}' for a, b in zip(values, results))}")
    return {who: results.tolist() for who, results in found.items()}


e4m3 = casts("float8_e4m3fn", [440, 1000, -1000, np.inf])
e5m2 = casts("float8_e5m2", [57000, 130000, -130000, np.inf])
saturated = {448: [448, 448, -448, 448], 57344: [57344, 57344, -57344, 57344]}
assert e4m3["PyTorch"] == e4m3["ONNX Runtime"] == saturated[448], "E4M3 does not saturate any more"
assert e4m3["ml_dtypes"][0] == 448 and np.isnan(e4m3["ml_dtypes"][1:]).all(), "ml_dtypes saturates now"
assert e5m2["ONNX Runtime"] == saturated[57344], "ONNX Runtime does not saturate E5M2 any more"
assert e5m2["PyTorch"] == e5m2["ml_dtypes"] == [57344, np.inf, -np.inf, np.inf], "E5M2 saturates now"
PYTHON
echo "as described"
