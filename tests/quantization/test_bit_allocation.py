import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deploy_script import FLAGS, main, onnx, tiny  # noqa: F401
from torch.nn import functional as F

import data
import models
import quant_utils as qu
from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms
from engine.networks.graph import layers, weights
from engine.quantization.bit_allocation import BIT_CHOICES, allocate_bits
from engine.quantization.weights import quantize_layer
from engine.system.io import torch_load

N_WEIGHTS = {"a": 162, "b": 432, "c": 80}


def mean(bits, n_weights):
    return sum(n_weights[k] * bits[k] for k in bits) / sum(n_weights.values())


def best_of_all(costs, n_weights, budget):
    """The least sum of costs, with every combination tried."""
    names = list(costs)
    combinations = (
        dict(zip(names, each, strict=True))
        for each in itertools.product(BIT_CHOICES, repeat=len(names))
    )
    kept = (bits for bits in combinations if mean(bits, n_weights) <= budget)
    return min(sum(costs[k][n] for k, n in bits.items()) for bits in kept)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1, 5), min_size=3 * len(BIT_CHOICES), max_size=3 * len(BIT_CHOICES)),
    st.floats(2, 9),
)
def test_the_choice_is_the_best_of_all_within_the_budget(costs, budget):
    n = len(BIT_CHOICES)
    rows = {k: costs[i * n : (i + 1) * n] for i, k in enumerate("abc")}
    costs = {k: dict(zip(BIT_CHOICES, row, strict=True)) for k, row in rows.items()}
    bits = allocate_bits(costs, N_WEIGHTS, budget)
    assert mean(bits, N_WEIGHTS) <= budget
    found = sum(costs[k][n] for k, n in bits.items())
    largest = max(abs(cost) for row in costs.values() for cost in row.values())
    assert found == pytest.approx(best_of_all(costs, N_WEIGHTS, budget), abs=1e-9 * largest)


@pytest.mark.slow
def test_more_layers_than_can_be_tried_one_by_one_are_as_good_as_a_bound():
    """Of 200 layers: no choice has less than the Lagrangian says."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(200, generator=generator).tolist()
    costs = {i: {n: s * 4.0**-n for n in BIT_CHOICES} for i, s in enumerate(scale)}
    n_weights = {i: 100 + 37 * i for i in costs}
    bits = allocate_bits(costs, n_weights, 4.5)
    assert 4.49 < mean(bits, n_weights) <= 4.5
    total = sum(n_weights.values())
    bound = max(
        sum(min(c + price * n_weights[i] * n for n, c in costs[i].items()) for i in costs)
        - price * 4.5 * total
        for price in torch.logspace(-12, 0, 600).double().tolist()
    )
    assert bound <= sum(costs[i][n] for i, n in bits.items()) <= bound * 1.01


def test_too_few_bits_are_a_value_error():
    costs = {k: dict.fromkeys(BIT_CHOICES, 1.0) for k in "abc"}
    with pytest.raises(ValueError, match="no choice of bits has a mean of 1.9"):
        allocate_bits(costs, N_WEIGHTS, 1.9)


# --- the command line ------------------------------------------------------------------------

MIXED = FLAGS.replace("--bits 4", "--budget_bits 4 --calibration_images 40")


def rows():
    return json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"]


def loss_of(graph):
    """The mean loss on the training images."""
    images = data.DATASETS["Synthetic"](None, 0)
    x = images.train_images / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    with torch.no_grad():
        return F.cross_entropy(graph((x - mean) / std), images.train_labels).item()


def test_layers_get_the_bits_of_the_least_rise_and_are_exported(tiny, capsys):  # noqa: F811
    assert main(f"{MIXED} --export net.onnx --verify --show_plan --per_channel") == 0
    printed = capsys.readouterr().out
    net = models.MODELS["Folding"]()
    net.load_state_dict(torch_load(Path("net.pt")))
    graph = fold_batch_norms(export_network(net.eval(), (3, 12, 12)))
    n_weights = {name: w.numel() for name, w in weights(graph).items()}
    full, rises = loss_of(graph), {}
    for name in layers(graph):
        rises[name] = {}
        for n_bits in BIT_CHOICES:
            changed = fold_batch_norms(graph)
            quantizer = partial(qu.uniform, per_channel=True)
            quantize_layer(changed, layers(changed)[name], quantizer, n_bits, bias_range=None)
            changed.recompile()
            rises[name][n_bits] = loss_of(changed) - full
    row = rows()[1]
    bits = {k: int(n) for k, n in (each.split(":") for each in row["layer_bits"].split())}
    assert bits.keys() == n_weights.keys() and mean(bits, n_weights) <= 4
    found = sum(rises[name][n] for name, n in bits.items())
    assert found == pytest.approx(best_of_all(rises, n_weights, 4), abs=1e-5)
    each = ", ".join(f"{name} {n}" for name, n in bits.items())
    assert f"net: uniform: {mean(bits, n_weights):.4f} bits per weight: {each}" in printed
    for name, n_bits in bits.items():
        [line] = [x for x in printed.splitlines() if x.split()[:2] == [name, "weight"]]
        assert line.split()[3] == str(n_bits)
    verified = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))
    assert verified["differing_predictions"]["integer"] == 0
    assert row["accuracy"] == verified["accuracy"]["engine"] and row["bits"] == 4
    assert main(f"{FLAGS} --per_channel --verify net.onnx") == 1
    assert "made with bits 4.0, and this is 4" in capsys.readouterr().err


def test_ends_of_more_bits_are_told(tiny, capsys):  # noqa: F811
    assert main("--bits 3 8 --schemes uniform --fold_bn --keep_first_last --no_plots") == 0
    printed = capsys.readouterr().out
    assert "first and last layer: at least 8 bits of weights and of inputs" in printed
    _, few, many = rows()
    assert few["layer_bits"] == "conv1:8 conv2:3 classifier:8" and few["levels"] is None
    assert many["layer_bits"] is None and many["levels"] == 256


@pytest.mark.slow
def test_a_budget_of_8_bits_can_be_spent_and_others_share_it(tiny, capsys):  # noqa: F811
    more = "--rounding adaround --rounding_images 40 --output_bias_correction"
    flags = FLAGS.replace("--bits 4 --act_bits 4", "--act_bits 4 8").replace("uniform", "clip pwlq")
    assert main(f"{flags} --budget_bits 8 {more}") == 0
    found = rows()[1:]
    assert [row["bits"] for row in found] == [8] * 4
    assert all(row["levels"] is None and math.isfinite(row["loss"]) for row in found)
    assert found[0]["layer_bits"] == found[1]["layer_bits"]  # of one scheme
    assert capsys.readouterr().out.count("bits per weight") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--budget_bits 1.5", "'1.5' is not a finite number of at least 2 and at most 8"),
        ("--budget_bits 8.1", "'8.1' is not a finite number of at least 2 and at most 8"),
        ("--budget_bits nan", "'nan' is not a finite number of at least 2 and at most 8"),
        ("--budget_bits 4 --bits 4", "--budget_bits does not go with --bits: each layer"),
        ("--budget_bits 4 --keep_first_last", "does not go with --keep_first_last: each layer"),
        ("--budget_bits 4 --per_layer", "does not go with --per_layer: that is for one number"),
        ("--budget_bits 4 --act_bits same", "needs --act_bits in numbers: weights have several"),
    ],
)
def test_what_makes_no_sense_ends_with_one_line(tiny, capsys, flags, message):  # noqa: F811
    assert main(f"--schemes uniform {flags}") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
