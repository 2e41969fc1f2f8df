"""Post-training quantization of tensors and of whole networks.

A quantizer is a pure function `(w, n_bits, …) -> w_q`: same shape, values on a grid, `w` untouched.
It chooses a range, rounds to integers and goes back to float, in that order. All of them take

- `per_channel`: one range for each slice `w[i]` (an output channel) instead of one for the tensor;
- `range_source`: the tensor whose range is used, `w` itself by default: a bias is quantized on the
  grid of its weight. Values beyond the grid go to its nearest end.

A quantizer that rounds stochastically takes a `generator`. One whose rounding can be learned takes
`round_up`: where a value goes to the next grid point above it, not below (a bool each, 0 or 1 for
all); None: to nearest. They raise ValueError for `n_bits`
outside 2…16 and for tensors that are empty or not finite. A new quantizer is one such function and
one line in `QUANTIZERS`; flags of quant_inference.py that are named like its arguments reach it.

Inside, a tensor is `rows`, (rows, elements), with one range m for each row, (rows, 1).
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Set
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.networks.layers import quantizable_layers
from engine.networks.operation_inputs import transform_inputs, transformed_inputs
from engine.quantization.bit_widths import check_bits

Quantizer = Callable[..., Tensor]
RANGE_FACTORS = tuple(percent / 100 for percent in range(100, 20, -1))  # of m: ranges to try
MIN_RELATIVE_STD = 1e-6  # below this share of max|w|, a standard deviation is a rounding error


# --- ranges and integers ---------------------------------------------------------------------


def to_2d(w: Tensor, per_channel: bool) -> Tensor:
    """View w as (rows, elements): one row for each w[i], or a single one for the whole tensor.

    Raises ValueError for an empty tensor, and for one that is not of floating-point numbers.
    """
    if w.numel() == 0 or not w.is_floating_point():
        raise ValueError(f"cannot quantize {w.numel()} values of {w.dtype}")
    return w.detach().reshape(w.shape[0] if per_channel and w.dim() else 1, -1)


def abs_max(rows: Tensor) -> Tensor:
    """Return m = max|w| of each row. Raises ValueError where that is NaN or infinite."""
    m = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True))
    if not m.isfinite().all():
        raise ValueError("cannot quantize NaN or infinite values")
    return m


def clamp_to_range(
    w: Tensor, per_channel: bool, range_source: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w as rows clamped to [−m, m], their m, and the rows that have this m = max|·|.

    Those are w's own, or `range_source`'s. Raises ValueError where either is not finite.
    """
    rows = to_2d(w, per_channel)
    m = abs_max(rows)
    if range_source is None:
        return rows, m, rows
    range_rows = to_2d(range_source, per_channel)
    m = abs_max(range_rows)
    return rows.clamp(-m, m), m, range_rows


