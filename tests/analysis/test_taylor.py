from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.taylor import taylor_terms
from engine.images.loader import Loader
from engine.networks.export import export_network


def test_taylor_terms_are_those_of_autograd():
    """Against the full Hessian of a small smooth network in float64, over several batches."""
    torch.manual_seed(1)

    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x.double())

    net = Net(nn.Conv2d(3, 2, 3, stride=5), nn.Softplus(), nn.Flatten(), nn.Linear(72, 10)).double()
    images = torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8)
    loader = Loader(images, torch.arange(7), 3, (0.5,) * 3, (0.2,) * 3)
    params = dict(net.named_parameters())
    deltas = [
        {key: torch.randn_like(params[key]) for key in keys}
        for keys in (("0.weight", "0.bias"), ("3.bias",), ("0.weight",))
    ]

    def loss(*values, keys):
        x, y = (torch.cat(part) for part in zip(*loader.batches(0), strict=True))
        logits = torch.func.functional_call(net, dict(zip(keys, values, strict=True)), (x,))
        return F.cross_entropy(logits, y)

    graph = export_network(net, (3, 32, 32))
    for delta, terms in zip(deltas, taylor_terms(graph, loader, deltas), strict=True):
        at = tuple(params[key].detach() for key in delta)
        f, d = partial(loss, keys=list(delta)), tuple(delta.values())
        g = torch.autograd.functional.jacobian(f, at)
        hessian = torch.autograd.functional.hessian(f, at)
        first = sum((a * b).sum() for a, b in zip(g, d, strict=True))
        bound = sum(a.abs().sum() for a in g) * max(b.abs().max() for b in d)
        second = sum(
            d[i].flatten() @ block.reshape(d[i].numel(), -1) @ d[j].flatten() / 2
            for i, row in enumerate(hessian)
            for j, block in enumerate(row)
        )
        assert terms == pytest.approx([first.item(), bound.item(), second.item()], rel=1e-6)
