"""A whole step as one function computes what the step does, of any penalty."""

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import reference
import test_train
import torch
from torch import nn

import models
import train
from engine.networks import compiling
from engine.networks.fast_layers import use_fast_layers
from engine.step import compiled_step
from engine.step.compiled_step import CompiledStep
from engine.step.gradients import compute_gradients
from regularizers import (
    CombinedReg,
    KurtosisNorm,
    LPGrad,
    Sharpness,
    StepNoise,
    VarianceNorm,
    make_regularizer,
)

CE = nn.CrossEntropyLoss()
OF_GRADIENTS = {f"L{p}Grad": LPGrad(0.3, p) for p in (1, 2, math.inf)}
OTHERS = {
    "none": None,
    "StepNoise": StepNoise(0.7, 2),
    "Sharpness": Sharpness(1.0, 0.3),
    "folded": KurtosisNorm(0.5, fold_bn=True),
    "combined": CombinedReg(VarianceNorm(1.25), LPGrad(0.05, 2, only_weight_grads=True)),
}


@pytest.fixture
def recorded_only(monkeypatch):
    """Have the recorded graph itself run: what compiling makes of it is tested in few cases.

    Returns the list of the graphs.
    """
    monkeypatch.setattr(compiling, "_compile_for", None)  # and as it was, after a training
    graphs, compile_kernel = [], torch.compile

    def compile_no_step(function, fullgraph=False, **options):
        if not fullgraph:  # a kernel
            return compile_kernel(function, **options)
        graphs.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_no_step)
    return graphs


def nets(make=reference.SmoothNet):
    """The same network in float64 three times: plain, and twice with fast layers."""
    torch.manual_seed(0)
    plain = make().double().train()
    fast = use_fast_layers(copy.deepcopy(plain))
    return plain, fast, copy.deepcopy(fast)


def step_from(seed, step, *arguments):
    """The results of a step from that seed, and the stream of random numbers after it."""
    torch.manual_seed(seed)
    return step(*arguments), torch.get_rng_state()


