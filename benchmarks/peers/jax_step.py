"""The same step in JAX, compiled by `jax.jit`: needs `pip install jax==0.10.2`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor, nn

from engine.networks.fast_layers import ModuleTracer
from engine.networks.layers import Add, FullPrecisionLinear, penalized_layers
from engine.networks.outputs import ACTIVATIONS
from models import PadShortcut
from regularizers import Regularizer

Arrays = dict[str, jax.Array]


class JaxNetwork:
    """A network of `models.py` but VGGSmall in training mode, run by JAX on images (B, H, W, C)."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.graph = net, ModuleTracer().trace(net)
        self.params = {name: to_jax(p) for name, p in net.named_parameters()}

    def run(self, params: Arrays, x: jax.Array, offsets: Arrays) -> tuple[jax.Array, Arrays]:
        """Return the logits and the outputs of activation modules, to which `offsets` are added."""
        values, activations = {}, {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "call_module":
                m, name = self.net.get_submodule(node.target), node.target
                inputs = [values[each] for each in node.all_input_nodes]
                y = KINDS[type(m)](m, params, name, *inputs)
                if isinstance(m, ACTIVATIONS):
                    y = activations[name] = y + offsets.get(name, 0.0)
                values[node] = y
            elif node.op == "call_method":  # a cast, which changes nothing, or `flatten`
                y = values[node.args[0]]
                values[node] = y.reshape(len(y), -1) if node.target == "flatten" else y
            elif node.op == "output":
                logits = node.args[0]
                logits = logits[0] if isinstance(logits, tuple) else logits
                return values[logits], activations
        raise AssertionError("a graph ends with its output")


def to_jax(t: Tensor) -> jax.Array:
    """Return the tensor as JAX has it: kernels (H, W, C_in, C_out), images (B, H, W, C)."""
    t = t.detach()
    return jnp.asarray((t.permute(2, 3, 1, 0) if t.dim() == 4 else t).numpy())


def to_torch(a: jax.Array) -> Tensor:
    """Return the array as PyTorch has it: the inverse of `to_jax`."""
    t = torch.from_numpy(np.array(a))
    return t.permute(3, 2, 0, 1) if t.dim() == 4 else t


def conv(m: nn.Conv2d, params: Arrays, name: str, x: jax.Array) -> jax.Array:
    """Return the convolution of x (B, H, W, C)."""
    y = lax.conv_general_dilated(
        x,
        params[f"{name}.weight"],
        m.stride,
        [(p, p) for p in m.padding],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=m.groups,
    )
    return y if m.bias is None else y + params[f"{name}.bias"]


def batch_norm(m: nn.BatchNorm2d, params: Arrays, name: str, x: jax.Array) -> jax.Array:
    """Return x (B, H, W, C) normalized by its own statistics."""
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    normalized = (x - mean) * lax.rsqrt(var + m.eps)
    return normalized * params[f"{name}.weight"] + params[f"{name}.bias"]


def linear(m: nn.Linear, params: Arrays, name: str, x: jax.Array) -> jax.Array:
    """Return W x + b."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def pad_shortcut(m: PadShortcut, params: Arrays, name: str, x: jax.Array) -> jax.Array:
    """Return every second pixel with channels of zeros beside those of x (B, H, W, C)."""
    return jnp.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(m.n_before, m.n_after)])


def global_mean(m: nn.AdaptiveAvgPool2d, params: Arrays, name: str, x: jax.Array) -> jax.Array:
    """Return the mean of all pixels, (B, 1, 1, C)."""
    assert m.output_size == 1
    return x.mean((1, 2), keepdims=True)


KINDS = {
    nn.Conv2d: conv,
    nn.BatchNorm2d: batch_norm,
    nn.Linear: linear,
    FullPrecisionLinear: linear,
    PadShortcut: pad_shortcut,
    nn.ReLU: lambda m, params, name, x: jax.nn.relu(x),
    nn.ReLU6: lambda m, params, name, x: jax.nn.relu6(x),
    nn.Identity: lambda m, params, name, x: x,
    nn.AdaptiveAvgPool2d: global_mean,
    Add: lambda m, params, name, x, y: x + y,
}


def gradient_function(
    net: nn.Module, regularizer: Regularizer | None, x: Tensor, labels: Tensor
) -> tuple[Callable[[Arrays], Arrays], Arrays]:
    """Return ∇(L + R) as a function of the parameters, and these; R is None, L1Grad or L2Grad."""
    network, images = JaxNetwork(net), jnp.asarray(x.permute(0, 2, 3, 1).numpy())
    targets = jnp.asarray(labels.numpy())[:, None]
    weights = [f"{name}.weight" for name in penalized_layers(net)]
    shapes = jax.eval_shape(network.run, network.params, images, {})[1]
    offsets = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

    def loss(params: Arrays, offsets: Arrays) -> jax.Array:
        logits, _ = network.run(params, images, offsets)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, 1).mean()

    def total(params: Arrays) -> jax.Array:
        value, (of_params, of_offsets) = jax.value_and_grad(loss, (0, 1))(params, offsets)
        norms = sum(jnp.linalg.norm(of_params[name].ravel(), p) for name in weights)
        scale = len(images) ** (-1 / p)
        norms += sum(scale * jnp.linalg.norm(g.ravel(), p) for g in of_offsets.values())
        return value + regularizer.lmbda * norms

    p = regularizer.P if regularizer else None
    return jax.grad(total if regularizer else lambda params: loss(params, offsets)), network.params


def make_step(
    net: nn.Module, regularizer: Regularizer | None, x: Tensor, labels: Tensor, rate: float
) -> Callable[[], None]:
    """Return a training step by SGD with momentum 0.9 and weight decay 5e-4, as one call."""
    gradient, params = gradient_function(net, regularizer, x, labels)

    def update(params: Arrays, momentum: Arrays) -> tuple[Arrays, Arrays]:
        grads = gradient(params)
        momentum = {n: 0.9 * momentum[n] + grads[n] + 5e-4 * p for n, p in params.items()}
        return {n: p - rate * momentum[n] for n, p in params.items()}, momentum

    compiled = jax.jit(update, donate_argnums=(0, 1))
    state = params, jax.tree.map(jnp.zeros_like, params)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(*state))

    return step
