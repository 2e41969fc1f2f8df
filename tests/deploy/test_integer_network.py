import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from engine.deploy.comparison import first_disagreement
from engine.deploy.deployed_files import pack, save_integers
from engine.deploy.integer_layers import MAX_BIAS, make_integer_layer, n_bits_needed, with_integers
from engine.deploy.integer_network import IntegerNetwork, shared_ranges
from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms
from engine.networks.graph import layers, set_constant, with_inputs
from engine.quantization.grids import Grid, OnGrid, activation_grid
from engine.quantization.weights import total
from engine.system.errors import NetworkError

ROOT = Path(__file__).parents[2]


class Small(nn.Module):
    """Modules and functions that have integer steps, one of them defined out of order."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.classifier = nn.Linear(8, num_classes)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.shrink, self.drop = nn.MaxPool2d(2), nn.Dropout()

    def forward(self, x):
        x = self.shrink(F.relu(self.conv1(x)))
        x = self.conv2(x).relu_()
        return self.classifier(self.drop(torch.flatten(self.pool(x), 1)))


def small_net():
    torch.manual_seed(0)
    return Small().eval()


def images(n=16):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


SCHEMES = {"uniform": reference.uniform_parts, "pwlq": reference.two_parts}


def folded(net, image_shape=(3, 12, 12)):
    return fold_batch_norms(export_network(net, image_shape))


def make_grids(graph, x, act_bits, sums=True, asymmetric=False):
    ranges = shared_ranges(graph, reference.input_ranges(graph, x, sums))
    return {name: activation_grid(act_bits, *r, asymmetric) for name, r in ranges.items()}


def make_parts(graph, n_bits, scheme="uniform", per_channel=False):
    return {
        name: SCHEMES[scheme](graph.get_buffer(layer.weight), n_bits, per_channel)
        for name, layer in layers(graph).items()
    }


def quantize(net, x, n_bits, act_bits, scheme="uniform", per_channel=False, **options):
    """Return the network in integers, its graph with quantized weights, and the inputs' grids."""
    return quantize_graph(
        folded(net, x.shape[1:]), x, n_bits, act_bits, scheme, per_channel, **options
    )


def quantize_graph(graph, x, n_bits, act_bits, scheme="uniform", per_channel=False, **options):
    """Do that with a folded graph, whose weights then are quantized."""
    grids = make_grids(graph, x, act_bits, **options)
    parts = make_parts(graph, n_bits, scheme, per_channel)
    integer_net = IntegerNetwork.from_graph(graph, grids, parts)
    for name, layer in layers(graph).items():
        set_constant(graph, layer, "weight", sum(part.dequantize() for part in parts[name]))
    return integer_net, graph, grids


# --- integers --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("n_bits", [2, 3, 4, 6, 8])
def test_codes_are_those_of_the_quantizer(n_bits, per_channel):
    w = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(n_bits))
    for scheme in SCHEMES.values():
        parts = scheme(w, n_bits, per_channel)
        layer = make_integer_layer(parts, None, Grid(0.1, 0, 8))
        for part, given in zip(layer.parts, parts, strict=True):
            assert torch.equal(part.codes.float(), given.codes)
            torch.testing.assert_close(part.dequantize(), given.dequantize(), rtol=3e-7, atol=0)
            assert n_bits_needed(part.codes) <= n_bits
            assert part.scale.shape == ((5, 1, 1, 1) if per_channel else ())


@pytest.mark.parametrize("codes", [[128.0, 0.0], [-129.0, 3.0], [0.5, 1.0]])
def test_weights_off_the_grid_are_refused(codes):
    part = OnGrid(torch.tensor([codes]), torch.tensor(0.1))
    with pytest.raises(ValueError, match="on no grid of 8 bits or fewer"):
        make_integer_layer([part], None, Grid(0.1, 0, 8))


