"""Uniform grids: integer codes and scales of weights, and the codes of activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantization.bit_widths import check_bits


@dataclass(frozen=True)
class OnGrid:
    """A tensor on a uniform grid through 0, which is codes·scale.

    Attributes:
        codes: whole numbers of the tensor's shape, in its dtype or in int8.
        scale: what one code stands for: of shape (), or (len(codes), 1, …) for each codes[i].
    """

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Return codes·scale."""
        return self.codes * self.scale


@dataclass(frozen=True)
class Grid:
    """The codes of one tensor of activations: a code q stands for (q − zero_point)·scale.

    Codes are unsigned, 0 … 2^n_bits − 1; a signed symmetric grid is one with the zero point
    2^(n_bits − 1).
    """

    scale: float  # a float32
    zero_point: int
    n_bits: int

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 2**self.n_bits - 1

    @property
    def max_abs(self) -> int:
        """The largest distance of a code from the zero point."""
        return max(self.zero_point, self.max_code - self.zero_point)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes, both in float32."""
        return (codes - self.zero_point) * self.scale

    def round(self, x: Tensor) -> Tensor:
        """Return x, of any shape, rounded to the nearest point of the grid."""
        # a tensor, as accelerators multiply by the reciprocal of a number instead of dividing
        scale = torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        low = -self.zero_point
        high = self.max_code - self.zero_point
        return (x / scale).round_().clamp_(low, high).mul_(scale)

    def code_range(self, bounds: tuple[float, float]) -> tuple[int, int]:
        """Return the least and the largest code of values within `bounds`."""
        low = max(bounds[0] / self.scale, -self.zero_point)
        high = min(bounds[1] / self.scale, self.max_code - self.zero_point)
        return round(low) + self.zero_point, round(high) + self.zero_point


MIN_SCALE = 1e-20  # of an input that is always 0: products of scales stay normal numbers


def activation_grid(n_bits: int, low: float, high: float, asymmetric: bool = False) -> Grid:
    """Return the grid of values from low to high, in the values' units.

    Unsigned, from 0 to high, where low ≥ 0. Else symmetric, ±max(high, −low), or with `asymmetric`
    from low to high, moved so that 0 is one of its points. Raises ValueError for n_bits outside
    2 … 16.
    """
    check_bits(n_bits)
    n_intervals = 2**n_bits - 1
    if low >= 0:
        scale = high / n_intervals
        zero_point = 0
    elif asymmetric:
        scale = (max(high, 0.0) - low) / n_intervals
        zero_point = round(-low / scale)
    else:
        scale = max(high, -low) / (n_intervals / 2)
        zero_point = 2 ** (n_bits - 1)
    return Grid(torch.tensor(max(scale, MIN_SCALE), dtype=torch.float32).item(), zero_point, n_bits)
