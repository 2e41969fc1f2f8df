"""The networks. `net(x)` returns `(logits, activations)`: a regularizer may look at both."""

import torch
from torch import nn

from engine.layers import BatchNormReLU, Conv2d


class ConvNet(nn.Module):
    """Nine 3×3 conv + batch norm + ReLU blocks, global average pooling, one linear layer.

    1,212,778 parameters with 10 classes. Parameters are created in module order by PyTorch's
    default initializers, so that a seed gives the same network in every version.
    """

    # (input channels, output channels, stride) of each block
    BLOCKS = (
        (3, 32, 1),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 1),
        (256, 256, 1),
    )

    def __init__(self, num_classes: int = 10) -> None:
        """Build the network for images of 3 channels."""
        super().__init__()
        for i, (c_in, c_out, stride) in enumerate(self.BLOCKS):
            block = nn.Sequential(
                Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False), BatchNormReLU(c_out)
            )
            self.add_module(f"layer{i}", block)
        self.pool = nn.AdaptiveAvgPool2d(1)  # a module, so that its input can be quantized
        self.classifier = nn.Linear(self.BLOCKS[-1][1], num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Map images x (B, 3, H, W) to logits (B, num_classes) and the nine block outputs."""
        activations = []
        for i in range(len(self.BLOCKS)):
            x = self.get_submodule(f"layer{i}")(x)
            activations.append(x)
        with torch.autocast(x.device.type, enabled=False):  # few numbers: keep them exact
            pooled = self.pool(x.to(self.classifier.weight.dtype)).flatten(1)  # (B, 256)
            return self.classifier(pooled), activations


MODELS: dict[str, type[nn.Module]] = {"ConvNet": ConvNet}
