"""The networks: from images (B, 3, H, W) to logits, of PyTorch's own layers.

A network may return `(logits, activations)`, as ConvNet does. Of any other, the activations whose
gradients may be penalized are the outputs of its activation modules, in the order in which they
run. Sums are `Add` modules and pooling is a module, so that what they take can be quantized.
`utils.make_net` puts in the layers with the fast second-order step.
"""

import importlib.util
import inspect
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from engine.networks.layers import Add, FullPrecisionLinear
from engine.networks.outputs import foreign_code
from engine.system.errors import NetworkError

TORCHVISION = "torchvision:"  # before the name of any of its classifiers
TIMM = "timm:"
TRANSFORMED = "@transform_input"  # after these names: the network maps its inputs to [-1, 1] first
TRANSFORMING = ("googlenet", "inception_v3")


class ConvNet(nn.Module):
    """Nine 3×3 conv + batch norm + ReLU blocks, global average pooling, one linear layer.

    1,212,778 parameters with 10 classes. Parameters are created in module order by PyTorch's
    default initializers, so that a seed gives the same network in every version.
    """

    # (input channels, output channels, stride) of each block
    BLOCKS = (
        (3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1),
        (64, 128, 2), (128, 128, 1), (128, 256, 1), (256, 256, 1),
    )  # fmt: skip

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        for i, (c_in, c_out, stride) in enumerate(self.BLOCKS):
            block = nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            )
            self.add_module(f"layer{i}", block)
        self.pool = nn.AdaptiveAvgPool2d(1)  # a module, so that its input can be quantized
        self.classifier = FullPrecisionLinear(self.BLOCKS[-1][1], num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Map images x (B, 3, H, W) to logits (B, num_classes) and the nine block outputs."""
        activations = []
        for i in range(len(self.BLOCKS)):
            x = self.get_submodule(f"layer{i}")(x)
            activations.append(x)
        pooled = self.pool(x.to(self.classifier.weight.dtype)).flatten(1)  # (B, 256)
        return self.classifier(pooled), activations


class PadShortcut(nn.Module):
    """Shortcut without parameters: every second pixel, zeros for the new channels (option A)."""

    def __init__(self, n_new: int) -> None:
        """Add n_new channels, half of them before and half after those of the input."""
        super().__init__()
        self.n_before = n_new // 2
        self.n_after = n_new - self.n_before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, C + n_new, ⌈H/2⌉, ⌈W/2⌉)."""
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.n_before, self.n_after))


