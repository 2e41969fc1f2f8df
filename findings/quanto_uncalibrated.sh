#!/usr/bin/env bash
# optimum-quanto rounds activations that were never calibrated to whole numbers, without a word.
#
# One would guess: a network quantized with activations=qint8 and frozen, but never run under Calibration(), takes the range of each
# batch, or refuses, or says that its scales are missing.
# What happens: every input and output scale is 1 until it is calibrated, and it is used: activations become the whole numbers from −128 to 127.
# The same network answers 0 to every input where they are small, and is 14 % off where they are of the best size for that. Nothing is
# printed or raised, by quantize, freeze or the network. Calibrated, it is within 2 %. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 optimum-quanto==0.2.7 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>warnings.log <<'PYTHON' || { cat warnings.log >&2; exit 1; }
import warnings

import torch
from optimum import quanto
from torch import nn

print("torch", torch.__version__, "optimum-quanto", quanto.__version__)


@torch.no_grad()
def relative_error(size, calibrated):
    """Of the outputs, and how many values they have, for inputs of this standard deviation."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    images = size * torch.randn(256, 16)
    expected = network(images)
    quanto.quantize(network, weights=quanto.qint8, activations=quanto.qint8)
    quanto.freeze(network)
    if calibrated:
        with quanto.Calibration():
            network(images)
    else:
        scales = [scale for name, scale in network.named_buffers() if name.endswith("put_scale")]
        assert scales and all(scale == 1 for scale in scales), "scales that are not calibrated are others now"
    outputs = network(images)
    outputs = outputs.dequantize() if isinstance(outputs, quanto.QTensor) else outputs
    return ((outputs - expected).norm() / expected.norm()).item(), len(outputs.unique())


for size in (0.1, 1, 10, 100):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        error, n_values = relative_error(size, calibrated=False)
    right, _ = relative_error(size, calibrated=True)
    print(
        f"inputs of deviation {size:g}: not calibrated {100 * error:.0f} % off ({n_values} different outputs, "
        f"{len(said)} warnings); calibrated {100 * right:.1f} % off"
    )
    assert right < 0.03 and not said, "it says something now"
    assert error > 2 * right, "it is as good as calibrated now"
    assert size > 0.1 or (n_values == 1 and error == 1), "small inputs are not all 0 any more"
PYTHON
echo "as described"
