"""Cross-layer equalization: the channels between two layers are scaled to equal ranges.

Source: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.1. With f positively homogeneous,
f(s·x) = s·f(x) for s > 0, and S = diag(s),

    W2·f(W1·x + b1) = (W2·S)·f(S⁻¹·W1·x + S⁻¹·b1),

so that a network computes the same with other weights. s_i = √(r1_i·r2_i)/r2_i, r1_i = max|W1| of
output channel i and r2_i = max|W2| of input channel i, makes both of them √(r1_i·r2_i): a grid for
the whole tensor then serves every channel. Of a ReLU6 the bound has to be scaled, too.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.networks.graph import Call, NetworkGraph, trace
from engine.networks.operation_inputs import SPATIAL
from engine.networks.outputs import run_network
from engine.system.errors import NetworkError

TOLERANCE = 1e-5  # of a scale, relative: with less to change, ranges count as equal
MAX_CHANGE = 1e-3  # of logits by rounding, relative to the largest

LAYERS = {"conv", "linear"}  # calls that have a weight
POINTWISE = {"relu", "leaky_relu", "identity"}  # calls that are positively homogeneous
# The same of feature maps (B, C, H, W): channels stay apart and in order.
OF_MAPS = POINTWISE | {"max_pool", "max_pool2d", "avg_pool2d", "global_pool", "mean", "flatten"}


class ChannelReLU6(nn.Module):
    """min(max(x, 0), bound), with a bound for each channel: 6 / s of an equalized ReLU6."""

    def __init__(self, bound: Tensor) -> None:
        """`bound` broadcasts against the output of one image: (C, 1, 1) or (C,)."""
        super().__init__()
        self.register_buffer("bound", bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, …) to the same shape."""
        return torch.minimum(x.relu(), self.bound)


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads the first, and the ReLU6 between them, if any."""

    first: Call
    second: Call
    relu6: Call | None = None


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
    net: nn.Module, image_shape: tuple[int, int, int], across_relu6: bool = True
) -> tuple[nn.Module, Equalization]:
    """Return a copy in evaluation mode with the same logits and equalized weights, and what is.

    Batch norms have to be folded before. A channel whose weights are all 0 on either side keeps its
    scale. Where a ReLU6 is between two layers a ChannelReLU6 takes its place; without
    `across_relu6` such pairs are left alone, and only weights and biases change. Activations that
    the network returns beside logits are scaled. Raises NetworkError where logits would change,
    which is tried on random images of `image_shape` (3, H, W).
    """
    net = copy.deepcopy(net).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *image_shape, generator=generator).to(next(net.parameters()))
    before, _ = run_network(net, x)
    pairs, left_alone = find_pairs(net, trace(net, x), across_relu6)
    n_sweeps = _equalize_pairs(net, pairs)
    after, _ = run_network(net, x)
    if not (after - before).abs().max() <= MAX_CHANGE * before.abs().max():
        raise NetworkError(
            f"--equalize: {type(net).__name__}: logits change: an output between two layers is "
            "read in a way that its calls do not show"
        )
    return net, Equalization(len(pairs), n_sweeps, left_alone)


# --- which layers ----------------------------------------------------------------------------


def find_pairs(
    net: nn.Module, graph: NetworkGraph, across_relu6: bool = True
) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs of layers that can be equalized, and layer → why its output cannot be.

    Both layers of a pair run once and share no parameter, and every value between them is read
    once. Pairs are in the order in which they run.
    """
    walk = _Walk(net, graph, across_relu6)
    pairs, left_alone = [], {}
    for call in graph.calls:
        if call.kind in LAYERS:
            pair_or_reason = walk.to_next_layer(call)
            if isinstance(pair_or_reason, Pair):
                pairs.append(pair_or_reason)
            elif pair_or_reason:
                left_alone[call.name] = pair_or_reason
    return pairs, left_alone


