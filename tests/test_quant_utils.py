import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats
from scipy.optimize import brentq, minimize_scalar
from torch import nn

import quant_utils as qu
from engine.networks import layers
from engine.networks.graph import operations, returning_values
from engine.quantization.activations import (
    activation_grids,
    calibrate,
    minmax,
    percentile,
    quantize_activations,
    topk_median,
)
from engine.quantization.grids import MIN_SCALE, activation_grid
from engine.quantization.weights import model_error, quantize_model, quantize_weights

SCIPY = {"norm": stats.norm, "laplace": stats.laplace(scale=1 / math.sqrt(2))}
DETERMINISTIC = {
    "uniform": qu.uniform,
    "pwlq": qu.pwlq,
    "laplace": partial(qu.pwlq, distribution="laplace"),
    "approximate": partial(qu.pwlq, approximate=True),
    "overlapping": partial(qu.pwlq, overlapping=True),
    "search": partial(qu.pwlq, distribution="search"),
    "clip": qu.clip,
}
ALL = {**DETERMINISTIC, "dorefa": qu.dorefa}


def check(**strategies):
    """Test with thirty cases drawn from the strategies."""
    return lambda test: settings(max_examples=30, deadline=None)(given(**strategies)(test))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Work on small tensors with one thread: waiting for a second one takes longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def tensors(draw, min_dims=1):
    """Float64 tensors with ties, zeros, and magnitudes far apart."""
    shape = draw(array_shapes(min_dims=min_dims, max_dims=4, max_side=5))
    values = st.floats(-8, 8).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
    w = torch.from_numpy(draw(arrays("float64", shape, elements=values)))
    return w * 10.0 ** draw(st.integers(-12, 12))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quantize(name, *args, **options):
    if name == "dorefa":
        options["generator"] = seeded()
    return ALL[name](*args, **options)


def grid_of(name, w, n_bits):
    """Every value that the quantizer can give to a tensor of the range of w."""
    m = w.abs().max().item()
    sweep = torch.linspace(-m, m, 40_001, dtype=w.dtype)
    return quantize(name, torch.cat([sweep, w.flatten()]), n_bits, range_source=w).unique()


# --- properties of every quantizer -----------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@check(w=tensors(), n_bits=st.integers(2, 16), per_channel=st.booleans())
def test_same_shape_pure_and_in_range(name, w, n_bits, per_channel):
    before = w.clone()
    w_q = quantize(name, w, n_bits, per_channel=per_channel)
    assert w_q.shape == w.shape and w_q.dtype == w.dtype and torch.equal(w, before)
    slack = 1 + 1 / (2**n_bits - 1) + 1e-9  # −m may go half a step further out
    assert w_q.isfinite().all() and w_q.abs().max() <= w.abs().max() * slack


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n_bits", [2, 3, 4, 6])
def test_number_of_levels_also_with_a_bias_beyond_the_range(name, n_bits):
    w = torch.randn(5000, generator=seeded()).double()
    bias = torch.tensor([-50.0, -0.1, 0.0, 0.1, 50.0]).double()
    grid = torch.cat(
        [grid_of(name, w, n_bits), quantize(name, bias, n_bits, range_source=w)]
    ).unique()
    scheme = name if name in qu.QUANTIZERS else "pwlq"
    assert len(grid) <= qu.n_levels(scheme, n_bits)
    if name in ("dorefa", "pwlq", "laplace", "approximate"):
        assert len(grid) == qu.n_levels(scheme, n_bits)


@pytest.mark.parametrize("name", sorted({*ALL} - {"overlapping"}))  # its tails cross the breakpoint
@check(w=tensors(), n_bits=st.integers(2, 12))
@pytest.mark.sampled(2)
def test_values_on_the_grid_stay(name, w, n_bits):
    w_q = quantize(name, w, n_bits, range_source=w)
    torch.testing.assert_close(quantize(name, w_q, n_bits, range_source=w), w_q, rtol=1e-9, atol=0)


@check(w=tensors(), n_bits=st.integers(2, 16))
def test_uniform_is_a_multiple_of_the_step_and_off_by_half_a_step_at_most(w, n_bits):
    scale = 2 * w.abs().max() / (2**n_bits - 1)
    w_q = qu.uniform(w, n_bits)
    assert ((w_q - w).abs() <= scale * (0.5 + 1e-9)).all()
    if scale > 0:
        x_int = w_q / scale
        torch.testing.assert_close(x_int, x_int.round(), rtol=0, atol=1e-6)
        assert x_int.min() >= -(2 ** (n_bits - 1)) - 1e-6
        assert x_int.max() <= 2 ** (n_bits - 1) - 1 + 1e-6


