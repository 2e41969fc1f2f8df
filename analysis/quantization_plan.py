"""What is quantized of a network: a row for each tensor, in the order in which layers run."""

from collections.abc import Sequence

from torch import fx

from analysis.measured_network import MeasuredNetwork, Quantization
from analysis.report import FLOAT_BITS, Row
from engine.networks.graph import BATCH, operations
from engine.quantization.activations import quantized_inputs
from engine.quantization.grids import Grid

COLUMNS = ("operation", "tensor", "shape", "bits", "range")
FLOAT = "float"
BIAS_RANGES = {"weight": "weight's", "own": "its own"}


def plan_rows(
    network: MeasuredNetwork, quantizations: Sequence[Quantization], per_channel: bool
) -> list[Row]:
    """Return what the quantizations make of each input, weight and bias of the network.

    An input's shape is that of one image.
    """
    act_bits = list(dict.fromkeys(how.act_bits for how in quantizations))
    inputs = quantized_inputs(network.graph, network.conditions.sums)
    all_grids = [network.grids(n) for n in act_bits if n != FLOAT_BITS]
    rows = []
    for operation in operations(network.graph):
        for name in filter(inputs.__contains__, operation.inputs):
            grids = [of_inputs[name] for of_inputs in all_grids]
            ranges = dict.fromkeys(
                _grid_range(grid, network.conditions.asymmetric) for grid in grids
            )
            bits = [grid.n_bits for grid in grids]
            size = _size(_of_one_image(operation.source(name)))
            rows.append(_row(name, "input", size, bits, "/".join(ranges)))
        if operation.weight:
            name, w = operation.name, network.graph.get_buffer(operation.weight)
            bits = [network.weight_bits(how)[name] for how in quantizations]
            extent = "per channel" if per_channel else f"±{w.abs().max().item():.4g}"
            rows.append(_row(name, "weight", _size(w.shape), bits, extent))
        if operation.bias:
            shape = network.graph.get_buffer(operation.bias).shape
            bits = [n for n, how in zip(bits, quantizations, strict=True) if how.bias_range]
            ranges = (BIAS_RANGES[how.bias_range] for how in quantizations if how.bias_range)
            rows.append(_row(name, "bias", _size(shape), bits, "/".join(dict.fromkeys(ranges))))
    return [{"checkpoint": network.name, **row} for row in rows]


def _of_one_image(value: fx.Node) -> list[int]:
    """Return the shape of a value without the images, which may be a factor of one dimension."""
    shape = [*value.meta["shape"]]
    of_images = [i for i, n in enumerate(shape) if n % BATCH == 0]
    if of_images and value.op != "get_attr":  # the first one; a constant has none
        shape[of_images[0]] //= BATCH
        if shape[of_images[0]] == 1:
            del shape[of_images[0]]
    return shape


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _row(name: str, tensor: str, size: str, bits: Sequence[int], extent: str) -> Row:
    text = "/".join(map(str, dict.fromkeys(bits))) or FLOAT
    return {"operation": name, "tensor": tensor, "shape": size, "bits": text, "range": extent}


def _grid_range(grid: Grid, asymmetric: bool) -> str:
    """Return the range of a grid of inputs as text; `asymmetric`: unless it is unsigned."""
    if grid.zero_point and not asymmetric:
        return f"±{grid.scale * grid.max_code / 2:.4g}"
    low, high = (grid.scale * (code - grid.zero_point) for code in (0, grid.max_code))
    return f"{low:.4g} … {high:.4g}"
