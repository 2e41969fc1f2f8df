"""Cheaper penalties: gradients by a difference, in every K-th batch, and the loss nearby."""

import copy
import math
from functools import partial

import pytest
import reference
import test_networks
import test_train
import torch
from step_time import peak_megabytes
from torch import nn

import train
import utils
from engine.networks import fast_layers, outputs
from engine.step import gradients
from engine.step.gradients import compute_gradients
from engine.step.penalty_inputs import needs_gradients
from engine.step.trial import check_derivatives, check_penalty
from engine.system.errors import NetworkError
from regularizers import LPGrad, Sharpness, StepL2Grad, VarianceNorm
from train import Phase

CE = nn.CrossEntropyLoss()
CASES = {
    name: test_train.CASES[name]
    for name in (
        "L1Grad", "L2Grad", "L2Grad weights", "L5Grad", "LinfGrad", "StepL2Grad and noise", "nested"
    )
}  # fmt: skip


def smooth_net():
    torch.manual_seed(0)
    return reference.SmoothNet().double()


def vector(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def penalty_gradient(net, regularizer, problem, difference_step=None):
    """∇R as one vector, exactly or by a difference."""
    compute_gradients(net, CE, None, *problem)
    loss_gradient = vector(net)
    compute_gradients(net, CE, regularizer, *problem, difference_step=difference_step)
    return vector(net) - loss_gradient


# --- by a difference -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_error_of_a_difference_goes_with_the_step_and_of_a_central_one_with_its_square(
    name, problem
):
    net, regularizer = smooth_net(), CASES[name]
    exact = penalty_gradient(net, regularizer, problem)
    errors = {"one-sided": [], "central": []}
    for step in (1e-3, 1e-4):
        forward, backward = (penalty_gradient(net, regularizer, problem, s) for s in (step, -step))
        errors["one-sided"].append((forward - exact).norm() / exact.norm())
        errors["central"].append(((forward + backward) / 2 - exact).norm() / exact.norm())
    (large, small), (largest, smallest) = errors.values()
    assert large < 0.1 and large / small == pytest.approx(10, rel=0.1)
    assert largest < 0.1 * large and largest / smallest == pytest.approx(100, rel=0.2)