def safe_divisor(scale: Tensor) -> Tensor:
    """Return the scale, or the smallest normal number in place of 0: then 0 / scale is 0."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


# --- quantizers ------------------------------------------------------------------------------


def uniform(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    round_up: Tensor | int | None = None,
) -> Tensor:
    """Round to the nearest point of the symmetric grid of step 2m / (2^n_bits − 1) through 0."""
    check_bits(n_bits)
    rows, m, _ = clamp_to_range(w, per_channel, range_source)
    return round_within(rows, m, n_bits, round_up).reshape(w.shape)


def round_within(
    rows: Tensor, limit: Tensor, n_bits: int, round_up: Tensor | int | None = None
) -> Tensor:
    """Round each row on the uniform grid of [−limit, limit]; values beyond go to its ends.

    To nearest, or as `round_up` says, see the module.
    """
    int_min, int_max = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    scale = limit / (int_max + 0.5)
    x = rows / safe_divisor(scale)
    x_int = x.round_() if round_up is None else x.floor_().add_(as_rows(round_up, rows))
    return x_int.clamp_(int_min, int_max).mul_(scale)


def as_rows(round_up: Tensor | int, rows: Tensor) -> Tensor | int:
    """Return a tensor in the shape of the rows; a number as it is."""
    return round_up.reshape(rows.shape) if isinstance(round_up, Tensor) else round_up


def clip(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    clip_p: float = 2.4,
    round_up: Tensor | int | None = None,
) -> Tensor:
    """Round on the uniform grid of [−c, c]; c ≤ m is the range of least Σ|w − w_q|^clip_p.

    Out of 80, from m down to 0.21·m. Small values are rounded on a finer grid and the largest are
    cut off. `clip_p` is the exponent of the error: 2 is the squared error; the larger, the less is
    cut off.
    """
    check_bits(n_bits)
    rows, m, range_rows = clamp_to_range(w, per_channel, range_source)
    c = search_range(range_rows, m, n_bits, clip_p)
    return round_within(rows, c, n_bits, round_up).reshape(w.shape)


def search_range(rows: Tensor, m: Tensor, n_bits: int, clip_p: float) -> Tensor:
    """Return the c of least Σ|w − w_q|^clip_p of each row, the largest of equals; see `clip`."""
    best, least = m, torch.full_like(m, math.inf)
    for factor in RANGE_FACTORS:
        c = m * factor
        difference = (round_within(rows, c, n_bits) - rows).div_(safe_divisor(m))
        error = difference.abs_().pow_(clip_p).sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, c, best), torch.minimum(error, least)
    return best


def dorefa(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round stochastically on the 2^n_bits points from −m to m, which do not include 0.

    A value goes to either neighbour with a probability that makes the result right on average.
    Source: DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160), without its tanh.
    """
    check_bits(n_bits)
    rows, m, _ = clamp_to_range(w, per_channel, range_source)
    int_max = 2**n_bits - 1
    scale = m / (int_max / 2)
    noise = torch.rand(rows.shape, dtype=w.dtype, device=w.device, generator=generator).sub_(0.5)
    x_int = (rows / safe_divisor(scale)).add_(int_max / 2).add_(noise).round_().clamp_(0, int_max)
    return x_int.sub_(int_max / 2).mul_(scale).reshape(w.shape)


def pwlq(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    distribution: str = "norm",
    approximate: bool = False,
    overlapping: bool = False,
) -> Tensor:
    """Round on a fine grid up to the breakpoint p and on a coarse one beyond it (PWLQ).

    Source: Fang et al., ECCV 2020, arXiv 2002.00104. The centre (−p, p) has 2^n_bits − 1 points and
    each tail 2^(n_bits − 1) points from p to m; `overlapping`: the tails use the uniform grid of
    [−m, m] instead. `distribution`: "norm" or "laplace" puts p where the expected error is least
    (`approximate`: at the paper's closed form), "search" where the measured error is.
    """
    check_bits(n_bits)
    rows, m, range_rows = clamp_to_range(w, per_channel, range_source)
    p = choose_breakpoint(range_rows, m, n_bits, distribution, approximate, overlapping)
    return pwlq_with_breakpoint(rows, m, p, n_bits, overlapping).reshape(w.shape)


