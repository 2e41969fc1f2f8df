"""Means over batches of training and of evaluation, against sums and PyTorch's own forward."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from engine.images.loader import Loader
from engine.step import evaluation
from engine.step.evaluation import evaluate
from engine.step.metrics import epoch_means
from engine.system.errors import NotFiniteError
from regularizers import Regularizer

CE = nn.CrossEntropyLoss()


class Drawn(Regularizer, register=False):
    """The sum of a weight's elements, each times a random number."""

    def forward(self, weights):
        return (torch.rand(weights[0].shape) * weights[0]).sum()


def seven_images(batch_size=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (7, 3, 6, 6), generator=generator).to(torch.uint8)
    labels = torch.randint(4, (7,), generator=generator)
    return Loader(pixels, labels, batch_size, mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return reference.SmoothNet()


def test_means_weight_batches_by_their_images(net):
    rows = torch.tensor([[4.0, 0.5, 2.0, 3.0, 1.0], [2.0, 1.5, 8.0, 1.0, 1.0]])
    means = epoch_means(net, Drawn(1.0), 0, rows.unbind())
    assert means == {
        "loss": pytest.approx((4 * 0.5 + 2 * 1.5) / 6),
        "accuracy": pytest.approx(4 / 6),
        "Drawn": pytest.approx((4 * 2 + 2 * 8) / 6),
    }
    assert [*epoch_means(net, None, 0, rows.unbind())] == ["loss", "accuracy"]


@pytest.mark.parametrize(
    ("column", "term"), [(1, "loss"), (2, "penalty Drawn"), (4, "gradient of")]
)
def test_the_first_number_that_is_not_finite_is_named(net, column, term):
    rows = torch.ones(3, 4 + len([*net.parameters()]))
    rows[1:, column] = math.nan
    with pytest.raises(NotFiniteError, match=f"epoch 5, batch 1: the {term}.* is nan"):
        epoch_means(net, Drawn(1.0), 5, rows.unbind())


@torch.no_grad()
def test_evaluation_is_that_of_all_images_at_once(net):
    [(x, y)] = seven_images(batch_size=7).batches(0)
    logits, _ = net.eval()(x)
    result = evaluate(net, CE, seven_images())
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, y).item())
    assert result["accuracy"] == (logits.argmax(1) == y).double().mean()


def test_evaluation_runs_in_the_precision_that_it_is_told(net):
    exact = evaluate(net, CE, seven_images())["loss"]
    blurred = evaluate(net, CE, seven_images(), torch.bfloat16)["loss"]
    assert blurred != exact and blurred == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_a_regularizer_draws_does_not_depend_on_the_number_of_processes(
    net, monkeypatch, world_size
):
    alone = evaluate(net, CE, seven_images(), regularizer=Drawn(1.0))
    monkeypatch.setattr(evaluation.distributed, "get_world_size", lambda: world_size)
    monkeypatch.setattr(evaluation.distributed, "all_reduce_sum", lambda totals: totals)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(evaluation.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(evaluate(net, CE, seven_images(), regularizer=Drawn(1.0)))
    for name, value in alone.items():
        assert sum(share[name] for share in shares) == pytest.approx(value), name
