"""Taylor expansion of the loss in the change that quantization makes to the weights.

With g the gradient of the mean loss, H its Hessian and Δ the change of some parameters:
L(W + Δ) − L(W) ≈ g·Δ + ½·ΔᵀHΔ, and |g·Δ| ≤ ‖g‖₁·‖Δ‖_∞.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import grad

from engine.images.loader import Loader
from engine.networks.graph import copy_graph, layers, set_tensor
from engine.networks.outputs import run_network
from engine.system import distributed
from engine.system.hardware import with_float64

Delta = dict[str, Tensor]  # the change of parameters, by their names


class TaylorTerms(NamedTuple):
    """Terms of the loss change for one Δ; the fields are columns of per_layer.csv."""

    first_order: float  # g·Δ
    first_order_bound: float  # ‖g‖₁·‖Δ‖_∞, over the parameters that Δ changes
    second_order: float  # ½·ΔᵀHΔ


def taylor_terms(
    graph: fx.GraphModule,
    loader: Loader,
    deltas: Sequence[Delta],
    tick: Callable[[], None] = lambda: None,
) -> list[TaylorTerms]:
    """Return the terms of the mean loss over the loader's images for each Δ.

    `tick` is called for each batch and Δ.
    """
    graph = copy_graph(graph)
    params = {}
    for layer in layers(graph).values():
        for name in layer.tensors.values():
            params[name] = graph.get_buffer(name).clone().requires_grad_()
            set_tensor(graph, name, params[name])
    deltas = [{key: d.to(params[key].device) for key, d in delta.items()} for delta in deltas]
    g, second_order = gradient_and_curvatures(graph, params, loader, deltas, tick)
    terms = []
    for delta, curvature in zip(deltas, second_order, strict=True):
        l1_norm = sum(g[key].abs().sum().item() for key in delta)
        bound = l1_norm * max(d.abs().max().item() for d in delta.values())
        terms.append(TaylorTerms(dot(g, delta).item(), bound, curvature))
    return terms


def gradient_and_curvatures(
    net: nn.Module, params: Delta, loader: Loader, deltas: Sequence[Delta], tick: Callable[[], None]
) -> tuple[Delta, list[float]]:
    """Return g of all `params` of the network, by name, and ½·ΔᵀHΔ of each Δ.

    H is never formed: HΔ is the gradient of g·Δ, a double backward through the parameters that Δ
    changes. With N processes each takes every N-th batch.
    """
    g = {key: torch.zeros_like(p) for key, p in params.items()}
    curvatures = [0.0] * len(deltas)
    for x, y in loader.batches(0, distributed.get_rank(), distributed.get_world_size()):
        logits, _ = run_network(net, x)
        loss = F.cross_entropy(logits, y, reduction="sum") / loader.n_images
        grads = grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
        grads = dict(zip(params, grads, strict=True))
        for i, delta in enumerate(deltas):
            changed = [params[key] for key in delta]
            products = grad(dot(grads, delta), changed, retain_graph=True)
            product = dict(zip(delta, products, strict=True))
            curvatures[i] += dot(product, delta).item() / 2
            tick()
        for key in g:
            g[key] += grads[key].detach()
    g = {key: distributed.all_reduce_sum(partial_sum) for key, partial_sum in g.items()}
    device = with_float64(loader.labels.device)
    totals = torch.tensor(curvatures, dtype=torch.float64, device=device)
    return g, distributed.all_reduce_sum(totals).tolist()


def dot(a: Delta, delta: Delta) -> Tensor:
    """Return a·Δ over the parameters that Δ changes."""
    return sum((a[key] * d).sum() for key, d in delta.items())
