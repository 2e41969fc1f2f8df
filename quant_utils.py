"""Post-training quantization of tensors and of whole networks.

A quantizer is a pure function `(w, n_bits, …) -> w_q`: same shape, values on a grid, `w` untouched.
It chooses a range, rounds to integers and goes back to float, in that order. All of them take

- `per_channel`: a range for each slice `w[i]` (an output channel) instead of one for the tensor;
- `range_of`: the tensor whose range is used, `w` itself by default: a bias is quantized on the grid
  of its weight. Values beyond the grid go to its nearest end.

They raise ValueError for `n_bits` outside 2…16 and for tensors that are empty or not finite. A new
quantizer is one such function and one line in `QUANTIZERS`. Inside, a tensor is (rows, elements),
one row a range, and what belongs to a row is (rows, 1).
"""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.layers import quantizable_layers

Quantizer = Callable[..., Tensor]
MIN_BITS, MAX_BITS = 2, 16
MIN_RELATIVE_STD = (
    1e-6  # a standard deviation this small beside max|w| is rounding: all values are equal
)


# --- ranges and integers ---------------------------------------------------------------------


def check_bits(n_bits: int) -> None:
    """Raise ValueError unless n_bits is a whole number from 2 to 16."""
    if n_bits != int(n_bits) or not MIN_BITS <= n_bits <= MAX_BITS:
        raise ValueError(f"{n_bits} bits: choose {MIN_BITS} to {MAX_BITS}")


def to_2d(w: Tensor, per_channel: bool) -> Tensor:
    """View w as (rows, elements): a row for each w[i], or one row for the whole tensor.

    Raises ValueError where there is nothing, or something else than floating-point numbers.
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


def rows_and_range(
    w: Tensor, per_channel: bool, range_of: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w in its range and the tensor that gives the range, both as rows, and m of that."""
    rows = to_2d(w, per_channel)
    m = abs_max(rows)
    if range_of is None:
        return rows, rows, m
    source = to_2d(range_of, per_channel)
    m = abs_max(source)
    return rows.clamp(-m, m), source, m


def safe_divisor(scale: Tensor) -> Tensor:
    """Return the scale to divide by: a tiny one instead of 0, so that 0 / 0 does not arise."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


# --- quantizers ------------------------------------------------------------------------------


def uniform(
    w: Tensor, n_bits: int, *, per_channel: bool = False, range_of: Tensor | None = None
) -> Tensor:
    """Round to the nearest point of the symmetric grid of step 2m / (2^n_bits − 1) through 0."""
    check_bits(n_bits)
    rows, _, m = rows_and_range(w, per_channel, range_of)
    int_min, int_max = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    scale = m / (int_max + 0.5)
    x_int = (rows / safe_divisor(scale)).round_().clamp_(int_min, int_max)
    return x_int.mul_(scale).reshape(w.shape)


def dorefa(
    w: Tensor,
    n_bits: int,
    *,
    per_channel: bool = False,
    range_of: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round stochastically on the 2^n_bits points from −m to m, which do not include 0.

    A value goes to either neighbour with a probability that makes the result right on average.
    Source: DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160), without its tanh.
    """
    check_bits(n_bits)
    rows, _, m = rows_and_range(w, per_channel, range_of)
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
    range_of: Tensor | None = None,
    distribution: str = "norm",
    approximate: bool = False,
    overlapping: bool = False,
) -> Tensor:
    """Piecewise linear quantization: a fine grid up to the breakpoint p, a coarse one beyond it.

    Source: Fang et al., ECCV 2020, arXiv 2002.00104. The centre (−p, p) has 2^n_bits − 1 points and
    each tail 2^(n_bits − 1) points from p to m; `overlapping`: the tails use the uniform grid of
    [−m, m] instead. `distribution`: "norm" or "laplace" puts p where the expected error is least
    (`approximate`: at the paper's closed form), "search" where the measured one is.
    """
    check_bits(n_bits)
    rows, source, m = rows_and_range(w, per_channel, range_of)
    if distribution == "search":
        p = search_breakpoint(source, m, n_bits, overlapping)
    else:
        p = breakpoint_of(source, m, DISTRIBUTIONS[distribution], approximate, overlapping)
    return pwlq_with_breakpoint(rows, m, p, n_bits, overlapping).reshape(w.shape)


