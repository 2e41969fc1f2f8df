import copy
import json
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from test_onnx_export import FLAGS, main, onnx, tiny  # noqa: F401
from torch import nn

import quant_inference as qi
import quant_utils as qu
from engine.networks.batch_norm import fold_batch_norm, output_gains
from engine.quantization import adaround

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


# --- the loss and its derivative -------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("beta", [None, 20.0, 5.5, 2.0])
def test_the_loss_and_its_derivative_are_those_of_autograd(name, beta):
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name]).double()
    layer_q = copy.deepcopy(layer)
    if layer.bias is not None:
        layer_q.bias.data += 0.1
    gain = torch.rand(len(layer.weight), generator=seeded(), dtype=torch.float64) + 0.5
    x = inputs(layer)
    x_q = x + 0.1 * inputs(layer, seed=1)
    nets = nn.Sequential(layer), nn.Sequential(layer_q)
    for net in nets:  # each reads images of its own: its layer's input
        net.inputs = iter(x.split(3) if net is nets[0] else x_q.split(3))
        net[0].register_forward_pre_hook(lambda m, args, net=net: (next(net.inputs),))
    with torch.no_grad():
        error = adaround.output_error(*nets, "0", lambda: [None] * 4, gain)
    low = qu.uniform(layer.weight, 3, round_up=0)
    step = qu.uniform(layer.weight, 3, round_up=1) - low
    v = torch.randn(low.shape, generator=seeded(), dtype=torch.float64).mul_(2).requires_grad_()
    h = (1.2 * v.sigmoid() - 0.1).clamp(0, 1)
    assert (h == 0).any() and (h == 1).any() and ((h > 0) & (h < 1)).any()

    def on_inputs(x):
        return torch.func.functional_call(layer_q, {"weight": low + step * h}, (x,))

    for m in (layer, layer_q):
        m._forward_pre_hooks.clear()
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
    [(name, gain)] = output_gains(net).items()
    folded = fold_batch_norm(net).get_submodule(name).weight
    torch.testing.assert_close(
        net.get_submodule(name).weight * gain.view(-1, 1, 1, 1), folded.double()
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


def learn(net, n_bits=3, n_steps=60, quantizer=qu.uniform, order=None):
    def quantize_layer(name, round_up):
        if order is not None and round_up is None:
            order.append(name)
        layer = copy.deepcopy(net.get_submodule(name))
        qu.quantize_layer(layer, quantizer, n_bits, round_up=round_up)
        return layer

    names = qu.running_layers(net, images()[:1])
    return adaround.learn_rounding(
        net, names, quantize_layer, lambda: images().split(7), n_steps, "cpu"
    )


def captured_inputs(net, name):
    taken = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda m, args: taken.append(args))
    with torch.no_grad():
        net(images())
    handle.remove()
    return taken[0][0].double()


@pytest.mark.parametrize("n_bits", [2, 4])
def test_no_layer_is_worse_than_rounded_to_nearest_on_the_images(n_bits):
    net, order = make_net(), []
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    round_up = learn(net, n_bits, order=order)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert order == list(round_up) == ["conv1", "conv2", "conv3", "down", "fc"]  # as they run
    net_q, gains, better = copy.deepcopy(net), output_gains(net), []
    for name, up in round_up.items():
        x, x_q = captured_inputs(net, name), captured_inputs(net_q, name)
        layer, layer_q = net.get_submodule(name), net_q.get_submodule(name)
        errors = []
        for how in (None, up):
            layer_q.load_state_dict(layer.state_dict())
            qu.quantize_layer(layer_q, qu.uniform, n_bits, round_up=how)
            pair = copy.deepcopy(layer).double(), copy.deepcopy(layer_q).double()
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
        error = adaround.OutputError(gram, torch.zeros_like(w), zero, one)
        nearest, low, high = (qu.uniform(w, 3, round_up=up) for up in (None, 0, 1))
        up = adaround.learn_layer(w, nearest, low, high, error, 500, lambda: None)
        ups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
        best = min(error(low + u * (high - low) - w) for u in ups)
        learned, rounded = error(torch.where(up, high, low) - w), error(nearest - w)
        assert best * (1 - 1e-9) <= learned <= rounded
        missed, missed_by_nearest = missed + learned - best, missed_by_nearest + rounded - best
    assert missed < missed_by_nearest / 2


def test_repeated_it_is_the_same_to_the_bit():
    first, second = learn(make_net()), learn(make_net())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_that_would_be_worse_is_rounded_to_nearest(monkeypatch):
    monkeypatch.setattr(adaround, "objective_gradient", lambda v, *_: torch.ones_like(v))
    net = make_net()
    for name, up in learn(net, n_steps=900).items():  # all weights would go down
        w = net.get_submodule(name).weight.detach()
        assert torch.equal(qu.uniform(w, 3, round_up=up), qu.uniform(w, 3))


def test_constant_and_zero_layers_stay():
    net = make_net()
    net.conv1.weight.data.zero_()
    net.conv2.weight.data.fill_(0.5)
    net_q, _ = qu.quantize_model(net, qu.uniform, 4, round_up=learn(net, 4))
    assert (net_q.conv1.weight == 0).all() and net_q.conv2.weight.isfinite().all()


# --- the command line ------------------------------------------------------------------------


ADAROUND = "--rounding adaround --rounding_images 40 --rounding_steps 40"


def rows():
    return json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def count_learning(monkeypatch):
    calls = []

    def counting(net, layers, *rest):
        calls.append(layers)
        return adaround.learn_rounding(net, layers, *rest)

    monkeypatch.setattr(qi, "learn_rounding", counting)
    return calls


def test_export_and_verify_what_was_learned_once(tiny, count_learning):  # noqa: F811
    pytest.importorskip("safetensors", reason="requirements-export.txt is not installed")
    for scheme, more in (("uniform", ""), ("clip", "--per_channel --keep_first_last")):
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
    [entry] = [p for p in model.metadata_props if p.key == "rounding"]
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--per_layer", "--per_layer needs --rounding nearest"),
        ("--mean_correction", "--mean_correction needs --rounding nearest"),
        ("--bias_correction", "--bias_correction needs --rounding nearest"),
        ("--rounding_steps 0", "at least 1"),
        ("--rounding best", "unknown value 'best'"),
    ],
)
def test_flags_that_contradict_it_end_with_one_line(tiny, capsys, flags, message):  # noqa: F811
    assert main(f"--rounding adaround {flags}") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed


def test_more_images_than_there_are(tiny, capsys):  # noqa: F811
    assert main("--rounding adaround --rounding_images 41 --schemes uniform") == 1
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
