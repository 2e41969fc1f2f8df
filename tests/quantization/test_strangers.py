"""Networks that people bring: what runs is what is quantized, and what is not is said."""

import json
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import data
import models
import quant_inference as qi
import quant_utils as qu
from engine.networks import export
from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms
from engine.networks.graph import layers, operations
from engine.quantization.activations import (
    activation_grids,
    calibrate,
    quantize_activations,
    quantized_inputs,
)
from engine.quantization.coverage import coverage
from engine.quantization.weights import quantize_model, quantize_weights
from engine.system.errors import NetworkError
from engine.system.io import save_weights, torch_load
from engine.training.learned_steps import make_steps

SHAPE = (3, 8, 8)


def head(channels=8):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)


class InPlace(nn.Module):
    """It rescales its input in place."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *head()
        )

    def forward(self, x):
        x *= 2
        x -= 0.5
        return self.f(x)


class StandardizedConv(nn.Conv2d):
    """Weight standardization, as in BiT and NFNets."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def standardized(num_classes=4):
    conv = StandardizedConv
    return nn.Sequential(conv(3, 8, 3, 2, 1), nn.ReLU(), conv(8, 8, 3, 2, 1), nn.ReLU(), *head())


def normalized(num_classes=4):
    norm = nn.utils.parametrizations.weight_norm
    convs = [norm(nn.Conv2d(n, 8, 3, 2, 1)) for n in (3, 8)]
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), *head())


class Twice(nn.Module):
    """One convolution runs twice."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.b, self.head = self.a, nn.Sequential(*head())

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x)))))))


class Tied(Twice):
    """Two convolutions with one weight and a bias each."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.b = nn.Conv2d(8, 8, 3, 1, 1)
        self.b.weight = self.a.weight


class LearnedMap(nn.Module):
    """A learned map is added to features, then a residual."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pos = nn.Parameter(torch.randn(1, 8, 4, 4) * 0.1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.stem(x) + self.pos
        x = x + self.block(x)
        return self.fc(self.pool(x).flatten(1))


def lopsided(num_classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(), *head()
    )


def make(network, seed=0):
    torch.manual_seed(seed)
    return network().eval()


def images(n=16, seed=1):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantize(monkeypatch, tmp_path, tiny_images):
    """Save a network's weights and run quant_inference.py on them; return its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(network, flags, files="mine.pt"):
        monkeypatch.setitem(models.MODELS, "Mine", network)
        save_weights(make(network), Path("mine.pt"))
        common = f"{files} --model Mine --dataset Tiny --device cpu --schemes uniform --no_plots"
        with pytest.raises(SystemExit) as caught:
            qi.main([*common.split(), *flags.split()])
        return caught.value.code

    return run


def rows():
    return json.loads(Path("results.json").read_text())["rows"]


def own_loss(network, seed=0):
    """The loss that the network itself has on the test images."""
    tiny = data.DATASETS["Tiny"]("", 0)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (tiny.mean, tiny.std))
    with torch.no_grad():
        logits = make(network, seed)((tiny.test_images / 255 - mean) / std)
    return F.cross_entropy(logits, tiny.test_labels).item()


@pytest.mark.parametrize(
    "network", [InPlace, reference.Viewed, standardized, normalized, Twice, Tied, LearnedMap]
)
@pytest.mark.sampled(4)
def test_8_bits_are_close_to_the_network_itself(network, quantize):
    expected = own_loss(network)
    flags = "--bits 8 7 --act_bits 8 --calibration minmax --quantize_sums"
    assert quantize(network, flags) == 0
    full, *quantized = rows()
    assert full["loss"] == pytest.approx(expected, rel=1e-4)
    assert all(row["loss"] == pytest.approx(expected, rel=0.02) for row in quantized)
    assert all(row["loss"] != full["loss"] and row["squared_error"] > 0 for row in quantized)
    assert all(row["quantized_macs"] == row["quantized_weights"] == 1 for row in quantized)


