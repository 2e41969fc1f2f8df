"""What is quantized of a network: a row for each tensor, in the order in which layers run."""

from collections.abc import Mapping, Sequence

from torch import nn

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
    rows = []

    def add(tensor: str, shape: Sequence[int], bits: Sequence[int], extent: str) -> None:
        text = "/".join(map(str, dict.fromkeys(bits))) or FLOAT
        row = {"checkpoint": checkpoint, "operation": name, "tensor": tensor}
        rows.append({**row, "shape": "×".join(map(str, shape)), "bits": text, "range": extent})

    for name, shape in inputs.items():
        extents = dict.fromkeys(map(_range, ranges.get(name, ())))
        add("input", shape, input_bits.get(name, ()), "/".join(extents))
        if name not in weight_bits:
            continue
        layer = net.get_submodule(name)
        bits = weight_bits[name]
        largest = layer.weight.detach().abs().max().item()
        extent = "per channel" if per_channel else _range((-largest, largest))
        add("weight", layer.weight.shape, bits, extent)
        if layer.bias is not None:
            quantized = (bits, "weight's") if biases else ((), "")
            add("bias", layer.bias.shape, *quantized)
    return rows


def _range(limits: tuple[float, float]) -> str:
    """Return a range as text: from 0 where the grid is unsigned, else as far on either side."""
    low, high = limits
    return f"0 … {high:.4g}" if low >= 0 else f"±{max(high, -low):.4g}"
