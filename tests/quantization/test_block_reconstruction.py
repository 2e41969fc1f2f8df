import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_adaround import (
    OfEveryKind,
    images,
    make_graph,
    make_net,
    quantized,
    regularizer,
    rows,
    seeded,
)
from test_deploy_script import FLAGS, main, onnx, tiny  # noqa: F401
from torch import nn

from analysis import measured_network
from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms
from engine.networks.graph import layers, set_tensor
from engine.quantization import adaround
from engine.quantization import block_reconstruction as br
from engine.quantization.activations import activation_grids, calibrate, quantize_activations
from engine.quantization.grids import Grid
from models import make_model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def make_trainer(block, grids, seed=0):
    """One with 3-bit weights to be learned, and V all over the place."""
    weights = br.soft_weights(block, lambda name, up: quantized(block, name, 3, up))
    for i, w in enumerate(weights.values()):
        w.v.copy_(draw(*w.v.shape, seed=90 + i).mul_(2))
    return br.BlockTrainer(block, weights, grids, seed)


# --- blocks ----------------------------------------------------------------------------------


class Concat(nn.Module):
    """Two branches that are concatenated, pooled, and read by a chain."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)
        self.conv, self.fc = nn.Conv2d(5, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool2d(F.silu(self.stem(x)), 2)
        x = torch.cat([self.a(x).relu(), self.b(x)], 1)
        x = F.hardswish(self.conv(F.max_pool2d(x, 2)))
        return self.fc(x.mean((2, 3))).log_softmax(1)


def find(net, size=32):
    """The learned layers of each block of the folded graph, and the graph and blocks."""
    torch.manual_seed(0)
    graph = fold_batch_norms(export_network(net.eval(), (3, size, size)))
    blocks = br.find_blocks(graph)
    return [br.learned_layers(block) for block in blocks], graph, blocks


def test_a_chain_has_a_block_for_each_layer_with_its_activation():
    names, graph, blocks = find(make_model("ConvNet", 10, 1.0), 8)
    assert names == [*([f"layer{i}.0"] for i in range(9)), ["classifier"]]
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    y = x
    for block in blocks[:-1]:
        y = block(y)
        assert (y >= 0).all()
    assert y.shape == (2, 256, 2, 2)  # pooling is the classifier's
    assert torch.equal(blocks[-1](y), graph(x))


@pytest.mark.parametrize("n_images", [len, lambda x: x.size(0), lambda x: -1])
def test_a_view_that_counts_the_images_is_no_part_of_every_block(n_images):
    class Viewed(nn.Sequential):
        def forward(self, x):
            conv1, relu, conv2, head = self
            return head(relu(conv2(relu(conv1(x)))).view(n_images(x), 4 * 4 * 4))

    convs = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1)
    names, _, _ = find(Viewed(*convs, nn.Linear(64, 4)), 8)
    assert names == [["0"], ["2"], ["3"]]


def test_residual_blocks_end_behind_their_sums():
    names, graph, blocks = find(make_model("ResNet20", 10, 1.0), 8)
    residual = [[f"blocks.{i}.conv1", f"blocks.{i}.conv2"] for i in range(9)]
    assert names == [["conv"], *residual, ["classifier"]]
    x = y = torch.randn(2, 3, 8, 8, generator=seeded())
    for block in blocks:
        y = block(y)
    assert torch.equal(y, graph(x))


@pytest.mark.slow
def test_inverted_residual_blocks_with_a_sum_are_one_block():
    names, graph, _ = find(make_model("MobileNetV2", 10, 0.25))
    assert [name for block in names for name in block] == [*layers(graph)]
    n_sums = sum(each.target is torch.ops.aten.add.Tensor for each in graph.graph.nodes)
    sizes = [len(block) for block in names]
    assert sizes.count(3) == n_sums == 10 and sizes.count(1) == len(sizes) - 10


def test_branches_that_are_concatenated_are_one_block():
    names, graph, blocks = find(Concat(), 16)
    assert names == [["stem"], ["a", "b"], ["conv"], ["fc"]]
    x = y = torch.randn(2, 3, 16, 16, generator=seeded())
    shapes = []
    for block in blocks:
        y = block(y)
        shapes.append(y.shape[1:])
    assert [*map(tuple, shapes)] == [(4, 14, 14), (5, 7, 7), (6, 1, 1), (4,)]
    torch.testing.assert_close(y, graph(x))  # log_softmax is of the last block


class TokensFirst(nn.Module):
    """Tokens stand before images, and are split, on the way."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(3, 5)

    def forward(self, x):
        x = self.conv(x).flatten(2).permute(2, 0, 1)  # (tokens, B, 4)
        first, second = self.a(x.relu()).chunk(2, -1)
        return self.b((first * second).permute(1, 2, 0).mean(2))


def test_blocks_meet_where_the_first_dimension_is_that_of_images():
    names, graph, blocks = find(TokensFirst(), 8)
    assert names == [["conv"], ["a"], ["b"]]
    x = y = torch.randn(3, 3, 8, 8, generator=seeded())
    for block in blocks:
        y = block(y)
        assert len(y) == 3
    torch.testing.assert_close(y, graph(x))


