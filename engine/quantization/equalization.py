"""Cross-layer equalization: the channels between two layers are scaled to equal ranges.

Source: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.1. With f positively homogeneous,
f(s·x) = s·f(x) for s > 0, and S = diag(s),

    W2·f(W1·x + b1) = (W2·S)·f(S⁻¹·W1·x + S⁻¹·b1),

so that a network computes the same with other weights. s_i = √(r1_i·r2_i)/r2_i, r1_i the range of
output channel i of W1 and r2_i = max|W2| of input channel i, makes both of them √(r1_i·r2_i): a
grid for the whole tensor then serves every channel. The bounds of a ReLU6 have to be scaled, too.

Half of a bias counts in its channel's range: r1_i = max(max|W1_i|, |b1_i|/2). Without it a channel
that weight decay has killed but for its bias gets a tiny s_i, and b1_i divided by that dwarfs all
other activations. It helps ordinary networks, too: a channel's values are about as large as its
bias, and multiply the rounding errors of W2. The whole bias is too much: results/toolkits/LOG.md
has |b1_i|/k for k from 1 to ∞, on images that are not tested. Brevitas counts 1/2 to 1/20 of it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from engine.networks.graph import (
    KINDS,
    Operation,
    aten,
    copy_graph,
    layers,
    read_tensor,
    set_tensor,
)
from engine.quantization.coverage import by_reason
from engine.system.errors import NetworkError

TOLERANCE = 1e-3  # of log s: with less to change, ranges count as equal
MAX_CHANGE = 1e-3  # of logits by rounding, relative to the largest
BIAS_SHARE = 0.5  # of a bias that counts in its channel's range

# Operations by name: positively homogeneous, or the identity in evaluation mode.
POINTWISE = set("leaky_relu prelu dropout feature_dropout to contiguous clone".split())
OF_PIXELS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"}  # the same, of maps (B, C, H, W)
RESHAPINGS = {"flatten", "view", "reshape", "squeeze", "unsqueeze"}
# Least and largest number that an operation lets through, unless its arguments say others.
CLAMPS = {"relu": (0, None), "relu6": (0, 6), "hardtanh": (-1, 1)}
CLAMPS |= dict.fromkeys(("clamp", "clamp_min"), (None, None))
NO_VALUES = (aten.sym_size.int,)  # what reads shapes alone


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads the first, and what clamps values in between."""

    first: Operation
    second: Operation
    n_channels: int
    clamps: Sequence[fx.Node]


@dataclass(frozen=True)
class Equalization:
    """What `equalize` did: n_pairs of layers in n_sweeps, and layer → why its output stayed."""

    n_pairs: int
    n_sweeps: int
    left_alone: dict[str, str]

    def __str__(self) -> str:
        """Return it as a line."""
        reasons = [f"{why} ({', '.join(each)})" for why, each in by_reason(self.left_alone).items()]
        left = f"; not of these layers: {'; '.join(reasons)}" if reasons else ""
        if not self.n_pairs:
            return f"no pair of layers can be equalized{left}"
        return f"pairs of layers equalized: {self.n_pairs}, in {self.n_sweeps} sweeps{left}"


@torch.no_grad()
def equalize(
    graph: fx.GraphModule, across_relu6: bool = True
) -> tuple[fx.GraphModule, Equalization]:
    """Return a copy of an exported network with the same logits and equalized weights, and what is.

    Batch norms have to be folded before. A channel that is all 0 on either side keeps its scale.
    ReLU6 and other clamps between two layers get bounds for each channel; without `across_relu6`
    such pairs are left alone, and only weights and biases change. Raises NetworkError where logits
    would change, which is tried on random images.
    """
    equalized = copy_graph(graph)
    pairs, left_alone = find_pairs(equalized, across_relu6)
    scales, n_sweeps = equal_ranges(equalized, pairs)
    _scale(equalized, pairs, scales)
    if not pairs:
        return equalized, Equalization(0, n_sweeps, left_alone)
    [placeholder] = graph.graph.find_nodes(op="placeholder")
    images = torch.randn(placeholder.meta["shape"], generator=torch.Generator().manual_seed(0))
    images = images.to(graph.get_buffer(pairs[0].first.weight))
    logits = graph(images)
    if not (equalized(images) - logits).abs().max() <= MAX_CHANGE * logits.abs().max():
        raise NetworkError("--equalize: logits change: weights are too large or small to be scaled")
    return equalized, Equalization(len(pairs), n_sweeps, left_alone)