def test_the_first_pass_of_a_difference_is_that_of_the_exact_step(problem):
    """Loss, penalty and number correct are the same; only the way to the parameters differs."""
    net = smooth_net()
    exact = compute_gradients(net, CE, CASES["nested"], *problem)
    difference = compute_gradients(net, CE, CASES["nested"], *problem, difference_step=0.01)
    torch.testing.assert_close(difference, exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("only_weights", [True, False])
def test_no_tensor_moves_by_more_than_the_step_and_one_by_all_of_it(
    only_weights, problem, monkeypatch
):
    net, moved = smooth_net(), []
    plain = gradients.BatchLoss.perturbed

    def perturbed(self, params, offsets):
        moved.extend((params[name] - p, p) for name, p in self.net.named_parameters())
        activations = outputs.run_network(copy.deepcopy(net), self.x, True)[1]
        moved.extend((offset, activations[run]) for run, offset in offsets.items())
        return plain(self, params, offsets)

    monkeypatch.setattr(gradients.BatchLoss, "perturbed", perturbed)
    penalty_gradient(net, LPGrad(0.3, 2, only_weights), problem, 0.02)
    relative = [(change.norm() / t.norm()).item() for change, t in moved if t.norm() > 0]
    assert max(relative) == pytest.approx(0.02)
    assert sum(change.norm() > 0 for change, _ in moved) == (3 if only_weights else 5)


@pytest.mark.parametrize("second", [False, True])
def test_to_try_the_derivatives_changes_nothing(second):
    net, untouched = smooth_net(), smooth_net()
    check_derivatives(net, (3, 6, 6), second)
    torch.testing.assert_close(net.state_dict(), untouched.state_dict(), rtol=0, atol=0)
    assert net.training and all(p.grad is None for p in net.parameters())


def test_the_second_pass_moves_no_running_statistics(problem):
    net, once = smooth_net(), smooth_net()
    compute_gradients(once, CE, None, *problem)
    compute_gradients(net, CE, LPGrad(0.3, 2), *problem, difference_step=0.01)
    torch.testing.assert_close(dict(net.named_buffers()), dict(once.named_buffers()))
    assert net.norm1.num_batches_tracked == 1


def test_both_passes_drop_the_same_units():
    """With λ = 0 nothing moves: the difference is zero only if the random numbers are the same."""
    torch.manual_seed(0)
    net = fast_layers.use_fast_layers(reference.Stranger().double())
    x, y = test_networks.batch()
    found = []
    for regularizer in (None, LPGrad(0.0, 2)):
        torch.manual_seed(5)
        compute_gradients(net, CE, regularizer, x, y, difference_step=0.01)
        found.append((vector(net), torch.rand(1)))
    assert torch.equal(*(gradient for gradient, _ in found)) and found[0][1] == found[1][1]


class Cube(torch.autograd.Function):
    """x³, whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Foreign(nn.Module):
    """A network with a function of one's own."""

    def __init__(self, cube):
        super().__init__()
        self.conv, self.act, self.linear = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Linear(4, 4)
        self.cube = cube

    def forward(self, x):
        return self.linear(self.act(self.cube(self.conv(x))).mean(dim=(2, 3)))


def test_a_function_without_second_derivative_is_no_obstacle(problem):
    found = []
    for cube in (Cube.apply, lambda x: x**3):
        torch.manual_seed(0)
        net = Foreign(cube).double()
        found.append(penalty_gradient(net, LPGrad(0.3, 2), problem, 1e-4))
    exact = penalty_gradient(net, LPGrad(0.3, 2), problem)
    torch.testing.assert_close(*found)
    assert torch.cosine_similarity(found[0], exact, dim=0) > 0.999999


class NoSecond(torch.autograd.Function):
    """The identity, whose second derivative is an error."""

    @staticmethod
    def forward(ctx, x, is_derivative=False):
        ctx.is_derivative = is_derivative
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.is_derivative:
            raise RuntimeError("there is no second derivative")
        return NoSecond.apply(g, True), None


def test_a_second_derivative_that_fails_is_told_with_the_network(problem):
    net = Foreign(NoSecond.apply).double()
    with pytest.raises(NetworkError, match="Foreign cannot be differentiated twice"):
        compute_gradients(net, CE, LPGrad(0.3, 2), *problem)


def test_activations_of_no_module_cannot_be_moved(problem):
    x, y = problem
    net = test_train.Plain()
    with pytest.raises(NetworkError, match="number 0 is the output of no activation module"):
        compute_gradients(net, CE, LPGrad(0.1, 2), x.float(), y, difference_step=0.01)
    with pytest.raises(NetworkError, match="--penalty_gradient difference: Plain"):
        check_penalty(net, LPGrad(0.1, 2), (3, 6, 6), difference_step=0.01)
    check_penalty(reference.SmoothNet(), LPGrad(0.1, 2), (3, 6, 6), difference_step=0.01)
    compute_gradients(net, CE, LPGrad(0.1, 2, True), x.float(), y, difference_step=0.01)


def test_a_layer_of_zero_weights_bounds_no_step(problem):
    net = smooth_net()
    nn.init.zeros_(net.linear.weight)
    assert penalty_gradient(net, LPGrad(0.3, 2), problem, 0.01).isfinite().all()


# --- in every K-th batch ---------------------------------------------------------------------


def test_every_second_batch_has_twice_the_penalty(monkeypatch):
    """Of three batches an epoch the first and the third, whatever the epoch before did."""
    seen = []

    def recorded(net, criterion, regularizer, *others):
        seen.append((regularizer and regularizer.name, others[3]))
        return compute_gradients(net, criterion, regularizer, *others)

    phases = [Phase(0), Phase(1, VarianceNorm(1.0), warmup=2, every=2)]
    monkeypatch.setattr(train, "compute_gradients", recorded)
    _, history = test_train.small_fit(phases, 3)
    assert [name for name, _ in seen[3:]] == 2 * ["VarianceNorm", None, "VarianceNorm"]
    scales = [scale for name, scale in seen if name]
    assert scales == pytest.approx([2 * i / 6 for i in (0, 2, 3, 5)])
    assert 0 < history[2]["test_VarianceNorm"] < 2 * history[2]["train_VarianceNorm"]


@pytest.mark.parametrize("regularizer", [LPGrad(0.1, 1), Sharpness(1.0)])
def test_repeatable_to_the_bit(regularizer):
    phases, nets = [Phase(0, regularizer, every=2)], []
    for n_drawn in (0, 1000):
        torch.rand(n_drawn)
        nets.append(test_train.small_fit(phases, 2, difference_step=0.01)[0])
    first, second = (net.state_dict() for net in nets)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# --- the loss nearby -------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_of_factor_1_has_the_gradient_of_the_loss_nearby(adaptive, problem):
    net, x, y = smooth_net(), *problem
    plain, nearby = copy.deepcopy(net), copy.deepcopy(net)
    loss, penalty, _ = compute_gradients(net, CE, Sharpness(1.0, 0.3, adaptive), x, y)

    expected = CE(plain(x)[0], y)
    weights = reference.penalized_weights(plain)
    grads = torch.autograd.grad(expected, weights)
    step = reference.sharpness_step(weights, grads, 0.3, adaptive).detach()
    moved = reference.penalized_weights(nearby)
    with torch.no_grad():
        for w, delta in zip(moved, step.split([w.numel() for w in moved]), strict=True):
            w += delta.view_as(w)
    loss_nearby = CE(nearby(x)[0], y)
    loss_nearby.backward()
    torch.testing.assert_close(loss + penalty, loss_nearby.detach())
    assert penalty > 0
    for p, q in zip(net.parameters(), nearby.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_sharpness_makes_no_second_order_graph(problem):
    assert not gradients.needs_double_backward(Sharpness(1.0))
    assert needs_gradients(Sharpness(1.0)) and not needs_gradients(None)
    combined = test_train.CombinedReg(Sharpness(1.0), StepL2Grad(0.1))
    net = smooth_net()
    both = penalty_gradient(net, combined, problem)
    parts = [penalty_gradient(net, term, problem) for term in combined.terms]
    torch.testing.assert_close(both, sum(parts))


@pytest.mark.parametrize("rho", [0, -1, math.inf, math.nan])
def test_a_radius_that_is_none_is_refused(rho):
    with pytest.raises(ValueError, match="rho is"):
        Sharpness(1.0, rho)


def test_the_second_pass_frees_what_it_is_done_with():
    """With gradients and directions held until it ends, its peak is 3.0 times a plain step's."""
    net = utils.make_net("ResNet20", 10, "cpu", 0.25)
    x, y = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    step = partial(compute_gradients, net, CE)
    plain, exact = (
        peak_megabytes(partial(step, regularizer, x, y)) for regularizer in (None, LPGrad(0.01, 2))
    )
    assert exact < 2.8 * plain
