#!/usr/bin/env bash
# GGUF's Q4_0 rounds a block's largest weight exactly and the largest of the other sign a whole step off.
#
# One would guess: a symmetric 4-bit format whose scale comes from max|w| has no error above half a step of 1/7 or 2/15 of the
# largest weight, and treats w and −w of one block alike.
# What happens: the scale is the largest weight, with its sign, over −8, so that it is exact, and negative for half of all blocks. A
# weight of nearly that size and the other sign would need the code +8, which there is not: it becomes 7/8 of it, a step
# off, twice the error to nearest. So +1 and −1 of one block become +1 and −0.875, or +0.875 and −1, as the first of them
# says. Q5_0 does the same with 1/16; the formats with a minimum, Q4_1 and Q5_1, stay within half a step. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet gguf==0.19.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType as Format
from gguf.quants import dequantize, quantize

print("gguf", version("gguf"), "numpy", version("numpy"))


def rounded(blocks, form):
    return dequantize(quantize(blocks.astype(np.float32), form), form)


pair = np.tile([1.0, -1.0], 16)[None]
for form, n_bits in ((Format.Q4_0, 4), (Format.Q5_0, 5)):
    for name, block in (("+1 first", pair), ("−1 first", -pair)):
        first, second = rounded(block, form)[0, :2]
        print(f"{form.name}, {name}: {block[0, 0]:+g} becomes {first:+g}, {block[0, 1]:+g} becomes {second:+g}")
        assert first == block[0, 0] and second == block[0, 1] * (1 - 2.0 ** (1 - n_bits)), "both sides are alike now"

# a block of 32 normal weights: the errors in steps, which are in half precision and so a little off
blocks = np.random.default_rng(0).standard_normal((20_000, 32))
for form, n_bits in ((Format.Q4_0, 4), (Format.Q5_0, 5), (Format.Q4_1, 4), (Format.Q5_1, 5)):
    spread = np.ptp(blocks, axis=1) if form in (Format.Q4_1, Format.Q5_1) else 2 * np.abs(blocks).max(1)
    steps = spread / (2**n_bits - (form in (Format.Q4_1, Format.Q5_1)))
    errors = np.abs(rounded(blocks, form) - blocks).max(1) / steps
    print(f"{form.name}: largest error {errors.max():.2f} steps; above 0.55 in {100 * (errors > 0.55).mean():.1f} % of blocks")
    one_sided = form in (Format.Q4_0, Format.Q5_0)
    assert (errors.max() > 0.95) == one_sided, "another error now"
PYTHON
echo "as described"
