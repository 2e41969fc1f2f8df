import numpy as np
import pytest
import reference
import torch
from test_integer_network import folded, quantize
from torch import nn

import data
import models
from engine.deploy import deployed_files, onnx_session
from engine.deploy.comparison import first_disagreement
from engine.deploy.integer_network import IntegerNetwork, shared_ranges
from engine.deploy.integer_operations import Sum
from engine.deploy.onnx_emitter import RELU, UNBOUNDED
from engine.quantization.grids import Grid
from engine.system.errors import NetworkError

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
RELU6 = (0.0, 6.0)

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
    """Give the network random weights, a few of them large, and random statistics."""
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.bias):
                nn.init.normal_(t)
            for t in (m.running_var, m.weight):
                nn.init.uniform_(t, 0.5, 2)
        elif isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(m.weight, nonlinearity="relu")
    return net.eval()


def residual_net(kind, seed):
    """Return a small network with blocks of that kind."""
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
    integers, graph, _ = quantize(net, x[:16], *options, **named)
    model = deployed_files.to_onnx(integers, images.shape[1:], MEAN, STD, {})
    logits = onnx_session.open_session(model, "m")(images)
    expected = integers(x)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert expected.unique().numel() > 20
    assert first_disagreement(integers, graph, x[:4]) is None
    return integers, model


@pytest.mark.parametrize(  # odd seeds have a step size for each channel
    ("n_bits", "seed"),
    [(8, 0), (4, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 1), (4, 2)))],
)
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_logit_of_a_residual_network_is_that_of_the_simulation(kind, seed, n_bits):
    net, per_channel = residual_net(kind, seed), seed % 2 == 1
    integers, model = assert_engine_agrees(
        net, pixels(32, 10, seed), n_bits, n_bits, per_channel=per_channel
    )
    operators = list(onnx_session.optimized_nodes(model, "m").values())
    assert operators.count("QLinearAdd") == sum(
        isinstance(each, Sum) for each in integers.operations
    )
    assert not onnx_session.FLOAT_KERNELS & set(operators)
    assert onnx_session.inexact_operations(integers, model) == []


@pytest.mark.parametrize("kind", BLOCKS)
def test_another_evaluator_gives_the_same_logits(kind):
    """ONNX's own, node by node; there, operands of sums are rounded twice and logits to steps."""
    images = pixels(4, 10)
    integers, _, _ = quantize(residual_net(kind, 2), normalized(images), 4, 4)
    model = onnx.load_from_string(deployed_files.to_onnx(integers, images.shape[1:], MEAN, STD, {}))
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)
    [logits] = evaluator.run(None, {model.graph.input[0].name: images.numpy()})
    expected = integers(normalized(images))[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=0)


def random_sum(seed, n_bits):
    """Return a sum of random grids: some signed, some whose halves are exact."""
    generator = np.random.default_rng(seed)
    scales = generator.uniform(0.01, 0.05, 3).astype(np.float32)
    if seed % 3 == 0:
        scales[1:] = scales[0], 2 * scales[0]
    zero_points = generator.integers(0, 2**n_bits, 3)
    if seed % 2 == 0:
        zero_points = generator.choice([0, 2 ** (n_bits - 1)], 3)
    a, b, c = (
        Grid(float(scale), int(zero), n_bits)
        for scale, zero in zip(scales, zero_points, strict=True)
    )
    bounds = (UNBOUNDED, RELU, RELU6)[generator.integers(3)]
    return Sum("c", ("a", "b"), (a, b), c, bounds)


@pytest.mark.parametrize("n_bits", [8, 4, 3])
def test_a_sum_of_all_pairs_of_codes_is_that_of_the_engine(n_bits):
    codes = torch.arange(2**n_bits)
    pairs = torch.cartesian_prod(codes, codes).T.to(torch.uint8)
    a, b = pairs.reshape(2, 1, 1, -1, 2**n_bits).contiguous()
    for seed in range(6):
        each = random_sum(seed, n_bits)
        run = onnx_session.open_session(onnx_session.operation_to_onnx(each, (a, b)), "m")
        torch.testing.assert_close(
            run(a, b).float(), each.run(a.float(), b.float()), rtol=0, atol=0
        )