def test_a_network_that_writes_into_its_input_folds(quantize):
    assert quantize(InPlace, "--bits 8 --fold_bn") == 0
    assert rows()[0]["loss"] == pytest.approx(own_loss(InPlace), rel=1e-4)
    x = images()
    export_network(make(InPlace), SHAPE)(x)
    assert torch.equal(x, images())


# --- one trace for networks of the same code --------------------------------------------------


class RandomTensor(nn.Module):
    """It draws a tensor that no state_dict holds; `draw` gives it to the network."""

    def __init__(self, draw):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*head())
        draw(self)

    def forward(self, x):
        return self.head(self.conv(x) * self.scale)


def constant(net):
    net.scale = torch.rand(8, 1, 1)


def number(net):
    net.scale = torch.rand(()).item()


def buffer(net):
    net.register_buffer("scale", torch.rand(8, 1, 1), persistent=False)


def n_parameters(net):
    net.scale = nn.Parameter(torch.rand([(), (8, 1, 1), (1, 4, 4)][torch.randint(3, ())]))


@pytest.fixture
def traces(monkeypatch):
    """A list of the networks that are traced."""
    found, trace = [], export.traced
    monkeypatch.setattr(
        export, "traced", lambda net, images: found.append(net) or trace(net, images)
    )
    return found


@pytest.mark.parametrize(
    ("network", "n_traces"),
    [
        (InPlace, 1),
        (normalized, 1),
        (Tied, 1),
        (lambda: RandomTensor(buffer), 1),
        (lambda: RandomTensor(constant), 3),
        (lambda: RandomTensor(number), 3),
        (lambda: RandomTensor(n_parameters), 2),  # of three networks, two have the same shape
    ],
)
def test_a_trace_serves_other_networks_whose_tensors_it_reads(network, n_traces, traces):
    earlier = []
    for seed in range(3):
        net, x = make(network, seed), images()
        graph = export_network(net, SHAPE, earlier)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), net(x.clone()))
    assert len(traces) == len(earlier) == n_traces


def test_files_of_one_network_are_traced_once(quantize, traces):
    for seed in (1, 2):
        save_weights(make(Twice, seed), Path(f"{seed}.pt"))
    assert quantize(Twice, "--bits 8", files="mine.pt 1.pt 2.pt") == 0
    assert len(traces) == 1
    losses = [row["loss"] for row in rows() if row["scheme"] == "none"]
    assert losses == pytest.approx([own_loss(Twice, seed) for seed in range(3)], rel=1e-5)


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [standardized, normalized])
def test_weights_are_quantized_as_they_are_computed(network):
    net = make(network)
    net_q, quantized = quantize_model(net, qu.uniform, 2, image_shape=SHAPE)
    assert [layer.name for layer in quantized] == ["0", "2", "6"]
    graph = export_network(net, SHAPE)
    for layer in quantized:
        w, w_q = (each.get_submodule(layer.name).weight for each in (graph, net_q))
        assert torch.equal(w_q, qu.uniform(w, 2)) and len(w_q.unique()) <= 4
        assert layer.squared_error == pytest.approx((w_q - w).square().sum().item(), rel=1e-5)
    computed = graph.get_submodule("0").weight
    if network is standardized:
        assert computed.mean((1, 2, 3)).abs().max() < 1e-6
    else:
        assert torch.allclose(computed, net[0].weight)
        assert len(net_q[0].weight.unique()) <= 4


@pytest.mark.parametrize("network", [Twice, Tied])
def test_a_weight_that_is_used_twice_is_quantized_once_for_each_use(network):
    net = make(network)
    net_q, quantized = quantize_model(net, qu.uniform, 2, image_shape=SHAPE)
    assert [layer.name for layer in quantized] == ["stem", "a", "b", "head.2"]
    assert net_q.b.weight is net_q.a.weight and (net_q.b is net_q.a) == (network is Twice)
    assert torch.equal(net_q.a.weight, qu.uniform(net.a.weight, 2))
    for name in ("a", "b"):  # biases are on the weight's grid
        layer = net_q.get_submodule(name)
        assert len(torch.cat([layer.weight.flatten(), layer.bias]).unique()) <= 4


class Shared(Twice):
    """The weight of the second convolution is a scale as well."""

    def forward(self, x):
        return super().forward(x) * self.a.weight.square().sum()


