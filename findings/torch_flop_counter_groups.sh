#!/usr/bin/env bash
# PyTorch's FLOP counter counts the backward pass of a grouped convolution up to (1 + groups) / 2 times too high.
#
# One would guess: `torch.utils.flop_counter.FlopCounterMode`, which counts the forward pass of a convolution of any number of
# groups right, counts twice that for its backward pass: one convolution for the gradient of the input, one for the weight's.
# What happens: the weight gradient is counted as if there were one group, hence `groups` times too high. The backward pass of a
# depthwise convolution of 32 channels is said to cost 33 forward passes instead of 2, of a MobileNetV2 with images of
# 32 × 32 19.5 instead of 2. Who compares the cost of training depthwise networks by it, or of a penalty
# that needs a second backward pass, compares the numbers of groups. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)


def count(net, images):
    """Return the operations counted of a forward and of a backward pass."""
    images.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        outputs = net(images)
    with FlopCounterMode(display=False) as backward:
        outputs.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


for groups in 1, 4, 32:
    layer = torch.nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
    forward, backward = count(layer, torch.ones(8, 32, 16, 16))
    true = 2 * 8 * 16 * 16 * 32 * (32 // groups) * 9
    print(f"{groups:2} groups: forward {forward:,} (true: {true:,}), backward {backward / forward:g} times that (true: 2)")
    assert forward == true, "the forward pass is counted in another way now"
    assert backward == (1 + groups) * forward, "the backward pass is counted in another way now"

forward, backward = count(torchvision.models.mobilenet_v2(num_classes=10), torch.ones(8, 3, 32, 32))
print(f"MobileNetV2: backward {backward / forward:.1f} times the forward pass")
assert backward > 10 * forward
PYTHON
echo "as described"
