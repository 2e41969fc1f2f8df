"""The steps of a quantized network in integer arithmetic, and their exact simulation.

The steps are what an integer engine runs, with one definition of everything that engines could do
in another way (all in float32, rounding half to even):

- an input becomes round(x / scale) + zero_point, clamped to its codes;
- a layer sums products of integers and its int32 bias without error. Where a quantizer follows, the
  sum times scale_x·scale_w / scale_y is rounded and clamped once: a ReLU is that clamp. Where none
  follows (logits), the result is the sum times scale_x·scale_w;
- a layer of two weights adds its two sums, each times its scale; the result is divided by scale_y;
- a ReLU6 is a ReLU and the clamp to the code of 6;
- global average pooling rounds the sum of codes times scale_x / (scale_y·H·W);
- a residual sum of codes a and b is r_a·a + (r_b·b + c), rounded and clamped once, with r_a =
  scale_a / scale_y, r_b alike and c = zero_y − (r_a·zero_a + r_b·zero_b). A product is not rounded
  before it is added: these are fused multiply-adds;
- what moves or selects values does it with codes; padding is the code of 0.
"""

from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.deploy.integer_layers import Grid, IntegerLayer, WeightCodes

EXACT_IN_FLOAT32 = 2**24  # integers up to this are sums without rounding
UNBOUNDED, RELU, RELU6 = (-inf, inf), (0.0, inf), (0.0, 6.0)  # least and largest value


@dataclass
class Step:
    """One step: it makes the value `name` from the value `source`.

    `in_grid` and `out_grid` are those of codes; None: the value is in float32.
    """

    name: str
    source: str
    in_grid: Grid | None = None
    out_grid: Grid | None = None

    def inputs(self) -> list[tuple[str, Grid | None]]:
        """Return the names and grids of what `run` takes, in order."""
        return [(self.source, self.in_grid)]


@dataclass
class Quantize(Step):
    """Float to codes."""

    def run(self, x: Tensor) -> Tensor:
        """Map floats to codes, in float32."""
        return _round_to_codes(x, self.out_grid)


@dataclass
class Arithmetic(Step):
    """A step that computes and then rounds once.

    `bounds` are those of the ReLU or ReLU6 that is part of it.
    """

    bounds: tuple[float, float] = UNBOUNDED


@dataclass
class Layer(Arithmetic):
    """A convolution or linear layer; `integers` is None in a float network."""

    module: nn.Conv2d | nn.Linear = None
    integers: IntegerLayer | None = None

    def run(self, x: Tensor) -> Tensor:
        """Map codes, in float32, to codes or floats."""
        first, *others = self.integers.parts
        total = self._product(x, first).to(torch.int32)
        total = (total + self._column(self.integers.bias, total)).float()
        scale = self.integers.product_scale(first)
        if not others and self.out_grid:
            scale = self._column(scale / self.out_grid.scale, total)
            return _to_codes(total * scale, self.out_grid, self.bounds)
        y = total * self._column(scale, total)
        for part in others:
            scale = self._column(self.integers.product_scale(part), y)
            y = y + self._product(x, part).to(torch.int32).float() * scale
        return _finish(y, self.out_grid, self.bounds)

    def trial_codes(self, generator: torch.Generator) -> list[Tensor]:
        """Return inputs, uint8, whose sums are large: all of the largest code, and half of them."""
        m = self.module
        shape = (m.in_features,) if isinstance(m, nn.Linear) else (m.in_channels, 6, 6)
        codes = torch.randint(0, 2, (4, *shape), generator=generator)
        codes[0] = 1
        return [(codes * self.in_grid.max_code).to(torch.uint8)]

    def _product(self, x: Tensor, part: WeightCodes) -> Tensor:
        """Return the sum of products of integers, exact."""
        most = part.codes.float().abs().flatten(1).sum(1).max() * self.in_grid.max_abs
        is_exact = most < EXACT_IN_FLOAT32 and x.device.type == "cpu"
        dtype = torch.float32 if is_exact else torch.float64
        x = (x - self.in_grid.zero_point if self.in_grid.zero_point else x).to(dtype)
        w = part.codes.to(x.device, dtype)
        if isinstance(self.module, nn.Linear):
            return F.linear(x, w).round()
        m = self.module
        return F.conv2d(x, w, None, m.stride, m.padding, m.dilation, m.groups).round()

    @staticmethod
    def _column(values: Tensor, like: Tensor) -> Tensor:
        """View a value for each output channel so that it broadcasts over `like`."""
        return values.to(like.device).view(-1, *[1] * (like.dim() - 2))


