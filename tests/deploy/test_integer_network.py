import json
import re
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

import quant_utils as qu
from engine.deploy.integer_layers import (
    MAX_BIAS,
    Grid,
    make_grid,
    make_integer_layer,
    n_bits_needed,
    weight_codes,
    with_integers,
)
from engine.deploy.integer_network import build, shared_ranges
from engine.deploy.packing import pack, save_integers, unpack
from engine.networks.graph import Call, NetworkGraph, trace
from engine.networks.layers import quantizable_layers
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


def quantize(net, x, n_bits, act_bits, scheme="uniform", per_channel=False, sums=True):
    """Return the network in integers, its quantized weights in floats, and the ranges."""
    graph = trace(net, x[:2])
    ranges = shared_ranges(graph, qu.calibrate(net, [x], "minmax", sums))
    grids = {name: make_grid(*qu.activation_grid(act_bits, *r)) for name, r in ranges.items()}
    options = {"per_channel": per_channel}
    parts = {
        name: qu.pwlq_parts(layer.weight, n_bits, **options)
        if scheme == "pwlq"
        else (qu.QUANTIZERS[scheme](layer.weight, n_bits, **options),)
        for name, layer in quantizable_layers(net).items()
    }
    integers = {
        name: make_integer_layer(of_layer, net.get_submodule(name).bias, grids[name], per_channel)
        for name, of_layer in parts.items()
    }
    return build(graph, grids, integers), ranges


# --- integers --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("n_bits", [2, 3, 4, 6, 8])
def test_codes_are_those_of_the_quantizer(n_bits, per_channel):
    w = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(n_bits))
    options = {"per_channel": per_channel}
    fine, coarse = qu.pwlq_parts(w, n_bits, **options)
    torch.testing.assert_close(
        fine + coarse, qu.pwlq(w, n_bits, overlapping=True, **options), rtol=0, atol=0
    )
    for w_q in (qu.uniform(w, n_bits, **options), fine, coarse):
        found = weight_codes(w_q, per_channel)
        torch.testing.assert_close(found.dequantize(), w_q, rtol=3e-7, atol=0)
        assert n_bits_needed(found.codes) <= n_bits
        assert found.scale.shape == ((5,) if per_channel else (1,))


def test_weights_off_the_grid_are_refused():
    w = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    w_q = qu.mean_correction(w, qu.uniform(w, 4))
    with pytest.raises(ValueError, match="not on one uniform grid"):
        weight_codes(w_q, per_channel=False)
    with pytest.raises(ValueError, match="not on one uniform grid"):
        weight_codes(qu.uniform(w, 12), per_channel=False)
    assert weight_codes(qu.dorefa(w, 4, generator=torch.Generator().manual_seed(0)), False)


def test_a_bias_fits_into_int32_whatever_the_weights_of_its_channel():
    w = torch.tensor([[1.0, -0.5], [1e-20, 1e-21], [0.0, 0.0], [0.0, 0.0]])
    bias = torch.tensor([0.3, -0.7, 0.2, 0.0])
    grid = Grid(0.01, 0, 8)
    layer = make_integer_layer([qu.uniform(w, 8, per_channel=True)], bias, grid, True)
    assert layer.bias.abs().max() <= 1.001 * MAX_BIAS
    torch.testing.assert_close(layer.dequantized_bias(), bias, rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.weight(), w, rtol=0, atol=0.01)


