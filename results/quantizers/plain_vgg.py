"""Run a script with one more network: VGGPlain, which is VGGSmall without batch norms.

python results/quantizers/plain_vgg.py train.py --model VGGPlain …
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import models
import quant_inference
import train

SCRIPTS = {"train.py": train.main, "quant_inference.py": quant_inference.main}


def make_plain_vgg(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """Make VGGSmall without batch norms, with biases, initialized as by He et al."""
    net = models.VGGSmall(num_classes, width)
    for stage in list(net)[:3]:
        for i in (0, 3):
            stage[i].bias = nn.Parameter(torch.zeros(stage[i].out_channels))
            stage[i + 1] = nn.Identity()
    models.initialize(net)
    return net


models.MODELS["VGGPlain"] = make_plain_vgg

if __name__ == "__main__":
    SCRIPTS[Path(sys.argv[1]).name](sys.argv[2:])
