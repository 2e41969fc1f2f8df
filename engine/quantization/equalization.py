"""Cross-layer equalization: the channels between two layers are scaled to equal ranges.

Source: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.1. With f positively homogeneous,
f(s·x) = s·f(x) for s > 0, and S = diag(s),

    W2·f(W1·x + b1) = (W2·S)·f(S⁻¹·W1·x + S⁻¹·b1),

so that a network computes the same with other weights. s_i = √(r1_i·r2_i)/r2_i, r1_i the range of
output channel i of W1 and r2_i = max|W2| of input channel i, makes both of them √(r1_i·r2_i): a
grid for the whole tensor then serves every channel. The bounds of a ReLU6 have to be scaled, too.

A bias counts in its channel's range: r1_i = max(max|W1_i|, |b1_i|/√K), K the number of inputs of an
output. Without it a channel that weight decay has killed but for its bias gets a tiny s_i, and b1_i
divided by that dwarfs all other activations. |b1_i|/√K is the size that K independent weights
must have for their sum to vary as much as the bias is large. In a trained network nearly all
channels have larger weights than that, and keep the scales of the paper, which |b1_i| alone
would change in most of them.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from engine.networks.exported import (
    BATCH,
    KINDS,
    Operation,
    aten,
    copy_graph,
    get_tensor,
    layers,
    read_tensor,
    set_tensor,
)
from engine.system.errors import NetworkError

TOLERANCE = 2e-4  # of log s: with less to change, ranges count as equal (1 : 1.0004)
MAX_CHANGE = 1e-3  # of logits by rounding, relative to the largest

POINTWISE = {  # positively homogeneous, or the identity in evaluation mode
    aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.dropout.default,
    aten.feature_dropout.default, aten.to.dtype, aten.contiguous.default, aten.clone.default,
}  # fmt: skip
OF_PIXELS = {  # the same, of feature maps (B, C, …): channels stay apart and in order
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
}  # fmt: skip
RESHAPINGS = {
    aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims,
    aten.squeeze.dim, aten.unsqueeze.default,
}  # fmt: skip
READ_NO_VALUES = {aten.sym_size.int, aten._assert_tensor_metadata.default}


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
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            names_by_reason.setdefault(reason, []).append(name)
        reasons = [f"{reason} ({', '.join(names)})" for reason, names in names_by_reason.items()]
        left = f"; outputs left alone: {'; '.join(reasons)}" if reasons else ""
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
    [images] = graph.graph.find_nodes(op="placeholder")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *images.meta["shape"][1:], generator=generator)
    x = x.to(next(graph.buffers(), x))
    before, after = graph(x), equalized(x)
    if not (after - before).abs().max() <= MAX_CHANGE * before.abs().max():
        raise NetworkError("--equalize: logits change: weights are too large or small to be scaled")
    return equalized, Equalization(len(pairs), n_sweeps, left_alone)


# --- which layers ----------------------------------------------------------------------------


def find_pairs(
    graph: fx.GraphModule, across_relu6: bool = True
) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs of layers that can be equalized, and layer → why its output cannot be.

    No other layer has a parameter of one of a pair, and every value between them is read once.
    Pairs are in the order in which they run.
    """
    found = layers(graph)
    n_owners = Counter(name for layer in found.values() for name in _parameters(layer))
    pairs, left_alone = [], {}
    for layer in found.values():
        pair_or_reason = _to_next_layer(layer, across_relu6)
        if isinstance(pair_or_reason, Pair):
            both = {*_parameters(pair_or_reason.first), *_parameters(pair_or_reason.second)}
            if all(n_owners[name] == 1 for name in both):
                pairs.append(pair_or_reason)
                continue
            pair_or_reason = "of or for a shared layer"
        if pair_or_reason:
            left_alone[layer.name] = pair_or_reason
    return pairs, left_alone


def _parameters(layer: Operation) -> Sequence[str]:
    """Return which tensors of the network's `state_dict` are the layer's weight and bias."""
    return layer.node.meta["stored"].values()