def assert_same(found, expected, nets):
    """The same results, random stream, gradients and buffers, to 1e-9 of the largest."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(found[1], expected[1])
    ours, theirs = nets
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9 * largest.item())
    torch.testing.assert_close([*ours.buffers()], [*theirs.buffers()], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OF_GRADIENTS)
@pytest.mark.sampled(3)
def test_its_gradient_is_that_of_plain_double_backprop(name, problem, recorded_only):
    plain, _, net = nets()
    step = CompiledStep(len(problem[0]))
    found = step(net, CE, OF_GRADIENTS[name], *problem)
    penalty_of = test_train.penalty_of(OF_GRADIENTS[name])
    expected = reference.backward_twice(plain, CE, penalty_of, *problem)
    assert step.is_compiled
    torch.testing.assert_close(found[:2], expected, rtol=1e-10, atol=0)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close([*net.buffers()], [*plain.buffers()])


@pytest.mark.parametrize("difference_step", [None, 0.01])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.sampled(9)
def test_any_penalty_draws_the_same_random_numbers(name, difference_step, problem, recorded_only):
    _, eager, net = nets()
    step = CompiledStep(len(problem[0]))
    options = CE, OTHERS[name], *problem, torch.float64, 0.5, difference_step
    for seed in (3, 4):  # the second call is of what was recorded
        expected = step_from(seed, compute_gradients, eager, *options)
        assert_same(step_from(seed, step, net, *options), expected, (net, eager))
    assert step.is_compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["L2Grad", "StepNoise", "Sharpness"])
def test_what_is_compiled_is_exact_as_well(name, problem):
    _, eager, net = nets()
    step, regularizer = CompiledStep(len(problem[0])), {**OF_GRADIENTS, **OTHERS}[name]
    for seed in (3, 4):
        expected = step_from(seed, compute_gradients, eager, CE, regularizer, *problem)
        found = step_from(seed, step, net, CE, regularizer, *problem)
        assert_same(found, expected, (net, eager))
    assert step.is_compiled


@pytest.mark.slow
@pytest.mark.parametrize(("model", "width"), [("ConvNet", 1), ("ResNet20", 0.25)])
def test_networks_are_compiled_exactly(model, width):
    _, eager, net = nets(lambda: models.make_model(model, 10, width))
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    options = CE, make_regularizer("L1Grad", 0.1), x, y, torch.float64
    step = CompiledStep(4)
    expected = step_from(3, compute_gradients, eager, *options)
    assert_same(step_from(3, step, net, *options), expected, (net, eager))
    assert step.is_compiled


def test_a_batch_of_another_size_and_another_mode_are_no_mistake(problem, recorded_only):
    _, eager, net = nets()
    x, y = problem
    step, regularizer = CompiledStep(len(x)), LPGrad(0.3, 2)
    for training, n in ((True, len(x)), (True, len(x) - 1), (False, len(x)), (True, len(x))):
        arguments = CE, regularizer, x[:n], y[:n]
        expected = step_from(3, compute_gradients, eager.train(training), *arguments)
        found = step_from(3, step, net.train(training), *arguments)
        assert_same(found, expected, (net, eager))
    assert step.is_compiled and len(recorded_only) == 2


@pytest.mark.slow
def test_frozen_parameters_have_no_gradient(problem, recorded_only):
    _, eager, net = nets()
    for each in (eager, net):
        each.conv1.weight.requires_grad_(False)
    step = CompiledStep(len(problem[0]))
    step(net, CE, LPGrad(0.3, 2), *problem)
    compute_gradients(eager, CE, LPGrad(0.3, 2), *problem)
    assert net.conv1.weight.grad is None and step.is_compiled
    torch.testing.assert_close(net.conv2.weight.grad, eager.conv2.weight.grad)


class Branching(reference.SmoothNet):
    """What it computes depends on a number that is known only when it runs."""

    def forward(self, x):
        logits, activations = super().forward(x)
        return (logits if logits.sum().item() > 0 else 2 * logits), activations


@pytest.mark.parametrize(
    ("make", "regularizer", "why"),
    [
        (Branching, LPGrad(0.3, 2), "Branching: "),
        (reference.DropoutNet, StepNoise(0.7, 2), "DropoutNet draws random numbers as it runs"),
    ],
)
def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(
    make, regularizer, why, problem, recorded_only, capsys
):
    _, eager, net = nets(make)
    step = CompiledStep(len(problem[0]))
    for seed in (3, 4):
        expected = step_from(seed, compute_gradients, eager, CE, regularizer, *problem)
        found = step_from(seed, step, net, CE, regularizer, *problem)
        assert torch.equal(found[1], expected[1])
        assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--step compiled has no effect: {why}")


class Moving(reference.SmoothNet):
    """It puts another tensor in the place of a buffer, and keeps one that it makes as it runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.kept = {}

    def forward(self, x):
        logits, activations = super().forward(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean()
        if len(x) not in self.kept:
            self.kept[len(x)] = torch.ones(len(x), 1, dtype=x.dtype)
        return logits * self.kept[len(x)] + self.mean, activations


@pytest.mark.slow
def test_what_a_network_keeps_as_it_runs_is_right_afterwards(problem, recorded_only):
    _, eager, net = nets(Moving)
    step, regularizer = CompiledStep(len(problem[0])), LPGrad(0.3, 2)
    for seed in (3, 4, 5):
        expected = step_from(seed, compute_gradients, eager, CE, regularizer, *problem)
        results = step_from(seed, step, net, CE, regularizer, *problem)
        assert_same(results, expected, (net, eager))
    assert step.is_compiled and net.mean != 0
    with torch.no_grad():  # without what was recorded
        torch.testing.assert_close(net.eval()(problem[0])[0], eager.eval()(problem[0])[0])


@pytest.mark.slow
def test_a_compiled_step_of_float32_moves_weights_as_the_step_does():
    _, eager, net = nets(lambda: models.make_model("ResNet20", 10, 0.25))
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    step, weights = CompiledStep(4), []
    for each, take_step in ((eager, compute_gradients), (net, step)):
        each.float().to(memory_format=torch.channels_last)
        images = x.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(each.parameters(), 0.1, 0.9, fused=True)
        take_step(each, CE, LPGrad(0.01, 2), images, y)
        optimizer.step()
        weights.append([p.detach() for p in each.parameters()])
    assert step.is_compiled
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_several_processes_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.distributed, "get_world_size", lambda: 2)
    with pytest.raises(SystemExit) as end:
        train.main("--dataset Synthetic --device cpu --step compiled --run_name r".split())
    assert end.value.code == 2
    assert "--step compiled is for one process" in capsys.readouterr().err


@pytest.mark.slow
def test_dropout_in_one_pass_drops_the_same_units(problem, recorded_only):
    _, eager, net = nets(reference.DropoutNet)
    step = CompiledStep(len(problem[0]))
    expected = step_from(3, compute_gradients, eager, CE, LPGrad(0.3, 2), *problem)
    assert_same(step_from(3, step, net, CE, LPGrad(0.3, 2), *problem), expected, (net, eager))
    assert step.is_compiled


def test_a_run_with_it_resumes_to_the_bit(tmp_path, monkeypatch, capsys, recorded_only):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Smooth", partial(reference.SmoothNet, 3))
    flags = "--model Smooth --dataset Synthetic --train_subset 40 --batch_size 16 --device cpu"
    flags += " --step compiled --precision fp32 --regularizer L2Grad --lr 0.01 --no_test_penalty"
    train.main(f"{flags} --run_name whole --n_epochs 2".split())
    assert len(recorded_only) == 1
    train.main(f"{flags} --run_name parts --n_epochs 1 --checkpoint_every 1".split())
    train.main(f"{flags} --run_name parts --n_epochs 2 --resume".split())
    printed = capsys.readouterr()
    assert "a step compiled as one function" in printed.out
    assert compiled_step.NO_EFFECT not in printed.err
    whole, parts = (torch.load(Path(f"{name}.pt")) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