class SharedParts(Shared):
    """The same, of a weight whose norm is learned apart."""

    def __init__(self, num_classes=4):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.a)


OF_GRAPH = "q.pt has the weights of the exported graph"
IN_PLACE = "q.pt has weights in place of their parametrizations"


@pytest.mark.parametrize(
    ("network", "flags", "said"),
    [
        (normalized, "", IN_PLACE),
        (Twice, "", None),
        (standardized, "", OF_GRAPH),
        (Shared, "", OF_GRAPH),
        (SharedParts, "", OF_GRAPH),
        (Twice, "--rounding adaround --rounding_images 16 --rounding_steps 20", OF_GRAPH),
        (standardized, "--fold_bn", None),  # docs/deploy.md says it
    ],
)
def test_saved_weights_that_the_network_cannot_load_are_told(
    network, flags, said, quantize, capsys
):
    assert quantize(network, f"--bits 3 --save_quantized q.pt {flags}") == 0
    err = capsys.readouterr().err
    assert {line for line in (OF_GRAPH, IN_PLACE) if line in err} == ({said} if said else set())
    saved = torch_load(Path("q.pt"))
    if network is standardized or said == OF_GRAPH:
        export_network(make(network), SHAPE).load_state_dict(saved)
    elif network is Twice:
        make(network).load_state_dict(saved)


def test_a_bias_that_a_correction_adds_is_told(quantize, capsys):
    flags = "--bits 3 --biases full --output_bias_correction float --save_quantized q.pt"
    assert quantize(InPlace, flags) == 0
    said = "has no bias of its own, and was given one: the network itself cannot load them"
    assert said in capsys.readouterr().err


def test_saved_weights_have_the_statistics_that_were_estimated_again(quantize):
    flags = "--bits 2 --recalibrate_bn_images 32 --save_quantized q.pt"
    assert quantize(InPlace, flags) == 0

    def saved():
        net = make(InPlace)
        net.load_state_dict(torch_load(Path("q.pt")))
        return net

    plain, row = rows()
    assert row["loss"] == pytest.approx(own_loss(saved), rel=1e-5)
    assert abs(row["loss"] - plain["loss"]) > 1e-3


def test_a_plan_has_the_shape_of_one_image_wherever_its_dimension_is(quantize, capsys):
    class Attention(nn.Module):
        def __init__(self, num_classes=4):
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(6, 3), nn.Linear(6, num_classes)

        def forward(self, x):
            x = x.flatten(2)[:, :, :6].transpose(0, 1)  # 3 tokens of 6 numbers, images second
            return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(0))

    assert quantize(Attention, "--bits 4 --act_bits 8 --calibration_images 8 --show_plan") == 0
    sizes = [line.split()[2] for line in capsys.readouterr().out.splitlines() if " input " in line]
    # 3 tokens of 6 numbers, then heads of 2 numbers
    assert sizes == ["3×6", "3×3×2", "3×2×3", "3×3×3", "3×3×2", "3×6", "6"]


@pytest.mark.parametrize(
    ("flags", "cells"),
    [
        ("--schemes uniform pwlq", ["4", "weight's/its own"]),  # see BIAS_RANGES
        ("--schemes pwlq", ["4", "its own"]),
        ("--schemes uniform --biases full", ["float"]),
    ],
)
def test_a_plan_says_in_which_range_biases_are(flags, cells, quantize, capsys):
    def network(num_classes=4):
        return nn.Sequential(*head(3))

    assert quantize(network, f"--bits 4 --show_plan {flags}") == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if " bias  " in line]
    assert " ".join(line.split()[3:]) == " ".join(cells)


VIT = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16}
NETWORKS = {
    "vit": lambda: VisionTransformer(**VIT, mlp_dim=32, num_classes=4),
    "swin": lambda: SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=4),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.ReLU(), *head(6)
    ),
}


