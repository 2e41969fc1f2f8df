"""Every network against plain PyTorch double backprop; what is put in, what is refused."""

import copy
import re
from collections import Counter

import pytest
import reference
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import data
import models
import quant_inference
import quant_utils as qu
import train
import utils
from analysis.measured_network import Conditions, Images, MeasuredNetwork
from engine.networks import (
    batch_norm,
    compiling,
    convolution,
    fast_batch_norm,
    fast_layers,
    layers,
    outputs,
)
from engine.networks.export import export_network
from engine.networks.folding import batch_norms, fold_batch_norms
from engine.networks.graph import layers as graph_layers
from engine.quantization.activations import (
    activation_grids,
    calibrate,
    quantize_activations,
    quantized_inputs,
)
from engine.quantization.weights import quantize_model
from engine.step.gradients import compute_gradients
from engine.system.errors import NetworkError
from engine.training.averaging import averaged_network, make_average
from regularizers import KurtosisNorm, StepNoise, make_regularizer

CE = nn.CrossEntropyLoss()
# Published numbers of parameters with 10 classes; of torchvision's with 1,000.
PARAMETERS = {
    "ConvNet": 1_212_778,
    "ResNet20": 269_722,
    "ResNet18": 11_173_962,
    "VGGSmall": 4_660_106,
    "MobileNetV2": 2_236_682,
    "torchvision:squeezenet1_1": 1_235_496,
    "torchvision:shufflenet_v2_x0_5": 1_366_792,
}
# Small ones of every network, and of torchvision the kinds of layers that it has.
SMALL = {
    "ResNet20": 0.25,
    "ResNet18": 0.0625,
    "VGGSmall": 0.03,
    "MobileNetV2": 0.25,
    "Stranger": 1,
    "torchvision:shufflenet_v2_x0_5": 1,
}
LARGE = {"MobileNetV2", "torchvision:shufflenet_v2_x0_5"}  # torch.export takes seconds


def make(name, num_classes=10):
    """Return a network of plain modules in float64 whose batch norms do something."""
    torch.manual_seed(0)
    if name == "Stranger":
        net = reference.Stranger(num_classes)
        net.dropout.p = 0.0  # each pass would draw its own mask
    else:
        net = models.make_model(name, num_classes, SMALL[name])
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            m.running_var.uniform_(0.5, 1.5)
    return net.double()


def batch(size=16, n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (n,), generator=generator)


def plain_step(net, x, y):
    """Leave the gradients of L + L2Grad of plain PyTorch in .grad; return L and R."""
    wrapped = reference.WithActivations(net)
    return reference.backward_twice(
        wrapped, CE, lambda w, gw, ga: reference.lp_grad(gw, ga, 0.1, 2), x, y
    )


