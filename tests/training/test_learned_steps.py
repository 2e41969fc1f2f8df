"""Learned step size quantization (LSQ) against the formulas of the paper, and in the scripts."""

import copy
import json
import math
from functools import partial
from unittest.mock import Mock

import pytest
import reference
import test_distributed
import tiny_scripts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import train
import utils
from analysis.checks import check_coverage
from analysis.measured_network import Conditions, Images, MeasuredNetwork
from analysis.report import FLOAT_BITS
from engine.images.loader import Loader
from engine.networks.export import export_network
from engine.networks.layers import penalized_layers
from engine.system import distributed
from engine.system.errors import FileError, NetworkError, StepSizeError
from engine.training import learned_steps
from engine.training.checkpoints import load_checkpoint, save_checkpoint
from engine.training.learned_steps import LearnedStep, make_steps, parameter_groups
from engine.training.train_state import TrainState
from regularizers import RangeNorm

TINY = tiny_scripts.TINY
BATCHES = 5  # an epoch of the tiny data set


# --- one tensor ------------------------------------------------------------------------------


def lsq(v, s, q_n, q_p):
    """v̂ and its derivatives by v and by s, value by value: equations 1, 2, 5 and 3."""
    values, by_v, by_s = [], [], []
    for x in v.flatten().tolist():
        r = x / s
        clipped = min(max(r, -q_n), q_p)
        values.append(round(clipped) * s)  # Python, too, rounds halves to even
        by_v.append(1.0 if -q_n < r < q_p else 0.0)
        by_s.append(-q_n if r <= -q_n else q_p if r >= q_p else -r + round(r))
    return (torch.tensor(t, dtype=torch.float64).view_as(v) for t in (values, by_v, by_s))


