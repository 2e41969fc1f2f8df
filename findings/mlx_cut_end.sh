#!/usr/bin/env bash
# MLX: an affine grid does not hold both ends of a group; the end nearer to 0 can be cut by most of a step.
#
# One would guess: mx.quantize with its affine mode (a scale and a bias a group) puts code 0 at the smallest weight and the last code at the
# largest, so that no weight is off by more than half a step, and code order is weight order.
# What happens: the step is moved so that 0 is a code and the end farther from 0 is another; the end nearer to 0 is wherever the codes
# end. With 2 bits the group from −0.9 to 1 gets −0.5, 0, 0.5, 1, and −0.9 is 0.8 steps off. Where the farther end is the positive one,
# the scale is negative and codes run downwards. Of groups of 64 normal weights two thirds have an error above 0.55 steps with 2 bits, and
# a quarter with 4; the largest is a whole step. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "mlx[cpu]==0.32.4" numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
print("mlx", mx.__version__, "numpy", np.__version__)


def rounded(groups, n_bits):
    parts = mx.quantize(mx.array(groups.astype(np.float32)), group_size=64, bits=n_bits)
    return np.array(mx.dequantize(*parts, group_size=64, bits=n_bits)), np.array(parts[1])


example, scale = rounded(np.linspace(-0.9, 1, 64)[None], 2)
print(f"2 bits, from −0.9 to 1: {np.unique(example).tolist()}, scale {scale.item():g}")
assert np.unique(example).tolist() == [-0.5, 0, 0.5, 1] and scale == -0.5, "another grid now"

groups = np.random.default_rng(0).standard_normal((20_000, 64))
for n_bits in (2, 3, 4, 8):
    values, scales = rounded(groups, n_bits)
    errors = np.abs(values - groups).max(1) / np.abs(scales[:, 0])
    up = scales[:, 0] > 0
    print(
        f"{n_bits} bits, groups of 64 normal weights: largest error {errors.max():.2f} steps, above 0.55 in "
        f"{100 * (errors > 0.55).mean():.0f} % of groups; scales are negative in {100 * (~up).mean():.0f} %"
    )
    far_end = np.where(up, groups.min(1), groups.max(1))
    assert np.allclose(np.where(up, values.min(1), values.max(1)), far_end, rtol=1e-5), "the farther end is cut too"
    assert (up == (np.abs(groups.min(1)) > np.abs(groups.max(1)))).all(), "scales have other signs now"
    assert n_bits == 8 or errors.max() > 0.9, "both ends are held now"
PYTHON
echo "as described"
