"""Winograd's convolutions against PyTorch's own, alone and in whole steps."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_scripts import FLAGS
from torch import nn

import train
from engine.networks import winograd
from engine.networks.fast_layers import plain_copy, use_fast_layers
from engine.step.gradients import compute_gradients
from engine.training.checkpoints import load_checkpoint, save_checkpoint
from regularizers import make_regularizer

LAST = torch.channels_last
GEOMETRY = (1, 1), (1, 1), (1, 1), 1


@pytest.fixture
def _everywhere(monkeypatch):
    """Use them on any processor, for any number of channels."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: winograd.CAPABILITY)
    for name in ("MIN_CHANNELS", "MIN_PIXELS", "MIN_CHANNEL_PAIRS", "MIN_PIXELS_OF_PAIRS"):
        monkeypatch.setattr(winograd, name, 1)
    assert winograd.set_winograd(True)
    yield
    winograd.set_winograd(False)


def torchs_own(x, w, gy):
    """Return what PyTorch computes: outputs, and the adjoints in x and w."""
    stride, padding, dilation, groups = GEOMETRY
    adjoints = torch.ops.aten.convolution_backward(
        gy, x, w, None, stride, padding, dilation, False, (0, 0), groups, (True, True, False)
    )
    return F.conv2d(x, w, None, *GEOMETRY), *adjoints[:2]


@pytest.mark.parametrize("images_at_once", [1, 2, 100])
@pytest.mark.parametrize("shape", [(5, 3, 7, 4, 6), (3, 8, 2, 2, 2), (1, 1, 1, 8, 2)], ids=str)
def test_they_are_exact(shape, images_at_once, monkeypatch):
    n, c_in, c_out, height, width = shape
    x = torch.randn(n, c_in, height, width, dtype=torch.float64).to(memory_format=LAST)
    gy = torch.randn(n, c_out, height, width, dtype=torch.float64)  # as a sum's, in any layout
    w = torch.randn(c_out, c_in, 3, 3, dtype=torch.float64)
    most = 4 * max(c_in, c_out) * height * width
    monkeypatch.setattr(winograd, "MAX_TILE_VALUES", images_at_once * most)
    ours = winograd.conv2d(x, w), winograd.input_adjoint(gy, w), winograd.weight_adjoint(gy, x)
    for value, true in zip(ours, torchs_own(x, w, gy), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-12)
        assert value.is_contiguous(memory_format=LAST)


def test_float32_is_rounded_no_more_than_in_torchs_own():
    """The weight adjoint at most twice as far from float64 as PyTorch's; the others closer."""
    x, gy = torch.randn(2, 16, 64, 8, 8).unbind()
    x, gy, w = x.to(memory_format=LAST), gy.to(memory_format=LAST), torch.randn(64, 64, 3, 3) / 30
    ours = winograd.conv2d(x, w), winograd.input_adjoint(gy, w), winograd.weight_adjoint(gy, x)
    true, theirs = torchs_own(x.double(), w.double(), gy.double()), torchs_own(x, w, gy)
    for a, b, c, times in zip(ours, theirs, true, (1, 1, 2), strict=True):
        assert (a - c).norm() < times * (b - c).norm()