def _to_next_layer(first: Operation, across_relu6: bool) -> Pair | str | None:
    """Return the pair that the layer is the first of, why there is none, or None at the end."""
    value, clamps = first.node, []
    axis = -1 if first.kind == "linear" else 1  # of channels
    n_channels = first.node.meta["shape"][axis]
    while True:
        readers = [reader for reader in value.users if reader.target not in READ_NO_VALUES]
        if len(readers) != 1:
            return "read in several places"
        [reader] = readers
        if reader.op == "output":
            return None
        name = KINDS.get(reader.target) or reader.target.__name__.partition(".")[0]
        is_layer = "name" in reader.meta and Operation(reader).is_layer
        if is_layer and _fits(Operation(reader), value.meta["shape"], axis, n_channels):
            return Pair(first, Operation(reader), n_channels, clamps)
        bounds = _bounds(reader)
        if bounds and any(bounds):  # a clamp at 0 alone has no scale
            name = "relu6" if bounds == (0, 6) else name
            if not across_relu6 or value.meta["shape"][axis] != n_channels:
                return f"read by {name}"
            clamps.append(reader)
        elif is_layer or not (bounds or _keeps_channels(reader, axis, n_channels)):
            return f"read by {name}"
        value = reader


def _bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """Return the least and the largest number that the node lets through; None: no such node."""
    arguments = node.args[1:]
    match node.target:
        case aten.relu6.default:
            return 0, 6
        case aten.hardtanh.default:
            return (*arguments, *(-1, 1)[len(arguments) :])
        case aten.clamp.default:
            return (*arguments, None)[:2]
        case aten.clamp_min.default:
            return arguments[0], None
    return None


def _keeps_channels(node: fx.Node, axis: int, n_channels: int) -> bool:
    """Tell whether a node takes channels to the same ones, times the same factors.

    A reshaping may put the pixels of a channel beside each other, for a linear layer.
    """
    if node.target in POINTWISE:
        return True
    shape, old = node.meta["shape"], node.args[0].meta["shape"]
    if axis != 1 or len(old) < 2:
        return False
    if node.target is aten.mean.dim:
        return all(d % len(old) > 1 for d in node.args[1] or (0,))
    if node.target in RESHAPINGS:
        return len(shape) > 1 and shape[0] == old[0] and shape[1] % n_channels == 0
    return node.target in OF_PIXELS and len(old) == 4


def _fits(second: Operation, shape: Sequence[int], axis: int, n_channels: int) -> bool:
    """Tell whether the inputs of a layer are the channels of a value of that shape, in order."""
    if second.kind == "linear":
        return axis == -1 or len(shape) == 2
    return axis == 1 and shape[1] == n_channels


# --- scales ----------------------------------------------------------------------------------


@dataclass
class _Ranges:
    """The logarithms of a layer's ranges, in float32; −∞ stands for weights that are all 0.

    Attributes:
        weight: log max|w| between channels, (groups, outputs of a group, inputs of a group); 1 in
            place of a number of channels whose scales stay.
        bias: log(|b|/√K), (output channels).
    """

    weight: Tensor
    bias: Tensor


def equal_ranges(graph: fx.GraphModule, pairs: Sequence[Pair]) -> tuple[list[Tensor], int]:
    """Return log s (channels) of each pair, with which all ranges are equal, and how many sweeps.

    A sweep goes through the pairs in order. It converges: log s of a pair is the mean of two
    functions that change by no more than log s of the pair before and of the pair after, and at
    both ends of a chain nothing changes. The change from a sweep to the next shrinks by about
    cos²(π / (L + 1)) for a chain of L pairs.
    """
    n_outputs = {pair.first.name: pair.n_channels for pair in pairs}
    n_inputs = {pair.second.name: pair.n_channels for pair in pairs}
    # Only the largest weight between two channels matters: kernels are read once, not each sweep.
    ranges = {
        name: _ranges(graph, layer, n_inputs.get(name), n_outputs.get(name))
        for name, layer in layers(graph).items()
        if name in n_outputs or name in n_inputs
    }
    scales, n_sweeps = [torch.zeros(pair.n_channels) for pair in pairs], 0
    while pairs:
        n_sweeps += 1
        changes = [_equalize_pair(ranges[p.first.name], ranges[p.second.name]) for p in pairs]
        if max(change.abs().max().item() for change in changes) <= TOLERANCE:
            break  # without these last changes: what is equal already stays as it is, to the bit
        scales = [scale + change for scale, change in zip(scales, changes, strict=True)]
    return scales, n_sweeps


