"""Quantizing the weights of a network: of its graph, or of a copy of the network itself.

A quantizer maps a weight with its output channels first and a number of bits to floats on a grid;
see quant_utils.py. One that knows its integers has them in `quantizer.grid`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from engine.networks.export import export_network, write_back
from engine.networks.graph import Operation, by_channel, copy_graph, layers, set_constant
from engine.quantization.grids import OnGrid

Quantizer = Callable[..., Tensor]
Parts = tuple[OnGrid, ...]  # whose sum a quantized tensor is
Correction = Callable[[Tensor, Tensor], Tensor]  # (w, w_q) → corrected w_q, all of one shape
NO_EXCEPTIONS: Mapping[str, Any] = MappingProxyType({})


def total(parts: Parts | Tensor) -> Tensor:
    """Return the floats that parts are the sum of; floats as they are."""
    return sum(part.dequantize() for part in parts) if isinstance(parts, tuple) else parts


def grid_of(quantizer: Quantizer) -> Callable[..., Parts | Tensor]:
    """Return the function that returns the quantizer's parts, itself where it returns floats.

    Of a quantizer whose options are bound with `functools.partial`, with these options.
    """
    if isinstance(quantizer, partial):
        return partial(grid_of(quantizer.func), *quantizer.args, **quantizer.keywords)
    return getattr(quantizer, "grid", quantizer)


class QuantizedLayer(NamedTuple):
    """What quantizing made of one layer's weight.

    `squared_error` is Σ(w_q − w)². `parts` are its integers, with output channels first, whose sum
    w_q is; None where the quantizer returned floats, or a correction moved them off the grid.
    """

    name: str
    squared_error: float
    n_weights: int
    parts: Parts | None = None


def model_error(layers: Sequence[QuantizedLayer], avg_in_layer: bool = False) -> float:
    """Return the mean over layers of their squared errors.

    `avg_in_layer`: divide each layer's by its number of weights first.
    """
    return sum(e.squared_error / (e.n_weights if avg_in_layer else 1) for e in layers) / len(layers)


def checked(w_q: Tensor, w: Tensor) -> Tensor:
    """Return what a quantizer made of w; ValueError where that is no quantized w."""
    if not isinstance(w_q, Tensor) or w_q.shape != w.shape:
        shape = tuple(w_q.shape) if isinstance(w_q, Tensor) else type(w_q).__name__
        raise ValueError(f"the quantizer returned {shape} for values of shape {tuple(w.shape)}")
    if not w_q.isfinite().all():
        raise ValueError("the quantizer returned values that are not finite")
    return w_q


def quantize_bias(
    bias: Tensor, w: Tensor, quantizer: Quantizer, n_bits: int, bias_range: str
) -> Tensor:
    """Return the bias (C,), on the grid of its weight w or, with "own", on one of its own."""
    if bias_range == "weight":
        return checked(quantizer(bias, n_bits, range_source=w), bias)
    # a single row: one range, also where weights have one for each channel
    return checked(quantizer(bias[None], n_bits)[0], bias)


@torch.no_grad()
def quantize_layer(
    graph: fx.GraphModule,
    layer: Operation,
    quantizer: Quantizer,
    n_bits: int,
    *,
    bias_range: str | None = "weight",
    correction: Correction | None = None,
    round_up: Tensor | int | None = None,
) -> QuantizedLayer:
    """Give a layer of the graph quantized weights, and return what became of them.

    `bias_range`: None keeps the bias in full precision, "weight" quantizes it on its weight's grid,
    "own" with one range and breakpoint of its own. `correction` is applied to the quantized weight,
    as `mean_correction` is. `round_up` is that of the weight, in its shape in the graph, for
    quantizers that take it. Raises ValueError, naming the layer, for NaN weights.
    """
    w = by_channel(graph.get_buffer(layer.weight), layer)
    if isinstance(round_up, Tensor):
        round_up = by_channel(round_up, layer)
    rounding = {} if round_up is None else {"round_up": round_up}
    try:
        if bias_range and layer.bias:
            bias = graph.get_buffer(layer.bias)
            set_constant(
                graph, layer, "bias", quantize_bias(bias, w, quantizer, n_bits, bias_range)
            )
        parts = grid_of(quantizer)(w, n_bits, **rounding)
        w_q = checked(total(parts), w)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error
    if correction:
        w_q = correction(w, w_q)
    set_constant(graph, layer, "weight", by_channel(w_q, layer))
    squared_error = (w_q - w).double().square().sum().item()
    is_on_grid = not correction and isinstance(parts, tuple)
    return QuantizedLayer(layer.name, squared_error, w.numel(), parts if is_on_grid else None)


def quantize_weights(
    graph: fx.GraphModule,
    quantizer: Quantizer,
    n_bits: int,
    *,
    layer_bits: Mapping[str, int] = NO_EXCEPTIONS,
    round_up: Mapping[str, Tensor] = NO_EXCEPTIONS,
    **options: Any,
) -> tuple[fx.GraphModule, list[QuantizedLayer]]:
    """Return a copy of an exported network with quantized weights, and what became of each layer.

    Bind the quantizer's options first: `partial(pwlq, per_channel=True)`. `layer_bits` are the bits
    of layers, by name, that have others than n_bits, `round_up` how weights of layers are rounded
    that do not go to nearest; for `options` see `quantize_layer`.
    """
    graph = copy_graph(graph)
    quantized = [
        quantize_layer(
            graph,
            layer,
            quantizer,
            layer_bits.get(name, n_bits),
            round_up=round_up.get(name),
            **options,
        )
        for name, layer in layers(graph).items()
    ]
    return graph, quantized


def quantize_model(
    net: nn.Module,
    quantizer: Quantizer,
    n_bits: int,
    *,
    image_shape: Sequence[int] = (3, 32, 32),
    **options: Any,
) -> tuple[nn.Module, list[QuantizedLayer]]:
    """Return a copy of any network with quantized weights, and what became of each layer.

    What is quantized is every weight that a convolution, linear map or matrix product takes when
    the network runs on images of `image_shape`, as it is computed; for `options` see
    `quantize_weights`. Where the network computes weights in its `forward`, which would change the
    quantized ones again, its exported graph is returned in place of a copy. Raises NetworkError for
    a network that cannot be exported.
    """
    graph, quantized = quantize_weights(
        export_network(net, image_shape), quantizer, n_bits, **options
    )
    return write_back(net, graph)[0], quantized
