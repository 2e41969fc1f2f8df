"""Whether integers do what the network's own operations do, one at a time."""

import torch
from torch import Tensor, fx

from engine.deploy.integer_layers import MAX_BIAS, IntegerLayer, with_integers
from engine.deploy.integer_network import IntegerNetwork
from engine.networks.graph import copy_graph, layers
from engine.quantization.grids import Grid
from engine.quantization.weights import total

MAX_ROUNDING = 0.501  # of a scale: what rounding to the nearest code explains
RELATIVE_ERROR = 2e-5  # of the largest value: sums and products of numbers in float32


@torch.no_grad()
def first_disagreement(
    net: IntegerNetwork, quantized: fx.GraphModule, images: Tensor
) -> str | None:
    """Return what differs first, in one line, or None where rounding explains all differences.

    `quantized` is the graph that `net` was made from, or a copy of it, with the quantizers' weights
    and unrounded biases, on the CPU; `images` are normalized. First each layer's integers are
    compared with these tensors. Then each operation of the graph, in float64, is given what the
    integers before it stand for, and has to give what the integers after it stand for, to half a
    scale: errors do not add up from one operation to the next.
    """
    integers = net.integers()
    for name, layer in layers(quantized).items():
        bias = None if layer.bias is None else quantized.get_buffer(layer.bias)
        if not _is_rounded(integers[name], quantized.get_buffer(layer.weight), bias):
            return f"{name}: its integers are not those of its quantized weights and bias"
    reference = copy_graph(with_integers(quantized, integers)).double()
    comparison = _Comparison(reference, net, net.values(images))
    comparison.run(images.double())
    return comparison.found


def _is_rounded(layer: IntegerLayer, w: Tensor, bias: Tensor | None) -> bool:
    """Tell whether the integers are the weight w, and the bias to half of its scale."""
    rows = (total(layer.parts) - w.cpu()).double().abs().flatten(1).amax(1)
    scale = layer.parts[0].scale.double().flatten()
    is_coarser = layer.bias.abs() > MAX_BIAS / 2  # see make_integer_layer
    is_coarser = is_coarser if len(scale) > 1 else is_coarser.any()
    allowed = torch.where(is_coarser, scale * MAX_ROUNDING, RELATIVE_ERROR * w.abs().max())
    bias = torch.zeros(len(w)).double() if bias is None else bias.cpu().double()
    errors = (layer.dequantized_bias() - bias).abs()
    allowed_of_bias = MAX_ROUNDING * layer.product_scale(layer.parts[0]) + 1e-6 * bias.abs()
    return bool((rows <= allowed).all() and (errors <= allowed_of_bias).all())


class _Comparison(fx.Interpreter):
    """Runs a graph on what integers stand for; `found` is where it gives other values first."""

    def __init__(
        self, graph: fx.GraphModule, net: IntegerNetwork, values: dict[str, Tensor]
    ) -> None:
        super().__init__(graph)
        self.net, self.values = net, values
        self.found: str | None = None

    def run_node(self, node: fx.Node) -> object:
        """Return the value that the integers stand for, where they have the node's."""
        result = super().run_node(node)
        if node.name not in self.net.values_of:
            return result
        name, grid = self.net.values_of[node.name]
        value = self.values[name].double()
        value = grid.dequantize(value) if grid else value
        if self.found is None and (error := _largest_error(result, value, grid)) > 1:
            self.found = (
                f"{name}: its integers differ from what the network's own operation gives, by "
                f"{error:.3g} times what rounding explains"
            )
        # in the memory layout that a view needs
        return torch.empty_like(result, dtype=value.dtype).copy_(value)


def _largest_error(result: Tensor, value: Tensor, grid: Grid | None) -> float:
    """Return the largest difference, as a share of what rounding explains; infinite for NaN."""
    allowed = RELATIVE_ERROR * result.abs().max().item()
    if grid:
        low, high = grid.dequantize(torch.tensor([0.0, grid.max_code], dtype=torch.float64))
        result = result.clamp(low, high)
        allowed += MAX_ROUNDING * grid.scale
    error = (result - value).abs().max().item()
    return error / max(allowed, 1e-30) if error == error else float("inf")