def conv_bn(
    c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Make a convolution that keeps the size of the image, but for the stride, and a batch norm."""
    conv = nn.Conv2d(
        c_in, c_out, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    return conv, nn.BatchNorm2d(c_out)


def projection(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Make a shortcut of a 1×1 convolution and batch norm (option B)."""
    return nn.Sequential(*conv_bn(c_in, c_out, 1, stride))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to a shortcut around them."""

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: nn.Module) -> None:
        """Map c_in channels to c_out; the first convolution and `shortcut` have the stride."""
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c_out, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(c_out, c_out, 3)
        self.relu2 = nn.ReLU()
        self.shortcut = shortcut
        self.add = Add()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, c_in, H, W) to (B, c_out, H/stride, W/stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.add(self.bn2(self.conv2(y)), self.shortcut(x)))


class ResNet(nn.Module):
    """Stages of basic blocks, the first of each but the first halving the image.

    He et al., arXiv 1512.03385, in the form for 32×32 images: a 3×3 stem, no max-pooling. Weights
    are initialized as there (He et al., arXiv 1502.01852).
    """

    def __init__(
        self,
        channels: list[int],
        n_blocks: int,
        make_shortcut: Callable[[int, int, int], nn.Module],
        num_classes: int,
    ) -> None:
        """Build stages of n_blocks blocks; make_shortcut(c_in, c_out, stride) where they differ."""
        super().__init__()
        c_in = channels[0]
        self.conv, self.bn = conv_bn(3, c_in, 3)
        self.relu = nn.ReLU()
        blocks = []
        for stage, c_out in enumerate(channels):
            for i in range(n_blocks):
                stride = 2 if stage and i == 0 else 1
                same = stride == 1 and c_in == c_out
                shortcut = nn.Identity() if same else make_shortcut(c_in, c_out, stride)
                blocks.append(BasicBlock(c_in, c_out, stride, shortcut))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_in, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images x (B, 3, H, W) to logits (B, num_classes)."""
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.classifier(self.pool(x).flatten(1))


def initialize(net: nn.Module) -> None:
    """Draw the weights of convolutions from He's normal distribution over the fan-out."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class ResNet20(ResNet):
    """3 × 3 blocks of 16, 32 and 64 channels, shortcuts without parameters: 269,722 parameters."""

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        channels = scaled(width, 16, 32, 64)
        super().__init__(channels, 3, lambda a, b, stride: PadShortcut(b - a), num_classes)


class ResNet18(ResNet):
    """4 × 2 blocks of 64, 128, 256 and 512 channels: 11,173,962 parameters."""

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__(scaled(width, 64, 128, 256, 512), 2, projection, num_classes)


def scaled(width: float, *channels: int) -> list[int]:
    """Return the numbers of channels times width, at least 1."""
    return [max(1, round(width * c)) for c in channels]


class VGGSmall(nn.Sequential):
    """2 × 128, 2 × 256 and 2 × 512 channels, each pair before max-pooling; one linear layer.

    The network of many papers on quantization (Cai et al., arXiv 1702.00953, with one linear
    layer in place of three): 4,660,106 parameters.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        channels = [3, *scaled(width, 128, 256, 512)]
        stages = []
        for c_in, c_out in pairwise(channels):
            convs = *conv_bn(c_in, c_out, 3), nn.ReLU(), *conv_bn(c_out, c_out, 3), nn.ReLU()
            stages.append(nn.Sequential(*convs, nn.MaxPool2d(2)))
        classifier = nn.Linear(16 * channels[-1], num_classes)
        super().__init__(*stages, nn.AdaptiveAvgPool2d(4), nn.Flatten(), classifier)


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise convolution, 1×1 projection; added to the input if it fits."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        """Expand c_in channels by the factor `expansion`, and project them to c_out."""
        super().__init__()
        c = c_in * expansion
        layers = []
        if expansion > 1:
            layers += [*conv_bn(c_in, c, 1), nn.ReLU6()]
        layers += [*conv_bn(c, c, 3, stride, groups=c), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, *conv_bn(c, c_out, 1))
        self.add = Add() if stride == 1 and c_in == c_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, c_in, H, W) to (B, c_out, H/stride, W/stride)."""
        y = self.layers(x)
        return y if self.add is None else self.add(y, x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., arXiv 1801.04381) for 32×32 images: 2,236,682 parameters.

    The stem and the second stage have stride 1 where the original has 2.
    """

    # (expansion, channels, blocks, stride of the first) of each stage
    STAGES = (
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        c_in, c_last = scaled(width, 32, 1280)
        self.stem = nn.Sequential(*conv_bn(3, c_in, 3), nn.ReLU6())
        blocks = []
        for expansion, channels, n_blocks, stride in self.STAGES:
            [c_out] = scaled(width, channels)
            for i in range(n_blocks):
                blocks.append(InvertedResidual(c_in, c_out, 1 if i else stride, expansion))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*conv_bn(c_in, c_last, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_last, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images x (B, 3, H, W) to logits (B, num_classes)."""
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(self.pool(x).flatten(1))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "ConvNet": ConvNet,
    "ResNet20": ResNet20,
    "ResNet18": ResNet18,
    "VGGSmall": VGGSmall,
    "MobileNetV2": MobileNetV2,
}


