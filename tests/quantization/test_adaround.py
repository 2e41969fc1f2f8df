import copy
import json
from pathlib import Path

import pytest
import reference
import test_networks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from test_deploy_script import FLAGS, main, onnx, tiny  # noqa: F401
from torch import nn

import models
import quant_inference as qi
import quant_utils as qu
from analysis import measured_network
from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms, output_gains
from engine.networks.graph import copy_graph, layers, returning_values, set_tensor
from engine.quantization import adaround
from engine.quantization.output_error import LayerRuns, OutputError, output_error
from engine.system.io import save_weights

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, padding=(2, 1), bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding="same"),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
    "linear": nn.Linear(4, 5),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(layer, n=10, seed=0):
    shape = (n, 7, 4) if isinstance(layer, nn.Linear) else (n, 4, 6, 5)
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def squared_error(layer, layer_q, x, x_q, gain):
    """Σ over channels of the mean over images and positions of (gain·(y − ŷ))²."""
    y, y_q = layer(x), layer_q(x_q)
    if not isinstance(layer, nn.Linear):
        y, y_q = y.movedim(1, -1), y_q.movedim(1, -1)
    return (gain * (y - y_q)).square().flatten(0, -2).sum(dim=1).mean()


def regularizer(h, beta):
    return 0.01 * (1 - (2 * h - 1).abs() ** beta).sum()


class Half(nn.Module):
    """A layer that reads one half of its input's channels."""

    def __init__(self, layer, i, n):
        super().__init__()
        self.layer, self.channels = layer, slice(i * n, (i + 1) * n)

    def forward(self, x):
        return self.layer(x[:, self.channels])