class _Walk:
    """Follows the output of a layer to the next one."""

    def __init__(self, net: nn.Module, graph: NetworkGraph, across_relu6: bool) -> None:
        self.output, self.across_relu6 = graph.output, across_relu6
        self.readers: dict[int, list[Call]] = {}
        for call in graph.calls:
            for value in call.inputs:
                self.readers.setdefault(value, []).append(call)
        self.n_runs = Counter(call.module for call in graph.calls)
        self.n_owners = Counter(p for m in net.modules() for p in m.parameters(recurse=False))

    def to_next_layer(self, first: Call) -> Pair | str | None:
        """Return the pair that the layer is the first of, why there is none, or None at the end."""
        kinds, relu6, value = OF_MAPS if first.kind == "conv" else POINTWISE, None, first.output
        while True:
            readers = self.readers.get(value, [])
            if value == self.output and not readers:
                return None
            if len(readers) + (value == self.output) > 1:
                return "read in several places"
            [call] = readers
            if call.kind in LAYERS:
                break
            if call.kind == "relu6" and not relu6 and self.can_scale(call, first):
                relu6 = call
            elif call.kind not in kinds or not _keeps_channels(call):
                return f"read by {call.kind}"
            value = call.output
        if self.is_shared(first) or self.is_shared(call):
            return "of or for a shared layer"
        return Pair(first, call, relu6) if _fit(first, call) else f"read by {call.kind}"

    def can_scale(self, relu6: Call, first: Call) -> bool:
        """Tell whether a ChannelReLU6 can take the place: it is a module that runs once, of maps.

        Or of what a linear layer returns.
        """
        if not self.across_relu6 or relu6.module is None or self.n_runs[relu6.module] > 1:
            return False
        return first.kind == "linear" or len(relu6.in_shape) == 3

    def is_shared(self, layer: Call) -> bool:
        """Tell whether the layer runs more than once, or another has one of its parameters."""
        parameters = layer.module.parameters(recurse=False)
        return self.n_runs[layer.module] > 1 or any(self.n_owners[p] > 1 for p in parameters)


def _keeps_channels(call: Call) -> bool:
    """Tell whether a mean is of height and width, and flattening keeps images apart."""
    if call.kind == "mean":
        dims = call.arguments[0] if call.arguments else None
        return isinstance(dims, tuple | list) and tuple(dims) in SPATIAL
    if call.kind == "flatten":
        module = call.module
        return (call.arguments or (0,))[0] == 1 if module is None else module.start_dim == 1
    return True


def _fit(first: Call, second: Call) -> bool:
    """Tell whether the inputs of the second layer are the output channels of the first, in order.

    A linear layer may have several inputs for each: the pixels of a map that was flattened.
    """
    n = len(first.module.weight)
    if second.kind == "conv":
        return first.kind == "conv" and second.module.in_channels == n
    n_inputs = second.module.in_features
    return n_inputs == n if first.kind == "linear" else second.in_shape == (n_inputs,)


# --- scales ----------------------------------------------------------------------------------


def _equalize_pairs(net: nn.Module, pairs: Sequence[Pair]) -> int:
    """Scale the layers in place until all ranges are equal; return the number of sweeps.

    A sweep goes through the pairs in order. It converges: log s of a pair is the mean of two
    functions that change by no more than log s of the pair before and of the pair after, and at
    both ends of a chain nothing changes. The step from a sweep to the next shrinks by about
    cos²(π / (L + 1)) for a chain of L pairs.
    """
    modules = dict.fromkeys(call.module for pair in pairs for call in (pair.first, pair.second))
    weights = {
        m: m.weight.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
        for m in modules
    }
    views = [_channel_views(pair, weights) for pair in pairs]
    scales = [torch.ones_like(w1[:, 0]) for w1, _ in views]
    n_sweeps, change = 0, math.inf
    while pairs and change > TOLERANCE:
        n_sweeps, change = n_sweeps + 1, 0.0
        for (w1, w2), scale in zip(views, scales, strict=True):
            r1, r2 = w1.abs().amax(1), w2.abs().amax((1, 3)).flatten()
            s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1)  # = √(r1·r2) / r2
            w1.div_(s[:, None])
            w2.mul_(s.view(len(w2), 1, -1, 1))
            scale.mul_(s)
            change = max(change, s.log().abs().max().item())
    for m, weight in weights.items():
        m.weight.copy_(weight)
    for pair, s in zip(pairs, scales, strict=True):
        if pair.first.module.bias is not None:
            pair.first.module.bias.div_(s)
        if pair.relu6:
            shape = (-1, 1, 1) if pair.first.kind == "conv" else (-1,)
            bound = (6 / s).to(pair.first.module.weight).view(shape)
            net.set_submodule(pair.relu6.name, ChannelReLU6(bound))
    return n_sweeps


def _channel_views(pair: Pair, weights: dict[nn.Module, Tensor]) -> tuple[Tensor, Tensor]:
    """Return views of both weights, by output and by input channel, n of them.

    Of the first (n, elements), of the second (groups, outputs of a group, n / groups, elements).
    """
    w1, w2 = weights[pair.first.module], weights[pair.second.module]
    groups = getattr(pair.second.module, "groups", 1)
    return w1.view(len(w1), -1), w2.view(groups, len(w2) // groups, len(w1) // groups, -1)