def pwlq_with_breakpoint(
    rows: Tensor, m: Tensor, p: Tensor, n_bits: int, overlapping: bool
) -> Tensor:
    """Quantize each row with the breakpoint p, 0 ≤ p ≤ m. In magnitude, both grids have int_max."""
    int_max = 2 ** (n_bits - 1) - 1
    centre_scale = safe_divisor(p / (int_max + 0.5))
    tail_scale = safe_divisor(m / (int_max + 0.5) if overlapping else (m - p) / int_max)
    magnitude = rows.abs()
    in_tail = torch.ge(magnitude, p, out=torch.empty_like(magnitude))  # 0 or 1, to multiply by:
    scale = (in_tail * (tail_scale - centre_scale)).add_(centre_scale)  # torch.where is slow
    offset = 0 if overlapping else in_tail.mul_(p)
    x_int = magnitude.sub_(offset).div_(scale).round_().clamp_(max=int_max)
    return x_int.mul_(scale).add_(offset).copysign_(rows)


# --- PWLQ's breakpoint -----------------------------------------------------------------------


class Distribution(NamedTuple):
    """A density f, symmetric about 0 with variance 1, and the paper's closed form for p, in σ."""

    pdf: Callable[[Tensor], Tensor]  # f
    survival: Callable[[Tensor], Tensor]  # 1 − F
    decay: Callable[[Tensor], Tensor | float]  # −f′ / f, for x > 0
    closed_form: Callable[[Tensor], Tensor]  # m, in σ → p, in σ


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


def breakpoint_of(
    rows: Tensor, m: Tensor, distribution: Distribution, approximate: bool, overlapping: bool
) -> Tensor:
    """Return p of each row, in w's units, from m / σ. A row of equal values counts as m = σ."""
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
    """Return the p that minimises PWLQ's expected error, for every m ≥ 1 at once; both in σ.

    With t = m − p the length of a tail (t = m if `overlapping`: it uses the grid of [−m, m]) and
    S = 1 − F, the error is E(p) = [1 − 2S(p)]·p² + 2[S(p) − S(m)]·t². E′(p) / 2 goes through zero
    once between 0 and m: Newton's method, or bisection where that leaves the bracket; float64.
    """
    m = m.double()
    beyond, dt = distribution.survival(m), 0 if overlapping else -1
    low, high = torch.zeros_like(m), m
    p = torch.minimum(distribution.closed_form(m), m)
    for _ in range(200):
        t = m if overlapping else m - p
        f, s = distribution.pdf(p), distribution.survival(p)
        bend, mass = f * (p * p - t * t), s - beyond
        value = bend + p * (1 - 2 * s) + 2 * t * dt * mass
        slope = 4 * f * (p - t * dt) + 1 - 2 * s + 2 * dt * dt * mass - distribution.decay(p) * bend
        low, high = torch.where(value < 0, p, low), torch.where(value < 0, high, p)
        newton = p - value / slope
        inside = (newton >= low) & (newton <= high)
        last, p = p, torch.where(inside, newton, (low + high) / 2)
        if (p - last).abs().max() < 1e-6:  # Newton's next step would be its square
            break
    return p