SLOW = {"swin"}  # the attention in windows is a graph of hundreds of nodes


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS]
)
def test_every_weight_and_every_input_is_seen(name):
    net, shape = make(NETWORKS[name]), (3, 16, 16) if name == "swin" else SHAPE
    graph = export_network(net, shape)
    net_q, _ = quantize_model(net, qu.uniform, 2, image_shape=shape)
    weights = {k: w for k, w in net_q.named_parameters() if w.dim() > 1 and k.endswith("weight")}
    assert [k for k, w in weights.items() if len(w.unique()) > 4] == []
    kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    names = {k for k, m in net.named_modules() if isinstance(m, kinds)}
    names |= {f"{k}.in_proj" for k, m in net.named_modules() if hasattr(m, "in_proj_weight")}
    assert names <= quantized_inputs(graph).keys()
    assert names <= layers(graph).keys() and names <= make_steps(net, shape, 4, 4).layers.keys()
    assert coverage(graph, quantized_inputs(graph)).multiply_adds == 1


# --- inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", qu.CALIBRATIONS)
def test_one_image_more_does_not_shrink_ranges(method):
    graph, x = fold_batch_norms(export_network(make(LearnedMap), SHAPE)), images(65)
    ranges = [calibrate(graph, x[:n].split(64), method) for n in (64, 65)]
    for name, (low, high) in ranges[0].items():
        assert ranges[1][name][1] >= 0.98 * high
        assert low >= 0 or ranges[1][name][0] <= 0.98 * low


def test_sums_are_named_in_the_order_in_which_they_run():
    names = list(quantized_inputs(export_network(make(LearnedMap), SHAPE), sums=True))
    assert names == [
        *("stem.0", "add[0]", "add[1]", "block.0", "add_2[0]", "add_2[1]", "pool", "fc")
    ]


def test_a_batch_of_one_image_gives_the_same_result(quantize):
    losses = []
    for n in (48, 1):
        flags = f"--bits 8 --act_bits 3 --fold_bn --quantize_sums --batch_size {n}"
        assert quantize(LearnedMap, flags) == 0
        losses.append([row["loss"] for row in rows()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_zero_point_serves_lopsided_inputs(quantize):
    graph, x = export_network(make(lopsided), SHAPE), images(64)
    ranges, errors = calibrate(graph, [x], "minmax"), {}
    assert ranges["2"][0] < 0 < -3 * ranges["2"][0] < ranges["2"][1]
    for asymmetric in (False, True):
        grids = activation_grids(ranges, 4, asymmetric=asymmetric)
        with torch.no_grad():
            change = quantize_activations(graph, grids)(x) - graph(x)
        errors[asymmetric] = change.square().mean().item()
        levels = len(grids["2"].round(F.silu(torch.linspace(-9, 9, 999))).unique())
        assert (levels == 16) == asymmetric
    assert errors[True] < 0.5 * errors[False]
    losses = {}
    for symmetry in ("symmetric", "asymmetric"):
        flags = f"--bits 8 --act_bits 4 --calibration minmax --act_symmetry {symmetry}"
        assert quantize(lopsided, flags) == 0
        losses[symmetry] = rows()[1]["loss"]
    assert losses["symmetric"] != losses["asymmetric"]


# --- what stays in float -------------------------------------------------------------------


def test_what_stays_in_float_is_named_and_may_be_an_error(quantize, capsys):
    assert quantize(LearnedMap, "--bits 8 --act_bits 8") == 0
    printed = capsys.readouterr()
    assert printed.err == (
        "-c: mine: quantized: 100.0% of multiply-adds, 86.6% of weights; in float: pos "
        "(read by add, by no product)\n"
    ).replace("-c", "quant_inference.py")
    assert rows()[1]["quantized_weights"] == pytest.approx(824 / 952)
    assert "86.6%" in printed.out
    assert quantize(LearnedMap, "--bits 8 --act_bits 8 --strict --output strict") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--strict: quantized: 100.0%" in message
    assert "pos" in message and not Path("strict/results.csv").exists()
    assert quantize(LearnedMap, "--bits 8 --act_bits 8 --strict --quantize_sums") == 0
    assert capsys.readouterr().err.count("in float") == 0


@pytest.mark.parametrize(
    "network",
    [
        lambda num_classes=4: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), *head()),
        lambda num_classes=4: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), *head()
        ),
    ],
)
def test_a_batch_norm_that_does_not_fold_is_why_a_network_is_not_exported(
    network, quantize, capsys
):
    pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    assert quantize(network, "--bits 4 --act_bits 8 --fold_bn --export x.onnx") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "batch" in message and "flatten" not in message


