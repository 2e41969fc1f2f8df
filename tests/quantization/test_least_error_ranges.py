"""Ranges of activations of least squared error: `--calibration mse`."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import quant_inference as qi
import quant_utils as qu
from engine.networks.export import export_network
from engine.networks.graph import with_inputs
from engine.networks.layers import Add
from engine.quantization import activations
from engine.quantization.activations import (
    activation_errors,
    calibrate,
    least_error_ranges,
    minmax,
    quantized_inputs,
)
from engine.quantization.grids import activation_grid
from engine.system.io import save_weights


class Residual(nn.Module):
    """Signed inputs (images and what is added), unsigned ones (after the ReLU), and a sum."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.add, self.pool = nn.ReLU(), Add(), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.add(x, self.bn2(self.conv2(x)))
        return self.classifier(self.pool(x).flatten(1))


def residual(seed=0):
    torch.manual_seed(seed)
    return Residual().eval()


def slow_ranges(graph, batches, n_bits, layer_bits):
    """Range by range: every recorded value is rounded, and the errors are added up."""
    seen = {}

    def keep(name, x):
        seen.setdefault(name, []).append(x.detach().double().flatten())
        return x

    names = quantized_inputs(graph, sums=True)
    recording = with_inputs(graph, {name: lambda x, name=name: keep(name, x) for name in names})
    with torch.no_grad():
        for x in batches:
            recording(x)
    best = {}
    for name, values in seen.items():
        x, bits = torch.cat(values), layer_bits.get(name, n_bits)
        low, high = x.min().item(), x.max().item()
        errors = {}
        for i in range(80):
            f = 1 - i / 100
            if low >= 0:
                s = f * high / (2**bits - 1)
                x_int = (x / s).round().clamp(0, 2**bits - 1)
            else:
                s = f * max(high, -low) / (2 ** (bits - 1) - 0.5)
                x_int = (x / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            errors[f] = (x_int * s - x).square().sum().item()
        f = min(errors, key=errors.get)
        best[name] = (f * low, f * high)
    return best


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.sampled(2)
def test_ranges_are_those_of_a_loop_over_ranges_and_values(n_bits):
    graph, layer_bits = export_network(residual(n_bits), (3, 8, 8)), {"conv1": 8}
    batches = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(n_bits))
    batches[2] *= 3  # the batches differ: their ranges are no mean of each one's own
    extremes = calibrate(graph, batches, "mse", sums=True)
    assert extremes == calibrate(graph, batches, "minmax", sums=True)
    ranges = least_error_ranges(graph, batches, extremes, n_bits, layer_bits)
    expected = slow_ranges(graph, batches, n_bits, layer_bits)
    names = {"conv1", "conv2", "add[0]", "add[1]", "pool", "classifier"}
    assert ranges.keys() == expected.keys() == names
    for name, limits in expected.items():
        assert ranges[name] == pytest.approx(limits, rel=1e-6), name
    assert ranges["conv2"][0] == 0 > ranges["add[1]"][0]
    assert any(ranges[name] != extremes[name] for name in ranges) or n_bits == 8


@st.composite
def values(draw):
    """Float32 values with ties, zeros and outliers, of either sign or not."""
    elements = st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
    x = draw(arrays("float32", draw(st.integers(1, 60)), elements=elements))
    x = np.abs(x) if draw(st.booleans()) else x
    return torch.from_numpy(x) ** draw(st.sampled_from([1, 3])) * 10.0 ** draw(st.integers(-6, 6))


@cache
def with_one_input():
    """A network whose values are all quantized as one input, called "0"."""
    return export_network(nn.Sequential(nn.Conv2d(1, 1, 1)), (1, 1, 2))


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(x=values(), n_bits=st.integers(2, 9))
def test_no_more_error_than_with_the_extremes(x, n_bits):
    extremes = minmax(x)
    graph = with_one_input()
    found = least_error_ranges(graph, [x[None, None, None]], {"0": extremes}, n_bits)["0"]
    m = max(-extremes[0], extremes[1]) or 1.0
    errors = []
    for limits in (found, extremes):
        x_q = activation_grid(n_bits, *limits).round(x.double())
        errors.append(((x_q - x) / m).square().sum().item())
    assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-13
    assert (found[0] < 0) == (extremes[0] < 0)
    assert all(abs(f) <= abs(e) for f, e in zip(found, extremes, strict=True))


