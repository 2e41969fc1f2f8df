"""Batch norms of a network that is trained: frozen, folded for a penalty, or estimated again.

A penalty of folded weights sees ŵ = w·γ/√(σ² + ε), as a network is quantized whose batch norms are
folded (engine/networks/folding.py); σ² is the running variance, a constant.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.networks.export import export_network
from engine.networks.folding import batch_norms, foldable, uses_batch_statistics
from engine.networks.graph import layers
from engine.networks.layers import BATCH_AND_INSTANCE_NORMS, BATCH_NORMS, penalized_weights
from engine.system.errors import NetworkError
from engine.system.hardware import to_float64

IMAGE_SHAPE = (3, 32, 32)  # of the images that a network is tried on unless others are given


def freeze_batch_norms(net: nn.Module) -> None:
    """Have batch norms use their running statistics and keep them, until net.train() is called."""
    for m in net.modules():
        if isinstance(m, BATCH_NORMS):
            m.eval()


def count_batch_norms(net: nn.Module) -> int:
    """Return how many batch norms the network has, of all kinds of PyTorch's."""
    return sum(isinstance(m, BATCH_NORMS) for m in net.modules())


class Folding(NamedTuple):
    """A layer and the batch norm that alone reads it, by the names of the network's attributes."""

    weight: str
    norm: str  # the module that it runs in
    gamma: str | None
    variance: str
    eps: float


_foldings: weakref.WeakKeyDictionary[nn.Module, list[Folding]] = weakref.WeakKeyDictionary()


def find_foldings(net: nn.Module, image_shape: Sequence[int] = IMAGE_SHAPE) -> list[Folding]:
    """Return each layer whose output a batch norm alone reads, with that norm.

    A weight that is used more than once has no pair: it is another folded weight, or
    none, each time. They are found once for a network, for images of `image_shape` (3, H, W).
    Raises NetworkError where the network cannot be exported, has batch norms of which none can be
    folded, or has one that does not use running statistics.
    """
    if net not in _foldings:
        graph = export_network(net, image_shape)
        found, name = foldable(graph), type(net).__name__
        if not found and batch_norms(graph):
            raise NetworkError(f"no batch norm after a convolution in {name}: cannot fold")
        if any(map(uses_batch_statistics, batch_norms(graph))):
            raise NetworkError(
                "cannot fold a batch norm without running statistics, or that does not use them"
            )
        stored = [layer.node.meta["stored"].get("weight") for layer in layers(graph).values()]
        own, foldings = _names(net) | {None}, []
        for layer, norm in found:
            weight, path = layer.node.meta["stored"].get("weight"), norm.meta["path"]
            gamma, variance = (norm.args[i] and norm.args[i].target for i in (1, 4))
            is_own = {gamma, variance} <= own
            if not is_own and isinstance(net.get_submodule(path), BATCH_NORMS):
                # such as a parametrized γ: the module has under its names what the network computes
                gamma, variance, is_own = gamma and f"{path}.weight", f"{path}.running_var", True
            if weight and stored.count(weight) == 1 and is_own:
                foldings.append(Folding(weight, path, gamma, variance, norm.args[7]))
        _foldings[net] = foldings
    return _foldings[net]


def _names(net: nn.Module) -> set[str]:
    """Return all names of parameters and buffers, of which one may have several."""
    every = {"remove_duplicate": False}
    return {name for name, _ in (*net.named_parameters(**every), *net.named_buffers(**every))}


def folded_weights(net: nn.Module) -> list[Tensor]:
    """Return Ŵ_l of every convolution and linear layer: W_l where no batch norm follows.

    Differentiable in W_l and γ_l.
    """
    weights, folded = penalized_weights(net), {}
    for each in find_foldings(net):
        w = attrgetter(each.weight)(net)
        if not any(w is each for each in weights):  # such as a transposed convolution's
            continue
        gain = (to_float64(attrgetter(each.variance)(net)) + each.eps).rsqrt()
        if each.gamma:
            gain = gain * to_float64(attrgetter(each.gamma)(net))
        folded[w] = w * gain.to(w).view(-1, *[1] * (w.dim() - 1))
    return [folded.get(w, w) for w in weights]


def describe_unfolded(net: nn.Module, image_shape: Sequence[int], penalty: str) -> str | None:
    """Return that there is nothing to fold, or how many batch norms stay unfolded; None: neither.

    `penalty` is the name of the one that takes folded weights. Raises NetworkError as
    `find_foldings` does, with that name.
    """
    try:
        folded = {net.get_submodule(each.norm) for each in find_foldings(net, image_shape)}
    except NetworkError as error:
        raise NetworkError(f"{penalty} of folded weights: {error}") from error
    norms = folded | {m for m in net.modules() if isinstance(m, BATCH_NORMS)}
    n_left = len(norms - folded)
    if not norms:
        return f"{penalty} of folded weights has no batch norm to fold: weights are as they are"
    if not n_left:
        return None
    why = "do not follow a layer alone, or follow one that runs more than once"
    return f"{n_left} batch norms {why}: they stay"


def norms_with_statistics(net: nn.Module) -> list[nn.Module]:
    """Return the batch and instance norms that keep running statistics, in module order."""
    norms = [m for m in net.modules() if isinstance(m, BATCH_AND_INSTANCE_NORMS)]
    return [norm for norm in norms if norm.running_mean is not None]


@torch.no_grad()
def recalibrate_batch_norm(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every norm by those of these images, in place.

    `batches` are images (B, 3, H, W). Mean and variance are the means over images of their batch's
    own, and over the runs of a norm that has several, each layer seeing what the ones before it
    give: averaged or quantized weights shift both, and statistics of other weights do not fit.
    Source: Sun et al., NeurIPS 2019 (hybrid 8-bit floating point). Raises ValueError where no norm
    keeps statistics.
    """
    norms = norms_with_statistics(net)
    if not norms:
        raise ValueError(f"{type(net).__name__} has no batch-norm statistics to estimate again")
    momenta = [norm.momentum for norm in norms]
    seen = Counter()  # images, of every run of a norm

    def take_mean(norm: nn.Module, *_: Any) -> None:
        seen[norm] += len(images)
        norm.momentum = len(images) / seen[norm]  # a mean over all, not a moving one

    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    hooks = [norm.register_forward_pre_hook(take_mean) for norm in norms]
    for images in batches:
        net(images)
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        hook.remove()
        norm.momentum = momentum
        norm.eval()