@pytest.mark.parametrize("regularizer", ["none", "L1Grad", "L2Grad"])
@pytest.mark.usefixtures("_everywhere")
def test_a_step_has_the_same_gradients(regularizer, monkeypatch):
    """In float64, and each of the kernels takes part; strided and odd-sized ones are PyTorch's."""
    calls = []
    for name in ("conv2d", "input_adjoint", "weight_adjoint"):
        kernel = getattr(winograd, name)
        monkeypatch.setattr(
            winograd, name, lambda *args, f=kernel, n=name: (calls.append(n), f(*args))[1]
        )
    sizes, layers = [(3, 4, 1), (4, 6, 1), (6, 4, 2), (4, 4, 1), (4, 4, 2), (4, 4, 1)], []
    for c_in, c_out, stride in sizes:  # maps of 12, 12, 6, 6, 3 and 3 pixels
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    net = use_fast_layers(net.to(memory_format=LAST))
    plain = plain_copy(net)
    x = torch.randn(6, 3, 12, 12, dtype=torch.float64).to(memory_format=LAST)
    y, reg = torch.randint(5, (6,)), make_regularizer(regularizer, 0.1)
    compute_gradients(net, nn.CrossEntropyLoss(), reg, x, y, torch.float64)
    assert set(calls) == {"conv2d", "input_adjoint", "weight_adjoint"}
    assert calls.count("weight_adjoint") == (3 if regularizer == "none" else 8)  # of 3 layers
    calls.clear()
    compute_gradients(plain, nn.CrossEntropyLoss(), reg, x, y, torch.float64)
    assert not calls
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_everywhere")
def test_what_it_is_not_for(monkeypatch):
    """Other devices and processors, layouts, types, sizes and geometries; few channels."""
    x, w = torch.randn(2, 4, 6, 6).to(memory_format=LAST), torch.randn(4, 4, 3, 3)
    assert winograd.is_faster(x, w, GEOMETRY)
    strided = (2, 2), (1, 1), (1, 1), 1
    for images, weights, geometry in [
        (x.contiguous(), w, GEOMETRY),
        (x.bfloat16(), w, GEOMETRY),
        (x[:, :, :5].contiguous(memory_format=LAST), w, GEOMETRY),
        (x, w[:, :, :1], GEOMETRY),
        (x, w, strided),
        (x.to("meta"), w, GEOMETRY),
    ]:
        assert not winograd.weight_adjoint_is_faster(images, weights, geometry)
        assert not winograd.is_faster(images, weights, geometry)
    for name, limit, is_for_all in [
        ("MIN_CHANNELS", 4, True),
        ("MIN_PIXELS", 2 * 36, True),
        ("MIN_CHANNEL_PAIRS", 16, False),
        ("MIN_PIXELS_OF_PAIRS", 2 * 36, False),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(winograd, name, limit)
            assert winograd.is_faster(x, w, GEOMETRY)
            assert winograd.weight_adjoint_is_faster(x, w, GEOMETRY)
            patch.setattr(winograd, name, limit + 1)
            assert not winograd.is_faster(x, w, GEOMETRY)
            assert winograd.weight_adjoint_is_faster(x, w, GEOMETRY) != is_for_all
    assert not winograd.set_winograd(True, "cuda:0")


def test_no_processor_of_another_kind_uses_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not winograd.set_winograd(True)


@pytest.mark.usefixtures("_everywhere")
def test_to_ask_whether_it_is_used_changes_nothing():
    """A resumed run asks after it has read its checkpoint; `spectral_norm` changes when read."""
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3, padding=1)))
    before = copy.deepcopy(net.state_dict())
    assert winograd.may_be_used_by(net, torch.float32, LAST)
    assert all(torch.equal(before[key], t) for key, t in net.state_dict().items())


@pytest.mark.usefixtures("_everywhere")
@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ("", True),
        ("--winograd auto", True),
        ("--winograd off", False),
        ("--precision bf16", False),
        ("--memory_format contiguous", False),
    ],
)
def test_the_plan_says_whether_it_is_used(flags, used, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixed = [*FLAGS, "--model", "TinyFused", "--n_epochs", "1"]
    train.main([*fixed, *flags.split()])
    assert ("wide convolutions by Winograd's algorithm" in plan()) == used


def plan():
    return json.loads(Path("r.json").read_text())["settings"]["plan"]


@pytest.mark.slow
@pytest.mark.usefixtures("_everywhere")
def test_a_run_that_goes_on_keeps_its_kernels(tmp_path, monkeypatch):
    """Checkpoints from before there was a choice are of PyTorch's own."""
    monkeypatch.chdir(tmp_path)
    fixed = [*FLAGS, "--model", "TinyFused"]
    for name, used in {"new": True, "off": False, "old": False}.items():
        flags = ["--run_name", name, "--save_file", "r"]
        begin = ["--n_epochs", "1", "--winograd", "off" if name == "off" else "auto"]
        train.main([*fixed, *flags, *begin])
        if name == "old":
            checkpoint = load_checkpoint(Path("r.ckpt"))
            del checkpoint["settings"]["winograd"]
            save_checkpoint(checkpoint, Path("r.ckpt"))
        train.main([*fixed, *flags, "--n_epochs", "2", "--resume"])
        assert ("Winograd" in plan()) == used