@settings(max_examples=25, deadline=None)
@given(x=values(), n_bits=st.integers(2, 8))
def test_errors_are_those_of_rounding_every_value(x, n_bits):
    extremes = minmax(x)
    errors = activation_errors(x, n_bits, extremes)
    x = x.double()
    for factor, error in zip(qu.RANGE_FACTORS, errors.tolist(), strict=True):
        x_q = activation_grid(n_bits, *(factor * limit for limit in extremes)).round(x)
        slow = (x_q - x).square().sum().item()
        assert error == pytest.approx(slow, rel=1e-9, abs=1e-12 * x.square().sum().item())


def test_values_that_are_all_zero_keep_their_range():
    errors = activation_errors(torch.zeros(5), 4, (0.0, 0.0))
    assert torch.equal(errors, torch.zeros(80, dtype=torch.float64))


# --- in a run --------------------------------------------------------------------------------

TINY = "--model Residual --dataset Tiny --device cpu --schemes uniform --no_plots".split()


@pytest.fixture
def residual_file(monkeypatch, tmp_path, tiny_images):
    """Weights of the network in an empty folder."""
    import models

    monkeypatch.setitem(models.MODELS, "Residual", Residual)
    monkeypatch.chdir(tmp_path)
    save_weights(residual(), Path("a.pt"))
    return "a.pt"


def quantize(file, flags):
    with pytest.raises(SystemExit) as caught:
        qi.main([file, *TINY, *flags.split()])
    assert caught.value.code == 0
    return json.loads(Path("results.json").read_text())["rows"]


def test_bits_have_ranges_of_their_own_and_the_plan_shows_them(residual_file, capsys):
    flags = "--calibration mse --calibration_images 70 --quantize_sums --keep_first_last"
    both = quantize(residual_file, f"{flags} --bits 3 4 --act_bits 3 4 --show_plan")
    rows = {
        line.split()[0]: line.split("  ")[-1].strip()
        for line in capsys.readouterr().out.splitlines()
        if line.split()[1:2] == ["input"]
    }
    assert rows["conv1"].count("/") == rows["classifier"].count("/") == 0  # 8 bits in both
    assert rows["conv2"].startswith("0 … ") and rows["conv2"].count("/") == 1
    assert rows["add[1]"].startswith("±") and rows["add[1]"].count("/") == 1
    for act_bits in (3, 4):  # as if it were alone
        alone = quantize(residual_file, f"{flags} --bits 3 4 --act_bits {act_bits}")
        assert alone[1:] == [row for row in both[1:] if row["act_bits"] == act_bits]
    extremes = quantize(residual_file, f"{flags} --bits 3 --act_bits 3".replace("mse", "minmax"))
    assert extremes[1]["loss"] != both[1]["loss"]


def test_other_rules_calibrate_once(residual_file, monkeypatch):
    calls, calibrate = [], activations.calibrate
    monkeypatch.setattr(activations, "calibrate", lambda *a: calls.append(a) or calibrate(*a))
    monkeypatch.setattr(activations, "least_error_ranges", None)
    quantize(residual_file, "--bits 3 4 --act_bits same 8 --calibration minmax")
    assert len(calls) == 1


def test_an_exported_network_agrees_with_its_simulation(residual_file):
    pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
    flags = "--fold_bn --bits 4 --act_bits 4 --quantize_sums --calibration mse"
    quantize(residual_file, f"{flags} --export a.onnx --verify")
    found = json.loads(Path("a.verified.json").read_text())
    assert found["differing_predictions"]["integer"] == 0
    assert found["source"]["calibration"] == "mse of 96 images"