def test_a_layer_whose_weight_has_no_integers_is_named():
    graph = folded(small_net())
    grids, parts = make_grids(graph, images(), 4), make_parts(graph, 4)
    with pytest.raises(ValueError, match="conv2: its quantizer returns floats only"):
        IntegerNetwork.from_graph(graph, grids, parts | {"conv2": None})
    wide = {"conv2": reference.uniform_parts(graph.get_buffer("conv2.weight"), 12)}
    with pytest.raises(ValueError, match="conv2: its weights are on no grid of 8 bits"):
        IntegerNetwork.from_graph(graph, grids, parts | wide)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_bias_fits_into_int32_whatever_the_weights_of_its_channel(per_channel):
    w = torch.tensor([[1.0, -0.5], [1e-20, 1e-21], [0.0, 0.0], [0.0, 0.0]])
    bias = torch.tensor([0.3, -0.7, 0.2, 0.0])
    layer = make_integer_layer(reference.uniform_parts(w, 8, per_channel), bias, Grid(0.01, 0, 8))
    assert layer.bias.abs().max() <= 1.001 * MAX_BIAS
    atol = 1e-4 if per_channel else layer.product_scale(layer.parts[0]).item() / 2
    torch.testing.assert_close(layer.dequantized_bias(), bias, rtol=0, atol=atol)
    torch.testing.assert_close(total(layer.parts), w, rtol=0, atol=0.01)