def pwlq_parts(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    distribution: str = "norm",
    approximate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the two uniform grids whose sum is `pwlq(w, n_bits, overlapping=True, …)`.

    The fine one is 0 beyond the breakpoint, the coarse one within: as integers, they are two
    weights of one layer.
    """
    check_bits(n_bits)
    rows, m, _ = clamp_to_range(w, per_channel)
    p = choose_breakpoint(rows, m, n_bits, distribution, approximate, overlapping=True)
    w_q = pwlq_with_breakpoint(rows, m, p, n_bits, overlapping=True)
    in_tail = rows.abs() >= p
    return (w_q * ~in_tail).reshape(w.shape), (w_q * in_tail).reshape(w.shape)


def choose_breakpoint(
    rows: Tensor, m: Tensor, n_bits: int, distribution: str, approximate: bool, overlapping: bool
) -> Tensor:
    """Return the breakpoint p of each row, in w's units; see `pwlq` for the options."""
    if distribution == "search":
        return search_breakpoint(rows, m, n_bits, overlapping)
    density = DISTRIBUTIONS[distribution]
    return breakpoint_from_distribution(rows, m, density, approximate, overlapping)


def pwlq_with_breakpoint(
    rows: Tensor, m: Tensor, p: Tensor, n_bits: int, overlapping: bool
) -> Tensor:
    """Quantize each row with the breakpoint p, 0 ≤ p ≤ m.

    Of magnitudes, both grids have the integers 0…int_max.
    """
    int_max = 2 ** (n_bits - 1) - 1
    centre_scale = safe_divisor(p / (int_max + 0.5))
    tail_scale = safe_divisor(m / (int_max + 0.5) if overlapping else (m - p) / int_max)
    magnitude = rows.abs()
    # 0.0 or 1.0, a factor: torch.where takes several times as long.
    in_tail = torch.ge(magnitude, p, out=torch.empty_like(magnitude))
    scale = (in_tail * (tail_scale - centre_scale)).add_(centre_scale)
    offset = 0 if overlapping else in_tail.mul_(p)
    x_int = magnitude.sub_(offset).div_(scale).round_().clamp_(max=int_max)
    return x_int.mul_(scale).add_(offset).copysign_(rows)


# --- PWLQ's breakpoint -----------------------------------------------------------------------


class Distribution(NamedTuple):
    """Density f of weights in σ, symmetric about 0, and the paper's closed form of p."""

    pdf: Callable[[Tensor], Tensor]  # f
    survival: Callable[[Tensor], Tensor]  # 1 − F
    decay: Callable[[Tensor], Tensor | float]  # −f′ / f, for x > 0
    closed_form: Callable[[Tensor], Tensor]  # m → p, both in σ


DISTRIBUTIONS = {
    "norm": Distribution(
        pdf=lambda x: torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
        survival=lambda x: torch.special.ndtr(-x),
        decay=lambda x: x,
        closed_form=lambda m: torch.log(0.86143114 * m + 0.607901097),
    ),
    "laplace": Distribution(
        pdf=lambda x: torch.exp(-math.sqrt(2) * x) / math.sqrt(2),
        survival=lambda x: torch.exp(-math.sqrt(2) * x) / 2,
        decay=lambda x: math.sqrt(2),
        closed_form=lambda m: 0.80304483 * m.sqrt() - 0.31667855,
    ),
}


def breakpoint_from_distribution(
    rows: Tensor, m: Tensor, distribution: Distribution, approximate: bool, overlapping: bool
) -> Tensor:
    """Return the p of least expected error of each row, in w's units.

    It depends on m / σ alone. A row of equal values counts as m = σ.
    """
    x = rows / safe_divisor(m)  # in [−1, 1], so that no square overflows
    std = torch.linalg.vector_norm(x.sub_(x.mean(dim=1, keepdim=True)), dim=1, keepdim=True)
    std = std.double() / math.sqrt(rows.shape[1])
    std = torch.where(std > MIN_RELATIVE_STD, std, 1)
    if approximate:
        p = distribution.closed_form(1 / std)
    else:
        p = optimal_breakpoint(1 / std, distribution, overlapping)
    return (p * std).clamp(max=1).to(m.dtype) * m


def optimal_breakpoint(m: Tensor, distribution: Distribution, overlapping: bool = False) -> Tensor:
    """Return the p that minimizes PWLQ's expected error, for every m ≥ 1 at once; both in σ.

    With t = m − p the length of a tail (t = m if `overlapping`: it uses the grid of [−m, m]) and
    S = 1 − F, the error is E(p) = [1 − 2S(p)]·p² + 2[S(p) − S(m)]·t². E′(p) / 2 goes through zero
    once between 0 and m: Newton's method, or bisection where that leaves the bracket; float64.
    """
    m = m.double()
    survival_at_m, dt = distribution.survival(m), 0 if overlapping else -1
    low, high = torch.zeros_like(m), m
    p = torch.minimum(distribution.closed_form(m), m)
    for _ in range(200):
        t = m if overlapping else m - p
        f, s = distribution.pdf(p), distribution.survival(p)
        f_term, tail_mass = f * (p * p - t * t), s - survival_at_m
        d1 = f_term + p * (1 - 2 * s) + 2 * t * dt * tail_mass  # E′ / 2
        d2 = 4 * f * (p - t * dt) + 1 - 2 * s + 2 * dt * dt * tail_mass
        d2 = d2 - distribution.decay(p) * f_term  # E″ / 2
        low, high = torch.where(d1 < 0, p, low), torch.where(d1 < 0, high, p)
        newton = p - d1 / d2
        in_bracket = (newton >= low) & (newton <= high)
        previous, p = p, torch.where(in_bracket, newton, (low + high) / 2)
        if (p - previous).abs().max() < 1e-6:  # Newton's next step would be its square
            break
    return p


def search_breakpoint(rows: Tensor, m: Tensor, n_bits: int, overlapping: bool) -> Tensor:
    """Return the p of least measured error of each row.

    Out of those of the distributions and 31 steps of m / 32, then out of finer and finer ones.
    """

    def error(p: Tensor) -> Tensor:
        difference = pwlq_with_breakpoint(rows, m, p, n_bits, overlapping) - rows
        return difference.div_(safe_divisor(m)).square_().sum(dim=1, keepdim=True)

    best_p = m / 2
    least = error(best_p)

    def try_breakpoint(p: Tensor) -> None:
        nonlocal best_p, least
        e = error(p)
        best_p, least = torch.where(e < least, p, best_p), torch.minimum(e, least)

    for distribution in DISTRIBUTIONS.values():
        try_breakpoint(breakpoint_from_distribution(rows, m, distribution, False, overlapping))
    for i in range(1, 32):
        try_breakpoint(m * (i / 32))
    for width in (1 / 32, 1 / 192, 1 / 1152):
        centre = best_p
        for i in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5):
            try_breakpoint((centre + m * (width * i / 6)).clamp(min=0).minimum(m))
    return best_p


