"""Which layers and parameters of a network in training are trained and penalized.

What is quantized is found elsewhere, on the network's graph: engine/networks/export.py.
"""

import copy
from collections.abc import Container
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine.system.errors import FileError

LAYER_TYPES = nn.Conv2d | nn.Linear  # whose weights are penalized
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
BATCH_AND_INSTANCE_NORMS = nn.modules.batchnorm._NormBase


class Add(nn.Module):
    """The sum of a residual connection."""

    # a module, where `+` would do: what is added can then be seen, and quantized

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b, of one shape."""
        return a + b


class FullPrecisionLinear(nn.Linear):
    """A linear layer whose products are not rounded to bfloat16 under autocast."""

    # a layer of its own: with autocast in a network's forward, torch.fx could not trace the order
    # of its modules, and no batch norm would do the work of the ReLU after it

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, in_features), in the weight's dtype, to (…, out_features)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def moved(net: nn.Module, device: str, memory_format: torch.memory_format) -> nn.Module:
    """Move a network to a device and its tensors of four dimensions into an order; return it.

    `nn.Module.to` would refuse those of five, which have no such order.
    """
    net.to(device)
    return net._apply(lambda t: t.to(memory_format=memory_format) if t.dim() == 4 else t)


def image_dtype(net: nn.Module) -> torch.dtype:
    """Return the dtype of the images that a network takes: float32, as long as it has such weights.

    Of one that was converted as a whole, as by `net.double()`, it is that of its parameters.
    """
    dtypes = [p.dtype for p in net.parameters()]
    return torch.float32 if torch.float32 in dtypes or not dtypes else dtypes[0]


def copy_network(net: nn.Module) -> nn.Module:
    """Return a deep copy, also of a network that keeps tensors with a graph, without their graphs.

    Such as its last activations, or what a hook has computed of its weights.
    """
    computed = {
        id(t): t.detach().clone()
        for module in net.modules()
        for t in tree_leaves(vars(module))
        if isinstance(t, Tensor) and t.grad_fn is not None
    }
    return copy.deepcopy(net, computed)


def unsaved_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Return the buffers, by name, that a network's state_dict lacks (persistent=False)."""
    saved = net.state_dict().keys()
    return {name: b for name, b in net.named_buffers() if name not in saved}


def not_finite(net: nn.Module, allowed: Container[str] = ()) -> list[str]:
    """Return which tensors of its state_dict, but for those allowed, have NaN or infinite values.

    By name. A mask of attention may have infinite ones from the beginning.
    """
    state = net.state_dict().items()
    return [name for name, t in state if name not in allowed and not t.isfinite().all()]


def check_loaded_weights(net: nn.Module, path: Path, allowed: Container[str]) -> None:
    """Raise FileError, naming it, where one that was read from there is not finite."""
    if names := not_finite(net, allowed):
        raise FileError(f"{path}: {names[0]} holds NaN or infinite values")


def penalized_layers(net: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return every convolution and linear layer by name, in module order.

    Layers that share one weight count once, under the name of the first. Those whose weight is
    computed, as by `weight_norm`, are left out.
    """
    layer_of: dict[Tensor, tuple[str, nn.Conv2d | nn.Linear]] = {}
    for name, m in net.named_modules():
        if isinstance(m, LAYER_TYPES) and m._parameters.get("weight") is not None:
            # by the weight: one that two layers share is penalized once
            layer_of.setdefault(m.weight, (name, m))
    return dict(layer_of.values())


def computed_weights(net: nn.Module) -> list[str]:
    """Return the names of layers whose weight is no parameter but computed from some."""
    modules = net.named_modules()
    return [n for n, m in modules if isinstance(m, LAYER_TYPES) and "weight" not in m._parameters]


def unpenalized_parameters(net: nn.Module) -> list[str]:
    """Return the names of trained matrices, and larger tensors, that no penalty of weights is of.

    Those that a weight is computed from are left out.
    """
    penalized = {layer.weight for layer in penalized_layers(net).values()}
    computed = tuple(f"{name}." for name in computed_weights(net))
    return [
        name
        for name, p in trainable_parameters(net).items()
        if p.dim() > 1 and p not in penalized and not name.startswith(computed or "/")
    ]


def trainable_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter that is not frozen by name, in module order."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def penalized_weights(net: nn.Module) -> list[nn.Parameter]:
    """Return W_l: the weight of every convolution and linear layer, in module order.

    Frozen weights are constants: neither they nor their gradients are penalized.
    """
    weights = (layer.weight for layer in penalized_layers(net).values())
    return [w for w in weights if w.requires_grad]