def search_breakpoint(rows: Tensor, m: Tensor, n_bits: int, overlapping: bool) -> Tensor:
    """Return the p of least measured error of each row: out of 33, then out of finer and finer."""

    def error(p: Tensor) -> Tensor:
        off_by = pwlq_with_breakpoint(rows, m, p, n_bits, overlapping) - rows
        return off_by.div_(safe_divisor(m)).square_().sum(dim=1, keepdim=True)

    def better(best: tuple[Tensor, Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
        found = error(p)
        return torch.where(found < best[1], p, best[0]), torch.minimum(found, best[1])

    best = (m / 2, error(m / 2))
    for distribution in DISTRIBUTIONS.values():
        best = better(best, breakpoint_of(rows, m, distribution, False, overlapping))
    for i in range(1, 32):
        best = better(best, m * (i / 32))
    for width in (1 / 32, 1 / 192, 1 / 1152):
        centre = best[0]
        for i in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5):
            best = better(best, (centre + m * (width * i / 6)).clamp(min=0).minimum(m))
    return best[0]


QUANTIZERS: dict[str, Quantizer] = {"uniform": uniform, "dorefa": dorefa, "pwlq": pwlq}


def n_levels(scheme: str, n_bits: int, overlapping: bool = False) -> int | None:
    """Return how many values a tensor can take; PWLQ has those of one more bit, less one.

    None for PWLQ with overlapping regions, where it depends on the breakpoint.
    """
    if scheme != "pwlq":
        return 2**n_bits
    return None if overlapping else 2 ** (n_bits + 1) - 1


# --- networks --------------------------------------------------------------------------------


class LayerError(NamedTuple):
    """What quantization did to one layer: Σ(w_q − w)² over its weight, and how many weights."""

    name: str
    squared_error: float
    n_weights: int


def model_error(layers: list[LayerError], avg_in_layer: bool = False) -> float:
    """Return the mean over layers of the squared error; `avg_in_layer`: of that per weight."""
    return sum(e.squared_error / (e.n_weights if avg_in_layer else 1) for e in layers) / len(layers)


Correction = Callable[[Tensor, Tensor], Tensor]  # of (w, w_q), weights of one shape


@torch.no_grad()
def quantize_layer(
    layer: nn.Conv2d | nn.Linear,
    quantizer: Quantizer,
    n_bits: int,
    *,
    biases: bool = True,
    correct: Correction | None = None,
) -> float:
    """Quantize the layer in place and return the squared error of its weight.

    `biases`: also the bias, on its weight's grid. `correct`: make this of the quantized weight.
    """
    w = layer.weight.detach().clone()
    if biases and layer.bias is not None:
        layer.bias.copy_(quantizer(layer.bias, n_bits, range_of=w))
    w_q = quantizer(w, n_bits)
    layer.weight.copy_(correct(w, w_q) if correct else w_q)
    return (layer.weight - w).double().square().sum().item()


def quantize_model(
    net: nn.Module,
    quantizer: Quantizer,
    n_bits: int,
    *,
    biases: bool = True,
    correct: Correction | None = None,
) -> tuple[nn.Module, list[LayerError]]:
    """Return a copy of the network with quantized layers, and the error of each layer.

    The quantizer's options are bound before: `partial(pwlq, per_channel=True)`. For `biases` and
    `correct` see `quantize_layer`. Raises ValueError, naming the layer, where one has NaN weights.
    """
    net = copy.deepcopy(net)
    errors = []
    for name, layer in quantizable_layers(net).items():
        try:
            error = quantize_layer(layer, quantizer, n_bits, biases=biases, correct=correct)
        except ValueError as reason:
            raise ValueError(f"{name}: {reason}") from reason
        errors.append(LayerError(name, error, layer.weight.numel()))
    return net, errors


def mean_correction(w: Tensor, w_q: Tensor) -> Tensor:
    """Return w_q with each output channel's mean shifted to w's: w_q + mean(w) − mean(w_q).

    For inputs of one mean, that removes what quantization adds to the mean of a channel's output:
    the first half of `bias_correction`.
    """
    rows, rows_q = to_2d(w, True), to_2d(w_q, True)
    shift = rows.mean(dim=1, keepdim=True) - rows_q.mean(dim=1, keepdim=True)
    return (rows_q + shift).reshape(w.shape)


def bias_correction(w: Tensor, w_q: Tensor) -> Tensor:
    """Return w_q with each output channel's mean shifted to w's, then scaled to its deviation.

    Source: Banner et al., NeurIPS 2019, arXiv 1810.05723, section 4: (w_q + mean(w) − mean(w_q)) ·
    std(w) / std(w_q). The scale moves the mean again. A channel whose values all round to one has
    no spread to correct.
    """
    rows, rows_q = to_2d(w, True), to_2d(w_q, True)
    std, std_q = (r.std(dim=1, correction=0, keepdim=True) for r in (rows, rows_q))
    ratio = torch.where(std_q > MIN_RELATIVE_STD * abs_max(rows_q), std / std_q, 1)
    return (to_2d(mean_correction(w, w_q), True) * ratio).reshape(w.shape)


# --- activations -----------------------------------------------------------------------------

POOLINGS = nn.AvgPool2d | nn.AdaptiveAvgPool2d
Range = tuple[float, float]


def topk_median(x: Tensor, k: int = 10) -> Range:
    """Return the median of the k smallest and of the k largest values."""
    k, x = min(k, x.numel()), x.flatten().float()
    return tuple(x.topk(k, largest=top).values.quantile(0.5).item() for top in (False, True))


def percentile(x: Tensor, tail: float = 1e-4) -> Range:
    """Return the values that a fraction `tail` of all is below, and above."""
    k, x = max(1, round(tail * x.numel())), x.flatten().float()
    return tuple(x.topk(k, largest=top).values[-1].item() for top in (False, True))


def minmax(x: Tensor) -> Range:
    """Return the extremes."""
    return tuple(extreme.item() for extreme in torch.aminmax(x))


CALIBRATIONS: dict[str, Callable[[Tensor], Range]] = {
    "topk_median": topk_median,
    "percentile": percentile,
    "minmax": minmax,
}


@torch.no_grad()
def calibrate(
    net: nn.Module, batches: Iterable[Tensor], method: str = "topk_median"
) -> dict[str, Range]:
    """Return the range of the input of every convolution, linear layer and pooling, by name.

    `batches` are images (B, 3, H, W). The range is the mean over batches, of "minmax" the extremes.
    """
    found: dict[str, list[Range]] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.setdefault(name, []).append(CALIBRATIONS[method](args[0]))

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | POOLINGS)
    ]
    for images in batches:
        net(images)
    for handle in handles:
        handle.remove()
    of_lows, of_highs = (min, max) if method == "minmax" else (fmean, fmean)
    return {
        name: (of_lows(low for low, _ in ranges), of_highs(high for _, high in ranges))
        for name, ranges in found.items()
    }


def quantize_activation(x: Tensor, n_bits: int, low: float, high: float) -> Tensor:
    """Round x on the uniform grid of [0, high] where low ≥ 0, else on the symmetric one."""
    check_bits(n_bits)
    n = 2**n_bits - 1
    m, int_min, int_max = (high, 0, n) if low >= 0 else (max(high, -low), -(n + 1) // 2, n // 2)
    scale = torch.tensor(m / (n if low >= 0 else n / 2), dtype=x.dtype, device=x.device)
    return (x / safe_divisor(scale)).round_().clamp_(int_min, int_max).mul_(scale)


def quantize_activations(net: nn.Module, n_bits: int, ranges: dict[str, Range]) -> None:
    """From now on, quantize the input of each named module of the network: forward pre-hooks."""
    check_bits(n_bits)
    for name, (low, high) in ranges.items():
        hook = partial(_quantize_input, n_bits, low, high)
        net.get_submodule(name).register_forward_pre_hook(hook)


def _quantize_input(
    n_bits: int, low: float, high: float, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return quantize_activation(args[0], n_bits, low, high), *args[1:]