QUANTIZERS: dict[str, Quantizer] = {
    "uniform": uniform,
    "dorefa": dorefa,
    "pwlq": pwlq,
    "clip": clip,
}
OWN_BIAS_RANGE = {"pwlq"}  # schemes whose published code gives a bias its own range and breakpoint

# Where one uniform grid is not enough: a function that returns several tensors whose sum is what
# the quantizer returns, each on a uniform grid.
UNIFORM_PARTS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"pwlq": pwlq_parts}


def quantizer_options(scheme: str) -> Set[str]:
    """Return the names of the arguments that the scheme's quantizer takes."""
    return inspect.signature(QUANTIZERS[scheme]).parameters.keys()


def is_stochastic(scheme: str) -> bool:
    """Tell whether the scheme's quantizer draws random numbers."""
    return "generator" in quantizer_options(scheme)


def n_levels(scheme: str, n_bits: int, overlapping: bool = False) -> int | None:
    """Return how many values a tensor quantized with the scheme can take.

    PWLQ has as many as a uniform quantizer of one more bit, less one; None with overlapping
    regions, where it depends on the breakpoint.
    """
    if scheme != "pwlq":
        return 2**n_bits
    return None if overlapping else 2 ** (n_bits + 1) - 1


# --- networks --------------------------------------------------------------------------------


class LayerError(NamedTuple):
    """Squared quantization error Σ(w_q − w)² of one layer's weight, and its number of weights."""

    name: str
    squared_error: float
    n_weights: int


def model_error(layers: list[LayerError], avg_in_layer: bool = False) -> float:
    """Return the mean over layers of their squared errors.

    `avg_in_layer`: divide each layer's by its number of weights first.
    """
    return sum(e.squared_error / (e.n_weights if avg_in_layer else 1) for e in layers) / len(layers)


NO_EXCEPTIONS: Mapping[str, Any] = MappingProxyType({})
Correction = Callable[[Tensor, Tensor], Tensor]  # (w, w_q) → corrected w_q, all of one shape