@settings(max_examples=60, deadline=None)
@given(
    n_bits=st.integers(2, 8),
    is_signed=st.booleans(),
    s=st.floats(1e-3, 10),
    n_values=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_paper(n_bits, is_signed, s, n_values, seed):
    q_n = 2 ** (n_bits - 1) if is_signed else 0
    q_p = 2 ** (n_bits - 1) - 1 if is_signed else 2**n_bits - 1
    generator = torch.Generator().manual_seed(seed)
    v = 2 * s * q_p * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    v[0] = s * torch.tensor([-q_n, q_p, 0, 0.5], dtype=torch.float64)  # ends and a half
    upstream = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    v.requires_grad_()
    step = nn.Parameter(torch.tensor(s, dtype=torch.float64))
    v_q = LearnedStep(step, -q_n, q_p, n_values, is_set=True)(v)
    v_q.backward(upstream)
    expected, by_v, by_s = lsq(v.detach(), s, q_n, q_p)
    torch.testing.assert_close(v_q.detach(), expected)
    torch.testing.assert_close(v.grad, upstream * by_v)
    scaled = (upstream * by_s).sum() / math.sqrt(n_values * q_p)
    torch.testing.assert_close(step.grad, scaled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("q_n", "q_p"), [(8, 7), (0, 15), (2, 1)])
def test_the_first_step_is_that_of_the_paper(q_n, q_p):
    v = torch.randn(5, 7, dtype=torch.float64)
    quantizer = LearnedStep(nn.Parameter(v.new_ones(())), -q_n, q_p)
    quantizer(v)
    s = 2 * sum(map(abs, v.flatten().tolist())) / 35 / math.sqrt(q_p)
    torch.testing.assert_close(quantizer.step.detach(), v.new_tensor(s))
    quantizer(100 * v)  # later ones do not set it
    torch.testing.assert_close(quantizer.step.detach(), v.new_tensor(s))


def test_what_is_all_zero_stays_zero():
    quantizer = LearnedStep(nn.Parameter(torch.ones(())), 0, 15)
    x = torch.zeros(4, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert (y == 0).all() and quantizer.step.grad.isfinite() and quantizer.step > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.floats(2**-10, 2**10, width=32), st.integers(0, 2**31))
def test_quantized_values_are_on_the_grid_and_stay_there(n_bits, s, seed):
    v = 3 * s * torch.randn(64, generator=torch.Generator().manual_seed(seed))
    int_max = 2 ** (n_bits - 1) - 1
    quantizer = LearnedStep(torch.tensor(s), -int_max - 1, int_max, is_set=True)
    v_q = quantizer(v)
    assert torch.equal(quantizer(v_q), v_q)
    assert len(v_q.unique()) <= 2**n_bits
    inside = (v > -s * (int_max + 1)) & (v < s * int_max)
    assert ((v_q - v).abs()[inside] <= s * 0.5001).all()


# --- a network -------------------------------------------------------------------------------


def graph_of(net):
    return export_network(net, (3, 8, 8))


class Plain(nn.Module):
    """The layers of reference.SmoothNet, with quantized weights and inputs by plain autograd."""

    def __init__(self, net, grids):
        super().__init__()
        self.net, self.grids = net, grids

    def quantize(self, name, v):
        """Round straight through, after the pseudocode in the paper's appendix."""
        s, q_n, q_p, n = self.grids[name]
        g = 1 / math.sqrt(n * q_p)
        s = (s - s * g).detach() + s * g
        r = (v / s).clamp(-q_n, q_p)
        return ((r.round() - r).detach() + r) * s

    def forward(self, x):
        weights = {
            f"{name}.weight": self.quantize(f"{name}.weight", layer.weight)
            for name, layer in penalized_layers(self.net).items()
        }
        handles = [
            layer.register_forward_pre_hook(
                lambda m, args, name=name: self.quantize(f"{name}.input", args[0])
            )
            for name, layer in penalized_layers(self.net).items()
        ]
        try:
            return torch.func.functional_call(self.net, weights, (x,))
        finally:
            for handle in handles:
                handle.remove()


def test_the_gradients_of_a_network_are_those_of_the_papers_pseudocode(problem):
    torch.manual_seed(0)
    net, x, y = reference.SmoothNet().double(), *problem
    plain_net = copy.deepcopy(net)
    steps = make_steps(net, x.shape[1:], 3, 4)
    with steps.quantized(net):
        loss, _, _ = train.compute_gradients(net, nn.CrossEntropyLoss(), None, x, y)
    grids = {
        name: (q.step.detach().clone().requires_grad_(), -q.int_min, q.int_max, q.n_values)
        for name, q in steps.steps().items()
    }
    assert {grid[1:3] for name, grid in grids.items() if "weight" in name} == {(4, 3)}
    assert grids["conv1.input"][1:] == (8, 7, 3 * 6 * 6)  # images are signed
    expected = nn.functional.cross_entropy(Plain(plain_net, grids)(x)[0], y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in plain_net.named_parameters():
        torch.testing.assert_close(dict(net.named_parameters())[name].grad, p.grad)
    for name, quantizer in steps.steps().items():
        torch.testing.assert_close(quantizer.step.grad, grids[name][0].grad)


def test_inputs_behind_a_relu_are_unsigned_and_the_ends_have_8_bits():
    net = tiny_scripts.TinyFused()
    steps = make_steps(net, (3, 8, 8), 4, 3, keep_first_last=True).steps()
    grids = {name: (q.int_min, q.int_max) for name, q in steps.items()}
    assert grids == {
        "conv1.weight": (-128, 127), "conv1.input": (-128, 127),
        "conv2.weight": (-8, 7), "conv2.input": (0, 7),
        "linear.weight": (-128, 127), "linear.input": (0, 255),
    }  # fmt: skip
    assert net.training
    assert make_steps(tiny_scripts.TinyFused(), (3, 8, 8), 4).steps().keys() == {
        "conv1.weight", "conv2.weight", "linear.weight",
    }  # fmt: skip


def test_files_have_the_keys_of_the_plain_network_and_hooks_go():
    net, plain = tiny_scripts.TinyFused(), tiny_scripts.TinyFused()
    steps = make_steps(net, (3, 8, 8), 4, 4)
    assert net.state_dict().keys() == plain.state_dict().keys()
    net.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="conv1.weight"):
        net.load_state_dict({k: t for k, t in plain.state_dict().items() if k != "conv1.weight"})
    x = torch.randn(2, 3, 8, 8)
    net.eval()
    before, w = net(x)[0], net.conv1.weight
    with steps.quantized(net):
        assert not torch.equal(net(x)[0], before)
        assert net.conv1.weight is w
    assert torch.equal(net(x)[0], before)
    with steps.quantized(net), pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 8, 8))
    assert net.conv1.weight is w


def test_layers_that_share_a_weight_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    net[1].weight = net[0].weight
    with pytest.raises(NetworkError, match="1 shares its weight"):
        make_steps(net, (3, 4, 4), 4)


