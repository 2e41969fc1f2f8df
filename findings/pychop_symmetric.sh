#!/usr/bin/env bash
# Pychop's symmetric integers cut off the upper half of what a ReLU gives, and its other ones use half of their codes.
#
# One would guess: Chopi(bits=8, symmetric=True) has the scale max|x| / 127, so that no number is off by more than half a step, whatever its sign;
# and Chopi(bits=8) spreads 256 codes from the smallest to the largest number.
# What happens: the symmetric scale is (max − min) / 255, which is right only where −min = max. Numbers from 0 to 1, as behind a ReLU,
# get the codes 0 to 127 of 1/255: all above 0.498 become 0.498. Numbers from ½ to 1 become one number. Without `symmetric` the codes end at
# 2^(bits − 1) − 1: 8 bits are 128 codes, 2 bits are 2. The same on NumPy and on PyTorch; nothing is said but that an integer type is wider than the codes.
# A network quantized so loses accuracy by its activations' sign, not by its bits. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pychop==0.6.2 torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>said.log <<'PYTHON' || { cat said.log >&2; exit 1; }
from importlib.metadata import version

import numpy as np
import torch
from pychop import Chopi

print("pychop", version("pychop"), "torch", torch.__version__, "numpy", np.__version__)


def results(numbers, **options):
    """The numbers after quantization, which NumPy and PyTorch agree on, and how many codes there are."""
    answers = []
    for data in (numbers, torch.from_numpy(numbers)):
        quantizer = Chopi(**options)
        codes = quantizer.quantize(data)
        answers.append((np.asarray(quantizer.dequantize(codes)), len(np.unique(np.asarray(codes)))))
    assert np.allclose(answers[0][0], answers[1][0], atol=1e-2) and answers[0][1] == answers[1][1]
    return answers[0]


for low, high in ((-1, 1), (0, 1), (0.5, 1)):
    numbers = np.linspace(low, high, 2001, dtype=np.float32)
    got, n_codes = results(numbers, bits=8, symmetric=True)
    error = np.abs(got - numbers).max() * 127 / np.abs(numbers).max()
    print(f"symmetric, 8 bits, {low:4} to {high}: {n_codes:3} codes, {got.min():.3f} to {got.max():.3f}, at most {error:.1f} steps of max|x| / 127 off")
    assert (error < 0.51) == (low == -1), "the scale is another one now"
    if low == 0:
        assert abs(got.max() - 127 / 255) < 1e-3
    if low == 0.5:
        assert n_codes == 1

numbers = np.linspace(0, 1, 2001, dtype=np.float32)
for bits in (8, 4, 2):
    n_codes = results(numbers, bits=bits)[1]
    print(f"not symmetric, {bits} bits: {n_codes} codes of {2**bits}")
    assert n_codes == 2 ** (bits - 1), "it uses other codes now"
PYTHON
if grep --quiet --ignore-case --extended-regexp "clip|saturat|symmetric|range" "$folder/said.log"; then
    cat "$folder/said.log" >&2
    echo "it says something now" >&2
    exit 1
fi
echo "as described"