class Tokens(nn.Module):
    """A convolution, what `mix` does with its 16 tokens, and a linear layer."""

    def __init__(self, mix):
        super().__init__()
        self.conv, self.fc, self.mix = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10), mix

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc(self.mixed(tokens).mean(1))

    def mixed(self, tokens):
        return self.mix(tokens)


@pytest.mark.parametrize(
    "mix",
    [
        lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True),
        lambda t: F.scaled_dot_product_attention(t, t, t),
        lambda t: F.scaled_dot_product_attention(t, t, t, torch.eye(16, dtype=torch.bool)),
        lambda t: torch.einsum("bnc,bmc->bnm", t, t) @ t,
    ],
)
@pytest.mark.sampled(2)
def test_products_of_activations_are_seen_however_they_are_written(mix):
    graph = export_network(Tokens(mix), (3, 32, 32))  # which compares logits with the network's
    assert [each.kind for each in operations(graph) if each.is_product] == [
        "conv", "matmul", "matmul", "linear"
    ]  # fmt: skip
    found = coverage(graph, None)
    expected = (16 * 8 * 192 + 80) / (16 * 8 * 192 + 80 + 2 * 16 * 16 * 8)
    assert found.multiply_adds == pytest.approx(expected) and len(found.in_float) == 2
    assert not coverage(graph, quantized_inputs(graph)).in_float


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("baddbmm", lambda t, w: torch.baddbmm(t, t @ t.mT, t)),
        ("lstm", lambda t, w: nn.LSTM(8, 8, batch_first=True)(t)[0]),
        ("cdist", lambda t, w: torch.cdist(t, t) @ t),
        (
            "conv1d with a weight that depends on the images",
            lambda t, w: F.conv1d(t.mT, w[..., None] * t.mean()).mT,
        ),
    ],
)
def test_products_that_no_quantizer_reaches_are_refused(name, mix):
    with pytest.raises(NetworkError, match=f"calls {name}, whose products cannot be quantized"):
        export_network(WithMatrix(mix, 8, 8), (3, 32, 32))


def test_products_that_pytorch_counts_and_no_operation_has_are_refused(monkeypatch):
    monkeypatch.setattr(export, "UNSEEN_PRODUCTS", set())  # as if nobody had thought of it
    net = WithMatrix(lambda t, w: torch.baddbmm(t, t @ t.mT, t), 1)
    seen, unseen = 16 * 8 * 192 + 80 + 16 * 16 * 8, 16 * 16 * 8
    share = f"{unseen / (seen + unseen):.1%} of its products are in operations that are not seen"
    with pytest.raises(NetworkError, match=share):
        export_network(net, (3, 32, 32))


class WithMatrix(Tokens):
    """What `mix` makes of the tokens and a learned matrix, or of several."""

    def __init__(self, mix, *shape):
        super().__init__(mix)
        self.matrix = nn.Parameter(torch.randn(shape))

    def mixed(self, tokens):
        return self.mix(tokens, self.matrix)


