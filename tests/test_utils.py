import argparse
import random

import fork_server
import numpy as np
import pytest
import torch
from torch import nn

import utils
from engine.networks import layers
from engine.system import cli, hardware
from models import MODELS


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("default", 10, [5, 8]),
        ("default", 60, [30, 50]),
        ("halfway", 25, [12]),
        ("fixed", 110, [25, 50]),
        ("default", 2, [1]),
        ("default", 1, []),
        ("halfway", 1, []),
        ("6", 9, [6]),
        ("2,6,8", 9, [2, 6, 8]),
        ("6,8", 7, [6]),
    ],
)
def test_multistep_multiplies_the_rate_at_the_milestones(name, n, expected):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0)
    scheduler = utils.make_scheduler("multistep", optimizer, 0.1, name, n)
    rates = []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected_rates = [0.1 ** sum(epoch >= m for m in expected) for epoch in range(n)]
    assert rates == pytest.approx(expected_rates)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("none", [1, 1, 1, 1]), ("cosine", [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])],
)
def test_schedules_that_have_no_gamma(name, expected):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0)
    scheduler = utils.make_scheduler(name, optimizer, 0.1, "default", 4)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("text", ["6,", "8,6", "6,6", "0,6", "-1", "6, 8", "late", "", "6;8"])
def test_milestones_are_a_name_or_rising_epochs(text):
    with pytest.raises(argparse.ArgumentTypeError, match="epochs"):
        utils.parse_milestones(text)
    assert (
        utils.parse_milestones("06,8") == "6,8" and utils.parse_milestones("HALFWAY") == "halfway"
    )


def test_values_in_any_case_come_back_as_they_are_spelt():
    parse = cli.choice_ignoring_case(["CIFAR10", "Synthetic"])
    assert parse("cifar10") == "CIFAR10" and parse("SYNTHETIC") == "Synthetic"
    with pytest.raises(argparse.ArgumentTypeError, match="choose CIFAR10, Synthetic"):
        parse("cifar")


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        assert hardware.resolve_precision("auto", "cpu") == dtype
    assert hardware.resolve_precision("fp32", "cpu") == torch.float32
    assert hardware.resolve_precision("bf16", "cpu") == torch.bfloat16


def free_again_and_again():
    import resource

    if not hardware.tune_glibc_malloc():
        return

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    for _ in range(16):  # until the blocks lie as they will
        torch.ones(2**23)
    before = faults()
    for _ in range(20):
        torch.ones(2**23)
    assert faults() - before < 2**15, faults() - before  # else 20 times 2**13 pages


def test_freed_memory_is_kept_and_reused(tmp_path):
    done = fork_server.call(free_again_and_again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_seed_everything_seeds_every_stream():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    utils.seed_everything(3)
    first = draw()
    utils.seed_everything(3)
    assert draw() == first


def test_penalized_weights_are_those_of_convolutions_and_linear_layers_in_order():
    net = MODELS["ConvNet"]()
    names = {id(p): name for name, p in net.named_parameters()}
    assert [names[id(w)] for w in layers.penalized_weights(net)] == [
        *(f"layer{i}.0.weight" for i in range(9)),
        "classifier.weight",
    ]