@pytest.mark.parametrize("kind", ["weight_norm", "standardized", "transposed"])
def test_computed_weights_are_refused(kind):
    class Net(nn.Sequential):
        def forward(self, x):
            w = self[0].weight
            x = nn.functional.conv2d(x, w - w.mean() if kind == "standardized" else w.flip(0))
            return self[1](x).mean((2, 3))

    net = Net(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    if kind == "weight_norm":
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(net[0]), *net[1:], nn.Flatten())
    with pytest.raises(NetworkError, match="--qat_bits: .*the weight of .* is computed$"):
        make_steps(net, (3, 4, 4), 4)


class Attention(nn.Module):
    """Patches, attention, upsampling, a weight of a function, a layer that runs twice."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2, padding=1, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.twice = nn.ConvTranspose2d(8, 8, 2), nn.Linear(8, 8)
        self.w, self.head = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.up(self.patches(x).relu()).flatten(2).transpose(1, 2)
        x = self.twice(self.twice(self.attention(x, x, x)[0]))
        return self.head(nn.functional.linear(x, self.w).mean(1))


ATTENTION = ["patches", "up", "attention.in_proj", "attention.out_proj", "twice", "linear", "head"]


def test_layers_in_attention_and_functions_have_steps():
    torch.manual_seed(0)
    net, x = Attention(), torch.randn(5, 3, 8, 8)
    plain, parameters = copy.deepcopy(net), dict(net.named_parameters())
    steps = make_steps(net, (3, 8, 8), 3, 4)
    assert list(steps.layers) == ATTENTION
    assert steps.float_inputs == ["attention.in_proj", "attention.out_proj", "linear"]
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert steps.steps()["up.input"].int_min == 0
    assert steps.steps()["patches.input"].n_values == 3 * 8 * 8  # before padding
    with steps.quantized(net):
        net(x).sum().backward()
        names = {k for k, q in steps.steps().items() if q.step.grad is None or not q.step.grad}
        assert not names
        net.eval()
        with torch.no_grad():
            quantized = net(x)
    assert all(dict(net.named_parameters())[k] is p for k, p in parameters.items())

    weights_alone = make_steps(copy.deepcopy(plain), (3, 8, 8), 3)
    for name, w, w_q in weights_alone.quantized_weights(plain):
        assert w_q.unique().numel() <= 8, name
        w.data.copy_(w_q)
    quantize = {n: steps.layers[n]["input"] for n in steps.layers if n not in steps.float_inputs}
    for name, quantizer in quantize.items():
        plain.get_submodule(name).register_forward_pre_hook(lambda m, a, q=quantizer: q(a[0]))
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), quantized)


def test_records_of_attention_are_read_and_those_of_earlier_versions(tmp_path):
    net, path = Attention(), tmp_path / "r.json"
    steps = make_steps(net, (3, 8, 8), 3, 4)
    record = steps.record()
    path.write_text(json.dumps({"learned_steps": record}))
    found = learned_steps.read_steps(path, net, graph_of(net))
    assert found.record() == record and found.float_inputs == steps.float_inputs
    for name in ("up", "attention.in_proj", "attention.out_proj", "linear"):
        del record["layers"][name]  # which earlier versions did not see
    path.write_text(json.dumps({"learned_steps": record}))
    assert learned_steps.read_steps(path, net, graph_of(net)).record() == record
    del record["layers"]["twice"]["input"]
    path.write_text(json.dumps({"learned_steps": record}))
    with pytest.raises(FileError, match="twice has not one step for each of weight, input"):
        learned_steps.read_steps(path, net, graph_of(net))


class Checkpointed(nn.Module):
    """A convolution that is run again in the backward pass, by a method, and a module that is."""

    def __init__(self, is_checkpointed):
        super().__init__()
        self.patches, self.conv = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 3)
        self.block, self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()), nn.Linear(8, 2)
        self.run = partial(checkpoint, use_reentrant=False) if is_checkpointed else self.plain

    def plain(self, function, x):
        return function(x)

    def convolve(self, x):
        return nn.functional.conv2d(x.relu(), self.conv.weight, self.conv.bias).tanh()

    def forward(self, x):
        x = self.run(self.convolve, self.patches(x))
        return self.head(self.run(self.block, self.run(self.block, x)).mean((2, 3)))


def test_what_the_backward_pass_runs_again_is_quantized():
    grads, x = [], torch.randn(4, 3, 8, 8)
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        net = Checkpointed(is_checkpointed)
        steps, w = make_steps(net, (3, 8, 8), 2, 2), net.conv.weight
        with steps.quantized(net):
            for _ in range(2):
                net(x).square().sum().backward()
                assert net.conv.weight is w
        grads.append({name: p.grad for name, p in net.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0, msg=name)

    parameters = dict(net.named_parameters())
    x.requires_grad_().register_hook(lambda grad: 1 / 0)
    with steps.quantized(net), pytest.raises(ZeroDivisionError):
        net(x).sum().backward()
    assert all(dict(net.named_parameters())[name] is p for name, p in parameters.items())


def test_layers_may_be_called_by_keyword():
    class Keyword(nn.Sequential):
        def forward(self, x):
            x = self[0](output_size=None, input=x).mean((2, 3))
            return self[1](input=x)

    torch.manual_seed(0)
    net, x = Keyword(nn.ConvTranspose2d(3, 4, 2), nn.Linear(4, 2)), torch.randn(4, 3, 8, 8)
    steps = make_steps(net, (3, 8, 8), 3, 3)
    with steps.quantized(net), torch.no_grad():
        quantized = net(x)
        by_position = net[1](net[0](x).mean((2, 3)))
    assert not steps.float_inputs and torch.equal(quantized, by_position)


class Signal(nn.Module):
    """Convolutions of one and of three dimensions."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(3, 4, 3, padding="same"), nn.ConvTranspose1d(4, 4, 2)
        self.conv3, self.up3 = nn.Conv3d(1, 2, 3), nn.ConvTranspose3d(2, 2, 2)

    def forward(self, x):
        x = self.up(self.conv(x.flatten(2)).relu())
        return self.up3(self.conv3(x.unflatten(2, (5, 13)).unsqueeze(1)).relu()).flatten(1)