OF_A_MATRIX = {
    "einsum": (lambda t, w: torch.einsum("bnc,oc->bno", t, w), (8, 8)),
    "einsum, the weight first": (lambda t, w: torch.einsum("oc,bnc->bno", w, t), (8, 8)),
    "on the left": (lambda t, w: w @ t, (16, 16)),
    "on the left, of channels": (lambda t, w: (w @ t.mT).mT, (8, 8)),
    "with a dimension of its own": (lambda t, w: t @ w, (1, 8, 8)),
    "tensordot": (lambda t, w: torch.tensordot(t, w, 1), (8, 8)),
    "inner": (torch.inner, (8, 8)),
    "multi_dot": (lambda t, w: torch.linalg.multi_dot([t.sum(1), w])[:, None], (8, 8)),
    "a matrix for each token": (lambda t, w: torch.einsum("bnc,noc->bno", t, w), (16, 8, 8)),
    "the same, first": (lambda t, w: torch.einsum("noc,bnc->bno", w, t), (16, 8, 8)),
    "the same, as a product": (lambda t, w: (t.transpose(0, 1) @ w).transpose(0, 1), (16, 8, 8)),
    "squeezed": (lambda t, w: F.linear(t, w.squeeze()), (8, 8, 1, 1)),
    "squeezed, a dimension before": (lambda t, w: F.linear(t, w.squeeze()), (1, 8, 8)),
    "added to values": (lambda t, w: torch.addmm(t.sum(1), t.sum(1), w)[:, None], (8, 8)),
    "bmm": (lambda t, w: torch.bmm(t.transpose(0, 1), w).transpose(0, 1), (16, 8, 8)),
}


@pytest.mark.parametrize("name", OF_A_MATRIX)
@pytest.mark.sampled(2)
def test_a_matrix_is_a_weight_however_its_product_is_written(name):
    mix, shape = OF_A_MATRIX[name]
    torch.manual_seed(0)
    net, x = WithMatrix(mix, *shape).eval(), torch.randn(3, 3, 32, 32)
    graph = export_network(net, (3, 32, 32))
    assert coverage(graph, None) == (1, 1, {})
    graph, quantized = quantize_weights(graph, qu.uniform, 4)
    assert len(quantized) == 3
    with torch.no_grad():  # PyTorch's own forward, with weights on the grid
        for layer in (net.conv, net.fc):
            layer.bias.copy_(qu.uniform(layer.bias, 4, range_source=layer.weight))
        for w in (net.conv.weight, net.fc.weight, net.matrix):
            w.copy_(qu.uniform(w, 4))
        torch.testing.assert_close(graph(x), net(x), rtol=1e-4, atol=1e-4)


OTHER_PRODUCTS = {
    "of no images": (lambda t, w: t + F.linear(F.dropout(w, 0.1, False), w).sum(), (64, 64)),
    "of images alone": (lambda t, w: t @ t.mT @ t, (1,)),
    "of a moved matrix": (lambda t, w: F.linear(t, w * t.mean()) + t, (8, 8)),
}


@pytest.mark.parametrize("name", [*OTHER_PRODUCTS, *OF_A_MATRIX])
@pytest.mark.sampled(4)
def test_multiply_adds_are_those_that_pytorch_counts(name):
    mix, shape = (OTHER_PRODUCTS | OF_A_MATRIX)[name]
    net = WithMatrix(mix, *shape).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 3, 32, 32))
    graph = export_network(net, (3, 32, 32))
    assert sum(each.multiply_adds() for each in operations(graph)) == counter.get_total_flops() / 2


class SameNames(WithMatrix):
    """Its module has the name that the product before it would have, and its number as well."""

    def __init__(self):
        super().__init__(None, 8, 8)
        self.linear, self.linear_2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def mixed(self, tokens):
        return self.linear_2(self.linear(self.linear(tokens @ self.matrix)))


def test_no_two_layers_have_one_name():
    graph = export_network(SameNames().eval(), (3, 32, 32))  # which compares logits
    names = ["conv", "linear_3", "linear", "linear_4", "linear_2", "fc"]
    assert [*layers(graph)] == names and coverage(graph, None) == (1, 1, {})


def test_weights_that_are_computed_and_scales_without_a_dimension():
    graph = export_network(WithMatrix(low_rank, 8, 8).eval(), (3, 32, 32))
    assert [*layers(graph)] == ["conv", "linear", "fc"] and coverage(graph, None) == (1, 1, {})
    export_network(WithMatrix(lambda t, s: t * s.view(1, 1, 1)).eval(), (3, 32, 32))


def low_rank(tokens, w):
    """Multiply by w plus a product of two of its parts."""
    return F.linear(tokens, torch.addmm(w, w[:, :2], w[:2]))


