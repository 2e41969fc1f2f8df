"""Nodes and constants of an ONNX model, and its Q/DQ pairs.

Engines fuse `DequantizeLinear → Conv → QuantizeLinear` to a convolution of integers, and two
`DequantizeLinear → Add → QuantizeLinear` to a sum of integers. A grid of fewer than 8 bits is
`QuantizeLinear → Clip` on uint8, which does not stand in the way of that.

Two things are for other engines than ONNX Runtime, which is as fast and exact without them:
operands of sums are quantized twice, and logits rounded to whole steps.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.quantization.grids import Grid

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:  # an extra; see engine/system/extras.py
    onnx = TensorProto = helper = numpy_helper = None

OPSET = 21
IR_VERSION = 10  # its format
Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-np.inf, np.inf)
RELU: Bounds = (0.0, np.inf)


class Emitter:
    """Nodes and constants so far; `grids` are those of the values that are codes, by name."""

    def __init__(self) -> None:
        self.nodes: list = []
        self.initializers: list = []
        self.grids: dict[str, Grid] = {}
        self.known: set[str] = set()

    def model(
        self, sources: "Sequence[onnx.ValueInfoProto]", target: "onnx.ValueInfoProto"
    ) -> "onnx.ModelProto":
        """Return the model of all nodes so far."""
        graph = helper.make_graph(self.nodes, "network", sources, [target], self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="RegulQuant",
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        self.known.add(output)
        return output

    def constant(self, name: str, value: object) -> str:
        """Add a constant, a tensor or what NumPy makes one of, once, and return its name."""
        if name not in self.known:
            value = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
            self.initializers.append(numpy_helper.from_array(value, name))
            self.known.add(name)
        return name

    def cast_to_float(self, x: str, name: str) -> str:
        """Add integers → float32 and return the name of the result."""
        return self.node("Cast", [x], name, to=TensorProto.FLOAT)

    def grid_constants(self, name: str, grid: Grid) -> list[str]:
        """Return the names of scale and zero point of a value."""
        return [
            self.constant(f"{name}.scale", np.float32(grid.scale)),
            self.constant(f"{name}.zero_point", np.uint8(grid.zero_point)),
        ]

    def finish(self, y: str, name: str, grid: Grid | None, bounds: Bounds) -> None:
        """Add what comes after a result y: rounding within its bounds, or these alone."""
        if grid:
            low, high = grid.code_range(bounds)
            is_clipped = (low, high) != (0, 255)
            codes = f"{name}.rounded" if is_clipped else name
            self.node("QuantizeLinear", [y, *self.grid_constants(name, grid)], codes)
            self.grids[name] = grid
            if is_clipped:
                limits = [self.constant(f"code.{n}", np.uint8(n)) for n in (low, high)]
                self.node("Clip", [codes, *limits], name)
        elif bounds == RELU:
            self.node("Relu", [y], name)
        elif bounds != UNBOUNDED:
            limits = [self.constant(f"bound.{bound}", np.float32(bound)) for bound in bounds]
            self.node("Clip", [y, *limits], name)
        elif y != name:
            self.node("Identity", [y], name)

    def as_float(self, name: str) -> str:
        """Return the name of the value in float32, dequantized where it is codes."""
        grid = self.grids.get(name)
        if grid is None or f"{name}.float" in self.known:
            return f"{name}.float" if grid else name
        constants = self.grid_constants(name, grid)
        return self.node("DequantizeLinear", [name, *constants], f"{name}.float")

    def as_float_again(self, name: str) -> str:
        """Return the name of codes in float32, dequantized, quantized and dequantized again.

        OpenVINO 2026.4.1 computes a convolution and the sum that reads it as one, and leaves out
        the rounding between them. A second, equal one keeps the first; ONNX Runtime removes it.
        """
        constants = self.grid_constants(name, self.grids[name])
        again = f"{name}.again"
        if again not in self.known:
            self.node("QuantizeLinear", [self.as_float(name), *constants], f"{again}.codes")
            self.node("DequantizeLinear", [f"{again}.codes", *constants], again)
        return again

    def round_to_steps(self, y: str, name: str, step: Tensor) -> str:
        """Add float32 → its nearest whole number of steps, and return the name of the result.

        Engines add a bias before or after they scale a sum of integers, which moves its last bits.
        """
        size = self.constant(f"{name}.step", step)
        in_steps = self.node("Div", [y, size], f"{name}.in_steps")
        rounded = self.node("Round", [in_steps], f"{name}.rounded_steps")
        return self.node("Mul", [rounded, size], f"{name}.whole_steps")

    def dequantize_constant(self, name: str, codes: Tensor, scale: Tensor) -> str:
        """Return the name of a constant codes·scale; one scale, or one for each codes[i]."""
        scale = scale.flatten() if scale.numel() > 1 else scale.squeeze()
        inputs = [
            self.constant(f"{name}.codes", codes),
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", torch.zeros_like(scale, dtype=codes.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)