def test_inputs_of_convolutions_of_other_dimensions_are_quantized(tmp_path):
    net, x, path = Signal().eval(), torch.randn(4, 3, 8, 8), tmp_path / "r.json"
    steps = make_steps(net, (3, 8, 8), 3, 3)
    assert not steps.float_inputs and steps.steps()["up.input"].int_min == 0
    with steps.quantized(net), torch.no_grad():
        quantized = net(x)
    record, plain = steps.record(), copy.deepcopy(net)
    for name, w, w_q in steps.quantized_weights(plain):
        w.data.copy_(w_q)
        quantizer = steps.layers[name]["input"]
        plain.get_submodule(name).register_forward_pre_hook(lambda m, a, q=quantizer: q(a[0]))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), quantized)
    for kinds in record["layers"].values():
        path.write_text(json.dumps({"learned_steps": record}))
        assert learned_steps.read_steps(path, net, graph_of(net)).record() == record
        del kinds["input"]  # which earlier versions did not have
    path.write_text(json.dumps({"learned_steps": record}))
    found = learned_steps.read_steps(path, net, graph_of(net))
    assert found.record() == record and len(found.float_inputs) == 4


def test_each_run_of_a_layer_counts(tmp_path):
    net, path, options = Attention().eval(), tmp_path / "r.json", {"keep_first_last": True}
    record = make_steps(net, (3, 8, 8), 3, **options).record()
    path.write_text(json.dumps({"learned_steps": record}))
    network = MeasuredNetwork("a", graph_of(net), net, Conditions("cpu"), Images(test=None))
    steps = learned_steps.read_steps(path, net, network.graph)
    bits = steps.bits_of_layers()
    assert [*bits] == [*network.n_weights] and list(bits.values()) == [8, 3, 3, 3, 3, 3, 3, 8]
    assert 3 < network.mean_bits(bits) < 8
    assert network.learned_coverage(steps) == network.coverage(FLOAT_BITS)

    errors = {n: (w_q - w).square().sum().item() for n, w, w_q in steps.quantized_weights(net)}
    network._measure = lambda *_: {"loss": 0.0, "accuracy": 0.0}
    expected = (sum(errors.values()) + errors["twice"]) / 8
    assert network.learned(steps).squared_error == pytest.approx(expected, rel=1e-5)

    covered = network.learned_coverage(make_steps(Attention(), (3, 8, 8), 3, 4))
    assert "twice_2" in bits and "twice_2" not in covered.in_float

    del record["layers"]["up"], record["layers"]["linear"]  # which earlier versions did not see
    path.write_text(json.dumps({"learned_steps": record}))
    steps = learned_steps.read_steps(path, net, network.graph)
    covered = network.learned_coverage(steps)
    left = [name for name, why in covered.in_float.items() if why == "its weight is not quantized"]
    n_left = sum(network.n_weights[name] for name in left)
    assert left == ["up", "linear"] and len(covered.in_float) == 4
    assert covered.weights == pytest.approx(1 - n_left / sum(network.n_weights.values()))
    assert network.mean_bits(steps.bits_of_layers()) > 10