# --- exactness -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.sampled(4)
def test_the_step_is_that_of_plain_double_backprop(name, training):
    plain = make(name).train(training)
    fast = fast_layers.use_fast_layers(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    assert any(isinstance(m, fast_batch_norm.BatchNorm2d) for m in fast.modules())
    x, y = batch(32 if "torchvision" in name else 16)
    loss, penalty, _ = compute_gradients(fast, CE, make_regularizer("L2Grad", 0.1), x, y)
    expected = plain_step(plain, x, y)
    torch.testing.assert_close((loss, penalty), expected, rtol=1e-9, atol=0)
    scale = max(float(q.grad.abs().max()) for q in plain.parameters())
    for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ResNet20", "MobileNetV2", "Stranger"])
def test_keys_and_random_stream_are_those_of_the_plain_network(name):
    plain = make(name)
    after = torch.get_rng_state()
    state = copy.deepcopy(plain.state_dict())
    fast = fast_layers.use_fast_layers(plain)
    assert torch.equal(torch.get_rng_state(), after) and list(fast.state_dict()) == list(state)
    assert all(torch.equal(t, state[key]) for key, t in fast.state_dict().items())


def test_which_layers_are_put_in():
    resnet = Counter(type(m) for m in utils.make_net("ResNet20", 10, "cpu").modules())
    assert resnet[fast_layers.BatchNormBeforeRectifier] == resnet[fast_layers.ReLU] == 10
    assert (
        resnet[fast_batch_norm.BatchNorm2d] == resnet[nn.ReLU] == 9
        and resnet[convolution.Conv2d] == 19
    )
    mobile = Counter(type(m) for m in utils.make_net("MobileNetV2", 10, "cpu").modules())
    assert mobile[fast_layers.BatchNormBeforeRectifier] == mobile[fast_layers.ReLU6] == 35
    assert not resnet[nn.Conv2d] + mobile[nn.Conv2d] + mobile[nn.BatchNorm2d]


class Branch(nn.Module):
    """A batch norm that a ReLU and the sum read; one ReLU for everything."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.last, self.linear = nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y = self.relu(self.last(self.relu(y) + y))
        return self.linear(self.relu(y).mean((2, 3)))


def test_a_batch_norm_that_others_read_is_not_fused():
    plain = Branch().double()
    fast = fast_layers.use_fast_layers(copy.deepcopy(plain))
    assert type(fast.norm) is fast_batch_norm.BatchNorm2d
    assert type(fast.last) is fast_layers.BatchNormBeforeRectifier
    x, y = batch()
    ours = compute_gradients(fast, CE, make_regularizer("L2Grad", 0.1), x, y)[:2]
    torch.testing.assert_close(ours, plain_step(plain, x, y), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rectifier", [None, "relu", "relu6"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.sampled(2)
def test_derivatives_of_batch_norm(training, rectifier):
    torch.manual_seed(0)
    gamma = (torch.rand(2, dtype=torch.float64) + 2).requires_grad_()
    beta = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def norm(x, gamma, beta):
        statistics = mean.clone(), var.clone()
        return fast_batch_norm.batch_norm(
            x, gamma, beta, *statistics, training=training, rectifier=rectifier
        )

    z = F.batch_norm(x, mean.clone(), var.clone(), gamma, beta, training)
    expected = {None: z, "relu": z.relu(), "relu6": F.relu6(z)}[rectifier]
    assert rectifier != "relu6" or (z > 6).any()
    torch.testing.assert_close(norm(x, gamma, beta), expected)
    args = (x, gamma, beta)
    assert torch.autograd.gradcheck(norm, args) and torch.autograd.gradgradcheck(norm, args)


@pytest.mark.slow
def test_compiled_batch_norms_are_the_eager_ones():
    if not compiling.set_compile(True):
        pytest.skip("no C++ compiler")
    x, results = torch.randn(4, 3, 4, 4).to(memory_format=torch.channels_last), []
    for compiled in (True, False):
        compiling.set_compile(compiled)
        for rectifier in (None, "relu6"):
            norm = fast_batch_norm.BatchNorm2d(3)
            t = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(norm(3 * t, rectifier).sin().sum(), t, create_graph=True)
            results.append((g.detach(), *torch.autograd.grad(g.square().sum(), t)))
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- a network's logits and activations ------------------------------------------------------


def test_a_module_that_runs_twice_counts_twice():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    logits, activations = outputs.run_network(net, x, with_activations=True)
    assert [a.shape[2] for a in activations] == [6, 4] and logits.shape == (2, 64)
    assert outputs.run_network(net, x)[1] == [] and not relu._forward_hooks


def test_activations_that_a_network_returns_are_taken():
    net = models.ConvNet()
    _, activations = outputs.run_network(net, torch.zeros(1, 3, 8, 8), with_activations=True)
    assert len(activations) == 9  # not 18: its batch norms with ReLU are seen as well


class Junk(nn.Linear):
    """Returns names beside its logits."""

    def forward(self, x):
        return super().forward(x.mean((2, 3))), ["a", None]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 10)), "cannot take images of 3 × 8 × 8: mat1"),
        (nn.Conv2d(3, 10, 1), r"logits \(2, 10, 8, 8\) of 2 images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), r"logits \(2, 5\) of 2 images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 15)), r"\(2, 15\) of 2 images, not \(2, 10\)"),
        (nn.LSTM(8, 3), "cannot take images"),
        (Junk(3, 10), "returned a str among its activations: .* a list of tensors"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_in_one_line(net, message):
    with pytest.raises(NetworkError, match=message) as refused:
        outputs.check_network(net, (3, 8, 8), 10)
    assert "\n" not in str(refused.value)


def test_a_view_that_needs_another_memory_layout_names_the_flag():
    assert outputs.check_network(reference.Viewed(10), (3, 8, 8), 10) == 0
    net = reference.Viewed(10).to(memory_format=torch.channels_last)
    with pytest.raises(NetworkError, match="view size .* Or --memory_format contiguous"):
        outputs.check_network(net, (3, 8, 8), 10)


class Scaled(nn.Module):
    """Its first parameter is of another type than the images that it takes."""

    def __init__(self, dtype):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.linear = nn.Linear(3, 10)

    def forward(self, x):
        return self.linear(x.mean((2, 3))) * self.scale.float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_are_of_float32_whatever_the_first_parameter_is_of(dtype):
    net = Scaled(dtype)
    assert outputs.check_network(net, (3, 8, 8), 10) == 0
    assert [*layers.penalized_layers(net)] == [*graph_layers(export_network(net, (3, 8, 8)))]
    assert outputs.blank_images(net.double(), 1, (3, 8, 8)).dtype == torch.float64


class ReturnsNothing(nn.Sequential):
    """Its `train` is as many people write it."""

    def train(self, mode=True):
        super().train(mode)


def test_train_need_not_return_the_network():
    net = ReturnsNothing(nn.Conv2d(3, 10, 8), nn.BatchNorm2d(10), nn.Flatten())
    assert len(batch_norms(export_network(net, (3, 8, 8)))) == 1
    average = make_average(net, 0.5)
    assert averaged_network(average, [torch.randn(2, 3, 8, 8)]) is average.module


def test_images_of_other_shapes():
    for name in ("ResNet20", "ResNet18", "VGGSmall", "MobileNetV2"):
        net = models.make_model(name, 7, SMALL[name]).train()
        assert outputs.check_network(net, (3, 40, 24), 7) > 0 and net.training


@pytest.mark.parametrize("name", PARAMETERS)
def test_numbers_of_parameters_are_those_published(name):
    net = models.make_model(name, 1000 if "torchvision" in name else 10)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


def test_names_of_networks():
    assert utils.network_name("resnet20") == "ResNet20"
    assert utils.network_name("TorchVision:ResNet18") == "torchvision:resnet18"
    for bad, known in (("resnet", "VGGSmall"), ("torchvision:resnet19", "resnet18, resnet34")):
        with pytest.raises(ValueError, match=known):
            models.find_model(bad)


# --- what may be in a network ----------------------------------------------------------------


def test_a_strided_pointwise_convolution_reads_every_second_pixel():
    """Where PyTorch itself ends with a segmentation fault, and where it gives the same numbers."""
    torch.manual_seed(0)
    conv = convolution.Conv2d(4, 6, 1, stride=2, groups=2).double()
    plain = nn.Conv2d(4, 6, 1, stride=2, groups=2).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(conv(x), plain(x))
    assert torch.autograd.gradgradcheck(conv, (x,))
    x = torch.randn(1, 8, 64, 64).to(memory_format=torch.channels_last)
    conv = convolution.Conv2d(8, 16, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
    conv(x).sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_noise_meets_the_same_dropout():
    """With zero steps, L(W + Δ) − L(W) is zero only if both passes drop the same units."""
    torch.manual_seed(0)
    net = fast_layers.use_fast_layers(reference.Stranger().double())
    x, y = batch()
    _, penalty, _ = compute_gradients(net, CE, StepNoise(1.0, 16), x, y)
    assert 0 < abs(penalty) < 1e-2


def test_a_folded_weight_of_zero_has_no_kurtosis_and_no_gradient():
    zero, w = torch.zeros(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    KurtosisNorm(1.0)([zero, w]).backward()
    assert zero.grad.eq(0).all() and w.grad.isfinite().all()


def test_layers_that_share_a_weight_count_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert len(layers.penalized_weights(net)) == len(layers.penalized_layers(net)) == 1


@pytest.mark.parametrize(
    "name",
    [*sorted(SMALL.keys() - LARGE), *(pytest.param(n, marks=pytest.mark.slow) for n in LARGE)],
)
@pytest.mark.sampled(2)
def test_folding(name):
    net = fast_layers.use_fast_layers(make(name)).eval()
    size = 32 if "torchvision" in name else 16
    assert batch_norm.describe_unfolded(net, (3, size, size), "RangeNorm") is None
    graph = export_network(net, (3, size, size))
    folded = fold_batch_norms(graph)
    assert batch_norms(graph) and not batch_norms(folded)
    x, _ = batch(size)
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.parametrize(("bias", "groups"), [(False, 1), (True, 2), (True, 4)])
def test_a_transposed_convolution_is_folded_group_by_group(bias, groups):
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 8, 3, 2, groups=groups, bias=bias)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), up, nn.BatchNorm2d(8)).train()
    net.append(nn.Flatten(2))
    x = torch.randn(4, 3, 6, 6)
    net(x)  # statistics
    nn.init.uniform_(net[2].weight, 0.5, 2)
    folded = fold_batch_norms(export_network(net.eval(), (3, 6, 6)))
    assert not batch_norms(folded)
    torch.testing.assert_close(folded(x), net(x))


def test_batch_norms_that_stay():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).float()
    net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    unfolded = batch_norm.describe_unfolded(net, (3, 4, 4), "RangeNorm")
    assert unfolded.startswith("1 batch norms do not follow")


# --- scripts ---------------------------------------------------------------------------------

TINY = "--dataset Synthetic --train_subset 8 --holdout 8 --batch_size 8 --n_epochs 1 --device cpu"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model resnet19", "choose ConvNet, ResNet20"),
        ("--model torchvision:resnet19", "resnet18"),
        ("--model torchvision:vit_b_32", "VisionTransformer cannot take images of 3 × 32 × 32"),
        ("--width 0 --model VGGSmall", "'0'"),
    ],
)
def test_networks_that_cannot_train(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.main(["--run_name", "r", *flags.split(), *TINY.split()])
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_a_network_without_activation_modules_is_told(capsys, tmp_path, monkeypatch):
    class NoModules(reference.Stranger):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            del self.act
            self.act = F.silu

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "NoModules", NoModules)
    flags = "--run_name r --model nomodules --no-compile --precision fp32 --regularizer L2Grad"
    train.main([*flags.split(), "--memory_format", "contiguous", *TINY.split()])
    printed = capsys.readouterr().out
    assert printed.count("NoModules has no activation modules") == 1
    assert (tmp_path / "r.pt").exists()


def test_batch_norms_that_stay_are_counted_before_training(capsys, tmp_path, monkeypatch):
    class Staying(nn.Sequential):
        def __init__(self, num_classes):
            layers = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Staying", Staying)
    flags = "--run_name r --model staying --no-compile --precision fp32 --regularizer RangeNorm"
    train.main([*flags.split(), "--fold_bn", *TINY.split()])
    printed = capsys.readouterr().out
    assert "Staying: 1 batch norms do not follow a layer alone" in printed


def test_freezing_batch_norms_that_are_not_there_is_told(capsys, monkeypatch, tiny_images):
    for norms, is_told in (([], True), ([nn.BatchNorm2d(3)], False)):
        layers = *norms, nn.Flatten(), nn.Linear(192, 4)
        monkeypatch.setitem(models.MODELS, "Mine", lambda n, layers=layers: nn.Sequential(*layers))
        args = train.make_parser().parse_args("--model mine --freeze_bn_from 1".split())
        train.make_state(args, data.DATASETS["Tiny"]("", 0), [])
        line = "Mine: --freeze_bn_from has no effect: there are no batch norms"
        assert (line in capsys.readouterr().out) == is_told


# --- quantizing ------------------------------------------------------------------------------


def test_inputs_of_functions_and_of_sums_are_quantized():
    net = reference.Stranger().eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names = ["conv1", "conv2", "conv3", "down", "pool", "fc"]
    graph = export_network(net, (3, 8, 8))
    assert list(calibrate(graph, [x])) == names
    ranges = calibrate(graph, [x], "minmax", sums=True)
    sums = ["add[0]", "add[1]", "add_2[0]", "add_2[1]"]
    assert sorted(ranges) == sorted(names + sums)
    with torch.no_grad():
        a = F.relu(net.bn1(net.conv1(x)))
        assert ranges["add[0]"] == pytest.approx((a.min().item(), a.max().item()))
        exact = net(x)
        for bits, tolerance in ((16, 1e-3), (3, 1.0)):
            net_q = quantize_activations(graph, activation_grids(ranges, bits))
            change = (net_q(x) - exact).abs().max()
            assert 0 < change < tolerance
        grids = activation_grids({name: ranges[name] for name in sums}, 4)
        only_sums = quantize_activations(graph, grids)
        a = grids["add[0]"].round(a)
        b = net.bn2(net.conv2(F.relu(net.bn1(net.conv1(x)))))
        y = net.act(a + grids["add[1]"].round(b))
        c = grids["add_2[0]"].round(net.bn3(net.conv3(y)))
        d = grids["add_2[1]"].round(net.bn_down(net.down(y)))
        torch.testing.assert_close(only_sums(x), net.fc((c + d).relu().mean((2, 3))))


class Products(nn.Module):
    """A product of two activations, concatenated with one of them and the images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.linear = nn.Linear(9, 4)

    def forward(self, x):
        a, b = self.conv1(x), self.conv2(x)
        return self.linear(torch.cat([a @ b, a, x], dim=1).mean((2, 3)))


def test_all_inputs_of_a_product_and_of_a_concatenation_are_quantized():
    torch.manual_seed(0)
    net, x = Products().eval(), torch.randn(4, 3, 8, 8)
    graph = export_network(net, (3, 8, 8))
    ranges = calibrate(graph, [x], "minmax", sums=True)
    names = ["matmul[0]", "matmul[1]", "cat[0]", "cat[1]", "cat[2]"]
    assert {*ranges} == {"conv1", "conv2", *names, "pool", "linear"}
    grids = activation_grids({name: ranges[name] for name in names}, 4)
    with torch.no_grad():
        a, b = net.conv1(x), net.conv2(x)
        product = grids["matmul[0]"].round(a) @ grids["matmul[1]"].round(b)
        parts = [grids[f"cat[{i}]"].round(part) for i, part in enumerate((product, a, x))]
        expected = net.linear(torch.cat(parts, dim=1).mean((2, 3)))
        torch.testing.assert_close(quantize_activations(graph, grids)(x), expected)


class Residual(nn.Module):
    """A sum and a mean as a module of one's own, without children."""

    def forward(self, x, y):
        return torch.mean(input=x + y, dim=(2, 3))


class WithResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.sum = Residual()

    def forward(self, x):
        return self.sum(x, self.norm(self.conv(x)))


def test_functions_of_modules_without_children_are_quantized_too():
    net = fast_layers.use_fast_layers(WithResidual()).eval()
    inputs = quantized_inputs(export_network(net, (3, 8, 8)), sums=True)
    assert [*inputs] == ["conv", "sum.add[0]", "sum.add[1]", "sum.pool"]


def test_sums_and_pooling_of_our_networks_are_modules():
    for name, n_sums in (("ResNet20", 9), ("ResNet18", 8), ("MobileNetV2", 10), ("VGGSmall", 0)):
        net = make(name).eval()
        graph = export_network(net, (3, 16, 16))  # traced for test_folding, too
        inputs = quantized_inputs(graph, sums=True)
        modules = dict(net.named_modules())
        assert sum(each.is_sum for each in inputs.values()) == 2 * n_sums
        assert all(key.partition("[")[0] in modules for key in inputs)
        assert ends(graph) == (next(iter(inputs)), next(reversed(inputs)))


def ends(graph):
    """The names of the first and the last layer, as --keep_first_last has them."""
    return MeasuredNetwork("", graph, None, Conditions("cpu"), Images(test=None)).ends


def test_first_and_last_layer_keep_8_bits():
    net = reference.Stranger().eval()
    first_last = dict.fromkeys(ends(export_network(net, (3, 8, 8))), 8)
    assert list(first_last) == ["conv1", "fc"]
    net_q, _ = quantize_model(net, qu.uniform, 3, image_shape=(3, 8, 8), layer_bits=first_last)
    for name, layer in layers.penalized_layers(net).items():
        expected = qu.uniform(layer.weight, first_last.get(name, 3))
        assert torch.equal(net_q.get_submodule(name).weight, expected)


@pytest.mark.parametrize("name", ["Stranger", "torchvision:squeezenet1_1"])
def test_train_then_quantize_any_network(name, tmp_path, monkeypatch, capsys):
    """Of torchvision the network's own file is quantized, untrained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Stranger", reference.Stranger)
    common = [
        "--model",
        name,
        *TINY.replace("--n_epochs 1", "")
        .replace("--train_subset 8", "")
        .replace("--batch_size 8", "")
        .split(),
    ]
    if name == "Stranger":
        flags = "--regularizer L2Grad --no-compile --precision fp32 --run_name net".split()
        train.main(["--model", name, *flags, *TINY.split()])
    else:
        torch.save(models.find_model(name)[1](10).state_dict(), "net.pt")
    quantize = "net.pt --bits 4 6 --schemes uniform --act_bits same --quantize_sums".split()
    if name == "Stranger":
        quantize += ["--fold_bn"]
    options = "--keep_first_last --show_plan --calibration_images 8 --no_plots".split()
    with pytest.raises(SystemExit) as ended:
        quant_inference.main([*quantize, *options, *common])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    plan = [line.split() for line in printed.splitlines()]
    last = "fc" if name == "Stranger" else "classifier.1"
    assert [words[3] for words in plan if words[:2] == [last, "weight"]] == ["8"]
    if name == "Stranger":
        assert [words[3] for words in plan if words[:2] == ["conv2", "weight"]] == ["4/6"]
        assert [words[3] for words in plan if words[:2] == ["conv2", "bias"]] == ["float"]
        assert [words[3:5] for words in plan if words[:2] == ["conv2", "input"]] == [["4/6", "0"]]
        assert sum(words[:1] == ["add_2[1]"] for words in plan) == 1


# --- what strangers' networks do -------------------------------------------------------------


class Squeezed(nn.Module):
    """`squeeze()` of everything: one image has no batch left."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.layers(x).squeeze()


class Checkpointed(nn.Module):
    """Activations are computed twice, in the way that `torch.autograd.grad` cannot do."""

    def __init__(self, num_classes=10, use_reentrant=True):
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
        self.last, self.use_reentrant = nn.Linear(8, num_classes), use_reentrant

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(
            self.pool, self.first(x), use_reentrant=self.use_reentrant
        )
        return self.last(x.flatten(1))


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class OnlyOnce(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.last(OnceDifferentiable.apply(self.first(x)).mean((2, 3)))


class Fails(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.layer = nn.Linear(3, num_classes)

    def forward(self, x):
        if len(x) == 1:
            raise KeyError("one\nimage")
        return self.layer(x.mean((2, 3)))


class Attention(nn.Module):
    """One block of attention over 4 × 4 patches."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


TRAIN_STRANGER = "--model Stranger --dataset Synthetic --n_epochs 1 --batch_size 64 --no-compile"


def train_stranger(net, flags, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "Stranger", net)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train.main([*TRAIN_STRANGER.split(), *flags.split()])


@pytest.mark.parametrize(
    ("net", "flags", "message", "is_early"),
    [
        (Squeezed, "--train_subset 65", r"Squeezed returned logits \(10,\) of 1 images", True),
        (Fails, "--train_subset 65", "Fails cannot take images of .*: KeyError: 'one", True),
        (Checkpointed, "--train_subset 64", "Checkpointed: .* use_reentrant=False", False),
        (Checkpointed, "--regularizer L2Grad", "Checkpointed: .* use_reentrant=False", True),
        (
            OnlyOnce,
            "--regularizer L2Grad --first_regularized_epoch 1 --n_epochs 2",
            "OnlyOnce cannot be differentiated twice, which --penalty_gradient difference does",
            True,
        ),
    ],
)
def test_what_a_network_raises_is_one_line(
    net, flags, message, is_early, monkeypatch, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        train_stranger(net, flags, monkeypatch, tmp_path)
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if "error: " in line]
    assert stop.value.code == 1 and re.search(f"error: {message}", line)
    assert (" convolutions and " not in out) == is_early  # of either precision


@pytest.mark.parametrize(
    ("net", "flags"),
    [
        (OnlyOnce, "--regularizer L2Grad --penalty_gradient difference"),
        (lambda num_classes: Checkpointed(num_classes, use_reentrant=False), ""),
    ],
)
def test_what_the_lines_say_works(net, flags, monkeypatch, tmp_path):
    train_stranger(net, f"--train_subset 64 --run_name r {flags}", monkeypatch, tmp_path)
    assert (tmp_path / "r.pt").exists()


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    net, x, y = Attention().double(), torch.randn(4, 3, 16, 16).double(), torch.arange(4)
    regularizer = make_regularizer("L2Grad", 0.1)
    compute_gradients(net, CE, regularizer, x, y, torch.float64)
    ours = [p.grad for p in net.parameters()]
    weights = layers.penalized_weights(net)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = CE(net(x), y)
    w_grads = torch.autograd.grad(loss, weights, create_graph=True)
    penalty = regularizer(w_grads, [])
    plain = torch.autograd.grad(loss + penalty, [*net.parameters()])
    torch.testing.assert_close(ours, [*plain], rtol=1e-9, atol=1e-12)


def test_lazy_modules_get_their_sizes_and_fast_layers(monkeypatch, tmp_path):
    def lazy(num_classes=10):
        norm = nn.LazyBatchNorm2d()
        return nn.Sequential(
            nn.LazyConv2d(4, 3), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes)
        )

    flags = "--train_subset 64 --run_name r --regularizer L2Grad"
    train_stranger(lazy, flags, monkeypatch, tmp_path)
    net = utils.make_net("Stranger", 10, "cpu", image_shape=(3, 32, 32))
    assert type(net[0]) is convolution.Conv2d and net[0].in_channels == 3
    net.load_state_dict(torch.load(tmp_path / "r.pt", weights_only=True))