def checked(w_q: Tensor, w: Tensor) -> Tensor:
    """Return what a quantizer made of w; ValueError where that is no quantized w."""
    if not isinstance(w_q, Tensor) or w_q.shape != w.shape:
        shape = tuple(w_q.shape) if isinstance(w_q, Tensor) else type(w_q).__name__
        raise ValueError(f"the quantizer returned {shape} for values of shape {tuple(w.shape)}")
    if not w_q.isfinite().all():
        raise ValueError("the quantizer returned values that are not finite")
    return w_q


@torch.no_grad()
def quantize_layer(
    layer: nn.Conv2d | nn.Linear,
    quantizer: Quantizer,
    n_bits: int,
    *,
    bias_range: str | None = "weight",
    correction: Correction | None = None,
    round_up: Tensor | int | None = None,
) -> float:
    """Quantize the layer in place and return the squared error of its weight.

    `bias_range`: None keeps the bias in full precision, "weight" quantizes it on its weight's grid,
    "own" with one range and breakpoint of its own. `correction`: applied to the quantized weight,
    as `mean_correction` is. `round_up`: of the weight, for quantizers that take it.
    """
    w = layer.weight.detach().clone()
    if bias_range and layer.bias is not None:
        layer.bias.copy_(
            checked(_quantize_bias(layer.bias, w, quantizer, n_bits, bias_range), layer.bias)
        )
    w_q = checked(quantizer(w, n_bits, **rounding_option(round_up)), w)
    layer.weight.copy_(correction(w, w_q) if correction else w_q)
    return (layer.weight - w).double().square().sum().item()


def rounding_option(round_up: Tensor | int | None) -> dict[str, Tensor | int]:
    """Return the option of a quantizer; none for None, as not every quantizer takes it."""
    return {} if round_up is None else {"round_up": round_up}


def _quantize_bias(
    bias: Tensor, w: Tensor, quantizer: Quantizer, n_bits: int, bias_range: str
) -> Tensor:
    """Return the bias (C,), quantized on the grid of its weight w or with its own range."""
    if bias_range == "weight":
        return quantizer(bias, n_bits, range_source=w)
    return quantizer(bias[None], n_bits)[0]  # a single row: one range also per channel


