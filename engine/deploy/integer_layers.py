"""Integers of layers: weights as int8 codes, biases on the int32 grid."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from engine.networks.graph import copy_graph, layers, set_constant
from engine.quantization.grids import Grid, OnGrid
from engine.quantization.weights import total

MAX_CODE = 128  # |code| of a weight in int8
MAX_INT16 = 2**15 - 1
MAX_BIAS = 2**30  # |bias| in units of its scale: what int32 holds beside the sum of products


@dataclass(frozen=True)
class IntegerLayer:
    """The integers of a convolution or linear layer.

    Its output is Σ_parts scale_x·scale_part·(Σ codes_part·(q_x − zero_point)), codes in int8 and
    scales in float32; the int32 `bias` (output channels) is inside the first of these sums.
    """

    in_grid: Grid
    parts: tuple[OnGrid, ...]
    bias: Tensor

    def product_scale(self, part: OnGrid) -> Tensor:
        """Return scale_x·scale_part, (1) or (C), rounded to float32 as engines do."""
        return torch.tensor(self.in_grid.scale) * part.scale.flatten()

    @property
    def can_saturate(self) -> bool:
        """Whether the sum of two products can leave 16 bits.

        ONNX Runtime 1.32.0 adds products of uint8 and int8 in pairs, in 16 bits that saturate, on
        x86 processors without VNNI or the like. Which weights are a pair depends on its kernels:
        these are the two largest of one sign of an output channel.
        """
        codes = torch.cat([part.codes.flatten(1).int() for part in self.parts])
        pairs = (sign * codes for sign in (1, -1))
        most = max(
            each.topk(min(2, each.shape[1])).values.clamp(min=0).sum(1).max() for each in pairs
        )
        return self.in_grid.max_code * int(most) > MAX_INT16

    def dequantized_bias(self) -> Tensor:
        """Return the bias in float32."""
        return (self.bias.double() * self.product_scale(self.parts[0]).double()).float()


@torch.no_grad()
def make_integer_layer(
    parts: Sequence[OnGrid], bias: Tensor | None, in_grid: Grid, name: str = "a layer"
) -> IntegerLayer:
    """Return the integers of a quantized weight, the sum of `parts`, each (C, …).

    A channel whose bias would leave int32 gets a coarser scale of weights: they are next to nothing
    beside it. Raises ValueError, with the layer's name, where codes do not fit into 8 bits.
    """
    for codes in (part.codes for part in parts):
        if not torch.equal(codes, codes.round().clamp(-MAX_CODE, MAX_CODE - 1)):
            raise ValueError(
                f"{name}: its weights are on no grid of 8 bits or fewer (dorefa's at 8 are on none)"
            )
    bias = torch.zeros(len(parts[0].codes)) if bias is None else bias.detach().cpu()
    most = bias.double().abs()
    most = most.view_as(parts[0].scale) if parts[0].scale.dim() else most.max()
    min_scale = most / (in_grid.scale * MAX_BIAS)
    codes = tuple(_in_8_bits(part, min_scale * (i == 0)) for i, part in enumerate(parts))
    layer = IntegerLayer(in_grid, codes, bias)
    bias_codes = (bias.double() / layer.product_scale(codes[0]).double()).round()
    return IntegerLayer(in_grid, codes, bias_codes.to(torch.int32))


def _in_8_bits(part: OnGrid, min_scale: Tensor) -> OnGrid:
    """Return codes as int8, and scales as float32 of at least `min_scale`."""
    codes, exact_scale = (t.detach().cpu().double() for t in (part.codes, part.scale))
    scale = torch.maximum(exact_scale, min_scale)
    scale = torch.where(scale > 0, scale, 1).float()
    coarser = (exact_scale / scale).where(scale > exact_scale * (1 + 1e-6), 1)
    return OnGrid((codes * coarser).round().to(torch.int8), scale)


def unsigned(codes: Tensor) -> Tensor:
    """Return int8 codes as uint8, of which MAX_CODE stands for 0."""
    return (codes.int() + MAX_CODE).to(torch.uint8)


def n_bits_needed(codes: Tensor) -> int:
    """Return how many bits a two's complement number needs for every code, at least 2."""
    low, high = (extreme.item() for extreme in torch.aminmax(codes))
    return max(2, 1 + math.ceil(math.log2(max(high + 1, -low, 1))))


def with_integers(graph: fx.GraphModule, integers: Mapping[str, IntegerLayer]) -> fx.GraphModule:
    """Return a copy of the graph with the layers' dequantized weights and biases, by name."""
    graph = copy_graph(graph)
    for name, layer in layers(graph).items():
        if name in integers:
            set_constant(graph, layer, "weight", total(integers[name].parts))
            set_constant(graph, layer, "bias", integers[name].dequantized_bias())
    graph.recompile()
    return graph