@check(w=tensors(), n_bits=st.integers(2, 16))
def test_dorefa_goes_to_one_of_the_two_neighbours(w, n_bits):
    scale = 2 * w.abs().max() / (2**n_bits - 1)
    assert ((qu.dorefa(w, n_bits, generator=seeded()) - w).abs() <= scale * (1 + 1e-9)).all()


@check(w=tensors(), n_bits=st.integers(2, 16), overlapping=st.booleans())
def test_pwlq_is_off_by_half_a_step_of_its_piece_at_most(w, n_bits, overlapping):
    rows, int_max = w.reshape(1, -1), 2 ** (n_bits - 1) - 1
    m = qu.abs_max(rows)
    p = qu.breakpoint_from_distribution(rows, m, qu.DISTRIBUTIONS["norm"], False, overlapping)
    tail = m / (int_max + 0.5) if overlapping else (m - p) / int_max
    step = torch.where(rows.abs() < p, p / (int_max + 0.5), tail)
    error = qu.pwlq(w, n_bits, overlapping=overlapping).reshape(1, -1) - rows
    assert (error.abs() <= step * (0.5 + 1e-9)).all()


@pytest.mark.parametrize("name", sorted({*DETERMINISTIC} - {"clip"}))  # one end is a step longer
@check(w=tensors(), n_bits=st.integers(2, 8))
@pytest.mark.sampled(2)
def test_symmetric(name, w, n_bits):
    w_q, mirrored = (DETERMINISTIC[name](s * w, n_bits) for s in (1, -1))
    inside = w.abs() < w.abs().max() * (1 - 1e-12)  # uniform sends −m, a tie, half a step outwards
    compared = inside if name == "uniform" else torch.ones_like(inside)
    assert torch.equal(mirrored[compared], -w_q[compared])


@pytest.mark.parametrize("name", ["uniform", "pwlq", "search"])
@check(w=tensors(), n_bits=st.integers(2, 8))
def test_order_is_kept(name, w, n_bits):
    w = w.flatten().sort().values
    w_q = DETERMINISTIC[name](w, n_bits)
    assert (w_q.diff() >= -1e-12 * w.abs().max()).all()


