"""Operations of a quantized network in integer arithmetic: their exact simulation, and as ONNX.

The operations are what an integer engine runs, with one definition of everything that engines could
do in another way (all in float32, rounding half to even):

- an input becomes round(x / scale) + zero_point, clamped to its codes;
- a layer sums products of integers and its int32 bias without error. Where a quantizer follows, the
  sum times scale_x·scale_w / scale_y is rounded and clamped once: a ReLU is that clamp. Where none
  follows (logits), the result is the sum times scale_x·scale_w;
- a layer of two weights adds its two sums, each times its scale; the result is divided by scale_y;
- a ReLU6 is a ReLU and the clamp to the code of 6;
- global average pooling rounds the sum of codes times scale_x / (scale_y·H·W); average pooling to
  several pixels is a layer whose weights are ones of scale 1 / (number of pixels);
- a residual sum of codes a and b is r_a·a + (r_b·b + c), rounded and clamped once, with r_a =
  scale_a / scale_y, r_b alike and c = zero_y − (r_a·zero_a + r_b·zero_b). A product is not rounded
  before it is added: these are fused multiply-adds;
- what moves or selects values does it with codes; padding is the code of 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.deploy.integer_layers import MAX_CODE, IntegerLayer, unsigned
from engine.deploy.onnx_emitter import UNBOUNDED, Bounds, Emitter
from engine.quantization.grids import Grid, OnGrid

EXACT_IN_FLOAT32 = 2**24  # integers up to this are sums without rounding
TRIAL_SIZE = 6  # pixels of images that an operation is tried on alone


@dataclass
class IntegerOperation:
    """One operation: `run` makes the value `name` of the values `sources`, `emit` adds it to ONNX.

    Values with a grid are codes, in float32; those without are what they are, in float32.
    """

    name: str
    sources: tuple[str, ...]
    in_grids: tuple[Grid | None, ...]
    out_grid: Grid | None


@dataclass
class Move(IntegerOperation):
    """An operation that moves or selects values: codes of its sources' grid, or floats.

    Attributes:
        function: what it is in PyTorch.
        op, constants, attributes: what it is in ONNX; constants are lists of whole numbers by name.
    """

    function: Callable[..., Tensor]
    op: str
    constants: Mapping[str, list[int]]
    attributes: Mapping[str, Any]

    def run(self, *values: Tensor) -> Tensor:
        """Return what the function makes of the values."""
        return self.function(*values)

    def emit(self, onnx: Emitter, *others: str) -> None:
        """Add the operator, which gives codes where it takes codes; `others` are more constants."""
        names = [
            onnx.constant(f"{self.name}.{key}", np.array(value, np.int64))
            for key, value in self.constants.items()
        ]
        onnx.node(self.op, [*self.sources, *names, *others], self.name, **self.attributes)
        if self.out_grid:
            onnx.grids[self.name] = self.out_grid


@dataclass
class Pad(Move):
    """Zeros around values."""

    def run(self, x: Tensor) -> Tensor:
        """Return the values with zeros, or codes of 0, around them."""
        zero = self.out_grid.zero_point if self.out_grid else 0
        return self.function(x - zero) + zero

    def emit(self, onnx: Emitter) -> None:
        """Add the operator, with the code of 0."""
        zero = onnx.form.stored(self.out_grid.zero_point) if self.out_grid else np.float32(0)
        super().emit(onnx, onnx.constant(f"{self.name}.zero", zero))


@dataclass
class Arithmetic(IntegerOperation):
    """An operation that computes and then rounds once; `bounds` are those of a ReLU in it."""

    op: ClassVar[str]  # in ONNX, on floats
    bounds: Bounds = UNBOUNDED

    def trial_codes(self, generator: torch.Generator) -> list[Tensor]:
        """Return inputs, uint8, at random."""
        shape = (4, 16, TRIAL_SIZE, TRIAL_SIZE)
        return [
            torch.randint(0, grid.max_code + 1, shape, generator=generator).to(torch.uint8)
            for grid in self.in_grids
        ]

    def emit(self, onnx: Emitter) -> None:
        """Add the operator between dequantizing and rounding, which engines fuse."""
        y = onnx.node(self.op, self.float_sources(onnx), f"{self.name}.result")
        onnx.finish(y, self.name, self.out_grid, self.bounds)

    def float_sources(self, onnx: Emitter) -> list[str]:
        """Return the names of the inputs in float32, dequantized where they are codes."""
        return [onnx.as_float(name) for name in self.sources]


@dataclass
class Rescale(Arithmetic):
    """Floats or codes to codes of the output's grid, within bounds: quantization, ReLU."""

    def run(self, x: Tensor) -> Tensor:
        """Map floats or codes to floats or codes."""
        [grid] = self.in_grids
        return _finish(grid.dequantize(x) if grid else x, self.out_grid, self.bounds)

    def emit(self, onnx: Emitter) -> None:
        """Add a QuantizeLinear or, in float, what clamps."""
        [source] = self.sources
        onnx.finish(onnx.as_float(source), self.name, self.out_grid, self.bounds)