def test_what_learned_steps_leave_in_float_is_said_and_refused_by_strict(capsys):
    encoder = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(2), encoder)
    steps, graph = make_steps(net, (3, 8, 8), 4, 4), graph_of(net.eval())
    network = MeasuredNetwork("a", graph, net, Conditions("cpu"), Images(test=None))
    check_coverage(network, [Mock(act_bits=4)], steps, strict=False)
    [line] = capsys.readouterr().err.splitlines()
    assert "a: lsq: quantized: " in line and "input 2.self_attn.in_proj is not quantized" in line
    with pytest.raises(ValueError, match="--strict: lsq: quantized: "):
        check_coverage(network, [Mock(act_bits=4)], steps, strict=True)
    check_coverage(network, [Mock(act_bits=4)], None, strict=True)


def test_a_step_that_is_no_longer_positive_is_named():
    net = tiny_scripts.TinyFused()
    steps = make_steps(net, (3, 8, 8), 4, 4)
    steps.check()
    for bad in (0.0, -0.1, math.nan):
        steps.steps()["conv2.input"].step.data.fill_(bad)
        with pytest.raises(StepSizeError, match=r"of conv2\.input is"):
            steps.check()


# --- a training ------------------------------------------------------------------------------


def begin(first_epoch=1, act_bits=4, qat=True):
    torch.manual_seed(3)
    net = tiny_scripts.TinyFused(10)
    options = {"first_epoch": first_epoch}
    steps = make_steps(net, (3, 8, 8), 4, act_bits, **options) if qat else None
    optimizer = torch.optim.SGD(parameter_groups(net, steps), 0.05, 0.9, weight_decay=5e-4)
    scheduler = utils.make_scheduler("exponential", optimizer, 0.9, "default", 3)
    return TrainState(net, optimizer, scheduler, steps=steps)


def train_on(state, after_batch=None, n_epochs=3):
    options = {"batch_size": 32, "mean": TINY.mean, "std": TINY.std}
    train_loader = Loader(TINY.train_images, TINY.train_labels, seed=3, shuffle=True, **options)
    test_loader = Loader(TINY.test_images, TINY.test_labels, **options)
    phases = [train.Phase(0, RangeNorm(0.01))]
    training = train.fit(state, train_loader, test_loader, phases, train.FitConfig(n_epochs))
    return reference.go_through(training, after_batch)


def everything(state):
    return {**state.net.state_dict(), **state.steps.state_dict()}


def test_step_sizes_train_without_decay_and_the_epochs_before_are_those_of_no_quantization():
    plain, state = begin(qat=False), begin()
    train_on(plain, n_epochs=1)
    train_on(state, n_epochs=1)
    assert all(torch.equal(p, plain.net.state_dict()[k]) for k, p in state.net.state_dict().items())
    assert all(step == 1 for step in state.steps.state_dict().values())
    history = train_on(state)
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [5e-4, 0]
    assert state.optimizer.param_groups[1]["lr"] == pytest.approx(0.05 * 0.9**3)
    assert all(step != 1 for step in state.steps.state_dict().values())
    assert len(history) == 3 and all(math.isfinite(entry["test_loss"]) for entry in history)


class Cut(Exception):
    pass


def cut(state, n, path):
    """Train n batches, save, and die."""

    def save_and_die(progress):
        if progress.epoch * BATCHES + progress.batch == n:
            save_checkpoint(state.state_dict(RangeNorm(0.01)), path)
            raise Cut

    with pytest.raises(Cut):
        train_on(state, save_and_die)


@pytest.mark.parametrize("cut_at", [2, 5, 6, 8, 15])  # of 15 batches, quantized after 5
@pytest.mark.sampled(3)
def test_a_run_that_was_cut_gives_the_same_bits(cut_at, tmp_path):
    whole, resumed = begin(), begin()
    train_on(whole)
    cut(begin(), cut_at, tmp_path / "c")
    resumed.load_state_dict(load_checkpoint(tmp_path / "c"), 3, BATCHES)
    train_on(resumed)
    expected = everything(whole)
    assert all(torch.equal(t, expected[key]) for key, t in everything(resumed).items())


