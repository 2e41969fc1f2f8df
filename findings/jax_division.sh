#!/usr/bin/env bash
# JAX on a CPU divides by a scale as a multiplication by its rounded reciprocal, with and without jit.
#
# One would guess: x / scale in float32 is the quotient that IEEE 754, NumPy and ONNX's QuantizeLinear have, at least
# without jit, and whatever shape the scale has.
# What happens: where the scale is one number, or one for each channel, XLA computes x · (1/scale) in place of x / scale, and a
# quarter of all quotients are another number. A quotient that is a half then has another code: of the means of two
# 4-bit codes at scale 0.02, as pooling makes them, every ninth half, 171 of 4,000 codes. A scale that is written out for
# every element, and handed over as such, gives the right quotients. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

print(*(f"{name} {version(name)}" for name in ("jax", "jaxlib", "numpy", "onnxruntime", "onnx")))


def onnx_codes(x, scale):
    """Return the codes of ONNX's QuantizeLinear in ONNX Runtime, int8."""
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("codes", TensorProto.INT8, x.shape)],
        [numpy_helper.from_array(np.float32(scale), "scale"), numpy_helper.from_array(np.int8(0), "zero_point")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


SCALE = np.float32(0.02)
SHAPES = {"a scalar": (), "one a channel": (4, 1), "one an element": (4, 1000)}
ways = {"as it is": lambda x, scale: x / scale, "jit": jax.jit(lambda x, scale: x / scale)}
chance = np.random.default_rng(0)
a, b = chance.integers(0, 16, (2, 4000)).astype(np.float32) * SCALE  # two tensors of 4-bit codes
data = {"other numbers": chance.uniform(-2.5, 2.5, 4000).astype(np.float32), "means of two": (a + b) / 2}
for title, x in data.items():
    expected = onnx_codes(x, SCALE)
    assert (np.round(x / SCALE) == expected).all(), "NumPy and ONNX Runtime no longer agree"
    n_halves = int((x / SCALE % 1 == 0.5).sum())
    for name, shape in SHAPES.items():
        for way, division in ways.items():
            scale = jnp.full(shape, SCALE)
            quotients = np.asarray(division(jnp.asarray(x.reshape(4, 1000)), scale)).ravel()
            n_quotients = int((quotients != x / SCALE).sum())
            n_codes = int((np.round(quotients) != expected).sum())
            print(
                f"{title}, scale: {name}, {way}: of {x.size} quotients {n_quotients} differ, "
                f"of their codes {n_codes} ({n_halves} are halves)"
            )
            if name == "one an element":
                assert n_quotients == n_codes == 0, "this form differs now as well"
            else:
                assert (quotients == x * (1 / SCALE)).all(), "it is no reciprocal any more"
                assert n_quotients > x.size / 10, "the quotients agree now"
                assert title == "other numbers" or n_codes > n_halves / 20, "the codes agree now"
PYTHON
echo "as described"