@dataclass
class Layer(Arithmetic):
    """A convolution or linear layer.

    Attributes:
        layer: its name in the graph; None for average pooling.
        product: PyTorch's function of (x, weight, bias, *geometry).
        geometry: stride, padding, dilation and groups of a convolution.
        attributes: the same as ONNX has them; None for a linear layer.
        weight, bias: those of the float network.
        integers: None in a float network.
        is_fused: with one weight, whether engines fuse it to one convolution of integers.
    """

    layer: str | None = None
    product: Callable[..., Tensor] = F.linear
    geometry: tuple = ()
    attributes: Mapping[str, Any] | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    integers: IntegerLayer | None = None
    is_fused: bool = True

    def run(self, x: Tensor) -> Tensor:
        """Map codes, in float32, to codes or floats."""
        first, *others = self.integers.parts
        total = self._sum(x, first).to(torch.int32)
        total = (total + _column(self.integers.bias, total)).float()
        scale = self.integers.product_scale(first)
        if not others and self.out_grid:
            scale = _column(scale / self.out_grid.scale, total)
            return _to_codes(total * scale, self.out_grid, self.bounds)
        y = total * _column(scale, total)
        for part in others:
            scale = _column(self.integers.product_scale(part), y)
            y = y + self._sum(x, part).to(torch.int32).float() * scale
        return _finish(y, self.out_grid, self.bounds)

    def trial_codes(self, generator: torch.Generator) -> list[Tensor]:
        """Return inputs, uint8, whose sums are large: all of the largest code, and half of them."""
        n_inputs, *kernel = self.weight.shape[1:]
        geometry = self.attributes or {"dilations": [], "group": 1}
        sizes = [d * k + TRIAL_SIZE for d, k in zip(geometry["dilations"], kernel, strict=True)]
        shape = (4, n_inputs * geometry["group"], *sizes)
        codes = torch.randint(0, 2, shape, generator=generator)
        codes[0] = 1
        return [(codes * self.in_grids[0].max_code).to(torch.uint8)]

    def _sum(self, x: Tensor, part: OnGrid) -> Tensor:
        """Return the sum of products of integers, exact."""
        [grid] = self.in_grids
        most = part.codes.float().abs().flatten(1).sum(1).max() * grid.max_abs
        is_exact = most < EXACT_IN_FLOAT32 and x.device.type == "cpu"
        dtype = torch.float32 if is_exact else torch.float64
        x = (x - grid.zero_point if grid.zero_point else x).to(dtype)
        return self.product(x, part.codes.to(x.device, dtype), None, *self.geometry).round()

    def emit(self, onnx: Emitter) -> None:
        """Add a layer of one weight as Q/DQ pairs, or in float where it has no integers."""
        name = self.name
        integers = self.integers
        if integers and (len(integers.parts) > 1 or not self.is_fused):
            self._emit_integer_sums(onnx)
            return
        if integers:
            x, w = self._factors(onnx)
            scale = integers.product_scale(integers.parts[0])
            b = onnx.dequantize_constant(f"{name}.bias", integers.bias, scale)
        else:
            [x] = self.float_sources(onnx)
            bias = torch.zeros(len(self.weight)) if self.bias is None else self.bias
            w = onnx.constant(f"{name}.weight", self.weight.detach().cpu().contiguous())
            b = onnx.constant(f"{name}.bias", bias.detach().cpu())
        op, options = ("Conv", self.attributes) if self.attributes else ("Gemm", {"transB": 1})
        y = onnx.node(op, [x, w, b], f"{name}.result", **options)
        if integers and not self.out_grid:
            y = onnx.round_to_steps(y, name, scale.view([-1] + [1] * (self.weight.dim() - 2)))
        onnx.finish(y, name, self.out_grid, self.bounds)

    def _factors(self, onnx: Emitter) -> tuple[str, str]:
        """Return the names of input and weight in float32, in a form whose sums are exact."""
        name, [source], [part] = f"{self.name}.weight", self.sources, self.integers.parts
        if onnx.form.may_saturate or not self.integers.can_saturate:
            return onnx.as_float(source), onnx.dequantize_weight(name, part)
        if self.attributes and self.attributes["group"] > 1:
            w = onnx.dequantize_constant(name, unsigned(part.codes), part.scale, MAX_CODE)
            return onnx.as_float(source), w
        return onnx.as_float_twice(source), onnx.dequantize_halves(name, part)

    def _emit_integer_sums(self, onnx: Emitter) -> None:
        """Add a layer of several weights: a sum in int32 for each, which are added in float32.

        Codes are uint8 with the zero point 128: ONNX Runtime's kernel of ConvInteger for those is
        four times as fast as that for int8, and their sums cannot saturate.
        """
        [source] = self.sources
        zero_point = onnx.zero_point(source, self.in_grids[0])
        middle = onnx.constant("code.middle", np.uint8(MAX_CODE))
        total = None
        shape = [-1] + [1] * (self.weight.dim() - 2)
        for i, part in enumerate(self.integers.parts):
            name = f"{self.name}.part{i}"
            op, codes = "ConvInteger", unsigned(part.codes)
            if self.attributes is None:
                op, codes = "MatMulInteger", codes.T.contiguous()
            inputs = [source, onnx.constant(f"{name}.codes", codes), zero_point, middle]
            y = onnx.node(op, inputs, f"{name}.sum", **(self.attributes or {}))
            if i == 0:
                bias = onnx.constant(f"{self.name}.bias", self.integers.bias.view(shape))
                y = onnx.node("Add", [y, bias], f"{name}.sum_bias")
            y = onnx.cast_to_float(y, f"{name}.float")
            scale = onnx.constant(f"{name}.scale", self.integers.product_scale(part).view(shape))
            y = onnx.node("Mul", [y, scale], f"{name}.scaled")
            total = onnx.node("Add", [total, y], f"{name}.total") if total else y
        onnx.finish(total, self.name, self.out_grid, self.bounds)