# --- the objective ---------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.7, 1.0])
def test_of_a_linear_layer_alone_it_is_that_of_adaround(progress):
    torch.manual_seed(0)
    layer = nn.Linear(4, 5).double()
    [block] = br.find_blocks(export_network(nn.Sequential(layer), (4,)))
    [name] = layers(block)
    x = draw(20, 4)
    x_q = x + 0.3 * draw(20, 4, seed=1)
    w = layer.weight.detach()
    e, n = (x - x_q) @ w.T, len(x)
    error = adaround.OutputError(
        (x_q.T @ x_q / n)[None],
        (e.T @ x_q / n)[None],
        e.square().sum() / n,
        torch.ones(1, 5, 1, dtype=torch.float64),
    )
    trainer = make_trainer(block, {})
    soft = trainer.weights[name]
    v, step = soft.v.clone(), soft.high - soft.low
    expected = adaround.objective_gradient(
        *(t[None] for t in (v, soft.low - w, step)),
        error.gradient(torch.float64),
        adaround.beta_at(progress),
    )
    trainer.step(x, x_q, layer(x).detach(), progress)
    torch.testing.assert_close(soft.v.grad, expected[0], rtol=1e-9, atol=1e-12)
    assert soft.v.grad.abs().max() > 1e-3 and not torch.equal(soft.v, v)


class Residual(nn.Module):
    """One residual block."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x):
        return F.silu(self.conv2(F.relu(self.conv1(x))) + x)


def round_rest(x, kept, grid):
    """Straight through the rounding, in autograd's own operations."""
    low, high = -grid.zero_point * grid.scale, (grid.max_code - grid.zero_point) * grid.scale
    inside = x.clamp(low, high)
    rounded = (inside / grid.scale).round() * grid.scale
    return torch.where(kept.bool(), x, inside + (rounded - inside).detach())


@pytest.mark.parametrize("beta", [None, 7.0])
def test_of_a_residual_block_it_is_that_of_autograd(monkeypatch, beta):
    torch.manual_seed(0)
    net = Residual().double()
    [block] = br.find_blocks(export_network(net, (3, 6, 5)))
    names = ["conv1", "conv2", "add[0]", "add[1]"]
    # a range that cuts values off, and a zero point that is not in the middle
    limits = [(0.25, 8), (0.1, 0), (0.2, 5), (0.3, 8)]
    grids = {name: Grid(*each, 4) for name, each in zip(names, limits, strict=True)}
    x = draw(6, 3, 6, 5)
    x_q = x + 0.3 * draw(*x.shape, seed=1)
    masks, kept = [], br.BlockTrainer._kept
    monkeypatch.setattr(
        br.BlockTrainer, "_kept", lambda self, t: masks.append(kept(self, t)) or masks[-1]
    )
    trainer = make_trainer(block, grids)
    gradients = trainer.gradients(x, x_q, net(x).detach())
    assert len(masks) == 5 and all(0.4 < mask.mean() < 0.6 for mask in masks)
    vs = [w.v.clone().requires_grad_() for w in trainer.weights.values()]
    hs = [(1.2 * v.sigmoid() - 0.1).clamp(0, 1) for v in vs]
    w1, w2 = (
        w.low + (w.high - w.low) * h for w, h in zip(trainer.weights.values(), hs, strict=True)
    )
    q = [
        lambda t, mask=mask, grid=grid: round_rest(t, mask, grid)
        for mask, grid in zip(masks[1:], grids.values(), strict=True)
    ]
    mixed = torch.where(masks[0].bool(), x, x_q)
    y = F.conv2d(q[0](mixed), w1, net.conv1.bias, padding=1).relu()
    y = F.conv2d(q[1](y), w2, net.conv2.bias, padding=1)
    error = (F.silu(q[2](y) + q[3](mixed)) - net(x)).square().sum(1).mean()
    loss = error + sum(regularizer(h, beta) for h in hs) if beta else error
    expected = torch.autograd.grad(loss, vs)
    for w, gradient, of_v in zip(trainer.weights.values(), gradients, expected, strict=True):
        found = adaround.objective_gradient(
            w.v, w.low, w.high - w.low, lambda _, g=gradient: g, beta
        )
        torch.testing.assert_close(found, of_v, rtol=1e-9, atol=1e-12)
        assert found.abs().max() > 1e-4


def test_half_of_the_elements_are_kept_in_any_memory_format():
    trainer = make_trainer(
        br.find_blocks(export_network(nn.Sequential(nn.Linear(4, 5)), (4,)))[0], {}
    )
    for x in (torch.zeros(5, 6, 7, 9), torch.zeros(5, 6, 7, 9).mT, torch.zeros(6, 1, 9)[:, :, ::2]):
        kept = [trainer._kept(x) for _ in range(20)]
        assert kept[0].shape == x.shape and not torch.equal(kept[0], kept[1])
        share = torch.stack(kept).mean(0)
        assert 0 < share.min() and share.max() < 1 and 0.45 < share.mean() < 0.55


