#!/usr/bin/env bash
# hls4ml: a sum that leaves the range of its default numbers wraps around, so that the largest logit becomes the smallest.
#
# One would guess: the firmware that hls4ml makes of a network without further settings saturates, as quantized runtimes do: a logit
# of 34 becomes the largest number there is, a little below 32.
# What happens: weights, sums and outputs are fixed<16,6>, from −32 to 32 − 1/1024, and what is beyond is taken modulo 64: 34 becomes −30, −34
# becomes 30, and the class with the largest logit gets the smallest one. Neither conversion nor prediction says a word. Needs g++,
# which hls4ml's own emulation takes. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 hls4ml==1.3.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - >said.log 2>&1 <<'PYTHON' || { cat said.log >&2; exit 1; }
from pathlib import Path

import hls4ml
import numpy as np
import torch
from torch import nn

network = nn.Sequential(nn.Linear(1, 3)).eval()
with torch.no_grad():
    network[0].weight.copy_(torch.tensor([[20.0], [5.0], [-0.7]]))
    network[0].bias.zero_()
settings = hls4ml.utils.config_from_pytorch_model(network, (1,), granularity="name")
firmware = hls4ml.converters.convert_from_pytorch_model(
    network, hls_config=settings, output_dir="firmware", backend="Vitis", io_type="io_parallel"
)
firmware.compile()
images = np.array([[1.0], [1.5], [1.7], [-1.7]], dtype=np.float32)
expected, found = network(torch.from_numpy(images)).detach().numpy(), firmware.predict(images)
lines = [f"torch {torch.__version__} hls4ml {hls4ml.__version__}"]
for image, exact, logits in zip(images[:, 0], expected, found, strict=True):
    classes = f"class {exact.argmax()} becomes {logits.argmax()}"
    lines.append(f"input {image:+.1f}: logits {exact.round(4).tolist()} become {logits.tolist()}, {classes}")
wrapped = (expected + 32) % 64 - 32
assert np.abs(expected).max() > 32 and np.allclose(found, wrapped, atol=0.05), "it does not wrap any more"
assert (expected.argmax(1) != found.argmax(1)).sum() == 2, "other classes now"
Path("shown.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
PYTHON
if grep --quiet --ignore-case --extended-regexp "overflow|wrap|range" said.log; then
    cat said.log >&2
    echo "it says something now" >&2
    exit 1
fi
cat shown.txt
echo "as described"