@dataclass
class Sum(Arithmetic):
    """The sum of two values of one shape: of codes, or both of floats."""

    op = "Add"

    def float_sources(self, onnx: Emitter) -> list[str]:
        """Return the names of the operands in float32; of codes, each rounded twice."""
        names = self.sources
        return [onnx.as_float_again(name) if name in onnx.grids else name for name in names]

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        """Map codes, in float32, to codes or floats."""
        if self.out_grid is None:
            y, other = (g.dequantize(x) for g, x in zip(self.in_grids, (a, b), strict=True))
            return (y + other).clamp(*self.bounds)
        (r_a, zero_a), (r_b, zero_b) = (
            (torch.tensor(grid.scale) / self.out_grid.scale, grid.zero_point)
            for grid in self.in_grids
        )
        c = self.out_grid.zero_point - (r_a * zero_a + r_b * zero_b)
        y = _multiply_add(a, r_a, _multiply_add(b, r_b, c))
        low, high = self.out_grid.code_range(self.bounds)
        return y.round().clamp_(low, high)


@dataclass
class GlobalPool(Arithmetic):
    """The mean over all pixels."""

    op = "GlobalAveragePool"

    def run(self, x: Tensor) -> Tensor:
        """Map codes (B, C, H, W) to codes or floats (B, C, 1, 1)."""
        [grid] = self.in_grids
        n_pixels = x.shape[2] * x.shape[3]
        total = x.sum(dim=(2, 3), keepdim=True) - n_pixels * grid.zero_point
        scale = torch.tensor(grid.scale, device=x.device)
        if self.out_grid is None:
            return (total * (scale / n_pixels)).clamp(*self.bounds)
        scale = scale / (self.out_grid.scale * n_pixels)
        return _to_codes(total * scale, self.out_grid, self.bounds)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """View a value for each output channel so that it broadcasts over `like`."""
    return values.to(like.device).view(-1, *[1] * (like.dim() - 2))


def _multiply_add(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """Return x·factor + summand, rounded to float32 once: in float64 a product is exact."""
    return x.double().mul_(factor).add_(summand).float()


def _finish(y: Tensor, grid: Grid | None, bounds: Bounds) -> Tensor:
    """Return floats within the bounds; as codes where there is a grid."""
    if grid is None:
        return y.clamp(*bounds)
    # divided by a tensor, as accelerators multiply by a number's reciprocal
    return _to_codes(y / torch.tensor(grid.scale, device=y.device), grid, bounds)


def _to_codes(x: Tensor, grid: Grid, bounds: Bounds) -> Tensor:
    """Round x, in units of the grid's scale, to codes of values within the bounds."""
    low, high = grid.code_range(bounds)
    zero_point = grid.zero_point
    return x.round().clamp_(low - zero_point, high - zero_point).add_(zero_point)