def test_weights_that_no_layer_has_are_said_to_be_inputs():
    net = WithMatrix(lambda t, w: (t[:, None] @ w).mean(1), 2, 8, 8)
    graph = export_network(net, (3, 32, 32))
    reason = "its weight is an input of the product, which --act_bits quantizes"
    assert coverage(graph, None).in_float == {"matmul": reason, "matrix": reason}
    assert not coverage(graph, quantized_inputs(graph)).in_float


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (lambda t: (t - t.sin()).flatten(1)[:, :8, None].mT, ["sub[0]", "sub[1]"]),
        (lambda t: (t * t.sin()).flatten(1)[:, :8, None].mT, ["mul[0]", "mul[1]"]),
        (lambda t: torch.stack([t, t.sin()]).sum(0), ["cat[0]", "cat[1]"]),
        (
            lambda t: t + torch.arange(t.shape[1] * t.shape[2]).view(t.shape[1:]),
            ["add[0]", "add[1]"],
        ),
        (lambda t: t + torch.arange(t.shape[2]).view(1, 1, -1), []),  # one for each channel
        (lambda t: F.avg_pool1d(t, 2).repeat(1, 1, 2), ["pool"]),
        (lambda t: F.adaptive_avg_pool1d(t.mT, 1).mT, ["pool"]),
        (lambda t: t.mT.unflatten(2, (4, 4)).flatten(2).mean(2)[:, None], ["pool"]),
        (lambda t: t.mean(2, keepdim=True).expand_as(t), []),  # of channels: no pooling
    ],
)
def test_sums_and_pooling_are_seen_however_they_are_written(mix, expected):
    inputs = quantized_inputs(export_network(Tokens(mix), (3, 32, 32)), sums=True)
    others = ["conv", "fc", "pool_2" if "pool" in expected else "pool"]  # the last is Tokens' own
    assert sorted(inputs) == sorted(others + expected)


class OneName(nn.Module):
    """A convolution of a parameter whose name a layer would have, and a module of any name."""

    def __init__(self, name="fc", before=lambda x: x):
        super().__init__()
        self.conv, self.before = nn.Parameter(torch.randn(4, 3, 1, 1)), before
        self.add_module(name, nn.Linear(4, 4))
        self.last = name

    def forward(self, x):
        pixels = F.conv2d(self.before(x), self.conv).mean((2, 3))
        return self.get_submodule(self.last)(pixels)


class Windows(nn.Module):
    """It counts its images by len(x): a token for each, two groups and two windows of pixels."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, num_classes)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.groups = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        tokens = self.conv(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens[:, 1:]], 1)
        windows = tokens.reshape(2 * len(x), -1, 8).relu().reshape(len(x), -1, 8)
        pairs = torch.einsum("bgc,gcd->bgd", windows.sum(1).unflatten(1, (2, 4)), self.groups)
        streams = self.head(pairs.flatten(1).expand(2, -1, -1)).relu()  # images second
        return streams.sum(0) / len(x)


class Multiples(nn.Module):
    """Its own sizes are 422 and 211, of which the second is that of the images in an export."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 422, 3), nn.Linear(422, num_classes)

    def forward(self, x):
        x = self.conv(x).reshape(len(x), 2, 211, -1).transpose(1, 2).reshape(x.size(0), 422, -1)
        return self.head(x.mean(2).view(-1, 422))


def test_sizes_of_the_network_itself_are_not_taken_for_images(quantize, capsys):
    net = make(Multiples)
    graph = export_network(net, SHAPE)
    torch.testing.assert_close(graph(images(7)), net(images(7)))
    flags = "--bits 8 --act_bits 8 --calibration_images 8 --show_plan"
    assert quantize(Multiples, flags) == 0
    sizes = [line.split()[2] for line in capsys.readouterr().out.splitlines() if " input " in line]
    assert sizes == ["3×8×8", "422"]


def test_sizes_that_count_images_are_those_of_any_batch(quantize):
    net = make(Windows)
    graph = export_network(net, SHAPE)
    for n in (1, 2, 7):
        torch.testing.assert_close(graph(images(n)), net(images(n)))
    flags = "--bits 3 --act_bits 4 --biases full --rounding qdrop --rounding_images 20"
    assert quantize(Windows, f"{flags} --rounding_steps 20 --batch_size 50") == 0