def find_pairs(
    graph: fx.GraphModule, across_relu6: bool = True
) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs of layers that can be equalized, and layer → why its output cannot be.

    No other layer has a parameter of one of a pair, and every value between them is read once.
    Pairs are in the order in which they run.
    """
    stored = {name: layer.node.meta["stored"].values() for name, layer in layers(graph).items()}
    n_owners = Counter(tensor for tensors in stored.values() for tensor in tensors)
    pairs, left_alone = [], {}
    for layer in layers(graph).values():
        pair, reason = _to_next_layer(layer, across_relu6)
        if pair and any(
            n_owners[tensor] > 1 for each in (layer, pair.second) for tensor in stored[each.name]
        ):
            pair, reason = None, "it or its reader is shared"
        if pair:
            pairs.append(pair)
        elif reason:
            left_alone[layer.name] = reason
    return pairs, left_alone


def _to_next_layer(first: Operation, across_relu6: bool) -> tuple[Pair | None, str]:
    """Return the pair that the layer is the first of, or None and why: "" for the last layer."""
    value = first.node
    clamps = []
    axis = -1 if first.kind == "linear" else 1  # of channels
    n_channels = first.node.meta["shape"][axis]
    while True:
        readers = [reader for reader in value.users if reader.target not in NO_VALUES]
        if len(readers) != 1:
            return None, "read in several places"
        [reader] = readers
        if reader.op == "output":
            return None, ""
        name = KINDS.get(reader.target) or kind_of(reader)
        is_layer = "name" in reader.meta and Operation(reader).is_layer
        if is_layer and _fits(Operation(reader), value.meta["shape"], axis, n_channels):
            return Pair(first, Operation(reader), n_channels, clamps), ""
        bounds = clamp_bounds(reader)
        if bounds and any(bounds):  # a clamp at 0 alone has no scale
            name = "relu6" if bounds == (0, 6) else name
            if not across_relu6 or value.meta["shape"][axis] != n_channels:
                return None, f"read by {name}"
            clamps.append(reader)
        elif is_layer or not (bounds or _keeps_channels(reader, axis, n_channels)):
            return None, f"read by {name}"
        value = reader


def kind_of(node: fx.Node) -> str:
    """Return the operation's name in PyTorch, without that of its overload: "batch_norm"."""
    return getattr(node.target, "__name__", "").partition(".")[0]


def clamp_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """Return the least and the largest number that the node lets through; None: no such node."""
    numbers = node.args[1:]
    if kind_of(node) not in CLAMPS or any(isinstance(number, fx.Node) for number in numbers):
        return None
    return (*numbers, *CLAMPS[kind_of(node)][len(numbers) :])


def _keeps_channels(node: fx.Node, axis: int, n_channels: int) -> bool:
    """Tell whether a node takes channels to the same ones, times the same factors.

    A reshaping may put the pixels of a channel beside each other, for a linear layer.
    """
    name = kind_of(node)
    if name in POINTWISE:
        return True
    if axis != 1 or not isinstance(node.args[0], fx.Node):  # but a list, as of `cat`
        return False
    shape, old = node.meta["shape"], node.args[0].meta["shape"]
    if len(old) < 2:
        return False
    if name == "mean":
        return all(d % len(old) > 1 for d in node.args[1] or (0,))
    if name in RESHAPINGS:
        return len(shape) > 1 and shape[0] == old[0] and shape[1] % n_channels == 0
    if name == "pad":  # with zeros or pixels
        return len(node.args[1]) <= 2 * (len(old) - 2) and not any(node.args[3:])
    return name in OF_PIXELS and len(old) == 4


def _fits(second: Operation, shape: Sequence[int], axis: int, n_channels: int) -> bool:
    """Tell whether the inputs of a layer are the channels of a value of that shape, in order."""
    if second.kind == "linear":
        return axis == -1 or len(shape) == 2
    return axis == 1 and shape[1] == n_channels


