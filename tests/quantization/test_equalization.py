"""Cross-layer equalization: the same function, and equal ranges between two layers."""

import functools
import json
import math
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
import quant_inference as qi
from engine.deploy import deployed_files
from engine.networks.export import export_network
from engine.networks.fast_layers import use_fast_layers
from engine.networks.folding import fold_batch_norms
from engine.networks.graph import aten
from engine.networks.layers import penalized_layers
from engine.quantization import equalization
from engine.quantization.equalization import equalize, find_pairs
from engine.system.errors import FileError, NetworkError
from engine.system.io import save_weights

SHAPE = (3, 8, 8)


def randomize(net, seed=0):
    """Return the network with weights whose channels differ by far, and statistics."""
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var):
                t.data.copy_(torch.exp(torch.randn_like(t)))
            for t in (m.bias, m.running_mean):
                t.data.normal_()
        elif isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(m.weight, nonlinearity="relu")
            channels = torch.exp(torch.randn(len(m.weight)))
            m.weight.data *= channels.view(-1, *(1,) * (m.weight.dim() - 1))
    return net.eval()


def folded(net, dtype=torch.float64, shape=SHAPE):
    """Return the network's graph with batch norms folded."""
    return fold_batch_norms(export_network(net.to(dtype), shape))


def tiny_convnet():
    net = models.ConvNet(4)
    for i, (c_in, c_out, stride) in enumerate(((3, 6, 1), (6, 8, 2), (8, 5, 1))):
        net.get_submodule(f"layer{i}")[0] = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        net.get_submodule(f"layer{i}")[1] = nn.BatchNorm2d(c_out)
    net.BLOCKS = net.BLOCKS[:3]
    net.classifier = nn.Linear(5, 4)
    return net


def tiny_mobilenet():
    net = models.MobileNetV2(4, width=0.25)
    net.blocks = net.blocks[:5]
    net.head[0] = nn.Conv2d(8, 320, 1, bias=False)
    return net


class Functional(nn.Module):
    """Functions between layers: pooling of every kind, a mean, dropout, a ReLU in place."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.c, self.d = nn.Conv2d(8, 10, 3, padding=1), nn.Linear(10 * 4, 12)
        self.e, self.f = nn.Linear(12, 9, bias=False), nn.Linear(9, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x), inplace=True), 2)
        x = F.leaky_relu(F.avg_pool2d(self.b(x), 1), 0.1)
        x = F.dropout(torch.flatten(F.adaptive_avg_pool2d(self.c(x), 2), 1), training=False)
        return self.f(self.e(self.d(x).relu_()))


class Mean(nn.Module):
    """A mean of height and width before the last layer."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.a, self.f = nn.Conv2d(3, 6, 3), nn.Linear(6, num_classes)

    def forward(self, x):
        return self.f(self.a(x).relu().mean(dim=[2, 3]))


NETWORKS = {
    "ConvNet": tiny_convnet,
    "ResNet20": lambda: models.ResNet20(4, width=0.25),
    "MobileNetV2": tiny_mobilenet,
    "VGGSmall": lambda: models.VGGSmall(4, width=0.03),
    "Stranger": lambda: reference.Stranger(4),
    "Functional": Functional,
    "Mean": Mean,
}
N_PAIRS = {  # and outputs that are left alone
    "ConvNet": (3, 0),
    "ResNet20": (9, 10),
    "MobileNetV2": (12, 4),
    "VGGSmall": (6, 0),
    "Stranger": (0, 4),
    "Functional": (5, 0),
    "Mean": (1, 0),
}
CASES = [(name, fast) for name in NETWORKS for fast in (False, True)]


@functools.cache
def make(name, fast=False, seed=0, dtype=torch.float64):
    net = NETWORKS[name]()
    net = randomize(use_fast_layers(net) if fast else net, seed)
    return folded(net, dtype, shape_for(name))


def logits(graph, x):
    with torch.no_grad():
        return graph(x)