@dataclass
class Sum(Arithmetic):
    """The sum of the values `source` and `other`, of one shape: of codes, or both of floats."""

    other: str = ""
    other_grid: Grid | None = None

    def inputs(self) -> list[tuple[str, Grid | None]]:
        """Return the names and grids of both operands."""
        return [(self.source, self.in_grid), (self.other, self.other_grid)]

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        """Map codes, in float32, to codes or floats."""
        if self.out_grid is None:
            y = self.in_grid.dequantize(a) + self.other_grid.dequantize(b)
            return y.clamp(*self.bounds)
        (r_a, zero_a), (r_b, zero_b) = (
            (torch.tensor(grid.scale) / self.out_grid.scale, grid.zero_point)
            for _, grid in self.inputs()
        )
        c = self.out_grid.zero_point - (r_a * zero_a + r_b * zero_b)
        y = _multiply_add(a, r_a, _multiply_add(b, r_b, c))
        low, high = self.out_grid.code_range(self.bounds)
        return y.round().clamp_(low, high)

    def trial_codes(self, generator: torch.Generator) -> list[Tensor]:
        """Return inputs, uint8, at random."""
        return [
            torch.randint(0, grid.max_code + 1, (4, 16, 6, 6), generator=generator).to(torch.uint8)
            for _, grid in self.inputs()
        ]


@dataclass
class GlobalPool(Step):
    """The mean over all pixels."""

    def run(self, x: Tensor) -> Tensor:
        """Map codes (B, C, H, W) to codes or floats (B, C, 1, 1)."""
        n_pixels = x.shape[2] * x.shape[3]
        total = x.sum(dim=(2, 3), keepdim=True) - n_pixels * self.in_grid.zero_point
        scale = torch.tensor(self.in_grid.scale, device=x.device)
        if self.out_grid is None:
            return total * (scale / n_pixels)
        return _to_codes(total * (scale / (self.out_grid.scale * n_pixels)), self.out_grid)


@dataclass
class Rectify(Step):
    """A ReLU or ReLU6 that is not part of another step."""

    bounds: tuple[float, float] = UNBOUNDED

    def run(self, x: Tensor) -> Tensor:
        """Map floats to floats or codes."""
        return _finish(x, self.out_grid, self.bounds)


@dataclass
class Reorder(Step):
    """A step that only moves or selects values, codes or floats, or adds zeros."""


@dataclass
class MaxPool(Reorder):
    """Max-pooling."""

    module: nn.MaxPool2d = None

    def run(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        return self.module(x)


@dataclass
class Flatten(Reorder):
    """One dimension in place of channels and pixels."""

    def run(self, x: Tensor) -> Tensor:
        """Map (B, …) to (B, n)."""
        return x.flatten(1)


@dataclass
class Slice(Reorder):
    """Every n-th element of each dimension; `index` is that of Python."""

    index: tuple[slice, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Return the elements."""
        return x[self.index]


@dataclass
class Pad(Reorder):
    """Zeros around the values; `widths` are those of `F.pad`."""

    widths: tuple[int, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Return the values with zeros around them."""
        return F.pad(x, self.widths, value=self.out_grid.zero_point if self.out_grid else 0)


def _multiply_add(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """Return x·factor + summand, rounded to float32 once: in float64 a product is exact."""
    return x.double().mul_(factor).add_(summand).float()


def _finish(y: Tensor, grid: Grid | None, bounds: tuple[float, float]) -> Tensor:
    """Return floats within the bounds; as codes where there is a grid."""
    return _round_to_codes(y, grid, bounds) if grid else y.clamp(*bounds)


def _round_to_codes(x: Tensor, grid: Grid, bounds: tuple[float, float] = UNBOUNDED) -> Tensor:
    """Round x to codes; divided by a tensor, as accelerators multiply by a number's reciprocal."""
    return _to_codes(x / torch.tensor(grid.scale, device=x.device), grid, bounds)


def _to_codes(x: Tensor, grid: Grid, bounds: tuple[float, float] = UNBOUNDED) -> Tensor:
    """Round x, in units of the grid's scale, to codes of values within the bounds."""
    low, high = grid.code_range(bounds)
    zero_point = grid.zero_point
    return x.round().clamp_(low - zero_point, high - zero_point).add_(zero_point)
