"""What is quantized of a network: a row for each tensor, in the order in which layers run."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from analysis.report import Row

COLUMNS = ("operation", "tensor", "shape", "bits", "range")
FLOAT = "float"


def plan_rows(
    checkpoint: str,
    net: nn.Module,
    inputs: Mapping[str, Sequence[int]],
    weight_bits: Mapping[str, Sequence[int]],
    input_bits: Mapping[str, Sequence[int]],
    ranges: Mapping[str, Sequence[tuple[float, float]]],
    *,
    biases: bool,
    per_channel: bool,
) -> list[Row]:
    """Return the rows of one network.

    `inputs` are the shapes of what each operation takes, without the batch, in the order in which
    they run. `weight_bits` and `input_bits` have the bits by name, one for each quantized network;
    what is not there stays in floating point. `ranges` are the calibrated ones of inputs, one for
    each of their bits.
    """
    layers = {name: m for name, m in net.named_modules() if name in weight_bits}
    rows = []
    for name, shape in inputs.items():
        bits = input_bits.get(name, ())
        extent = "/".join(dict.fromkeys(map(_range, ranges.get(name, ()))))
        rows.append(_row(name, "input", shape, bits, extent))
        if name in layers:
            rows += _parameter_rows(name, layers[name], weight_bits[name], biases, per_channel)
    return [{"checkpoint": checkpoint, **row} for row in rows]


def _parameter_rows(
    name: str, layer: nn.Module, bits: Sequence[int], biases: bool, per_channel: bool
) -> list[Row]:
    weight = layer.weight
    extent = "per channel" if per_channel else _range((-_abs_max(weight), _abs_max(weight)))
    rows = [_row(name, "weight", weight.shape, bits, extent)]
    if layer.bias is not None:
        quantized = bits if biases else ()
        rows.append(_row(name, "bias", layer.bias.shape, quantized, "weight's" if biases else ""))
    return rows


def _row(name: str, tensor: str, shape: Sequence[int], bits: Sequence[int], extent: str) -> Row:
    text = "/".join(map(str, dict.fromkeys(bits))) or FLOAT
    size = "×".join(map(str, shape))
    return {"operation": name, "tensor": tensor, "shape": size, "bits": text, "range": extent}


def _range(limits: tuple[float, float]) -> str:
    """Return a range as text: from 0 where the grid is unsigned, else as far on either side."""
    low, high = limits
    return f"0 … {high:.4g}" if low >= 0 else f"±{max(high, -low):.4g}"


def _abs_max(t: Tensor) -> float:
    return t.detach().abs().max().item()