def test_a_checkpoint_without_steps_is_a_beginning(tmp_path):
    plain, whole, resumed = begin(qat=False), begin(), begin()
    train_on(whole)
    train_on(plain, n_epochs=1)
    save_checkpoint(plain.state_dict(None), tmp_path / "c")
    content = load_checkpoint(tmp_path / "c")
    with pytest.raises(FileError, match="checkpoint.steps: not what this run"):
        begin().load_state_dict({**content, "steps": {}}, 3, BATCHES)
    with pytest.raises(FileError, match="--qat_from 0 is over"):
        begin(first_epoch=0).load_state_dict(content, 3, BATCHES)
    resumed.load_state_dict(content, 3, BATCHES)
    train_on(resumed)
    expected = everything(whole)
    assert all(torch.equal(t, expected[key]) for key, t in everything(resumed).items())


def test_a_checkpoint_without_steps_of_inputs_that_have_them_now_resumes(monkeypatch, tmp_path):
    def begin():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(248, 10))
        steps = make_steps(net, (3, 8, 8), 4, 4)
        optimizer = torch.optim.SGD(parameter_groups(net, steps), 0.05, 0.9)
        scheduler = utils.make_scheduler("exponential", optimizer, 0.9, "default", 3)
        return TrainState(net, optimizer, scheduler, steps=steps)

    with monkeypatch.context() as patch:
        patch.setattr(learned_steps, "INPUT_TYPES", learned_steps.EARLIER_INPUT_TYPES)
        whole = begin()
        train_on(whole)
        cut(begin(), 7, tmp_path / "c")
    resumed, content = begin(), load_checkpoint(tmp_path / "c")
    resumed.load_state_dict(content, 3, BATCHES)
    assert resumed.steps.float_inputs == ["1"]
    train_on(resumed)
    expected = everything(whole)
    assert all(torch.equal(t, expected[key]) for key, t in everything(resumed).items())
    del content["steps"]["3.input"]
    with pytest.raises(FileError, match="checkpoint.steps: not what this run"):
        begin().load_state_dict(content, 3, BATCHES)


def trained_by_ranks():
    with distributed.process_group("cpu"):
        torch.manual_seed(0)
        net = tiny_scripts.TinyFused().double()
        steps = make_steps(net, (3, 8, 8), 4, 4)
        optimizer = torch.optim.SGD(parameter_groups(net, steps), 0.05, 0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        state = TrainState(net, optimizer, scheduler, steps=steps)
        share = {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}
        loader = test_distributed.Doubles(seed=1, augment=True, shuffle=True, **share)
        test_loader = test_distributed.Doubles(cache=True)
        config = train.FitConfig(2, nn.CrossEntropyLoss(), torch.float64)
        reference.go_through(train.fit(state, loader, test_loader, [train.Phase(0)], config))
        return {key: t.numpy() for key, t in everything(state).items()}


@pytest.mark.slow
def test_ranks_train_what_one_process_does():
    [one] = test_distributed.on(1, trained_by_ranks)
    first, second = test_distributed.on(2, trained_by_ranks)
    for key, value in one.items():
        assert value == pytest.approx(first[key], rel=1e-8, abs=1e-9), key
        assert (first[key] == second[key]).all(), key


# --- the scripts -----------------------------------------------------------------------------

FLAGS = [*tiny_scripts.FLAGS, "--model", "TinyFused", "--n_epochs", "3", "--qat_from", "1"]
QUANTIZE = ["r.pt", "--steps_from", "r.json", "--bits", "4", "--schemes", "uniform", "--no_plots",
            "--device", "cpu", "--batch_size", "32"]  # fmt: skip


def quantize(*flags):
    with pytest.raises(SystemExit) as end:
        tiny_scripts.quant_inference.main([*QUANTIZE, *flags])
    return end.value.code


@pytest.mark.parametrize("bits", ["3", "4,3"])
def test_saved_weights_with_their_steps_are_what_was_trained(bits, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*FLAGS, "--qat_bits", bits, "--keep_first_last", "--regularizer", "RangeNorm"])
    record = json.loads((tmp_path / "r.json").read_text())
    assert "from epoch 1 quantized with learned steps" in record["settings"]["plan"]
    last = record["history"][-1]
    assert (last["test_accuracy"], last["test_loss"]) == (
        record["quantized_accuracy"],
        record["quantized_loss"],
    )
    plain = tiny_scripts.TinyFused(10)
    weights = torch.load(tmp_path / "r.pt", weights_only=True)
    plain.load_state_dict(weights)
    assert quantize() == 0 and "error" not in capsys.readouterr().err
    full, uniform, learned = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert full["accuracy"] == record["final_accuracy"] and uniform["scheme"] == "uniform"
    assert (learned["accuracy"], learned["loss"]) == (
        record["quantized_accuracy"],
        record["quantized_loss"],
    )
    w_bits, _, a_bits = bits.partition(",")
    assert learned["scheme"] == "lsq" and learned["bits"] == int(w_bits)
    assert learned["act_bits"] == int(a_bits or 32) and learned["levels"] is None
    names = [*learned_steps.read_steps(tmp_path / "r.json", plain, graph_of(plain)).layers]
    bits = {name: w_bits for name in names} | {names[0]: "8", names[-1]: "8"}
    assert learned["layer_bits"] == " ".join(f"{name}:{n}" for name, n in bits.items())

    steps = learned_steps.read_steps(tmp_path / "r.json", plain, graph_of(plain))
    error = 0.0
    for name, quantizers in record["learned_steps"]["layers"].items():
        grid = quantizers["weight"]
        w_q, _, _ = lsq(weights[f"{name}.weight"].double(), grid["step"], -grid["int_min"],
                        grid["int_max"])  # fmt: skip
        error += (w_q - weights[f"{name}.weight"].double()).square().sum().item() / 3
    assert learned["squared_error"] == pytest.approx(error, rel=1e-4)
    assert steps.record() == record["learned_steps"]

    record["learned_steps"]["layers"].popitem()
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert quantize() == 1
    assert "r.json: its learned steps are not of the layers" in capsys.readouterr().err