def tensors(graph):
    return {name: t.clone() for name, t in graph.named_buffers()}


def image(dtype, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, size, size, generator=generator, dtype=dtype)


def shape_for(name):
    return (3, 32, 32) if name == "VGGSmall" else SHAPE


def ranges(graph, pair):
    """r1 and r2 of a pair, channel by channel: half of a bias counts in the first layer."""
    w1, w2 = (graph.get_buffer(layer.weight) for layer in (pair.first, pair.second))
    groups, n = pair.second.groups, len(w1)
    b1 = torch.zeros(n) if pair.first.bias is None else graph.get_buffer(pair.first.bias)
    r1, r2 = [], []
    for i in range(n):
        r1.append(max(w1[i].abs().max().item(), b1[i].abs().item() / 2))
        if w2.dim() == 2:
            size = w2.shape[1] // n
            part = w2[:, i * size : (i + 1) * size]
        else:
            group, j = divmod(i, n // groups)
            size = len(w2) // groups
            part = w2[group * size : (group + 1) * size, j]
        r2.append(part.abs().max().item())
    return r1, r2


# --- the same function, equal ranges ---------------------------------------------------------


@pytest.mark.parametrize(("name", "fast"), CASES)
@pytest.mark.sampled(4)
def test_the_function_stays_and_ranges_are_equal(name, fast):
    graph = make(name, fast)
    before = tensors(graph)
    equalized, found = equalize(graph)
    assert all(torch.equal(before[key], value) for key, value in tensors(graph).items())
    x = image(torch.float64, shape_for(name)[1])
    y, y_e = logits(graph, x), logits(equalized, x)
    assert y.abs().max() > 1e-3 and (y - y_e).abs().max() <= 1e-10 * y.abs().max()
    assert (found.n_pairs, len(found.left_alone)) == N_PAIRS[name], found
    pairs, left_alone = find_pairs(graph)
    assert left_alone == found.left_alone and len(pairs) == found.n_pairs
    for pair in pairs:
        r1, r2 = ranges(equalized, pair)
        assert r1 == pytest.approx(r2, rel=4 * equalization.TOLERANCE)
        r1, r2 = ranges(graph, pair)
        assert max(map(abs, (math.log(a / b) for a, b in zip(r1, r2, strict=True)))) > 0.5


@pytest.mark.parametrize("name", ["ConvNet", "ResNet20", "MobileNetV2"])
@pytest.mark.sampled(3)
def test_in_float32_it_stays_up_to_rounding(name):
    graph = make(name, seed=1, dtype=torch.float32)
    equalized, _ = equalize(graph)
    x = image(torch.float32)
    y = logits(graph, x)
    assert (y - logits(equalized, x)).abs().max() <= 1e-4 * y.abs().max()
    assert all(t.dtype == torch.float32 for t in tensors(equalized).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNet", "ResNet20", "Functional"])
def test_a_second_time_changes_nothing(name):
    once, _ = equalize(make(name))
    twice, found = equalize(once)
    assert found.n_sweeps == 1
    for name, t in tensors(once).items():
        assert torch.equal(t, twice.get_buffer(name)), name


def test_one_pair_has_the_scales_of_the_paper():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Flatten())
    net = randomize(net).double()
    net[0].bias.data *= 0.01
    equalized, found = equalize(export_network(net, (3, 1, 1)))
    w1, b1, w2 = net[0].weight, net[0].bias, net[2].weight
    new = {name: equalized.get_buffer(name) for name in net.state_dict()}
    for i in range(5):
        r1, r2 = w1[i].abs().max(), w2[:, i].abs().max()
        s = (r1 * r2).sqrt() / r2
        options = {"rtol": 1e-6, "atol": 0}  # s is found in float32
        torch.testing.assert_close(new["0.weight"][i], w1[i] / s, **options)
        torch.testing.assert_close(new["0.bias"][i], b1[i] / s, **options)
        torch.testing.assert_close(new["2.weight"][:, i], w2[:, i] * s, **options)
    assert torch.equal(new["2.bias"], net[2].bias) and found.n_pairs == 1


def test_transposed_convolutions_and_padding():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.PReLU(), nn.ZeroPad2d(1), nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, groups=2 - 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    torch.manual_seed(0)
    for p in net.parameters():
        p.data *= torch.exp(torch.randn(len(p), *[1] * (p.dim() - 1)))
    graph = folded(net)
    equalized, found = equalize(graph)
    y = logits(graph, image(torch.float64))
    assert found.n_pairs == 4 and not found.left_alone
    assert (y - logits(equalized, image(torch.float64))).abs().max() <= 1e-10 * y.abs().max()


def test_a_channel_that_has_only_a_bias_does_not_grow_beyond_all_others():
    """shared/cases/d05: weight decay has killed a channel, but for the bias of its batch norm."""
    block = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    more = [nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    net = nn.Sequential(*block, *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    torch.manual_seed(0)
    for alive in (1e-9, 0.0):
        with torch.no_grad():
            net.eval()[1].weight[5], net[1].bias[5] = alive, 0.3
        graph = folded(net, torch.float32)
        equalized, _ = equalize(graph)
        b, b_e = (g.get_buffer("0.bias").abs() for g in (graph, equalized))
        w_e = equalized.get_buffer("0.weight").abs().amax((1, 2, 3))
        others = w_e[[i for i in range(16) if i != 5]]
        assert b[5] == pytest.approx(0.3) and b_e[5] <= 4 * others.max() < 2


@settings(max_examples=12, deadline=None)  # each is traced: a fifth of a second
@given(
    channels=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    groups=st.booleans(),
    exponent=st.floats(0, 4),
    zeros=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_chains(channels, groups, exponent, zeros, seed):
    torch.manual_seed(seed)
    sizes, parts = [3, *(2 * c for c in channels)], []
    for i, (c_in, c_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        conv = nn.Conv2d(c_in, c_out, 1, groups=2 if groups and i else 1)
        conv.weight.data *= torch.exp(exponent * torch.randn(c_out, 1, 1, 1))
        if zeros:  # some output channels that are constant, some inputs that nothing reads
            conv.weight.data[torch.rand(c_out) < 0.3] = 0
            conv.weight.data[:, torch.rand(conv.weight.shape[1]) < 0.3] = 0
        parts += [conv, nn.ReLU()]
    net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(sizes[-1] * 4, 3)).double().eval()
    graph = export_network(net, (3, 2, 2))
    equalized, found = equalize(graph)
    x = image(torch.float64, 2)
    y = logits(graph, x)
    assert found.n_pairs == len(channels)
    assert (y - logits(equalized, x)).abs().max() <= 1e-10 * y.abs().max()
    for pair in find_pairs(graph)[0]:
        for a, b, *before in zip(*ranges(equalized, pair), *ranges(graph, pair), strict=True):
            assert a == pytest.approx(b, rel=4 * equalization.TOLERANCE) or min(before) == 0


# --- what is left alone ----------------------------------------------------------------------


class Shared(nn.Module):
    """A layer that runs twice, two that share a weight, and one whose output is read twice."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.a, self.twice, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.c, self.d, self.e = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.d.weight = self.b.weight
        self.f, self.g = nn.Conv2d(4, 4, 1), nn.Conv2d(4, num_classes, 1)
        self.h = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.b(self.twice(self.twice(self.a(x)).relu()).relu())
        x = self.e(self.d(self.c(x.relu()).relu()).relu())
        x = self.f(x.relu() + torch.cat([x[:, :1], self.h(x)], 1))
        first, second = self.g(x.chunk(2, dim=2)[0]).chunk(2, dim=2)
        return (first + second).mean((2, 3))


def test_shared_layers_and_values_read_twice_are_left_alone():
    graph = folded(randomize(Shared()))
    equalized, found = equalize(graph)
    shared = "it or its reader is shared"
    assert found.left_alone == {
        **dict.fromkeys(["a", "twice", "twice_2", "b", "c", "d"], shared),
        "e": "read in several places",
        "f": "read by chunk",
        "h": "read by cat",
        "g": "read by chunk",
    }
    assert found.n_pairs == 0 and str(found).startswith("no pair of layers can be equalized")
    for name, t in tensors(graph).items():
        assert torch.equal(t, equalized.get_buffer(name))


def test_other_activations_and_relu6_functions_stop_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 3, 1) for _ in range(5))
            self.act, self.clip = nn.SiLU(), nn.ReLU6()

        def forward(self, x):
            x = F.relu6(self.b(self.act(self.a(x))))
            return self.e(self.clip(self.d(self.clip(self.c(x))))).mean((2, 3))

    graph = folded(randomize(Net()))
    assert equalize(graph)[1].n_pairs == 3
    _, found = equalize(graph, across_relu6=False)
    left_alone = dict.fromkeys("bcd", "read by relu6") | {"a": "read by silu"}
    assert found.left_alone == left_alone and found.n_pairs == 0
    assert str(found).count("\n") == 0 and "read by relu6 (b, c, d)" in str(found)


def test_a_relu6_has_a_bound_for_each_channel_or_is_left_alone():
    graph = make("MobileNetV2")
    x = 3 * image(torch.float64)
    for across in (True, False):
        equalized, found = equalize(graph, across_relu6=across)
        y = logits(graph, x)
        assert (y - logits(equalized, x)).abs().max() <= 1e-10 * y.abs().max()
        clamps = [n for n in equalized.graph.nodes if n.target is aten.clamp.Tensor]
        bounds = [equalized.get_buffer(n.args[2].target) for n in clamps]
        assert bool(bounds) == across and all(len(b.unique()) > 1 for b in bounds)
        assert (tensors(equalized).keys() == tensors(graph).keys()) == (not across)
    assert found.n_pairs == 1 and "read by relu6" in found.left_alone.values()


@pytest.mark.parametrize("clip", [nn.Hardtanh(-0.5, 2), lambda x: x.clamp(max=1), F.relu6])
def test_clamps_of_every_kind_are_scaled(clip):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1), nn.Linear(4, 4)
            self.d = nn.Linear(4, 4)

        def forward(self, x):
            x = self.c(self.b(clip(self.a(x)).clamp_min(0)).mean((2, 3)))
            return self.d(clip(x))

    graph = folded(randomize(Net()))
    equalized, found = equalize(graph)
    y = logits(graph, 3 * image(torch.float64))
    changed = (y - logits(equalized, 3 * image(torch.float64))).abs().max()
    assert found.n_pairs == 3 and changed <= 1e-10 * y.abs().max()


@pytest.mark.parametrize("n_channels", [16, 8])
def test_clamps_of_tokens_are_scaled_along_their_channels(n_channels):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, n_channels), nn.Linear(n_channels, 4)

        def forward(self, x):
            return self.b(F.relu6(self.a(x.flatten(1).unflatten(1, (16, 12))))).mean(1)

    graph, x = folded(randomize(Net()), shape=(3, 8, 8)), 3 * torch.randn(4, 3, 8, 8).double()
    equalized, found = equalize(graph)
    changed = (logits(graph, x) - logits(equalized, x)).abs().max()
    assert found.n_pairs == 1 and changed <= 1e-10 * logits(graph, x).abs().max()


def test_logits_that_change_are_found(monkeypatch):
    monkeypatch.setattr(equalization, "POINTWISE", {"gelu"})
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.Conv2d(3, 3, 8), nn.Flatten())
    with pytest.raises(NetworkError, match="--equalize: logits change"):
        equalize(folded(randomize(net)))


# --- in a run --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_images):
    """run(model, flags) quantizes a tiny network in an empty folder; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def quantize(name, flags):
        monkeypatch.setitem(models.MODELS, name, lambda num_classes: NETWORKS[name]())
        torch.manual_seed(0)
        net = NETWORKS[name]()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data.uniform_(0.2, 3)
        save_weights(net, Path("a.pt"))
        common = f"--model {name} --dataset Tiny --device cpu --schemes uniform --no_plots"
        with pytest.raises(SystemExit) as caught:
            qi.main(["a.pt", *common.split(), *flags.split()])
        return caught.value.code

    return quantize


def rows():
    return json.loads(Path("results.json").read_text())["rows"]


def test_quantized_errors_are_of_the_equalized_weights(run, capsys):
    assert run("ConvNet", "--fold_bn --bits 4 --act_bits same") == 0
    plain = rows()
    assert run("ConvNet", "--fold_bn --equalize --bits 4 --act_bits same") == 0
    equalized = rows()
    assert "a.pt: pairs of layers equalized: 3, in " in capsys.readouterr().out
    assert [row["equalize"] for row in plain + equalized] == [False] * 2 + [True] * 2
    assert equalized[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert equalized[1]["squared_error"] != plain[1]["squared_error"]
    assert "True" in Path("results.csv").read_text()


def test_batch_norms_have_to_be_folded_where_there_are_any(run, capsys):
    assert run("ConvNet", "--equalize --bits 4") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--equalize needs --fold_bn: a.pt has batch" in message
    assert run("Functional", "--equalize --bits 4") == 0


def test_a_network_without_batch_norms_is_exported(run, monkeypatch, capsys):
    conv, pool, linear = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 4)
    net = nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten(), linear)
    monkeypatch.setitem(NETWORKS, "Plain", lambda: net)
    assert run("Plain", "--fold_bn --bits 4 --act_bits 4 --export a.onnx --verify") == 0
    assert "--fold_bn has no effect: a.pt has no batch norms" in capsys.readouterr().out


def test_nothing_to_equalize_is_warned_about(run, capsys):
    assert run("Stranger", "--fold_bn --equalize --bits 4") == 0
    assert "a.pt: --equalize has no effect: no pair of layers can be" in capsys.readouterr().err


def test_files_to_deploy_hold_weights_only(run, capsys):
    assert run("MobileNetV2", "--fold_bn --equalize --bits 4 --save_quantized q.pt") == 0
    printed = capsys.readouterr().out
    assert "a.pt: pairs of layers equalized: 1, in " in printed and "read by relu6 (" in printed
    net, weights = NETWORKS["MobileNetV2"](), torch.load("q.pt")
    names = penalized_layers(net)
    assert weights.keys() == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    assert all(weights[f"{name}.weight"].shape == m.weight.shape for name, m in names.items())


@pytest.mark.slow
def test_an_equalized_network_is_exported_and_its_file_says_so(run, capsys):
    onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
    flags = "--fold_bn --bits 4 --act_bits 4 --quantize_sums"
    assert run("ResNet20", f"{flags} --equalize --export e.onnx --verify") == 0
    found = json.loads(Path("e.verified.json").read_text())
    assert found["differing_predictions"]["integer"] == 0 and found["source"]["equalize"] == "true"
    assert run("ResNet20", f"{flags} --verify e.onnx") == 1
    assert "made with equalize true, and this is false" in capsys.readouterr().err
    model = onnx.load("e.onnx")
    [entry] = [p for p in model.metadata_props if p.key == "equalize"]
    model.metadata_props.remove(entry)  # as in files of earlier versions
    onnx.save(model, "old.onnx")
    assert deployed_files.read_model(Path("old.onnx"), {"equalize": "false"}, (3, 8, 8))
    with pytest.raises(FileError, match="made with equalize false"):
        deployed_files.read_model(Path("old.onnx"), {"equalize": "true"}, (3, 8, 8))
