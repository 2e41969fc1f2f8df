import numpy as np
import pytest
import torch
from test_integer_network import quantize
from torch import nn

import models
from engine import onnx_export, onnx_session
from engine.batch_norm import fold_batch_norm
from engine.errors import NetworkError
from engine.integer_layers import Grid
from engine.integer_network import RELU, RELU6, UNBOUNDED, Sum, shared_ranges
from engine.network_graph import trace

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)

BLOCKS = {
    "padded": lambda: [
        models.BasicBlock(6, 6, 1, nn.Identity()),
        models.BasicBlock(6, 9, 2, models.PadShortcut(3)),
    ],
    "projected": lambda: [
        models.BasicBlock(6, 10, 2, models.projection(6, 10, 2)),
        models.BasicBlock(10, 10, 1, nn.Identity()),
    ],
    "inverted": lambda: [
        models.InvertedResidual(6, 6, 1, 1),
        models.InvertedResidual(6, 8, 2, 3),
        models.InvertedResidual(8, 8, 1, 2),
    ],
}


def randomize(net, seed):
    """Give the network random weights, a few of them large, and random statistics; fold it."""
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.bias):
                nn.init.normal_(t)
            for t in (m.running_var, m.weight):
                nn.init.uniform_(t, 0.5, 2)
        elif isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(m.weight, nonlinearity="relu")
    return fold_batch_norm(net.eval())


def residual_net(kind, seed):
    """Return a small folded network with blocks of that kind."""
    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5)]
    net = nn.Sequential(*stem, *BLOCKS[kind](), *head)
    net.eval()(torch.zeros(1, 3, 10, 10))
    return randomize(net, seed)


def pixels(n, size, seed=0):
    """Return images (n, 3, size, size) in uint8, half of their pixels black or white."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 384, (n, 3, size, size), generator=generator)
    return x.clamp(0, 255).to(torch.uint8)


def normalized(pixels):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    scale, shift = (1 / (255 * std)).float(), (-mean / std).float()
    return pixels.float() * scale + shift


def assert_engine_agrees(net, images, *options, **named):
    """Quantize the network and compare all logits of ONNX Runtime with the simulation's."""
    x = normalized(images)
    integers, _ = quantize(net, x[:16], *options, **named)
    model = onnx_export.to_onnx(integers, images.shape[1:], MEAN, STD, {})
    logits = onnx_session.open_session(model, "m", exact_products=True)(images)
    expected = integers(x)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert expected.unique().numel() > 20
    return integers, model


@pytest.mark.parametrize("n_bits", [8, 4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_logit_of_a_residual_network_is_that_of_the_simulation(kind, seed, n_bits):
    net, per_channel = residual_net(kind, seed), seed > 0
    integers, model = assert_engine_agrees(
        net, pixels(32, 10, seed), n_bits, n_bits, per_channel=per_channel
    )
    operators = list(onnx_session.optimized_nodes(model, "m").values())
    assert operators.count("QLinearAdd") == sum(isinstance(s, Sum) for s in integers.steps)
    assert not onnx_session.FLOAT_KERNELS & set(operators)
    assert onnx_session.inexact_steps(integers, exact_products=True) == []