def test_a_killed_run_resumes_with_its_steps(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    qat = ["--qat_bits", "4,4"]
    train.main([*FLAGS, *qat])
    train.main([*FLAGS, *qat, "--run_name", "cut", "--n_epochs", "2"])
    train.main([*FLAGS, *qat, "--run_name", "cut", "--resume"])
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("r", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("r", "cut")]
    assert records[0]["learned_steps"] == records[1]["learned_steps"]

    train.main([*FLAGS, "--run_name", "trunk", "--n_epochs", "1"])
    train.main([*FLAGS, *qat, "--run_name", "branch", "--init_from", "trunk.ckpt"])
    branch = torch.load(tmp_path / "branch.pt", weights_only=True)
    assert all(torch.equal(first[key], branch[key]) for key in first)


def test_finished_weights_keep_their_record_while_a_longer_run_extends_them(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    longer = [*FLAGS, "--qat_bits", "4,4", "--n_epochs", "3"]
    train.main([*FLAGS, "--qat_bits", "4,4", "--n_epochs", "2"])
    files = {name: (tmp_path / name).read_bytes() for name in ("r.pt", "r.json")}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "finish", Mock(side_effect=KeyboardInterrupt))
        train.main([*longer, "--resume"])
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())
    train.main([*longer, "--resume"])
    assert len(json.loads((tmp_path / "r.json").read_text())["history"]) == 3

    for path in tmp_path.glob("r.ckpt*"):
        path.unlink()
    files = {name: (tmp_path / name).read_bytes() for name in ("r.pt", "r.json")}
    capsys.readouterr()
    train.main([*longer, "--resume"])  # begins anew, so what is there is not its own
    assert "kept as r_old1" in capsys.readouterr().err
    for name, content in files.items():
        assert (tmp_path / name.replace("r.", "r_old1.")).read_bytes() == content


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--qat_bits", "1"], 2, "'1' is not W or W,A, bits from 2 to 16"),
        (["--qat_bits", "4,17"], 2, "'4,17' is not W or W,A"),
        (["--qat_bits", "4,4,4"], 2, "'4,4,4' is not W or W,A"),
        (["--qat_bits", "4", "--qat_from", "-1"], 2, "'-1' is not a whole number of at least 0"),
        (["--qat_bits", "4", "--ema", "0.9"], 2, "--qat_bits does not go with --ema"),
        (["--qat_bits", "4", "--regularizer", "L2Grad"], 2, "weights alone, not with L2Grad"),
        (["--qat_bits", "4", "--regularizer", "StepNoise"], 2, "weights alone, not with StepNoise"),
    ],
)
def test_bad_values_are_one_line(flags, code, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main([*FLAGS, *flags])
    printed = capsys.readouterr().err
    assert end.value.code == code and message in printed
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qat_from", "2"], "--qat_from (needs --qat_bits"),
        (["--keep_first_last"], "--keep_first_last (needs --qat_bits"),
        (["--qat_bits", "4", "--qat_from", "3"], "--qat_bits (needs a longer run)"),
    ],
)
def test_flags_without_effect_are_named(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    runs = []
    monkeypatch.setattr(train, "run", lambda args, *_: runs.append(args))
    train.main([*tiny_scripts.FLAGS, "--n_epochs", "3", *flags])
    assert message in capsys.readouterr().err and runs[0].qat_bits is None


def test_steps_of_another_training_are_warned_about(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*FLAGS, "--qat_bits", "3"])
    record = json.loads((tmp_path / "r.json").read_text())
    assert quantize() == 0
    printed = capsys.readouterr().err
    assert "of another training" not in printed and "its record says" not in printed
    changed = {
        **record,
        "run_id": "another",
        "quantized_accuracy": record["quantized_accuracy"] + 0.5,
    }
    (tmp_path / "s.json").write_text(json.dumps(changed))
    assert quantize("--steps_from", "s.json") == 0
    printed = capsys.readouterr().err
    assert "s.json has the steps of another training than that of r.pt" in printed
    assert (
        f"with the learned steps, but its record says {changed['quantized_accuracy']:.2%}"
        in printed
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fold_bn"], "leave out --fold_bn"),
        (["--recalibrate_bn_images", "8"], "no --recalibrate_bn_images"),
        (["--precision", "bf16"], "--precision fp32"),
        (["--save_quantized", "q.pt"], "none of --export"),
        (["s.pt"], "one FILE"),
    ],
)
def test_learned_steps_do_not_go_with_what_changes_weights(
    flags, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("r.pt", "s.pt"):
        (tmp_path / name).touch()
    extra, rest = ([flags[0]], []) if flags[0].endswith(".pt") else ([], flags)
    with pytest.raises(SystemExit) as end:
        tiny_scripts.quant_inference.main([*extra, *QUANTIZE, *rest])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "--steps_from needs" in printed and message in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file|No such file"),
        ("{", "not what was saved there"),
        ("{}", "has no learned steps"),
        ("[]", "has no learned steps|not what was saved"),
        ({}, "not what was saved there"),
        ({"layers": {}, "weight_bits": 4}, "not what was saved there"),
        ({"layers": {}, "weight_bits": -3, "act_bits": None}, "-3 bits: choose 2 to 16"),
        ({"layers": {}, "weight_bits": 4, "act_bits": "x"}, "not what was saved there"),
        ({"layers": {}, "weight_bits": 4.5, "act_bits": None}, "4.5 bits is no whole number"),
        ({"layers": {}, "weight_bits": math.inf, "act_bits": None}, "inf bits is no whole number"),
        ("[" * 100_000, "not what was saved there: (maximum recursion|Stack overflow)"),
        (b"\xff" * 100_000, "not what was saved there: 'utf-8' codec.{0,160}$"),
        ({"step": 0.0}, r"a step of 0 from \(-8, 7\) is none of 4 bits"),
        ({"step": 1e-60}, "a step of 0 from"),
        ({"step": math.inf}, "a step of inf from"),
        ({"step": 10**400}, "not what was saved there: int too large"),
        ({"step": [0.1]}, "not what was saved there"),
        ({"int_min": 3}, r"from \(3, 7\) is none of 4 bits"),
        ({"int_min": -16, "int_max": 15}, r"from \(-16, 15\) is none of 4 bits"),
        ({"int_max": 1e300}, "is none of 4 bits"),
        ({"step": "x"}, "not what was saved"),
    ],
)
def test_a_file_that_has_no_steps_of_this_network_is_refused(content, message, tmp_path):
    net = tiny_scripts.TinyFused()
    path = tmp_path / "r.json"
    if isinstance(content, str | bytes):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif content is not None:
        record = make_steps(tiny_scripts.TinyFused(), (3, 8, 8), 4).record()
        if content.keys() & {"step", "int_min", "int_max"}:
            record["layers"]["conv1"]["weight"] |= content
            content = record
        path.write_text(json.dumps({"learned_steps": content}))
    with pytest.raises(FileError, match=message):
        learned_steps.read_steps(path, net, graph_of(net))


def test_steps_of_another_network_are_refused(tmp_path):
    path = tmp_path / "r.json"
    record = make_steps(nn.Sequential(nn.Conv2d(3, 3, 1)), (3, 8, 8), 4).record()
    path.write_text(json.dumps({"learned_steps": record}))
    net = tiny_scripts.TinyFused()
    with pytest.raises(FileError, match="not of the layers of this network"):
        learned_steps.read_steps(path, net, graph_of(net))