def find_model(name: str) -> tuple[str, Callable[..., nn.Module]]:
    """Return the name as it is written in MODELS, torchvision:NAME or timm:NAME; its constructor.

    Upper or lower case does not matter. Raises ValueError for an unknown name.
    """
    if name.lower().startswith(TORCHVISION):
        return _find_in_torchvision(name[len(TORCHVISION) :].lower())
    if name.lower().startswith(TIMM):
        return _find_in_timm(name[len(TIMM) :].lower())
    for key, make in MODELS.items():
        if key.lower() == name.lower():
            return key, make
    names = f"{', '.join(MODELS)}, {TORCHVISION}NAME or {TIMM}NAME"
    raise ValueError(f"unknown value {name!r}: choose {names}")


def is_model(name: object) -> bool:
    """Tell whether that is the name of a network."""
    try:
        return bool(find_model(str(name)))
    except ValueError:
        return False


def _find_in_torchvision(name: str) -> tuple[str, Callable[..., nn.Module]]:
    from torchvision import models as torchvision_models  # slow to import: only where it is used

    names = torchvision_models.list_models(module=torchvision_models)
    plain = name.removesuffix(TRANSFORMED)
    options = {} if plain == name else {"transform_input": True}
    if plain not in names or (options and plain not in TRANSFORMING):
        raise ValueError(f"unknown classifier {name!r} of torchvision: choose {', '.join(names)}")
    build = torchvision_models.get_model_builder(plain)
    options |= {"init_weights": True} if "init_weights" in _parameters(build) else {}
    return TORCHVISION + name, lambda n: build(weights=None, num_classes=n, **options)


def model_of_record(name: str, recorded: object) -> str:
    """Return the network that a file of weights for that network is of, by what its record says.

    torchvision's pretrained GoogLeNet and Inception, and what is made of these, take inputs in
    another range: so does a file without a `recorded` network.
    """
    is_transformed = is_model(name + TRANSFORMED) and recorded in (None, name + TRANSFORMED)
    return name + TRANSFORMED * is_transformed


def _find_in_timm(name: str) -> tuple[str, Callable[..., nn.Module]]:
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"{TIMM}NAME needs timm: python -m pip install -r requirements-timm.txt")
    import timm  # an extra, and slow to import

    if not timm.is_model(name):
        raise ValueError(f"unknown network {name!r} of timm: timm.list_models() names them")
    return TIMM + name, lambda n: timm.create_model(name, pretrained=False, num_classes=n)


def has_width(name: str) -> bool:
    """Tell whether --width has an effect on the network of that name."""
    return "width" in _parameters(find_model(name)[1])


def _parameters(make: Callable[..., nn.Module]) -> set[str]:
    """Return the names that a constructor takes arguments by."""
    parameters = inspect.signature(make).parameters.values()
    return {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}


def make_model(name: str, num_classes: int, width: float = 1.0) -> nn.Module:
    """Make the network of that name; `width` is a factor of its channels where it has one.

    Its constructor gets the number of classes as `num_classes` where it has such an argument, else
    as its first one. Raises NetworkError where it does not take one, fails, or returns no network
    that can be trained and saved.
    """
    options = {"width": width} if width != 1 and has_width(name) else {}
    _, make = find_model(name)
    with foreign_code(name):
        if "num_classes" in _parameters(make):
            net = make(num_classes=num_classes, **options)
        else:
            net = make(num_classes, **options)
    if not isinstance(net, nn.Module):
        raise NetworkError(f"{name} made a {type(net).__name__}, not an nn.Module")
    _check_tensors(name, net)
    return net


def _check_tensors(name: str, net: nn.Module) -> None:
    """Raise NetworkError, naming it, for what cannot be trained, or is in no file of weights."""
    for key, p in net.named_parameters():
        if p.is_complex():
            raise NetworkError(
                f"{name}: the parameter {key} is of {p.dtype}, and only real ones are trained: "
                "torch.view_as_complex makes complex numbers of pairs of real ones"
            )
    for key, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise NetworkError(
                f"{name}: its state_dict has a {type(value).__name__} as {key}, and files of "
                "weights hold tensors alone: get_extra_state must return a tensor"
            )
