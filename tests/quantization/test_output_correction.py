import copy
import json
from pathlib import Path

import pytest
import torch
from test_deploy_script import FLAGS, main, onnx, tiny  # noqa: F401
from torch import nn

import quant_utils as qu
from engine.networks.export import export_network
from engine.networks.graph import layers
from engine.quantization.activations import activation_grids, calibrate
from engine.quantization.output_correction import correct_outputs, correct_outputs_better
from engine.quantization.weights import quantize_weights

LAYERS = nn.Conv2d, nn.ConvTranspose2d, nn.Linear


class Plain(nn.Module):
    """Layers with and without bias, a batch norm, a transposed convolution, tokens, pooling."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(2))
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False)
        self.pool = nn.AvgPool2d(4)
        self.tokens, self.head = nn.Linear(6, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = self.up(self.second(self.first(x).relu()).relu())
        x = self.tokens(self.pool(x).flatten(2).transpose(1, 2)).relu()
        return self.head(x.mean(1))


class Twice(Plain):
    """The same, with one module for both convolutions of the same weights."""

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = self.up(self.first(self.first(x).relu()).relu())
        x = self.tokens(self.pool(x).flatten(2).transpose(1, 2)).relu()
        return self.head(x.mean(1))


def images():
    return torch.randn(22, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def make(kind):
    torch.manual_seed(0)
    net = kind().double().eval()
    net.second.load_state_dict(net.first.state_dict())
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.running_mean.normal_()
    return net


def output_mean(net, name):
    """The mean output of a module on all images at once, over all but its channels."""
    found = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, args, y: found.append(y))
    net(images())
    handle.remove()
    y = found[0] if name in ("tokens", "head") else found[0].movedim(1, -1)
    return y.flatten(0, -2).mean(dim=0)


def slow_biases(n_bits, grids):
    """Return the corrected biases by name, of modules, with hooks and nothing of this project."""
    net, net_q = make(Plain), make(Plain)
    for m in net_q.modules():
        if isinstance(m, LAYERS):
            m.weight.data = qu.uniform(m.weight, n_bits)
    for name, grid in grids.items():

        def rounded(m, args, grid=grid):
            codes = (args[0] / grid.scale).round() + grid.zero_point
            return (codes.clamp(0, 2**grid.n_bits - 1) - grid.zero_point) * grid.scale

        if name in dict(net.named_modules()):
            net_q.get_submodule(name).register_forward_pre_hook(rounded)
    biases = {}
    for name, m in net_q.named_modules():  # as they run
        if isinstance(m, LAYERS):
            change = output_mean(net, name) - output_mean(net_q, name)
            m.bias = nn.Parameter(change if m.bias is None else m.bias + change)
            torch.testing.assert_close(output_mean(net_q, name), output_mean(net, name))
            biases[name] = m.bias.detach()
    return biases


@pytest.mark.parametrize("kind", [Plain, Twice])
@pytest.mark.parametrize("act_bits", [None, 3])
@pytest.mark.sampled(2)
def test_biases_are_those_of_modules_with_hooks(kind, act_bits):
    with torch.no_grad():
        graph = export_network(make(kind), (3, 8, 8))
        graph_q, _ = quantize_weights(graph, qu.uniform, 3, bias_range=None)
        grids = {}
        if act_bits:
            ranges = calibrate(graph, images().split(7))
            del ranges["pool_2"]  # the mean over tokens: no module that has a hook
            grids = activation_grids(ranges, act_bits)
        before = copy.deepcopy(dict(graph_q.named_buffers()))
        corrected = correct_outputs(graph, graph_q, grids, lambda: images().split(7))
        names = {"first": "first", "first.conv": "second", "first_2": "second"}
        names = {k: names.get(k, k) if kind is Twice else k for k in layers(corrected)}
        in_modules = {names.get(k, k): grid for k, grid in grids.items()}
        expected = slow_biases(3, in_modules)
    assert sorted(names.values()) == sorted(expected)
    for name, layer in layers(corrected).items():
        bias = corrected.get_buffer(layer.bias)
        torch.testing.assert_close(bias, expected[names[name]], rtol=1e-7, atol=1e-9)
        assert torch.equal(corrected.get_buffer(layer.weight), before[layer.weight])
    assert all(torch.equal(v, before[k]) for k, v in graph_q.named_buffers())
    assert len(corrected(images())) == 22


@pytest.mark.parametrize("kind", [Plain, Twice])
def test_with_float_inputs_each_layer_makes_up_for_its_own_weights(kind):
    with torch.no_grad():
        graph = export_network(make(kind), (3, 8, 8))
        graph_q, _ = quantize_weights(graph, qu.uniform, 3, bias_range=None)
        corrected = correct_outputs(graph, graph_q, {}, lambda: images().split(7), "float")
        for name, layer in layers(corrected).items():
            net, net_q = make(Plain), make(Plain)
            names = {"first": "first", "first.conv": "second", "first_2": "second"}
            name = names.get(name, name) if kind is Twice else name
            quantized = net_q.get_submodule(name)
            quantized.weight.data = qu.uniform(quantized.weight, 3)
            bias = net.get_submodule(name).bias
            change = output_mean(net, name) - output_mean(net_q, name)
            expected = change if bias is None else bias + change
            torch.testing.assert_close(corrected.get_buffer(layer.bias), expected)


@pytest.mark.slow
def test_auto_takes_what_changes_predictions_less():
    net = make(Plain)
    graph = export_network(net, (3, 8, 8))
    x = images()

    def divergence(graph_q):
        p, q = net(x).softmax(-1), graph_q(x).softmax(-1)
        return (p * (p / q).log()).sum(-1).mean().item()

    for n_bits in (2, 3, 4, 6):
        graph_q, _ = quantize_weights(graph, qu.uniform, n_bits, bias_range=None)
        given = graph, graph_q, {}, lambda: x.split(7)
        corrected, divergences = correct_outputs_better(*given)
        assert set(divergences) == {"quantized", "float"}
        with torch.no_grad():
            for inputs, found in divergences.items():
                assert divergence(correct_outputs(*given, inputs)) == pytest.approx(found)
            assert divergence(corrected) == pytest.approx(min(divergences.values()))


# --- the command line ------------------------------------------------------------------------

CORRECTED = "--output_bias_correction --calibration_images 40"


def rows():
    return json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("more", ["", "--rounding adaround --rounding_images 40 --per_channel"])
@pytest.mark.sampled(2)
def test_corrected_biases_are_exported(tiny, more, capsys):  # noqa: F811
    pytest.importorskip("safetensors", reason="requirements-export.txt is not installed")
    files = "--export net.onnx --verify --save_quantized q.pt --save_integers q.safetensors"
    assert main(f"{FLAGS} {more}") == 0
    plain = rows()
    assert main(f"{FLAGS} {CORRECTED} {more} {files}") == 0
    assert rows()[1]["loss"] != plain[1]["loss"]
    assert rows()[1]["squared_error"] == plain[1]["squared_error"]
    found = json.loads(Path("net.verified.json").read_text(encoding="utf-8"))
    assert found["differing_predictions"]["integer"] == 0
    assert found["largest_logit_difference"]["integer"] == 0
    assert rows()[1]["accuracy"] == found["accuracy"]["engine"]
    capsys.readouterr()
    assert main(f"{FLAGS} {more} --verify net.onnx") == 1
    said = "made with output_bias_correction true, and this is false"
    assert said in capsys.readouterr().err


def test_the_inputs_are_a_flag_and_what_auto_takes_is_said(tiny, capsys):  # noqa: F811
    flags = "--fold_bn --bits 3 2 --schemes uniform --no_plots --calibration_images 40"
    losses = {}
    for how in ("", "quantized", "float", "auto"):
        assert main(f"{flags} --output_bias_correction {how}") == 0
        losses[how] = [row["loss"] for row in rows()[1:]]
    assert losses[""] == losses["quantized"] != losses["float"]
    said = [line for line in capsys.readouterr().out.splitlines() if "outputs corrected" in line]
    for i, bits in enumerate((3, 2)):
        [line] = [line for line in said if f"uniform, {bits} bits: " in line]
        assert losses["auto"][i] == losses[line.split("with ")[1].split()[0]][i]


@pytest.mark.slow
def test_each_of_several_bits_of_inputs_is_corrected_as_if_it_were_alone(tiny):  # noqa: F811
    flags = f"--bits 3 --schemes dorefa --trials 2 --biases full --no_plots {CORRECTED}"
    assert main(f"{flags} --act_bits 3 8") == 0
    both = rows()
    for act_bits in (3, 8):
        assert main(f"{flags} --act_bits {act_bits} --batch_size 7") == 0
        [row] = [row for row in both[1:] if row["act_bits"] == act_bits]
        assert rows()[1]["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_a_batch_norm_that_stays_has_the_same_effect_as_a_folded_one(tiny):  # noqa: F811
    flags = f"--bits 8 --schemes uniform --biases full --no_plots {CORRECTED}"
    losses = []
    for more in ("", "--fold_bn"):
        assert main(f"{flags} {more}") == 0
        full, row = rows()
        losses.append(abs(row["loss"] - full["loss"]))
    assert max(losses) < 0.01


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("", 2, "--output_bias_correction needs --fold_bn or --biases full: biases that were"),
        ("--biases full --recalibrate_bn_images 9", 2, "does not go with --recalibrate_bn_images"),
        ("--fold_bn --calibration_images 41", 2, "--calibration_images 41: there are 40 training"),
    ],
)
def test_what_cannot_be_corrected_gets_one_line(tiny, capsys, flags, code, message):  # noqa: F811
    assert main(f"--output_bias_correction --bits 3 --schemes uniform {flags}") == code
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
