"""Post-training quantization of tensors; of whole networks: `engine.quantization`.

A quantizer is a pure function `(w, n_bits, …) -> w_q`: same shape, values on a grid, `w` untouched.
It chooses a range, rounds to integers and goes back to float, in that order. All of them take

- `per_channel`: one range for each slice `w[i]` (an output channel) instead of one for the tensor;
- `range_source`: the tensor whose range is used, `w` itself by default: a bias is quantized on the
  grid of its weight. Values beyond the grid go to its nearest end.

A quantizer that rounds stochastically takes a `generator`. One whose rounding can be learned takes
`round_up`: where a value goes to the next grid point above it, not below (a bool each, 0 or 1 for
all); None: to nearest. They raise ValueError for `n_bits` outside 2…16 and for tensors that are
empty or not finite.

A new quantizer is one such function and one line in `QUANTIZERS`; flags of quant_inference.py that
are named like its arguments reach it. One that returns floats is measured. One that can be exported
is written with `@scheme` and returns its integers: parts, each codes·scale, whose sum w_q is. When
it is called it gives w_q all the same; its attribute `grid` is the function that returns the parts.

Inside, a tensor is `rows`, (rows, elements), with one range m for each row, (rows, 1).
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.quantization.activations import CALIBRATIONS, RANGE_FACTORS  # noqa: F401
from engine.quantization.bit_widths import check_bits
from engine.quantization.grids import OnGrid
from engine.quantization.weights import Parts, Quantizer, total

# By how many steps max|w| lies below 2^(b−1), a step above the largest code of `uniform`.
STEP_SIZES = {"half": (0.5,), "full": (0.0,), "auto": (0.5, 0.0)}
MIN_RELATIVE_STD = 1e-6  # below this share of max|w|, a standard deviation is a rounding error


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


def scheme(
    *, own_bias_range: bool = False, n_levels: Callable[[int, bool], int | None] | None = None
) -> Callable[[Callable[..., Parts]], Quantizer]:
    """Return a decorator for a quantizer that returns parts on uniform grids, see the module.

    `own_bias_range`: its published code gives a bias a range and breakpoint of its own.
    `n_levels(n_bits, overlapping)` is how many values a quantized tensor can take, if not 2^n_bits.
    """

    def decorate(grid: Callable[..., Parts]) -> Quantizer:
        @functools.wraps(grid)
        def quantizer(w: Tensor, n_bits: int, **options: Any) -> Tensor:
            return total(grid(w, n_bits, **options))

        quantizer.grid = grid
        quantizer.own_bias_range = own_bias_range
        quantizer.n_levels = n_levels
        return quantizer

    return decorate


def on_grid(rows: Tensor, scale: Tensor, w: Tensor) -> OnGrid:
    """Return codes as rows, (rows, elements), in the shape of w, with the scale of each row."""
    shape = (len(scale), *[1] * (w.dim() - 1)) if len(scale) > 1 else ()
    return OnGrid(rows.reshape(w.shape), scale.reshape(shape))


@scheme()
def uniform(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    step_size: str = "half",
    round_up: Tensor | int | None = None,
) -> Parts:
    """Round to the nearest point of a grid through 0, codes·step, codes −2^(n_bits − 1) … that − 1.

    `step_size` says how far m lies beyond the largest code. "half" a step: 2m / (2^n_bits − 1), and
    no value is moved by more than half a step. A "full" one: 2m / 2^n_bits, finer for all, but what
    is above m − step is cut off. "auto": of the two, that of least Σ(w − w_q)² in each range.
    """
    check_bits(n_bits)
    rows, m, range_rows = clamp_to_range(w, per_channel, range_source)
    scales = [m / (2 ** (n_bits - 1) - gap) for gap in STEP_SIZES[step_size]]
    scale = least_error_scale(range_rows, m, scales, n_bits, 2) if len(scales) > 1 else scales[0]
    return (on_grid(round_codes(rows, scale, n_bits, round_up), scale, w),)


def round_codes(
    rows: Tensor, scale: Tensor, n_bits: int, round_up: Tensor | int | None = None
) -> Tensor:
    """Return the codes of each row on the uniform grid of its scale, (rows, 1).

    Values beyond go to its ends; to nearest, or as `round_up` says, see the module.
    """
    int_min = -(2 ** (n_bits - 1))
    int_max = 2 ** (n_bits - 1) - 1
    x = rows / safe_divisor(scale)
    if isinstance(round_up, Tensor):
        round_up = round_up.reshape(rows.shape)
    codes = x.round_() if round_up is None else x.floor_().add_(round_up)
    return codes.clamp_(int_min, int_max)


@scheme()
def clip(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    clip_p: float = 2.4,
    round_up: Tensor | int | None = None,
) -> Parts:
    """Round on the uniform grid of [−c, c]; c ≤ m is the range of least Σ|w − w_q|^clip_p.

    Out of 80, from m down to 0.21·m. Small values are rounded on a finer grid and the largest are
    cut off. `clip_p` is the exponent of the error: 2 is the squared error; the larger, the less is
    cut off. The grid is that of `uniform`, whose other step sizes are ranges between these 80.
    """
    check_bits(n_bits)
    rows, m, range_rows = clamp_to_range(w, per_channel, range_source)
    scales = [m * factor / (2 ** (n_bits - 1) - 0.5) for factor in RANGE_FACTORS]
    scale = least_error_scale(range_rows, m, scales, n_bits, clip_p)
    return (on_grid(round_codes(rows, scale, n_bits, round_up), scale, w),)


def least_error_scale(
    rows: Tensor, m: Tensor, scales: Sequence[Tensor], n_bits: int, exponent: float
) -> Tensor:
    """Return the scale of least Σ|w − w_q|^exponent of each row, the first of equals, (rows, 1).

    `scales` are what is tried, (rows, 1) each, and m is max|w|, which errors are relative to.
    """
    best = scales[0]
    least = torch.full_like(m, math.inf)
    for scale in scales:
        difference = (round_codes(rows, scale, n_bits).mul_(scale) - rows).div_(safe_divisor(m))
        error = difference.abs_().pow_(exponent).sum(dim=1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


@scheme()
def dorefa(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Parts:
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
    # the points are half-integers times the scale: odd integers times half of it
    return (on_grid(x_int.mul_(2).sub_(int_max), scale / 2, w),)


# Levels: those of a uniform quantizer of one more bit, less one; with overlapping regions their
# number depends on the breakpoint.
@scheme(
    own_bias_range=True, n_levels=lambda n, overlapping: None if overlapping else 2 ** (n + 1) - 1
)
def pwlq(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_source: Tensor | None = None,
    distribution: str = "norm",
    approximate: bool = False,
    overlapping: bool = False,
) -> Parts | Tensor:
    """Round on a fine grid up to the breakpoint p and on a coarse one beyond it (PWLQ).

    Source: Fang et al., ECCV 2020, arXiv 2002.00104. The centre (−p, p) has 2^n_bits − 1 points and
    each tail 2^(n_bits − 1) points from p to m; `overlapping`: the tails use the uniform grid of
    [−m, m] instead, and w_q is the sum of two tensors on uniform grids. `distribution`: "norm" or
    "laplace" puts p where the expected error is least (`approximate`: at the paper's closed form),
    "search" where the measured error is.
    """
    check_bits(n_bits)
    rows, m, range_rows = clamp_to_range(w, per_channel, range_source)
    if distribution == "search":
        p = search_breakpoint(range_rows, m, n_bits, overlapping)
    else:
        density = DISTRIBUTIONS[distribution]
        p = breakpoint_from_distribution(range_rows, m, density, approximate, overlapping)
    if not overlapping:
        return pwlq_with_breakpoint(rows, m, p, n_bits, False).reshape(w.shape)
    magnitude = rows.abs()
    regions = magnitude < p, magnitude >= p
    int_max = 2 ** (n_bits - 1) - 1
    return tuple(
        on_grid((magnitude / scale).round_().clamp_(max=int_max).copysign_(rows) * in_it, scale, w)
        for scale, in_it in zip(pwlq_scales(m, p, n_bits, True), regions, strict=True)
    )


def pwlq_with_breakpoint(
    rows: Tensor, m: Tensor, p: Tensor, n_bits: int, overlapping: bool
) -> Tensor:
    """Quantize each row with the breakpoint p, 0 ≤ p ≤ m.

    Magnitudes have the integers 0…int_max on both grids.
    """
    int_max = 2 ** (n_bits - 1) - 1
    centre_scale, tail_scale = pwlq_scales(m, p, n_bits, overlapping)
    magnitude = rows.abs()
    # 0.0 or 1.0, a factor: torch.where takes several times as long.
    in_tail = torch.ge(magnitude, p, out=torch.empty_like(magnitude))
    scale = (in_tail * (tail_scale - centre_scale)).add_(centre_scale)
    offset = 0 if overlapping else in_tail.mul_(p)
    x_int = magnitude.sub_(offset).div_(scale).round_().clamp_(max=int_max)
    return x_int.mul_(scale).add_(offset).copysign_(rows)


def pwlq_scales(m: Tensor, p: Tensor, n_bits: int, overlapping: bool) -> tuple[Tensor, Tensor]:
    """Return the scales of the centre and of the tails, of each row."""
    int_max = 2 ** (n_bits - 1) - 1
    tail = m / (int_max + 0.5) if overlapping else (m - p) / int_max
    return safe_divisor(p / (int_max + 0.5)), safe_divisor(tail)


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
    survival_at_m = distribution.survival(m)
    dt = 0 if overlapping else -1
    low = torch.zeros_like(m)
    high = m
    p = torch.minimum(distribution.closed_form(m), m)
    for _ in range(200):
        t = m if overlapping else m - p
        f = distribution.pdf(p)
        s = distribution.survival(p)
        f_term = f * (p * p - t * t)
        tail_mass = s - survival_at_m
        d1 = f_term + p * (1 - 2 * s) + 2 * t * dt * tail_mass  # E′ / 2
        d2 = 4 * f * (p - t * dt) + 1 - 2 * s + 2 * dt * dt * tail_mass
        d2 = d2 - distribution.decay(p) * f_term  # E″ / 2
        low, high = torch.where(d1 < 0, p, low), torch.where(d1 < 0, high, p)
        newton = p - d1 / d2
        in_bracket = (newton >= low) & (newton <= high)
        previous = p
        p = torch.where(in_bracket, newton, (low + high) / 2)
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
        best_p = torch.where(e < least, p, best_p)
        least = torch.minimum(e, least)

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


def quantizer_options(scheme_name: str) -> Set[str]:
    """Return the names of the arguments that the scheme's quantizer takes."""
    return inspect.signature(QUANTIZERS[scheme_name]).parameters.keys()


def is_stochastic(scheme_name: str) -> bool:
    """Tell whether the scheme's quantizer draws random numbers."""
    return "generator" in quantizer_options(scheme_name)


def rounding_of(scheme_name: str, learners: Sequence[str], rounding: str) -> str | None:
    """Return how a row's weights are rounded: "nearest", "stochastic" or, if learned, `rounding`.

    `learners` are the schemes whose rounding is learned. None for rows of no scheme of ours.
    """
    if scheme_name not in QUANTIZERS:  # unquantized, or with learned step sizes
        return None
    rounding = rounding if scheme_name in learners else "nearest"
    return "stochastic" if is_stochastic(scheme_name) else rounding


def bias_range(scheme_name: str, biases: str, fold_bn: bool) -> str | None:
    """Return the `bias_range` of `quantize_layer` that --biases means: None, "weight" or "own"."""
    if fold_bn or biases == "full":
        return None
    has_own = getattr(QUANTIZERS[scheme_name], "own_bias_range", False)
    return "own" if biases == "published" and has_own else "weight"


def n_levels(scheme_name: str, n_bits: int, overlapping: bool = False) -> int | None:
    """Return how many values a tensor quantized with the scheme can take; None: it depends."""
    levels = getattr(QUANTIZERS[scheme_name], "n_levels", None)
    return levels(n_bits, overlapping) if levels else 2**n_bits


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
    std(w) / std(w_q). Scaling moves the mean again. A channel whose values are all the same, before
    or after quantizing, has no spread to scale.
    """
    rows, rows_q = to_2d(w, True), to_2d(w_q, True)
    std, std_q = (r.std(dim=1, correction=0, keepdim=True) for r in (rows, rows_q))
    least, least_q = (MIN_RELATIVE_STD * abs_max(each) for each in (rows, rows_q))
    ratio = torch.where((std > least) & (std_q > least_q), std / std_q, 1)
    return (to_2d(mean_correction(w, w_q), True) * ratio).reshape(w.shape)
