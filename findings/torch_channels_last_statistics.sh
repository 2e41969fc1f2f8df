#!/usr/bin/env bash
# PyTorch on a CPU: batch statistics of channels-last images are off in the third digit, those of contiguous ones in the eighth.
#
# One would guess: a batch norm in training mode gives the same mean and variance, to float32's rounding, whatever order the
# images have in memory; channels last is chosen for its speed.
# What happens: with contiguous images the sums are made in pieces, and the variance is within 1e-7 of float64's. With channels last
# on one thread each channel is one long sum in plain float32, whose error grows with the number of pixels: for 2,000 images of 32 × 32 the variance
# is off by 1.6e-3, for 100 by 2e-5. Whoever estimates batch norms again with a momentum of 1, or the statistics of a large calibration set,
# gets these. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

print("torch", torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
errors = {}
for n_images in (100, 500, 2000):
    images = 1 + 0.3 * torch.randn(n_images, 8, 32, 32)
    expected = images.double().var((0, 2, 3))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        norm = nn.BatchNorm2d(8, momentum=1.0)
        norm(images.contiguous(memory_format=memory_format))
        error = ((norm.running_var - expected) / expected).abs().max().item()
        errors[n_images, memory_format] = error
        print(f"{n_images} images of 32 × 32, {str(memory_format).removeprefix('torch.')}: variance off by {error:.1e}")
assert all(errors[n, torch.contiguous_format] < 1e-6 for n in (100, 500, 2000)), "contiguous images are worse now"
assert errors[2000, torch.channels_last] > 1e-4, "channels last is as exact now"
assert errors[2000, torch.channels_last] > 5 * errors[100, torch.channels_last], "the error does not grow now"
PYTHON
echo "as described"
