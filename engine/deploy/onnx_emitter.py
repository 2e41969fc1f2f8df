"""Nodes and constants of an ONNX model, and its Q/DQ pairs.

Engines fuse `DequantizeLinear → Conv → QuantizeLinear` to a convolution of integers, and two
`DequantizeLinear → Add → QuantizeLinear` to a sum of integers. A grid of fewer than 8 bits is
`QuantizeLinear → Clip` on uint8, which does not stand in the way of that.

Two things are for other engines than ONNX Runtime, which is as fast and exact without them:
operands of sums are quantized twice, and logits rounded to whole steps. And a layer of
8-bit weights whose sums could leave 16 bits gets its input twice, for two halves of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.deploy.integer_layers import MAX_CODE, n_bits_needed
from engine.quantization.grids import Grid, OnGrid

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:  # an extra; see engine/system/extras.py
    onnx = TensorProto = helper = numpy_helper = None

OPSET, IR_VERSION = 21, 10
MAX_HALF = 64  # |code| of weights whose products with uint8 can be added in pairs, in 16 bits
OPSET_OF_INT2, IR_VERSION_OF_INT2 = 25, 13
Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-np.inf, np.inf)
RELU: Bounds = (0.0, np.inf)


@dataclass(frozen=True)
class FileForm:
    """How integers are stored in a file. It changes no prediction where a runtime takes the file.

    Attributes:
        packed_bits: weights of so few bits are packed into half a byte (4), and with 2 those of 2
            bits into a quarter; 8: a byte each.
        signed_codes: inputs are int8 in place of uint8.
        may_saturate: 8-bit weights are int8 as they are, see `IntegerLayer.can_saturate`.
    """

    packed_bits: int = 8
    signed_codes: bool = False
    may_saturate: bool = False

    @classmethod
    def named(cls, pack_weights: str, export_for: str) -> "FileForm":
        """Return the form of these values of the flags: int8, int4 or int2; all, vnni or litert."""
        is_litert = export_for == "litert"
        return cls(int(pack_weights[3:]), is_litert, may_saturate=is_litert or export_for == "vnni")

    def stored(self, code: int) -> np.integer:
        """Return an input's code as it is stored."""
        return np.int8(code - MAX_CODE) if self.signed_codes else np.uint8(code)

    def weight_bits(self, codes: Tensor) -> int:
        """Return how many bits each of a weight's codes takes: 8, 4 or 2."""
        needed = n_bits_needed(codes)
        if needed <= self.packed_bits == 2:
            return 2
        return 4 if needed <= 4 and self.packed_bits <= 4 else 8


DEFAULT_FORM = FileForm()
TWICE = ".twice"  # ends the name of codes that are there twice, for two halves of a weight


class Emitter:
    """Nodes and constants so far; `grids` are those of the values that are codes, by name."""

    def __init__(self, form: FileForm = DEFAULT_FORM) -> None:
        self.form = form
        self.opset, self.ir_version = OPSET, IR_VERSION
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
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
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
        scale = self.constant(f"{name}.scale", np.float32(grid.scale))
        return [scale, self.zero_point(name, grid)]

    def zero_point(self, name: str, grid: Grid) -> str:
        """Return the name of the zero point of a value."""
        return self.constant(f"{name}.zero_point", self.form.stored(grid.zero_point))

    def finish(self, y: str, name: str, grid: Grid | None, bounds: Bounds) -> None:
        """Add what comes after a result y: rounding within its bounds, or these alone."""
        if grid:
            low, high = grid.code_range(bounds)
            is_clipped = (low, high) != (0, 255)
            codes = f"{name}.rounded" if is_clipped else name
            self.node("QuantizeLinear", [y, *self.grid_constants(name, grid)], codes)
            self.grids[name] = grid
            if is_clipped:
                limits = [self.constant(f"code.{n}", self.form.stored(n)) for n in (low, high)]
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

    def dequantize_constant(
        self, name: str, codes: Tensor, scale: Tensor, zero_point: int = 0, n_bits: int = 8
    ) -> str:
        """Return the name of (codes − zero_point)·scale; one scale, or one for each codes[i].

        Codes of 4 or 2 bits are packed, and cast to int8: without that, ONNX Runtime 1.32.0
        dequantizes them for a kernel in float32.
        """
        if n_bits < 8:
            if n_bits == 2:
                self.opset, self.ir_version = OPSET_OF_INT2, IR_VERSION_OF_INT2
            kind = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, f"INT{n_bits}"))
            packed = self.constant(f"{name}.packed", codes.numpy().astype(kind))
            stored = self.node("Cast", [packed], f"{name}.codes", to=TensorProto.INT8)
        else:
            stored = self.constant(f"{name}.codes", codes)
        scale = scale.flatten() if scale.numel() > 1 else scale.squeeze()
        zero_points = torch.full_like(scale, zero_point, dtype=codes.dtype)
        inputs = [
            stored,
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", zero_points),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)

    def dequantize_weight(self, name: str, part: OnGrid) -> str:
        """Return the name of a weight in float32, whose codes are packed where the form says so."""
        n_bits = self.form.weight_bits(part.codes)
        return self.dequantize_constant(name, part.codes, part.scale, n_bits=n_bits)

    def dequantize_halves(self, name: str, part: OnGrid) -> str:
        """Return the name of a weight for an input that is there twice, as more channels.

        It is two weights whose sum is the given one, of 7 bits each, as no sum of two of their
        products leaves 16 bits. They are constants, as OpenVINO 2026.4.1 has no integer kernel for
        weights that it computes.
        """
        first = part.codes.clamp(-MAX_HALF, MAX_HALF)
        halves = torch.cat([first, part.codes - first], dim=1)
        return self.dequantize_constant(name, halves, part.scale)

    def as_float_twice(self, name: str) -> str:
        """Return the name of codes in float32, twice beside each other as channels."""
        twice = f"{name}{TWICE}"
        if twice not in self.known:
            self.node("Concat", [name, name], twice, axis=1)
            self.grids[twice] = self.grids[name]
        return self.as_float(twice)
