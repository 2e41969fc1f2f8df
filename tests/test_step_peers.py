"""The steps that ours is timed against take the same gradient."""

import copy

import pytest
import torch
from peers import functional_step
from torch import nn

import models
from engine.networks.fast_layers import use_fast_layers
from engine.step.gradients import compute_gradients
from regularizers import make_regularizer

NETWORKS = [("ConvNet", 1.0), ("ResNet20", 0.25), ("MobileNetV2", 0.25)]
pytestmark = pytest.mark.slow


def problem(model, width, regularizer):
    """Return a network and a batch in float64, and the gradient of our step by name."""
    torch.manual_seed(0)
    net, reg = models.make_model(model, 10, width).double(), make_regularizer(regularizer, 0.1)
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    ours = use_fast_layers(copy.deepcopy(net))
    compute_gradients(ours, nn.CrossEntropyLoss(), reg, x, labels)
    return (net, reg, x, labels), {name: p.grad for name, p in ours.named_parameters()}


def assert_same(found, expected):
    largest = max(g.abs().max().item() for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-9 * largest)


@pytest.mark.parametrize("regularizer", ["none", "L1Grad", "L2Grad"])
@pytest.mark.parametrize(("model", "width"), NETWORKS)
def test_the_function_of_torch_func_takes_our_gradient(model, width, regularizer):
    inputs, expected = problem(model, width, regularizer)
    gradient, params, offsets = functional_step.gradient_function(*inputs)
    found = gradient(params, offsets)
    assert_same({name.replace(".activation.", "."): g for name, g in found.items()}, expected)


@pytest.mark.parametrize("regularizer", ["none", "L1Grad", "L2Grad"])
@pytest.mark.parametrize(("model", "width"), NETWORKS)
def test_jax_takes_our_gradient(model, width, regularizer):
    jax = pytest.importorskip("jax")
    from peers import jax_step

    jax.config.update("jax_enable_x64", True)
    inputs, expected = problem(model, width, regularizer)
    gradient, params = jax_step.gradient_function(*inputs)
    found = {name: jax_step.to_torch(g) for name, g in gradient(params).items()}
    assert_same(found, expected)