class LargeBatch(Windows):
    def forward(self, x):
        return super().forward(x) * (2 if len(x) > 100 else 1)


def test_a_network_that_computes_something_else_for_large_batches_is_refused():
    with pytest.raises(NetworkError, match="computes other logits than itself"):
        export_network(make(LargeBatch), SHAPE)


class Masked(nn.Module):
    """Attention that adds a mask of −∞ to its scores, of tokens or, `by_image`, of each image."""

    def __init__(self, num_classes=4, by_image=False):
        super().__init__()
        self.conv, self.by_image = nn.Conv2d(3, 8, 2, 2), by_image
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, num_classes)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(16))

    def forward(self, x):
        q, k, v = self.qkv(self.conv(x).flatten(2).mT).chunk(3, -1)
        scores = q @ k.mT
        mask = self.mask
        if self.by_image:
            mask = torch.zeros_like(scores).masked_fill(
                scores < scores.mean(-1, keepdim=True), -torch.inf
            )
        return self.head(((scores + mask).softmax(-1) @ v).mean(1))


@pytest.mark.parametrize("calibration", ["topk_median", "minmax", "mse"])
def test_a_sum_with_a_mask_of_infinity_stays_in_float_and_is_named(calibration, quantize, capsys):
    flags = f"--bits 8 --act_bits 16 --quantize_sums --calibration {calibration}"
    assert quantize(Masked, f"{flags} --biases full --calibration_images 16") == 0
    plain, row = rows()
    assert row["loss"] == pytest.approx(plain["loss"], abs=2e-3)
    assert "in float: sums with a mask of −∞ (add)" in capsys.readouterr().err


def test_an_input_with_infinite_values_has_no_range(quantize, capsys):
    flags = "--bits 8 --act_bits 8 --quantize_sums --calibration_images 16"
    assert quantize(partial(Masked, by_image=True), flags) == 1
    assert "the input add[1] has values that are not finite" in capsys.readouterr().err


class Spectrum(nn.Module):
    """It multiplies frequencies by learned complex numbers, and has a map of five dimensions."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv, self.head = nn.Conv3d(3, 4, (1, 3, 3)), nn.Linear(4, num_classes)
        self.filter = nn.Parameter(torch.randn(3, 8, 5, 2))

    def forward(self, x):
        x = torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.filter), s=(8, 8))
        return self.head(self.conv(x[:, :, None].bfloat16().float()).mean((2, 3, 4)))


@pytest.mark.parametrize("calibration", ["minmax", "mse"])
def test_complex_numbers_and_five_dimensions(calibration, quantize):
    flags = f"--bits 8 --act_bits 16 --quantize_sums --calibration {calibration}"
    assert quantize(Spectrum, f"{flags} --biases full --calibration_images 16") == 0
    plain, row = rows()
    assert row["loss"] == pytest.approx(plain["loss"], abs=2e-3)


def test_a_network_without_weights_is_refused(quantize, capsys):
    assert quantize(lambda num_classes=4: nn.Sequential(nn.Flatten(), First()), "--bits 4") == 1
    assert "no layer with a weight: nothing to quantize" in capsys.readouterr().err


class First(nn.Module):
    """The first four numbers of each image, times learned ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x[:, :4] * self.scale


def branch(x):
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def test_names_that_a_graph_has_itself():
    assert [*layers(export_network(OneName().eval(), SHAPE))] == ["conv_2", "fc"]
    with pytest.raises(NetworkError, match="what is called 'code' needs another name"):
        export_network(OneName("code").eval(), SHAPE)


def test_a_network_with_branches_is_refused_in_one_line(capfd):
    with pytest.raises(NetworkError, match="cond is no operation that can be quantized"):
        export_network(OneName(before=branch).eval(), SHAPE)
    with pytest.raises(NetworkError, match="Could not guard on data-dependent"):
        export_network(OneName(before=lambda x: x + 1 if x.sum() > 0 else x).eval(), SHAPE)
    assert capfd.readouterr().err == ""