def _equalize_pair(first: _Ranges, second: _Ranges) -> Tensor:
    """Scale the ranges of a pair, and return log s = (log r1 − log r2)/2 (channels)."""
    r1 = torch.maximum(first.weight.amax(2).flatten(), first.bias)
    r2 = second.weight.amax(1).flatten()
    log_s = torch.where(r1.isfinite() & r2.isfinite(), (r1 - r2) / 2, 0)
    first.weight -= log_s.view(len(first.weight), -1, 1)
    first.bias = first.bias - log_s
    second.weight += log_s.view(len(second.weight), 1, -1)
    return log_s


def _ranges(
    graph: fx.GraphModule, layer: Operation, n_inputs: int | None, n_outputs: int | None
) -> _Ranges:
    """Return the ranges of a layer's weight and bias; None: that side of it is in no pair."""
    view = _channel_view(get_tensor(graph, layer.weight), layer, n_inputs)
    largest, fan_in = view.abs().amax(3).float(), view[0, 0].numel()
    if n_inputs is None:
        largest = largest.amax(2, keepdim=True)
    if n_outputs is None:
        largest = largest.amax(1, keepdim=True)
    bias = view.new_zeros(()) if layer.bias is None else get_tensor(graph, layer.bias)
    return _Ranges(largest.log_(), (bias.abs() / math.sqrt(fan_in)).float().log_())


def _channel_view(w: Tensor, layer: Operation, n_inputs: int | None) -> Tensor:
    """Return a view of a weight as (groups, outputs of a group, inputs of a group, elements).

    The elements are those of a kernel or, of a linear layer of n_inputs channels, the pixels that
    were flattened.
    """
    if layer.kind == "linear":
        return w.view(1, len(w), n_inputs or w.shape[1], -1)
    view = w.flatten(2).unflatten(0, (layer.argument(6, "groups", 1), -1))
    return view.transpose(1, 2) if layer.kind == "conv_transpose" else view


def _scale(graph: fx.GraphModule, pairs: Sequence[Pair], log_scales: Sequence[Tensor]) -> None:
    """Scale weights, biases and bounds of the graph, in float64: each is rounded once."""
    weights: dict[str, Tensor] = {}

    def view(layer: Operation, n_inputs: int | None = None) -> Tensor:
        w = get_tensor(graph, layer.weight)
        if layer.weight not in weights:
            w = get_tensor(graph, layer.weight)
            layout = torch.contiguous_format  # of which all dimensions can be viewed as others
            weights[layer.weight] = w.to(torch.float64, memory_format=layout, copy=True)
        return _channel_view(weights[layer.weight], layer, n_inputs)

    for pair, log_s in zip(pairs, log_scales, strict=True):
        s = log_s.double().exp()
        w1, w2 = view(pair.first), view(pair.second, pair.n_channels)
        w1.div_(s.view(len(w1), -1, 1, 1))
        w2.mul_(s.view(len(w2), 1, -1, 1))
        if pair.first.bias is not None:
            bias = get_tensor(graph, pair.first.bias)
            set_tensor(graph, pair.first.bias, (bias / s).to(bias.dtype))
        for clamp in pair.clamps:
            _scale_bounds(graph, clamp, s)
    for name, w in weights.items():
        set_tensor(graph, name, w.to(get_tensor(graph, name).dtype))
    graph.recompile()


def _scale_bounds(graph: fx.GraphModule, clamp: fx.Node, s: Tensor) -> None:
    """Divide the bounds of a clamp by s, in place: a tensor with a bound for each channel."""
    per_channel = s.view(-1, *[1] * (len(clamp.meta["shape"]) - 2))  # (C, 1, 1) for (B, C, H, W)
    dtype, bounds = next(graph.buffers()).dtype, []
    with graph.graph.inserting_before(clamp):
        for bound, kind in zip(_bounds(clamp), ("min", "max"), strict=True):
            if bound is not None:
                tensor = (bound / per_channel).to(dtype)
                bound = read_tensor(graph, f"{clamp.name}.{kind}", tensor)
            bounds.append(bound)
    clamp.target, clamp.args = aten.clamp.Tensor, (clamp.args[0], *bounds)