def equal_ranges(graph: fx.GraphModule, pairs: Sequence[Pair]) -> tuple[list[Tensor], int]:
    """Return log s (channels) of each pair, with which all ranges are equal, and how many sweeps.

    A sweep goes through the pairs in order. It converges: log s of a pair is the mean of two
    functions that change by no more than log s of the pair before and of the pair after, and at
    both ends of a chain nothing changes. The change from a sweep to the next shrinks by about
    cos²(π / (L + 1)) for a chain of L pairs.
    """
    # Only the largest weight between two channels matters: kernels are read once, not each sweep.
    largest = {  # log max|w|, (groups, outputs of a group, inputs of a group)
        name: view.abs().amax(3).float().log_()
        for name, view in _channel_views(graph, pairs).items()
    }
    biases = [
        torch.tensor(-math.inf)
        if pair.first.bias is None
        else (BIAS_SHARE * graph.get_buffer(pair.first.bias).abs().float()).log()
        for pair in pairs
    ]
    scales = [torch.zeros(pair.n_channels) for pair in pairs]
    n_sweeps = 0
    while pairs:
        n_sweeps += 1
        changes = []
        for pair, bias, scale in zip(pairs, biases, scales, strict=True):
            w1, w2 = (largest[layer.name] for layer in (pair.first, pair.second))
            r1 = torch.maximum(w1.amax(2).flatten(), bias - scale)
            r2 = w2.amax(1).flatten()
            # log s = (log r1 − log r2)/2; where all are 0 a logarithm is −∞, and the scale stays
            changes.append(torch.where(r1.isfinite() & r2.isfinite(), (r1 - r2) / 2, 0))
            w1 -= changes[-1].view(len(w1), -1, 1)
            w2 += changes[-1].view(len(w2), 1, -1)
        if max(change.abs().max().item() for change in changes) <= TOLERANCE:
            break  # without these last changes: what is equal already stays as it is, to the bit
        scales = [scale + change for scale, change in zip(scales, changes, strict=True)]
    return scales, n_sweeps


def _channel_views(graph: fx.GraphModule, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Return each layer's weight by name, as (groups, outputs, inputs of a group, elements).

    Elements are those of a kernel; of a linear layer, the pixels of a channel that were flattened.
    """
    n_inputs = {pair.second.name: pair.n_channels for pair in pairs}
    views = {}
    for layer in (layer for pair in pairs for layer in (pair.first, pair.second)):
        w = graph.get_buffer(layer.weight)
        if layer.kind == "linear":
            view = w.reshape(1, len(w), n_inputs.get(layer.name, 1), -1)
        else:
            view = w.flatten(2).unflatten(0, (layer.groups, -1))
        is_transposed = layer.kind == "conv_transpose"  # (in, out / groups, …) in the graph
        views[layer.name] = view.transpose(1, 2) if is_transposed else view
    return views


def _scale(graph: fx.GraphModule, pairs: Sequence[Pair], log_scales: Sequence[Tensor]) -> None:
    """Scale weights, biases and bounds of the graph; in float64, so that each is rounded once."""
    weights = {w: graph.get_buffer(w) for p in pairs for w in (p.first.weight, p.second.weight)}
    for name, w in weights.items():  # copies, whose dimensions can all be viewed as others
        layout = torch.contiguous_format
        set_tensor(graph, name, w.to(torch.float64, memory_format=layout, copy=True))
    views = _channel_views(graph, pairs)
    for pair, log_s in zip(pairs, log_scales, strict=True):
        s = log_s.double().exp()
        w1, w2 = (views[layer.name] for layer in (pair.first, pair.second))
        w1 /= s.view(len(w1), -1, 1, 1)
        w2 *= s.view(len(w2), 1, -1, 1)
        if pair.first.bias is not None:
            bias = graph.get_buffer(pair.first.bias)
            set_tensor(graph, pair.first.bias, (bias / s).to(bias.dtype))
        for clamp in pair.clamps:
            is_last = pair.first.kind == "linear"  # the channels' dimension
            n_after = 0 if is_last else len(clamp.meta["shape"]) - 2
            per_channel = s.view(-1, *[1] * n_after)  # (C, 1, 1) for (B, C, H, W)
            _divide_bounds(graph, clamp, per_channel, weights[pair.first.weight].dtype)
    for name, w in weights.items():
        set_tensor(graph, name, graph.get_buffer(name).to(w.dtype))
    graph.recompile()


def _divide_bounds(graph: fx.GraphModule, clamp: fx.Node, s: Tensor, dtype: torch.dtype) -> None:
    """Divide the bounds of a clamp by s in place: they become tensors."""
    with graph.graph.inserting_before(clamp):
        bounds = [
            None
            if bound is None
            else read_tensor(graph, f"{clamp.name}.{kind}", (bound / s).to(dtype))
            for bound, kind in zip(clamp_bounds(clamp), ("min", "max"), strict=True)
        ]
    clamp.target = aten.clamp.Tensor
    clamp.args = (clamp.args[0], *bounds)
