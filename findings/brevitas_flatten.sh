#!/usr/bin/env bash
# Brevitas quantizes a ReLU's outputs a second time, with a sign, where `nn.Flatten` follows the ReLU.
#
# One would guess: `nn.Flatten()` and `torch.flatten(x, 1)` move no value, so that the `fx` backend quantizes a
# network the same way whichever of them stands between a ReLU and a linear layer; and what a ReLU gives has an
# unsigned grid there (`uint_sym_act_for_unsigned_values`, the default).
# What happens: with the function, yes. Behind the module, the values are quantized anew on a signed
# grid: at 4 bits, 8 of 16 levels are never used, and the squared error of the input is twice as large. Nothing
# says so. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    torch==2.14.1 torchvision==0.29.1 brevitas==0.13.4 pandas==3.1.1 tqdm==4.70.1
"$folder/venv/bin/python" -W ignore - 2> "$folder/log" <<'PYTHON' || { tail -n 1 "$folder/log"; exit 1; }
from importlib import metadata

import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate, quantize_model
from torch import nn

print("brevitas", metadata.version("brevitas"))
images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Flatten(nn.Module):
    def forward(self, x):
        return torch.flatten(x, 1)


def linear_input(flatten):
    """Return the input of the linear layer, quantized and in float."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), flatten, nn.Linear(8 * 6 * 6, 10)).eval()
    with torch.no_grad():
        expected = net[:3](images)
    net = quantize_model(
        preprocess_for_quantize(net), backend="fx", weight_bit_width=8, act_bit_width=4,
        bias_bit_width=None, weight_quant_granularity="per_tensor", act_quant_percentile=99.999,
        act_quant_type="sym", scale_factor_type="float_scale", quant_format="int",
        uint_sym_act_for_unsigned_values=True,
    )
    inputs = []
    with torch.no_grad():
        net(images)
        calibrate([(images, None)], net)
        [linear] = [module for module in net.modules() if isinstance(module, nn.Linear)]
        linear.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        net.eval()(images)
    return getattr(inputs[0], "value", inputs[0]), expected


found = {}
for name, flatten in {"nn.Flatten()": nn.Flatten(), "torch.flatten(x, 1)": Flatten()}.items():
    x, expected = linear_input(flatten)
    error = ((x - expected).square().mean() / expected.square().mean()).item()
    found[name] = x.unique().numel()
    print(f"{name}: {found[name]} values, the least {x.min():g}, relative squared error {error:.2g}")
assert found["torch.flatten(x, 1)"] > 8, "behind the function the grid is no longer unsigned"
assert found["nn.Flatten()"] <= 8, "behind the module the grid is unsigned now: this finding has ended"
PYTHON
echo "as described"
