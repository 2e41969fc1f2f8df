"""Batch norms of a graph: folded into the layers before them, or estimated again.

Folding replaces layer → batch norm by one layer with the same outputs in evaluation mode:
ŵ = w·γ/√(σ² + ε) and b̂ = β + (b − μ)·γ/√(σ² + ε), μ and σ² the running statistics.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from engine.networks.graph import (
    Operation,
    aten,
    by_channel,
    copy_graph,
    layers,
    set_constant,
    set_tensor,
)
from engine.system.errors import NetworkError


def batch_norms(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the batch norms of an exported network, in the order in which they run."""
    return [node for node in graph.graph.nodes if node.target is aten.batch_norm.default]


def uses_batch_statistics(norm: fx.Node) -> bool:
    """Tell whether a norm takes the statistics of the batch, not the running ones."""
    return norm.args[5]


def foldable(graph: fx.GraphModule) -> list[tuple[Operation, fx.Node]]:
    """Return each layer whose output a batch norm alone reads, and that batch norm.

    Their channels are the same: those of a batch norm of tokens (B, T, C), as of any, are in
    dimension 1, those of a linear layer in the last.
    """
    pairs = []
    for layer in layers(graph).values():
        [*readers] = layer.node.users
        has_same_channels = len(layer.node.meta["shape"]) == len(layer.node.args[1].meta["shape"])
        reads_alone = len(readers) == 1 and readers[0].args[:1] == (layer.node,)
        if reads_alone and readers[0].target is aten.batch_norm.default and has_same_channels:
            pairs.append((layer, readers[0]))
    return pairs


@torch.no_grad()
def fold_batch_norms(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose batch norms are folded into the layers right before them; others stay.

    Raises NetworkError for a batch norm that does not use running statistics.
    """
    graph = copy_graph(graph)
    for layer, norm in foldable(graph):
        gamma, beta, mean, var = (
            None if each is None else graph.get_buffer(each.target).double()
            for each in norm.args[1:5]
        )
        if uses_batch_statistics(norm):
            raise NetworkError(
                f"{norm.meta['path']} is a batch norm without running statistics, or it does not "
                "use them: the logits of an image depend on the rest of its batch, so that "
                "quantizing it is not defined"
            )
        w = graph.get_buffer(layer.weight)
        b = None if layer.bias is None else graph.get_buffer(layer.bias).double()
        # output channels first: `transpose=True` of this function takes one group for granted
        folded_w, folded_b = fuse_conv_bn_weights(
            by_channel(w.double(), layer), b, mean, var, norm.args[7], gamma, beta
        )
        set_constant(graph, layer, "weight", by_channel(folded_w.detach().to(w.dtype), layer))
        set_constant(graph, layer, "bias", folded_b.detach().to(w.dtype))
        layer.node.meta["stored"] = {}  # the network has no such tensors
        norm.replace_all_uses_with(layer.node)
        graph.graph.erase_node(norm)
    return copy_graph(graph)


def output_gains(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return γ/√(σ² + ε) of the batch norm right after a layer, (channels), by the layer's name.

    In float64.
    """
    gains = {}
    for layer, norm in foldable(graph):
        if not uses_batch_statistics(norm):
            gain = (graph.get_buffer(norm.args[4].target).double() + norm.args[7]).rsqrt()
            if norm.args[1] is not None:
                gain = gain * graph.get_buffer(norm.args[1].target).double()
            gains[layer.name] = gain
    return gains


def _norms_with_statistics(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the runs of batch and instance norms that keep statistics; arguments are the same."""
    kinds = aten.batch_norm.default, aten.instance_norm.default
    nodes = graph.graph.nodes
    return [node for node in nodes if node.target in kinds and node.args[3] is not None]


@torch.no_grad()
def recalibrate_statistics(graph: fx.GraphModule, batches: Iterable[Tensor]) -> fx.GraphModule:
    """Return a copy whose batch norms have the running statistics of these images.

    `batches` are images (B, 3, H, W) on the graph's device. What the statistics are, and why, is
    told at `recalibrate_batch_norm`, which does this to a network. Raises ValueError where no batch
    norm keeps statistics, NetworkError where a batch has one value of a channel: no variance.
    """
    norms_with_statistics = _norms_with_statistics(graph)
    if not norms_with_statistics:
        raise ValueError("the network has no batch-norm statistics to estimate again")
    updated = copy_graph(graph)
    for norm in norms_with_statistics:
        mean, var = (read.target for read in norm.args[3:5])
        set_tensor(updated, mean, torch.zeros_like(graph.get_buffer(mean)))
        set_tensor(updated, var, torch.ones_like(graph.get_buffer(var)))
    running = copy_graph(updated)  # of the same tensors, which it changes in place
    seen = Counter()  # images, of every run of a norm, by its statistics
    for images in batches:
        for norm in _norms_with_statistics(running):
            seen[norm.args[3].target] += len(images)
            norm.update_arg(5, True)  # training
            norm.update_arg(6, len(images) / seen[norm.args[3].target])  # a mean, not a moving one
        running.recompile()
        # channels last, PyTorch sums over all pixels in plain float32: a variance is off by 1e-3
        running(images.contiguous())
    for norm in norms_with_statistics:
        if not updated.get_buffer(norm.args[4].target).isfinite().all():
            raise NetworkError(
                f"{norm.meta['path']}: its statistics cannot be estimated, as variances are not "
                "finite: a larger --batch_size, if a batch has one value for each channel"
            )
    return updated
