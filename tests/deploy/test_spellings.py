"""Networks as everybody writes them: exported, and right in integers."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_integer_network import quantize
from test_residual_export import MEAN, STD, normalized, pixels
from torch import nn

from engine.deploy import deployed_files, onnx_session, supported
from engine.deploy.comparison import first_disagreement

pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")


class Net(nn.Module):
    """Two convolutions and a classifier; `middle` is given the network and its input."""

    def __init__(self, middle):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.b, self.fc = nn.Conv2d(8, 8, 3, 1, 1), nn.LazyLinear(5)
        self.pool, self.drop, self.dense = nn.AdaptiveAvgPool2d(1), nn.Dropout2d(), nn.Linear(8, 8)
        self.conv1d = nn.Conv1d(8, 6, 3, padding="same")
        self.middle = middle

    def forward(self, x):
        return self.fc(self.middle(self, x))


def whole(net, x):
    return net.pool(F.relu(x)).flatten(1)


def stem(net, x):
    return F.relu(net.stem(x))


def twice(net, x):
    return whole(net, net.a(F.relu(net.a(stem(net, x)))))


def tied(net, x):
    net.b.weight = net.a.weight
    return whole(net, net.b(F.relu(net.a(stem(net, x)))))


def concatenated(net, x):
    x = F.max_pool2d(stem(net, x), 3, 1, 1)
    branches = [F.relu(net.a(x)), net.b(x), F.max_pool2d(x, 3, 1, 1)]
    return whole(net, torch.cat(branches, 1))


def dense(net, x):
    x = stem(net, x)
    for conv in (net.a, net.b):
        x = torch.cat([x, F.relu(conv(x[:, -8:]))], 1)
    return whole(net, F.relu(x))


def shuffled(net, x):
    x = stem(net, x).view(-1, 2, 4, 6, 6).transpose(1, 2).contiguous().view(-1, 8, 6, 6)
    return whole(net, net.a(x).permute(0, 1, 3, 2))


def split(net, x):
    x = stem(net, x)
    a, b = net.a(x).chunk(2, dim=1)  # a ReLU on one half does not go into the convolution
    c, d, e = torch.split(net.b(torch.cat([F.relu(a), b], 1)), [1, 4, 3], -3)
    return whole(net, torch.cat([e, c, *d.split(3, 1), *x.tensor_split(3, 1)[:2]], 1))


def residual(net, x):
    x = stem(net, x)
    x = F.relu6(x + net.a(x))
    y = net.b(x)
    return whole(net, (y + x).clamp(0, 3) + F.hardtanh(y, -0.5, 0.5))


SPELLINGS = {
    "mean": lambda net, x: stem(net, x).mean((2, 3)),
    "mean, dimensions kept": lambda net, x: stem(net, x).mean([-1, -2], keepdim=True).flatten(1),
    "pooling over the whole map": lambda net, x: F.avg_pool2d(stem(net, x), 6).flatten(1),
    "view": lambda net, x: net.pool(stem(net, x)).view(x.size(0), -1),
    "view of len": lambda net, x: net.pool(stem(net, x)).view(len(x), -1),
    "view of -1": lambda net, x: net.pool(stem(net, x)).view(-1, 8),
    "reshape": lambda net, x: net.pool(stem(net, x)).reshape(x.shape[0], 8),
    "squeeze": lambda net, x: net.pool(stem(net, x)).squeeze(-1).squeeze(-1),
    "squeeze of all": lambda net, x: net.pool(stem(net, x)).squeeze(),
    "dropout": lambda net, x: F.dropout(net.pool(net.drop(stem(net, x))).flatten(1), 0.5, False),
    "clone": lambda net, x: whole(net, net.a(x.new_zeros(0).dtype and stem(net, x).clone())),
    "to": lambda net, x: whole(net, stem(net, x.contiguous()).to(torch.float32).detach()),
    "pooling to several pixels": lambda net, x: F.avg_pool2d(stem(net, x), 3, 2).flatten(1),
    "pooling with padding": lambda net, x: F.avg_pool2d(net.stem(x), (3, 2), 1, 1).flatten(1),
    "adaptive to 3 pixels": lambda net, x: F.adaptive_avg_pool2d(stem(net, x), 3).flatten(1),
    "adaptive to (3, 2)": lambda net, x: F.adaptive_avg_pool2d(stem(net, x), (3, 2)).flatten(1),
    "pooling, then a layer": lambda net, x: whole(net, net.a(F.avg_pool2d(stem(net, x), 2))),
    "an MLP": lambda net, x: F.relu(x.flatten(1)),
    "a linear classifier": lambda net, x: x.view(x.size(0), -1),
    "flattened first": lambda net, x: net.dense(F.relu(x.flatten(1)[:, 16:24])),
    "padded first": lambda net, x: whole(net, net.stem(F.pad(x, (1, 0, 2, 1)))),
    "pooled first": lambda net, x: whole(net, net.stem(F.max_pool2d(x, 2))),
    "averaged first": lambda net, x: whole(net, net.stem(F.avg_pool2d(x, 2))),
    "twice": twice,
    "tied": tied,
    "concatenated": concatenated,
    "concatenated in turn": dense,
    "shuffled": shuffled,
    "split": split,
    "residual": residual,
    "hardtanh": lambda net, x: whole(net, net.a(F.hardtanh(net.stem(x), 0.0, 6.0))),
    "hardtanh of both signs": lambda net, x: whole(net, net.a(F.hardtanh(net.stem(x)))),
    "clamp": lambda net, x: whole(net, net.a(net.stem(x).clamp(min=0).clamp(max=1))),
    "ceil_mode": lambda net, x: F.max_pool2d(stem(net, x), 3, 2, ceil_mode=True).flatten(1),
    "ceil_mode, padded": lambda net, x: F.max_pool2d(stem(net, x), 2, 2, 1, 1, True).flatten(1),
    "slices": lambda net, x: whole(net, stem(net, x)[:, 1:7, ::2, -3:]),
    "1-d": lambda net, x: F.max_pool1d(net.conv1d(stem(net, x).flatten(2)), 4).flatten(1),
    "same": lambda net, x: whole(net, F.conv2d(stem(net, x), net.a.weight, padding="same")),
    "ReLU in place": lambda net, x: whole(net, net.a(net.stem(x).relu_())),
    "ReLU of a value read twice": lambda net, x: whole(net, net.a(net.b(stem(net, x)))),
}


@pytest.mark.parametrize(("n_bits", "asymmetric"), [(8, False), (4, True)])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.sampled(4)
def test_what_everybody_writes_is_exported(spelling, n_bits, asymmetric):
    torch.manual_seed(0)
    net, images = Net(SPELLINGS[spelling]), pixels(16, 12)
    x = normalized(images)
    net.eval()(x[:2])
    integers, graph, grids = quantize(net, x, n_bits, n_bits, asymmetric=asymmetric)
    if asymmetric and "stem" in grids:
        assert grids["stem"].zero_point not in (0, 8)
    with torch.no_grad():
        expected, logits = graph(x), integers(x)[0]
    tolerance = (0.5 if n_bits == 4 else 0.05) * (expected.max() - expected.min()).item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert first_disagreement(integers, graph, x) is None
    model = deployed_files.to_onnx(integers, (3, 12, 12), MEAN, STD, {})
    run = onnx_session.open_session(model, "m")
    torch.testing.assert_close(run(images), logits, rtol=0, atol=0)
    torch.testing.assert_close(run(images[:1]), logits[:1], rtol=0, atol=0)
    assert onnx_session.inexact_operations(integers, model) == []
    assert not onnx_session.FLOAT_KERNELS & set(onnx_session.optimized_nodes(model, "m").values())


def test_the_operation_of_the_page_is_exported(monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(# in engine/deploy/supported.py\n.*?)```", page, re.DOTALL)
    monkeypatch.setitem(supported.OPERATIONS, torch.ops.aten.flip.default, None)  # and undo it
    exec(compile(block, "page", "exec", dont_inherit=True), dict(vars(supported)))
    torch.manual_seed(0)
    net, images = Net(lambda net, x: whole(net, net.a(stem(net, x).flip(3, 1)))), pixels(8, 12)
    x = normalized(images)
    net.eval()(x[:2])
    integers, graph, _ = quantize(net, x, 8, 8)
    assert first_disagreement(integers, graph, x) is None
    model = deployed_files.to_onnx(integers, (3, 12, 12), MEAN, STD, {})
    run = onnx_session.open_session(model, "m")
    torch.testing.assert_close(run(images), integers(x)[0], rtol=0, atol=0)
