"""Integers of a quantized network: grids, weights as codes, biases on the int32 grid.

A code q stands for (q − zero_point)·scale. Codes of inputs are unsigned, 0…2^b − 1; a signed grid
is one with the zero point 2^(b − 1). Codes of weights are signed, with the zero point 0.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_CODE = 128  # |code| of a weight in int8
MIN_SCALE = 1e-20  # of an input that is always 0: products of scales stay normal numbers
MAX_BIAS = 2**30  # |bias| in units of its scale: what int32 holds beside the sum of products


@dataclass(frozen=True)
class Grid:
    """The codes of one tensor of activations; see the module for their meaning."""

    scale: float
    zero_point: int
    n_bits: int

    @property
    def max_code(self) -> int:
        """Return the largest code."""
        return 2**self.n_bits - 1

    @property
    def max_abs(self) -> int:
        """Return the largest distance of a code from the zero point."""
        return max(self.zero_point, self.max_code - self.zero_point)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes, both in float32."""
        return (codes - self.zero_point) * self.scale

    def code_range(self, bounds: tuple[float, float]) -> tuple[int, int]:
        """Return the least and the largest code of values within `bounds`."""
        low = max(bounds[0] / self.scale, -self.zero_point)
        high = min(bounds[1] / self.scale, self.max_code - self.zero_point)
        return round(low) + self.zero_point, round(high) + self.zero_point


def make_grid(scale: float, int_min: int, int_max: int) -> Grid:
    """Return the grid of the points scale·int_min, …, scale·int_max; the scale as float32."""
    scale = torch.tensor(max(scale, MIN_SCALE), dtype=torch.float32).item()
    return Grid(scale, -int_min, (int_max - int_min + 1).bit_length() - 1)


@dataclass(frozen=True)
class WeightCodes:
    """A weight as scale·codes: int8 codes of its shape, float32 scales (1) or (output channels)."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Return the weight in float32."""
        return self.codes.float() * _per_channel(self.scale, self.codes)


@dataclass(frozen=True)
class IntegerLayer:
    """The integers of a convolution or linear layer.

    Its output is Σ_parts scale_x·scale_part·(Σ codes_part·(q_x − zero_point)); the int32 `bias`
    (output channels) is inside the first of these sums.
    """

    in_grid: Grid
    parts: tuple[WeightCodes, ...]
    bias: Tensor

    def product_scale(self, part: WeightCodes) -> Tensor:
        """Return scale_x·scale_part, rounded to float32 as engines do."""
        return torch.tensor(self.in_grid.scale) * part.scale

    def weight(self) -> Tensor:
        """Return the dequantized weight."""
        return sum(part.dequantize() for part in self.parts)

    def dequantized_bias(self) -> Tensor:
        """Return the bias in float32."""
        return (self.bias.double() * self.product_scale(self.parts[0]).double()).float()


def _per_channel(scale: Tensor, w: Tensor) -> Tensor:
    """View scales (1) or (C) so that they multiply w (C, …)."""
    return scale.view(-1, *[1] * (w.dim() - 1))


@torch.no_grad()
def make_integer_layer(
    parts: Sequence[Tensor], bias: Tensor | None, in_grid: Grid, per_channel: bool
) -> IntegerLayer:
    """Return the integers of quantized weights, the sum of `parts`, each (C, …) on a uniform grid.

    A channel whose bias would leave int32 gets a coarser scale of weights: they are next to nothing
    beside it. Raises ValueError where a part is on no grid that int8 holds.
    """
    n_channels = len(parts[0])
    bias = torch.zeros(n_channels) if bias is None else bias.detach().cpu()
    most = bias.double().abs() if per_channel else bias.double().abs().max().view(1)
    min_scale = most / (in_grid.scale * MAX_BIAS)
    codes = tuple(
        weight_codes(part, per_channel, 0.0 if i else min_scale) for i, part in enumerate(parts)
    )
    layer = IntegerLayer(in_grid, codes, torch.zeros(n_channels, dtype=torch.int32))
    bias_codes = (bias.double() / layer.product_scale(codes[0]).double()).round()
    return IntegerLayer(in_grid, codes, bias_codes.to(torch.int32))


def weight_codes(w: Tensor, per_channel: bool, min_scale: Tensor | float = 0.0) -> WeightCodes:
    """Return int8 codes and scales of a tensor whose values lie on a symmetric uniform grid.

    The scale is the largest that makes all values integers, to 1/400 of a step, so that it does not
    matter which quantizer made them; at least `min_scale`, (1) or (C). Raises ValueError where
    there is none.
    """
    rows = w.detach().cpu().double().reshape(len(w) if per_channel else 1, -1)
    m = rows.abs().amax(dim=1, keepdim=True)
    n_steps = _steps_to_maximum(rows / m.clamp(min=1e-300))
    scale = torch.maximum(m / n_steps, torch.as_tensor(min_scale).double().view(-1, 1))
    scale = torch.where(scale > 0, scale, 1).float()
    codes = (rows / scale.double()).round().clamp(-MAX_CODE, MAX_CODE - 1).reshape(w.shape)
    return WeightCodes(codes.to(torch.int8), scale.view(-1))


def _steps_to_maximum(rows: Tensor) -> Tensor:
    """Return the least n for which n·row consists of integers, (rows, 1), for rows in [−1, 1].

    A wrong n is off by 1/128 of a step at least, the rounding of float32 by 1/10⁴ at most. A few
    columns rule out most n.
    """
    n_steps = torch.zeros(len(rows), dtype=torch.double)
    for n in range(1, MAX_CODE + 1):
        candidates = ((n_steps == 0) & _near_integers(rows[:, :32] * n)).nonzero().flatten()
        if len(candidates):
            scaled = rows[candidates] * n
            fits = _near_integers(scaled) & (scaled.amax(dim=1) < MAX_CODE - 0.5)
            n_steps[candidates[fits]] = n
    if (n_steps == 0).any():
        raise ValueError("weights are not on one uniform grid through 0 of 8 bits or fewer")
    return n_steps.view(-1, 1)


def _near_integers(rows: Tensor) -> Tensor:
    """Tell which rows hold integers only, to 1/400."""
    return (rows - rows.round()).abs().amax(dim=1) < 1 / 400


def n_bits_needed(codes: Tensor) -> int:
    """Return how many bits a two's complement number needs for every code, at least 2."""
    low, high = (extreme.item() for extreme in torch.aminmax(codes))
    return max(2, 1 + math.ceil(math.log2(max(high + 1, -low, 1))))


@torch.no_grad()
def with_integers(net: nn.Module, layers: Mapping[str, IntegerLayer]) -> nn.Module:
    """Return a copy of the network with the layers' dequantized weights and biases."""
    net = copy.deepcopy(net)
    for name, layer in layers.items():
        module = net.get_submodule(name)
        module.weight.copy_(layer.weight())
        if module.bias is not None:
            module.bias.copy_(layer.dequantized_bias())
    return net