@pytest.mark.parametrize("name", ALL)
def test_more_bits_less_error(name):
    w = torch.randn(4000, generator=seeded())
    errors = [(quantize(name, w, n_bits) - w).square().sum() for n_bits in range(2, 13)]
    assert all(more < less for less, more in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("name", sorted({*DETERMINISTIC} - {"clip"}))  # may choose among equals
@check(w=tensors(min_dims=2), n_bits=st.integers(2, 8))
@pytest.mark.sampled(3)
def test_per_channel_is_a_loop_over_channels(name, w, n_bits):
    w = w * torch.logspace(0, 3, len(w)).double().view(-1, *[1] * (w.dim() - 1))
    looped = torch.stack([DETERMINISTIC[name](channel, n_bits) for channel in w])
    w_q = DETERMINISTIC[name](w, n_bits, per_channel=True)
    torch.testing.assert_close(w_q, looped, rtol=1e-6, atol=1e-300)


def test_per_channel_bias_is_on_the_grid_of_its_channel():
    w = torch.tensor([[1.0, 0.2], [100.0, 3.0]])
    bias = torch.tensor([30.0, 30.0])
    at_4_bits = qu.uniform(bias, 4, per_channel=True, range_source=w)
    torch.testing.assert_close(at_4_bits, torch.tensor([7 * 2 / 15, 2 * 200 / 15]))


# --- the range of least error ----------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("n_bits", "p"), [(2, 2.4), (4, 2.4), (4, 2.0), (6, 1.0)])
def test_clip_is_a_loop_over_ranges(n_bits, p, per_channel):
    w = torch.randn(5, 40, 3, generator=seeded()).double() ** 3
    rows = w.flatten(1) if per_channel else w.flatten()[None]
    expected = []
    for row in rows:
        candidates = []
        for i in range(80):
            scale = row.abs().max() * (1 - i / 100) / (2 ** (n_bits - 1) - 0.5)
            x_int = (row / scale).round().clamp(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)
            candidates.append(x_int * scale)
        expected.append(min(candidates, key=lambda w_q: ((w_q - row).abs() ** p).sum()))
    w_q = qu.clip(w, n_bits, per_channel=per_channel, clip_p=p)
    torch.testing.assert_close(w_q, torch.stack(expected).view(w.shape), rtol=1e-9, atol=0)


@check(w=tensors(), n_bits=st.integers(2, 8))
def test_clip_has_no_more_error_than_the_whole_range(w, n_bits):
    clipped, uniform = (f(w, n_bits) for f in (partial(qu.clip, clip_p=2), qu.uniform))
    m = w.abs().max().clamp(min=1e-300)
    errors = [((w_q - w) / m).square().sum().item() for w_q in (clipped, uniform)]
    assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-18


# --- the step size of uniform ----------------------------------------------------------------


def on_steps_of(scale, w, n_bits):
    """The definition: integers of n_bits in two's complement, times the scale."""
    return (w / scale).round().clamp(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) * scale


@pytest.mark.parametrize("per_channel", [False, True])
@check(w=tensors(min_dims=2), n_bits=st.integers(2, 8))
def test_step_sizes_are_two_grids_and_the_better_of_them(per_channel, w, n_bits):
    rows = w.flatten(1) if per_channel else w.flatten()[None]
    m = rows.abs().amax(dim=1, keepdim=True)
    assume((m > 0).all())
    half, full = (on_steps_of(m / (2 ** (n_bits - 1) - gap), rows, n_bits) for gap in (0.5, 0))
    errors = [(w_q - rows).square().sum(dim=1, keepdim=True) / m**2 for w_q in (half, full)]
    assume(((errors[0] - errors[1]).abs() > 1e-12).all())  # else either is right
    auto = torch.where(errors[0] < errors[1], half, full)
    for step_size, expected in {"half": half, "full": full, "auto": auto}.items():
        w_q = qu.uniform(w, n_bits, per_channel=per_channel, step_size=step_size)
        torch.testing.assert_close(w_q.view_as(rows), expected, rtol=1e-9, atol=1e-12)


def test_a_full_step_cuts_off_the_positive_extreme_alone_and_suits_a_bell():
    w = torch.tensor([-4.0, 4.0, 1.0])
    assert qu.uniform(w, 3, step_size="full").tolist() == [-4.0, 3.0, 1.0]
    bell, even = torch.randn(9999, generator=seeded()), torch.linspace(-1, 1, 9999)
    for w, best in ((bell, "full"), (even, "half")):
        assert torch.equal(qu.uniform(w, 3, step_size="auto"), qu.uniform(w, 3, step_size=best))


def test_a_bias_has_the_step_that_its_weight_has():
    w = torch.stack([torch.randn(999, generator=seeded()), torch.linspace(-1, 1, 999)])
    bias, options = torch.tensor([0.4, 0.4]), {"per_channel": True, "step_size": "auto"}
    [of_weight] = qu.uniform.grid(w, 3, **options)
    [of_bias] = qu.uniform.grid(bias, 3, range_source=w, **options)
    assert torch.equal(of_bias.scale, of_weight.scale.flatten())


# --- degenerate tensors and bad arguments ----------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("per_channel", [False, True])
def test_all_zero_stays_and_its_bias_becomes_zero(name, per_channel):
    zeros = torch.zeros(3, 2)
    assert torch.equal(quantize(name, zeros, 4, per_channel=per_channel), zeros)
    bias = quantize(
        name, torch.tensor([0.0, 2, -3]), 4, per_channel=per_channel, range_source=zeros
    )
    assert not bias.any()


@pytest.mark.parametrize("name", ["pwlq", "laplace", "approximate", "dorefa"])
@pytest.mark.parametrize("value", [0.1, -3.0, 1e-20, 1e30])
@pytest.mark.parametrize("shape", [(1,), (7,), (), (3, 5)])
def test_constant_and_single_values_are_kept(name, value, shape):
    w = torch.full(shape, value)
    for per_channel in (False, True):
        w_q = quantize(name, w, 3, per_channel=per_channel)
        torch.testing.assert_close(w_q, w, rtol=1e-6, atol=0)


def test_uniform_of_a_constant_is_half_a_step_off():
    w = torch.full((4,), 3.0)
    torch.testing.assert_close(qu.uniform(w, 2), torch.full((4,), 2.0))
    torch.testing.assert_close(qu.uniform(-w, 2), torch.full((4,), -4.0))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(name, value):
    w = torch.tensor([1.0, value, 2.0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(name, w, 4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(name, w, 4, range_source=torch.ones(3))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n_bits", [1, 17, 0, -4, 4.5])
def test_bits_outside_2_to_16_are_refused(name, n_bits):
    with pytest.raises(ValueError, match="choose 2 to 16"):
        quantize(name, torch.ones(3), n_bits)


@pytest.mark.parametrize("w", [torch.empty(0), torch.ones(3, dtype=torch.int64)])
def test_empty_and_integer_tensors_are_refused(w):
    with pytest.raises(ValueError, match="cannot quantize"):
        qu.uniform(w, 4)


# --- randomness ------------------------------------------------------------------------------


def test_dorefa_draws_from_the_generator_only():
    w = torch.randn(1000, generator=seeded())
    state = torch.get_rng_state()
    first, again, other = (qu.dorefa(w, 3, generator=seeded(s)) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_dorefa_is_right_on_average_with_twice_the_error():
    w = torch.rand(40_000, generator=seeded()).double() * 2 - 1
    w_q = qu.dorefa(w, 4, generator=seeded())
    ratio = (w_q - w).square().sum() / (qu.uniform(w, 4) - w).square().sum()
    assert abs((w_q - w).mean()) < 1e-3 and 1.9 < ratio < 2.1


# --- the breakpoint --------------------------------------------------------------------------


def expected_error(p, m, f, overlapping=False):
    """PWLQ's expected error, up to the factor C(b − 1) and the mass of [−m, m]."""
    tail = m if overlapping else m - p
    return (1 - 2 * f.sf(p)) * p**2 + 2 * (f.sf(p) - f.sf(m)) * tail**2


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("name", SCIPY)
@check(m=st.floats(1, 200))
def test_breakpoint_is_where_scipy_finds_the_least_expected_error(name, overlapping, m):
    f = SCIPY[name]
    at = torch.tensor([m], dtype=torch.float64)
    p = qu.optimal_breakpoint(at, qu.DISTRIBUTIONS[name], overlapping).item()
    optimum = minimize_scalar(
        expected_error, bounds=(0, m), args=(m, f, overlapping), options={"xatol": 1e-10}
    )
    brute = expected_error(m * np.linspace(0.001, 1, 1000), m, f, overlapping).min()
    assert expected_error(p, m, f, overlapping) <= min(optimum.fun, brute) * (1 + 1e-9)


@pytest.mark.parametrize("name", SCIPY)
def test_breakpoint_is_the_root_of_the_derivative_even_for_extreme_ratios(name):
    f = SCIPY[name]

    def derivative(p, m):
        tails = f.sf(p) - f.sf(m)
        return f.pdf(p) * (p**2 - (m - p) ** 2) + p * (1 - 2 * f.sf(p)) - 2 * (m - p) * tails

    m = torch.logspace(0, 6, 50, dtype=torch.float64)
    p = qu.optimal_breakpoint(m, qu.DISTRIBUTIONS[name])
    roots = [brentq(derivative, 0, x, args=(x,), xtol=1e-13) for x in m.tolist()]
    torch.testing.assert_close(p, torch.tensor(roots, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCIPY)
def test_closed_form_is_close_where_it_was_fitted(name):
    distribution, m = qu.DISTRIBUTIONS[name], torch.linspace(3, 10, 50).double()
    difference = distribution.closed_form(m) - qu.optimal_breakpoint(m, distribution)
    assert difference.abs().max() < 0.025


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SCIPY)
def test_expected_error_relative_to_uniform_is_below_lemma_2(name, n_bits):
    """E_pwlq = C(b−1)·E(p) / mass and E_uniform = C(b)·(2m)², both per weight in [−m, m]."""
    f = SCIPY[name]
    c_ratio = ((2**n_bits - 1) / (2 ** (n_bits - 1) - 1)) ** 2  # C(b−1) / C(b)
    for m in (1.0, 2.0, 3.0, 6.0, 10.0, 30.0):
        at = torch.tensor([m], dtype=torch.float64)
        p = qu.optimal_breakpoint(at, qu.DISTRIBUTIONS[name]).item()
        relative = c_ratio * expected_error(p, m, f) / (1 - 2 * f.sf(m)) / (2 * m) ** 2
        assert relative < c_ratio / 16
        published = {3.0: 0.236, 6.0: 0.136, 10.0: 0.073}
        if name == "norm" and n_bits == 4 and m in published:
            assert relative == pytest.approx(published[m], abs=1e-3)


@pytest.mark.parametrize("cut", [3.0, 6.0])
def test_measured_error_is_the_expected_one(cut):
    """On a truncated Gaussian: the centre has one level more than the formula counts."""
    w = torch.randn(400_000, generator=seeded()).double().clamp(-cut, cut)
    w[0], rows = cut, w.reshape(1, -1)
    p = qu.optimal_breakpoint(torch.tensor([cut]), qu.DISTRIBUTIONS["norm"])
    w_q = qu.pwlq_with_breakpoint(rows, qu.abs_max(rows), p, 6, overlapping=False)
    centre = rows.abs() < p
    expected = (2 * p / 63) ** 2 / 12 * centre.sum() + ((cut - p) / 31) ** 2 / 12 * (~centre).sum()
    assert (w_q - rows).square().sum().item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("overlapping", [False, True])
@check(w=tensors(), n_bits=st.integers(2, 6))
def test_search_is_never_worse(w, n_bits, overlapping):
    def error(distribution):
        options = {"distribution": distribution, "overlapping": overlapping}
        return (qu.pwlq(w, n_bits, **options) - w).square().sum()

    assert error("search") <= min(error("norm"), error("laplace")) * (1 + 1e-9)


@pytest.mark.parametrize("two_modes", [False, True])
def test_search_finds_the_least_error_that_a_fine_sweep_finds(two_modes):
    w = torch.randn(1, 3000, generator=seeded()).double()
    if two_modes:  # many weights near 0 and some near 1, as no distribution of the scheme has it
        w = torch.where(w < 1, 0.01 * w, 1 - 0.01 * w)
    m = qu.abs_max(w)

    def error(p):
        return (qu.pwlq_with_breakpoint(w, m, p, 4, False) - w).square().sum()

    swept = min(error(m * i / 500) for i in range(1, 500))
    assert error(qu.search_breakpoint(w, m, 4, False)) <= swept


# --- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (lambda w, n_bits, **_: w[0], r"conv: the quantizer returned \(3, 3, 3\)"),
        (lambda w, n_bits, **_: None, "conv: the quantizer returned NoneType"),
        (lambda w, n_bits, **_: w * float("nan"), "conv: the quantizer returned values that are"),
    ],
)
def test_what_is_no_quantized_weight_is_refused(quantizer, message):
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=message):
        quantize_model(net, quantizer, 4, bias_range=None)


@pytest.mark.parametrize(
    ("scheme", "biases", "fold_bn", "expected"),
    [
        ("uniform", "published", False, "weight"),
        ("pwlq", "published", False, "own"),
        ("pwlq", "weight", False, "weight"),
        ("pwlq", "published", True, None),
        ("uniform", "full", False, None),
    ],
)
def test_where_a_bias_has_its_range_from(scheme, biases, fold_bn, expected):
    assert qu.bias_range(scheme, biases, fold_bn) == expected


def test_quantize_model_is_a_copy_with_the_error_of_each_layer(net):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net_q, errors = quantize_model(net, qu.uniform, 4)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    originals = layers.penalized_layers(net)
    assert [error.name for error in errors] == list(originals)
    weights = [module.weight for module in originals.values()]
    for (name, error, n, parts), w in zip(errors, weights, strict=True):
        w_q = net_q.get_submodule(name).weight
        assert torch.equal(w_q, qu.uniform(w, 4)) and n == w.numel()
        [part] = parts
        assert torch.equal(part.codes, part.codes.round()) and part.codes.abs().max() <= 8
        assert torch.equal(part.codes * part.scale, w_q)
        assert error == pytest.approx((w_q - w).square().sum().item(), rel=1e-5)
    squared = torch.tensor([error.squared_error for error in errors])
    sizes = torch.tensor([error.n_weights for error in errors])
    assert model_error(errors) == pytest.approx(squared.mean().item(), rel=1e-5)
    assert model_error(errors, True) == pytest.approx((squared / sizes).mean().item(), rel=1e-5)


def test_bias_shares_the_levels_of_its_weight_or_stays(net):
    net.classifier.bias.data.mul_(100)
    layer = quantize_model(net, qu.uniform, 3)[0].classifier
    assert len(torch.cat([layer.weight.flatten(), layer.bias]).unique()) <= 2**3
    layer = quantize_model(net, qu.uniform, 3, bias_range=None)[0].classifier
    assert torch.equal(layer.bias, net.classifier.bias)


def test_nan_weights_name_the_layer(net):
    net.layer4[0].weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"^layer4\.0: .*NaN"):
        quantize_model(net, qu.pwlq, 4)


def test_bias_correction_keeps_each_channels_spread_and_moves_its_mean():
    w = torch.randn(6, 4, 3, 3, generator=seeded()).double() + 0.3
    w[2] = 0.7
    w_q = qu.uniform(w, 3)
    corrected = qu.bias_correction(w, w_q)
    torch.testing.assert_close(corrected[2], w[2])
    rows, rows_q, rows_c = (t.flatten(1) for t in (w, w_q, corrected))
    torch.testing.assert_close(rows_c.std(1), rows.std(1))
    ratio = torch.where(rows.std(1) > 0, rows.std(1) / rows_q.std(1), 1)
    torch.testing.assert_close(rows_c.mean(1), rows.mean(1) * ratio)
    same = qu.bias_correction(w, w)
    torch.testing.assert_close(same, w)
    rounded_at_random = w[2:3] + 0.1 * torch.randn(1, 4, 3, 3, generator=seeded())
    kept = qu.bias_correction(w[2:3], rounded_at_random)  # of a channel of one value
    torch.testing.assert_close(kept.mean(), w[2].mean())


def test_mean_correction_keeps_each_channels_mean():
    w = torch.randn(6, 4, 3, 3, generator=seeded()).double() + 0.3
    w_q = qu.uniform(w, 3)
    corrected = qu.mean_correction(w, w_q)
    torch.testing.assert_close(corrected.mean((1, 2, 3)), w.mean((1, 2, 3)))
    torch.testing.assert_close(corrected.flatten(1).std(1), w_q.flatten(1).std(1))
    assert (w_q.mean((1, 2, 3)) - w.mean((1, 2, 3))).abs().min() > 1e-4


@pytest.mark.parametrize("method", qu.CALIBRATIONS)
def test_calibration_sees_every_input(net, graph, method):
    batches = torch.randn(2, 8, 3, 32, 32, generator=seeded())
    ranges = calibrate(graph, batches, method)
    assert set(ranges) == {*layers.penalized_layers(net), "pool"}
    low, high = ranges["layer0.0"]
    assert low < 0 < high
    assert all(low == 0 < high for name, (low, high) in ranges.items() if name != "layer0.0")
    if method == "minmax":
        assert (low, high) == (batches.min().item(), batches.max().item())
    if method == "topk_median":
        tops = [batch.flatten().topk(10).values.median().item() for batch in batches]
        assert high == pytest.approx(sum(tops) / 2, rel=0.05)


def test_percentile_and_topk_of_known_values():
    x = torch.arange(100_001.0)
    assert percentile(x) == (9.0, 99_991.0)
    assert topk_median(x) == (4.5, 99_995.5)
    assert topk_median(torch.tensor([3.0])) == (3.0, 3.0) == percentile(torch.tensor([3.0]))


@check(w=tensors(), n_bits=st.integers(2, 8), positive=st.booleans())
def test_activation_grid(w, n_bits, positive):
    w = w.abs().float() if positive else w.float()  # as scales are
    assume(not 0 < w.abs().max() < 1e4 * MIN_SCALE)
    low, high = minmax(w)
    w_q = activation_grid(n_bits, low, high).round(w)
    if positive:
        step = high / (2**n_bits - 1)
        assert ((w_q - w).abs() <= step / 2 + high * 1e-6).all() and w_q.max() <= high * (1 + 1e-6)
    else:
        expected = qu.uniform(w, n_bits) if low < 0 else w_q
        torch.testing.assert_close(w_q, expected, rtol=1e-6, atol=1e-300)


def test_activations_of_a_network_are_quantized(net, graph):
    x = torch.randn(8, 3, 32, 32, generator=seeded())
    ranges = calibrate(graph, [x], "minmax")
    with torch.no_grad():
        reference, _ = net(x)
        for n_bits in (2, 16):
            graph_q, _ = quantize_weights(graph, qu.uniform, 16)
            graph_q = quantize_activations(graph_q, activation_grids(ranges, n_bits))
            logits = graph_q(x)
            if n_bits == 2:
                [pool] = [each for each in operations(graph_q) if each.name == "pool"]
                [pooled] = returning_values(graph_q, [pool.source("pool")])(x)
                assert len(pooled.unique()) == 4
    torch.testing.assert_close(logits, reference, rtol=0.01, atol=0.01)
