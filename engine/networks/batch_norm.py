"""Batch norms: folded into convolutions, frozen, or with statistics estimated again.

Folding replaces conv → batch norm by one convolution with the same outputs in evaluation mode:
ŵ = w·γ/√(σ² + ε) and b̂ = β + (b − μ)·γ/√(σ² + ε), μ and σ² the running statistics.
"""

import copy
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from engine.networks.convolution import Conv2d, is_strided_pointwise
from engine.networks.layers import penalized_weights
from engine.networks.outputs import BATCH_NORMS, module_order, run_network, successive_modules
from engine.system.errors import NetworkError
from engine.system.hardware import to_float64


def freeze_batch_norms(net: nn.Module) -> None:
    """Have batch norms use their running statistics and keep them, until net.train() is called."""
    for m in net.modules():
        if isinstance(m, BATCH_NORMS):
            m.eval()


# --- folding ---------------------------------------------------------------------------------


@torch.no_grad()
def fold_batch_norm(net: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are folded into the convolutions right before them.

    Outputs in evaluation mode stay the same. What is left of a batch norm is its `activation`
    attribute, where it has one. Others stay. Raises ValueError where all would.
    """
    pairs = foldable_pairs(net)
    if not pairs and has_batch_norms(net):
        raise ValueError(f"no batch norm after a convolution in {type(net).__name__}: cannot fold")
    net = copy.deepcopy(net)
    for conv_name, norm_name in pairs:
        conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        net.set_submodule(conv_name, _folded_conv(conv, norm))
        net.set_submodule(norm_name, getattr(norm, "activation", nn.Identity()))
    return net


def folded_weights(net: nn.Module) -> list[Tensor]:
    """Return Ŵ_l of every convolution and linear layer: W_l where no batch norm follows.

    Differentiable in W_l and γ_l. Raises ValueError for a batch norm without running statistics.
    """
    folded = {}
    for conv_name, norm_name in foldable_pairs(net):
        w, norm = net.get_submodule(conv_name).weight, net.get_submodule(norm_name)
        folded[w] = w * _gain(norm).to(w).view(-1, 1, 1, 1)
    return [folded.get(w, w) for w in penalized_weights(net)]


def output_gains(net: nn.Module) -> dict[str, Tensor]:
    """Return γ/√(σ² + ε) of the batch norm that runs right after a convolution, by its name.

    In float64, (output channels). None for a batch norm without running statistics.
    """
    pairs = [(conv, net.get_submodule(norm)) for conv, norm in foldable_pairs(net)]
    return {conv: _gain(norm).detach() for conv, norm in pairs if norm.running_var is not None}


def has_batch_norms(net: nn.Module) -> bool:
    """Tell whether the network has any, of whatever dimension."""
    return any(isinstance(m, BATCH_NORMS) for m in net.modules())


def check_folding(net: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return how many batch norms stay when the others are folded.

    Raises NetworkError where batch norms cannot be folded, or folding would change outputs.
    Layers may run in another order than that of their definition, or more than once. Tried on a
    copy with random parameters and statistics, on random images of `image_shape` (3, H, W).
    """
    try:
        same = _outputs_stay(net, image_shape)
    except ValueError as error:
        raise NetworkError(f"--fold_bn: {error}") from error
    if not same:
        raise NetworkError(
            f"--fold_bn: {type(net).__name__}: a batch norm does not run right after the "
            "convolution that is defined before it, or not only then: cannot fold"
        )
    return sum(isinstance(m, BATCH_NORMS) for m in net.modules()) - len(foldable_pairs(net))


@torch.no_grad()
def _outputs_stay(net: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Tell whether a copy with random parameters and statistics computes the same when folded."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the GPU's stream
        net = copy.deepcopy(net).cpu().eval()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.running_mean, m.running_var, m.weight, m.bias):
                    if t is not None:
                        t.uniform_(0.5, 2)
            elif hasattr(m, "reset_parameters"):
                m.reset_parameters()
        x = torch.randn(2, *image_shape)
        folded_logits, _ = run_network(fold_batch_norm(net), x)
        logits, _ = run_network(net, x)
    return bool((folded_logits - logits).abs().max() <= 1e-3 * logits.abs().max())


def foldable_pairs(net: nn.Module) -> list[tuple[str, str]]:
    """Return the name of each convolution that a batch norm runs right after, and that one's name.

    Of a network whose order cannot be traced, those that are defined one after the other, which
    `check_folding` has to confirm.
    """
    if order := module_order(net):
        pairs = successive_modules(net, _is_conv, _is_norm)
        return [(conv, norm) for conv, norm in pairs if order.n_runs[norm] == 1]
    return [
        (f"{prefix}.{conv_name}".lstrip("."), f"{prefix}.{norm_name}".lstrip("."))
        for prefix, parent in net.named_modules()
        for (conv_name, conv), (norm_name, norm) in pairwise(parent.named_children())
        if _is_conv(conv) and _is_norm(norm)
    ]


def _is_conv(m: nn.Module) -> bool:
    return isinstance(m, nn.Conv2d)


def _is_norm(m: nn.Module) -> bool:
    return isinstance(m, nn.BatchNorm2d)


def _gain(norm: nn.BatchNorm2d) -> Tensor:
    """Return γ/√(σ² + ε) of each channel, in float64; σ² is a constant."""
    if norm.running_var is None:
        raise ValueError("cannot fold a batch norm without running statistics")
    gain = (to_float64(norm.running_var) + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * to_float64(norm.weight)


def _folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a plain convolution that computes norm(conv(x)) of evaluation mode."""
    gain = _gain(norm)
    shift = (0 if conv.bias is None else to_float64(conv.bias)) - to_float64(norm.running_mean)
    strided_pointwise = is_strided_pointwise(conv.weight, conv.stride, conv.padding)
    folded = nn.utils.skip_init(
        Conv2d if strided_pointwise else nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
    )
    folded.weight = nn.Parameter((to_float64(conv.weight) * gain.view(-1, 1, 1, 1)).to(conv.weight))
    bias = shift * gain + (0 if norm.bias is None else to_float64(norm.bias))
    folded.bias = nn.Parameter(bias.to(conv.weight))
    return folded.train(conv.training)


# --- statistics ------------------------------------------------------------------------------


def norms_with_statistics(net: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the batch norms that keep running statistics, in module order."""
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]


@torch.no_grad()
def recalibrate_batch_norm(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every batch norm by those of these images, in place.

    `batches` are images (B, 3, H, W). Mean and variance are the means over images of their batch's
    own, each layer seeing what the quantized ones before it give: quantization shifts both, and
    statistics of the unquantized network no longer fit. Source: Sun et al., NeurIPS 2019 (hybrid
    8-bit floating point). Raises ValueError where no batch norm keeps statistics.
    """
    norms = norms_with_statistics(net)
    if not norms:
        raise ValueError(f"{type(net).__name__} has no batch-norm statistics to estimate again")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    n_images = 0
    for images in batches:
        n_images += len(images)
        for norm in norms:
            norm.momentum = len(images) / n_images  # a mean over all, not a moving one
        net(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
