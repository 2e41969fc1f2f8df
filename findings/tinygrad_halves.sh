#!/usr/bin/env bash
# tinygrad rounds halves to even in int8, and in uint8 up or down as their size falls.
#
# One would guess: ONNX's QuantizeLinear rounds halves to the nearest even integer, so a file gives the same codes
# in tinygrad as in ONNX Runtime, whichever of the two types its codes have.
# What happens: for int8, so. For uint8 tinygrad adds 0.4999999 in float32 and cuts off what is behind the point:
# of 60 halves 30 get another code, 1.5 the 1 in place of 2 and 2.5 the 3 in place of 2. Numbers
# that are no halves get the right one. Halves are no rare case: the mean of two codes, as pooling makes it, is one
# whenever one of them is odd and the other even. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 tinygrad==0.14.0
cd "$folder"
DEV=PYTHON "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tinygrad import Tensor
from tinygrad.nn.onnx import OnnxRunner

print(*(f"{name} {version(name)}" for name in ("tinygrad", "onnxruntime", "onnx", "numpy")))


def codes(x, dtype, pooled=False):
    """Return the codes at a scale of 1, of x or of means of its neighbours: in both runtimes."""
    tensors = {"scale": np.float32(1), "zero_point": dtype(0)}
    nodes = [helper.make_node("QuantizeLinear", ["means" if pooled else "x", *tensors], ["codes"])]
    if pooled:
        means = helper.make_node("AveragePool", ["x"], ["means"], kernel_shape=[2], strides=[2])
        nodes.insert(0, means)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("codes", kind, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with open("model.onnx", "wb") as file:
        file.write(model.SerializeToString())
    expected = onnxruntime.InferenceSession("model.onnx").run(None, {"x": x})[0]
    return expected, OnnxRunner("model.onnx")({"x": Tensor(x)})["codes"].numpy()


halves = np.arange(0.5, 60, dtype=np.float32)
others = np.arange(60, dtype=np.float32)[:, None] + np.float32([0, 0.25, 0.4999, 0.5001, 0.75])
chance = np.random.default_rng(0)
four_bits = chance.integers(0, 16, (1, 1, 400)).astype(np.float32)
for title, x, dtype, n_others, pooled in (
    ("halves, int8", halves, np.int8, 0, False),
    ("halves, uint8", halves, np.uint8, 30, False),
    ("other numbers, uint8", others.ravel(), np.uint8, 0, False),
    ("means of two 4-bit codes, int8", four_bits, np.int8, 0, True),
    ("means of two 4-bit codes, uint8", four_bits, np.uint8, None, True),
):
    expected, found = codes(x, dtype, pooled)
    n = int((expected != found).sum())
    print(f"{title}: {n} of {found.size} codes differ")
    assert n == n_others if n_others is not None else n > found.size / 10, "the rounding has changed"
PYTHON
echo "as described"