def quantize_model(
    net: nn.Module,
    quantizer: Quantizer,
    n_bits: int,
    *,
    bias_range: str | None = "weight",
    correction: Correction | None = None,
    layer_bits: Mapping[str, int] = NO_EXCEPTIONS,
    round_up: Mapping[str, Tensor] = NO_EXCEPTIONS,
) -> tuple[nn.Module, list[LayerError]]:
    """Return a copy of the network with quantized layers, and the error of each layer.

    Bind the quantizer's options first: `partial(pwlq, per_channel=True)`. For `bias_range` and
    `correction` see `quantize_layer`. `layer_bits` are the bits of layers, by name, that have
    others than n_bits, `round_up` how weights of layers are rounded that do not go to nearest.
    Raises ValueError, naming the layer, for NaN weights.
    """
    net = copy.deepcopy(net)
    errors = []
    for name, layer in quantizable_layers(net).items():
        try:
            squared_error = quantize_layer(
                layer,
                quantizer,
                layer_bits.get(name, n_bits),
                bias_range=bias_range,
                correction=correction,
                round_up=round_up.get(name),
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        errors.append(LayerError(name, squared_error, layer.weight.numel()))
    return net, errors


def mean_correction(w: Tensor, w_q: Tensor) -> Tensor:
    """Return w_q with each output channel's mean shifted to w's: w_q + mean(w) − mean(w_q).

    Where all inputs of a channel have one mean, its output keeps its mean. This is the first half
    of `bias_correction`.
    """
    rows, rows_q = to_2d(w, True), to_2d(w_q, True)
    shift = rows.mean(dim=1, keepdim=True) - rows_q.mean(dim=1, keepdim=True)
    return (rows_q + shift).reshape(w.shape)


def bias_correction(w: Tensor, w_q: Tensor) -> Tensor:
    """Return w_q with each output channel's mean shifted to w's, then its spread scaled to w's.

    Source: Banner et al., NeurIPS 2019, arXiv 1810.05723, section 4: (w_q + mean(w) − mean(w_q)) ·
    std(w) / std(w_q). Scaling moves the mean again. A channel whose values all round to one value
    has no spread to scale.
    """
    rows, rows_q = to_2d(w, True), to_2d(w_q, True)
    std, std_q = (r.std(dim=1, correction=0, keepdim=True) for r in (rows, rows_q))
    ratio = torch.where(std_q > MIN_RELATIVE_STD * abs_max(rows_q), std / std_q, 1)
    return (to_2d(mean_correction(w, w_q), True) * ratio).reshape(w.shape)


# --- activations -----------------------------------------------------------------------------

Range = tuple[float, float]


def topk_median(x: Tensor, k: int = 10) -> Range:
    """Return the median of the k smallest values of x and that of its k largest."""
    k, x = min(k, x.numel()), x.flatten().float()
    return tuple(x.topk(k, largest=top).values.quantile(0.5).item() for top in (False, True))


def percentile(x: Tensor, tail: float = 1e-4) -> Range:
    """Return the two values of x beyond which a fraction `tail` of all values lies."""
    k, x = max(1, round(tail * x.numel())), x.flatten().float()
    return tuple(x.topk(k, largest=top).values[-1].item() for top in (False, True))


def minmax(x: Tensor) -> Range:
    """Return the smallest and the largest value of x."""
    return tuple(extreme.item() for extreme in torch.aminmax(x))


class Calibration(NamedTuple):
    """How the range of an input comes from that of each batch.

    `least_error`: `least_error_ranges` then narrows it for each number of bits.
    """

    batch_range: Callable[[Tensor], Range]
    over_batches: tuple[Callable[[Iterable[float]], float], ...] = (fmean, fmean)  # of low and high
    least_error: bool = False


CALIBRATIONS = {
    "topk_median": Calibration(topk_median),
    "percentile": Calibration(percentile),
    "minmax": Calibration(minmax, (min, max)),
    "mse": Calibration(minmax, (min, max), least_error=True),
}


@torch.no_grad()
def calibrate(
    net: nn.Module, batches: Iterable[Tensor], method: str = "topk_median", sums: bool = False
) -> dict[str, Range]:
    """Return the range of the input of every convolution, linear layer and pooling, by name.

    With `sums`, of both inputs of every sum, too: engine/networks/operation_inputs.py says what is
    seen, and under which name. `batches` are images (B, 3, H, W). A range is the mean of those of
    the batches, with "minmax" and "mse" the one that holds them all.
    """
    rule, batch_ranges = CALIBRATIONS[method], {}

    def record_range(name: str, x: Tensor) -> Tensor:
        if sums or not is_of_sum(name):
            batch_ranges.setdefault(name, []).append(rule.batch_range(x))
        return x

    with transformed_inputs(net, record_range):
        for images in batches:
            net(images)
    reduce_low, reduce_high = rule.over_batches
    return {
        name: (reduce_low(low for low, _ in ranges), reduce_high(high for _, high in ranges))
        for name, ranges in batch_ranges.items()
    }


@torch.no_grad()
def least_error_ranges(
    net: nn.Module,
    batches: Iterable[Tensor],
    extremes: Mapping[str, Range],
    n_bits: int,
    layer_bits: Mapping[str, int] = NO_EXCEPTIONS,
) -> dict[str, Range]:
    """Return, by name, the range of least Σ(x − x_q)² over all batches, x_q what x is rounded to.

    `extremes` are the ranges that hold all values, as `calibrate` returns them of these batches.
    What is tried are 80 ranges, from the extremes down to 0.21 of them, as `clip` does. For
    `layer_bits` see `quantize_activations`.
    """
    errors: dict[str, Tensor | float] = dict.fromkeys(extremes, 0.0)

    def add_errors(name: str, x: Tensor) -> Tensor:
        if name in extremes:
            bits = layer_bits.get(name, n_bits)
            errors[name] = errors[name] + activation_errors(x, bits, extremes[name])
        return x

    with transformed_inputs(net, add_errors):
        for images in batches:
            net(images)
    factors = {name: RANGE_FACTORS[int(errors[name].argmin())] for name in extremes}
    return {name: (f * extremes[name][0], f * extremes[name][1]) for name, f in factors.items()}


def activation_errors(x: Tensor, n_bits: int, extremes: Range) -> Tensor:
    """Return Σ(x − x_q)² for each of RANGE_FACTORS times the extremes, (80,), in float64.

    The values that are rounded to one point v of a grid are neighbours among the sorted ones, and
    their error is Σx² − 2·v·Σx + v²·n: two sums instead of a pass over all values for each range.
    """
    x = torch.from_numpy(np.sort(x.detach().flatten().cpu().numpy())).double()
    sums_below = torch.cat([x.new_zeros(1), x.cumsum(0)])
    errors = []
    for factor in RANGE_FACTORS:
        scale, int_min, int_max = activation_grid(n_bits, *(factor * limit for limit in extremes))
        grid = scale * torch.arange(int_min, int_max + 1, dtype=torch.float64)
        inner = torch.searchsorted(x, (grid[:-1] + grid[1:]) / 2)  # between two points
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), x.numel())])
        errors.append((grid * (grid * ends.diff() - 2 * sums_below[ends].diff())).sum())
    return x.square().sum() + torch.stack(errors)


