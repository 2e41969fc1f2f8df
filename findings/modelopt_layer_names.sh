#!/usr/bin/env bash
# NVIDIA's ModelOpt leaves layers in float because of what their attributes are called: `output`, `visual`, `router`.
#
# One would guess: `mtq.quantize(net, mtq.INT8_DEFAULT_CFG, …)` quantizes every convolution and linear layer, or leaves some out by
# what they are (the first, the last, too small), so that to rename an attribute changes nothing.
# What happens: the default configurations hold name patterns of language models. A classifier called `output` or `output_layer`, a layer with
# `router`, `lm_head` or `visual` anywhere in its name, stays in float32; called `fc` or `classifier` it has 8 bits. Of an image tower
# `visual`, as CLIP implementations call it, no layer is quantized, only the classifier behind it, and nothing is said: the
# accuracy is nearly that of the float network. And `output` counts at the top of the network alone: wrapped once more
# it is quantized. (Where no layer at all would be quantized there is an error.) Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 nvidia-modelopt==0.47.0 numpy==2.4.6 \
    requests==2.34.2 huggingface-hub==2.4.0  # imported by modelopt, though it does not ask for them
cd "$folder"
"$folder/venv/bin/python" - >output.log 2>&1 <<'PYTHON' || { cat output.log >&2; exit 1; }
from collections import OrderedDict
from importlib.metadata import version

import modelopt.torch.quantization as mtq
import torch
from torch import nn

print("result: torch", torch.__version__, "nvidia-modelopt", version("nvidia-modelopt"))
images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def classifier(features="features", last="fc"):
    """Return a network of two convolutions and a linear layer, whose names are given."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(OrderedDict({features: nn.Sequential(*layers), last: nn.Linear(8, 10)}))


def layers_with_8_bits(make_net):
    """Quantize the network; return how many of its three layers have quantized weights and inputs, and the error."""
    torch.manual_seed(0)
    net = make_net().eval()
    with torch.no_grad():
        logits = net(images)
        mtq.quantize(net, mtq.INT8_DEFAULT_CFG, lambda net: net(images))
        error = float((net(images) - logits).abs().max())
    layers = [layer for layer in net.modules() if hasattr(layer, "weight_quantizer")]
    assert len(layers) == 3
    return sum(layer.weight_quantizer.is_enabled and layer.input_quantizer.is_enabled for layer in layers), error


found = {}
for title, make_net in {
    "classifier `fc`": classifier,
    "classifier `output`": lambda: classifier(last="output"),
    "classifier `model.output`": lambda: nn.Sequential(OrderedDict(model=classifier(last="output"))),
    "classifier `output_layer`": lambda: classifier(last="output_layer"),
    "classifier `router`": lambda: classifier(last="router"),
    "convolutions `visual.0` and `visual.2`": lambda: classifier(features="visual"),
}.items():
    found[title], error = layers_with_8_bits(make_net)
    print(f"result: {title}: {found[title]} of 3 layers have 8 bits, largest change of a logit {error:.1e}")
assert list(found.values()) == [3, 2, 3, 2, 2, 1], "other names count now"
PYTHON
grep '^result: ' output.log
echo "as described"
