"""Activation quantization: which inputs, in which ranges, on which grids.

PWLQ's recipe (Fang et al., arXiv 2002.00104): the inputs of every product and of pooling, each with
one range for the whole tensor, which is calibrated on training images.
"""

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from engine.networks.graph import Operation, operations, with_inputs
from engine.quantization.grids import Grid, activation_grid
from engine.quantization.weights import NO_EXCEPTIONS

# Shares of a range that are tried when the one of least error is searched.
RANGE_FACTORS = tuple(percent / 100 for percent in range(100, 20, -1))
Range = tuple[float, float]


def topk_median(x: Tensor, k: int = 10) -> Range:
    """Return the median of the k smallest values of x and that of its k largest."""
    k = min(k, x.numel())
    x = x.flatten().float()
    return tuple(x.topk(k, largest=top).values.quantile(0.5).item() for top in (False, True))


def percentile(x: Tensor, tail: float = 1e-4) -> Range:
    """Return the two values of x beyond which a fraction `tail` of all values lies."""
    k = max(1, round(tail * x.numel()))
    x = x.flatten().float()
    return tuple(x.topk(k, largest=top).values[-1].item() for top in (False, True))


def minmax(x: Tensor) -> Range:
    """Return the smallest and the largest value of x."""
    return tuple(extreme.item() for extreme in torch.aminmax(x))


class Calibration(NamedTuple):
    """How the range of an input comes from that of each batch.

    `holds_all`: it holds those of all batches, in place of their mean over images. `least_error`:
    `least_error_ranges` then narrows it for each number of bits.
    """

    batch_range: Callable[[Tensor], Range]
    holds_all: bool = False
    least_error: bool = False


CALIBRATIONS = {
    "topk_median": Calibration(topk_median),
    "percentile": Calibration(percentile),
    "minmax": Calibration(minmax, holds_all=True),
    "mse": Calibration(minmax, holds_all=True, least_error=True),
}


def quantized_inputs(graph: fx.GraphModule, sums: bool = False) -> dict[str, Operation]:
    """Return the operation of each input that is quantized, by the input's name, as they run.

    Those of products and pooling and, with `sums`, of the operations in SUMS as well.
    """
    return {
        name: each for each in operations(graph) if sums or not each.is_sum for name in each.inputs
    }


@torch.no_grad()
def calibrate(
    graph: fx.GraphModule,
    batches: Iterable[Tensor],
    method: str = "topk_median",
    sums: bool = False,
) -> dict[str, Range]:
    """Return the range of each of `quantized_inputs`, by name, in the values' units.

    `batches` are images (B, 3, H, W). A range is the mean over images of those of the batches, with
    "minmax" and "mse" the one that holds them all.
    """
    rule = CALIBRATIONS[method]
    ranges: dict[str, list[Range]] = {name: [] for name in quantized_inputs(graph, sums)}
    n_images = []

    def recorder(name: str) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor) -> Tensor:
            if not x.isfinite().all():
                raise ValueError(
                    f"the input {name} has values that are not finite: no range holds them"
                )
            ranges[name].append(rule.batch_range(x))
            return x

        return record

    recording = with_inputs(graph, {name: recorder(name) for name in ranges})
    for images in batches:
        n_images.append(len(images))
        recording(images)
    limits = {name: [*zip(*each, strict=True)] for name, each in ranges.items()}
    if rule.holds_all:
        return {name: (min(lows), max(highs)) for name, (lows, highs) in limits.items()}
    # over images, not batches: the last batch may be a small one
    return {name: tuple(fmean(each, n_images) for each in both) for name, both in limits.items()}


@torch.no_grad()
def least_error_ranges(
    graph: fx.GraphModule,
    batches: Iterable[Tensor],
    extremes: Mapping[str, Range],
    n_bits: int,
    layer_bits: Mapping[str, int] = NO_EXCEPTIONS,
    asymmetric: bool = False,
) -> dict[str, Range]:
    """Return, by name, the range of least Σ(x − x_q)² over all batches, x_q what x is rounded to.

    `extremes` are the ranges that hold all values, as `calibrate` returns them of these batches.
    What is tried are 80 ranges, from the extremes down to 0.21 of them, as `clip` does. For the
    other arguments see `quantize_activations`.
    """
    errors: dict[str, Tensor | float] = dict.fromkeys(extremes, 0.0)

    def adder(name: str) -> Callable[[Tensor], Tensor]:
        def add_errors(x: Tensor) -> Tensor:
            bits = layer_bits.get(name, n_bits)
            added = activation_errors(x, bits, extremes[name], asymmetric)
            errors[name] = errors[name] + added
            return x

        return add_errors

    measuring = with_inputs(graph, {name: adder(name) for name in extremes})
    for images in batches:
        measuring(images)
    factors = {name: RANGE_FACTORS[int(errors[name].argmin())] for name in extremes}
    return {name: (f * extremes[name][0], f * extremes[name][1]) for name, f in factors.items()}


def activation_errors(x: Tensor, n_bits: int, extremes: Range, asymmetric: bool = False) -> Tensor:
    """Return Σ(x − x_q)² for each of RANGE_FACTORS times the extremes, (80,), in float64.

    The values that are rounded to one point v of a grid are neighbours among the sorted ones, and
    their error is Σx² − 2·v·Σx + v²·n: two sums instead of a pass over all values for each range.
    """
    x = torch.from_numpy(np.sort(x.detach().flatten().float().cpu().numpy())).double()
    sums_below = torch.cat([x.new_zeros(1), x.cumsum(0)])
    errors = []
    for factor in RANGE_FACTORS:
        grid = activation_grid(n_bits, *(factor * limit for limit in extremes), asymmetric)
        codes = torch.arange(grid.max_code + 1, dtype=torch.float64)
        points = grid.scale * (codes - grid.zero_point)
        inner = torch.searchsorted(x, (points[:-1] + points[1:]) / 2)  # between two points
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), x.numel())])
        errors.append((points * (points * ends.diff() - 2 * sums_below[ends].diff())).sum())
    return x.square().sum() + torch.stack(errors)


def activation_grids(
    ranges: Mapping[str, Range],
    n_bits: int,
    layer_bits: Mapping[str, int] = NO_EXCEPTIONS,
    asymmetric: bool = False,
) -> dict[str, Grid]:
    """Return the grid of each input, by name.

    `layer_bits` are the bits of those, by name, that have others than n_bits. `asymmetric`: inputs
    that may be negative get a zero point instead of a grid that is symmetric about 0.
    """
    return {
        name: activation_grid(layer_bits.get(name, n_bits), *limits, asymmetric)
        for name, limits in ranges.items()
    }


def quantize_activations(graph: fx.GraphModule, grids: Mapping[str, Grid]) -> fx.GraphModule:
    """Return a copy of an exported network in which inputs, by name, are rounded on their grids."""
    return with_inputs(graph, {name: grid.round for name, grid in grids.items()})
