"""The strongest step in PyTorch's own terms: one function of `torch.func`, compiled as one graph.

`torch.compile` refuses the double backward of a module; the gradient of a gradient by `torch.func`
it takes as one function.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value

from engine.networks.layers import penalized_layers
from engine.networks.outputs import ACTIVATIONS, split_output
from regularizers import Regularizer

Tensors = dict[str, Tensor]


class Moved(nn.Module):
    """An activation module that adds an offset of 0, whose gradient is that of its output."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, moved."""
        return self.activation(x) + self.offset


def with_offsets(net: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy whose activation modules are `Moved`, with offsets for the batch x."""
    net = copy.deepcopy(net)
    for parent in [*net.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, ACTIVATIONS):
                setattr(parent, name, Moved(child))
    moved = [m for m in net.modules() if isinstance(m, Moved)]
    handles = [m.register_forward_hook(_set_offset) for m in moved]
    with torch.no_grad():
        net.eval()(x)  # statistics of batch norms stay as they are
    net.train()
    for handle in handles:
        handle.remove()
    return net


def _set_offset(m: Moved, _: tuple[Tensor], output: Tensor) -> None:
    m.offset = torch.zeros_like(output)


def gradient_function(
    net: nn.Module, regularizer: Regularizer | None, x: Tensor, labels: Tensor
) -> tuple[Callable[[Tensors, Tensors], Tensors], Tensors, Tensors]:
    """Return ∇(L + R) as a function of parameters and offsets, and what it is to be called with.

    The names are those of `with_offsets(net, x)`; statistics of batch norms are not updated. R is
    None or an L<P>Grad.
    """
    net = with_offsets(net, x)
    params = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())
    offsets = {name: b for name, b in buffers.items() if name.endswith(".offset")}
    weights = [f"{name}.weight" for name in penalized_layers(net)]

    def loss(params: Tensors, offsets: Tensors) -> Tensor:
        own = {name: b.clone() for name, b in buffers.items() if name not in offsets}
        logits, _ = split_output(net, functional_call(net, {**params, **own, **offsets}, (x,)), [])
        return nn.functional.cross_entropy(logits, labels)

    def total(params: Tensors, offsets: Tensors) -> Tensor:
        grads, value = grad_and_value(loss, argnums=(0, 1))(params, offsets)
        w_grads = [grads[0][name] for name in weights]
        return value + penalty(regularizer, w_grads, [*grads[1].values()])

    return grad(total if regularizer else loss), params, offsets


def penalty(regularizer: Regularizer, w_grads: list[Tensor], a_grads: list[Tensor]) -> Tensor:
    """Return R of an L<P>Grad by PyTorch's own norms."""
    norm, p = torch.linalg.vector_norm, regularizer.P
    of_images = sum(len(g) ** (-1 / p) * norm(g, p) for g in a_grads)
    return regularizer.lmbda * (sum(norm(g, p) for g in w_grads) + of_images)


def make_step(
    net: nn.Module, regularizer: Regularizer | None, x: Tensor, labels: Tensor, rate: float
) -> Callable[[], None]:
    """Return a training step by SGD with momentum 0.9 and weight decay 5e-4, as one call."""
    function, params, offsets = gradient_function(net, regularizer, x, labels)
    compiled = torch.compile(function)
    optimizer = torch.optim.SGD([*params.values()], rate, 0.9, weight_decay=5e-4, fused=True)

    def step() -> None:
        for name, g in compiled(params, offsets).items():
            params[name].grad = g
        optimizer.step()

    return step