def is_of_sum(name: str) -> bool:
    """Tell whether an input of that name is an operand of a sum."""
    return name.endswith("]")


@torch.no_grad()
def input_shapes(net: nn.Module, images: Tensor, sums: bool = False) -> dict[str, list[int]]:
    """Return the shape of each input that `calibrate` sees, without the batch, as they run."""
    shapes: dict[str, list[int]] = {}

    def record_shape(name: str, x: Tensor) -> Tensor:
        if sums or not is_of_sum(name):
            shapes.setdefault(name, list(x.shape[1:]))
        return x

    with transformed_inputs(net, record_shape):
        net(images)
    return shapes


def first_and_last(net: nn.Module, images: Tensor) -> tuple[str, str]:
    """Return the names of the first and the last convolution or linear layer that runs."""
    names = running_layers(net, images)
    return names[0], names[-1]


def running_layers(net: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the convolutions and linear layers that run, in that order."""
    layers = quantizable_layers(net)
    return [name for name in input_shapes(net, images) if name in layers]


def activation_grid(n_bits: int, low: float, high: float) -> tuple[float, int, int]:
    """Return scale, least and largest integer of the grid that `quantize_activation` uses."""
    check_bits(n_bits)
    n_steps = 2**n_bits - 1
    if low >= 0:
        return high / n_steps, 0, n_steps
    return max(high, -low) / (n_steps / 2), -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1


def quantize_activation(x: Tensor, n_bits: int, low: float, high: float) -> Tensor:
    """Round x on the uniform grid of [0, high] where low ≥ 0, else on that of ±max(high, −low)."""
    scale, int_min, int_max = activation_grid(n_bits, low, high)
    scale = torch.tensor(scale, dtype=x.dtype, device=x.device)
    return (x / safe_divisor(scale)).round_().clamp_(int_min, int_max).mul_(scale)


def quantize_activations(
    net: nn.Module,
    n_bits: int,
    ranges: Mapping[str, Range],
    layer_bits: Mapping[str, int] = NO_EXCEPTIONS,
) -> None:
    """Install hooks, in place, that quantize each input that `ranges` names.

    `layer_bits` are the bits of those, by name, that have others than n_bits.
    """
    check_bits(n_bits)

    def quantize(name: str, x: Tensor) -> Tensor:
        if name not in ranges:
            return x
        return quantize_activation(x, layer_bits.get(name, n_bits), *ranges[name])

    transform_inputs(net, quantize)
