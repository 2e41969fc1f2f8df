#!/usr/bin/env bash
# ONNX Runtime's entropy calibration cuts nothing off: it has one range to choose from, the smallest to the largest number.
#
# One would guess: `quantize_static` with CalibrationMethod.Entropy tries many ranges, as TensorRT's method does, whose slides it
# cites, and takes the one that loses least by Kullback and Leibler, so that one number far outside is cut off.
# What happens: it counts the numbers in 128 bins and merges those into 128, so one range is left, that of all numbers, and the
# file is that of CalibrationMethod.MinMax to the last byte. One activation of 100 among 400,000 normal ones makes the
# range end at 100, and all others have 24 codes of 256. Several batches change nothing, and `extra_options` of
# quantize_static has nothing for the number of bins. CalibrationMethod.Percentile cuts at 4.4, and with 1,024 bins, which
# create_calibrator alone takes, Entropy cuts too. Who compares MinMax and Entropy by accuracy compares a file with itself.
# Nothing is said. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - 2>said.log <<'PYTHON' || { cat said.log >&2; exit 1; }
import contextlib
import io
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator

print(*(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "numpy")))
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (None, 4)) for name in "xy"]
weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "g", ends[:1], ends[1:], [weight])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "float.onnx")


class Reader(CalibrationDataReader):
    """The numbers, in that many batches."""

    def __init__(self, numbers, n_batches):
        self.batches = iter(np.split(numbers, n_batches))

    def get_next(self):
        return next(({"x": batch} for batch in self.batches), None)


def quantized(numbers, method, n_batches=1):
    """The file, and the ends of the input's range in it."""
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static("float.onnx", "int8.onnx", Reader(numbers, n_batches), calibrate_method=method)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load("int8.onnx").graph.initializer}
    scale, zero_point = float(tensors["x_scale"]), int(tensors["x_zero_point"])
    lowest, highest = np.iinfo(tensors["x_zero_point"].dtype).min, np.iinfo(tensors["x_zero_point"].dtype).max
    return Path("int8.onnx").read_bytes(), ((lowest - zero_point) * scale, (highest - zero_point) * scale)


def with_bins(numbers, n_bins):
    """The ends of the range that the same method chooses among more bins."""
    options = {"num_bins": n_bins}
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            Path("float.onnx"), ["MatMul"], "augmented.onnx", CalibrationMethod.Entropy, extra_options=options
        )
        calibrator.collect_data(Reader(numbers, 1))
        return [float(end) for end in calibrator.compute_data()["x"].range_value]


rng = np.random.default_rng(0)
normal = rng.normal(size=(100_000, 4)).astype(np.float32)
cases = {"normal": normal, "behind a ReLU": np.maximum(normal, 0), "cubes of normal": normal**3}
for outlier in (10, 100):
    cases[f"normal and one {outlier}"] = normal.copy()
    cases[f"normal and one {outlier}"][7, 0] = outlier
for title, numbers in cases.items():
    by_range, ends = quantized(numbers, CalibrationMethod.MinMax)
    for n_batches in (1, 10):
        by_entropy, found = quantized(numbers, CalibrationMethod.Entropy, n_batches)
        assert by_entropy == by_range, "entropy and the largest number give two files now"
    numbers_ends = f"{numbers.min():.2f} … {numbers.max():.2f}"
    print(f"{title}, {numbers_ends}: {found[0]:.2f} … {found[1]:.2f}, and the file is that of MinMax")
    assert found == ends and abs(found[1] - numbers.max()) < (ends[1] - ends[0]) / 255

numbers = cases["normal and one 100"]
rest = np.sort(numbers, axis=None)[:-1]
n_codes = len(np.unique(np.round(rest / ((found[1] - found[0]) / 255))))
print(f"with one 100, all others have {n_codes} codes of 256")
assert n_codes < 32
cut = quantized(numbers, CalibrationMethod.Percentile)[1][1]
print(f"Percentile's range ends at {cut:.2f}")
assert cut < 5
for n_bins in (128, 1024):
    low, high = with_bins(numbers, n_bins)
    print(f"create_calibrator with {n_bins} bins: the range ends at {high:.2f}")
    assert (high > 99) == (n_bins == 128)
says = "CalibrationMethod.MinMax or CalibrationMethod.Entropy" in " ".join(quantize_static.__doc__.split())
print("help: Please use CalibrationMethod.MinMax or CalibrationMethod.Entropy as options.")
assert says and "bins" not in quantize_static.__doc__, "the help says something else now"
PYTHON
if grep --quiet --ignore-case --extended-regexp "entropy|bins|range" "$folder/said.log"; then
    cat "$folder/said.log" >&2
    echo "it says something now" >&2
    exit 1
fi
echo "as described"