# --- learning --------------------------------------------------------------------------------


def grids_of(graph, n_bits=4):
    return activation_grids(calibrate(graph, images().split(7), sums=True), n_bits)


def learn(graph, grids=None, n_steps=30, n_bits=3):
    def quantize(name, round_up):
        return quantized(graph, name, n_bits, round_up)

    grids = grids_of(graph) if grids is None else grids
    batches = partial(torch.split, images(), 7)
    return br.learn_block_rounding(grids, graph, quantize, batches, n_steps, "cpu")


@pytest.mark.parametrize("is_quantized", [False, True])
def test_no_block_is_worse_than_rounded_to_nearest_on_the_images(is_quantized):
    net, graph = make_net(), make_graph()
    before, rng = dict(graph.named_buffers()), torch.get_rng_state()
    grids = grids_of(graph) if is_quantized else {}
    round_up = learn(graph, grids)
    assert all(torch.equal(t, before[name]) for name, t in graph.named_buffers())
    assert torch.equal(torch.get_rng_state(), rng)
    assert set(round_up) <= layers(graph).keys()
    x = x_q = images()
    better = []
    for block in br.find_blocks(graph):
        errors, outputs = [], []
        for is_learned in (False, True):
            copied = br.copy_graph(block)
            for name in layers(block):
                up = round_up.get(name) if is_learned else None
                for kind, tensor in quantized(graph, name, 3, up).items():
                    set_tensor(copied, f"{name}.{kind}", tensor)
            outputs.append(quantize_activations(copied, grids)(x_q))
            errors.append((outputs[-1] - block(x)).double().square().mean())
        assert errors[1] <= errors[0] * (1 + 1e-6)
        better.append(float(errors[1] / errors[0]))
        x, x_q = block(x), outputs[1]
    assert sorted(better)[1] < 0.95, better
    torch.testing.assert_close(x, net(images()))


@pytest.mark.slow
def test_repeated_it_is_the_same_to_the_bit_and_depends_on_the_grids():
    graph = make_graph()
    first, second, others = learn(graph), learn(graph), learn(graph, grids_of(graph, 3))
    assert first.keys() == second.keys() != set()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], others.get(name, first[name])) for name in first)


def test_a_block_that_would_be_worse_is_rounded_to_nearest(monkeypatch):
    monkeypatch.setattr(br, "objective_gradient", lambda v, *_: torch.ones_like(v))
    graph = make_graph()
    assert learn(graph, n_steps=100) == {}  # all weights would go down


def test_layers_of_other_kinds_go_to_nearest():
    torch.manual_seed(0)
    graph = export_network(OfEveryKind(), (3, 8, 8))
    round_up = learn(graph, {})
    assert list(round_up) == ["conv", "same", "linear", "head"]
    for name, up in round_up.items():
        w = graph.get_buffer(layers(graph)[name].weight)
        assert up.dtype == torch.bool and up.shape == w.shape


# --- the command line ------------------------------------------------------------------------


QDROP = "--rounding qdrop --rounding_images 40 --rounding_steps 20"


def test_export_and_verify(tiny, capsys):  # noqa: F811
    assert main(f"{FLAGS} {QDROP} --export net.onnx --verify") == 0
    found = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))
    assert found["differing_predictions"]["integer"] == 0
    assert found["largest_logit_difference"]["integer"] == 0
    assert rows()[1]["accuracy"] == found["accuracy"]["engine"]
    assert rows()[1]["rounding"] == "qdrop"
    capsys.readouterr()
    adaround_flags = QDROP.replace("qdrop", "adaround")
    assert main(f"{FLAGS} {adaround_flags} --verify net.onnx") == 1
    said = "rounding qdrop on 40 images in 20 steps, and this is adaround on 40 images in 20 steps"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_each_number_of_bits_of_inputs_learns_anew(tiny, monkeypatch):  # noqa: F811
    calls = []

    def counting(grids, *arguments):
        calls.append({grid.n_bits for grid in grids.values()})
        return br.learn_block_rounding(grids, *arguments)

    monkeypatch.setattr(measured_network, "learn_block_rounding", counting)
    flags = f"--bits 3 --schemes uniform --fold_bn --no_plots {QDROP}"
    assert main(f"{flags} --act_bits 3 8") == 0
    assert calls == [{3}, {8}]
    errors = [row["squared_error"] for row in rows()[1:]]
    assert main(f"{flags} --act_bits 8") == 0
    assert [row["squared_error"] for row in rows()[1:]] == errors[1:] != errors[:1]
    assert main(flags) == 0 and calls[-1] == set()


def test_schemes_that_it_does_not_know_are_named(tiny, capsys):  # noqa: F811
    assert main(f"--bits 3 --schemes uniform pwlq --no_plots {QDROP}") == 0
    assert "--rounding qdrop has no effect on pwlq" in capsys.readouterr().err
    assert {row["scheme"]: row["rounding"] for row in rows()[1:]} == {
        "uniform": "qdrop",
        "pwlq": "nearest",
    }