def test_a_bias_is_on_the_grid_of_products():
    net, x = small_net(), images()
    integer_net, _ = quantize(net, x, 4, 4)
    rounded = with_integers(net, integer_net.integers())
    for name, layer in integer_net.integers().items():
        step = layer.in_grid.scale * layer.parts[0].scale.double()
        bias = rounded.get_submodule(name).bias.double()
        torch.testing.assert_close(bias / step, (bias / step).round(), rtol=0, atol=1e-4)
        assert (bias - net.get_submodule(name).bias).abs().max() <= step.item() / 2 + 1e-7


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_packing_is_undone(n_bits):
    low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1)
    codes = torch.randint(low, high, (3, 7), generator=torch.Generator().manual_seed(0))
    codes[0, :2] = torch.tensor([low, high - 1])
    packed = pack(codes.to(torch.int8), n_bits)
    assert packed.nbytes == -(-21 * n_bits // 8)
    np.testing.assert_array_equal(unpack(packed, n_bits, 21).reshape(3, 7), codes)


@pytest.mark.parametrize("scheme", ["uniform", "pwlq"])
def test_the_loader_of_the_page_reads_the_integers(tmp_path, scheme):
    pytest.importorskip("safetensors", reason="requirements-export.txt is not installed")
    net, x = small_net(), images()
    integer_net, _ = quantize(net, x, 3, 4, scheme, per_channel=True)
    path = tmp_path / "net.safetensors"
    save_integers(integer_net.integers(), {"bits": "3"}, path)
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(block, names)
    state = names["load"](str(path))
    expected = with_integers(net, integer_net.integers()).state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(state[key], value, rtol=1e-6, err_msg=key)


# --- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("n_bits", [4, 8])
def test_every_step_is_that_of_integers_in_64_bits(n_bits, per_channel):
    net, x = small_net(), images(3)
    integer_net, _ = quantize(net, x, n_bits, n_bits, per_channel=per_channel)
    values = integer_net.values(x)
    first, shrink, second, pool, *_, last = [s for s in integer_net.steps if s.name in values][1:]
    assert [s.name for s in (first, shrink, second, pool, last)] == [
        "conv1",
        "shrink",
        "conv2",
        "pool",
        "classifier",
    ]
    for layer in (first, second):
        total = reference.integer_layer(
            values[layer.source],
            layer.in_grid.zero_point,
            layer.integers.parts[0].codes,
            layer.integers.bias,
            padding=1,
            stride=layer.module.stride[0],
        )
        scale = np.float32(layer.in_grid.scale) * layer.integers.parts[0].scale.numpy()
        factor = scale / np.float32(layer.out_grid.scale)
        real = np.rint(total.numpy().astype(np.float32) * factor.reshape(-1, 1, 1))
        codes = np.clip(real, 0, 2**n_bits - 1)
        np.testing.assert_array_equal(values[layer.name].numpy(), codes)
    assert first.in_grid.zero_point == 2 ** (n_bits - 1) and second.in_grid.zero_point == 0
    pooled = values["conv2"].sum(dim=(2, 3), keepdim=True).numpy()
    factor = np.float32(pool.in_grid.scale) / np.float32(
        pool.out_grid.scale * values["conv2"][0, 0].numel()
    )
    codes = np.clip(np.rint(pooled * factor), 0, 2**n_bits - 1)
    np.testing.assert_array_equal(values["pool"].numpy(), codes)
    product = values[last.source].long() @ last.integers.parts[0].codes.long().T
    total = (product + last.integers.bias).float()
    scale = last.in_grid.scale * last.integers.parts[0].scale
    torch.testing.assert_close(values["classifier"], total * scale, rtol=1e-6, atol=0)
    assert torch.equal(values["classifier"], integer_net(x)[0])


@pytest.mark.parametrize(("scheme", "per_channel"), [("uniform", True), ("pwlq", False)])
def test_integers_do_what_quantized_floats_do(scheme, per_channel):
    net, x = small_net(), images(64)
    integer_net, ranges = quantize(net, x, 6, 8, scheme, per_channel)
    floats = with_integers(net, integer_net.integers())
    qu.quantize_activations(floats, 8, ranges)
    with torch.no_grad():
        simulated, exact = floats(x), integer_net(x)[0]
    assert ((simulated - exact).abs() > 1e-5 * simulated.abs().max()).float().mean() < 0.05
    torch.testing.assert_close(simulated, exact, rtol=0, atol=0.02 * simulated.abs().max().item())


def test_calls_are_in_the_order_in_which_they_run():
    graph = trace(small_net(), images(2))
    kinds = "conv relu max_pool conv relu global_pool flatten linear"
    assert [call.kind for call in graph.calls] == kinds.split()
    assert graph.output == graph.calls[-1].output


class Unsupported(Small):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.classifier(self.change(self, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net, x: net.conv2(net.conv1(x)).mean(dim=(2, 3)), "calls mean"),
        (lambda net, x: net.pool(net.conv2(net.conv1(x).tanh())).flatten(1), "calls tanh"),
        (lambda net, x: net.pool(net.conv2(net.conv1(x))).flatten(2)[..., 0], "flatten"),
        (
            lambda net, x: net.pool(net.conv2(net.shrink(net.conv1(x)) * 0.1)).flatten(1),
            "calls mul",
        ),
    ],
)
def test_what_has_no_integer_step_is_named(change, message):
    torch.manual_seed(0)
    net, x = Unsupported(change).eval(), images(2)
    with pytest.raises(NetworkError, match=message):
        quantize(net, x, 4, 4)


def test_a_value_that_is_quantized_for_one_layer_and_read_by_another_is_refused():
    net, x = small_net(), images(2)
    integer_net, ranges = quantize(net, x, 4, 4)
    conv1, relu, *_ = trace(net, x).calls
    readers = (
        Call("conv", "conv2", net.conv2, (relu.output,), 8),
        Call("global_pool", "pool", net.pool, (relu.output,), 9),  # which has no grid
    )
    grids = {name: make_grid(*qu.activation_grid(4, *ranges[name])) for name in ("conv1", "conv2")}
    with pytest.raises(NetworkError, match="pool: its input is quantized for another layer"):
        build(NetworkGraph((conv1, relu, *readers), 8), grids, integer_net.integers())


def test_an_input_that_only_the_simulation_quantizes_is_refused():
    net, x = small_net(), images(2)
    integer_net, ranges = quantize(net, x, 4, 4)
    grids = {name: make_grid(*qu.activation_grid(4, *r)) for name, r in ranges.items()}
    grids["add[0]"] = Grid(0.1, 0, 4)
    with pytest.raises(NetworkError, match=r"no step quantizes add\[0\]"):
        build(trace(net, x), grids, integer_net.integers())


def test_packed_metadata_is_json(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="requirements-export.txt")
    integer_net, _ = quantize(small_net(), images(), 4, 4)
    save_integers(integer_net.integers(), {"bits": "4"}, tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", "np") as file:
        layers = json.loads(file.metadata()["layers"])
    assert layers["conv1"]["shape"] == [6, 3, 3, 3] and layers["conv1"]["bits"] == [4]
    assert layers["conv1"]["input_zero_point"] == 8
