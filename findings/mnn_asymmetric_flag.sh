#!/usr/bin/env bash
# MNN's converter does the opposite of its flag: --weightQuantAsymmetric makes weights symmetric, and without it they are not.
#
# One would guess: as its help says, mnnconvert --weightQuantBits 4 gives each channel a symmetric grid, and --weightQuantAsymmetric
# one from the smallest to the largest weight, for accuracy.
# What happens: without the flag both ends of a channel are exact and all codes are in use, a grid with two ends; with it 0 is a code and the
# larger end alone is exact: the symmetric grid, whose file is smaller by a number for each channel. `=true`, `=false`, 1 and 0 behind the flag
# make no difference. Of 2-bit weights the flag takes one level of four, and their squared error becomes two and a half times as large, so who turns
# it on for accuracy loses it, and a table "symmetric against asymmetric" has its columns exchanged. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet MNN==3.6.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - <<'PYTHON' 2>said.log || { cat said.log >&2; exit 1; }
import subprocess
from pathlib import Path

import MNN
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

print("MNN", MNN.version())
CHANNELS, WEIGHTS = 8, 64
weights = np.random.default_rng(0).normal(size=(CHANNELS, WEIGHTS, 1, 1)).astype(np.float32)
shapes = {"x": (1, WEIGHTS, 1, WEIGHTS), "y": (1, CHANNELS, 1, WEIGHTS)}
values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
initializer = numpy_helper.from_array(weights, "weight")
graph = helper.make_graph([helper.make_node("Conv", ["x", "weight"], ["y"])], "conv", [values["x"]], [values["y"]], [initializer])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "conv.onnx")


def converted(*flags):
    """The weights that the converted network computes with, read off by an image of ones at one place each."""
    command = ["mnnconvert", "-f", "ONNX", "--modelFile", "conv.onnx", "--MNNModel", "conv.mnn", "--bizCode", "test"]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    network = MNN.nn.load_module_from_file("conv.mnn", ["x"], ["y"])
    ones = np.eye(WEIGHTS, dtype=np.float32).reshape(shapes["x"])
    result = network.forward([MNN.expr.const(ones, ones.shape, MNN.expr.NCHW)])[0]
    return np.array(MNN.expr.convert(result, MNN.expr.NCHW).read()).reshape(CHANNELS, WEIGHTS), Path("conv.mnn").stat().st_size


plain = weights[:, :, 0, 0]
smallest, largest = plain.min(1), plain.max(1)
assert np.allclose(converted()[0], plain, atol=1e-6), "it is not exact without quantization"
for bits in (8, 4, 2):
    first = None
    for flags in ((), ("--weightQuantAsymmetric",), ("--weightQuantAsymmetric=true",), ("--weightQuantAsymmetric=false",)):
        got, size = converted("--weightQuantBits", str(bits), *flags)
        both_ends = np.allclose(got.min(1), smallest, atol=1e-3) and np.allclose(got.max(1), largest, atol=1e-3)
        steps = got / np.maximum(-smallest, largest)[:, None] * (2 ** (bits - 1) - 1)  # of the symmetric grid
        symmetric = np.abs(steps - steps.round()).max() < 1e-3
        error = float(np.square(got - plain).mean())
        first = first or error
        print(f"{bits} bits {' '.join(flags):30} {size} bytes, both ends exact {both_ends}, multiples of max|w| / {2 ** (bits - 1) - 1} {symmetric}, squared error {error:.6f}")
        assert (both_ends, symmetric) == ((False, True) if flags else (True, False)), "the flag means something else now"
print(f"2 bits: the flag makes the squared error {error / first:.1f} times as large")
assert error / first > 2
help_text = subprocess.run(["mnnconvert", "--help"], capture_output=True, text=True).stdout
assert "default weight-quant uses SYMMETRIC" in " ".join(help_text.split()), "the help says something else now"
print("help: the default weight-quant uses SYMMETRIC quant method ... set --weightQuantAsymmetric to use asymmetric")
PYTHON
echo "as described"