def test_a_bias_is_on_the_grid_of_products():
    net, x = small_net(), images()
    integer_net, graph, _ = quantize(net, x, 4, 4)
    rounded = with_integers(graph, integer_net.integers())
    for name, layer in integer_net.integers().items():
        scale = layer.in_grid.scale * layer.parts[0].scale.double()
        bias = rounded.get_buffer(f"{name}.bias").double()
        torch.testing.assert_close(bias / scale, (bias / scale).round(), rtol=0, atol=1e-4)
        assert (bias - net.get_submodule(name).bias).abs().max() <= scale.item() / 2 + 1e-7


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_codes_are_packed_one_after_the_other(n_bits):
    low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1)
    codes = torch.randint(low, high, (3, 7), generator=torch.Generator().manual_seed(0))
    codes[0, :2] = torch.tensor([low, high - 1])
    packed = pack(codes.to(torch.int8), n_bits)
    assert packed.nbytes == -(-21 * n_bits // 8)
    number = int.from_bytes(packed.tobytes(), "little")
    unsigned = [number >> (n_bits * i) & (2**n_bits - 1) for i in range(21)]
    assert [code + low for code in unsigned] == codes.flatten().tolist()


@pytest.mark.parametrize("scheme", ["uniform", "pwlq"])
def test_the_loader_of_the_page_reads_the_integers(tmp_path, scheme):
    pytest.importorskip("safetensors", reason="requirements-export.txt is not installed")
    net, x = small_net(), images()
    integer_net, graph, _ = quantize(net, x, 3, 4, scheme, per_channel=True)
    path = tmp_path / "net.safetensors"
    save_integers(integer_net.integers(), {"bits": "3"}, path)
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(block, names)
    state = names["load"](str(path))
    expected = with_integers(graph, integer_net.integers()).state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(state[key], value, rtol=1e-6, err_msg=key)


# --- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("n_bits", [4, 8])
def test_every_operation_is_that_of_integers_in_64_bits(n_bits, per_channel):
    net, x = small_net(), images(3)
    integer_net, *_ = quantize(net, x, n_bits, n_bits, per_channel=per_channel)
    values = integer_net.values(x)
    first, shrink, second, pool, *_, last = integer_net.operations[1:]
    assert [s.name for s in (first, shrink, second, pool, last)] == [
        "conv1",
        "shrink",
        "conv2",
        "pool",
        "classifier",
    ]
    for layer in (first, second):
        total = reference.integer_layer(
            values[layer.sources[0]],
            layer.in_grids[0].zero_point,
            layer.integers.parts[0].codes,
            layer.integers.bias,
            padding=1,
            stride=2 if layer is second else 1,
        )
        scale = np.float32(layer.in_grids[0].scale) * layer.integers.parts[0].scale.numpy()
        factor = scale / np.float32(layer.out_grid.scale)
        real = np.rint(total.numpy().astype(np.float32) * factor.reshape(-1, 1, 1))
        codes = np.clip(real, 0, 2**n_bits - 1)
        np.testing.assert_array_equal(values[layer.name].numpy(), codes)
    assert first.in_grids[0].zero_point == 2 ** (n_bits - 1) and second.in_grids[0].zero_point == 0
    pooled = values["conv2"].sum(dim=(2, 3), keepdim=True).numpy()
    factor = np.float32(pool.in_grids[0].scale) / np.float32(
        pool.out_grid.scale * values["conv2"][0, 0].numel()
    )
    codes = np.clip(np.rint(pooled * factor), 0, 2**n_bits - 1)
    np.testing.assert_array_equal(values["pool"].numpy(), codes)
    product = values[last.sources[0]].long() @ last.integers.parts[0].codes.long().T
    total = (product + last.integers.bias).float()
    scale = last.in_grids[0].scale * last.integers.parts[0].scale.flatten()
    torch.testing.assert_close(values["classifier"], total * scale, rtol=1e-6, atol=0)
    assert torch.equal(values["classifier"], integer_net(x)[0])


@pytest.mark.parametrize(("scheme", "per_channel"), [("uniform", True), ("pwlq", False)])
def test_integers_do_what_quantized_floats_do(scheme, per_channel):
    net, x = small_net(), images(64)
    integer_net, graph, grids = quantize(net, x, 6, 8, scheme, per_channel)
    floats = with_integers(graph, integer_net.integers())
    floats = with_inputs(floats, {name: grid.round for name, grid in grids.items()})
    with torch.no_grad():
        simulated, exact = floats(x), integer_net(x)[0]
    assert ((simulated - exact).abs() > 1e-5 * simulated.abs().max()).float().mean() < 0.05
    torch.testing.assert_close(simulated, exact, rtol=0, atol=0.02 * simulated.abs().max().item())


class Reading(Small):
    """The small network with another middle; `change` is given the network and its input."""

    def __init__(self, change):
        super().__init__()
        self.change, self.norm = change, nn.BatchNorm2d(8)

    def forward(self, x):
        return self.classifier(self.change(self, x))


def pooled(net, x):
    return net.pool(net.conv2(x)).flatten(1)


UNSUPPORTED = {
    "tanh": (lambda net, x: pooled(net, net.conv1(x).tanh()), "the network calls tanh, which"),
    "silu": (lambda net, x: pooled(net, F.silu(net.conv1(x))), "the network calls silu, which"),
    "several": (
        lambda net, x: pooled(net, F.gelu(net.conv1(x)).sigmoid()),
        r"calls gelu, which has no integer form \(nor can be exported: sigmoid\)",
    ),
    "flatten": (
        lambda net, x: net.pool(net.conv2(net.conv1(x))).flatten(2).mean(2),
        "pool_2: only means over all pixels",
    ),
    "number": (lambda net, x: pooled(net, net.shrink(net.conv1(x)) * 0.1), "calls mul"),
    "constant": (lambda net, x: pooled(net, net.conv1(x) + 1), "add: only sums of two tensors"),
    "alpha": (
        lambda net, x: pooled(net, torch.add(net.conv1(x), net.conv1(x), alpha=2)),
        "add: only sums of two tensors",
    ),
    "norm": (
        lambda net, x: net.pool(net.norm(F.relu(net.conv2(net.conv1(x))))).flatten(1),
        "norm calls batch_norm, which is not right behind a layer",
    ),
    "divisible": (
        lambda net, x: F.adaptive_avg_pool2d(net.conv2(net.conv1(x)), 4).mean((2, 3)),
        "pool: pooling of 6 × 6 to 4 × 4 pixels",
    ),
    "windows": (
        lambda net, x: F.avg_pool2d(
            net.conv2(net.conv1(x)), 6, 4, 1, count_include_pad=False
        ).flatten(1),
        "pool: average pooling of windows that differ",
    ),
    "bounds": (
        lambda net, x: pooled(net, F.pad(net.conv1(x), (1, 1)).clamp(0.5, 2)),
        "conv1: what reads its output does not quantize it",
    ),
    "reflection": (
        lambda net, x: pooled(net, F.pad(net.conv1(x), (1, 1, 1, 1), mode="reflect")),
        "pad: only padding by zeros",
    ),
    "matmul": (
        lambda net, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).flatten(1)[:, :8],
        "the network calls matmul, which multiplies two quantized values",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
@pytest.mark.sampled(3)
def test_what_has_no_integer_form_is_named(case):
    torch.manual_seed(0)
    change, message = UNSUPPORTED[case]
    net, x = Reading(change).eval(), images(2)
    with pytest.raises(NetworkError, match=message) as caught:
        quantize(net, x, 4, 4)
    assert "\n" not in str(caught.value)


def test_a_value_that_is_quantized_for_one_layer_and_read_by_another_is_refused():
    class Branching(Small):
        def forward(self, x):
            x = F.relu(self.conv1(x))
            return self.classifier(self.pool(self.conv2(x)).flatten(1)) + x.mean((2, 3))[:, :4]

    torch.manual_seed(0)
    graph = folded(Branching().eval())
    grids, parts = make_grids(graph, images(2), 4), make_parts(graph, 4)
    for other in ({}, {"pool_2": Grid(0.1, 0, 4)}):
        changed = {k: v for k, v in grids.items() if k != "pool_2"} | other
        with pytest.raises(NetworkError, match="pool_2: its input is quantized for another layer"):
            IntegerNetwork.from_graph(graph, changed, parts)


def test_an_input_that_only_the_simulation_quantizes_is_refused():
    _, graph, grids = quantize(small_net(), images(2), 4, 4)
    grids["add[0]"] = Grid(0.1, 0, 4)
    with pytest.raises(NetworkError, match=r"no operation quantizes add\[0\]"):
        IntegerNetwork.from_graph(graph, grids, make_parts(graph, 4))


def test_packed_metadata_is_json(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="requirements-export.txt")
    integer_net, *_ = quantize(small_net(), images(), 4, 4)
    save_integers(integer_net.integers(), {"bits": "4"}, tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", "np") as file:
        layers = json.loads(file.metadata()["layers"])
    assert layers["conv1"]["shape"] == [6, 3, 3, 3] and layers["conv1"]["bits"] == [4]
    assert layers["conv1"]["input_zero_point"] == 8


# --- faults that --verify finds --------------------------------------------------------------


def changed(integer_net, name, **fields):
    """Return the network with other fields of one operation."""
    operations = [
        replace(each, **fields) if each.name == name else each for each in integer_net.operations
    ]
    return IntegerNetwork(operations, integer_net.output, integer_net.values_of)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["conv1", "conv2", "classifier"])
def test_a_code_or_a_bias_that_is_off_by_one_is_found(name, scheme):
    integer_net, graph, _ = quantize(small_net(), images(), 4, 4, scheme, per_channel=True)
    assert first_disagreement(integer_net, graph, images()) is None
    layer = integer_net.integers()[name]
    first, *others = layer.parts
    codes, bias = first.codes.clone(), layer.bias.clone()
    codes.view(-1)[3] += 1
    bias[1] += 1
    for fault in ({"parts": (replace(first, codes=codes), *others)}, {"bias": bias}):
        wrong = changed(integer_net, name, integers=replace(layer, **fault))
        found = first_disagreement(wrong, graph, images())
        assert found == f"{name}: its integers are not those of its quantized weights and bias"


def shifted(x, w, bias, *geometry):
    return F.conv2d(x, w, bias, *geometry).roll(1, 3)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("conv1", {"product": shifted}),
        ("conv2", {"bounds": (0.0, 0.1)}),
        ("shrink", {"function": lambda x: F.avg_pool2d(x, 2)}),
        ("pool", {"in_grids": (Grid(0.01, 0, 4),)}),
    ],
)
def test_an_operation_that_is_read_wrongly_is_found(name, fields):
    integer_net, graph, _ = quantize(small_net(), images(), 4, 4)
    found = first_disagreement(changed(integer_net, name, **fields), graph, images())
    assert found.startswith(f"{name}: its integers differ") and "\n" not in found