# --- the loss and its derivative -------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("beta", [None, 20.0, 5.5, 2.0])
@pytest.mark.sampled(5)
def test_the_loss_and_its_derivative_are_those_of_autograd(name, beta):
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name]).double()
    layer_q = copy.deepcopy(layer)
    if layer.bias is not None:
        layer_q.bias.data += 0.1
    gain = torch.rand(len(layer.weight), generator=seeded(), dtype=torch.float64) + 0.5
    x = inputs(layer)
    x_q = x + 0.1 * inputs(layer, seed=1)
    # two images side by side: each network reads its own half, its layer's input
    graphs = [
        export_network(Half(m, i, x.shape[1]), (2 * x.shape[1], *x.shape[2:]))
        for i, m in enumerate((layer, layer_q))
    ]
    both = torch.cat([x, x_q], dim=1)
    with torch.no_grad():
        error = output_error(LayerRuns(*graphs, lambda: both.split(3)), "layer", gain)
    low = qu.uniform(layer.weight, 3, round_up=0)
    step = qu.uniform(layer.weight, 3, round_up=1) - low
    v = torch.randn(low.shape, generator=seeded(), dtype=torch.float64).mul_(2).requires_grad_()
    h = (1.2 * v.sigmoid() - 0.1).clamp(0, 1)
    assert (h == 0).any() and (h == 1).any() and ((h > 0) & (h < 1)).any()

    def on_inputs(x):
        return torch.func.functional_call(layer_q, {"weight": low + step * h}, (x,))

    loss = squared_error(layer, on_inputs, x, x_q, gain)
    change = (low + step * h - layer.weight).detach().reshape(error.cross.shape)
    assert error(change) == pytest.approx(loss.item(), rel=1e-10)
    if beta:
        loss = loss + regularizer(h, beta)
    [expected] = torch.autograd.grad(loss, v)
    rows = [t.detach().reshape(error.cross.shape) for t in (v, low - layer.weight, step)]
    found = adaround.objective_gradient(*rows, error.gradient(torch.float64), beta)
    torch.testing.assert_close(found.view(v.shape), expected, rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 1e-4


def test_beta_falls_from_20_to_2_after_a_fifth():
    assert adaround.beta_at(0) is adaround.beta_at(0.199) is None
    assert [adaround.beta_at(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


def test_gains_are_those_of_folding():
    torch.manual_seed(0)
    net = reference.SmoothNet().eval()
    net.norm1.running_var.uniform_(0.1, 3)
    net.norm1.weight.data.normal_()
    graph = export_network(net, (3, 8, 8))
    [(name, gain)] = output_gains(graph).items()
    folded = fold_batch_norms(graph).get_buffer(f"{name}.weight")
    torch.testing.assert_close(
        net.get_submodule(name).weight.detach() * gain.view(-1, 1, 1, 1), folded.double()
    )


# --- the grid --------------------------------------------------------------------------------


@st.composite
def tensors(draw):
    shape = draw(array_shapes(min_dims=2, max_dims=4, max_side=4))
    w = torch.from_numpy(draw(arrays("float64", shape, elements=st.floats(-8, 8))))
    return torch.where(w.abs() < 1e-6, 0, w)


@settings(max_examples=50, deadline=None)
@given(tensors(), st.sampled_from(["uniform", "clip"]), st.integers(2, 8), st.booleans())
def test_a_weight_goes_to_one_of_its_two_neighbours_on_the_grid_of_nearest(w, name, n_bits, split):
    def quantize(**options):
        return qu.QUANTIZERS[name](w, n_bits, per_channel=split, **options)

    nearest, low, high = quantize(), quantize(round_up=0), quantize(round_up=1)
    up = torch.rand(w.shape, generator=seeded()) < 0.5
    assert torch.equal(quantize(round_up=up), torch.where(up, high, low))
    assert torch.equal(quantize(round_up=nearest == high), nearest)
    assert ((nearest == low) | (nearest == high)).all()
    m = w.abs().amax(dim=tuple(range(1, w.dim())) if split else None, keepdim=True)
    if name == "clip":
        m = m * 0.21  # at least
    step, end = high - low, 2 ** (n_bits - 1)
    inside = step > 0
    assert ((low <= w + 1e-9) & (w <= high + 1e-9))[inside].all()
    scale = (m / (end - 0.5)).expand(w.shape)
    assert (step >= 0).all() and (step[inside] >= scale[inside] * (1 - 1e-9)).all()
    for w_q in (low, high):
        if name == "uniform":
            x_int = w_q / qu.safe_divisor(scale)
            torch.testing.assert_close(x_int, x_int.round(), rtol=0, atol=1e-9)
            assert x_int.min() >= -end - 1e-9 and x_int.max() <= end - 1 + 1e-9


# --- learning --------------------------------------------------------------------------------


class Branches(reference.Stranger):
    """Sums, functional activations, batch norms with statistics, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)


def make_net():
    torch.manual_seed(0)
    net = Branches().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.5, 2)
            m.bias.data.normal_()
    return net


def images():
    return torch.randn(24, 3, 8, 8, generator=seeded(3))


def make_graph():
    return export_network(make_net(), (3, 8, 8))


def quantized(graph, name, n_bits=3, round_up=None):
    """The layer's tensors, the bias on the grid of the weight."""
    w = graph.get_buffer(f"{name}.weight")
    tensors = {"weight": qu.uniform(w, n_bits, round_up=round_up)}
    if bias := layers(graph)[name].bias:
        tensors["bias"] = qu.uniform(graph.get_buffer(bias), n_bits, range_source=w)
    return tensors


def learn(graph, n_bits=3, n_steps=60, order=None):
    def quantize(name, round_up):
        if order is not None and round_up is None:
            order.append(name)
        return quantized(graph, name, n_bits, round_up)

    return adaround.learn_rounding(graph, quantize, lambda: images().split(7), n_steps, "cpu")


def captured_inputs(graph, name):
    [x] = returning_values(graph, [layers(graph)[name].node.args[0]])(images())
    return x.double()


def as_module(layer, tensors, net):
    """The layer of the plain network with these tensors, in float64."""
    module = copy.deepcopy(net.get_submodule(layer)).double()
    module.load_state_dict({kind: t.double() for kind, t in tensors.items()})
    return module


@pytest.mark.parametrize("n_bits", [2, 4])
def test_no_layer_is_worse_than_rounded_to_nearest_on_the_images(n_bits):
    net, graph, order = make_net(), make_graph(), []
    before, rng = copy.deepcopy(dict(graph.named_buffers())), torch.get_rng_state()
    round_up = learn(graph, n_bits, order=order)
    assert all(torch.equal(v, before[k]) for k, v in graph.named_buffers())
    assert torch.equal(torch.get_rng_state(), rng)
    assert order == list(round_up) == ["conv1", "conv2", "conv3", "down", "fc"]  # as they run
    graph_q, gains, better = copy_graph(graph), output_gains(graph), []
    for name, up in round_up.items():
        x, x_q = captured_inputs(graph, name), captured_inputs(graph_q, name)
        tensors = dict(net.get_submodule(name).named_parameters())
        errors = []
        for how in (None, up):
            tensors_q = quantized(graph, name, n_bits, how)
            for kind, t in tensors_q.items():
                set_tensor(graph_q, f"{name}.{kind}", t)
            pair = as_module(name, tensors, net), as_module(name, tensors_q, net)
            with torch.no_grad():
                errors.append(squared_error(*pair, x, x_q, gains.get(name, 1)).item())
        assert errors[1] <= errors[0] * (1 + 1e-6)
        better.append(errors[1] / errors[0])
    assert min(better) < 0.7 and sorted(better)[2] < 0.99, better


def test_it_comes_near_the_best_of_all_combinations():
    """Of one output and eight correlated inputs: all 2^8 tried one by one."""
    missed = missed_by_nearest = 0
    for seed in range(6):
        w = torch.randn(1, 1, 8, generator=seeded(seed), dtype=torch.float64)
        mixing = torch.randn(8, 8, generator=seeded(seed + 50), dtype=torch.float64)
        x = mixing @ torch.randn(8, 200, generator=seeded(seed + 99), dtype=torch.float64)
        gram = (x @ x.T / 200)[None]
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
        error = OutputError(gram, torch.zeros_like(w), zero, one)
        nearest, low, high = (qu.uniform(w, 3, round_up=up) for up in (None, 0, 1))
        up = adaround.learn_layer(w, nearest, low, high, error, 500, lambda: None)
        ups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
        best = min(error(low + u * (high - low) - w) for u in ups)
        learned, rounded = error(torch.where(up, high, low) - w), error(nearest - w)
        assert best * (1 - 1e-9) <= learned <= rounded
        missed, missed_by_nearest = missed + learned - best, missed_by_nearest + rounded - best
    assert missed < missed_by_nearest / 2


def test_repeated_it_is_the_same_to_the_bit():
    first, second = learn(make_graph()), learn(make_graph())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_that_would_be_worse_is_rounded_to_nearest(monkeypatch):
    monkeypatch.setattr(adaround, "objective_gradient", lambda v, *_: torch.ones_like(v))
    graph = make_graph()
    for name, up in learn(graph, n_steps=900).items():  # all weights would go down
        w = graph.get_buffer(f"{name}.weight")
        assert torch.equal(qu.uniform(w, 3, round_up=up), qu.uniform(w, 3))


def test_constant_and_zero_layers_stay():
    graph = make_graph()
    set_tensor(graph, "conv1.weight", torch.zeros_like(graph.conv1.weight))
    set_tensor(graph, "conv2.weight", torch.full_like(graph.conv2.weight, 0.5))
    round_up = learn(graph, 4)
    weights = {name: quantized(graph, name, 4, round_up[name])["weight"] for name in round_up}
    assert (weights["conv1"] == 0).all() and weights["conv2"].isfinite().all()


class OfEveryKind(nn.Module):
    """Layers of kinds that are not learned, tokens, and a function with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 2, stride=2), nn.ConvTranspose2d(4, 4, 2)
        self.same, self.along = nn.Conv2d(4, 6, (2, 3), padding="same"), nn.Conv1d(6, 6, 3)
        self.w = nn.Parameter(torch.randn(5, 6))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.same(self.up(self.conv(x)).relu()).flatten(2)  # (B, 6, tokens)
        x = nn.functional.linear(self.along(x).transpose(1, 2), self.w)
        return self.head((x @ x.transpose(1, 2) @ x).mean(1))


def test_layers_beside_attention_are_learned():
    torch.manual_seed(0)
    graph = export_network(test_networks.Attention(), (3, 8, 8))  # of sizes beside tensors
    assert {"patches", "last"} <= learn(graph).keys()


def test_layers_of_other_kinds_go_to_nearest():
    torch.manual_seed(0)
    graph = export_network(OfEveryKind(), (3, 8, 8))
    round_up = learn(graph)
    assert list(round_up) == ["conv", "same", "linear", "head"]
    assert layers(graph).keys() - round_up.keys() == {"up", "along"}
    for name, up in round_up.items():
        w = graph.get_buffer(layers(graph)[name].weight)
        assert up.dtype == torch.bool and up.shape == w.shape


# --- the command line ------------------------------------------------------------------------


ADAROUND = "--rounding adaround --rounding_images 40 --rounding_steps 40"


def rows():
    return json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def count_learning(monkeypatch):
    calls = []

    def counting(*arguments):
        learned = adaround.learn_rounding(*arguments)
        calls.append([*learned])
        return learned

    monkeypatch.setattr(measured_network, "learn_rounding", counting)
    return calls


def test_export_and_verify_what_was_learned_once(tiny, count_learning):  # noqa: F811
    pytest.importorskip("safetensors", reason="requirements-export.txt is not installed")
    for scheme, more in (
        ("uniform", "--step_size full"),
        ("clip", "--per_channel --keep_first_last"),
    ):
        count_learning.clear()
        flags = f"{FLAGS.replace('uniform', scheme)} {ADAROUND} {more}"
        files = "--export net.onnx --verify --save_quantized q.pt --save_integers q.safetensors"
        assert main(f"{flags} {files}") == 0
        assert count_learning == [["conv1", "conv2", "classifier"]]
        found = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))
        assert found["differing_predictions"]["integer"] == 0
        assert found["largest_logit_difference"]["integer"] == 0
        assert rows()[1]["accuracy"] == found["accuracy"]["engine"]


def test_an_exported_file_says_how_its_weights_were_rounded(tiny, capsys):  # noqa: F811
    assert main(f"{FLAGS} {ADAROUND} --export net.onnx") == 0
    capsys.readouterr()
    assert main(f"{FLAGS} --verify net.onnx") == 1
    said = "rounding adaround on 40 images in 40 steps, and this is nearest"
    assert said in capsys.readouterr().err
    model = onnx.load("net.onnx")  # as an earlier version wrote it, of weights rounded to nearest
    for entry in [p for p in model.metadata_props if p.key in ("rounding", "step_size")]:
        model.metadata_props.remove(entry)
    onnx.save(model, "net.onnx")
    main(f"{FLAGS} --verify net.onnx")
    assert "was made with" not in capsys.readouterr().err


def test_rows_say_how_weights_were_rounded(tiny, capsys, count_learning):  # noqa: F811
    schemes = "--schemes uniform clip dorefa pwlq --trials 1"
    flags = f"--bits 3 --act_bits 3 8 {schemes} --overlapping --no_plots"
    assert main(flags) == 0
    nearest = rows()
    assert main(f"{flags} {ADAROUND}") == 0
    learned, err = rows(), capsys.readouterr().err
    assert "--rounding adaround has no effect on dorefa, pwlq" in err
    assert len(count_learning) == 2  # activations of both bit-widths share what was learned
    kinds = {row["scheme"]: row["rounding"] for row in learned}
    assert kinds == {
        "none": None,
        "uniform": "adaround",
        "clip": "adaround",
        "dorefa": "stochastic",
        "pwlq": "nearest",
    }
    for before, after in zip(nearest, learned, strict=True):
        if after["rounding"] == "adaround":
            assert after["squared_error"] > before["squared_error"]
            assert before["rounding"] == "nearest"
        else:
            assert after == before
    assert (
        main(f"--bits 3 --schemes uniform --act_bits 8 --no_plots --batch_size 7 {ADAROUND}") == 0
    )
    [row] = [r for r in learned if (r["scheme"], r["bits"], r["act_bits"]) == ("uniform", 3, 8)]
    assert rows()[1]["squared_error"] == row["squared_error"]  # alone, in other batches


@pytest.mark.parametrize("rounding", ["adaround", "qdrop"])
@pytest.mark.parametrize("has_conv2d", [False, True])
def test_layers_that_it_is_not_for_are_named(tiny, monkeypatch, capsys, rounding, has_conv2d):  # noqa: F811
    class Net(nn.Module):
        def __init__(self, num_classes=10):
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3) if has_conv2d else nn.Identity()
            self.rows = nn.Conv1d(6 if has_conv2d else 3, num_classes, 3)

        def forward(self, x):
            return self.rows(self.first(x).mean(3)).mean(2)

    torch.manual_seed(0)
    monkeypatch.setitem(models.MODELS, "Folding", Net)
    save_weights(Net(), Path("net.pt"))
    flags = "--bits 3 --schemes uniform --no_plots"
    assert main(flags) == 0
    nearest = rows()
    capsys.readouterr()
    assert main(f"{flags} --rounding {rounding} --rounding_steps 9 --rounding_images 40") == 0
    effect = "is for" if has_conv2d else "has no effect: it is for"
    warned = f"--rounding {rounding} {effect} 2-d convolutions and linear layers; to nearest: rows"
    assert warned in capsys.readouterr().err
    assert rows()[1]["rounding"] == (rounding if has_conv2d else "nearest")
    assert has_conv2d or rows() == nearest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--per_layer", "--per_layer needs --rounding nearest"),
        ("--mean_correction", "--mean_correction needs --rounding nearest"),
        ("--bias_correction", "--bias_correction needs --rounding nearest"),
        ("--rounding_steps 0", "at least 1"),
        ("--rounding_images 0", "at least 1"),
        ("--rounding best", "unknown value 'best'"),
    ],
)
@pytest.mark.parametrize("rounding", ["adaround", "qdrop"])
def test_flags_that_contradict_it_end_with_one_line(tiny, capsys, rounding, flags, message):  # noqa: F811
    assert main(f"--rounding {rounding} {flags}") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed


def test_more_images_than_there_are(tiny, capsys):  # noqa: F811
    assert main("--rounding adaround --rounding_images 41 --schemes uniform") == 2
    assert "--rounding_images 41: there are 40 training images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rounding adaround --schemes pwlq", "--rounding (needs uniform or clip among"),
        ("--rounding_images 5", "--rounding_images (needs --rounding adaround"),
        ("--rounding_steps 5", "--rounding_steps (needs --rounding adaround"),
    ],
)
def test_flags_without_effect_are_named_and_ignored(capsys, flags, message):
    parser = qi.make_parser()
    args = parser.parse_args(["x.pt", *flags.split()])
    qi.check_flags(parser, args)
    assert message in capsys.readouterr().err
    name = message.split()[0][2:]
    assert vars(args)[name] == parser.get_default(name)
