#!/usr/bin/env bash
# bitsandbytes' FP4 is not the 4-bit float of the OCP standard: its smallest value is 1/192 of the largest, not 1/12.
#
# One would guess: "fp4" is E2M1, whose values are 0, ½, 1, 1½, 2, 3, 4 and 6 in parts of a scale, as in MXFP4 and NVFP4, so that a
# weight is off by a twelfth of its block's largest at most, and by less near 0.
# What happens: seven of the eight magnitudes are those of E2M1 over 6; in place of 1/12 there is 1/192. The gap above it,
# from 1/192 to 1/6, holds a third of normal weights in blocks of 64, and four of the sixteen codes are 0 or nearly. The mean squared error
# of normal weights is 1.3 times that of E2M1 with the same scales. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 bitsandbytes==0.50.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>warnings.log <<'PYTHON' || { cat warnings.log >&2; exit 1; }
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6


def rounded(weights, blocksize):
    return dequantize_4bit(*quantize_4bit(weights, blocksize=blocksize, quant_type="fp4")).reshape(weights.shape)


values = rounded(torch.linspace(-1, 1, 4096), 4096).abs().unique()
for name, magnitudes in (("FP4 of bitsandbytes", values), ("E2M1 over 6", E2M1)):
    print(f"{name}: {', '.join(f'{value:.4f}' for value in magnitudes.tolist())}; the second is 1/{1 / magnitudes[1]:.0f}")
assert abs(values[1] - 1 / 192) < 1e-6, "another smallest value now"
assert torch.allclose(values[2:], E2M1[2:], atol=1e-6), "the others are not E2M1's any more"

torch.manual_seed(0)
weights = torch.randn(20_000, 64)
largest = weights.abs().amax(1, keepdim=True)
nearest = ((weights / largest).abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
errors = {
    "FP4 of bitsandbytes": rounded(weights, 64) - weights,
    "E2M1 with the same scales": E2M1[nearest] * weights.sign() * largest - weights,
}
errors = {name: error.square().mean().item() for name, error in errors.items()}
inside = ((weights / largest).abs() > values[1]) & ((weights / largest).abs() < 1 / 6)
print("mean squared error of normal weights, blocks of 64:", ", ".join(f"{name} {error:.5f}" for name, error in errors.items()))
print(f"weights between 1/192 and 1/6 of their block's largest: {100 * inside.float().mean():.0f} %")
ratio = errors["FP4 of bitsandbytes"] / errors["E2M1 with the same scales"]
print(f"ratio {ratio:.2f}")
assert ratio > 1.1, "the error is not larger any more"
PYTHON
echo "as described"