def test_a_sum_of_codes_is_that_of_their_values():
    for seed in range(6):
        each = random_sum(seed, 8)
        a, b = (codes.double() for codes in each.trial_codes(torch.Generator().manual_seed(seed)))
        real = sum(
            (x - grid.zero_point) * grid.scale
            for x, grid in zip((a, b), each.in_grids, strict=True)
        )
        codes = real.clamp(*each.bounds) / each.out_grid.scale + each.out_grid.zero_point
        expected = codes.clamp(*each.out_grid.code_range(each.bounds))
        assert (each.run(a.float(), b.float()) - expected).abs().max() < 0.501


def test_inputs_that_are_one_tensor_share_the_wider_range():
    net = residual_net("padded", 0)
    graph = folded(net, (3, 10, 10))
    ranges = {"4.conv1": (0.0, 2.0), "4.add[1]": (0.0, 1.0), "4.add[0]": (-1.0, 1.0)}
    shared = shared_ranges(graph, ranges)
    assert shared == {"4.conv1": (0.0, 2.0), "4.add[1]": (0.0, 2.0), "4.add[0]": (-1.0, 1.0)}


def test_a_sum_that_stays_in_float_is_refused_by_the_flag_that_it_needs():
    net, x = residual_net("projected", 0), torch.randn(2, 3, 10, 10)
    with pytest.raises(NetworkError, match=r"3.add: the sum .* --quantize_sums") as caught:
        quantize(net, x, 4, 4, sums=False)
    assert "\n" not in str(caught.value)


class Doubled(nn.Module):
    def forward(self, x):
        return x + x


def test_a_sum_of_a_tensor_and_itself_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Doubled(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(2, 3, 10, 10)
    net.eval()(x)
    with pytest.raises(NetworkError, match=r"--export: 2.add: a sum of a tensor and itself"):
        quantize(net, x, 4, 4)


def test_logits_that_an_operation_reads_are_refused_by_its_name():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 7), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )  # of one pixel
    with pytest.raises(NetworkError, match=r"--export: 2: the logits are the input of 1, "):
        quantize(net, torch.randn(2, 3, 7, 7), 4, 4)


def test_a_relu6_ends_at_the_code_of_6():
    grid = Grid(0.05, 0, 8)
    assert grid.code_range(RELU6) == (0, 120) and grid.code_range(RELU) == (0, 255)
    assert Grid(0.02, 128, 8).code_range(RELU6) == (128, 255)
    assert Grid(1.0, 8, 4).code_range(UNBOUNDED) == (0, 15)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_float_network_with_sums_is_the_same_in_onnx(kind):
    net, images = residual_net(kind, 0), pixels(4, 10)
    x = normalized(images)
    model = deployed_files.to_onnx(
        IntegerNetwork.from_graph(folded(net, (3, 10, 10))), (3, 10, 10), MEAN, STD, {}
    )
    with torch.no_grad():
        torch.testing.assert_close(
            onnx_session.open_session(model, "m")(images), net(x), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("make", [reference.Stranger, lambda: models.VGGSmall(width=0.05)])
def test_functions_and_pooling_that_keeps_the_size_are_exported(make):
    net = make()
    net.act = nn.ReLU()
    assert_engine_agrees(randomize(net, 0), pixels(16, 32), 6, 6)


@pytest.mark.filterwarnings("ignore:Using padding")
def test_padding_by_a_word_is_exported():
    same = nn.Conv2d(3, 6, (3, 4), padding="same", dilation=(2, 1))
    valid = nn.Conv2d(6, 6, 2, padding="valid")
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    net = nn.Sequential(same, nn.BatchNorm2d(6), nn.ReLU(), valid, nn.ReLU(), *pool)
    assert_engine_agrees(randomize(net, 0), pixels(16, 10), 6, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet20", "ResNet18", "MobileNetV2", "VGGSmall"])
@pytest.mark.parametrize(("n_bits", "per_channel"), [(8, False), (4, False), (4, True)])
def test_the_networks_agree_with_the_engine(name, n_bits, per_channel):
    torch.manual_seed(0)
    net = models.make_model(name, 10, 1 if name == "ResNet20" else 0.25)
    images = data.synthetic().test_images[:100].contiguous()
    assert_engine_agrees(randomize(net, 0), images, n_bits, n_bits, per_channel=per_channel)
