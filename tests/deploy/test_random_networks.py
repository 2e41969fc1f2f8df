"""Random networks: folding, equalizing, integers and ONNX agree, or one line says why not."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from test_integer_network import folded, quantize_graph
from test_residual_export import MEAN, STD, normalized, pixels
from torch import nn

from engine.deploy import deployed_files, onnx_session
from engine.deploy.comparison import first_disagreement
from engine.networks.export import export_network
from engine.quantization.equalization import equalize
from engine.system.errors import NetworkError

SIZE, CHANNELS = 10, 4
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "none": lambda x: x,
    "gelu": F.gelu,  # has no integers
}
SHAPES = ("plain", "grouped", "depthwise", "transposed", "pointwise", "strided")


class Block(nn.Module):
    """A convolution, a batch norm or none, an activation; added to its input or beside it."""

    def __init__(self, c_in, shape, norm, activation, join):
        super().__init__()
        c_out = c_in if join == "sum" else CHANNELS
        groups = {"grouped": 2, "depthwise": c_in}.get(shape, 1)
        c_out = c_in if shape == "depthwise" else c_out
        kernel = 1 if shape == "pointwise" else 3
        stride = 2 if shape == "strided" and join == "none" else 1
        make = nn.ConvTranspose2d if shape == "transposed" else nn.Conv2d
        bias = norm != "after"
        self.conv = make(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.before = nn.BatchNorm2d(c_in) if norm == "before" else nn.Identity()
        self.after = nn.BatchNorm2d(c_out) if norm == "after" else nn.Identity()
        self.activation, self.join = ACTIVATIONS[activation], join
        self.c_out = c_in + c_out if join == "concatenation" else c_out

    def forward(self, x):
        y = self.after(self.conv(self.before(x)))
        if self.join == "sum":
            y = y + x
        y = self.activation(y)
        return torch.cat([x, y], 1) if self.join == "concatenation" else y


class Net(nn.Module):
    def __init__(self, blocks, repeated, head):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks, c = nn.ModuleList(), CHANNELS
        for block in blocks:
            self.blocks.append(Block(c, *block))
            c = self.blocks[-1].c_out
        self.repeated, self.head = repeated, head
        self.shared = nn.Conv2d(c, c, 1)
        if head in ("tokens", "channels"):  # what its batch norm is of
            self.mix, self.norm = nn.Linear(c, c), nn.LazyBatchNorm1d()
        self.classifier = nn.Linear(c, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        for _ in range(self.repeated):  # one layer that runs once or twice
            x = F.relu(self.shared(x))
        x = F.max_pool2d(x, 2) if self.head == "max" and x.shape[-1] > 2 else x
        if hasattr(self, "mix"):
            x = self.mix(x.flatten(2).transpose(1, 2))  # (B, T, C)
            x = self.norm(x if self.head == "tokens" else x.transpose(1, 2)).relu()
            return self.classifier(x.mean(1 if self.head == "tokens" else 2))
        return self.classifier(x.mean((2, 3)))


BLOCKS = st.tuples(  # what is refused is rare, so that most networks go all the way
    st.sampled_from([*SHAPES, "plain", "grouped", "depthwise", "pointwise", "strided"]),
    st.sampled_from(["after", "after", "after", "none", "none", "after", "none", "before"]),
    st.sampled_from(["relu", "relu6", "relu", "hardtanh", "none", "relu", "relu6", "gelu"]),
    st.sampled_from(["none", "sum", "concatenation"]),
)
NETWORKS = {
    "blocks": st.lists(BLOCKS, min_size=1, max_size=3),
    "repeated": st.integers(0, 2),
    "head": st.sampled_from(["average", "max", "average", "max", "tokens", "channels"]),
    "n_bits": st.sampled_from([3, 4, 8]),
    "per_channel": st.booleans(),
    "asymmetric": st.booleans(),
    "seed": st.integers(0, 99),
}
outcomes = Counter()


def make_net(blocks, repeated, head, seed):
    """Return a network in evaluation mode whose batch norms have statistics of their own."""
    torch.manual_seed(seed)
    net = Net(blocks, repeated, head)
    net(torch.zeros(2, 3, SIZE, SIZE))  # gives the lazy norm its size
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 2), m.bias.data.normal_()
    return net.eval()


def assert_close(found, expected, relative):
    scale = expected.abs().max().item() + 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * scale)


@torch.no_grad()
def check(blocks, repeated, head, n_bits, per_channel, asymmetric, seed):
    """Do all steps; where one refuses the network, it says why in one line."""
    net, images = make_net(blocks, repeated, head, seed), pixels(8, SIZE, seed)
    x = normalized(images)
    graph = export_network(net, x.shape[1:])
    assert_close(graph(x), net(x), 1e-5)
    assert_close(folded(net, x.shape[1:])(x), net(x), 1e-4)
    equalized, _ = equalize(folded(net, x.shape[1:]), across_relu6=False)
    assert_close(equalized(x), net(x), 1e-3)
    try:
        integers, quantized, _ = quantize_graph(
            equalized, x, n_bits, n_bits, per_channel=per_channel, asymmetric=asymmetric
        )
    except NetworkError as error:
        assert "\n" not in str(error)
        outcomes[str(error)] += 1
        return
    assert first_disagreement(integers, quantized, x) is None
    model = deployed_files.to_onnx(integers, images.shape[1:], MEAN, STD, {})
    run = onnx_session.open_session(model, "m")
    torch.testing.assert_close(run(images), integers(x)[0], rtol=0, atol=0)
    outcomes["all agree"] += 1


DEAD = [("depthwise", "after", "relu", "none")] * 3  # the classifier's inputs are all 0


@given(**NETWORKS)
@example(
    blocks=DEAD, repeated=2, head="average", n_bits=3, per_channel=False, asymmetric=False, seed=2
)
@settings(max_examples=5, deadline=None, suppress_health_check=[*HealthCheck])
def test_all_steps_of_a_random_network_agree_or_refuse_in_one_line(**drawn):
    check(**drawn)


@given(**NETWORKS)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    phases=[Phase.generate],  # a smaller example of a failure would take minutes to find
)
def check_many(**drawn):
    check(**drawn)


@pytest.mark.slow
def test_all_steps_of_many_random_networks_agree_or_refuse_in_one_line():
    outcomes.clear()
    check_many()
    print(outcomes.most_common())
    assert outcomes["all agree"] > 0.3 * outcomes.total()  # the rest is not what is to be tested
